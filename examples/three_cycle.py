# SPDX-License-Identifier: MIT
"""Walk through the mathematics on six tiny experts, three of which merge cheaply in pairs and expensively together.

    python examples/three_cycle.py

Only the experts' weights are typed in: every barrier is measured on them.
"""
import itertools
import sys
from functools import partial
import textwrap

import torch

import baselines
import common
import hodgecover
from hodgecover import Complex, MoELayer, Settings, Signals
from model_io import Experts, mix_experts

EXPERTS = 6
TOP_K = 2
KEEP = 3
TOKENS = 96
HIDDEN = 6
VOCAB = 20
TOYS = 100
EVERYONE = [*range(EXPERTS)]
SETTINGS = Settings(order="index", edge_percent=20, triangle_percent=20)
METHODS = {"reap": "per-expert score (REAP saliency)",
           "greedy-barrier": "pairwise score (sum of an expert's barriers)",
           "hodge-no-triangle": "cover of E* alone",
           "hodgecover": "cover of E* and T*"}


# ------------------------------------------------------------------------------------------------------- the toy

def toy_layer(seed: int) -> dict:
    """Experts 0, 1, 2 do nearly the same thing, which 3, 4, 5 do not do. Hidden unit 0 of each is dormant: it needs
    the gate of 0 and 1 to open and the value of 2 to speak, in the proportions of a merge of all three.

    Returns the experts, x (T, d), the router's logits (T, n), the residual stream (T, d) and the head (V, d).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = 0.5 * normal(TOKENS, HIDDEN)
    x[:, 0] = 1  # so that a weight on it is a bias
    gate = torch.zeros(EXPERTS, 3, HIDDEN, dtype=torch.float64)
    up = torch.zeros(EXPERTS, 3, HIDDEN, dtype=torch.float64)
    down = torch.zeros(EXPERTS, HIDDEN, 3, dtype=torch.float64)
    gate[:, 0, 0] = torch.tensor([40.0, 40.0, -60.0, -40.0, -40.0, -40.0])
    up[2, 0, 0] = 1
    down[:, 1, 0] = 1
    trades = [(normal(2, HIDDEN), normal(2, HIDDEN), 0.8 * normal(HIDDEN, 2)) for _ in range(4)]
    for e in EVERYONE:
        trade_gate, trade_up, trade_down = trades[0] if e < 3 else trades[e - 2]
        gate[e, 1:] = trade_gate + 0.05 * normal(2, HIDDEN)
        up[e, 1:] = trade_up + 0.05 * normal(2, HIDDEN)
        down[e, :, 1:] = (1 if e < 3 else 1.125) * trade_down + 0.05 * normal(HIDDEN, 2)
    logits = normal(TOKENS, EXPERTS)
    logits[:, :3] -= 0.3
    return {"experts": Experts(gate, up, down), "x": x, "logits": logits, "residual": normal(TOKENS, HIDDEN),
            "head": normal(VOCAB, HIDDEN)}


def route(logits: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Gates (T, n) of top-2 routing over the kept experts, renormalised."""
    p, index = logits[:, kept].softmax(-1).topk(TOP_K)
    return torch.zeros_like(logits).scatter(1, torch.tensor(kept)[index], p / p.sum(1, keepdim=True))


def stream(toy: dict, kept: list[int]) -> torch.Tensor:
    """The residual stream after the layer if only `kept` are there, (T, d)."""
    return toy["residual"] + mix_experts(toy["experts"], toy["x"], route(toy["logits"], kept))


def damage(toy: dict, kept: list[int]) -> float:
    """Mean KL from the whole layer's next-token distribution to that of the kept experts, nats."""
    log_p, log_q = ((stream(toy, some) @ toy["head"].T).log_softmax(-1) for some in (EVERYONE, kept))
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


def moe_layer(toy: dict) -> MoELayer:
    """The toy as a layer to measure; its final norm does nothing."""
    return MoELayer(toy["experts"], toy["x"], route(toy["logits"], EVERYONE), stream(toy, EVERYONE), lambda y: y,
                    toy["head"])


