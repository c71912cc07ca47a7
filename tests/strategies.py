# SPDX-License-Identifier: MIT
"""What the tests of the paper, of its mathematics and of the method draw, and their brute force."""
import itertools
import math
from fractions import Fraction
from functools import partial

import hypothesis
import mathx
import torch
from hodgecover import MoELayer, Signals, edges, merge_weights
from hypothesis import strategies as st
from model_io import Experts, rms_norm

PAIRS = {n: list(itertools.combinations(range(n), 2)) for n in range(2, 9)}
TRIPLES = {n: list(itertools.combinations(range(n), 3)) for n in range(2, 9)}
SEEDS = st.integers(0, 2**31)
NO_TRIANGLES = torch.empty(0, 3, dtype=torch.int64)


def given(*drawn):
    """`hypothesis.given` with 30 examples rather than 100: there are many properties, and each is of many numbers."""
    return lambda test: hypothesis.settings(max_examples=30)(hypothesis.given(*drawn)(test))


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fifths(seed: int, high: int, size: int) -> torch.Tensor:
    """Barriers (size,) with ties: 0, 1/5, 2/5, ... below high / 5, float64."""
    return torch.randint(0, high, (size,), generator=torch.Generator().manual_seed(seed)).double() / 5


def triangle_tensor(triangles: list[tuple[int, int, int]]) -> torch.Tensor:
    """(F, 3) int64, also for no triangle."""
    return torch.tensor(triangles, dtype=torch.int64).reshape(-1, 3)


@st.composite
def complexes(draw, low: int = 2, high: int = 7):
    """(n, triangles (F, 3), an edge signal (E,) with entries of mixed size)."""
    n = draw(st.integers(low, high))
    triangles = sorted(draw(st.sets(st.sampled_from(TRIPLES[n]), max_size=12))) if n > 2 else []
    seed = draw(SEEDS)
    size = torch.randint(-3, 3, (math.comb(n, 2),), generator=torch.Generator().manual_seed(seed)).double()
    return n, triangle_tensor(triangles), normal(seed, math.comb(n, 2)) * 10 ** size


@st.composite
def cover_problems(draw):
    """(saliency (n,), [(critical edges (M, 2), weight), (critical triangles (M, 3), weight)])."""
    n = draw(st.integers(2, 7))
    edges = sorted(draw(st.sets(st.sampled_from(PAIRS[n]), max_size=8)))
    triangles = sorted(draw(st.sets(st.sampled_from(TRIPLES[n]), max_size=6))) if n > 2 else []
    saliency = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=torch.float64) / 10
    families = [(torch.tensor(edges, dtype=torch.int64).reshape(-1, 2), draw(st.sampled_from([0.0, 0.5, 1.0]))),
                (triangle_tensor(triangles), draw(st.sampled_from([0.0, 1.0, 3.0])))]
    return saliency, families


def on_edges(n: int, signal: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """An edge signal (E,) without signs after renumbering: vertex r is the old vertex old[r]."""
    i, j = edges(n).T
    table = signal.new_zeros(n, n)
    table[i, j] = table[j, i] = signal
    return table[old[i], old[j]]


def renumbered(signals: Signals, label: torch.Tensor) -> Signals:
    """The signals if expert v is called label[v], the triangles in lexicographic order again."""
    old, n = label.argsort(), len(label)
    triangles = label[signals.candidates].sort(1).values
    rank = (triangles @ torch.tensor([n * n, n, 1])).argsort()
    return Signals(signals.frequency[old], signals.saliency[old], on_edges(n, signals.barriers, old), triangles[rank],
                   signals.triplets[rank])


def rational_rank(matrix: torch.Tensor) -> int:
    """Rank of an integer matrix by Gaussian elimination over the rationals."""
    rows = [[Fraction(int(value)) for value in row] for row in matrix.tolist()]
    rank = 0
    for column in range(matrix.shape[1]):
        pivot = next((r for r in range(rank, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for r in range(rank + 1, len(rows)):
            factor = rows[r][column] / rows[rank][column]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[rank])] if factor else rows[r]
        rank += 1
    return rank


def random_layer(seed: int = 0, n: int = 7, k: int = 2, renormalise: bool = False, unreached: int | None = None,
                 tokens: int = 40, d: int = 12, f: int = 5, vocab: int = 30) -> MoELayer:
    """A float64 layer in memory."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    logits = normal(tokens, n)
    if unreached is not None:
        logits[:, unreached] = -50
    p, index = logits.softmax(-1).topk(k)
    if renormalise:
        p = p / p.sum(-1, keepdim=True)
    weight = 1 + 0.1 * normal(d)
    gates = torch.zeros(tokens, n, dtype=torch.float64).scatter(1, index, p)
    return MoELayer(Experts(normal(n, f, d) / 3, normal(n, f, d) / 3, normal(n, d, f) / 3), normal(tokens, d), gates,
                    normal(tokens, d), lambda y: rms_norm(y, weight, 1e-5), normal(vocab, d))


def moved(layer: MoELayer, device: str) -> MoELayer:
    """A layer on a device, with a norm without a weight."""
    weight = torch.ones(layer.x.shape[1], dtype=layer.x.dtype).to(device)
    return layer._replace(experts=Experts(*(part.to(device) for part in layer.experts)),
                          norm=partial(rms_norm, weight=weight, eps=1e-5),
                          **{name: getattr(layer, name).to(device) for name in ("x", "gates", "y", "unembedding")})


def fast_barriers(layer: MoELayer, simplices: torch.Tensor, sample: tuple | None = None, **more) -> torch.Tensor:
    """Barriers of simplices (M, 2 or 3) by the sweep."""
    rates = (layer.gates > 0).sum(0).cpu()
    return mathx.sweep(layer, simplices, merge_weights(simplices, rates), sample, **more)


def kl_of_logit_change(log_p: torch.Tensor, delta: torch.Tensor, width: int = 10**9, careful: bool = True
                       ) -> torch.Tensor:
    """KL (R,) of changes of logits (R, V) by `mathx.kl_of_blocks`, less that of the most likely outcome, in blocks of
    so many outcomes; log-probabilities (V,) for all rows, or (R, V)."""
    delta = delta - delta.gather(1, log_p.argmax(-1, keepdim=True).expand(len(delta), 1))
    delta = delta if log_p.dim() == 1 else delta[:, None]
    blocks = zip(log_p.split(width, -1), delta.split(width, -1))
    return mathx.kl_of_blocks(blocks, careful).view(len(delta))


def barrier_by_hand(layer: MoELayer, simplex: list[int]) -> float:
    """A barrier token by token, from nothing but the weights and softmaxes."""
    experts, counts = layer.experts, [(layer.gates[:, e] > 0).sum().item() for e in simplex]
    shares = [count / sum(counts) if sum(counts) else 1 / len(counts) for count in counts]
    merged = [sum(share * part[e] for share, e in zip(shares, simplex)) for part in experts]

    def out(weights, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = weights
        pre = gate @ x
        return down @ (pre / (1 + torch.exp(-pre)) * (up @ x))
    total = 0.0
    for x, gates, y in zip(layer.x, layer.gates, layer.y):
        change = sum(gates[e] * (out(merged, x) - out([part[e] for part in experts], x)) for e in simplex)
        p, q = ((layer.unembedding @ layer.norm(stream)).softmax(0) for stream in (y, y + change))
        total += (p * (p / q).log()).sum().item()
    return total / len(layer.x)
