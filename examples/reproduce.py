# SPDX-License-Identifier: MIT
"""The README's comparisons on examples/tiny-olmoe, over several calibration samples.

    python examples/reproduce.py                              methods, merging baselines, hybrids with Wanda
    python examples/reproduce.py --settings                   other values of HodgeCover's settings
    python examples/reproduce.py --samples 2 --tokens 1024    a first look, in minutes

Methods are compared on held-out text; settings on calibration text that no sample contains, so that choosing among
them leaves the held-out text unseen. Barriers are measured once a sample. A cell is the mean over the samples +- their
standard deviation: of the perplexity, and of the KL from the source in nats a token. The tables of differences in KL
take each sample by itself: mean +- half of the 95% interval of Student's t, in bold where it does not contain 0; the
samples share their text for evaluation, and no correction is made for the number of cells. Beside a hybrid stand the
rates that it achieved: whole entries of the tiny checkpoint's short rows do not meet every rate.
"""
import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import merging_baselines as baselines  # noqa: E402
import model_io  # noqa: E402
from hodgecover import (METHODS, Settings, Signals, calibration_ids, evaluate, fold_file, measure_model,  # noqa: E402
                        plan_from_signals, sparse_layers, wanda_edits, wanda_settings)

KEPT = {48: "25%", 43: "33%", 32: "50%", 22: "66%"}  # of 64 experts, and the share dropped
HYBRIDS = {0.5: 48, 0.66: 43}  # share of the experts' parameters that goes, and the experts kept
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% point for 2 to 10 samples
VARIANTS = {f"{percent}% critical edges and triangles": dict(edge_percent=percent, triangle_percent=percent)
            for percent in (5, 1, 2, 10, 20, 50)}  # the first is the default
VARIANTS |= {f"both lambdas {weight}": dict(lambda_edge=weight, lambda_triangle=weight)
             for weight in (0.04, 0.2, 5.0, 25.0)}
VARIANTS |= {"lambda of edges 0": dict(lambda_edge=0.0), "lambda of triangles 0": dict(lambda_triangle=0.0),
             "2,000 candidate triangles": dict(max_triangles=2000), "order by index": dict(order="index")}

Layers = dict[str, Signals]  # by the layer's name
Scores = dict[int | float, list[tuple[float, float]]]  # (perplexity, KL) of each sample, by column of a table


class Output(NamedTuple):
    """What a compressed checkpoint is written from, the norms by layer that Wanda needs, and how it routes."""

    survivors: dict[str, list[int]]
    norms: Layers
    files: dict[str, bytes] = {}
    edits: dict[str, model_io.Edit] = {}
    router: str = "drop"


def planned(source: model_io.Model, layers: Layers, settings: Settings, keep: int) -> Output:
    """A method of the library."""
    plans = [plan_from_signals(signals, keep, settings, index) | {"name": name}
             for index, (name, signals) in enumerate(layers.items())]
    fold = {model_io.FOLD: fold_file(source, plans)} if settings.router == "fold" else {}
    return Output({plan["name"]: plan["survivors"] for plan in plans}, layers, fold, router=settings.router)


def merged(source: model_io.Model, layers: Layers, facts: dict[str, dict], method: str, all_slots: bool, keep: int
           ) -> Output:
    """A baseline. A merged expert's norms for Wanda are those of its whole group's tokens."""
    grouped, survivors, edits = baselines.merge(source.checkpoint, facts, method, keep, all_slots)
    pooled = {}
    for name, groups in grouped.items():
        norms = {field: getattr(layers[name], field).clone() for field in ("inputs", "hidden")}
        for group in groups if method != "stun" else []:
            for rows in norms.values():
                rows[group] = rows[group].square().sum(0).sqrt()
        pooled[name] = layers[name]._replace(**norms)
    return Output(survivors, pooled, edits=edits)


def pruned(source: model_io.Model, output: Output, rate: float, keep: int) -> Output:
    """The output with Wanda on its experts, to the total rate."""
    wanda = wanda_edits(source, output.norms, wanda_settings(source, keep, rate, None)[1])

    def both(weight: torch.Tensor, row: int, name: str) -> torch.Tensor:
        return wanda[name](output.edits[name](weight, row) if name in output.edits else weight, row)
    return output._replace(edits=output.edits | {name: partial(both, name=name) for name in wanda})


def score(source: model_io.Model, text: torch.Tensor, output: Output,
          finish: Callable[[model_io.Model], object] = lambda model: None) -> tuple[float, float]:
    """(perplexity, KL) on text (B, L) of the checkpoint, written and then changed by `finish`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        model_io.write_checkpoint(source.checkpoint, out, output.survivors, output.files, output.edits)
        finish(model_io.Model(out, router=output.router))
        return evaluate(source, model_io.Model(out, router=output.router), text)[1:]


def row(label: str, scores: Scores) -> None:
    """Prints one line of a table of perplexities and KLs."""
    def spread(values: tuple[float, ...], digits: int) -> str:
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
    cells = [f"{spread(perplexity, 1)} (KL {spread(kl, 3)})" for perplexity, kl in (zip(*of) for of in scores.values())]
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def head(title: str, columns: list[str]) -> None:
    """Prints the head of a table."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")


