# SPDX-License-Identifier: MIT
"""Measure the cells of a study and append them to results.csv; what this version measured is not measured again.

    python examples/studies/study.py plain                                     every way, as it is (hours)
    python examples/studies/study.py refitted --only reap --columns 50%        one cell
    python examples/studies/study.py plain --model examples/tiny-qwen3-moe     the second model
    python examples/studies/study.py plain --only reap --samples 1 --tokens 512 --results look.csv     a first look
    python examples/studies/report.py                                          draw what results.csv holds

A cell is a line (how a checkpoint is made, see ways.py) at a column. It is made in a temporary folder, once for each
calibration sample, and compared with the source on held-out text. `cost` is the processor seconds that it took to make
it; what several cells share (barriers, scores, a search) is paid by the first. Barriers lie in MODEL-barriers. Each row
has the version of the code; a table that this prints is of the current one alone.

Tables: plain, and what a refit, a training or both make of the same ways; refit and training, what these depend on, of
HodgeCover's and of REAP's survivors; settings, HodgeCover with other constants; nested, one training for all sizes or
one for each; dense and dense-half, from a dense model (`train_tiny.py qwen3 examples/tiny-qwen3`).
"""
import argparse
import csv
import itertools
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ways import (MORE, NESTED_TRAINED, RATES, SEQ_LEN, Sample, Way, audit, baselines, both, by_barriers, by_coverage,
                  by_evo, common, deal, deal_half, distilled, dot_moe, encoded, first_whole, fold, heapr, hodgecover,
                  merge, model_io, narrow, refitted, search, select, select_at_end, share_out, source_code,
                  then_wanda, together, wanda, whole, with_tokens)
import evaluate
import report

TEXTS = {"tiny-qwen3-moe": ("code", 8192)}  # by the model's name: what it was trained on, and tokens to evaluate on
END_TOKENS = 512  # of a barrier that is read at the end of the model


class Table(NamedTuple):
    """The columns with the values that they hand to the ways, and the lines."""

    columns: dict[str, float]
    lines: dict[str, Way]


def ways() -> dict[str, Way]:
    """All ways by their labels."""
    plain = {name: partial(select, method=name) for name in ("hodgecover", *baselines.SELECTORS)}
    plain |= {name: partial(merge, method=name) for name in baselines.MERGING}
    plain |= {f"narrow, {score}": partial(narrow, score=score) for score in heapr.SCORES}
    plain |= {f"both, {score}": partial(both, score=score) for score in ("camera", "heapr")}
    more = {}
    for label in ("reap", "narrow, camera", "narrow, heapr", "both, camera"):
        more[f"{label}, {MORE:,} tokens"] = partial(with_tokens, way=plain[label], tokens=MORE)
    return plain | more | hybrids(plain) | budgeted() | few_tokens(plain)


def hybrids(plain: dict[str, Way]) -> dict[str, Way]:
    """Ways that drop experts, then Wanda; and Wanda alone."""
    lines = {}
    for label in ("hodgecover", "reap", "random", "stun", "hc-smoe"):
        lines[f"{label}, wanda"] = partial(then_wanda, way=plain[label])
    return lines | {"wanda": partial(then_wanda, way=whole)}


def budgeted() -> dict[str, Way]:
    """Selectors with a budget for each layer."""
    budgets = {"first layer whole": first_whole, "by barriers": by_barriers, "by coverage": by_coverage,
               "by evo": by_evo}
    pairs = [("reap", name) for name in budgets]
    pairs.append(("hodgecover", "by barriers"))
    for method in ("hodgecover", "hope", "weighted-cover", "random"):
        pairs.append((method, "first layer whole"))
    lines = {}
    for method, name in pairs:
        lines[f"{method}, {name}"] = partial(share_out, method=method, budget=budgets[name])
    return lines | {"rco": partial(search, ragged=False), "rco, ragged": partial(search, ragged=True)}


def few_tokens(plain: dict[str, Way]) -> dict[str, Way]:
    """HodgeCover by barriers at the end of the model, and what it is compared with, on fewer tokens."""
    compared = {"hodgecover": plain["hodgecover"], "hodgecover, readout model": select_at_end,
                "reap": plain["reap"]}
    lines = {}
    for label, way in compared.items():
        label = f"{label}, {END_TOKENS:,} tokens"
        lines[label] = partial(with_tokens, way=way, tokens=END_TOKENS)
    return lines


def not_smaller() -> dict[str, Way]:
    """Ways whose files are as large as the source's, or that no file holds; they are not refitted."""
    paper, *others = audit.REDIRECTS
    lines = {"hodgecover, fold": partial(fold, rule=paper)}
    for rule in others:
        lines[f"fold, {rule}"] = partial(fold, rule=rule)
    for name in baselines.MERGING_ON_FACTS:
        if name != "stun":  # it merges nothing
            lines[f"{name}, in all slots"] = partial(merge, method=name, all_slots=True)
    return lines


