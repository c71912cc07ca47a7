# SPDX-License-Identifier: MIT
"""Make a random checkpoint of a published model's shape, to measure cost and memory if the real one is not at hand.

    python examples/random_checkpoint.py olmoe-1b-7b DIR              13.8 GB, under 3 minutes
    python examples/random_checkpoint.py qwen3-30b-a3b DIR --hollow   takes no disk space: zeros, for estimate.py alone

Shapes, names and shards are the published ones' (of qwen3.5-35b-a3b: the text part without the multi-token head), the
tokenizer is the tiny checkpoint's. Next-token logits have a standard deviation of 4, which gives them the entropy of a
trained model's, some 3 nats. Nothing else about the weights is like a trained model's.
"""
import argparse
import json
import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

import common
import hodgecover
import model_io

SHARD_BYTES = 5_000_000_000
LOGIT_DEVIATION = 4
SHAPES = {
    "olmoe-1b-7b": dict(
        model_type="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=False, rms_norm_eps=1e-5, rope_theta=10000.0, architectures=["OlmoeForCausalLM"]),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6, architectures=["Qwen3MoeForCausalLM"]),
    "qwen3.5-35b-a3b": dict(
        model_type="qwen3_5_moe_text", vocab_size=248320, hidden_size=2048, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, num_hidden_layers=40, num_attention_heads=16, num_key_value_heads=2,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4, full_attention_interval=4, num_experts=256,
        num_experts_per_tok=8, rms_norm_eps=1e-6, rope_theta=1e7, architectures=["Qwen3_5MoeForCausalLM"]),
}
COMMON = {"hidden_act": "silu", "eos_token_id": 0, "tie_word_embeddings": False, "dtype": "bfloat16"}


def tensor_shapes(cfg: dict) -> dict[str, list[int]]:
    """Shapes of all tensors by name, in the order of the file."""
    config, d, vocab = model_io.read_config(cfg | COMMON), cfg["hidden_size"], cfg["vocab_size"]
    first = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"))
    shapes = {"model.embed_tokens.weight": [vocab, d]}
    for i, own in enumerate(model_io.layer_configs(cfg | COMMON, config, [])):
        layer = first | model_io.layer_shapes(own, fused=bool(config.shared_width))
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": [d], "lm_head.weight": [vocab, d]}


def random_tensor(name: str, shape: list[int], generator: torch.Generator, norms_less_1: bool) -> torch.Tensor:
    """A norm's weights, which multiply by 1; a matrix that keeps the scale of what it multiplies, bfloat16."""
    if name.endswith("norm.weight"):
        return torch.full(shape, 0.0 if norms_less_1 and "linear_attn" not in name else 1.0, dtype=torch.bfloat16)
    std = 1.0 if name.endswith("embed_tokens.weight") else shape[-1] ** -0.5
    std *= LOGIT_DEVIATION if name.startswith("lm_head") else 1
    return (torch.randn(shape, generator=generator, device=generator.device) * std).to(torch.bfloat16).cpu()


def into_shards(shapes: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """Consecutive tensors, SHARD_BYTES of bfloat16 at most."""
    shards, size = [{}], 0
    for name, shape in shapes.items():
        size += 2 * math.prod(shape)
        if size > SHARD_BYTES and shards[-1]:
            shards, size = [*shards, {}], 2 * math.prod(shape)
        shards[-1][name] = shape
    return shards


def write_shard(path: Path, shapes: dict[str, list[int]], generator: torch.Generator | None, norms_less_1: bool
                ) -> None:
    """Write one safetensors file, tensor after tensor; without a generator, a hole of its size."""
    def numbers(name: str, shape: list[int]) -> list[memoryview]:
        if generator is None:
            return []
        return [common.as_bytes(random_tensor(name, shape, generator, norms_less_1), torch.bfloat16)]
    pieces = {name: model_io.Piece(name, None, path.name, "BF16", shape, partial(numbers, name, shape))
              for name, shape in shapes.items()}
    model_io.write_safetensors(path, pieces, {"format": "pt"})
    if generator is None:
        os.truncate(path, path.stat().st_size + sum(piece.nbytes() for piece in pieces.values()))


def write(config: dict, out: Path, hollow: bool = False, device: str = "cpu") -> int:
    """Write a checkpoint of a configuration, without weights if hollow, else drawn on a device, to the folder `out`;
    return its number of parameters. Raises InputError if `out` cannot be made."""
    shapes = tensor_shapes(config)
    shards = into_shards(shapes)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    generator = None if hollow else torch.Generator(device).manual_seed(0)
    norms_less_1 = model_io.FAMILIES[config["model_type"]].norms_less_1
    bar = model_io.progress_bar()
    with model_io.new_folder(out) as folder:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_shard(folder / file, shard, generator, norms_less_1)
            weight_map |= dict.fromkeys(shard, file)
            bar(number / len(shards))
        index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
        (folder / model_io.INDEX).write_text(json.dumps(index) + "\n")
        (folder / "config.json").write_text(json.dumps(config | COMMON, indent=1) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(common.HERE / "tiny-olmoe" / name, folder / name)
    bar(None)
    return parameters


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.parser_of(__file__, __doc__)
    parser.add_argument("shape", metavar="SHAPE", choices=SHAPES, help=", ".join(SHAPES))
    parser.add_argument("out", metavar="DIR", type=Path, help="output folder")
    parser.add_argument("--hollow", action="store_true", help="zeros that take no disk space")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    parameters = write(SHAPES[args.shape], args.out, args.hollow)
    print(f"{args.out}: {parameters / 1e9:.2f}e9 parameters")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
