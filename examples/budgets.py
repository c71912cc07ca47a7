# SPDX-License-Identifier: MIT
"""Say how many experts stay in each layer, by HodgeCover's allocators (B.3) or others; or search which ones stay.

    python examples/budgets.py CKPT uniform --rate 0.33 --out DIR            0.33 of all go, as many of each layer
    python examples/budgets.py CKPT harmonic --rate 0.33 --plan P --out DIR  0.33 of all go, by HodgeCover's rho_harm
    python examples/budgets.py CKPT evo --keep 32 --out DIR                  a number for each layer, 32 on average
    python examples/budgets.py CKPT barriers --keep 32 --plan P --out DIR    the same, by HodgeCover's barriers
    python examples/budgets.py CKPT coverage --keep 32 --out DIR             the same, by saliency
    python examples/budgets.py CKPT rco --keep 32 --out DIR                  32 in every layer
    python examples/budgets.py CKPT rco --keep 32 --ragged --out DIR         32 on average

The output has the number of experts of each layer in the `per_layer_config` of its config.json. All commands but rco
read it; transformers 4.57 and 5.24 read it by the code beside the weights, with trust_remote_code=True. --plan-only
writes the plan alone.

uniform (equation 32). No search: R = floor(rate sum n_l) experts go, floor(R / L) of each of L layers, and one more of
each of the first R mod L. They go from the end of an order, REAP's or a --plan's. The paper keeps one expert of a layer
at least.

harmonic (B.3, in no table of the paper). No search: layer l loses floor(R sigma_l / sum sigma), sigma_l = max(1 -
rho_harm(l), 1e-12), and the first layers one more each until R are gone. A --plan of hodgecover.py has rho_harm and the
order. Ours, for both: what a layer that keeps its top-k cannot lose is taken from the others in turn, from the first.

evo (EvoESAP, arXiv 2603.06003). The experts of a layer go in a fixed order, the least REAP saliency first, or from the
end of a --plan's `order`; a candidate says how many. It is worth ESAP = mean_t sum_v min(p, q) = 1 - TV, p the source's
next-token distribution and q its own. 32 candidates, of eleven shapes and at random; in each generation the best 4 stay
and the others become mutants of them, in which up to 3 times up to 4 experts move from one layer to another.

barriers (ours). No search: each layer keeps experts in proportion to the square
root of its mean barrier, in nats, which a --plan of hodgecover.py has; the plan's order says which. That would be the
best budget if a layer's loss were its barrier over the number of experts that stay.

coverage (SHAPE, arXiv 2606.09886). No search: each layer keeps the fewest experts that hold a share of its saliency's
mass, the same share in all layers, chosen for the total. The saliency is REAP's, or that of a --plan (ours; the paper
credits the coalitions that are routed to).

rco (RCO, arXiv 2605.00649; rco.py says how). No order is given: each expert has logits to keep and to prune it, trained
to a low loss against the source while the expected number of pruned experts stays at the budget. With a budget for each
layer it is a selector like those of baselines.py, and export_plan.py repeats its plan; with --ragged there is one
budget for all.

Every layer keeps the model's top-k at least: so does the published code of EvoESAP; for all others it is ours. A
multi-token head, whose loss is not the model's, keeps K experts by the fixed order, for a --rate the whole part of what
a layer keeps on average (ours).

A killed search continues from what lies in OUT-budgets until the output is whole. Layers are read one at a time: by evo
once for as many candidates as --memory holds streams of; by rco twice a sample of noise, or once for all if the weights
fit --memory.

    n experts of a layer    d hidden size    T tokens, B sequences of L    V vocabulary
"""
import argparse
import hashlib
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import baselines
import common
import export_plan
import hodgecover
import model_io
import rco
import torch
from hodgecover import Plan
from model_io import InputError, Model, require

TOKENS = 16384  # default sample
POPULATION, ELITE, MAX_MOVES, MAX_DELTA, ATTEMPTS = 32, 4, 3, 4, 32  # of evo
GENERATIONS, STEPS = 10, 200
REPORTS = 10  # lines of progress of rco
CACHE_VERSION = "2"

Budget = tuple[int, ...]  # experts that go, of each sparse decoder layer