def differences(scores: dict[str, Scores], columns: list[str]) -> None:
    """Prints what each line's KL is above the first one's, sample by sample."""
    first = next(iter(scores))
    samples = len(next(iter(scores[first].values())))
    if samples < 2:
        return
    head(f"KL minus that of {first}", columns)
    for label, of in scores.items():
        cells = []
        for column, values in of.items():
            above = [kl - base for (_, kl), (_, base) in zip(values, scores[first][column])]
            half = STUDENT_T[samples - 2] * stdev(above) / samples**0.5
            cell = f"{mean(above):+.3f} ± {half:.3f}"
            cells.append(f"**{cell}**" if abs(mean(above)) > half else cell)
        if label != first:
            print(f"| {label} | {' | '.join(cells)} |")


def evenly(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many tokens of text (B, L), whole sequences evenly spaced."""
    return text[torch.linspace(0, len(text) - 1, min(len(text), tokens // text.shape[1])).long()]


def held_out(source: model_io.Model, tokens: int) -> torch.Tensor:
    """The text that the methods are compared on, (B, L)."""
    text = evenly(model_io.sequences(source.encode(model_io.python_documentation("held-out")), 512), tokens)
    print(f"source: perplexity {source.perplexity(text):.1f} on {text.numel():,} held-out tokens", flush=True)
    return text


def compressors(source: model_io.Model, samples: list[torch.Tensor]) -> Callable[[str, int, int], Output]:
    """Measures the samples once; (label of a line, sample, experts kept) -> what the checkpoint is written from."""
    layers = [{source.layer_names[index]: signals for index, signals in
               measure_model(source, ids, Settings(seed=seed), sparse_layers(source))}
              for seed, ids in enumerate(samples)]
    facts = [{step.name: baselines.layer_facts(step) for step in source.stream(ids)} for ids in samples]

    def output(label: str, seed: int, keep: int) -> Output:
        name, _, how = label.partition(", ")
        if name in METHODS:
            return planned(source, layers[seed], Settings(method=name, seed=seed, router=how or "drop"), keep)
        return merged(source, layers[seed], facts[seed], name, bool(how), keep)
    return output


def compare_methods(source: model_io.Model, samples: list[torch.Tensor], tokens: int) -> None:
    """The tables of methods and of hybrids, on held-out text."""
    text, output = held_out(source, tokens), compressors(source, samples)
    labels = ["hodgecover", *(name for name in METHODS if name != "hodgecover"), "hodgecover, fold",
              *baselines.METHODS, *(f"{name}, in all slots" for name in baselines.METHODS if name != "stun")]
    found, columns = {}, list(KEPT.values())
    head("experts dropped", columns)
    for label in labels:
        found[label] = {keep: [score(source, text, output(label, seed, keep)) for seed in range(len(samples))]
                        for keep in KEPT}
        row(label, found[label])
    differences(found, columns)

    found, columns = {}, [f"{rate:.0%}" for rate in HYBRIDS]
    head("parameters of the experts gone", columns)
    for label in ("hodgecover", "reap", "stun", "hc-smoe", "hc-smoe, in all slots", "Wanda alone"):
        alone, scores, achieved = label == "Wanda alone", {}, []
        for rate, keep in HYBRIDS.items():
            keep = source.config.num_experts if alone else keep
            dense = [output("reap" if alone else label, seed, keep) for seed in range(len(samples))]
            scores[rate] = [score(source, text, pruned(source, one, rate, keep)) for one in dense]
            achieved.append(f"{wanda_settings(source, keep, rate, None)[0]['wanda']['total_rate']:.1%}")
        label += f"{'' if alone else ', with Wanda'} ({', '.join(achieved)})"
        found[label] = scores
        row(label, scores)
    differences(found, columns)


def compare_settings(source: model_io.Model, samples: list[torch.Tensor], tokens: int) -> None:
    """The table of HodgeCover's settings, on calibration text outside the samples."""
    text = model_io.sequences(source.encode(model_io.python_documentation("calibration")), 512)
    used = torch.cat(samples)
    text = evenly(text[~(text[:, None] == used).all(2).any(1)], tokens)
    print(f"source: perplexity {source.perplexity(text):.1f} on {text.numel():,} tokens of calibration text outside "
          "the samples", flush=True)
    found = {}
    head("setting", list(KEPT.values()))
    with tempfile.TemporaryDirectory() as cache:
        for label, values in VARIANTS.items():
            found[label] = {keep: [] for keep in KEPT}
            for seed, ids in enumerate(samples):
                settings = Settings(seed=seed, **values)
                layers = {source.layer_names[index]: signals for index, signals in
                          measure_model(source, ids, settings, sparse_layers(source), Path(cache))}
                for keep in KEPT:
                    found[label][keep].append(score(source, text, planned(source, layers, settings, keep)))
            row(label, found[label])
    differences(found, list(KEPT.values()))


def parse(description: str, **flags: str) -> argparse.Namespace:
    """The command line: --samples, --tokens, and flags with their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--samples", type=int, choices=range(1, 11), default=5, help="calibration samples, 1 to 10 [5]")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text to evaluate on, 512 or more [16384]")
    args = parser.parse_args()
    if args.tokens < 512:
        parser.error(f"--tokens {args.tokens}: must be at least one sequence of 512")
    return args


def main() -> None:
    args = parse(__doc__, settings="compare settings rather than methods")
    source = model_io.Model(HERE / "tiny-olmoe")
    samples = [calibration_ids(source, [], 2048, 512, seed) for seed in range(args.samples)]
    (compare_settings if args.settings else compare_methods)(source, samples, args.tokens)


if __name__ == "__main__":
    main()
