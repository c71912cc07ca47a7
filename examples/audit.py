# SPDX-License-Identifier: MIT
"""Show what the Hodge decomposition of a checkpoint's barriers can and cannot say, with numbers.

    python examples/audit.py examples/tiny-olmoe --keep 32            in minutes
    python examples/audit.py CKPT --keep 32 --calib FILE... --vocab-sample 1024

Barriers have no sign and get one from the order of the experts; the paper takes any (3.2). So each layer is planned by
index (the default), by saliency and in random orders. A table a layer shows the shares of energy (eta, the paper's
rho) of the three parts, beside them the harmonic share of a constant signal on the same complex; how much of E* and of
the survivors each order shares with the default; and the pick that completes the cover.

One table has what hodgecover.py's record says of each layer in the default order: with tau* the largest barrier, with
the triangles of T the candidates they were chosen from, with the discordance the median of a candidate's barrier over
its most expensive edge's, which is 2 for experts that differ independently (three_cycle.py says why). Two tables set it
beside the paper's figures. The summary adds what the additive model b_ij = phi_i + phi_j, which no order changes,
leaves unexplained, and how many of the survivors saliency alone would choose. A last table shows where the dropped
experts are redirected to: by the paper's rule, by the barriers without their additive part phi_i + phi_j, and to the
nearest router row. Few targets mean that a router that followed the redirect would send most of the dropped gate mass
to a few survivors that are cheap to merge with anything.

--end-to-end compares the ranks of the edges, on so many tokens, with those of barriers at the end of the model, which
are ours, not the paper's: the same merge, then all later layers, which must fit in memory.
"""
import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import baselines
import common
import hodgecover
import mathx
import model_io
from hodgecover import Complex, MoELayer, Plan, Settings, Signals
from model_io import LayerPass, Model, require


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
    """The audit of one layer: its default plan, its largest barrier in nats, the median over the candidates of the
    triplet's barrier over its most expensive edge's, the facts in index, saliency and random orders, the share of the
    survivors that are the top by saliency, and the spread of three redirects."""
    plan: Plan
    largest_barrier: float
    triplet_ratio: float
    index: OrderFacts
    saliency: OrderFacts
    random: list[OrderFacts]
    top_by_saliency: float
    redirects: dict[str, Spread]


def audit_layer(signals: Signals, rows: torch.Tensor, keep: int, orders: int,
                settings: Settings = Settings()) -> LayerAudit:
    """The audit of a layer from its signals and its router's rows (n, d), with so many random orders."""
    plan = hodgecover.plan_from_signals(signals, keep, settings)

    def facts(order: str) -> OrderFacts:
        other = hodgecover.plan_from_signals(signals, keep, replace(settings, order=order))
        return order_facts(other, plan)
    complex_ = hodgecover.decompose(signals, settings)
    redirects = {}
    for name, rule in REDIRECTS.items():
        redirects[name] = spread(rule(signals, complex_, plan.survivors, rows))
    top = baselines.descending(signals.saliency)[:keep]
    return LayerAudit(
        plan=plan, largest_barrier=signals.barriers.max().item(),
        triplet_ratio=triplet_ratio(signals),
        index=facts("index"), saliency=facts("saliency"),
        random=[facts(f"random:{seed}") for seed in range(orders)],
        top_by_saliency=shared(plan.survivors, top), redirects=redirects)


def triplet_ratio(signals: Signals) -> float:
    """The median (the lower of two) over the candidates of a triplet's barrier over its most expensive edge's; 0 if
    there are none."""
    faces = hodgecover.faces(len(signals.frequency), signals.candidates)
    worst = signals.barriers[faces].amax(1)
    ratios = (signals.triplets / worst)[worst > 0]
    if not len(ratios):
        return 0.0
    return ratios.median().item()


def order_facts(plan: Plan, default: Plan) -> OrderFacts:
    """The facts of a plan in some order."""
    report, usual = plan.diagnostics, default.diagnostics
    edges_shared = shared(report.critical_edges.tolist(), usual.critical_edges.tolist())
    survivors_shared = shared(plan.survivors, default.survivors)
    return OrderFacts(**report.eta, constant=report.eta_constant["harmonic"],
                      edges_shared=edges_shared, survivors_shared=survivors_shared,
                      covered_at=max(report.covered_at.values()))


def shared(some: list, others: list) -> float:
    """Share of some that are among the others."""
    return sum(item in others for item in some) / max(len(some), 1)


# -------------------------------------------------------------------------------------------------- three redirects

def paper_redirect(signals: Signals, complex_: Complex, survivors: list[int],
                   rows: torch.Tensor) -> dict[int, int]:
    """Equation 13 with the default alpha."""
    harmonic, alpha = complex_.parts.harmonic, Settings().alpha
    return hodgecover.redirect(survivors, signals.barriers, harmonic, alpha)