# ------------------------------------------------------------------------------- uniform, harmonic (B.3, equation 32)


def experts_to_go(rate: float, counts: Sequence[int]) -> int:
    """R, the whole part of a rate of all experts; the rate is the decimal fraction that it is written as.

    >>> experts_to_go(0.29, [50, 50])  # the product of the binary fractions is below 29
    29
    """
    return math.floor(Fraction(str(rate)) * sum(counts))


def uniform_budget(counts: Sequence[int], least: int, total: int) -> Budget:
    """How many of the experts of each layer go, `total` in all: as many of each layer, and one more of
    each of the first (equation 32). A layer keeps `least`. Equation 32 has min(n - d, n - 1), which
    would take an expert even of a layer with d = 0; we read d <= n - 1, as the text has it (ours).

    >>> uniform_budget([8, 8, 8], 1, 11), uniform_budget([8, 4, 8], 3, 8)
    ((4, 4, 3), (4, 1, 3))
    """
    share = total // len(counts)
    return with_remainder([share] * len(counts), [n - least for n in counts], total)


def harmonic_budget(shares: Sequence[float], counts: Sequence[int], least: int, total: int) -> Budget:
    """How many of the experts of each layer go, `total` in all: in proportion to what of a layer's
    barriers is not harmonic, by rho_harm of each, rounded down, and one more of each of the first
    (B.3). A layer keeps `least`.

    >>> harmonic_budget([0.25, 0.5, 0.75], [8, 8, 8], 1, 10)  # 5, 3.33 and 1.67
    (6, 3, 1)
    """
    sigma = [Fraction(max(1 - rho, hodgecover.GUARD)) for rho in shares]
    wanted = [math.floor(total * each / sum(sigma)) for each in sigma]
    return with_remainder(wanted, [n - least for n in counts], total)


def with_remainder(shares: Sequence[int], capacity: Sequence[int], total: int) -> Budget:
    """Whole shares, no more than a layer's `capacity`, and what they are short of the total: one more
    to each layer that can take it, in turn, from the first (ours but for the first turn).

    >>> with_remainder([2, 2, 2], [9, 1, 9], 8)
    (4, 1, 3)
    """
    taken = list(map(min, shares, capacity))
    for layer in itertools.cycle(range(len(taken))):
        if sum(taken) >= min(total, sum(capacity)):
            return tuple(taken)
        if taken[layer] < capacity[layer]:
            taken[layer] += 1


def harmonic_shares(path: Path, names: Iterable[str]) -> list[float]:
    """rho_harm of layers by a plan that `export_plan.read_orders` takes. Raises InputError if it has none."""
    return reported(path, names, ("eta", "harmonic"), 1 + 1e-6, "harmonic shares")


def reported(path: Path, names: Iterable[str], keys: Sequence[str], most: float, what: str) -> list[float]:
    """A number from 0 to `most` in the diagnostics of each layer of a plan, found by keys in keys.
    Raises InputError, which says `what` is missing, if a layer has none."""
    entry = model_io.read_history(path)[-1]
    values = {layer["name"]: layer.get("diagnostics") for layer in entry["layers"]}
    numbers = []
    for name in names:
        value = values[name]
        for key in keys:
            value = isinstance(value, dict) and value.get(key)
        require(type(value) in (int, float) and 0 <= value <= most,
                f"{path}: has no {what}; give a plan of hodgecover.py")
        numbers.append(value)
    return numbers


# ---------------------------------------------------------------------------------------------- barriers, coverage


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
        if sum(shares(middle)) < total:
            few = middle
        else:
            many = middle
    return largest_remainder(shares(many), high, total)


def barrier_budget(means: Sequence[float], counts: Sequence[int], top_k: int, keep: int) -> Budget:
    """How many of the experts of each layer go, by the layers' mean barriers: `keep` stay on average."""
    largest = max(means) or 1.0
    weights = [max(mean / largest, 1e-6)**0.5 for mean in means]
    kept = in_proportion(weights, top_k, counts, keep * len(means))
    return tuple(n - count for n, count in zip(counts, kept))


