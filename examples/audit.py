# SPDX-License-Identifier: MIT
"""Show what the Hodge decomposition of a checkpoint's barriers can and cannot say, with numbers.

    python examples/audit.py examples/tiny-olmoe --keep 32            in minutes
    python examples/audit.py CKPT --keep 32 --calib FILE... --vocab-sample 1024

Barriers have no sign and get one from the order of the experts. So each layer is planned in saliency order (the
default), in index order and in random orders. A table a layer shows the shares of energy (eta) of the three parts,
beside them the harmonic share of a constant signal on the same complex; how much of E* and of the survivors each order
shares with the default; and the pick that completes the cover.

One table has what hodgecover.py's record says of each layer in the default order. The summary adds what the additive
model b_ij = phi_i + phi_j, which no order changes, leaves unexplained, and how many of the survivors saliency alone
would choose. A last table shows where the dropped experts are redirected to: by the paper's rule, by the barriers
without their additive part phi_i + phi_j, and to the nearest router row. Few targets mean that a router that followed
the redirect would send most of the dropped gate mass to a few survivors that are cheap to merge with anything.

--end-to-end compares the ranks of the edges with those of barriers at the end of the model. Every layer must fit in
memory.
"""
import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import baselines
import common
import hodgecover
import mathx
from hodgecover import Settings, Signals
from model_io import InputError, Model


class OrderFacts(NamedTuple):
    """The plan in one order of the experts, beside the default plan: eta of the three parts, the harmonic eta of a
    constant signal, the shares of E* and of the survivors that the default has too, the pick that completes the
    cover."""
    gradient: float
    curl: float
    harmonic: float
    constant: float
    edges_shared: float
    survivors_shared: float
    covered_at: int


class Spread(NamedTuple):
    """Survivors that dropped experts are redirected to, and how many the busiest of them takes."""
    targets: int
    busiest: int


class LayerAudit(NamedTuple):
    """The audit of one layer: its default plan, the facts in saliency, index and random orders, the share of the
    survivors that are the top by saliency, and the spread of three redirects."""
    plan: dict
    saliency: OrderFacts
    index: OrderFacts
    random: list[OrderFacts]
    top_by_saliency: float
    redirects: dict[str, Spread]


def audit_layer(signals: Signals, rows: torch.Tensor, keep: int, orders: int, settings: Settings = Settings()
                ) -> LayerAudit:
    """The audit of a layer from its signals and its router's rows (n, d), with so many random orders."""
    plan = hodgecover.plan_from_signals(signals, keep, settings)

    def facts(order: str) -> OrderFacts:
        return order_facts(hodgecover.plan_from_signals(signals, keep, replace(settings, order=order)), plan)
    found = hodgecover.decompose(signals, settings)
    redirects = {name: spread(rule(signals, found, plan["survivors"], rows)) for name, rule in REDIRECTS.items()}
    top = baselines.descending(signals.saliency)[:keep]
    return LayerAudit(plan, facts("saliency"), facts("index"), [facts(f"random:{seed}") for seed in range(orders)],
                      shared(plan["survivors"], top), redirects)


def order_facts(plan: dict, default: dict) -> OrderFacts:
    """The facts of a plan in some order."""
    said, usual = plan["diagnostics"], default["diagnostics"]
    return OrderFacts(*said["eta"].values(), said["eta_constant"]["harmonic"],
                      shared(said["critical_edges"], usual["critical_edges"]),
                      shared(plan["survivors"], default["survivors"]), max(said["covered_at"].values()))


def shared(some: list, others: list) -> float:
    """Share of some that are among the others."""
    return sum(item in others for item in some) / max(len(some), 1)


# By name: (signals, complex, survivors, router rows (n, d)) -> redirect
REDIRECTS = {
    "the paper's rule": lambda signals, found, kept, rows: hodgecover.redirect(
        kept, signals.barriers, found.parts.harmonic, Settings().alpha),
    "least barrier without its additive part": lambda signals, found, kept, rows: hodgecover.redirect(
        kept, mathx.additive_residual(signals.barriers, found.d1), found.parts.harmonic, alpha=0.0),
    "nearest router row": lambda signals, found, kept, rows: baselines.nearest_rows(rows, kept)}


def spread(redirect: dict[int, int]) -> Spread:
    """The spread of a redirect.

    >>> spread({1: 0, 2: 0, 4: 3})
    Spread(targets=2, busiest=2)
    """
    targets = list(redirect.values())
    return Spread(len({*targets}), max(map(targets.count, targets), default=0))


def random_range(audit: LayerAudit) -> tuple[OrderFacts, OrderFacts, OrderFacts]:
    """Smallest, median (the lower of two) and largest of each fact over the random orders."""
    table = torch.tensor(audit.random, dtype=torch.float64)
    return tuple(OrderFacts(*of.tolist()) for of in (table.amin(0), table.median(0).values, table.amax(0)))


# ------------------------------------------------------------------------------------------------- what is printed

ORDER_HEAD = ("order", "eta gradient", "curl", "harmonic", "harmonic of a constant", "E* shared", "survivors shared",
              "covered at")
LAYER_HEAD = ("layer", "eta gradient (of a constant signal)", "curl", "harmonic", "beta_1", "triangles", "discordance",
              "E* covered at", "T* covered at", "routed to survivors")
