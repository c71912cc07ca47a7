# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the HodgeCover reference implementation's authors
"""HodgeCover (arXiv 2605.13997): compress a sparse Mixture-of-Experts checkpoint without training.

    python hodgecover.py examples/tiny-olmoe --keep 32

The file is the paper, top to bottom: 1 what is measured, 2 barriers, 3 complex, 4 decompose, 5 select, 6 redirect, 7
diagnose; then a whole model, the record and the command line. Sections and equations are the paper's; "ours" marks what
it leaves open or what we do otherwise. `mathx.py` has the fast form of the barriers and the audit, `model_io.py` the
checkpoints and the calibration text.

    n experts of a layer, in the checkpoint's own numbers, from 0; k survivors; f_e(x) the output of expert e
    K = (V, E, T) the complex; E*, T* the critical simplices. A token is routed to `top_k` experts
    In shapes alone: T tokens, d hidden size, f an expert's, V vocabulary, E edges, F triangles, M simplices

Elsewhere: the loss that all this is for (equation 1) is measured by examples/evaluate.py; the hybrid with Wanda (4.2,
B.4) is wanda.py, the allocators (B.3) are in budgets.py, the ablations (E.1, B.7) in baselines.py. Equations 14 to 18
and 22 to 29, the proofs' own, have tests in tests/test_paper.py.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during this import prints no traceback

import torch

if __package__:
    from . import mathx, model_io
    from .model_io import Experts, InputError, Model, calibration_ids, check_range, require, warn
else:
    import mathx
    import model_io
    from model_io import Experts, InputError, Model, calibration_ids, check_range, require, warn

__version__ = "0.4.0"

MEMORY = 10**9  # bytes of buffers of the sweep, beside the layer's weights and the head
GUARD = 1e-12  # epsilon of A.10; epsilon_0 of B.1, equal but unrelated
Tick = Callable[[float], None]  # told the share of the work that is done


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every number of the method, an option each; CHOICES says what each is. Raises InputError for a value of another
    type or out of range."""
    max_triangles: int = 500
    thresholds: int = 80
    order: str = "index"
    margin: float = 0.2
    edge_percent: float = 20.0
    triangle_percent: float = 20.0
    lambda_edge: float = 1.0
    lambda_triangle: float = 0.5
    alpha: float = 3.0
    seed: int = 42
    vocab_sample: int = 512

    def __post_init__(self) -> None:
        require(isinstance(self.order, str) and re.fullmatch(ORDERS, self.order),
                f"order {self.order}: must be index, saliency or random:SEED")
        for name, (_, low, high) in CHOICES.items():
            value, whole = getattr(self, name), isinstance(getattr(Settings, name), int)
            if name != "order":
                check_range(name, value, low, high)
                require(not whole or isinstance(value, int), f"{name} {value}: must be a whole number")
        require(self.vocab_sample != 1, "vocab_sample 1: must be 0 or 2 and more; of one outcome KL is 0")


ORDERS = r"index|saliency|random:\d{1,18}"
CHOICES = {  # setting: help, smallest and largest value
    "max_triangles": ("candidate triangles at most (A.9)", 0, math.inf),
    "thresholds": ("thresholds of the filtration, from 0 to 1.1 max b (A.9)", 2, math.inf),
    "order": ("total order, which orients the edges (3.2); ours: index, saliency, random:SEED", 0, 0),
    "margin": ("by what share a discordant triplet exceeds its worst edge (3.4)", 0, math.inf),
    "edge_percent": ("p: percent of the edges in E*, the harmonic-critical ones (C.1)", 0, 100),
    "triangle_percent": ("q_T: percent of T in T*, the triplet-critical ones (C.1)", 0, 100),
    "lambda_edge": ("weight of the cover of E* (equation 10, C.1)", 0, math.inf),
    "lambda_triangle": ("weight of the cover of T* (equation 10, C.1)", 0, math.inf),
    "alpha": ("harmonic penalty of the redirect (equation 13, C.1)", 0, math.inf),
    "seed": ("seed of the samples of text (A.11), triangles (A.9), next tokens", 0, 2**63 - 1),
    "vocab_sample": ("ours: next tokens sampled for a KL, audited; 0: all", 0, math.inf),
}
MEASURED = {"max_triangles", "seed", "vocab_sample"}  # what the barriers depend on


# ------------------------------------------------------------- 1 what is measured (4.1, A.10; the text: A.11, model_io)

class MoELayer(NamedTuple):
    """One layer on the calibration tokens: all that its barriers depend on. All but the experts have one dtype."""
    experts: Experts  # gate (n, f, d), up (n, f, d), down (n, d, f); experts(e, x) is f_e(x)
    x: torch.Tensor  # input of the MoE block (T, d)
    gates: torch.Tensor  # gate weights as the model applies them (T, n), > 0 on the top-k, else 0
    y: torch.Tensor  # residual stream after the layer (T, d)
    norm: model_io.RMSNorm  # the norm before the head: its weight (d,) and eps
    unembedding: torch.Tensor  # the head W_U (V, d)


