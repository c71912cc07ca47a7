# SPDX-License-Identifier: MIT
"""What the tests of the paper, of its mathematics and of the method draw, and their brute force."""
import itertools
import math
from fractions import Fraction

import hypothesis
import mathx
import torch
from hodgecover import MoELayer, Signals, edges, merge_weights, plain_barrier
from hypothesis import strategies as st
from model_io import Experts, RMSNorm

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
                 tokens: int = 40, d: int = 12, f: int = 5, vocab: int = 30, spread: float = 0.1) -> MoELayer:
    """A float64 layer in memory; the weights of its norm are spread about 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    logits = normal(tokens, n)
    if unreached is not None:
        logits[:, unreached] = -50
    p, index = logits.softmax(-1).topk(k)
    if renormalise:
        p = p / p.sum(-1, keepdim=True)
    norm = RMSNorm(1 + spread * normal(d), 1e-5)
    gates = torch.zeros(tokens, n, dtype=torch.float64).scatter(1, index, p)
    experts = Experts(normal(n, f, d) / 3, normal(n, f, d) / 3, normal(n, d, f) / 3)
    return MoELayer(experts, normal(tokens, d), gates, normal(tokens, d), norm, normal(vocab, d))


@st.composite
def layers(draw):
    """Layers of any shape and routing: one expert for a token or all, an expert that no token uses, tokens that are
    routed nowhere, and weights of the norm from -30 to 30."""
    n = draw(st.integers(3, 7))
    k = draw(st.integers(1, n))
    unreached = draw(st.sampled_from([None, 0, n - 1])) if k < n else None
    tokens, d, vocab = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(2, 40))
    layer = random_layer(draw(SEEDS), n, k, draw(st.booleans()), unreached, tokens, d, vocab=vocab,
                         spread=draw(st.sampled_from([0.1, 10.0])))
    nowhere = draw(st.integers(0, tokens - 1))
    layer.gates[:nowhere] = 0
    return layer


def converted(layer: MoELayer, *to: object) -> MoELayer:
    """The layer with every tensor on another device or in another dtype."""
    return MoELayer(Experts(*(weight.to(*to) for weight in layer.experts)), layer.x.to(*to), layer.gates.to(*to),
                    layer.y.to(*to), layer.norm._replace(weight=layer.norm.weight.to(*to)),
                    layer.unembedding.to(*to))


def fast_barriers(layer: MoELayer, simplices: torch.Tensor, sample: mathx.Sample | None = None, **more
                  ) -> torch.Tensor:
    """Barriers of simplices (M, 2 or 3) by the sweep."""
    rates = (layer.gates > 0).sum(0).cpu()
    return mathx.sweep(layer, simplices, merge_weights(simplices, rates), sample, **more)


def plain_barriers(layer: MoELayer, simplices: torch.Tensor) -> torch.Tensor:
    """The same by their definition."""
    return torch.stack([plain_barrier(layer, simplex) for simplex in simplices.tolist()])


def kl_of_logit_change(log_p: torch.Tensor, delta: torch.Tensor, width: int = 10**9, careful: bool = True
                       ) -> torch.Tensor:
    """KL (R,) of changes of logits (R, V) by `mathx.kl_of_blocks`, less that of the most likely outcome, in blocks of
    so many outcomes; log-probabilities (V,) for all rows, or (R, V)."""
    likely = log_p.argmax(-1, keepdim=True)
    delta = delta - delta.gather(1, likely.expand(len(delta), 1))
    delta = delta[None] if log_p.dim() == 1 else delta[:, None]  # (t, R, V)
    blocks = zip(log_p.view(len(delta), -1).split(width, -1), delta.split(width, -1))
    return mathx.kl_of_blocks(blocks, careful).flatten()


def output_by_hand(layer: MoELayer, e: int, x: torch.Tensor) -> torch.Tensor:
    """E_e(x) of one token x (d,), from the weights."""
    gate, up, down = (weight[e] for weight in layer.experts)
    pre = gate @ x
    return down @ (pre / (1 + torch.exp(-pre)) * (up @ x))


def kl_by_hand(layer: MoELayer, y: torch.Tensor, change: torch.Tensor) -> float:
    """KL of one token's next-token distributions, at the stream y (d,) and at y + change."""
    logs = []
    for stream in (y, y + change):
        rms = (stream.square().mean() + layer.norm.eps).sqrt()
        logits = layer.unembedding @ (stream / rms * layer.norm.weight)
        logs.append(logits.log_softmax(0))
    log_p, log_q = logs
    return (log_p.exp() * (log_p - log_q)).sum().item()


def barrier_by_hand(layer: MoELayer, simplex: list[int]) -> float:
    """A barrier token by token, from nothing but the weights and softmaxes (equations 2 and 30)."""
    counts = [(layer.gates[:, e] > 0).sum().item() for e in simplex]
    if sum(counts) == 0:
        counts = [1] * len(simplex)
    total = 0.0
    for x, gates, y in zip(layer.x, layer.gates, layer.y):
        outputs = [output_by_hand(layer, e, x) for e in simplex]
        merged = sum(count * output for count, output in zip(counts, outputs)) / sum(counts)
        change = sum(gates[e] * (merged - output) for e, output in zip(simplex, outputs))
        total += kl_by_hand(layer, y, change)
    return total / len(layer.x)
