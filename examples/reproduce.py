# SPDX-License-Identifier: MIT
"""Reproduce the comparisons in RESULTS.md on the tiny checkpoint, over several calibration samples.

    python examples/reproduce.py                                        all methods, alone and with Wanda
    python examples/reproduce.py --only hodgecover reap --columns 50%   two lines, one column
    python examples/reproduce.py --samples 2 --tokens 1024              a first look, in minutes

Each cell writes checkpoints to a temporary folder, as the commands do, and compares them with the source on held-out
text: a selector or a merging method of baselines.py; with Wanda, wanda.py on that checkpoint, with the total rate of
the source. `hodgecover, fold` is the letter of the paper's redirect (4.1): the router adds the probability of each
dropped expert to its target's. `fold, RULE` does so by another redirect of audit.py. No checkpoint holds a fold: it
runs in memory. Barriers are exact, and all products in float32.

A cell is the mean over the samples +- their standard deviation: of the perplexity, and of the KL from the source in
nats a token.

A table of differences in KL takes each sample by itself: the mean +- half of the 95% interval of Student's t, in bold
if it does not contain 0. The samples share their text for evaluation, and no correction is made for the number of
cells. After a hybrid stand the rates that it reached: whole entries of the tiny checkpoint's short rows do not meet
every rate.
"""
import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

import audit
import baselines
import common
import evaluate
import hodgecover
import model_io
import wanda
from hodgecover import Settings, Signals
from model_io import InputError, Layer, LayerPass, Model

CALIBRATION, SEQ_LEN = 2048, 512  # tokens of a sample, and of a sequence
DROPPED = {"25%": 0.25, "33%": 0.33, "50%": 0.5, "66%": 0.66}  # share of the experts of a layer
HYBRIDS = {"50%": (0.5, 0.25), "66%": (0.66, 0.33)}  # share of the expert parameters gone, share of the experts dropped
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% point for 2 to 10 samples


# ----------------------------------------------------------------------------------------- how a checkpoint is made


Documents = Callable[[str], Sequence[str]]  # of a part, as in common.TEXTS


@functools.cache
def encoded(source: Model, documents: Documents, *parts: str) -> torch.Tensor:
    """The ids (T,) of these parts of a text, one after the other."""
    return source.encode([text for part in parts for text in documents(part)])


@dataclass(frozen=True, eq=False)
class Sample:
    """A calibration sample (B, L) of a source, by its seed, and what is measured on it once."""

    source: Model
    ids: torch.Tensor
    seed: int
    cache: Path
    documents: Documents = model_io.python_documentation

    def signals(self) -> dict[str, Signals]:
        """What HodgeCover measures, by layer name; from the cache, if it is there."""
        layers = hodgecover.sparse_layers(self.source)
        measured = hodgecover.measure_model(self.source, self.ids, self.settings, layers, self.cache)
        return {self.source.layer_names[index]: signals for index, signals in measured}

    @cached_property
    def facts(self) -> dict[str, baselines.Facts]:
        """What a method without barriers looks at, by layer name."""
        return {step.name: baselines.layer_facts(step) for step in baselines.routed_passes(self.source, self.ids)}

    @property
    def settings(self) -> Settings:
        """The default settings with this seed, and exact barriers."""
        return Settings(vocab_sample=0, seed=self.seed)


Make = Callable[[Sample, object, Path], Model]  # (sample, value of the column, folder to write) -> the checkpoint in it


def survivors(source: Model, dropped: float) -> int:
    """Experts of a layer that stay if the share `dropped` goes. Raises InputError if a token needs more."""
    keep = round((1 - dropped) * source.config.num_experts)
    hodgecover.check_keep(source, keep)
    return keep


def uniform(source: Model, dropped: float) -> dict[str, int]:
    """The same by layer name."""
    return dict.fromkeys(source.layer_names, survivors(source, dropped))


def export(sample: Sample, plans: dict[str, dict], out: Path) -> Model:
    """Write the checkpoint of plans by layer name."""
    common.export(sample.source, plans, out, {"command": "reproduce.py"})
    return Model(out)


def whole(sample: Sample, dropped: float, out: Path) -> Model:
    """Write a copy of the source."""
    model_io.write_checkpoint(sample.source.checkpoint, out, {}, {})
    return Model(out)