def reap_saliency(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """REAP output saliency (4.1; arXiv 2510.13999): the mean over the tokens routed to e of g_e |f_e(x)|, normalised to
    [0, 1] by the layer's maximum (ours). x (T, d), gates (T, n) -> (n,) float64."""
    saliency = torch.zeros(gates.shape[1], dtype=torch.float64)
    for e in range(len(saliency)):
        t = gates[:, e].nonzero().squeeze(1)
        if len(t):
            norms = experts(e, x[t]).double().norm(dim=1)
            saliency[e] = (gates[t, e].double() * norms).mean()
    if saliency.any():
        saliency /= saliency.max()
    return saliency


# --------------------------------------------------------------------------- 2 barriers (section 3.1, equations 2, 30)

def merge_weights(simplices: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Weights of the experts in a merge: each one's share of the simplex's routing rate, equal shares if that is below
    1e-12 (equation 30). simplices (M, 2 or 3), rates (n,), shares or counts of tokens -> (M, 2 or 3) float64, rows that
    sum to 1."""
    rate = rates.double()[simplices]
    total = rate.sum(1, keepdim=True)
    return torch.where(total < GUARD, 1 / rate.shape[1], rate / total.clamp(min=GUARD))


def plain_barrier(layer: MoELayer, simplex: list[int]) -> torch.Tensor:
    """The barrier of a simplex S, a scalar in nats (equation 2): replace its experts by their frequency-weighted mean,
    run the layer, compare the next-token distributions. The definition, slow; `mathx.sweep` is tested against it.

        b_S = mean_t KL( p_t || p_S,t ),   p = softmax(W_U norm(y))
        f_S(x) = sum_S w_e f_e(x)                                          (equation 30)
        y_S = y + (sum_S g_e) f_S(x) - sum_S g_e f_e(x)

    Ours: the layer's distribution is read by the logit lens, no later layer runs; the merged expert has the sum of its
    members' gate weights. An expert that no token is routed to costs nothing to merge with any other.
    """
    wide = mathx.widened(layer.x.dtype)  # bfloat16 would round a small change of y away
    rates = (layer.gates > 0).double().mean(0).cpu()  # r_e (A.10)
    weights = merge_weights(torch.tensor([simplex]), rates)[0].to(layer.x.device, wide)
    gates = layer.gates[:, simplex].to(wide)  # (T, 2 or 3)
    merged = torch.zeros_like(layer.y, dtype=wide)  # f_S(x)
    before = torch.zeros_like(layer.y, dtype=wide)  # sum_S g_e f_e(x)
    for e, weight, gate in zip(simplex, weights, gates.T):
        output = layer.experts(e, layer.x).to(wide)
        merged += weight * output
        before += gate[:, None] * output
    y = layer.y.to(wide)
    y_merged = y + gates.sum(1, keepdim=True) * merged - before

    def log_distribution(y: torch.Tensor) -> torch.Tensor:
        logits = layer.norm(y) @ layer.unembedding.to(wide).T
        return logits.double().log_softmax(-1)
    log_p, log_q = log_distribution(y), log_distribution(y_merged)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


class Signals(NamedTuple):
    """What is measured on a layer: with k and the settings outside MEASURED, all that its plan needs."""
    frequency: torch.Tensor  # tokens routed to each expert (n,)
    saliency: torch.Tensor  # REAP saliency (n,)
    barriers: torch.Tensor  # of the pairs `edges(n)` (E,), nats
    candidates: torch.Tensor  # candidate triangles, rows ascending (F, 3)
    triplets: torch.Tensor  # their barriers (F,), nats
    audit: torch.Tensor = torch.empty(0, 2, dtype=torch.float64)  # sampled KL, exact KL of R merges


@torch.no_grad()
def measure_layer(layer: MoELayer, settings: Settings = Settings(), memory: int = MEMORY,
                  tick: Tick = lambda share: None) -> Signals:
    """Saliency, and the barriers (equation 2) of all pairs and of the candidate triangles. Ours: each KL is over
    `vocab_sample` sampled next tokens; 0 computes it over the whole vocabulary, as the paper does. `memory` is bytes of
    the sweep's buffers. Raises InputError for a result that is not finite."""
    frequency = (layer.gates > 0).sum(0).cpu()
    saliency = reap_saliency(layer.experts, layer.x, layer.gates)
    sample = mathx.sample_vocabulary(layer, settings.vocab_sample, settings.seed, memory)
    tables = {}  # what the sweep of the pairs reads serves that of the triangles

    def barriers_of(simplices: torch.Tensor, tick: Tick) -> torch.Tensor:
        weights = merge_weights(simplices, frequency)
        return mathx.sweep(layer, simplices, weights, sample, memory, tick, tables)
    pairs = edges(len(frequency))
    barriers = barriers_of(pairs, lambda done: tick(0.9 * done))
    candidates = candidate_triangles(barriers, saliency, settings.max_triangles, settings.seed)
    triplets = barriers_of(candidates, lambda done: tick(0.9 + 0.1 * done))
    del tables

    measured = torch.cat((saliency, barriers, triplets))
    require(measured.isfinite().all(), "a layer's saliencies or barriers are not finite: NaN or "
            f"infinity in the weights of an expert, or an overflow of {layer.x.dtype}")
    audits = [torch.empty(0, 2, dtype=torch.float64)]
    for simplices in (pairs, candidates) if sample else ():
        weights = merge_weights(simplices, frequency)
        audits.append(mathx.audit_sample(layer, simplices, weights, sample, settings.seed, memory))
    return Signals(frequency, saliency, barriers, candidates, triplets, torch.cat(audits))


# --------------------------------------------------------------------------------------- 3 complex (section 3.2, A.9)

def edges(n: int) -> torch.Tensor:
    """All edges (i, j), i < j, of the complete graph on n vertices, (E, 2), lexicographic."""
    return torch.triu_indices(n, n, offset=1).T.contiguous()


def table_of_pairs(values: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix (n, n) of values (E,) of all edges of n vertices; 0 on its diagonal."""
    n = (1 + math.isqrt(1 + 8 * len(values))) // 2  # from E = n (n - 1) / 2
    i, j = edges(n).T
    table = values.new_zeros(n, n)
    table[i, j] = table[j, i] = values
    return table


def faces(n: int, triangles: torch.Tensor) -> torch.Tensor:
    """Positions among `edges(n)` of the faces (i, j), (h, j), (h, i) of each triangle (h, i, j), which the paper calls
    (i, j, k): (F, 3) -> (F, 3).

    >>> faces(4, torch.tensor([[0, 1, 2], [1, 2, 3]])).tolist()  # of 01, 02, 03, 12, 13, 23
    [[3, 1, 0], [5, 4, 3]]
    """
    number = table_of_pairs(torch.arange(n * (n - 1) // 2))
    h, i, j = triangles.T
    return torch.stack((number[i, j], number[h, j], number[h, i]), dim=1)


def boundary_matrices(n: int, triangles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundary operators of the complete graph on n vertices with triangles (F, 3), rows ascending (equations 3, 4).

    d1 : (n, E), column (i, j) is +1 at vertex j, -1 at vertex i
    d2 : (E, F), column (h, i, j) is +1 at edge (i, j), -1 at edge (h, j), +1 at edge (h, i)

    >>> d1, d2 = boundary_matrices(3, torch.tensor([[0, 1, 2]]))
    >>> d2.T.tolist(), (d1 @ d2).abs().max().item()
    ([[1.0, -1.0, 1.0]], 0.0)
    """
    i, j = edges(n).T
    edge, triangle = torch.arange(len(i)), torch.arange(len(triangles))
    d1 = torch.zeros(n, len(i), dtype=torch.float64)
    d1[j, edge], d1[i, edge] = 1.0, -1.0
    ij, hj, hi = faces(n, triangles).T
    d2 = torch.zeros(len(i), len(triangles), dtype=torch.float64)
    d2[ij, triangle], d2[hj, triangle], d2[hi, triangle] = 1.0, -1.0, 1.0
    return d1, d2


def cliques(n: int, pairs: torch.Tensor) -> torch.Tensor:
    """All triangles (F, 3) of the graph on n vertices with edges (M, 2), both ascending and lexicographic."""
    adjacent = torch.zeros(n, n, dtype=torch.bool)
    i, j = pairs.T
    adjacent[i, j] = True  # only from lower to higher: each clique is found once
    both = adjacent[i] & adjacent[j]
    edge, third = both.nonzero().T
    return torch.cat((pairs[edge], third[:, None]), dim=1)


def candidate_triangles(barriers: torch.Tensor, saliency: torch.Tensor, limit: int, seed: int
                        ) -> torch.Tensor:
    """Stage A of the curation (A.9): 3-cliques of the graph of edges with barrier <= median, (F, 3); of more than
    `limit` a uniform sample. Ours: it is drawn from the list sorted by the experts' saliencies, so that renumbering the
    experts changes it only where saliencies tie."""
    n = len(saliency)
    triangles = cliques(n, edges(n)[barriers <= barriers.median()])  # the lower of two middle values
    if len(triangles) <= limit:
        return triangles
    rank = saliency.sort(stable=True).indices.argsort()
    first, second, third = rank[triangles].sort(1).values.T
    by_saliency = ((first * n + second) * n + third).argsort()
    drawn = torch.randperm(len(triangles), generator=torch.Generator().manual_seed(seed))
    drawn = by_saliency[drawn[:limit]]
    return triangles[drawn.sort().values]


def betti_1(d1: torch.Tensor, d2: torch.Tensor) -> int:
    """First Betti number, E - rank d1 - rank d2 = E - n + components - rank d2 (equations 16, 17)."""
    return d1.shape[1] - rank_of(d1 @ d1.T) - rank_of(d2.T @ d2)


def rank_of(gram: torch.Tensor) -> int:
    """Rank of a Gram matrix, which is that of its factors."""
    return int(torch.linalg.matrix_rank(gram, hermitian=True))


def entry_thresholds(barriers: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor) -> torch.Tensor:
    """The smallest tau at which K_tau has each triangle (F, 3) and its three edges (stage B of A.9), (F,)."""
    n = len(table_of_pairs(barriers))
    return torch.maximum(triplets, barriers[faces(n, triangles)].amax(1))


def betti_curve(barriers: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor,
                taus: torch.Tensor) -> torch.Tensor:
    """beta_1 of K_tau at each threshold tau (stage B of A.9), int64 of the shape of `taus`. K_tau has the edges with
    barrier (E,) <= tau, and the triangles (F, 3) with barrier (F,) <= tau whose three edges are in."""
    n = len(table_of_pairs(barriers))
    enters = entry_thresholds(barriers, triangles, triplets)
    entering = triangles[enters.argsort()]
    used, row = faces(n, entering).unique(return_inverse=True)  # rows of d2 that are not 0: others add nothing
    d2 = torch.zeros(len(used), len(triangles), dtype=torch.float64)
    d2[row.T, torch.arange(len(triangles))] = d2.new_tensor([[1], [-1], [1]])  # as in boundary_matrices
    gram = d2.T @ d2
    curve, ranks = [], {0: 0}  # the complexes are nested: rank d2 depends on the number of triangles alone
    for tau in taus:
        inside = barriers <= tau
        adjacent = table_of_pairs(inside.double())
        laplacian = adjacent.sum(0).diag() - adjacent  # d1 d1'
        count = int((enters <= tau).sum())
        if count not in ranks:
            ranks[count] = rank_of(gram[:count, :count])
        curve.append(int(inside.sum()) - rank_of(laplacian) - ranks[count])
    return torch.tensor(curve)


def edge_signs(order: str, saliency: torch.Tensor) -> torch.Tensor:
    """Orientation (3.2) of each edge (i, j), i < j, a sign (E,): +1 if expert i comes first in the total order, -1 if j
    does. The paper takes any total order. Ours: `index`, where all signs are +1; `saliency`, least salient first;
    `random:SEED`. It matters: barriers have no sign, so another order gives other Hodge parts and critical edges."""
    n = len(saliency)
    place = torch.arange(n)
    if order == "saliency":
        place = saliency.sort(stable=True).indices.argsort()
    elif order != "index":
        generator = torch.Generator().manual_seed(int(order.removeprefix("random:")))
        place = torch.randperm(n, generator=generator).argsort()
    first, second = place[edges(n)].T
    return (second - first).sign().double()


# --------------------------------------------------------------------------------- 4 decompose (section 3.3, theorem 1)

class HodgeParts(NamedTuple):
    """The three parts of an edge signal, (E,) each: mutually orthogonal, and they sum to the signal."""
    gradient: torch.Tensor
    curl: torch.Tensor
    harmonic: torch.Tensor

    def shares(self) -> dict[str, float]:
        """rho, the shares of the signal's energy |b|^2 (equation 8, A.12); ours: all 0 if b = 0."""
        energies = torch.stack(self).square().sum(1)
        energy = sum(self).square().sum()  # |b|^2
        if energy == 0:
            energies, energy = torch.zeros(3), 1.0
        return dict(zip(self._fields, (energies / energy).tolist()))


def hodge_decompose(b: torch.Tensor, d1: torch.Tensor, d2: torch.Tensor) -> HodgeParts:
    """Hodge decomposition of an edge signal b (E,) float64 (equations 6 and 19 to 21).

        gradient = d1' (d1 d1')^+ d1 b,   curl = d2 (d2' d2)^+ d2' b,   harmonic = b - gradient - curl

    The harmonic part is in the kernel of the Laplacian L1 = d1' d1 + d2 d2' (equation 5), which is never formed. No
    vertex potential plus triangle boundary explains it (proposition 1, equation 7).

    >>> d1, d2 = boundary_matrices(3, torch.empty(0, 3, dtype=torch.int64))  # an unfilled 3-cycle
    >>> hodge_decompose(torch.tensor([1.0, -1.0, 1.0]).double(), d1, d2).harmonic.tolist()
    [1.0, -1.0, 1.0]
    """
    phi = torch.linalg.pinv(d1 @ d1.T, hermitian=True) @ (d1 @ b)  # vertex potential (n,)
    psi = torch.linalg.pinv(d2.T @ d2, hermitian=True) @ (d2.T @ b)  # triangle potential (F,)
    gradient, curl = d1.T @ phi, d2 @ psi
    return HodgeParts(gradient, curl, b - gradient - curl)


class Complex(NamedTuple):
    """The mergeability complex of a layer and the Hodge parts of its barriers."""
    triangles: torch.Tensor  # T, the candidates in K_tau* (F, 3)
    triplets: torch.Tensor  # their barriers (F,)
    tau: float  # tau*
    betti_curve: torch.Tensor  # beta_1 of K_tau at each threshold
    d1: torch.Tensor  # boundary operators of the complex (n, E)
    d2: torch.Tensor  # and (E, F)
    signs: torch.Tensor  # orientation of each edge (E,)
    parts: HodgeParts  # of signs * barriers


def decompose(signals: Signals, settings: Settings = Settings()) -> Complex:
    """Build the complex K = (V, E, T), and decompose the barriers on it (algorithm 1, lines 1 to 4). E is complete
    (A.8). T are the candidates in K_tau*: tau* = argmax beta_1(K_tau), ties to the most edges (stage B of A.9)."""
    n, b, candidates = len(signals.saliency), signals.barriers, signals.candidates
    taus = torch.linspace(0, 1.1 * b.max().item(), settings.thresholds, dtype=torch.float64)
    curve = betti_curve(b, candidates, signals.triplets, taus)
    tau = taus[curve == curve.max()].max()  # of equal beta_1 the last has the most edges
    inside = entry_thresholds(b, candidates, signals.triplets) <= tau
    d1, d2 = boundary_matrices(n, candidates[inside])
    signs = edge_signs(settings.order, signals.saliency)
    parts = hodge_decompose(signs * b, d1, d2)
    triangles, triplets = candidates[inside], signals.triplets[inside]
    return Complex(triangles, triplets, tau.item(), curve, d1, d2, signs, parts)


# ---------------------------------------------------------------------- 5 select, 6 redirect (section 4.1, algorithm 1)

def critical(values: torch.Tensor, percent: float, floor: float = 0.0) -> torch.Tensor:
    """Positions, ascending, of the top `percent` % of values (M,). Ours: their number is rounded up, ties go to the
    first. Values <= `floor` are left out: a harmonic part that vanishes has no critical edges (B.1)."""
    count = math.ceil(len(values) * percent / 100 - 1e-9)
    top = values.sort(descending=True, stable=True).indices[:count]
    return top[values[top] > floor].sort().values


def greedy_cover(saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]], keep: int,
                 protected: Sequence[int] = ()) -> list[int]:
    """Greedy cover (algorithm 1, lines 8 to 17): to the protected experts, none in the paper's runs, add the vertex of
    largest marginal gain Phi(S + v) - Phi(S) (equation 11) until there are `keep`. Ours: ties go to the lowest.

    Phi(S) = sum_S saliency + sum over the families of weight |simplices that meet S| / |simplices| (equation 10), 0 for
    an empty family; saliency (n,), simplices (M, 2 or 3). Without protected experts it reaches at least
    1 - (1 - 1/k)^k of the largest Phi(S) with |S| = k (proposition 2, equations 12, 31), and the picks for a smaller k
    are a prefix.

    >>> cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    >>> greedy_cover(torch.zeros(4), [(cycle, 1.0)], 2)  # each is on 2 edges, but {0, 1} covers 3 of 4
    [0, 2]
    """
    picks = list(dict.fromkeys(protected))
    while len(picks) < keep:
        gain = saliency.double().clone()
        for simplices, weight in families:
            left = simplices[~torch.isin(simplices, torch.tensor(picks)).any(1)]
            gain += weight * left.flatten().bincount(minlength=len(gain)) / max(len(simplices), 1)
        gain[picks] = -math.inf
        picks.append(int(gain.argmax()))
    return picks


class Selection(NamedTuple):
    """All experts as picked, of which the first k survive, and the critical simplices that the picks cover."""
    order: list[int]
    edges: torch.Tensor  # E* (M, 2)
    triangles: torch.Tensor  # T* (M, 3)


def select(signals: Signals, complex_: Complex, settings: Settings = Settings(),
           signal: torch.Tensor | None = None) -> Selection:
    """Cover the harmonic-critical edges E* and the triplet-critical triangles T* greedily (algorithm 1, lines 6 to 18).
    Edges are critical where |signal| (E,) is largest, by default that of the harmonic part."""
    n, floor = len(signals.saliency), GUARD * signals.barriers.norm().item()
    if signal is None:
        signal = complex_.parts.harmonic
    pairs = edges(n)[critical(signal.abs(), settings.edge_percent, floor)]
    triangles = complex_.triangles[critical(complex_.triplets, settings.triangle_percent, floor)]
    families = [(pairs, settings.lambda_edge), (triangles, settings.lambda_triangle)]
    return Selection(greedy_cover(signals.saliency, families, n), pairs, triangles)


def redirect(survivors: list[int], barriers: torch.Tensor, harmonic: torch.Tensor, alpha: float
             ) -> dict[int, int]:
    """Where a dropped expert e goes: argmin over survivors j of b_ej (1 + alpha |b_harm,ej| / |b|) (equation 13;
    algorithm 1, lines 19 to 21). Ours: ties go to the lowest. |b| is over all edges: with 64 experts the factor is at
    most some 1.1, far from C.4's 4.

    The text both folds e's router logit into one survivor and keeps the survivors' gate vectors bit-exact (4.1). Ours:
    the rows of dropped experts leave the router, its gates renormalise over the survivors, the redirect is recorded."""
    norm = barriers.norm().clamp(min=GUARD)
    cost = table_of_pairs(barriers * (1 + alpha * harmonic.abs() / norm))
    kept = sorted(survivors)
    dropped = [e for e in range(len(cost)) if e not in kept]
    return {e: kept[int(cost[e, kept].argmin())] for e in dropped}


# ------------------------------------------------ 7 diagnose: the plan of a layer, its report (sections 3.4, A.12, E.3)

class Diagnostics(NamedTuple):
    """What a layer's record says beside its plan. What has no section of the paper is ours."""
    eta: dict[str, float]  # the paper's rho: shares of |b|^2 of the Hodge parts (equation 8, A.12)
    eta_constant: dict[str, float]  # the same if all barriers were equal: what the orientation gives
    additive: dict[str, float]  # shares of energy and variance that b_ij = phi_i + phi_j explains
    betti_1: int  # of the complex (equation 17)
    betti_curve: torch.Tensor  # of K_tau at each threshold (A.9)
    tau: float  # tau* (A.9), nats
    triangles: int  # in T
    candidates: int  # sampled triangles (stage A of A.9)
    discordance: float  # equation 9, over the candidates (ours; in the paper T are all of them)
    critical_edges: torch.Tensor  # E* (M, 2)
    critical_triangles: torch.Tensor  # T* (M, 3)
    covered_at: dict[str, int]  # after how many picks all of E*, all of T* are covered
    retained: dict[str, float]  # mass of the Hodge parts and of the triplet barriers (equation 34)
    redirect_targets: int  # survivors that some dropped expert is redirected to
    redirect_largest: int  # experts that the busiest of them takes
    mean_barrier: float  # of the pairs, nats
    audit: dict[str, float] | None  # of the sample of the vocabulary: `mathx.shortfall`


class Plan(NamedTuple):
    """What stays of a layer, and why. Its record has these fields."""
    survivors: list[int]  # ascending
    order: list[int]  # all experts as picked: the first k survive
    redirect: dict[int, int]  # dropped expert -> survivor
    routed_share: float  # of the tokens' choices that fall on survivors
    frequency: torch.Tensor  # tokens routed to each expert (n,)
    saliency: torch.Tensor  # (n,)
    diagnostics: Diagnostics | None


def plan_from_signals(signals: Signals, keep: int, settings: Settings = Settings(),
                      selector: Callable[..., Selection] = select) -> Plan:
    """Algorithm 1: decompose, select, redirect; and diagnose. `selector` may select otherwise than `select`. Raises
    InputError if `keep` is not from 1 to n, and for fewer than two experts."""
    n = len(signals.saliency)
    require(1 <= keep <= n and n >= 2,
            f"keep {keep}: must be from 1 to the layer's {n} experts, of which there must be two")
    complex_ = decompose(signals, settings)
    selection = selector(signals, complex_, settings)
    order, harmonic = selection.order, complex_.parts.harmonic
    targets = redirect(order[:keep], signals.barriers, harmonic, settings.alpha)
    plan = plan_of(order, targets, keep, signals.frequency, signals.saliency)
    return plan._replace(diagnostics=diagnose(signals, complex_, selection, plan, settings))


def plan_of(order: list[int], targets: dict[int, int], keep: int, frequency: torch.Tensor,
            saliency: torch.Tensor) -> Plan:
    """The plan that keeps the first `keep` experts of an order, with the targets of the others; no diagnostics."""
    survivors = sorted(order[:keep])
    share = frequency[survivors].sum() / frequency.sum().clamp(min=1)
    return Plan(survivors, order, targets, share.item(), frequency, saliency, None)


def diagnose(signals: Signals, complex_: Complex, selection: Selection, plan: Plan,
             settings: Settings) -> Diagnostics:
    """What the record says beside a plan: see `Diagnostics`."""
    n, b = len(signals.saliency), signals.barriers
    worst = b[faces(n, signals.candidates)].amax(1)  # of the edges of each candidate
    discordant = signals.triplets > (1 + settings.margin) * worst
    constant = hodge_decompose(complex_.signs, complex_.d1, complex_.d2)
    covered_at = {"edges": mathx.covered_at(selection.order, selection.edges),
                  "triangles": mathx.covered_at(selection.order, selection.triangles)}
    retained = {}
    for name, part in complex_.parts._asdict().items():
        retained[name] = retained_mass(part, edges(n), plan.survivors)
    retained["triplet"] = retained_mass(complex_.triplets, complex_.triangles, plan.survivors)
    targets = list(plan.redirect.values())
    loads = [targets.count(survivor) for survivor in set(targets)]
    audit = None
    if len(signals.audit):
        sampled, exact = signals.audit.T
        audit = mathx.shortfall(sampled, exact)
    return Diagnostics(
        eta=complex_.parts.shares(), eta_constant=constant.shares(),
        additive=mathx.additive_shares(b, complex_.d1),
        betti_1=betti_1(complex_.d1, complex_.d2), betti_curve=complex_.betti_curve,
        tau=complex_.tau, triangles=len(complex_.triangles), candidates=len(signals.candidates),
        discordance=discordant.double().mean().nan_to_num().item(),
        critical_edges=selection.edges, critical_triangles=selection.triangles,
        covered_at=covered_at, retained=retained,
        redirect_targets=len(loads), redirect_largest=max(loads, default=0),
        mean_barrier=b.mean().item(), audit=audit)


def retained_mass(signal: torch.Tensor, simplices: torch.Tensor, survivors: list[int]) -> float:
    """Retained mass (equation 34): share of the l1 mass of a signal (M,) on the simplices (M, 2 or 3) that meet the
    survivors; ours: 0 if it has none.

    >>> retained_mass(torch.tensor([1.0, -3.0]), torch.tensor([[0, 1], [1, 2]]), [0])
    0.25
    """
    mass, meets = signal.abs(), torch.isin(simplices, torch.tensor(survivors)).any(1)
    total = mass.sum().item()
    return mass[meets].sum().item() / total if total > 0 else 0.0


def plan_layer(layer: MoELayer, keep: int, settings: Settings = Settings()) -> Plan:
    """Plan one MoE layer from tensors in memory: measure it, and do what `plan_from_signals` does."""
    return plan_from_signals(measure_layer(layer, settings), keep, settings)


# ------------------------------------------------------------------------------------------------- the whole model

def sparse_layers(model: Model) -> list[int]:
    """Indices of the layers that have experts. Raises InputError if there is none, or no two experts."""
    sparse = [i for i, config in enumerate(model.layer_configs) if config.sparse]
    require(sparse and model.config.num_experts >= 2,
            f"{model.checkpoint.path}: no layer has a router over two experts or more; it is dense")
    return sparse


def check_keep(model: Model, keep: int) -> None:
    """Raise InputError for a dense model, and if not every layer can keep `keep` experts. Ours: as many as a token is
    routed to, at least; equation 32 allows one."""
    k = model.config.top_k
    n = min(model.layer_configs[index].num_experts for index in sparse_layers(model))
    require(k <= keep <= n, f"keep {keep}: must be from {k} to {n}: the model has {n} experts in its "
            f"smallest layer, and routes a token to {k}")


def cache_key(model: Model, ids: torch.Tensor, settings: Settings) -> dict[str, str]:
    """All that a layer's signals depend on: content alone, so that copies of a checkpoint share a cache."""
    key = {name: str(getattr(settings, name)) for name in sorted(MEASURED)}
    key |= {"format": "5", "weights": model.checkpoint.fingerprint(), "dtype": str(model.dtype)}
    return key | {"text": f"{[*ids.shape]} {model_io.text_hash(ids)}"}


def measure_model(model: Model, ids: torch.Tensor, settings: Settings, layers: Sequence[int],
                  cache: Path | None = None, memory: int = MEMORY,
                  tick: Tick = lambda share: None) -> Iterator[tuple[int, Signals]]:
    """Signals of layers (ascending indices), from the cache or from one forward pass over ids (B, L), which stops at
    the last one that needs it. What is measured goes into the cache at once."""
    key = {}
    if cache:
        model_io.make_cache(Path(cache))
        key = cache_key(model, ids, settings)
        model_io.warn_of_old_cache(Path(cache), key["format"])
    stream, head = model.stream(ids), None
    for number, index in enumerate(layers):
        name, tensors = model.layer_names[index], None
        if cache:
            tensors = model_io.read_cached(Path(cache), name, key)
        if not tensors:
            if head is None:
                head = model.unembedding()
            step = next(step for step in stream if step.index == index)
            layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, step.norm, head)
            signals = measure_layer(layer, settings, memory,
                                    lambda done: tick((number + done) / len(layers)))
            tensors = signals._asdict()
            del step, layer  # before the next layer is read
            if cache:
                model_io.write_cached(Path(cache), name, key, tensors)
        yield index, Signals(**tensors)


