# SPDX-License-Identifier: MIT
"""Make tests/golden: small random checkpoints and the logits that transformers computes for them.

    pip install transformers accelerate && python tests/make_golden.py [NAME ...]

Each folder holds the checkpoint as transformers saves it (a `published` one: as it reads it), and golden.safetensors
with `ids` (B, L) and `logits` (B, L, V), for a checkpoint with a multi-token prediction head also `mtp_logits`
(B, L - 1, V). One-dimensional parameters are shaken, so that a norm or a bias left out would show.

The checkpoints of the folders fp8-* are quantised here as the official FP8 releases are, and transformers dequantises
them: as it loads them, or, of blocks that are incomplete, which it takes for smaller ones when it loads, by what it
takes in a backward pass.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

try:
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
    from transformers.modeling_layers import MtpModel
except ImportError:
    sys.exit("make_golden.py needs transformers: pip install transformers")

HERE = Path(__file__).resolve().parent / "golden"
SMALL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=0)
OLMOE = SMALL | dict(intermediate_size=16, num_experts=8, num_experts_per_tok=3)
QWEN2 = OLMOE | dict(intermediate_size=24, moe_intermediate_size=16, shared_expert_intermediate_size=20)
QWEN3 = OLMOE | dict(intermediate_size=24, moe_intermediate_size=16, head_dim=12, num_key_value_heads=2)
DENSE = SMALL | dict(intermediate_size=24, head_dim=12, num_key_value_heads=2)
QWEN3_5 = SMALL | dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, shared_expert_intermediate_size=12, head_dim=16,
    num_key_value_heads=2, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=6, linear_conv_kernel_dim=4, max_position_embeddings=128,
    rms_norm_eps=1e-3,  # at 1e-6 the norm after the recurrence amplifies float32 rounding to 1e-4 of a logit
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5,
                     "mrope_interleaved": True, "mrope_section": [2, 1, 1]})
QWEN3_NEXT = QWEN3_5 | dict(
    hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_hidden_layers=2, intermediate_size=24,
    moe_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
QWEN3_VL = QWEN3 | dict(moe_intermediate_size=8, rope_parameters={
    "rope_type": "default", "rope_theta": 700.0, "mrope_interleaved": True, "mrope_section": [2, 2, 2]})
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4,
              spatial_merge_size=1, temporal_patch_size=1, num_position_embeddings=4)
QWEN3_VL_VISION = VISION | dict(hidden_size=8, intermediate_size=8, deepstack_visual_indexes=[0])
CASES = {
    "olmoe-plain": (transformers.OlmoeConfig, OLMOE, {}),
    "olmoe-gqa-clip": (transformers.OlmoeConfig, OLMOE | dict(
        num_key_value_heads=2, clip_qkv=0.7, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), {}),
    "olmoe-renormalised-tied": (transformers.OlmoeConfig, OLMOE | dict(
        norm_topk_prob=True, tie_word_embeddings=True, attention_bias=True), {}),
    "olmoe-sharded": (transformers.OlmoeConfig, OLMOE | dict(num_hidden_layers=3, rms_norm_eps=1e-3),
                      {"max_shard_size": "60KB"}),
    "qwen2-dense-between": (transformers.Qwen2MoeConfig, QWEN2 | dict(num_hidden_layers=3, mlp_only_layers=[1]), {}),
    "qwen2-renormalised": (transformers.Qwen2MoeConfig, QWEN2 | dict(
        decoder_sparse_step=2, norm_topk_prob=True, qkv_bias=False, num_key_value_heads=2), {}),
    "qwen3-dense-first": (transformers.Qwen3MoeConfig, QWEN3 | dict(mlp_only_layers=[0], norm_topk_prob=True), {}),
    "qwen3-plain-tied": (transformers.Qwen3MoeConfig, QWEN3 | dict(tie_word_embeddings=True, attention_bias=True),
                         {"max_shard_size": "60KB"}),
    "dense-qwen3": (transformers.Qwen3Config, DENSE, {"max_shard_size": "40KB"}),
    "dense-qwen3-tied": (transformers.Qwen3Config, DENSE | dict(
        tie_word_embeddings=True, attention_bias=True, num_key_value_heads=1), {}),
    "qwen3_5-text": (transformers.Qwen3_5MoeTextConfig, QWEN3_5, {}),
    "qwen3_5-vision-mtp": (transformers.Qwen3_5MoeConfig, dict(
        text_config=QWEN3_5 | dict(mtp_num_hidden_layers=1, layer_types=["linear_attention", "full_attention"] * 2),
        vision_config=VISION), {"max_shard_size": "100KB", "save_original_format": False}),
    "qwen3_next-dense-first": (transformers.Qwen3NextConfig, QWEN3_NEXT | dict(
        norm_topk_prob=False, mlp_only_layers=[0]), {}),
    "qwen3_next-tied-mtp": (transformers.Qwen3NextConfig, QWEN3_NEXT | dict(
        tie_word_embeddings=True, linear_num_value_heads=6, rope_parameters={
            "rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}), {"max_shard_size": "40KB"}),
    "qwen3_vl-resaved": (transformers.Qwen3VLMoeConfig, dict(
        text_config=QWEN3_VL | dict(mlp_only_layers=[0], attention_bias=True), vision_config=QWEN3_VL_VISION), {}),
    "qwen3_vl-published": (transformers.Qwen3VLMoeConfig, dict(
        text_config=QWEN3_VL, vision_config=QWEN3_VL_VISION, tie_word_embeddings=True), {"max_shard_size": "80KB"}),
}
QWEN3_5_FP8 = QWEN3_5 | dict(linear_value_head_dim=8, shared_expert_intermediate_size=16, num_hidden_layers=2,
                             layer_types=["linear_attention", "full_attention"])
FP8_CASES = {  # likewise; the block size, the scales' dtype
    "fp8-olmoe": (transformers.OlmoeConfig, OLMOE, {"max_shard_size": "40KB"}, [16, 16], torch.float32),
    "fp8-qwen2": (transformers.Qwen2MoeConfig, QWEN2 | dict(
        intermediate_size=32, shared_expert_intermediate_size=48, mlp_only_layers=[0]), {}, [8, 16], torch.bfloat16),
    "fp8-qwen3-incomplete": (transformers.Qwen3MoeConfig, QWEN3 | dict(
        hidden_size=160, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        head_dim=36, num_key_value_heads=1, tie_word_embeddings=True), {}, [128, 128], torch.bfloat16),
    "fp8-qwen3-one-scale": (transformers.Qwen3MoeConfig, QWEN3, {}, None, torch.float32),
    "fp8-dense-qwen3": (transformers.Qwen3Config, DENSE | dict(intermediate_size=32, head_dim=16), {}, [16, 16],
                        torch.float32),
    "fp8-qwen3_5": (transformers.Qwen3_5MoeConfig, dict(text_config=QWEN3_5_FP8, vision_config=VISION), {}, [16, 16],
                    torch.bfloat16),
}
PROJECTION = re.compile(r"layers\.\d+\..*\.((q|k|v|o|gate|up|down|out)_proj|in_proj_(qkv|z))\.weight")


def shake(model: torch.nn.Module) -> None:
    """Move one-dimensional parameters off their initial values, and give matrices, a router of zeros among them,
    values that matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(std=0.16)


