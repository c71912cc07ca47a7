# SPDX-License-Identifier: MIT
"""Walk through the mathematics on six tiny experts, three of which do nearly the same.

    python examples/three_cycle.py

Only the experts' weights are typed in: every barrier is measured on them.
"""
import itertools
import sys
import textwrap
from functools import partial

import torch

import baselines
import common
import hodgecover
from hodgecover import Complex, Diagnostics, MoELayer, Settings, Signals
from model_io import Experts, RMSNorm, mix_experts

EXPERTS = 6
TOP_K = 2
KEEP = 3
TOKENS = 96
HIDDEN = 6
VOCAB = 20
TOY, TOYS = 96, 100  # the seed of the one that is shown, and how many are compared
EVERYONE = [*range(EXPERTS)]
NORM = RMSNorm(torch.ones(HIDDEN, dtype=torch.float64), eps=1e-6)
SETTINGS = Settings()
METHODS = {"reap": "per-expert score (REAP saliency)",
           "hodge-no-triangle": "cover of E* alone",
           "hodgecover": "cover of E* and T*"}


# ------------------------------------------------------------------------------------------------------- the toy

def toy_layer(seed: int) -> dict:
    """Experts 0, 1, 2 do nearly the same thing, which 3, 4, 5 do not do.

    Returns the experts, x (T, d), the router's logits (T, n), the residual stream (T, d) and the head (V, d).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = 0.5 * normal(TOKENS, HIDDEN)
    x[:, 0] = 1  # so that a weight on it is a bias
    shapes = (2, HIDDEN), (2, HIDDEN), (HIDDEN, 2)  # gate, up, down
    trades = [[normal(*shape) for shape in shapes] for _ in range(4)]
    gate, up, down = [], [], []
    for e in EVERYONE:
        trade = trades[max(0, e - 2)]
        gate.append(trade[0] + 0.05 * normal(2, HIDDEN))
        up.append(trade[1] + 0.05 * normal(2, HIDDEN))
        size = 0.8 if e < 3 else 0.9
        down.append(size * trade[2] + 0.05 * normal(HIDDEN, 2))
    logits = normal(TOKENS, EXPERTS)
    logits[:, :3] -= 0.3
    experts = Experts(torch.stack(gate), torch.stack(up), torch.stack(down))
    return {"experts": experts, "x": x, "logits": logits, "residual": normal(TOKENS, HIDDEN),
            "head": normal(VOCAB, HIDDEN)}


def route(logits: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Gates (T, n) of top-2 routing over the kept experts, renormalised."""
    p, index = logits[:, kept].softmax(-1).topk(TOP_K)
    gates = torch.zeros_like(logits)
    return gates.scatter(1, torch.tensor(kept)[index], p / p.sum(1, keepdim=True))


def stream(toy: dict, kept: list[int]) -> torch.Tensor:
    """The residual stream after the layer if only `kept` are there, (T, d)."""
    return toy["residual"] + mix_experts(toy["experts"], toy["x"], route(toy["logits"], kept))


