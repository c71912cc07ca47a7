# SPDX-License-Identifier: MIT
"""Train a checkpoint such as those that lie beside this file: a small model on text that every Python carries.

    python examples/train_tiny.py olmoe DIR                 train (a quarter of an hour on 2 cores) and write DIR
    python examples/train_tiny.py qwen3_moe DIR             the same of another kind
    python examples/train_tiny.py olmoe --held-out FILE     only write the held-out text, for evaluate.py and --eval
    python examples/train_tiny.py olmoe --calibration FILE  only write the calibration text, for --calib

`olmoe` learns Python's documentation, `qwen3_moe` the code of its standard library. `qwen3` is dense, for dot_moe.py,
and learns the documentation.

The forward pass is that of `model_io`. Only the experts are computed densely here (every expert on every token, times
its gate weight), which at this size is the faster way to the same sums.
"""
import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import common
import hodgecover
import model_io
from model_io import Config, Experts, Layer, Model, python_documentation, read_config, rms_norm, route

STEPS, SEQ_LEN = 1500, 512
END = "<|endoftext|>"
SHARED = {
    "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 0, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 512, "pad_token_id": 0, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 2048,
}
CONFIGS = {
    "olmoe": SHARED | {
        "architectures": ["OlmoeForCausalLM"], "clip_qkv": None, "hidden_size": 96, "intermediate_size": 16,
        "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 6, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 4, "num_key_value_heads": 6, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "router_aux_loss_coef": 0.01},
    "qwen3_moe": SHARED | {
        "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 32, "hidden_size": 80,
        "intermediate_size": 240, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 24,
        "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 48, "num_experts_per_tok": 4,
        "num_hidden_layers": 5, "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "router_aux_loss_coef": 0.01, "sliding_window": None, "use_sliding_window": False},
    "qwen3": SHARED | {
        "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "hidden_size": 96, "intermediate_size": 512,
        "model_type": "qwen3", "num_attention_heads": 6, "num_hidden_layers": 4, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-06, "sliding_window": None, "use_sliding_window": False},
}
TEXTS = {"olmoe": python_documentation, "qwen3_moe": common.python_code,
         "qwen3": python_documentation}  # part -> documents


def train_tokenizer(texts: Sequence[str], config: dict, path: Path) -> None:
    """Train a byte-level BPE of the configuration's size, with the end-of-text token as id 0, and write it to the
    folder `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=config["vocab_size"], special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": END, "pad_token": END, "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def initial_weights(cfg: Config) -> dict[str, torch.Tensor]:
    """Parameters by name, experts stacked; the projections back into the stream are scaled down by depth."""
    d, n, f, dense = cfg.hidden_size, cfg.num_experts, cfg.expert_width, cfg.dense_width
    feed_forward = {"mlp.gate_proj": (dense, d), "mlp.up_proj": (dense, d), "mlp.down_proj": (d, dense)}
    if n:
        feed_forward = {"mlp.gate": (n, d), "mlp.experts.gate_proj": (n, f, d), "mlp.experts.up_proj": (n, f, d),
                        "mlp.experts.down_proj": (n, d, f)}
    shapes = {"model.embed_tokens.weight": (cfg.vocab_size, d), "model.norm.weight": (d,),
              "lm_head.weight": (cfg.vocab_size, d)}
    for i in range(cfg.num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), **model_io.mixer_shapes(cfg),
            **feed_forward}.items()}
    weights = {}
    for name, shape in shapes.items():
        back = "o_proj" in name or "down_proj" in name
        std = 0.05 / math.sqrt(2 * cfg.num_layers) if back else 0.05
        weights[name] = (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * std).requires_grad_()
    return weights


def forward(ids: torch.Tensor, weights: dict[str, torch.Tensor], cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, L, V) of ids (B, L), and the load-balancing loss n sum_e (share routed to e) (mean p_e), 0 without
    experts."""
    h, balance = F.embedding(ids, weights["model.embed_tokens.weight"]), torch.zeros(())
    for i in range(cfg.num_layers):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not cfg.num_experts:
            h = model_io.run_layer(h, Layer(None, None, w), cfg)[2].view_as(h)
            continue
        h, x = model_io.run_mixer(h, w, cfg)  # (T, d)
        experts = Experts(*(w[f"mlp.experts.{part}_proj.weight"] for part in Experts._fields))
        gates = route(x, Layer(experts, w["mlp.gate.weight"], w), cfg)
        hidden = F.silu(x @ experts.gate.flatten(0, 1).T) * (x @ experts.up.flatten(0, 1).T)
        hidden = hidden.unflatten(-1, (cfg.num_experts, -1)) * gates[..., None]
        h = (h + hidden.flatten(-2) @ experts.down.transpose(1, 2).flatten(0, 1)).view(*ids.shape, -1)
        p = (x @ w["mlp.gate.weight"].T).softmax(-1)  # (T, n)
        share = (gates > 0).to(p).mean(0)
        balance = balance + cfg.num_experts * (share * p.mean(0)).sum() / cfg.num_layers
    return rms_norm(h, weights["model.norm.weight"], cfg.rms_norm_eps) @ weights["lm_head.weight"].T, balance


def train(ids: torch.Tensor, cfg: Config, steps: int, batch: int = 8, seq_len: int = SEQ_LEN, peak: float = 4e-3,
          balance_weight: float = 0.01) -> dict[str, torch.Tensor]:
    """Train by AdamW with warm-up and cosine decay on random windows of ids (T,); return the parameters by name.

    Needs more ids than seq_len."""
    weights = initial_weights(cfg)
    matrices = [w for w in weights.values() if w.dim() > 1]
    vectors = [w for w in weights.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
                                  lr=peak, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))))
    started = time.monotonic()
    for step in range(steps):
        at = torch.randint(len(ids) - seq_len, (batch, 1)) + torch.arange(seq_len + 1)
        logits, balance = forward(ids[at[:, :-1]], weights, cfg)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[at[:, 1:]].flatten())
        optimizer.zero_grad()
        (loss + balance_weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}  balance {balance.item():.3f}  "
                  f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {name: w.detach() for name, w in weights.items()}


