# SPDX-License-Identifier: MIT
"""Search which experts stay by what the whole model then predicts: how many in each layer, or which ones.

    python examples/budgets.py CKPT evo --keep 32 --out DIR              a number for each layer, 32 on average
    python examples/budgets.py CKPT barriers --keep 32 --plan P --out DIR   the same, by HodgeCover's barriers
    python examples/budgets.py CKPT coverage --keep 32 --out DIR         the same, by saliency
    python examples/budgets.py CKPT rco --keep 32 --out DIR              32 in every layer
    python examples/budgets.py CKPT rco --keep 32 --ragged --out DIR     32 on average

The output has the number of experts of each layer in the `per_layer_config` of its config.json. All commands but rco
read it; transformers 4.57 and 5.24 read it by the code beside the weights, with trust_remote_code=True. --plan-only
writes the plan alone.

evo (EvoESAP, arXiv 2603.06003). The experts of a layer go in a fixed order, the least REAP saliency first, or from the
end of a --plan's `order`; a candidate says how many. It is worth ESAP = mean_t sum_v min(p, q) = 1 - TV, p the source's
next-token distribution and q its own. 32 candidates, of eleven shapes and at random; in each generation the best 4 stay
and the others become mutants of them, in which up to 3 times up to 4 experts move from one layer to another.

barriers (ours; the paper's allocator is not at hand). No search: each layer keeps experts in proportion to the square
root of its mean barrier, in nats, which a --plan of hodgecover.py has; the plan's order says which. That would be the
best budget if a layer's loss were its barrier over the number of experts that stay.

coverage (SHAPE, arXiv 2606.09886). No search: each layer keeps the fewest experts that hold a share of its saliency's
mass, the same share in all layers, chosen for the total. The saliency is REAP's, or that of a --plan (ours; the paper
credits the coalitions that are routed to).

rco (RCO, arXiv 2605.00649; rco.py says how). No order is given: each expert has logits to keep and to prune it, trained
to a low loss against the source while the expected number of pruned experts stays at the budget. With a budget for each
layer it is a selector like those of baselines.py, and export_plan.py repeats its plan; with --ragged there is one
budget for all.

Every layer keeps the model's top-k at least: so does the published code of EvoESAP; in the other searches it is ours. A
multi-token head, whose loss is not the model's, keeps K experts by the fixed order (ours).

A killed search continues from what lies in OUT-budgets until the output is whole. Layers are read one at a time: by evo
once for as many candidates as --memory holds streams of; by rco twice a sample of noise, or once for all if the weights
fit --memory.

    n experts of a layer    d hidden size    T tokens, B sequences of L    V vocabulary
"""
import argparse
import hashlib
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import baselines
import common
import export_plan
import hodgecover
import model_io
import rco
import torch
from model_io import InputError, Model

TOKENS = 16384  # default sample
POPULATION, ELITE, MAX_MOVES, MAX_DELTA, ATTEMPTS = 32, 4, 3, 4, 32  # of evo
GENERATIONS, STEPS = 10, 200
REPORTS = 10  # lines of progress of rco
CACHE_VERSION = "2"

Budget = tuple[int, ...]  # experts that go, of each sparse decoder layer


# ---------------------------------------------------------------------------------------------------------- barriers


def in_proportion(weights: Sequence[float], low: int, high: Sequence[int], total: int) -> Budget:
    """Share out a total in proportion to positive weights, from `low` to its own `high` to each.

    >>> in_proportion([9.0, 1.0, 2.0, 3.0], 2, [8, 8, 8, 8], 20), in_proportion([1.0, 1.0, 1.0], 2, [8, 8, 3], 11)
    ((8, 2, 4, 6), (4, 4, 3))
    """
    def shares(scale: float) -> list[float]:
        return [min(most, max(low, scale * weight)) for weight, most in zip(weights, high)]
    few, many = 0.0, max(high) / min(weights)
    for _ in range(100):
        middle = (few + many) / 2
        few, many = (middle, many) if sum(shares(middle)) < total else (few, middle)
    return largest_remainder(shares(many), high, total)


def barrier_budget(means: Sequence[float], counts: Sequence[int], top_k: int, keep: int) -> Budget:
    """How many of the experts of each layer go, by the layers' mean barriers: `keep` stay on average."""
    largest = max(means) or 1.0
    kept = in_proportion([max(each / largest, 1e-6)**0.5 for each in means], top_k, counts, keep * len(means))
    return tuple(n - each for n, each in zip(counts, kept))