def log_distribution(toy: dict, kept: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token if only `kept` are there, (T, V)."""
    return (NORM(stream(toy, kept)) @ toy["head"].T).log_softmax(-1)


def damage(toy: dict, kept: list[int]) -> float:
    """Mean KL from the whole layer's next-token distribution to that of the kept experts, nats."""
    log_p, log_q = log_distribution(toy, EVERYONE), log_distribution(toy, kept)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


def moe_layer(toy: dict) -> MoELayer:
    """The toy as a layer to measure."""
    gates, y = route(toy["logits"], EVERYONE), stream(toy, EVERYONE)
    return MoELayer(toy["experts"], toy["x"], gates, y, NORM, toy["head"])


def survivors(toy: dict, signals: Signals, method: str) -> list[int]:
    """The experts that a method keeps."""
    if method == "hodgecover":
        return hodgecover.plan_from_signals(signals, KEEP, SETTINGS).survivors
    return baselines.choose(signals, toy["logits"].T, method, KEEP, SETTINGS).survivors


def compare_toys(seeds: range) -> tuple[int, int]:
    """Toys of these seeds where HodgeCover does less damage than saliency, and more."""
    better = worse = 0
    for seed in seeds:
        toy = toy_layer(seed)
        signals = hodgecover.measure_layer(moe_layer(toy), SETTINGS)
        cover = damage(toy, survivors(toy, signals, "hodgecover"))
        score = damage(toy, survivors(toy, signals, "reap"))
        better += cover < score
        worse += cover > score
    return better, worse


# -------------------------------------------------------------------------------------------------- the lecture

def say(text: str) -> None:
    """Print a paragraph, a numbered one with its continuation indented."""
    first = "" if text[0].isdigit() else "   "
    print("\n" + textwrap.fill(text, 112, initial_indent=first, subsequent_indent="   ") + "\n")


def table(head: list[str], rows: list[list]) -> None:
    """Print aligned columns."""
    lines = [head]
    for row in rows:
        lines.append([f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def barrier_of(signals: Signals) -> dict[tuple[int, int], float]:
    """The barrier of each pair."""
    pairs = map(tuple, hodgecover.edges(EXPERTS).tolist())
    return dict(zip(pairs, signals.barriers.tolist()))


def most_expensive_edge(pairs: dict[tuple[int, int], float], triangle: list[int]) -> float:
    """The largest barrier of the pairs in a triple."""
    return max(pairs[pair] for pair in itertools.combinations(triangle, 2))


def show_barriers(pairs: dict[tuple[int, int], float], trio: float) -> None:
    """Part 1."""
    say("1. BARRIERS. The barrier of a set is the mean KL between next-token distributions "
        "before and after its members are merged into the frequency-weighted mean of their "
        "outputs. Experts 0, 1, 2 do nearly the same:")
    rows = []
    for i in EVERYONE:
        barriers = [pairs.get((min(i, j), max(i, j)), "-") for j in EVERYONE]
        rows.append([i, *barriers])
    table(["", *map(str, EVERYONE)], rows)
    ratio = trio / most_expensive_edge(pairs, [0, 1, 2])
    say(f"Merged all three at once they cost {trio:.4f}, {ratio:.2f} times the most expensive of "
        "their pairs; the paper calls a triple discordant above 1.2 times. No cycle is needed "
        "for that. KL grows with the square of a small move. Of experts that lie at a distance d "
        "from a common one, in independent directions, the squared move of each is d^2 / 2 in a "
        "merge of two and 2 d^2 / 3 in a merge of three, which also moves the tokens of three, "
        "not of two. That makes 2 times, if all rates are equal and no token is routed to two of "
        "them.")


def show_complex(signals: Signals, complex_: Complex, betti_1: int) -> None:
    """Part 2."""
    edges, pairs = hodgecover.edges(EXPERTS), barrier_of(signals)
    say("2. THE COMPLEX. Vertices are experts, edges all pairs. Triangles are picked among the "
        "triples whose three edges are cheap (at most the median, "
        f"{signals.barriers.median():.3f}):")
    inside, rows = complex_.triangles.tolist(), []
    for triangle, barrier in zip(signals.candidates.tolist(), signals.triplets.tolist()):
        worst = most_expensive_edge(pairs, triangle)
        answer = "yes" if triangle in inside else "no"
        rows.append([tuple(triangle), barrier, worst, barrier / worst, answer])
    table(["triangle", "barrier", "most expensive edge", "ratio", "in T"], rows)
    say(f"T holds those up to tau* = {complex_.tau:.3f}, the threshold where the first Betti "
        "number of the filtration is largest, of several the last, which has the most edges. d1, "
        "the boundary of the first five edges (rows: vertices), and d2, of T's triangles (rows: "
        "edges):")
    table(["", *(str(tuple(edge)) for edge in edges[:5].tolist())],
          [[i, *map(int, complex_.d1[i, :5].tolist())] for i in EVERYONE])
    print()
    rows = []
    for edge, row in zip(edges.tolist(), complex_.d2):
        if row.any():
            rows.append([tuple(edge), *map(int, row.tolist())])
    table(["", *(str(tuple(triangle)) for triangle in inside)], rows)
    show_laplacian(complex_, betti_1)


def show_laplacian(complex_: Complex, betti_1: int) -> None:
    """The end of part 2."""
    d1, d2 = complex_.d1, complex_.d2
    spectrum = torch.linalg.eigvalsh(d1.T @ d1 + d2 @ d2.T)
    zeros = int((spectrum < 1e-9).sum())
    say("The boundary of a boundary is nothing: the largest entry of d1 d2 is "
        f"{(d1 @ d2).abs().max():.0f}. The Laplacian L1 = d1'd1 + d2 d2' has {zeros} eigenvalues "
        f"0, which is beta_1 = {betti_1}:")
    print("   " + "  ".join(f"{abs(value):.2f}" for value in spectrum.tolist()))


def show_decomposition(signals: Signals, complex_: Complex, report: Diagnostics) -> None:
    """Part 3."""
    say("3. THE DECOMPOSITION b = gradient + curl + harmonic, orthogonal. The sign of an edge "
        "comes from the order of its ends, here by index; barriers have none, so that another "
        "numbering of the experts gives another decomposition.")
    columns = torch.stack([signals.barriers, *complex_.parts], dim=1).tolist()
    critical, rows = report.critical_edges.tolist(), []
    for edge, values in zip(hodgecover.edges(EXPERTS).tolist(), columns):
        rows.append([tuple(edge), *values, "yes" if edge in critical else ""])
    table(["edge", "b", "gradient", "curl", "harmonic", "in E*"], rows)
    print()
    table(["share of energy", "gradient", "curl", "harmonic"],
          [["of b", *report.eta.values()], ["of b = 1 everywhere", *report.eta_constant.values()]])
    say("E* are the 20% of the edges with the largest harmonic part. Compare the two lines of "
        "shares before reading anything into them: a signal that says nothing has harmonic "
        "energy too.")


def cycle_energy(filling: list[list[int]]) -> list[float]:
    """Shares of energy of the cycle 0 -> 1 -> 2 -> 0 in a complex with these triangles."""
    signs = {(0, 1): 1.0, (0, 2): -1.0, (1, 2): 1.0}
    edges = hodgecover.edges(EXPERTS).tolist()
    cycle = torch.tensor([signs.get(tuple(edge), 0.0) for edge in edges], dtype=torch.float64)
    triangles = torch.tensor(filling, dtype=torch.int64).reshape(-1, 3)
    parts = hodgecover.hodge_decompose(cycle, *hodgecover.boundary_matrices(EXPERTS, triangles))
    return [*parts.shares().values()]


def show_filling(critical_triangles: torch.Tensor) -> None:
    """Part 4."""
    say("4. FILLED AND UNFILLED. The cycle 0 -> 1 -> 2 -> 0 as a signal, in a complex without "
        "and with triangle 012:")
    table(["", "gradient", "curl", "harmonic"],
          [["unfilled", *cycle_energy([])], ["filled", *cycle_energy([[0, 1, 2]])]])
    expensive = ", ".join(str(tuple(triangle)) for triangle in critical_triangles.tolist())
    say("Filled, it is curl: b_harm does not see it. And the barrier of 012 itself is a number "
        "on a triangle, which the decomposition of an edge signal never reads. The paper's "
        "picture, a triple that pairs do not explain, and its formula, the harmonic part, are "
        "two things here: the triple enters the selection by whether it is in T, which the parts "
        f"depend on, and in T*, the most expensive 20% of T: {expensive}.")


def show_choice(toy: dict, signals: Signals) -> None:
    """Part 5."""
    say("5. THE CHOICE of three survivors: the saliency, scaled to at most 1, plus "
        f"{SETTINGS.lambda_edge:g} for the share of E* and {SETTINGS.lambda_triangle:g} for the "
        "share of T* that has a survivor, greedily. And what it does to the layer's output when "
        "the others are dropped:")
    table(["expert", *map(str, EVERYONE)], [["saliency", *signals.saliency.tolist()]])
    print()
    rows = []
    for method, label in METHODS.items():
        kept = survivors(toy, signals, method)
        rows.append([label, kept, damage(toy, kept)])
    choices = [list(kept) for kept in itertools.combinations(EVERYONE, KEEP)]
    best = min(choices, key=partial(damage, toy))
    rows.append([f"best of all {len(choices)} choices", best, damage(toy, best)])
    table(["", "survivors", "KL"], rows)
    say("The score keeps 1 and 2, which do each other's work, and drops 0, 3 and 5 together. To "
        "keep one of that critical triangle is worth 0.5 to the cover, which takes 3 in place of "
        "2.")
    better, worse = compare_toys(range(1, TOYS + 1))
    say(f"This toy was picked because it shows that. Of {TOYS} made alike with other random "
        f"weights, the cover of E* and T* leaves less damage than saliency in {better}, more in "
        f"{worse}, the same in {TOYS - better - worse}.")


def run(args: object) -> None:
    """The whole lecture."""
    toy = toy_layer(TOY)
    layer = moe_layer(toy)
    signals = hodgecover.measure_layer(layer, SETTINGS)
    complex_ = hodgecover.decompose(signals, SETTINGS)
    report = hodgecover.plan_from_signals(signals, KEEP, SETTINGS).diagnostics
    show_barriers(barrier_of(signals), hodgecover.plain_barrier(layer, [0, 1, 2]).item())
    show_complex(signals, complex_, report.betti_1)
    show_decomposition(signals, complex_, report)
    show_filling(report.critical_triangles)
    show_choice(toy, signals)


main = common.main_of(partial(common.parser_of, __file__, __doc__), run)


if __name__ == "__main__":
    sys.exit(main())