def coverage_budget(saliencies: Sequence[Sequence[float]], top_k: int, keep: int) -> Budget:
    """How many of the experts of each layer go, by their saliencies in the order that they stay in: `keep` stay on
    average. An expert stays if those before it hold less than a share of the mass; it is the share that many do at.

    >>> coverage_budget([[8.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], 1, 2)
    (3, 1)
    """
    marginal = []  # of each expert beyond the top-k: the share that those before it hold, its layer
    for layer, saliency in enumerate(saliencies):
        mass = sum(saliency) or 1.0
        held = [0.0, *itertools.accumulate(saliency)]
        marginal += [(before / mass, layer) for before in held[top_k:-1]]
    first = sorted(marginal)[:(keep - top_k) * len(saliencies)]
    kept = Counter(layer for _, layer in first)
    return tuple(len(saliency) - top_k - kept[layer] for layer, saliency in enumerate(saliencies))


def mean_barriers(path: Path, names: Iterable[str]) -> list[float]:
    """The mean barrier of layers, in nats, by a plan that `export_plan.read_orders` takes. Raises InputError if it has
    none."""
    return reported(path, names, ("mean_barrier",), 1e9, "mean barriers")


# --------------------------------------------------------------------------------------------------------------- evo


def largest_remainder(weights: Sequence[float], capacity: Sequence[int], total: int) -> Budget:
    """Share out a total in proportion to weights, its own `capacity` at most to each: the whole parts, then one each by
    the largest remainder, then one each in turn.

    >>> largest_remainder([1, 1, 2], [9, 9, 9], 10), largest_remainder([0, 0, 1], [2, 4, 4], 10)
    ((3, 2, 5), (2, 4, 4))
    """
    wanted = [total * weight / sum(weights) for weight in weights]
    shares = [min(int(share), most) for share, most in zip(wanted, capacity)]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - wanted[i])
    in_turn = itertools.cycle(range(len(weights)))
    for i in itertools.chain(by_remainder, in_turn):
        if sum(shares) == total:
            return tuple(shares)
        if shares[i] < capacity[i]:
            shares[i] += 1


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
    saved, known = None, {}
    if cache:
        saved = model_io.read_cached(cache, "budgets-evo", key)
    if saved:
        budgets = map(tuple, saved["budgets"].tolist())
        known = dict(zip(budgets, saved["worth"].tolist()))

    def of(budgets: list[Budget]) -> list[float]:
        new = [budget for budget in dict.fromkeys(budgets) if budget not in known]
        if new:
            known.update(zip(new, worth(new)))
        if new and cache:
            values = torch.tensor(list(known.values()), dtype=torch.float64)
            tensors = {"budgets": torch.tensor(list(known)), "worth": values}
            model_io.write_cached(cache, "budgets-evo", key, tensors)
        return [known[budget] for budget in budgets]
    return of


