# SPDX-License-Identifier: MIT
"""Show on the tiny checkpoint what a budget for each layer brings, and what one training for all sizes.

    python examples/budgets_study.py --samples 2             ragged and uniform budgets, as they are and refitted
    python examples/budgets_study.py --first                 methods that keep the whole first layer, the same way
    python examples/budgets_study.py --samples 2 --nested    slices of a nested checkpoint, trained together or alone
    python examples/budgets_study.py --samples 1 --only reap "evo, ragged" --generations 2 --tokens 1024   a first look

Tables are those of reproduce.py: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that order the experts and that evo
searches on, of the 16,384, in sequences of 128, that rco searches on, of the 16,384 of a refit and of the tokens that
are trained on, once. What a search has found lies beside the samples' barriers, for the next run.

`barriers` has the budget of HodgeCover's barriers, `coverage` that of REAP's saliency. `first layer whole` and --first
are a budget by hand: the first layer loses nothing, the others lose its part too.
"""
import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import budgets
import common
import distil_study
import frontier
import heapr
import hodgecover
import model_io
import nested
import rco
import reproduce
import torch
from distil_study import training_ids
from model_io import Experts, InputError, Model
from refit_study import TOKENS, refitted
from reproduce import Make, Sample, Table

RATES = frontier.RATES
RCO_LENGTH = 128  # tokens of a sequence that rco sees
TRAINED = 65_536  # tokens of a training


# --------------------------------------------------------------------------------------------------------- budgets


@functools.cache
def ranked(sample: Sample) -> dict[str, dict]:
    """REAP's plan of a sample, by layer name; of its order every budget takes the first."""
    return reproduce.plans(sample, "reap", reproduce.uniform(sample.source, 0))


def layers_of(sample: Sample) -> list[str]:
    """The names of the decoder layers with experts."""
    source = sample.source
    return [source.layer_names[i] for i in hodgecover.sparse_layers(source) if i < source.config.num_layers]


def barrier_budget(sample: Sample, keep: int) -> budgets.Budget:
    """The budget of HodgeCover's barriers: how many experts of each layer go."""
    measured = sample.signals()
    means = [measured[name].barriers.mean().item() for name in layers_of(sample)]
    return budgets.barrier_budget(means, budgets.expert_counts(sample.source), sample.source.config.top_k, keep)


def coverage_budget(sample: Sample, keep: int) -> budgets.Budget:
    """The budget of the mass of REAP's saliency: how many experts of each layer go."""
    plans = ranked(sample)
    saliencies = [[plans[name]["saliency"][e] for e in plans[name]["order"]] for name in layers_of(sample)]
    return budgets.coverage_budget(saliencies, sample.source.config.top_k, keep)


@functools.cache
def evo_budget(sample: Sample, keep: int, generations: int) -> budgets.Budget:
    """What evo finds: how many experts of each layer go."""
    source, orders = sample.source, budgets.decoder_orders(sample.source, ranked(sample))
    model_io.make_cache(sample.cache)
    worth = budgets.remembered(budgets.esap_of(source, sample.ids, orders), sample.cache,
                               budgets.search_key(source, sample.ids, "evo", orders))
    cfg = source.config
    *_, (best, _) = budgets.evolve(worth, [cfg.num_experts - cfg.top_k] * len(orders),
                                   (cfg.num_experts - keep) * len(orders), generations, sample.seed)
    return best


def spared(sample: Sample, keep: int) -> budgets.Budget:
    """How many experts of each layer go, if the first keeps all and the others lose its part. Raises InputError if they
    cannot lose so many."""
    cfg, others = sample.source.config, len(layers_of(sample)) - 1
    gone, most = (cfg.num_experts - keep) * (others + 1), cfg.num_experts - cfg.top_k
    if gone > most * others:
        raise InputError(f"columns: if the first layer keeps all its experts, the others would lose {gone} of the "
                         f"{most * others} that they can")
    return 0, *budgets.largest_remainder([1] * others, [most] * others, gone)


