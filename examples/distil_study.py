# SPDX-License-Identifier: MIT
"""Show what distil.py brings on the tiny checkpoint, and what of a choice of experts it leaves, over several samples.

    python examples/distil_study.py --samples 3                half of the expert parameters gone, by method
    python examples/distil_study.py --samples 3 --variants     REAP's survivors: tokens, losses, parts, steps, text
    python examples/distil_study.py --samples 1 --only reap --tokens 1024      a first look

Tables are those of reproduce.py: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that choose what stays, of the 16,384
of a refit, and of the 131,072 that are trained on once, unless a line says otherwise. These are of `--text`,
the parts to train and to calibrate on.

`64 - 48 - 32` drops a quarter of the experts, trains on half of the tokens, drops a third of the rest by their saliency
then, and trains on the other half.
"""
import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import common  # noqa: F401  (puts the three files on the path)
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


def distilled(sample: Sample, value: object, out: Path, make: Make, tokens: int = TOKENS,
              text: str = "with training text", **options: object) -> Model:
    """Make a checkpoint, and train it."""
    return train(sample, make(sample, value, out), training_ids(sample, text, tokens), **options)


def in_two_steps(sample: Sample, dropped: float, out: Path) -> Model:
    """Drop half of the experts that are to go, train, drop the others, train."""
    first, second = training_ids(sample, "with training text", TOKENS).tensor_split(2)
    with tempfile.TemporaryDirectory() as folder:
        few = train(sample, reproduce.selected(sample, dropped / 2, Path(folder) / "few", "reap"), first)
        rest = (dropped / 2) / (1 - dropped / 2)
        return train(sample, reproduce.selected(replace(sample, source=few), rest, out, "reap"), second)


def method_tables() -> list[Table]:
    """What to train: which experts, or all of them narrower; as they are, and refitted before."""
    ways = {"reap": partial(reproduce.selected, method="reap"), "random": partial(reproduce.selected, method="random"),
            "hodgecover": reproduce.hodgecover_way, "hope": partial(reproduce.selected, method="hope"),
            "slimqwen": partial(reproduce.merged, method="slimqwen"),
            "narrow": partial(frontier.narrow, score="camera")}
    trained = {label: partial(distilled, make=make) for label, make in ways.items()}
    again = {label: partial(distilled, make=partial(refitted, make=make)) for label, make in ways.items()}
    return [Table(f"expert parameters gone, distilled on {TOKENS:,} tokens", GONE, trained),
            Table(f"expert parameters gone, refitted, then distilled on {TOKENS:,} tokens", GONE, again)]


def variant_tables() -> list[Table]:
    """REAP's survivors, trained otherwise."""
    way = partial(distilled, make=partial(reproduce.selected, method="reap"))
    thin = partial(distilled, make=partial(frontier.narrow, score="camera"))
    amounts = (16_384, 65_536, 131_072, 262_144, 524_288)
    by_tokens = {f"{tokens:,} tokens": partial(way, tokens=tokens) for tokens in amounts}
    by_tokens |= {f"narrow, {tokens:,} tokens": partial(thin, tokens=tokens) for tokens in amounts}
    by_tokens |= {f"layerwise, {tokens:,} tokens": partial(way, tokens=tokens, layerwise=True) for tokens in amounts}
    by_tokens["16,384 tokens, 8 passes"] = partial(way, tokens=16_384, epochs=8)
    by_loss = {"KL": way, "3/4 KL, 1/4 next token": partial(way, kl_weight=0.75),
               "next token": partial(way, kl_weight=0)}
    by_part = {"all": way} | {part: partial(way, parts=[part]) for part in distil.PARTS}
    by_step = {"64 - 32": way, "64 - 48 - 32": in_two_steps}
    by_rate = {f"learning rate {lr}": partial(way, lr=lr) for lr in (0.02, 0.005, 0.01, 0.04)}
    by_text = {"its own text": partial(way, tokens=65_536),
               "source code": partial(way, tokens=65_536, text="source code")}
    return [Table(title, GONE, lines) for title, lines in (
        ("tokens", by_tokens), ("loss", by_loss), ("parts", by_part), ("steps", by_step), ("learning rate", by_rate),
        ("text, 65,536 tokens", by_text))]


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    tables = reproduce.picked(variant_tables() if args.variants else method_tables(), args.only, args.columns)
    reproduce.show_held_out(tables, reproduce.read_samples(args), args.tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = reproduce.command_line(__file__, __doc__)
    parser.add_argument("--variants", action="store_true", help="what the training depends on instead")
    return hodgecover.run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