def plan_model(model: Model, ids: torch.Tensor, keep: int, settings: Settings = Settings(),
               cache: Path | None = None, memory: int = MEMORY,
               tick: Tick = lambda share: None) -> Iterator[tuple[str, Plan]]:
    """(name, plan) of each sparse layer, from calibration on ids (B, L): a dict of them is what `export` takes. Raises
    InputError as its parts do, when the first one is asked for."""
    check_keep(model, keep)
    layers = sparse_layers(model)
    for index, signals in measure_model(model, ids, settings, layers, cache, memory, tick):
        yield model.layer_names[index], plan_from_signals(signals, keep, settings)


# ------------------------------------------------------------------------------------------ the record and the export

def plan_entry(model: Model, plans: dict[str, Plan], keep: int, settings: Settings,
               ids: torch.Tensor | None, files: Sequence[Path] = (), command: str = "hodgecover.py",
               **more: object) -> dict:
    """The entry of a record's history that holds plans by layer name; `files` name the text, as in
    `model_io.record_entry`."""
    choices = {"keep": keep, **more} | dataclasses.asdict(settings)
    choices["dtype"] = str(model.dtype).removeprefix("torch.")
    layers = []
    for name, plan in plans.items():
        fields = plan._asdict()
        if plan.diagnostics:
            fields["diagnostics"] = plan.diagnostics._asdict()
        layers.append({"layer": model.layer_names.index(name), "name": name} | fields)
    return model_io.record_entry(command, choices, ids, files, source=model) | {"layers": layers}