@functools.cache
def rco_found(sample: Sample, keep: int, steps: int, ragged: bool) -> tuple[dict[str, list[int]], budgets.Budget]:
    """The orders that rco finds, by layer name, and how many experts go."""
    source, names = sample.source, layers_of(sample)
    model_io.make_cache(sample.cache)
    ids = reproduce.sampled(source, sample.documents, ["calibration"], TOKENS, RCO_LENGTH, sample.seed)
    alpha, limits = rco.start(source.config, len(names), keep, ragged)
    key = budgets.search_key(source, ids, "rco", keep, ragged, steps, sample.seed)
    loss_of = rco.masked_loss(source, ids, [source.layer_names.index(name) for name in names])
    for _ in rco.descend(loss_of, len(ids), alpha, limits, steps, sample.seed, sample.cache, key):
        pass
    return rco.rank(alpha, names, limits)


def with_budget(sample: Sample, dropped: float, out: Path, method: str,
                budget: Callable[[Sample, int], budgets.Budget]) -> Model:
    """The survivors of one method, with the budget that `budget` gives so many experts."""
    gone = budget(sample, reproduce.survivors(sample.source, dropped))
    kept = {name: sample.source.config.num_experts - each for name, each in zip(layers_of(sample), gone)}
    plans = reproduce.plans(sample, method, reproduce.uniform(sample.source, dropped) | kept)
    return reproduce.export(sample, plans, out)


def rco_way(sample: Sample, dropped: float, out: Path, steps: int, ragged: bool) -> Model:
    """What rco finds: with one budget for all layers, or with one for each."""
    source, keep = sample.source, reproduce.survivors(sample.source, dropped)
    plans = budgets.planned(source, ranked(sample), *rco_found(sample, keep, steps, ragged), keep)
    return reproduce.export(sample, plans, out)


def first_wide(sample: Sample, rate: float, out: Path) -> Model:
    """All experts, narrower by camera but in the first layer, in memory: the hidden units that go are zeros."""
    model, found = reproduce.whole(sample, 0, out), frontier.scores(sample, "camera")
    _, *names = layers_of(sample)
    width = round((1 - rate * (len(names) + 1) / len(names)) * model.config.expert_width)
    for name in names:
        experts = model.layer(model.layer_names.index(name)).experts
        gone = torch.ones_like(found[name], dtype=torch.bool).scatter(1, heapr.best_units(found[name], width), False)
        masks = Experts(gone[:, :, None], gone[:, :, None], gone[:, None])
        common.store(model, name, {f"mlp.experts.{part}": weight.masked_fill(mask, 0)
                                   for part, weight, mask in zip(Experts._fields, experts, masks)})
    return model


def budget_tables(generations: int, steps: int) -> list[Table]:
    """Uniform and ragged budgets, as they are and refitted."""
    reap = partial(with_budget, method="reap")
    lines: dict[str, Make] = {"reap": partial(reproduce.selected, method="reap"),
                              "first layer whole": partial(reap, budget=spared),
                              "barriers, ragged": partial(reap, budget=barrier_budget),
                              "coverage, ragged": partial(reap, budget=coverage_budget),
                              "hodgecover, barriers, ragged": partial(with_budget, method="hodgecover",
                                                                      budget=barrier_budget),
                              "evo, ragged": partial(reap, budget=partial(evo_budget, generations=generations)),
                              "rco": partial(rco_way, steps=steps, ragged=False),
                              "rco, ragged": partial(rco_way, steps=steps, ragged=True)}
    return with_refit("experts dropped", lines)


def first_tables() -> list[Table]:
    """Methods that keep the whole first layer, as they are and refitted."""
    lines: dict[str, Make] = {f"drop, {method}": partial(with_budget, method=method, budget=spared)
                              for method in ("reap", "hodgecover", "hope", "weighted-cover", "random")}
    return with_refit("expert parameters gone, none of the first layer", lines | {"narrow, camera": first_wide})


def with_refit(title: str, lines: dict[str, Make]) -> list[Table]:
    """A table of these lines, and one of the same refitted."""
    again = {label: partial(refitted, make=make) for label, make in lines.items()}
    return [Table(title, RATES, lines), Table(f"{title}, refitted on {TOKENS:,} tokens", RATES, again)]