def coverage_budget(saliencies: Sequence[Sequence[float]], top_k: int, keep: int) -> Budget:
    """How many of the experts of each layer go, by their saliencies in the order that they stay in: `keep` stay on
    average. An expert stays if those before it hold less than a share of the mass; it is the share that many do at.

    >>> coverage_budget([[8.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], 1, 2)
    (3, 1)
    """
    marginal = [(held / (sum(each) or 1.0), layer) for layer, each in enumerate(saliencies)
                for held in [0.0, *itertools.accumulate(each)][top_k:-1]]
    kept = Counter(layer for _, layer in sorted(marginal)[:(keep - top_k) * len(saliencies)])
    return tuple(len(each) - top_k - kept[layer] for layer, each in enumerate(saliencies))


def mean_barriers(path: Path, names: Iterable[str]) -> list[float]:
    """The mean barrier of layers, in nats, by a plan that `export_plan.read_orders` takes. Raises InputError if it has
    none."""
    found = {layer["name"]: layer.get("diagnostics") for layer in hodgecover.read_history(path)[-1]["layers"]}
    means = [found[name].get("mean_barrier") if isinstance(found[name], dict) else None for name in names]
    if not all(type(each) in (int, float) and 0 <= each <= 1e9 for each in means):
        raise InputError(f"{path}: has no mean barriers; give a plan of hodgecover.py")
    return means


# --------------------------------------------------------------------------------------------------------------- evo


def largest_remainder(weights: Sequence[float], capacity: Sequence[int], total: int) -> Budget:
    """Share out a total in proportion to weights, its own `capacity` at most to each: the whole parts, then one each by
    the largest remainder, then one each in turn.

    >>> largest_remainder([1, 1, 2], [9, 9, 9], 10), largest_remainder([0, 0, 1], [2, 4, 4], 10)
    ((3, 2, 5), (2, 4, 4))
    """
    wanted = [total * weight / sum(weights) for weight in weights]
    shares = [min(int(each), most) for each, most in zip(wanted, capacity)]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - wanted[i])
    for i in itertools.chain(by_remainder, itertools.cycle(range(len(weights)))):
        if sum(shares) == total:
            return tuple(shares)
        shares[i] += shares[i] < capacity[i]