def last_streams(model: Model, ids: torch.Tensor, orders: dict[str, list[int]], budgets: list[Budget]
                 ) -> list[torch.Tensor]:
    """What the head reads on ids (B, L) if each of several budgets cuts the ends of the orders, by layer name:
    (B, L, d) each. A layer is read once; budgets that agree up to it share their stream."""
    at_once = max(1, model_io.PASS_TOKENS // ids.shape[1])

    def through(layer: model_io.Layer, stream: torch.Tensor) -> torch.Tensor:
        outputs = []
        for h in stream.split(at_once):
            outputs.append(model_io.run_layer(h, layer, model.config)[2].view_as(h))
        return torch.cat(outputs)
    streams = {(): model.embed(ids)}  # by the part of a budget that was spent
    depth = 0
    for index in range(model.config.num_layers):
        layer, name = model.layer(index), model.layer_names[index]
        if name not in orders:
            streams = {spent: through(layer, stream) for spent, stream in streams.items()}
            continue
        depth += 1
        ranked = common.cut(layer, orders[name])
        after = {}
        for spent in dict.fromkeys(budget[:depth] for budget in budgets):
            kept = len(orders[name]) - spent[-1]
            after[spent] = through(common.cut(ranked, slice(kept)), streams[spent[:-1]])
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
        worth = []
        for start in range(0, len(budgets), at_once):
            outputs = last_streams(model, ids, orders, budgets[start:start + at_once])
            worth += esap(source, outputs, head)
        return worth
    return of


# -------------------------------------------------------------------------------------------------------- the plans


def planned(model: Model, base: dict[str, Plan], orders: dict[str, list[int]], budget: Budget, keep: int
            ) -> dict[str, Plan]:
    """The plans by layer name in which a budget cuts the ends of orders; of layers without one, `keep` experts stay in
    the order of their plan in `base`, which has what was measured of all layers."""
    gone = dict(zip(orders, budget))
    plans = {}
    for name, plan in base.items():
        order, count = plan.order, keep
        if name in orders:
            order = orders[name]
            count = len(order) - gone[name]
        rows = model.checkpoint.load(f"{name}.mlp.gate.weight")
        targets = baselines.nearest_rows(rows, order[:count])
        plans[name] = hodgecover.plan_of(order, targets, count, plan.frequency, plan.saliency)
    return plans


def decoder_orders(model: Model, base: dict[str, Plan]) -> dict[str, list[int]]:
    """The orders of plans by layer name, of the decoder layers alone."""
    decoder = model.layer_names[:model.config.num_layers]
    return {name: base[name].order for name in decoder if name in base}


# ------------------------------------------------------------------------------------------------------- the command


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, text=TOKENS)
    parser.add_argument("search", choices=tuple(UNUSED), help="as above")
    parser.add_argument("--keep", metavar="K", type=int, help="experts to keep: by rco in every layer, else and by "
                        "--ragged on average")
    parser.add_argument("--rate", metavar="R", type=float, help="uniform, harmonic: share of all experts that goes")
    parser.add_argument("--plan", metavar="PLAN", type=Path, help="evo, coverage, uniform: a plan whose order the "
                        "experts go in [REAP's]; barriers, harmonic: hodgecover.py's, which they need")
    parser.add_argument("--generations", metavar="G", type=int, default=GENERATIONS, help="of evo [%(default)s]")
    parser.add_argument("--steps", metavar="N", type=int, default=STEPS, help="of rco's optimiser [%(default)s]")
    parser.add_argument("--ragged", action="store_true", help="rco: one budget for all layers")
    parser.add_argument("--plan-only", action="store_true", help="write the plan alone, as a file")
    return parser


SEARCHED = ("steps", "ragged", "generations", "memory")  # options of the searches alone
TEXT = ("calib", "tokens", "seq_len", "seed")
UNUSED = {  # options that a search does not use
    "evo": ("rate", "steps", "ragged"),
    "rco": ("rate", "plan", "generations"),
    "barriers": ("rate", *SEARCHED, *TEXT),
    "coverage": ("rate", *SEARCHED),
    "uniform": ("keep", *SEARCHED),
    "harmonic": ("keep", *SEARCHED, *TEXT)}