SUMMARY_HEAD = ("layer", "harmonic share", "of a constant signal", "over random orders",
                "E* shared with them, median", "survivors shared with them", "energy the additive model leaves",
                "variance", "E* and T* covered at", "survivors that are top by saliency")


def print_table(head: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def show_orders(index: int, audit: LayerAudit) -> None:
    """Print the table of one layer."""
    named = {"saliency": audit.saliency, "index": audit.index}
    for name, facts in zip(("smallest", "median", "largest"), random_range(audit)):
        named[f"{len(audit.random)} random, {name}"] = facts
    print(f"\nLayer {index}")
    print_table(ORDER_HEAD, [(name, *(f"{share:.2f}" for share in facts[:-1]), f"{facts.covered_at:.0f}")
                             for name, facts in named.items()])


def layer_line(index: int, plan: dict) -> tuple:
    """A layer's line of what its record says."""
    said = plan["diagnostics"]
    both = zip(said["eta"].values(), said["eta_constant"].values())
    return (index, *(f"{share:.3f} ({constant:.3f})" for share, constant in both), said["betti_1"], said["triangles"],
            f"{said['discordance']:.1%}", *said["covered_at"].values(), f"{plan['routed_share']:.1%}")


def summary(index: int, audit: LayerAudit, keep: int) -> tuple[str, ...]:
    """A layer's line of the summary."""
    low, middle, high = random_range(audit)
    said = audit.plan["diagnostics"]
    return (str(index), f"{said['eta']['harmonic']:.2f}", f"{said['eta_constant']['harmonic']:.2f}",
            f"{low.harmonic:.2f} to {high.harmonic:.2f}", f"{middle.edges_shared:.0%}",
            f"{low.survivors_shared:.0%} to {high.survivors_shared:.0%}", f"{1 - said['additive']['energy']:.1%}",
            f"{1 - said['additive']['variance']:.1%}", f"{max(said['covered_at'].values())} of {keep}",
            f"{audit.top_by_saliency:.0%}")


def show_summary(audits: dict[int, LayerAudit], keep: int) -> None:
    """Print what the records say, the summary and the table of redirects."""
    print_table(LAYER_HEAD, [layer_line(index, audit.plan) for index, audit in audits.items()])
    print_table(SUMMARY_HEAD, [summary(index, audit, keep) for index, audit in audits.items()])
    rules = next(iter(audits.values())).redirects
    dropped = len(next(iter(audits.values())).plan["redirect"])
    print(f"\nRedirect of the {dropped} dropped experts: targets among the {keep} survivors (experts that the busiest "
          "one takes)")
    print_table(("layer", *rules), [(index, *(f"{of.targets} ({of.busiest})" for of in audit.redirects.values()))
                                    for index, audit in audits.items()])


def end_to_end(model: Model, ids: torch.Tensor, settings: Settings) -> Iterator[tuple[int, float]]:
    """Yield (layer, Spearman correlation of the edges' barriers by the readouts lens and model) on ids (B, L)."""
    pairs = replace(settings, vocab_sample=0, max_triangles=0)
    by_readout = [hodgecover.measure_model(model, ids, replace(pairs, readout=readout), hodgecover.sparse_layers(model))
                  for readout in ("model", "lens")]
    for (index, whole), (_, lens) in zip(*by_readout):
        yield index, mathx.spearman(lens.barriers, whole.barriers)


# ------------------------------------------------------------------------------------------------- the command line

def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, out=False)
    parser.add_argument("--keep", metavar="K", type=int, required=True, help="experts to keep in every layer")
    parser.add_argument("--orders", metavar="N", type=int, default=20, help="random orders [%(default)s]")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="folder of the barriers [CKPT-barriers]")
    hodgecover.add_settings(parser, "vocab_sample", "max_triangles")
    parser.add_argument("--end-to-end", metavar="TOKENS", type=int, default=0, help="also compare with the readout "
                        "model on so many tokens")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    settings = common.settings_of(args)
    hodgecover.check_range("orders", args.orders, 1)
    hodgecover.check_range("end_to_end", args.end_to_end, 0)
    if args.end_to_end and args.dtype == "bfloat16":
        raise InputError("dtype bfloat16: loses the small difference of streams that --end-to-end compares")
    model = common.open_model(args.checkpoint, args)
    hodgecover.check_keep(model, args.keep)
    cache = common.barrier_cache(model, args)
    ids = common.calibration_ids(model, args)
    if args.end_to_end:
        wide = Model(args.checkpoint, model_io.choose_dtype(args.dtype, args.device, "model"), args.device)
        few = ids[:, :max(2, args.end_to_end // len(ids))]
        found = list(end_to_end(wide, few, settings))
        print(f"\nLens against the end of the model, on {few.numel()} tokens")
        print_table(("layer", "Spearman of edges"), [(index, f"{rho:.3f}") for index, rho in found])
    bar = model_io.progress_bar()
    layers = hodgecover.sparse_layers(model)
    audits = {}
    for index, signals in hodgecover.measure_model(model, ids, settings, layers, cache, args.memory, bar):
        bar(None)
        rows = model.checkpoint.load(f"{model.layer_names[index]}.mlp.gate.weight")
        audits[index] = audit_layer(signals, rows, args.keep, args.orders, settings)
        show_orders(index, audits[index])
    show_summary(audits, args.keep)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
