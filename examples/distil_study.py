# SPDX-License-Identifier: MIT
"""Show what distil.py brings on the tiny checkpoint, and what of a choice of experts it leaves, over several samples.

    python examples/distil_study.py --samples 3                half of the expert parameters gone, by method
    python examples/distil_study.py --samples 3 --variants     REAP's survivors and narrower experts, by tokens
    python examples/distil_study.py --samples 1 --only reap --tokens 1024      a first look

Tables are those of reproduce.py: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that choose what stays, of the 16,384
of a refit, and of the 131,072 that are trained on once, unless a line says otherwise. These are of `--text`, the parts
to train and to calibrate on.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch

import common
import distil
import frontier
import hodgecover
import reproduce
from model_io import Model
from refit_study import refitted, training_ids
from reproduce import Make, Sample, Table

TOKENS = 131_072  # to train on
GONE = {"50%": reproduce.DROPPED["50%"]}


def train(sample: Sample, output: Model, ids: torch.Tensor, layerwise: bool = False, **changes: object) -> Model:
    """Train a checkpoint's files on ids (B, L), with the defaults of distil.py but for changes of its plan."""
    plan = distil.Plan(1, distil.LR, 1.0, [*distil.PARTS], sample.seed, hodgecover.MEMORY)._replace(**changes)
    way = distil.distil_layers if layerwise else distil.distil
    for _ in way(sample.source, output, ids, 0, plan, torch.empty, lambda *_: None) or ():
        pass
    return output


def distilled(sample: Sample, value: object, out: Path, make: Make, tokens: int = TOKENS, **options: object) -> Model:
    """Make a checkpoint, and train it."""
    return train(sample, make(sample, value, out), training_ids(sample, "with training text", tokens), **options)


def method_tables() -> list[Table]:
    """What to train: which experts, or all of them narrower; as they are, and refitted before."""
    ways = {method: partial(reproduce.selected, method=method) for method in ("reap", "random", "hodgecover", "hope")}
    ways |= {"slimqwen": partial(reproduce.merged, method="slimqwen"),
             "narrow": partial(frontier.narrow, score="camera")}
    trained = {label: partial(distilled, make=make) for label, make in ways.items()}
    again = {label: partial(distilled, make=partial(refitted, make=make)) for label, make in ways.items()}
    return [Table(f"expert parameters gone, distilled on {TOKENS:,} tokens", GONE, trained),
            Table(f"expert parameters gone, refitted, then distilled on {TOKENS:,} tokens", GONE, again)]


def variant_tables() -> list[Table]:
    """Other numbers of tokens."""
    way = partial(distilled, make=partial(reproduce.selected, method="reap"))
    ways = {"": way, "narrow, ": partial(distilled, make=partial(frontier.narrow, score="camera")),
            "layerwise, ": partial(way, layerwise=True)}
    lines = {f"{label}{tokens:,} tokens": partial(make, tokens=tokens) for label, make in ways.items()
             for tokens in (16_384, 65_536, 131_072, 262_144, 524_288)}
    return [Table("tokens", GONE, lines | {"16,384 tokens, 8 passes": partial(way, tokens=16_384, epochs=8)})]


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    tables = reproduce.picked(variant_tables() if args.variants else method_tables(), args.only, args.columns)
    reproduce.show_held_out(tables, reproduce.read_samples(args), args.tokens)


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = reproduce.command_line(__file__, __doc__)
    parser.add_argument("--variants", action="store_true", help="other numbers of tokens instead")
    return parser


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
