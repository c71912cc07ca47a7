# SPDX-License-Identifier: MIT
"""Makes tests/golden: small random checkpoints and the logits that transformers computes for them.

    pip install transformers && python tests/make_golden.py

Each folder holds the checkpoint as transformers saves it, and golden.safetensors with `ids` (B, L) and `logits`
(B, L, V). One-dimensional parameters are shaken, so that a norm or a bias left out would show.
"""
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

try:
    import transformers
except ImportError:
    sys.exit("make_golden.py needs transformers: pip install transformers")

HERE = Path(__file__).resolve().parent / "golden"
SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=0)
OLMOE = SMALL | dict(intermediate_size=16, num_experts=8, num_experts_per_tok=3)
CASES = {
    "olmoe-plain": (transformers.OlmoeConfig, OLMOE, {}),
    "olmoe-gqa-clip": (transformers.OlmoeConfig, OLMOE | dict(
        num_key_value_heads=2, clip_qkv=0.7, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), {}),
    "olmoe-renormalised-tied": (transformers.OlmoeConfig, OLMOE | dict(
        norm_topk_prob=True, tie_word_embeddings=True, attention_bias=True), {}),
    "olmoe-sharded": (transformers.OlmoeConfig, OLMOE | dict(num_hidden_layers=3, rms_norm_eps=1e-3),
                      {"max_shard_size": "60KB"}),
}


def make(name: str, config_class: type, options: dict, save: dict) -> None:
    """One checkpoint folder with its golden logits."""
    torch.manual_seed(sorted(CASES).index(name))
    model = transformers.AutoModelForCausalLM.from_config(config_class(**options), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(8)  # the initial 0.02 would leave attention and router flat
    ids = torch.randint(options["vocab_size"], (2, 24))
    with torch.no_grad():
        logits = model(ids).logits
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name, **save)
    save_file({"ids": ids, "logits": logits.contiguous()}, HERE / name / "golden.safetensors")
    print(f"{name}: logits of size {logits.abs().mean():.2f}")


if __name__ == "__main__":
    for case, arguments in CASES.items():
        make(case, *arguments)