def residual_redirect(signals: Signals, complex_: Complex, survivors: list[int],
                      rows: torch.Tensor) -> dict[int, int]:
    """The least barrier without its additive part (ours)."""
    residual = mathx.additive_residual(signals.barriers, complex_.d1)
    return hodgecover.redirect(survivors, residual, complex_.parts.harmonic, alpha=0.0)


def row_redirect(signals: Signals, complex_: Complex, survivors: list[int],
                 rows: torch.Tensor) -> dict[int, int]:
    """The nearest router row, of rows (n, d)."""
    return baselines.nearest_rows(rows, survivors)


REDIRECTS = {"the paper's rule": paper_redirect,
             "least barrier without its additive part": residual_redirect,
             "nearest router row": row_redirect}


def spread(redirect: dict[int, int]) -> Spread:
    """The spread of a redirect.

    >>> spread({1: 0, 2: 0, 4: 3})
    Spread(targets=2, busiest=2)
    """
    targets = list(redirect.values())
    return Spread(len(set(targets)), max(map(targets.count, targets), default=0))


def random_range(audit: LayerAudit) -> tuple[OrderFacts, OrderFacts, OrderFacts]:
    """Smallest, median (the lower of two) and largest of each fact over the random orders."""
    table = torch.tensor(audit.random, dtype=torch.float64)
    low, middle, high = table.amin(0), table.median(0).values, table.amax(0)
    return OrderFacts(*low.tolist()), OrderFacts(*middle.tolist()), OrderFacts(*high.tolist())


# --------------------------------------------------------------------- barriers at the end of the model (ours)

def end_of_model(model: Model, ids: torch.Tensor,
                 step: LayerPass) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the head reads of the stream y (T, d) after the layer of a pass over ids (B, L): all later decoder layers,
    held in memory, then the final norm. A layer of a multi-token head has no later ones."""
    later = range(step.index + 1, model.config.num_layers)
    layers = [model.layer(index) for index in later]

    @functools.lru_cache(maxsize=2)  # each barrier asks for the unchanged stream, too
    def read(y: torch.Tensor) -> torch.Tensor:
        for index, layer in zip(later, layers):
            h = y.view(*ids.shape, -1)
            y = model_io.run_layer(h, layer, model.layer_configs[index])[2]
            y = y.view(len(step.y), -1)
        return step.norm(y)
    return read


def signals_at_end(model: Model, ids: torch.Tensor, settings: Settings,
                   cache: Path | None = None) -> Iterator[tuple[int, Signals]]:
    """Yield (layer, signals) of each sparse layer, as `hodgecover.measure_model` does, but with exact barriers at the
    end of the model: KL between the model's next-token distributions on ids (B, L) without and with a merge of outputs
    (equation 30) in the layer. All later layers must fit in memory, and a barrier costs a run through them."""
    key = {}
    if cache:
        model_io.make_cache(cache)
        key = hodgecover.cache_key(model, ids, settings)
    head = model.unembedding()
    sparse = hodgecover.sparse_layers(model)
    for step in model.stream(ids):
        if step.index not in sparse:
            continue
        name, tensors = f"end-of-model-{step.name}", None
        if cache:
            tensors = model_io.read_cached(cache, name, key)
        if not tensors:
            tensors = measure_plainly(layer_at_end(model, ids, step, head), settings)._asdict()
            if cache:
                model_io.write_cached(cache, name, key, tensors)
        yield step.index, Signals(**tensors)


def layer_at_end(model: Model, ids: torch.Tensor, step: LayerPass, head: torch.Tensor) -> MoELayer:
    """A layer whose `hodgecover.plain_barrier` is the one at the end of the model."""
    norm = end_of_model(model, ids, step)
    return MoELayer(step.layer.experts, step.x, step.gates, step.y, norm, head)


@torch.no_grad()
def measure_plainly(layer: MoELayer, settings: Settings) -> Signals:
    """What `hodgecover.measure_layer` gives, with `hodgecover.plain_barrier` in place of the sweep, which knows no
    other norm than the model's own. Raises InputError for a result that is not finite."""
    def barriers_of(simplices: torch.Tensor) -> torch.Tensor:
        barriers = torch.zeros(len(simplices), dtype=torch.float64)
        for number, simplex in enumerate(simplices.tolist()):
            barriers[number] = hodgecover.plain_barrier(layer, simplex)
        return barriers
    frequency = (layer.gates > 0).sum(0).cpu()
    saliency = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates)
    barriers = barriers_of(hodgecover.edges(len(frequency)))
    limit, seed = settings.max_triangles, settings.seed
    candidates = hodgecover.candidate_triangles(barriers, saliency, limit, seed)
    triplets = barriers_of(candidates)
    finite = torch.cat((saliency, barriers, triplets)).isfinite().all()
    require(finite, "a layer's saliencies, or barriers at the end of the model, are not finite")
    return Signals(frequency, saliency, barriers, candidates, triplets)


