# SPDX-License-Identifier: MIT
"""On examples/tiny-olmoe: every method, the merging baselines and the hybrids with Wanda, over calibration samples.

    python examples/compare_methods.py                              the tables; allow an hour
    python examples/compare_methods.py --seeds 1 --tokens 1024      a first look, in two minutes

For each of several calibration samples the barriers are measured once. Each cell is the mean over the samples and,
after +-, their standard deviation: perplexity on held-out text, and KL from the source in nats a token.
"""
import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import merging_baselines as baselines  # noqa: E402
import model_io  # noqa: E402
from hodgecover import (METHODS, Settings, calibration_ids, evaluate, fold_file, measure_model,  # noqa: E402
                        plan_from_signals, sparse_layers, wanda_edits, wanda_settings)

KEPT = {48: "25%", 43: "33%", 32: "50%", 22: "66%"}  # of 64 experts, and the share dropped
HYBRIDS = {0.5: 48, 0.66: 43}  # total rate of parameters, and the experts kept


class Sample:
    """What one calibration sample gives: signals and the baselines' facts by layer name."""

    def __init__(self, source: model_io.Model, seed: int):
        settings = Settings(seed=seed)
        ids = calibration_ids(source, [], 2048, 512, seed)
        self.source, self.seed = source, seed
        self.signals = {source.layer_names[i]: signals for i, signals in
                        measure_model(source, ids, settings, sparse_layers(source))}
        self.facts = {step.name: baselines.layer_facts(step) for step in source.stream(ids)}

    def plans(self, method: str, keep: int) -> list[dict]:
        settings = Settings(method=method, seed=self.seed)
        return [plan_from_signals(signals, keep, settings, layer) | {"name": name}
                for layer, (name, signals) in enumerate(self.signals.items())]

    def write(self, out: Path, method: str, keep: int, total_rate: float | None = None) -> None:
        """The checkpoint of a method, a baseline (with " in all slots"), or either with Wanda."""
        name, _, slots = method.partition(", ")
        if name in METHODS:
            plans = self.plans(name, keep)
            survivors, edits = {plan["name"]: plan["survivors"] for plan in plans}, {}
            files = {model_io.FOLD: fold_file(self.source, plans)} if slots == "fold" else {}
            norms = self.signals
        else:
            groups, survivors, edits = baselines.merge(self.source.checkpoint, self.facts, name, keep, bool(slots))
            pooled = {layer: self.pooled(layer, of) for layer, of in groups.items()}
            norms, files = self.signals if name == "stun" else pooled, {}
        if total_rate is not None:
            _, mask = wanda_settings(self.source, keep, total_rate, None)
            edits = chained(edits, wanda_edits(self.source, norms, mask))
        model_io.write_checkpoint(self.source.checkpoint, out, survivors, files, edits)

    def pooled(self, layer: str, groups: list[list[int]]):
        """Signals whose norms are those of the tokens of each expert's whole group."""
        signals = self.signals[layer]
        inputs, hidden = signals.inputs.clone(), signals.hidden.clone()
        for group in groups:
            for norms in (inputs, hidden):
                norms[group] = norms[group].square().sum(0).sqrt()
        return signals._replace(inputs=inputs, hidden=hidden)


def chained(first: dict[str, model_io.Edit], then: dict[str, model_io.Edit]) -> dict[str, model_io.Edit]:
    """Both edits of each tensor, one after the other."""
    def both(weight: torch.Tensor, row: int, name: str) -> torch.Tensor:
        return then[name](first[name](weight, row) if name in first else weight, row)
    return first | {name: partial(both, name=name) for name in then}


def score(sample: Sample, held_out: torch.Tensor, *what) -> tuple[float, float]:
    """(perplexity, KL) of one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        sample.write(out, *what)
        router = "fold" if what[0].endswith(", fold") else "drop"
        _, perplexity, kl = evaluate(sample.source, model_io.Model(out, router=router), held_out)
    return perplexity, kl


def cell(scores: list[tuple[float, float]]) -> str:
    def spread(values: tuple[float, ...], digits: int) -> str:
        return f"{mean(values):.{digits}f}" + (f" +- {stdev(values):.{digits}f}" if len(values) > 1 else "")
    perplexity, kl = zip(*scores)
    return f"{spread(perplexity, 1)} (KL {spread(kl, 3)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="calibration samples [5]")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens [16384]")
    args = parser.parse_args()
    source = model_io.Model(HERE / "tiny-olmoe")
    held_out = model_io.sequences(source.encode(model_io.python_documentation("held-out")), 512)
    held_out = held_out[torch.linspace(0, len(held_out) - 1, args.tokens // 512).long()]
    samples = [Sample(source, seed) for seed in range(args.seeds)]
    print(f"source: perplexity {source.perplexity(held_out):.1f} on {held_out.numel():,} held-out tokens\n")

    print(f"| experts dropped | {' | '.join(KEPT.values())} |\n|---|{'---|' * len(KEPT)}")
    slots = [f"{name}, in all slots" for name in baselines.METHODS if name != "stun"]
    for method in (*METHODS, "hodgecover, fold", *baselines.METHODS, *slots):
        cells = [cell([score(sample, held_out, method, keep) for sample in samples]) for keep in KEPT]
        print(f"| `{method}` | {' | '.join(cells)} |", flush=True)

    print(f"\n| parameters of the experts gone | {' | '.join(f'{rate:.0%}' for rate in HYBRIDS)} |\n"
          f"|---|{'---|' * len(HYBRIDS)}")
    for method in ("hodgecover", "reap", "stun", "hc-smoe"):
        cells = [cell([score(sample, held_out, method, keep, rate) for sample in samples])
                 for rate, keep in HYBRIDS.items()]
        print(f"| `{method}` with Wanda | {' | '.join(cells)} |", flush=True)
    cells = [cell([score(sample, held_out, "reap", 64, rate) for sample in samples]) for rate in HYBRIDS]
    print(f"| Wanda alone | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