OF_PLAN = {"barriers": "barriers", "harmonic": "harmonic shares"}  # what these read from a plan


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for an option out of range, for one that is missing, and for one that the search does not
    use."""
    search = args.search
    common.refuse_given(command_line(), args, UNUSED[search], search)
    if search in ("coverage", "uniform") and args.plan:
        common.refuse_given(command_line(), args, TEXT, f"{search} of a --plan")
    for name in ("keep", "rate"):
        require(name in UNUSED[search] or getattr(args, name) is not None, f"{name}: missing; {search} needs it")
    if search in OF_PLAN:
        require(args.plan, f"plan: missing; {OF_PLAN[search]} are read from a plan of hodgecover.py")
    if args.rate is not None:
        hodgecover.check_range("rate", args.rate, 0, 1)
    hodgecover.check_range("generations", args.generations, 1, 10**6)
    hodgecover.check_range("steps", args.steps, 1, 10**6)


def check_budget(model: Model, keep: int) -> None:
    """Raise InputError for a dense model, and if no expert would go, or too few would stay for the top-k."""
    hodgecover.sparse_layers(model)
    sizes, k = expert_counts(model), model.config.top_k
    most = (sum(sizes) - 1) // len(sizes)
    require(k <= keep <= most, f"keep {keep}: must be from {k}, the experts of a token, to {most}, for an expert to go")


def check_rate(model: Model, rate: float) -> int:
    """Return how many experts a rate takes. Raises InputError for a dense model, and if no expert would go, or too few
    would stay for the top-k."""
    hodgecover.sparse_layers(model)
    counts, k = expert_counts(model), model.config.top_k
    total, most = experts_to_go(rate, counts), sum(counts) - k * len(counts)
    require(1 <= total <= most,
            f"rate {rate}: {total} of {sum(counts)} experts would go; must be from 1 to {most}, for each layer to keep "
            f"{k}, the experts of a token")
    return total


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
    capacity = [n - model.config.top_k for n in counts]
    total = sum(counts) - args.keep * len(counts)
    worth = remembered(esap_of(model, ids, orders, args.memory), cache, search_key(model, ids, "evo", orders))
    search = evolve(worth, capacity, total, args.generations, args.seed)
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
    require(len({*expert_counts(model)}) == 1,
            f"{model.checkpoint.path}: its layers have different numbers of experts; rco takes one number")
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


def write(model: Model, plans: dict[str, Plan], ids: torch.Tensor | None, args: argparse.Namespace, keep: int) -> None:
    """Write the checkpoint of plans by layer name, or the plans alone. Without ids (B, L) the record leaves what text
    there was to that of --plan."""
    choices = {"search": args.search}
    for name in ("rate", "generations", "steps", "ragged"):
        if name not in UNUSED[args.search]:
            choices[name] = getattr(args, name)
    if args.plan:
        choices["plan_sha256"] = hashlib.sha256(args.plan.read_bytes()).hexdigest()
    entry = hodgecover.plan_entry(model, plans, keep, common.settings_of(args), ids, args.calib, Path(__file__).name,
                                  **choices)
    if args.plan_only:
        model_io.write_whole(args.out, model_io.record_bytes(model.checkpoint, entry))
        print(f"plan: {args.out}; examples/export_plan.py writes its checkpoint")
        return
    common.export(model, plans, args.out, entry)
    common.show_output(model, args.out)
    if (args.out / f"{model_io.MODELING}.py").exists():
        print("transformers loads it with trust_remote_code=True")


def share_out(model: Model, base: dict[str, Plan], orders: dict[str, list[int]], args: argparse.Namespace) -> Budget:
    """The budget of a way without a search."""
    counts, k = expert_counts(model), model.config.top_k
    if args.search == "uniform":
        return uniform_budget(counts, k, check_rate(model, args.rate))
    if args.search == "harmonic":
        shares = harmonic_shares(args.plan, orders)
        return harmonic_budget(shares, counts, k, check_rate(model, args.rate))
    if args.search == "barriers":
        means = mean_barriers(args.plan, orders)
        return barrier_budget(means, counts, k, args.keep)
    saliencies = [base[name].saliency[order].tolist() for name, order in orders.items()]
    return coverage_budget(saliencies, k, args.keep)


def kept_on_average(model: Model, args: argparse.Namespace) -> int:
    """K: --keep, or the whole part of what a decoder layer keeps of --rate on average. Raises InputError if the model
    cannot keep so many."""
    if args.rate is None:
        check_budget(model, args.keep)
        return args.keep
    counts = expert_counts(model)
    return (sum(counts) - check_rate(model, args.rate)) // len(counts)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    model = common.open_model(args.checkpoint, args)
    keep = kept_on_average(model, args)
    cache = common.folder_beside(args.out, "budgets", model)
    model_io.check_out(model, args.out, cache, args.plan_only)
    base, ids = None, None
    if args.plan:
        base = export_plan.read_orders(model, args.plan)
    if args.search in ("evo", "rco") or not args.plan:
        ids = common.calibration_ids(model, args)
    bar = model_io.progress_bar()
    with common.made(cache):
        if not base:  # its orders serve any number
            base = dict(baselines.select_model(model, ids, "reap", model.config.top_k))
        orders = decoder_orders(model, base)
        if args.search == "evo":
            budget = run_evo(model, ids, orders, args, cache, bar)
        elif args.search == "rco":
            orders, budget = run_rco(model, ids, orders, args, cache, bar)
        else:
            budget = share_out(model, base, orders, args)
    plans = planned(model, base, orders, budget, keep)
    counts = [str(len(plan.survivors)) for plan in plans.values()]
    print(f"experts kept in each layer: {' '.join(counts)}", flush=True)
    write(model, plans, ids, args, keep)
    common.clear(cache, ["budgets-*.safetensors"])


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