def refit_lines() -> dict[str, Way]:
    """HodgeCover's survivors, refitted with other options."""
    way = partial(refitted, way=partial(select, method="hodgecover"))
    lines = {f"{tokens:,} tokens": partial(way, tokens=tokens) for tokens in (2048, 4096, 8192, MORE, 32768, 65536)}
    lines["131,072 tokens, with training text"] = partial(way, tokens=131072, parts=("train", "calibration"))
    lines |= {f"ridge {ridge}, {tokens:,} tokens": partial(way, tokens=tokens, ridge=ridge)
              for tokens in (2048, MORE, 65536) for ridge in (0.03, 3.0)}
    lines |= {f"sweeps: {sweeps}": partial(way, sweeps=sweeps) for sweeps in (0, 1, 2, 10)}
    return lines | {"text: source code": partial(way, documents=source_code)}


def training_lines() -> dict[str, Way]:
    """REAP's survivors and narrower experts, trained on other numbers of tokens."""
    way = partial(distilled, way=partial(select, method="reap"))
    kinds = {"": way, "narrow, ": partial(distilled, way=partial(narrow, score="camera")),
             "layerwise, ": partial(way, layerwise=True)}
    lines = {f"{kind}{tokens:,} tokens": partial(make, tokens=tokens) for kind, make in kinds.items()
             for tokens in (16_384, 65_536, 131_072, 524_288)}
    lines |= {f"{part} alone": partial(way, parts=[part]) for part in ("router", "experts")}
    return lines | {"16,384 tokens, 8 passes": partial(way, tokens=16_384, epochs=8),
                    "next token alone": partial(way, kl_weight=0.0)}


def settings_lines() -> dict[str, Way]:
    """HodgeCover with other constants."""
    changes = {}
    for percent in (1, 5, 10, 50):
        changes[f"{percent}% critical"] = dict(edge_percent=percent, triangle_percent=percent)
    for weight in (0.04, 25):
        changes[f"both lambdas {weight}"] = dict(lambda_edge=weight, lambda_triangle=weight)
    changes["lambda of edges 0"] = dict(lambda_edge=0)
    changes["lambda of triangles 0"] = dict(lambda_triangle=0)
    changes["order by saliency"] = dict(order="saliency")
    lines = {}
    for label, change in changes.items():
        lines[label] = partial(select, method="hodgecover", **change)
    return lines


def nested_lines() -> dict[str, Way]:
    """One training for all sizes, and one for each."""
    reap, third = partial(select, method="reap"), NESTED_TRAINED // len(RATES) // SEQ_LEN * SEQ_LEN
    alone = {f"each alone, {tokens:,} tokens": partial(distilled, way=reap, tokens=tokens)
             for tokens in (NESTED_TRAINED, third)}
    return {f"together, {NESTED_TRAINED:,} tokens": together} | alone | {"not trained": reap}


def tables() -> dict[str, Table]:
    """The studies by their names."""
    every, half = ways(), {"50%": 0.5}
    trained = {label: every[label] for label in ("reap", "hodgecover", "random", "hope", "slimqwen", "narrow, camera",
                                                 f"narrow, camera, {MORE:,} tokens", "reap, by barriers")}
    again = {label: partial(refitted, way=way) for label, way in every.items()}
    dealt = {"dot, layer by layer": partial(deal, split="dot", layerwise=True)}
    dealt |= {split: partial(deal, split=split) for split in dot_moe.SPLITS}
    few = {method: partial(deal_half, method=method) for method in ("hodgecover", "reap")}

    def train(lines: dict[str, Way], suffix: str = "") -> dict[str, Way]:
        return {label + suffix: partial(distilled, way=way) for label, way in lines.items()}
    return {"plain": Table(RATES, every | not_smaller()), "refitted": Table(RATES, again),
            "distilled": Table(half, train(trained)),
            "refitted-distilled": Table(half, train({label: again[label] for label in trained})),
            "refit": Table({"50%": 0.5, "66%": 0.66}, refit_lines()), "training": Table(half, training_lines()),
            "settings": Table(RATES, settings_lines()), "nested": Table({"0%": 0.0} | RATES, nested_lines()),
            "dense": Table({"25%": 0.25, "50%": 0.5, "75%": 0.75}, dealt | train(dealt, ", distilled")),
            "dense-half": Table({"25%": 0.25, "50%": 0.5}, few | train(few, ", distilled"))}


# ------------------------------------------------------------------------------------------------------- the runner