def export(model: Model, plans: dict[str, Plan], out: Path, entry: dict) -> None:
    """Write the checkpoint that keeps the survivors of all sparse layers' plans, by name, and its record, to `out`."""
    survivors = {name: plan.survivors for name, plan in plans.items()}
    record = {model_io.RECORD: model_io.record_bytes(model.checkpoint, entry)}
    model_io.write_checkpoint(model.checkpoint, Path(out), survivors, record)


# ------------------------------------------------------------------------------------------------ the command line

LAYER_HEAD = ("layer  eta_harmonic (constant signal's)  picks until E*, T* are covered  kept       "
              "routed to survivors")
AUDIT_LINE = ("       barriers by sample: {error:+.2%} +- {standard_error:.2%} from exact ones, one by "
              "{largest:.1%}, rank correlation {rank_correlation:.4f}")


def show_plans(model: Model, plans: Iterator[tuple[str, Plan]], bar: Callable) -> dict[str, Plan]:
    """Print a line for each layer as its plan is made, and one on its sample; return the plans by layer name."""
    shown = {}
    for name, plan in plans:
        bar(None)
        if not shown:
            print(LAYER_HEAD)
        shown[name] = plan
        report, index = plan.diagnostics, model.layer_names.index(name)
        eta = f"{report.eta['harmonic']:.3f} ({report.eta_constant['harmonic']:.3f})"
        covered = f"{report.covered_at['edges']}, {report.covered_at['triangles']}"
        kept = f"{len(plan.survivors)} of {len(plan.order)}"
        print(f"{index:5d}  {eta:<34}  {covered:<31}  {kept:<9}  {plan.routed_share:.1%}", flush=True)
        if report.audit:
            error = -report.audit["shortfall"]
            print(AUDIT_LINE.format(error=error, **report.audit), flush=True)
    return shown


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of printing its usage, so that every error takes the same path."""
    def error(self, message: str):
        if "--readout" in message:  # of version 0.3
            message = "barriers are at the layer; examples/audit.py --end-to-end has those at the model's end"
        raise InputError(f"{message} (--help lists the options)")


def add_common_options(parser: argparse._ActionsContainer, tokens: int = model_io.TOKENS,
                       use: str = "calibration", memory: bool = True) -> None:
    """Options of every command: text for a `use`, if it reads any `tokens`; --memory, if any buffers; dtype, device."""
    add = parser.add_argument
    if tokens:
        add("--calib", metavar="FILE", type=Path, nargs="+", default=[],
            help=f"{use} text: UTF-8, or .jsonl with text or chat messages on each line; as much of "
            "each file [Python's own docs]")
        add("--tokens", metavar="T", type=int, default=tokens, help=f"{use} tokens [%(default)s]")
        add("--seq-len", metavar="L", type=int,
            help="of a sequence [the model's max_position_embeddings, at most T]")
    if memory:
        add("--memory", metavar="SIZE", type=byte_count, default=MEMORY, help="of the buffers [1GB]")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
        help="of the products; auto: bfloat16 if the processor multiplies it, else float32")
    add("--device", default="cpu", help="any device of torch; only cpu is tested [cpu]")


def add_settings(parser: argparse._ActionsContainer, *names: str) -> None:
    """An option for each of Settings, or for those of these names."""
    for field in dataclasses.fields(Settings):
        name, default = field.name, field.default
        if not names or name in names:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), metavar="X",
                                default=default, help=f"{CHOICES[name][0]} [%(default)s]")


def byte_count(text: str) -> int:
    """1GB, 500MB or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(|MB|GB)", text)
    size = int(float(match[1]) * {"": 1, "MB": 10**6, "GB": 10**9}[match[2]]) if match else 0
    if size < 10**7:
        raise argparse.ArgumentTypeError(f"{text}: must be 10MB or more, such as 1GB or 500MB")
    return size