def first_weights(layers: int, rng: random.Random) -> list[list[float]]:
    """The first generation's shares of each layer: eleven shapes, then random ones."""
    middle, quarter = (layers - 1) / 2, max(1, layers // 4)
    shapes: list[Callable[[int], float]] = [
        lambda i: 1.0, lambda i: i + 1, lambda i: layers - i,  # uniform, up, down
        lambda i: middle - abs(i - middle) + 1, lambda i: abs(i - middle) + 1,  # mid, mid-neg
        lambda i: 0.7**i + 1e-4, lambda i: 1.3**i,  # front-heavy, back-heavy
        lambda i: 1.0 + (i < quarter), lambda i: 1.0 + (i >= layers - quarter),  # block-early, block-late
        lambda i: 2.0 - i % 2, lambda i: 1 - abs(2 * i / max(layers - 1, 1) - 1) / 2]  # alt, deep-flat
    shapes += [lambda i: rng.random() + 1e-4] * (POPULATION - len(shapes))
    return [[shape(i) for i in range(layers)] for shape in shapes]


def mutated(budget: Budget, capacity: Sequence[int], rng: random.Random) -> Budget:
    """A budget in which experts moved between layers, a few times: the sum stays, no layer loses more than its
    `capacity`."""
    moved, child = 0, list(budget)
    moves = min(rng.randint(1, MAX_MOVES), rng.randint(1, MAX_MOVES))
    for _ in range(ATTEMPTS):
        here, there, delta = rng.randrange(len(child)), rng.randrange(len(child)), rng.randint(1, MAX_DELTA)
        if here != there and child[here] >= delta and child[there] + delta <= capacity[there]:
            child[here] -= delta
            child[there] += delta
            moved += 1
        if moved == moves:
            break
    return tuple(child)


def evolve(worth: Callable[[list[Budget]], list[float]], capacity: Sequence[int], total: int, generations: int,
           seed: int = 0) -> Iterator[tuple[Budget, float]]:
    """Search the budget of largest worth among those of a total; yield the best one and its worth after each
    generation."""
    rng = random.Random(seed)
    population = [largest_remainder(weights, capacity, total) for weights in first_weights(len(capacity), rng)]
    for _ in range(generations):
        worth_of = dict(zip(population, worth(population)))
        elite = sorted(population, key=lambda budget: -worth_of[budget])[:ELITE]
        yield elite[0], worth_of[elite[0]]
        population = elite + [mutated(rng.choice(elite), capacity, rng) for _ in range(POPULATION - ELITE)]


def remembered(worth: Callable[[list[Budget]], list[float]], cache: Path | None = None, key: dict[str, str] = {}
               ) -> Callable[[list[Budget]], list[float]]:
    """The worth of budgets, each measured once; what is known lies in a folder, if there is one, so that a killed
    search repeats its way without measuring."""
    saved = model_io.read_cached(cache, "budgets-evo", key) if cache else None
    known = dict(zip(map(tuple, saved["budgets"].tolist()), saved["worth"].tolist())) if saved else {}

    def of(budgets: list[Budget]) -> list[float]:
        new = [budget for budget in dict.fromkeys(budgets) if budget not in known]
        if new:
            known.update(zip(new, worth(new)))
        if new and cache:
            values = torch.tensor([*known.values()], dtype=torch.float64)
            model_io.write_cached(cache, "budgets-evo", key, {"budgets": torch.tensor([*known]), "worth": values})
        return [known[budget] for budget in budgets]
    return of


def last_streams(model: Model, ids: torch.Tensor, orders: dict[str, list[int]], budgets: list[Budget]
                 ) -> list[torch.Tensor]:
    """What the head reads on ids (B, L) if each of several budgets cuts the ends of the orders, by layer name:
    (B, L, d) each. A layer is read once; budgets that agree up to it share their stream."""
    at_once, depth = max(1, model_io.PASS_TOKENS // ids.shape[1]), 0
    streams = {(): model.embed(ids)}
    for index in range(model.config.num_layers):
        layer, name, before = model.layer(index), model.layer_names[index], depth
        if name in orders:
            layer, depth = common.cut(layer, orders[name]), depth + 1
        after = {}
        for start in dict.fromkeys(budget[:depth] for budget in budgets):
            own = common.cut(layer, slice(len(orders[name]) - start[-1])) if name in orders else layer
            after[start] = torch.cat([model_io.run_layer(h, own, model.config)[2].view_as(h)
                                      for h in streams[start[:before]].split(at_once)])
        streams = after
    norm = model.norm(f"{model.prefix}norm.weight")
    return [norm(streams[budget]) for budget in budgets]


def overlap(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The probability (...,) that a token drafted from q is accepted for p, distributions (..., V): 1 - TV."""
    return torch.minimum(p, q).sum(-1)


def esap(source: torch.Tensor, outputs: list[torch.Tensor], head: torch.Tensor) -> list[float]:
    """The mean overlap of the source's next-token distributions with each output's: what the head (V, d) reads, (B, L,
    d)."""
    def distribution(features: torch.Tensor) -> torch.Tensor:
        return (features @ head.T).softmax(-1, dtype=model_io.widened(features.dtype))
    totals = [0.0] * len(outputs)
    for number, features in enumerate(source):
        p = distribution(features)
        for which, output in enumerate(outputs):
            totals[which] += overlap(p, distribution(output[number])).double().sum().item()
    return [total / source[..., 0].numel() for total in totals]


def esap_of(model: Model, ids: torch.Tensor, orders: dict[str, list[int]], memory: int = hodgecover.MEMORY
            ) -> Callable[[list[Budget]], list[float]]:
    """The ESAP of budgets on ids (B, L), of as many at a time as `memory` holds the streams of."""
    head = model.unembedding()
    source, = last_streams(model, ids, orders, [(0,) * len(orders)])
    at_once = max(1, memory // (2 * source.numel() * source.element_size()))

    def of(budgets: list[Budget]) -> list[float]:
        parts = (budgets[start:start + at_once] for start in range(0, len(budgets), at_once))
        return [each for part in parts for each in esap(source, last_streams(model, ids, orders, part), head)]
    return of


# -------------------------------------------------------------------------------------------------------- the plans


def planned(model: Model, base: dict[str, dict], orders: dict[str, list[int]], budget: Budget, keep: int
            ) -> dict[str, dict]:
    """The plans by layer name in which a budget cuts the ends of orders; of layers without one, `keep` experts stay in
    the order of their plan in `base`, which has what was measured of all layers."""
    counts = {name: len(order) - gone for (name, order), gone in zip(orders.items(), budget)}
    plans = {}
    for name, plan in base.items():
        order, count = orders.get(name, plan["order"]), counts.get(name, keep)
        rows = model.checkpoint.load(f"{name}.mlp.gate.weight")
        plans[name] = hodgecover.plan_of(order, baselines.nearest_rows(rows, order[:count]), count,
                                         torch.tensor(plan["frequency"]), torch.tensor(plan["saliency"]))
    return plans


def decoder_orders(model: Model, base: dict[str, dict]) -> dict[str, list[int]]:
    """The orders of plans by layer name, of the decoder layers alone."""
    return {name: base[name]["order"] for name in model.layer_names[:model.config.num_layers] if name in base}


# ------------------------------------------------------------------------------------------------------- the command


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, text=TOKENS)
    parser.add_argument("search", choices=("evo", "barriers", "coverage", "rco"), help="as above")
    parser.add_argument("--keep", metavar="K", type=int, required=True, help="experts to keep: by rco in every "
                        "layer, else and by --ragged on average")
    parser.add_argument("--plan", metavar="PLAN", type=Path, help="evo, coverage: a plan whose order the experts "
                        "go in [REAP's]; barriers: hodgecover.py's, which it needs")
    parser.add_argument("--generations", metavar="G", type=int, default=GENERATIONS, help="of evo [%(default)s]")
    parser.add_argument("--steps", metavar="N", type=int, default=STEPS, help="of rco's optimiser [%(default)s]")
    parser.add_argument("--ragged", action="store_true", help="rco: one budget for all layers")
    parser.add_argument("--plan-only", action="store_true", help="write the plan alone, as a file")
    return parser


UNUSED = {"evo": ("steps", "ragged"), "rco": ("plan", "generations"),
          "barriers": ("steps", "ragged", "generations", "calib", "tokens", "seq_len", "seed", "memory"),
          "coverage": ("steps", "ragged", "generations", "memory")}


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for an option out of range, and for one that the search does not use."""
    common.refuse_given(command_line(), args, UNUSED[args.search], args.search)
    if args.search == "coverage" and args.plan:
        common.refuse_given(command_line(), args, ("calib", "tokens", "seq_len", "seed"), "coverage of a --plan")
    if args.search == "barriers" and not args.plan:
        raise InputError("plan: missing; barriers are read from a plan of hodgecover.py")
    hodgecover.check_range("generations", args.generations, 1, 10**6)
    hodgecover.check_range("steps", args.steps, 1, 10**6)


def check_budget(model: Model, keep: int) -> None:
    """Raise InputError for a dense model, and if no expert would go, or too few would stay for the top-k."""
    hodgecover.sparse_layers(model)
    sizes, k = expert_counts(model), model.config.top_k
    most = (sum(sizes) - 1) // len(sizes)
    if not k <= keep <= most:
        raise InputError(f"keep {keep}: must be from {k}, the experts of a token, to {most}, for an expert to go")


def expert_counts(model: Model) -> list[int]:
    """The number of experts of each sparse decoder layer."""
    return [config.num_experts for config in model.layer_configs[:model.config.num_layers] if config.sparse]


def search_key(model: Model, ids: torch.Tensor, *more: object) -> dict[str, str]:
    """Return all that what is saved depends on, by name."""
    return common.work_key({"format": CACHE_VERSION, "search": more}, ids, model)


def run_evo(model: Model, ids: torch.Tensor, orders: dict[str, list[int]], args: argparse.Namespace, cache: Path,
            bar: Callable[[float | None], None]) -> Budget:
    """Search a number for each layer; print each generation's best."""
    counts = expert_counts(model)
    uniform = tuple(max(0, n - args.keep) for n in counts)
    worth = remembered(esap_of(model, ids, orders, args.memory), cache, search_key(model, ids, "evo", orders))
    search = evolve(worth, [n - model.config.top_k for n in counts], sum(counts) - args.keep * len(counts),
                    args.generations, args.seed)
    for number, (best, value) in enumerate(search, 1):
        bar(None)
        kept = " ".join(str(n - gone) for n, gone in zip(counts, best))
        print(f"generation {number}: ESAP {value:.4f}, experts kept {kept}", flush=True)
        bar(number / args.generations)
    bar(None)
    print(f"ESAP: {worth([uniform])[0]:.4f} with {args.keep} at most in every layer, {value:.4f} found")
    return best


def run_rco(model: Model, ids: torch.Tensor, orders: dict[str, list[int]], args: argparse.Namespace, cache: Path,
            bar: Callable[[float | None], None]) -> tuple[dict[str, list[int]], Budget]:
    """Search experts; print the loss now and then. Returns the new orders, and how many go. Raises InputError if the
    layers have different numbers of experts."""
    if len({*expert_counts(model)}) > 1:
        raise InputError(f"{model.checkpoint.path}: its layers have different numbers of experts; rco takes one number")
    alpha, limits = rco.start(model.config, len(orders), args.keep, args.ragged)
    key = search_key(model, ids, "rco", args.keep, args.ragged, args.steps, args.seed)
    loss_of = rco.masked_loss(model, ids, [model.layer_names.index(name) for name in orders], args.memory)
    for done, loss in rco.descend(loss_of, len(ids), alpha, limits, args.steps, args.seed, cache, key):
        if done * REPORTS // args.steps > (done - 1) * REPORTS // args.steps:
            bar(None)
            print(f"step {done} of {args.steps}: loss {loss:.4f}", flush=True)
        bar(done / args.steps)
    bar(None)
    return rco.rank(alpha, list(orders), limits)


def write(model: Model, plans: dict[str, dict], ids: torch.Tensor | None, args: argparse.Namespace) -> None:
    """Write the checkpoint of plans by layer name, or the plans alone. Without ids (B, L) the record leaves what text
    there was to that of --plan."""
    used = {name: getattr(args, name) for name in ("generations", "steps", "ragged") if name not in UNUSED[args.search]}
    if args.plan:
        used["plan_sha256"] = hashlib.sha256(args.plan.read_bytes()).hexdigest()
    entry = hodgecover.plan_entry(model, plans, args.keep, common.settings_of(args), ids, args.calib,
                                  Path(__file__).name, search=args.search, **used)
    if args.plan_only:
        model_io.write_whole(args.out, hodgecover.record_bytes(model.checkpoint, entry))
        return print(f"plan: {args.out}; examples/export_plan.py writes its checkpoint")
    common.export(model, plans, args.out, entry)
    common.show_output(model, args.out)
    if (args.out / f"{model_io.MODELING}.py").exists():
        print("transformers loads it with trust_remote_code=True")


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    model = common.open_model(args.checkpoint, args)
    check_budget(model, args.keep)
    cache = common.folder_beside(args.out, "budgets", model)
    hodgecover.check_out(model, args.out, cache, args.plan_only)
    base = export_plan.read_orders(model, args.plan) if args.plan else None
    reads = args.search in ("evo", "rco") or not args.plan
    ids = common.calibration_ids(model, args) if reads else None
    bar = hodgecover.progress_bar()
    with common.made(cache):
        base = base or dict(baselines.select_model(model, ids, "reap", args.keep))
        orders = decoder_orders(model, base)
        if args.search == "evo":
            budget = run_evo(model, ids, orders, args, cache, bar)
        elif args.search == "barriers":
            means, counts = mean_barriers(args.plan, orders), expert_counts(model)
            budget = barrier_budget(means, counts, model.config.top_k, args.keep)
        elif args.search == "coverage":
            ranked = [[base[name]["saliency"][e] for e in order] for name, order in orders.items()]
            budget = coverage_budget(ranked, model.config.top_k, args.keep)
        else:
            orders, budget = run_rco(model, ids, orders, args, cache, bar)
    plans = planned(model, base, orders, budget, args.keep)
    print(f"experts kept in each layer: {' '.join(str(len(plan['survivors'])) for plan in plans.values())}", flush=True)
    write(model, plans, ids, args)
    common.clear(cache, ["budgets-*.safetensors"])


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