def end_to_end(model: Model, ids: torch.Tensor, settings: Settings) -> Iterator[tuple[int, float]]:
    """Yield (layer, Spearman correlation of the edges' barriers at the layer and at the end of the model) on ids
    (B, L)."""
    pairs = replace(settings, vocab_sample=0, max_triangles=0)
    at_layer = hodgecover.measure_model(model, ids, pairs, hodgecover.sparse_layers(model))
    for (index, lens), (_, end) in zip(at_layer, signals_at_end(model, ids, pairs)):
        yield index, mathx.spearman(lens.barriers, end.barriers)


# --------------------------------------------------------------------------------------------- the paper's figures

PAPER_HEAD = ("", "rho_harm", "curl", "discordance", "beta_1")
PAPER = (  # A.3, A.12
    ("the paper's OLMoE", "0.289 to 0.491 (mean 0.352)", "0.025 to 0.049", "0.596 to 1", "1,453 to 1,455"),
    ("its Qwen3.5-35B", "0.387 to 0.587", "at most 0.0015", "0.114 to 0.762", "31,885"),
    ("its Qwen3.5-122B", "0.296 to 0.616", "at most 0.0015", "0.060 to 0.892", "31,885"))
RETAINED_HEAD = ("retained mass (equation 34)", "harmonic", "gradient", "curl", "triplet")
PAPER_RETAINED = ("the paper's OLMoE, 66% of the experts gone (table 5)", "0.693", "0.613", "0.378", "0.491")


def span(values: list[float], form: str) -> str:
    """The least and the largest value, formatted.

    >>> span([0.5, 0.25], ".3f"), span([7], ",")
    ('0.250 to 0.500', '7')
    """
    low, high = format(min(values), form), format(max(values), form)
    if low == high:
        return low
    return f"{low} to {high}"


def ranges(plans: list[Plan]) -> tuple[str, ...]:
    """This model's line beside PAPER: the least and the largest of its layers."""
    reports = [plan.diagnostics for plan in plans]
    harmonic = [report.eta["harmonic"] for report in reports]
    mean = sum(harmonic) / len(harmonic)
    return ("this model", f"{span(harmonic, '.3f')} (mean {mean:.3f})",
            span([report.eta["curl"] for report in reports], ".3f"),
            span([report.discordance for report in reports], ".3f"),
            span([report.betti_1 for report in reports], ","))


def retained_line(plans: list[Plan]) -> tuple[str, ...]:
    """This model's line beside PAPER_RETAINED: the means over its layers, as table 5 has them."""
    kept = sum(len(plan.survivors) for plan in plans)
    gone = 1 - kept / sum(len(plan.order) for plan in plans)
    cells = []
    for part in RETAINED_HEAD[1:]:
        mean = sum(plan.diagnostics.retained[part] for plan in plans) / len(plans)
        cells.append(f"{mean:.3f}")
    return f"this model, {gone:.0%} of the experts gone", *cells


# ------------------------------------------------------------------------------------------------- what is printed

ORDER_HEAD = ("order", "eta gradient", "curl", "harmonic", "harmonic of a constant", "E* shared",
              "survivors shared", "covered at")
LAYER_HEAD = ("layer", "eta gradient (of a constant signal)", "curl", "harmonic", "beta_1",
              "tau* (largest barrier), nats", "candidates in T",
              "discordance (median triplet over worst edge)", "E* covered at", "T* covered at",
              "routed to survivors")
SUMMARY_HEAD = ("layer", "harmonic share", "of a constant signal", "over random orders",
                "E* shared with them, median", "survivors shared with them",
                "energy the additive model leaves", "variance", "E* and T* covered at (picks that stay)",
                "survivors that are top by saliency")