def layer_range(text: str) -> range:
    """3, or 0-7."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: must be a layer or a range of layers such as 0-7")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def command_line() -> Parser:
    """The parser of this command."""
    parser = Parser(prog="hodgecover.py", description="Compress a sparse MoE checkpoint without training.")
    parser.add_argument("--version", action="version", version=f"hodgecover {__version__}")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path,
                        help="folder of config, weights and tokenizer.json")
    basic = parser.add_argument_group("what people need [defaults]")
    what = basic.add_mutually_exclusive_group(required=True)
    what.add_argument("--keep", metavar="K", type=int, help="experts to keep in every layer")
    what.add_argument("--layers", metavar="A-B", type=layer_range,
                      help="only measure these layers, into the cache")
    basic.add_argument("--out", metavar="DIR", type=Path,
                       help="output folder, or file of --plan-only [CKPT-keepK]")
    basic.add_argument("--plan-only", action="store_true", help="write the plan alone, as a file")
    add_common_options(basic)
    basic.add_argument("--cache", metavar="DIR", type=Path,
                       help="folder of the layers' barriers [CKPT-barriers]")
    add_settings(parser.add_argument_group("the method's choices, by the paper's sections [defaults]"))
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    settings = Settings(**{name: getattr(args, name) for name in CHOICES})
    model = Model(args.checkpoint, model_io.choose_dtype(args.dtype, args.device), args.device)
    cache = args.cache or model_io.beside(args.checkpoint, "-barriers")
    model_io.refuse_inside(model, cache, "cache")
    if args.layers is not None:
        measure_only(model, args, settings, cache)
        return
    check_keep(model, args.keep)
    suffix = ".json" if args.plan_only else ""
    out = args.out or model_io.beside(args.checkpoint, f"-keep{args.keep}{suffix}")
    model_io.check_out(model, out, cache, args.plan_only)
    ids = calibration_ids(model, args.calib, args.tokens, args.seq_len, settings.seed)
    bar = model_io.progress_bar()
    plans = plan_model(model, ids, args.keep, settings, cache, args.memory, bar)
    plans = show_plans(model, plans, bar)
    entry = plan_entry(model, plans, args.keep, settings, ids, args.calib)
    text = ", ".join(map(str, args.calib))
    if not args.calib:
        text = "Python's documentation; --calib FILE: text of the model's own kind"
    print(f"calibration: {ids.numel():,} tokens of {text}")
    if args.plan_only:
        model_io.write_whole(out, model_io.record_bytes(model.checkpoint, entry))
        print(f"plan: {out}; examples/export_plan.py writes its checkpoint")
        return
    export(model, plans, out, entry)
    before, after = model.checkpoint.nbytes(), model_io.Checkpoint(out).nbytes()
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%})")
    print(f"output: {out}")
    print(f"compare: python examples/evaluate.py {args.checkpoint} {out} --text FILE")


def measure_only(model: Model, args: argparse.Namespace, settings: Settings, cache: Path) -> None:
    """Measure the layers of --layers into the cache. Raises InputError for layers that have no experts, and for options
    that would be ignored."""
    defaults = command_line()
    for name in sorted({"out", "plan_only", *CHOICES} - MEASURED):
        require(getattr(args, name) == defaults.get_default(name),
                f"{name}: does not go with --layers, which only measures barriers")
    first, last = args.layers[0], args.layers[-1]
    sparse = sparse_layers(model)
    wanted = [index for index in sparse if index in args.layers]
    require(wanted and last < len(model.layer_names),
            f"layers {first}-{last}: the model has experts in layers {sparse}")
    ids = calibration_ids(model, args.calib, args.tokens, args.seq_len, settings.seed)
    bar = model_io.progress_bar()
    for index, _ in measure_model(model, ids, settings, wanted, cache, args.memory, bar):
        bar(None)
        print(f"layer {index}: barriers in {cache}", flush=True)


def run_command(parser: Parser, work: Callable[[argparse.Namespace], None],
                argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or after one line on stderr 2, or 130 for an interrupt. Errors name a
    parameter first, and here its option."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks
    try:
        work(parser.parse_args(argv))
        return 0
    except InputError as err:
        actions = [action for action in parser._actions if action.option_strings]
        options = {action.dest: action.option_strings[-1] for action in actions}
        says = re.sub(r"^\w+", lambda parameter: options.get(parameter[0], parameter[0]), str(err))
    except (OSError, model_io.SafetensorError) as err:  # a disk that is full, a folder that vanished
        what, why = getattr(err, "filename", None), getattr(err, "strerror", None)
        says = f"{what or 'writing'}: {why or err}; the output is whole or absent"
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(err):
            raise
        says = ("out of memory; examples/estimate.py says what is needed; give less to buffers, as in "
                "--memory 200MB")
    except KeyboardInterrupt:
        says = "the output is absent; the same command goes on from what was saved"
        warn(says, f"{parser.prog}: interrupted")
        return 130
    warn(says, f"{parser.prog}: error")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(command_line(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