def add_mtp(model: torch.nn.Module, path: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Add a multi-token prediction head to the saved checkpoint, in a shard of its own under its published names.

    Return its golden logits (B, L - 1, V) by name.
    """
    text = model.config.get_text_config()
    text.num_mtp_layers, text.mtp_layer_types = 1, ["full_attention"]
    mtp = MtpModel(model, 1).eval()
    shake(mtp.layers[0])
    layer = mtp.layers[0].state_dict()
    outside = {"eh_proj.": "fc.", "enorm.": "pre_fc_norm_embedding.", "hnorm.": "pre_fc_norm_hidden.",
               "post_norm.": "norm.", "mtp_block.": "layers.0."}
    tensors = {f"mtp.{new}{name.removeprefix(old)}": tensor.contiguous() for name, tensor in layer.items()
               for old, new in outside.items() if name.startswith(old)}
    for part in ("gate", "up", "down"):  # one by one, as Qwen3.5 is published; its other layers are fused
        fused = tensors["mtp.layers.0.mlp.experts." + ("down_proj" if part == "down" else "gate_up_proj")]
        stacked = fused if part == "down" else fused.chunk(2, dim=1)[part == "up"]
        tensors |= {f"mtp.layers.0.mlp.experts.{e}.{part}_proj.weight": w.contiguous() for e, w in enumerate(stacked)}
    del tensors["mtp.layers.0.mlp.experts.gate_up_proj"], tensors["mtp.layers.0.mlp.experts.down_proj"]
    save_file(tensors, path / "model-mtp.safetensors", metadata={"format": "pt"})
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-mtp.safetensors")
    index["metadata"]["total_size"] += sum(t.numel() * t.itemsize for t in tensors.values())
    index["metadata"]["total_parameters"] += sum(t.numel() for t in tensors.values())
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]  # after the final norm
    positions = torch.arange(1, ids.shape[1])[None].expand(len(ids), -1)
    drafted = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
    return {"mtp_logits": mtp._project_to_logits(drafted).contiguous()}


def transpose_experts(path: Path) -> None:
    """Store the fused experts transposed, as Qwen3-VL is published; transformers 5 reads both layouts, and saves the
    other one."""
    for file in path.glob("model*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor
                   for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@torch.no_grad()
def make(name: str, config_class: type, options: dict, save: dict) -> None:
    """Make a checkpoint folder with its golden logits."""
    torch.manual_seed(sum(name.encode()))
    config = config_class(**options)
    auto = AutoModelForImageTextToText if "vision_config" in options else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    shake(model)
    shape = {"qwen3_5": (2, 70), "qwen3_next": (1, 66)}.get(name.partition("-")[0], (2, 24))
    ids = torch.randint(SMALL["vocab_size"], shape)
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, **save)
    if "published" in name:
        transpose_experts(path)
        model = auto.from_pretrained(path).eval()
    golden = {"ids": ids, "logits": model(ids).logits.contiguous()}
    if name.endswith("mtp"):
        golden |= add_mtp(model, path, ids)
    save_file(golden, path / "golden.safetensors")
    for file in path.iterdir():
        file.chmod(0o644)
    print(f"{name}: logits of size {golden['logits'].abs().mean():.2f}")


def quantised(weight: torch.Tensor, block: list[int] | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8, and its scales of that dtype, one a block, or one."""
    (out, wide), (rows, columns) = weight.shape, block or weight.shape
    stored, scales = torch.empty(out, wide, dtype=torch.float8_e4m3fn), []
    for row in range(0, out, rows):
        for column in range(0, wide, columns):
            part = weight[row:row + rows, column:column + columns].float()
            scales.append((part.abs().max() / 448).to(dtype))
            stored[row:row + rows, column:column + columns] = (part / scales[-1].float()).clamp(-448, 448).to(stored)
    scales = torch.stack(scales)
    return stored, scales.view(-1, -(-wide // columns)) if block else scales[0].clone()


@torch.no_grad()
def make_fp8(name: str, config_class: type, options: dict, save: dict, block: list[int] | None, dtype: torch.dtype
             ) -> None:
    """Make an FP8 checkpoint folder with its golden logits: of the weights as transformers dequantises them, bfloat16,
    in float32 products."""
    torch.manual_seed(sum(name.encode()))
    auto = AutoModelForImageTextToText if "vision_config" in options else AutoModelForCausalLM
    model = auto.from_config(config_class(**options), dtype=torch.float32)
    shake(model)
    path, plain = HERE / name, HERE / f"{name}-dequantised"
    shutil.rmtree(path, ignore_errors=True)
    model.bfloat16().save_pretrained(path, **save)
    shutil.copytree(path, plain)
    for file in path.glob("model*.safetensors"):
        tensors, dequantised = load_file(file), load_file(file)
        for key in filter(PROJECTION.search, [*tensors]):
            tensors[key], scale = quantised(tensors[key], block, dtype)
            tensors[f"{key}_scale_inv"] = scale
            dequantised[key] = _dequantize_fp8_weight(tensors[key], scale, block, torch.float32).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
        save_file(dequantised, plain / file.name, metadata={"format": "pt"})
        if (index_file := path / "model.safetensors.index.json").exists():
            index = json.loads(index_file.read_text())
            index["weight_map"] |= dict.fromkeys(tensors, file.name)
            index_file.write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((path / "config.json").read_text())
    (config.get("text_config") or config)["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": block,
        "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = torch.randint(SMALL["vocab_size"], (1, 70) if "qwen3_5" in name else (2, 24))
    logits = {}
    for folder in (plain, path):
        model, info = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
        assert not any(info.values()), info
        logits[folder] = model.float()(ids).logits.contiguous()
    shutil.rmtree(plain)
    if "incomplete" not in name:
        assert torch.equal(logits[plain], logits[path])
    save_file({"ids": ids, "logits": logits[plain]}, path / "golden.safetensors")
    for file in path.iterdir():
        file.chmod(0o644)
    print(f"{name}: logits of size {logits[plain].abs().mean():.2f}")


if __name__ == "__main__":
    makers = dict.fromkeys(CASES, make) | dict.fromkeys(FP8_CASES, make_fp8)
    for case in sys.argv[1:] or makers:
        makers[case](case, *(CASES | FP8_CASES)[case])