def plans(sample: Sample, method: str, kept: dict[str, int]) -> dict[str, dict]:
    """The plans by layer name of HodgeCover or one of baselines.SELECTORS, with so many survivors in each layer."""
    found, settings, source = {}, sample.settings, sample.source
    on_barriers = method == "hodgecover" or method in baselines.ON_BARRIERS
    for name, facts in (sample.signals() if on_barriers else sample.facts).items():
        if method == "hodgecover":
            found[name] = hodgecover.plan_from_signals(facts, kept[name], settings)
        else:
            rows, index = source.checkpoint.load(f"{name}.mlp.gate.weight"), source.layer_names.index(name)
            found[name] = baselines.choose(facts, rows, method, kept[name], settings, index)
    return found


def selected(sample: Sample, dropped: float, out: Path, method: str) -> Model:
    """Write the survivors of one method of `plans`."""
    return export(sample, plans(sample, method, uniform(sample.source, dropped)), out)


class Folded(Model):
    """A model of which the survivors of plans by layer name run alone, p'_j = p_j + the sum of p_i over the dropped i
    that are redirected to j (4.1; the paper says logits): in memory."""

    def __init__(self, path: Path, plans: dict[str, dict]):
        super().__init__(path)
        self.targets = {name: torch.tensor([plan["redirect"].get(e, e) for e in sorted(plan["order"])])
                        for name, plan in plans.items()}

    def run(self, index: int, layer: Layer, *given: object) -> LayerPass:
        """Run a layer, and put what its folded gates give in place of what its own do."""
        step = super().run(index, layer, *given)
        if step.gates is None:
            return step
        p = (step.x @ layer.router.T).softmax(-1)
        top_p, top_e = torch.zeros_like(p).index_add(1, self.targets[step.name], p).topk(self.config.top_k)
        if self.config.norm_topk_prob:
            top_p = top_p / top_p.sum(-1, keepdim=True)
        gates = torch.zeros_like(p).scatter(1, top_e, top_p)
        step.y.add_(model_io.mix_experts(layer.experts, step.x, gates - step.gates))
        return step._replace(gates=gates)


def folded(sample: Sample, dropped: float, out: Path, rule: str) -> Model:
    """HodgeCover's survivors with the router folded by one of audit.REDIRECTS."""
    found, checkpoint = plans(sample, "hodgecover", uniform(sample.source, dropped)), sample.source.checkpoint
    for name, signals in sample.signals().items():
        rows, parts = checkpoint.load(f"{name}.mlp.gate.weight"), hodgecover.decompose(signals, sample.settings)
        found[name]["redirect"] = audit.REDIRECTS[rule](signals, parts, found[name]["survivors"], rows)
    return Folded(checkpoint.path, found)


def merged(sample: Sample, dropped: float, out: Path, method: str, all_slots: bool = False) -> Model:
    """Write the merged experts of one of baselines.MERGING."""
    keep = survivors(sample.source, dropped)
    if method in baselines.SEQUENTIAL:
        merges = dict(baselines.merge_model(sample.source, sample.ids, method, keep, all_slots=all_slots))
    else:
        merges = {name: baselines.Merge(*baselines.MERGING[method](facts, keep), facts.frequency)
                  for name, facts in sample.facts.items()}
    baselines.export_merges(sample.source, merges, out, {}, all_slots)
    return Model(out)


def with_wanda(sample: Sample, rates: tuple[float, float], out: Path, make: Make) -> Model:
    """Write a checkpoint, and prune it with Wanda until the total rate of the source's expert parameters is gone.

    rates: (total rate, share of the experts dropped).
    """
    total_rate, dropped = rates
    model = make(sample, dropped, out)
    rate = wanda.rate_of_rest(total_rate, wanda.parameters(sample.source), wanda.parameters(model))
    wanda.prune(model, sample.ids, partial(wanda.keep_share, rate=rate))
    return model


# --------------------------------------------------------------------------------------------------------- the tables


class Table(NamedTuple):
    """A table: its title, its columns with what they hand to the makers, its lines with how their checkpoints are made;
    whether the rates reached are shown."""

    title: str
    columns: dict[str, object]
    lines: dict[str, Make]
    rates: bool = False


def method_lines() -> dict[str, Make]:
    """The selectors and the merging methods, HodgeCover first."""
    lines = {name: partial(selected, method=name) for name in ("hodgecover", *baselines.SELECTORS)}
    return lines | {name: partial(merged, method=name) for name in baselines.MERGING}


