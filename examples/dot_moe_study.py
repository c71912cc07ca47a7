# SPDX-License-Identifier: MIT
"""Show what dot_moe.py makes of a dense model, by way of splitting it, before and after distil.py; and what is left if
half of the experts go then.

    python examples/train_tiny.py qwen3 DENSE
    python examples/dot_moe_study.py --model DENSE --samples 1
    python examples/dot_moe_study.py --model DENSE --samples 1 --only random --columns 50%      one cell of each table

A column is the share of a layer's neurons that a token meets: 4, 8 or 12 of 16 experts. Tables are those of
reproduce.py. A sample is a seed: of all that is drawn, of the 131,072 tokens on which routers and assignments are
learned (in sequences of 128, so that a pass is 128 steps), and of the 131,072 that are distilled on. The last table
drops half of the experts of `dot`, by hodgecover.py and by saliency, and distils to the dense model.
"""
import argparse
import functools
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import common
import distil
import distil_study
import dot_moe
import hodgecover
import reproduce
from dot_moe import Split, Want
from model_io import Model
from refit_study import training_ids
from reproduce import Make, Sample, Table

EXPERTS = 16
TOP_K = {"25%": 4, "50%": 8, "75%": 12}
TOKENS, LENGTH = 131_072, 128  # to learn the split on
DROPPED = 0.5  # share of the experts


@functools.cache
def splits(sample: Sample, top_k: int, split: str, layerwise: bool) -> dict[str, Split]:
    """How to split the layers of a sample's source, by their name."""
    ids = training_ids(sample, "with training text", TOKENS).view(-1, LENGTH)
    kl = dot_moe.KL / (dot_moe.KL + dot_moe.NEXT_TOKEN)
    plan = distil.Plan(1, dot_moe.LR, kl, [], sample.seed, hodgecover.MEMORY)
    way = dot_moe.align_layers if layerwise else dot_moe.align
    return way(sample.source, ids, 0, Want(EXPERTS, top_k, split), plan, torch.empty, lambda *_: None)


def sparse(sample: Sample, top_k: int, out: Path, split: str, layerwise: bool = False) -> Model:
    """Write the sparse checkpoint, split by one of dot_moe.SPLITS."""
    dot_moe.export(sample.source, splits(sample, top_k, split, layerwise), top_k, out, {})
    return Model(out)


def fewer(sample: Sample, top_k: int, out: Path, drop: Make) -> Model:
    """Write `dot` without half of its experts."""
    with tempfile.TemporaryDirectory() as folder:
        whole = sparse(sample, top_k, Path(folder) / "whole", "dot")
        drop(replace(sample, source=whole), DROPPED, out)
    return Model(out)


def tables() -> list[Table]:
    """Ways to split, as they are and distilled; then with half of the experts."""
    ways = {"dot": partial(sparse, split="dot"), "dot, layer by layer": partial(sparse, split="dot", layerwise=True)}
    ways |= {split: partial(sparse, split=split) for split in dot_moe.SPLITS if split != "dot"}
    half = {method: partial(fewer, drop=partial(reproduce.selected, method=method))
            for method in ("hodgecover", "reap")}
    half |= {f"{label}, distilled": partial(distil_study.distilled, make=make) for label, make in half.items()}
    after = {label: partial(distil_study.distilled, make=make) for label, make in ways.items()}
    few = {name: top_k for name, top_k in TOP_K.items() if top_k <= (1 - DROPPED) * EXPERTS}
    return [Table("active neurons", TOP_K, ways),
            Table(f"active neurons, distilled on {distil_study.TOKENS:,} tokens", TOP_K, after),
            Table("active neurons, half of the experts gone", few, half)]


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    chosen = reproduce.picked(tables(), args.only, args.columns)
    samples = reproduce.read_samples(args)
    dot_moe.check_options(samples[0].source, argparse.Namespace(experts=EXPERTS, top_k=1, epochs=1, lr=dot_moe.LR))
    reproduce.show_held_out(chosen, samples, args.tokens)


main = common.main_of(partial(reproduce.command_line, __file__, __doc__), run)


if __name__ == "__main__":
    sys.exit(main())
