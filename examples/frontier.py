# SPDX-License-Identifier: MIT
"""Compare fewer experts, narrower experts and both, at equal parameters, each as it is and refitted.

    python examples/frontier.py                            all lines, five samples
    python examples/frontier.py --picture frontier.png     and a picture of the first line of each kind (matplotlib)
    python examples/frontier.py --samples 2 --tokens 1024  a first look

A column is the share of the expert parameters that goes. `drop` drops that share of the experts of every layer (by
baselines.py or hodgecover.py), `narrow` that share of the hidden units of every expert (heapr.py), `both` drops the
share 1 - sqrt(1 - R) of the experts, and makes the others narrower until R is gone. After a label stand the shares
that whole experts and whole units reach.

Tables are those of reproduce.py: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that choose what stays, unless the
label names another number, and of the 16,384 that it is refitted on. The last table is of the parameters, all and
those that one token meets, as shares of the source's.
"""
import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import common
import evaluate
import heapr
import hodgecover
import reproduce
from model_io import Model
from refit_study import TOKENS, refitted
from reproduce import Found, Make, Sample, Score, Table

RATES = {name: reproduce.DROPPED[name] for name in ("25%", "50%", "66%")}
KINDS = ("drop", "narrow", "both")


# ----------------------------------------------------------------------------------------- how a checkpoint is made


@functools.cache
def scores(sample: Sample, score: str) -> dict:
    """What each hidden unit of a sample's source is worth, by layer name."""
    return heapr.score_units(sample.source, score, sample.ids, sample.seed)


def write_narrow(model: Model, found: dict, width: int, out: Path) -> Model:
    """Write the checkpoint whose experts keep the `width` best units by scores (n, f) of each layer."""
    heapr.export(model, {name: heapr.best_units(score, width) for name, score in found.items()}, out, {})
    return Model(out)


def narrow(sample: Sample, rate: float, out: Path, score: str) -> Model:
    """Write all experts, narrower by one of heapr.SCORES."""
    width = round((1 - rate) * sample.source.config.expert_width)
    return write_narrow(sample.source, scores(sample, score), width, out)


def both(sample: Sample, rate: float, out: Path, score: str) -> Model:
    """Write fewer experts by REAP, narrower by one of heapr.SCORES on what the smaller model does."""
    cfg, left = sample.source.config, 1 - rate
    keep = round(left**0.5 * cfg.num_experts)
    width = round(left * cfg.num_experts * cfg.expert_width / keep)
    with tempfile.TemporaryDirectory() as folder:
        few = reproduce.selected(sample, 1 - keep / cfg.num_experts, Path(folder) / "few", "reap")
        return write_narrow(few, heapr.score_units(few, score, sample.ids, sample.seed), width, out)


def on_more_tokens(sample: Sample, rate: float, out: Path, make: Make) -> Model:
    """Write what `make` chooses on the tokens that a refit sees."""
    return make(larger(sample), rate, out)


@functools.cache
def larger(sample: Sample) -> Sample:
    """The sample of the same seed with as many tokens as a refit sees."""
    ids = reproduce.sampled(sample.source, sample.documents, ["calibration"], TOKENS, reproduce.SEQ_LEN, sample.seed)
    return replace(sample, ids=ids)


def lines() -> dict[str, Make]:
    """All ways by their labels; the first of each kind is drawn."""
    made = {f"drop, {name}": partial(reproduce.selected, method=name)
            for name in ("reap", "hope", "weighted-cover", "hodgecover")}
    made |= {f"narrow, {score}": partial(narrow, score=score) for score in ("camera", "heapr", "magnitude", "random")}
    made |= {f"both, {score}": partial(both, score=score) for score in ("camera", "heapr")}
    more = {f"{label}, {TOKENS:,} tokens": partial(on_more_tokens, make=made[label])
            for label in ("drop, reap", "narrow, camera", "narrow, heapr", "both, camera")}
    return made | more


def tables() -> list[Table]:
    """All ways as they are, and refitted."""
    ways = lines()
    again = {label: partial(refitted, make=make) for label, make in ways.items()}
    return [Table("expert parameters gone", RATES, ways, rates=True),
            Table(f"expert parameters gone, refitted on {TOKENS:,} tokens", RATES, again, rates=True)]


# ------------------------------------------------------------------------------------------ parameters, and a picture


def first_of(found: Found, kind: str) -> list[list[Score]] | None:
    """The scores of the first line of a kind, by column."""
    return next((columns for label, columns in found.items() if label.startswith(kind)), None)


def shares(source: Model, scores: list[Score]) -> tuple[float, float]:
    """Parameters of a cell's checkpoints, all and active, as shares of the source's."""
    return tuple(part / whole for part, whole in zip(scores[0].parameters, evaluate.count_parameters(source)))


def show_parameters(found: Found, source: Model, columns: Sequence[str]) -> None:
    """Print the parameters of each kind, all and active."""
    reproduce.print_head("parameters, of the source's (active for a token)", columns)
    for kind in KINDS:
        if line := first_of(found, kind):
            pairs = [shares(source, scores) for scores in line]
            reproduce.print_line(kind, [f"{total:.1%} ({active:.1%})" for total, active in pairs])


def draw(pyplot, plain: Found, again: Found, source: Model, perplexity: float):
    """Perplexity against all and against active parameters, of the first line of each kind, as it is and refitted: a
    figure."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for kind, colour in zip(KINDS, ("tab:red", "tab:blue", "tab:purple")):
        for found, style, what in ((plain, "o--", ""), (again, "o-", ", refitted")):
            line = first_of(found, kind) or []
            for axis, numbers in zip(axes, zip(*(shares(source, scores) for scores in line))):
                values = [[score.perplexity for score in scores] for scores in line]
                spread = [stdev(each) if len(each) > 1 else 0 for each in values]
                axis.errorbar([100 * share for share in numbers], [mean(each) for each in values], spread, fmt=style,
                              color=colour, capsize=2, label=kind + what)
    for axis, name in zip(axes, ("all parameters, % of the source's", "active parameters, % of the source's")):
        axis.axhline(perplexity, color="grey", linewidth=1, linestyle=":")
        axis.set(xlabel=name, yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
    axes[0].set_ylabel("held-out perplexity (dotted: source)")
    axes[0].legend(fontsize=8, loc="upper right", handlelength=3)
    return figure


# --------------------------------------------------------------------------------------------------- the command line


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    chosen = reproduce.picked(tables(), args.only, args.columns)
    pyplot = common.import_pyplot(args.picture) if args.picture else None
    samples = reproduce.read_samples(args)
    source = samples[0].source
    plain, again = reproduce.show_held_out(chosen, samples, args.tokens)
    show_parameters(plain, source, list(chosen[0].columns))
    if args.picture:
        perplexity = source.perplexity(reproduce.held_out(samples[0], args.tokens))
        common.write_picture(draw(pyplot, plain, again, source, perplexity), args.picture, dpi=110)


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = reproduce.command_line(__file__, __doc__)
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw the frontier; the format is that of the "
                        "name's ending")
    return parser


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