def measure(sample: Sample, text: torch.Tensor, way: Way, value: float) -> dict[str, str]:
    """Make a checkpoint in a temporary folder and compare it with the source on text (B, L).

    perplexity; kl, from the source in nats a token; gone, the share of the source's expert parameters that are absent
    or 0 (nan for a dense source); cost, processor seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        output = way(sample, value, Path(folder) / "out")
        cost = time.process_time() - start
        comparison = common.compare(sample.source, output, text)
        left = wanda.parameters(output) * (1 - evaluate.expert_zeros(output))
    gone = 1 - left / (wanda.parameters(sample.source) or math.nan)
    return {"perplexity": f"{comparison.output_perplexity:.6g}", "kl": f"{comparison.kl:.6g}",
            "gone": f"{gone:.4f}", "cost": f"{cost:.1f}"}


def picked(named: dict, wanted: list[str], option: str) -> dict:
    """The named of a table's lines or columns; all, if none are wanted. Raises InputError for one that is not there."""
    for name in wanted:
        if name not in named:
            raise model_io.InputError(f"{option} {name}: must be one of {'; '.join(named)}")
    return {name: named[name] for name in wanted or named}


def evenly(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many tokens of text (B, L): whole sequences, evenly spaced from the first to the last."""
    return text[torch.linspace(0, len(text) - 1, min(len(text), tokens // text.shape[1])).long()]


def missing_cells(args: argparse.Namespace, lines: dict[str, Way],
                  columns: dict[str, float]) -> list[dict]:
    """The first five fields of each sample that this version has not measured yet."""
    model, done = args.model.resolve().name, set()
    if args.results.exists():
        for rows in report.read(args.results, [hodgecover.__version__]).values():
            done |= {row[:5] for row in rows}
    missing = []
    for line, column, seed in itertools.product(lines, columns, range(args.samples)):
        cell = {"model": model, "table": args.table, "line": line, "column": column, "seed": seed}
        if tuple(cell.values()) not in done:
            missing.append(cell)
    return missing


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.parser_of(__file__, __doc__)
    add = parser.add_argument
    add("table", metavar="TABLE", choices=tables(), help="; ".join(tables()))
    add("--only", metavar="LINE", nargs="+", default=[], help="lines to fill, reference first [all]")
    add("--columns", metavar="NAME", nargs="+", default=[], help="columns to fill, such as 50%% [all]")
    add("--samples", metavar="N", type=int, default=5, help="calibration samples, 1 to 10 [5]")
    add("--model", metavar="DIR", type=Path, default=common.HERE / "tiny-olmoe",
        help="source checkpoint [examples/tiny-olmoe]")
    add("--results", metavar="FILE", type=Path, default=report.RESULTS, help="[results.csv here]")
    add("--tokens", metavar="N", type=int,
        help="of held-out text, for a first look [16384 or 8192]")
    return parser


def check_results(args: argparse.Namespace) -> None:
    """Raise InputError for a first look, or another model, that would go into results.csv."""
    other = args.tokens is not None or args.model.resolve().parent != common.HERE
    model_io.require(not other or args.results.resolve() != report.RESULTS,
                     "results: results.csv is of the models in examples/ on their whole text; for a "
                     "first look or another model name another file with --results")


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    table = tables()[args.table]
    lines = picked(table.lines, args.only, "only")
    columns = picked(table.columns, args.columns, "columns")
    hodgecover.check_range("samples", args.samples, 1, 10)
    source, name = model_io.Model(args.model), args.model.resolve().name
    check_results(args)
    text, tokens = TEXTS.get(name, ("documentation", 16384))
    if args.tokens is not None:
        tokens = args.tokens
    hodgecover.check_range("tokens", tokens, SEQ_LEN, 10**9)
    documents = common.TEXTS[text]
    cache = model_io.beside(source.checkpoint.path, "-barriers")
    samples = []
    for seed in range(args.samples):
        settings = hodgecover.Settings(vocab_sample=0, seed=seed)
        samples.append(Sample(source, cache, documents, settings))
    sequences = model_io.sequences(encoded(source, documents, "held-out"), SEQ_LEN)
    held_out = evenly(sequences, tokens)

    missing = missing_cells(args, lines, columns)
    bar = model_io.progress_bar()
    with args.results.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, report.Row._fields, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for done, cell in enumerate(missing):
            bar(done / len(missing))
            way, value = lines[cell["line"]], columns[cell["column"]]
            row = cell | measure(samples[cell["seed"]], held_out, way, value)
            row |= {"version": hodgecover.__version__, "samples": 1, "perplexity_sd": 0, "kl_sd": 0}
            writer.writerow(row)
            file.flush()
    bar(None)
    results = report.read(args.results, [hodgecover.__version__])
    print(report.levels(results, [args.table], list(lines), list(columns), [name]))
    if len(lines) > 1 < args.samples:
        print("\n" + report.gaps(results, args.table, list(lines), list(columns), name))


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