def hybrid_lines(labels: Sequence[str], lines: dict[str, Make]) -> dict[str, Make]:
    """Some of the lines with Wanda after them, and Wanda alone."""
    pruned = {f"{label}, with Wanda": partial(with_wanda, make=lines[label]) for label in labels}
    return pruned | {"Wanda alone": partial(with_wanda, make=whole)}


def method_tables() -> list[Table]:
    """Methods, and hybrids with Wanda."""
    paper, *others = audit.REDIRECTS
    lines = method_lines() | {"hodgecover, fold": partial(folded, rule=paper)}
    lines |= {f"fold, {rule}": partial(folded, rule=rule) for rule in others}
    lines |= {f"{name}, in all slots": partial(merged, method=name, all_slots=True)
              for name in baselines.MERGING if name != "stun"}
    hybrids = hybrid_lines(("hodgecover", "reap", "stun", "hc-smoe", "hc-smoe, in all slots"), lines)
    return [Table("experts dropped", DROPPED, lines),
            Table("parameters of the experts gone", HYBRIDS, hybrids, rates=True)]


def picked(tables: list[Table], only: list[str], columns: list[str]) -> list[Table]:
    """The tables with only these lines and columns; all, if none are named. Raises InputError for one that no table
    has."""
    for parameter, wanted, known in (("only", only, [label for table in tables for label in table.lines]),
                                     ("columns", columns, [name for table in tables for name in table.columns])):
        for name in wanted:
            if name not in known:
                raise InputError(f"{parameter} {name}: must be one of {'; '.join(dict.fromkeys(known))}")

    def few(named: dict, wanted: list[str]) -> dict:
        return {name: value for name, value in named.items() if not wanted or name in wanted}
    chosen = [table._replace(columns=few(table.columns, columns), lines=few(table.lines, only)) for table in tables]
    return [table for table in chosen if table.columns and table.lines]


class Score(NamedTuple):
    """A compressed checkpoint on a text: perplexity, KL from the source in nats a token; the share of the source's
    expert parameters that are absent or 0, of its own for a dense source; the checkpoint's parameters."""

    perplexity: float
    kl: float
    gone: float
    parameters: evaluate.Parameters


Found = dict[str, list[list[Score]]]  # scores of the samples by line and column


def score(sample: Sample, text: torch.Tensor, make: Make, value: object) -> Score:
    """Make a checkpoint in a temporary folder, and compare it with the source on text (B, L)."""
    with tempfile.TemporaryDirectory() as folder:
        output = make(sample, value, Path(folder) / "out")
        found = common.compare(sample.source, output, text)
        stored = wanda.parameters(output)
        left = stored * (1 - evaluate.expert_zeros(output))
        size = evaluate.count_parameters(output)
    return Score(found.output_perplexity, found.kl, 1 - left / (wanda.parameters(sample.source) or stored), size)


def show_table(table: Table, samples: list[Sample], text: torch.Tensor) -> Found:
    """Fill a table and print it line by line, then the differences from its first line. Returns the scores."""
    bar = hodgecover.progress_bar()
    cells = len(table.lines) * len(table.columns) * len(samples)
    done, found = 0, {}
    print_head(table.title, table.columns)
    for label, make in table.lines.items():
        scores = []
        for value in table.columns.values():
            scores.append([])
            for sample in samples:
                bar(done / cells)
                scores[-1].append(score(sample, text, make, value))
                done += 1
        if table.rates:
            label += f" ({', '.join(f'{column[0].gone:.1%}' for column in scores)})"
        found[label] = scores
        bar(None)
        print_line(label, [score_cell(column) for column in scores])
    show_differences(found, list(table.columns))
    return found


def show_differences(found: Found, columns: list[str]) -> None:
    """Print how far the KL of each line is above that of the first, sample by sample. Prints nothing for one line or
    one sample."""
    first, *others = found
    if len(found[first][0]) < 2 or not others:
        return
    print_head(f"KL minus that of {first}", columns)
    for label in others:
        above = [[one.kl - base.kl for one, base in zip(*pair)] for pair in zip(found[label], found[first])]
        print_line(label, [difference_cell(values) for values in above])