def survivors(toy: dict, signals: Signals, method: str) -> list[int]:
    """The experts that a method keeps."""
    if method == "hodgecover":
        return hodgecover.plan_from_signals(signals, KEEP, SETTINGS)["survivors"]
    return baselines.choose(signals, toy["logits"].T, method, KEEP, SETTINGS)["survivors"]


def compare_toys(seeds: range) -> tuple[int, int]:
    """Toys of these seeds where HodgeCover does less damage than saliency, and more."""
    better = worse = 0
    for seed in seeds:
        toy = toy_layer(seed)
        signals = hodgecover.measure_layer(moe_layer(toy), SETTINGS)
        cover, score = (damage(toy, survivors(toy, signals, method)) for method in ("hodgecover", "reap"))
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
    cells = [head, *([f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def barrier_of(signals: Signals) -> dict[tuple[int, int], float]:
    """The barrier of each pair."""
    pairs = map(tuple, hodgecover.edges(EXPERTS).tolist())
    return dict(zip(pairs, signals.barriers.tolist()))


def show_barriers(pairs: dict[tuple[int, int], float], trio: float) -> None:
    """Part 1."""
    say("1. BARRIERS. The barrier of a set is the mean KL between next-token distributions before and after its "
        "members are merged into the frequency-weighted mean of their weights. Experts 0, 1, 2 do nearly the same:")
    table(["", *map(str, EVERYONE)], [[i, *(pairs[min(i, j), max(i, j)] if i != j else "-" for j in EVERYONE)]
                                      for i in EVERYONE])
    ratio = trio / max(pairs[0, 1], pairs[0, 2], pairs[1, 2])
    say(f"But merged all three at once they cost {trio:.3f}, {ratio:,.0f} times the most expensive of their pairs: a "
        "hidden unit that sleeps in each of them and in each pair wakes in the mean of all three. No sum or maximum of "
        "pairs tells that.")


def show_complex(signals: Signals, found: Complex, betti_1: int) -> None:
    """Part 2."""
    edges, pairs = hodgecover.edges(EXPERTS), barrier_of(signals)
    say("2. THE COMPLEX. Vertices are experts, edges all pairs. Triangles are picked among the triples whose three "
        f"edges are cheap (at most the median, {signals.barriers.median():.3f}):")
    rows = []
    for triangle, barrier in zip(signals.candidates.tolist(), signals.triplets.tolist()):
        most = max(pairs[pair] for pair in itertools.combinations(triangle, 2))
        rows.append([tuple(triangle), barrier, most, "yes" if barrier <= found.tau else "no"])
    table(["triangle", "barrier", "most expensive edge", "in T"], rows)
    say(f"T holds those up to tau* = {found.tau:.3f}, where the first Betti number of the filtration is largest. "
        "d1, the boundary of the first five edges (rows: vertices), and d2, of T's triangles (rows: edges):")
    table(["", *(str(tuple(edge)) for edge in edges[:5].tolist())],
          [[i, *map(int, found.d1[i, :5].tolist())] for i in EVERYONE])
    print()
    table(["", *(str(tuple(triangle)) for triangle in found.triangles.tolist())],
          [[tuple(edge), *map(int, row.tolist())] for edge, row in zip(edges.tolist(), found.d2) if row.any()])
    spectrum = torch.linalg.eigvalsh(found.d1.T @ found.d1 + found.d2 @ found.d2.T)
    largest = (found.d1 @ found.d2).abs().max()
    say(f"The boundary of a boundary is nothing: the largest entry of d1 d2 is {largest:.0f}. "
        f"The Laplacian L1 = d1'd1 + d2 d2' has {int((spectrum < 1e-9).sum())} eigenvalues 0, which is beta_1 = "
        f"{betti_1}:")
    print("   " + "  ".join(f"{abs(value):.2f}" for value in spectrum.tolist()))


def show_decomposition(signals: Signals, found: Complex, said: dict) -> None:
    """Part 3."""
    say("3. THE DECOMPOSITION b = gradient + curl + harmonic, orthogonal. The sign of an edge comes from the order "
        "of its ends; barriers have none, so that another numbering of the experts gives another decomposition.")
    columns = torch.stack([signals.barriers, *found.parts], dim=1).tolist()
    table(["edge", "b", "gradient", "curl", "harmonic", "in E*"],
          [[tuple(edge), *values, "yes" if edge in said["critical_edges"] else ""]
           for edge, values in zip(hodgecover.edges(EXPERTS).tolist(), columns)])
    print()
    table(["share of energy", "gradient", "curl", "harmonic"],
          [["of b", *said["eta"].values()], ["of b = 1 everywhere", *said["eta_constant"].values()]])
    say("Compare the two lines before reading anything into eta: a signal that says nothing has harmonic energy too.")


def cycle_energy(filling: list[list[int]]) -> list[float]:
    """Shares of energy of the cycle 0 -> 1 -> 2 -> 0 in a complex with these triangles."""
    signs = {(0, 1): 1.0, (0, 2): -1.0, (1, 2): 1.0}
    edges = hodgecover.edges(EXPERTS).tolist()
    cycle = torch.tensor([signs.get(tuple(edge), 0.0) for edge in edges], dtype=torch.float64)
    triangles = torch.tensor(filling, dtype=torch.int64).reshape(-1, 3)
    parts = hodgecover.hodge_decompose(cycle, *hodgecover.boundary_matrices(EXPERTS, triangles))
    return [*parts.shares().values()]


def show_filling(critical_triangles: list[list[int]]) -> None:
    """Part 4."""
    say("4. FILLED AND UNFILLED. The cycle 0 -> 1 -> 2 -> 0 as a signal, in a complex without and with triangle 012:")
    table(["", "gradient", "curl", "harmonic"],
          [["unfilled", *cycle_energy([])], ["filled", *cycle_energy([[0, 1, 2]])]])
    say("Filled, it is curl: b_harm does not see it. And the barrier of 012 itself is a number on a triangle, which "
        "the decomposition of an edge signal never reads. The paper's picture, a triple that pairs do not explain, "
        "and its formula, the harmonic part, are two things here: the triple enters the selection by whether it "
        "is in T, which the parts depend on, and in T*, the most expensive of T: "
        f"{', '.join(str(tuple(triangle)) for triangle in critical_triangles)}.")


def show_choice(toy: dict, signals: Signals) -> None:
    """Part 5."""
    say("5. THE CHOICE of three survivors, and what it does to the layer's output when the others are dropped:")
    rows = []
    for method, label in METHODS.items():
        kept = survivors(toy, signals, method)
        rows.append([label, kept, damage(toy, kept)])
    choices = [list(kept) for kept in itertools.combinations(EVERYONE, KEEP)]
    best = min(choices, key=lambda kept: damage(toy, kept))
    table(["", "survivors", "KL"], [*rows, [f"best of all {len(choices)} choices", best, damage(toy, best)]])
    say("The scores drop 0, 1 and 2 together: each looks dispensable, as the others do its work. The cover may not "
        "lose a critical triangle whole and keeps one of them. (The dormant unit made the triple visible; what the "
        "cover saves is the work the three share.)")
    better, worse = compare_toys(range(1, TOYS + 1))
    say(f"This toy was picked because it shows that. Of {TOYS} made alike with other random weights, the cover of E* "
        f"and T* leaves less damage than saliency in {better}, more in {worse}, the same in {TOYS - better - worse}.")


def run(args: object) -> None:
    """The whole lecture."""
    toy = toy_layer(1)
    layer = moe_layer(toy)
    signals = hodgecover.measure_layer(layer, SETTINGS)
    found = hodgecover.decompose(signals, SETTINGS)
    said = hodgecover.plan_from_signals(signals, KEEP, SETTINGS)["diagnostics"]
    show_barriers(barrier_of(signals), hodgecover.plain_barrier(layer, [0, 1, 2]).item())
    show_complex(signals, found, said["betti_1"])
    show_decomposition(signals, found, said)
    show_filling(said["critical_triangles"])
    show_choice(toy, signals)


main = common.main_of(partial(common.parser_of, __file__, __doc__), run)


if __name__ == "__main__":
    sys.exit(main())