def save(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write model.safetensors in bfloat16, one tensor a projection of an expert, as the published models have them."""
    tensors = {}
    for name, w in weights.items():
        w = w.to(torch.bfloat16)
        if ".experts." in name:
            tensors |= {name.replace("experts.", f"experts.{e}."): w[e].clone() for e in range(len(w))}
        else:
            tensors[name] = w
    (path / model_io.WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def unigram_perplexity(train_ids: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> float:
    """Perplexity on ids (T,) of the add-one-smoothed token frequencies of train_ids."""
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1
    return (-(counts / counts.sum()).log()[ids].mean()).exp().item()


def make(kind: str, out: Path, steps: int) -> tuple[float, float]:
    """Train a checkpoint of one of CONFIGS and write it to the folder `out`; return its held-out perplexity and a
    unigram model's.

    Raises InputError if `out` cannot be made."""
    torch.manual_seed(0)
    config, documents = CONFIGS[kind], TEXTS[kind]
    cfg = read_config(config)
    with model_io.new_folder(out) as folder:
        texts = documents("train")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        train_tokenizer(texts, config, folder)
        save(initial_weights(cfg), folder)  # so that Model can read the tokenizer
        model = Model(folder)
        train_ids, held_out = model.encode(texts), model.encode(documents("held-out"))
        print(f"{len(train_ids):,} training and {len(held_out):,} held-out tokens", file=sys.stderr)
        save(train(train_ids, cfg, steps), folder)
        found = Model(folder).perplexity(model_io.sequences(held_out, SEQ_LEN))
    return found, unigram_perplexity(train_ids, held_out, cfg.vocab_size)


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.parser_of(__file__, __doc__)
    parser.add_argument("kind", choices=CONFIGS, help="what model on which text")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("out", metavar="DIR", nargs="?", type=Path, help="output folder, new")
    work.add_argument("--held-out", type=Path, metavar="FILE", help="write the held-out text to FILE and stop")
    work.add_argument("--calibration", type=Path, metavar="FILE", help="write the calibration text to FILE and stop")
    parser.add_argument("--steps", metavar="N", type=int, default=STEPS, help="optimiser steps [%(default)s]")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    hodgecover.check_range("steps", args.steps, 1, 10**6)
    for part, file in (("held-out", args.held_out), ("calibration", args.calibration)):
        if file is not None:
            if args.steps != STEPS:
                raise model_io.InputError(f"steps: does not go with --{part}, which trains nothing")
            model_io.check_new(file)
            if file.is_dir() or not file.absolute().parent.is_dir():
                raise model_io.InputError(f"{file}: must name a new file in an existing folder")
            return model_io.write_whole(file, "\n\n".join(TEXTS[args.kind](part)).encode())
    found, unigram = make(args.kind, args.out, args.steps)
    print(f"held-out perplexity {found:.1f}, of a unigram model {unigram:.1f}")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