def show_budgets(samples: list[Sample], args: argparse.Namespace, labels: Sequence[str], columns: Sequence[str]
                 ) -> None:
    """Print the ragged plans: experts kept in each layer, sample by sample."""
    source = samples[0].source
    of_label = {"barriers, ragged": barrier_budget, "coverage, ragged": coverage_budget,
                "evo, ragged": lambda sample, keep: evo_budget(sample, keep, args.generations),
                "rco, ragged": lambda sample, keep: rco_found(sample, keep, args.steps, True)[1]}
    reproduce.print_head("experts kept in each layer, sample by sample", columns)
    for label in (label for label in of_label if label in labels):
        cells = []
        for column in columns:
            keep = reproduce.survivors(source, RATES[column])
            found = [of_label[label](sample, keep) for sample in samples]
            cells.append("; ".join(" ".join(str(source.config.num_experts - gone) for gone in own) for own in found))
        reproduce.print_line(label, cells)


# ----------------------------------------------------------------------------------------------------------- nested


@functools.cache
def trained_together(sample: Sample) -> tuple[tempfile.TemporaryDirectory, Model]:
    """A nested checkpoint whose prefixes of all rates were trained together, and the folder that it goes with."""
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "nested"
    nested.write_ordered(sample.source, dict(nested.measure(sample.source, sample.ids)), out, {})
    sizes = [(reproduce.survivors(sample.source, rate), sample.source.config.expert_width) for rate in RATES.values()]
    ids = training_ids(sample, "with training text", TRAINED)
    return folder, distil_study.train(sample, Model(out), ids, prefixes=sizes)


def together(sample: Sample, dropped: float, out: Path) -> Model:
    """A slice of the checkpoint that was trained for all rates."""
    _, model = trained_together(sample)
    nested.write_slice(model, reproduce.survivors(sample.source, dropped), model.config.expert_width, out, {})
    return Model(out)


def nested_tables() -> list[Table]:
    """One training for all sizes, and one for each."""
    reap = partial(reproduce.selected, method="reap")
    third = TRAINED // len(RATES) // reproduce.SEQ_LEN * reproduce.SEQ_LEN
    alone = {f"each alone, {tokens:,} tokens": partial(distil_study.distilled, make=reap, tokens=tokens)
             for tokens in (TRAINED, third)}
    label = f"together, {TRAINED:,} tokens"
    return [Table("experts dropped", RATES, {label: together} | alone | {"not trained": reap}),
            Table("the whole model", {"0%": 0.0}, {label: together})]


# ------------------------------------------------------------------------------------------------ the command line


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = reproduce.command_line(__file__, __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", action="store_true", help="methods that keep the whole first layer instead")
    which.add_argument("--nested", action="store_true", help="one training for all sizes instead")
    parser.add_argument("--generations", metavar="G", type=int, default=budgets.GENERATIONS, help="of evo "
                        "[%(default)s]")
    parser.add_argument("--steps", metavar="N", type=int, default=budgets.STEPS, help="of rco [%(default)s]")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    if args.nested or args.first:
        common.refuse_given(command_line(), args, ("generations", "steps"), "--nested" if args.nested else "--first")
    hodgecover.check_range("generations", args.generations, 1, 10**6)
    hodgecover.check_range("steps", args.steps, 1, 10**6)
    tables = nested_tables() if args.nested else first_tables() if args.first else \
        budget_tables(args.generations, args.steps)
    tables = reproduce.picked(tables, args.only, args.columns)
    samples = reproduce.read_samples(args)
    for table in tables:
        for dropped in table.columns.values() if args.first or "first layer whole" in table.lines else ():
            spared(samples[0], reproduce.survivors(samples[0].source, dropped))
    reproduce.show_held_out(tables, samples, args.tokens)
    if not (args.nested or args.first):
        show_budgets(samples, args, list(tables[0].lines), list(tables[0].columns))


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