def print_head(title: str, columns: Sequence[str]) -> None:
    """Print the head of a table in Markdown."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")


def print_line(label: str, cells: list[str]) -> None:
    """Print a line of a table in Markdown."""
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation.

    >>> spread([1.0, 2.0], 1), spread([1.0], 2)
    ('1.5 ± 0.7', '1.00')
    """
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def score_cell(scores: list[Score]) -> str:
    """Perplexity and KL of the samples."""
    return f"{spread([one.perplexity for one in scores], 1)} (KL {spread([one.kl for one in scores], 3)})"


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean of 2 to 10 values, by Student's t."""
    return STUDENT_T[len(values) - 2] * stdev(values) / len(values)**0.5


def difference_cell(values: Sequence[float]) -> str:
    """The mean and its half interval, in bold if the interval does not contain 0.

    >>> difference_cell([0.1, 0.3]), difference_cell([0.2, 0.21])
    ('+0.200 ± 1.271', '**+0.205 ± 0.064**')
    """
    half = half_interval(values)
    cell = f"{mean(values):+.3f} ± {half:.3f}"
    return f"**{cell}**" if abs(mean(values)) > half else cell


# ----------------------------------------------------------------------------------------------------------- the text


def evenly(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many tokens of text (B, L): whole sequences, evenly spaced from the first to the last."""
    return text[torch.linspace(0, len(text) - 1, min(len(text), tokens // text.shape[1])).long()]


def sampled(source: Model, documents: Documents, parts: Sequence[str], tokens: int, length: int, seed: int
            ) -> torch.Tensor:
    """So many tokens of these parts of a text in sequences (B, length), or all there are."""
    return model_io.sequences(encoded(source, documents, *parts), length, tokens // length, seed)


def held_out(sample: Sample, tokens: int) -> torch.Tensor:
    """Held-out text, (B, L), the same for each sample."""
    return evenly(model_io.sequences(encoded(sample.source, sample.documents, "held-out"), SEQ_LEN), tokens)


def show_held_out(tables: list[Table], samples: list[Sample], tokens: int) -> list[Found]:
    """Print tables on so many tokens of held-out text; return the scores of each."""
    source, text = samples[0].source, held_out(samples[0], tokens)
    print(f"source: perplexity {source.perplexity(text):.1f} on {text.numel():,} held-out tokens", flush=True)
    return [show_table(table, samples, text) for table in tables]


# --------------------------------------------------------------------------------------------------- the command line


def command_line(file: str, description: str) -> hodgecover.Parser:
    """The parser of a study on several samples."""
    parser = common.parser_of(file, description)
    parser.add_argument("--model", dest="checkpoint", metavar="DIR", type=Path, default=common.HERE / "tiny-olmoe",
                        help="source checkpoint [examples/tiny-olmoe]")
    parser.add_argument("--text", choices=common.TEXTS, default="documentation", help="of Python, to calibrate, train "
                        "and evaluate on: what the model was trained on [%(default)s]")
    parser.add_argument("--samples", metavar="N", type=int, default=5, help="calibration samples, 1 to 10 [5]")
    parser.add_argument("--tokens", metavar="N", type=int, default=16384, help="of the text to evaluate on [16384]")
    parser.add_argument("--only", metavar="LABEL", nargs="+", default=[], help="lines to fill [all]")
    parser.add_argument("--columns", metavar="NAME", nargs="+", default=[], help="columns to fill, such as 50%% [all]")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="folder of the samples' barriers, for the next run "
                        "[MODEL-barriers beside MODEL]")
    return parser


def read_samples(args: argparse.Namespace) -> list[Sample]:
    """The command line's samples: sample s has seed s. Raises InputError for options out of range."""
    hodgecover.check_range("samples", args.samples, 1, 10)
    hodgecover.check_range("tokens", args.tokens, SEQ_LEN, 10**9)
    source, documents = Model(args.checkpoint), common.TEXTS[args.text]
    cache = common.barrier_cache(source, args)
    return [Sample(source, sampled(source, documents, ["calibration"], CALIBRATION, SEQ_LEN, seed), seed, cache,
                   documents) for seed in range(args.samples)]


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    tables = picked(method_tables(), args.only, args.columns)
    samples = read_samples(args)
    for dropped in DROPPED.values():
        survivors(samples[0].source, dropped)
    show_held_out(tables, samples, args.tokens)


main = common.main_of(partial(command_line, __file__, __doc__), run)


if __name__ == "__main__":
    sys.exit(main())