def print_table(head: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def show_orders(index: int, audit: LayerAudit) -> None:
    """Print the table of one layer."""
    named = {"index": audit.index, "saliency": audit.saliency}
    for name, facts in zip(("smallest", "median", "largest"), random_range(audit)):
        named[f"{len(audit.random)} random, {name}"] = facts
    rows = []
    for name, facts in named.items():
        shares = [f"{share:.2f}" for share in facts[:-1]]
        rows.append((name, *shares, f"{facts.covered_at:.0f}"))
    print(f"\nLayer {index}")
    print_table(ORDER_HEAD, rows)


def layer_line(index: int, audit: LayerAudit) -> tuple:
    """A layer's line of what its record says."""
    report = audit.plan.diagnostics
    etas = []
    for share, constant in zip(report.eta.values(), report.eta_constant.values()):
        etas.append(f"{share:.3f} ({constant:.3f})")
    tau = f"{report.tau:.3g} ({audit.largest_barrier:.3g})"
    triangles = f"{report.triangles} of {report.candidates}"
    discordance = f"{report.discordance:.1%} ({audit.triplet_ratio:.2f})"
    return (index, *etas, report.betti_1, tau, triangles, discordance,
            *report.covered_at.values(), f"{audit.plan.routed_share:.1%}")


def summary(index: int, audit: LayerAudit, keep: int) -> tuple[str, ...]:
    """A layer's line of the summary."""
    low, middle, high = random_range(audit)
    report = audit.plan.diagnostics
    unexplained = {name: 1 - share for name, share in report.additive.items()}
    return (str(index),
            f"{report.eta['harmonic']:.2f}",
            f"{report.eta_constant['harmonic']:.2f}",
            f"{low.harmonic:.2f} to {high.harmonic:.2f}",
            f"{middle.edges_shared:.0%}",
            f"{low.survivors_shared:.0%} to {high.survivors_shared:.0%}",
            f"{unexplained['energy']:.1%}",
            f"{unexplained['variance']:.1%}",
            f"{max(report.covered_at.values())} ({keep})",
            f"{audit.top_by_saliency:.0%}")


def show_summary(audits: dict[int, LayerAudit], keep: int) -> None:
    """Print what the records say, the paper's figures beside it, the summary and the table of redirects."""
    plans = [audit.plan for audit in audits.values()]
    print_table(LAYER_HEAD, [layer_line(index, audit) for index, audit in audits.items()])
    print_table(PAPER_HEAD, [*PAPER, ranges(plans)])
    print_table(RETAINED_HEAD, [PAPER_RETAINED, retained_line(plans)])
    print_table(SUMMARY_HEAD, [summary(index, audit, keep) for index, audit in audits.items()])
    print(f"\nRedirect of the {len(plans[0].redirect)} dropped experts: targets among the {keep} "
          "survivors (experts that the busiest one takes)")
    rows = []
    for index, audit in audits.items():
        spreads = [f"{spread.targets} ({spread.busiest})" for spread in audit.redirects.values()]
        rows.append((index, *spreads))
    print_table(("layer", *REDIRECTS), rows)


# ------------------------------------------------------------------------------------------------- the command line

def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, out=False)
    add = parser.add_argument
    add("--keep", metavar="K", type=int, required=True, help="experts to keep in every layer")
    add("--orders", metavar="N", type=int, default=20, help="random orders [%(default)s]")
    add("--cache", metavar="DIR", type=Path, help="folder of the barriers [CKPT-barriers]")
    hodgecover.add_settings(parser, "vocab_sample", "max_triangles")
    add("--end-to-end", metavar="TOKENS", type=int, default=0,
        help="also compare with barriers at the end of the model on so many tokens")
    return parser


def show_end_to_end(args: argparse.Namespace, ids: torch.Tensor, settings: Settings) -> None:
    """Print how edges rank at the layer and at the end of the model, on some of ids (B, L), in float32 or better."""
    dtype = "float32" if args.dtype == "auto" else args.dtype
    model = Model(args.checkpoint, model_io.choose_dtype(dtype, args.device), args.device)
    few = ids[:, :max(2, args.end_to_end // len(ids))]
    rows = [(index, f"{rho:.3f}") for index, rho in end_to_end(model, few, settings)]
    print(f"\nLens against the end of the model, on {few.numel()} tokens")
    print_table(("layer", "Spearman of edges"), rows)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    settings = common.settings_of(args)
    hodgecover.check_range("orders", args.orders, 1)
    hodgecover.check_range("end_to_end", args.end_to_end, 0)
    require(not args.end_to_end or args.dtype != "bfloat16",
            "dtype bfloat16: loses the small difference of streams that --end-to-end compares")
    model = common.open_model(args.checkpoint, args)
    hodgecover.check_keep(model, args.keep)
    cache = common.barrier_cache(model, args)
    ids = common.calibration_ids(model, args)
    if args.end_to_end:
        show_end_to_end(args, ids, settings)
    bar = model_io.progress_bar()
    layers = hodgecover.sparse_layers(model)
    audits = {}
    measured = hodgecover.measure_model(model, ids, settings, layers, cache, args.memory, bar)
    for index, signals in measured:
        bar(None)
        rows = model.checkpoint.load(f"{model.layer_names[index]}.mlp.gate.weight")
        audits[index] = audit_layer(signals, rows, args.keep, args.orders, settings)
        show_orders(index, audits[index])
    show_summary(audits, args.keep)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
