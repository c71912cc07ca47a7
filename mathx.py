# SPDX-License-Identifier: MIT
"""The mathematics of HodgeCover (arXiv 2605.13997) as pure functions on tensors, in the order of the paper; then
samples of the vocabulary and the audit, which are ours. Nothing here knows of models or files.

Symbols
    n experts = vertices of the complex      E = n (n - 1) / 2 edges          F triangles (the paper's |T|)
    M simplices of one size                  T tokens                         V vocabulary
    R rows of (token, simplex) pairs         K survivors (`keep`)             b edge signal: pairwise barriers
    d1, d2 boundary matrices                 i < j vertices of an edge        h < i < j vertices of a triangle
    phi potential of the vertices            p, q distributions               delta change of logits
    tau threshold                            eta share of energy              beta_1 first Betti number

Conventions
    Vertices are 0..n-1, in the total order that orients the complex (section 3.2).
    Edges are all pairs, lexicographic: a signal on edges is a vector (E,).
    Triangles are an (F, 3) int64 tensor, each row increasing, the rows lexicographic.
    Numbers are float64, except that KL divergences and samples of the vocabulary keep the dtype that they are given.
    Sections, equations (eq.), theorems and propositions are the paper's.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

__version__ = "0.2.0"


# -------------------------------------------------------------------------- KL divergence of barriers (section 3.1)


def kl_of_logit_change(log_p: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, (R,), if q has the logits of p plus delta (section 3.1).

    With m = E_p[delta], KL = log1p(E_p[phi(delta - m)]), phi(x) = expm1(x) - x >= 0: KL is never negative, and its
    relative error is about eps / |delta| for small delta; a difference of log-softmaxes has eps / delta^2. Rows whose
    exponentials overflow take log E_p[exp(delta - m)] instead, which is accurate there.

    Parameters
    ----------
    log_p : (V,) for all rows, or (R, V): log-probabilities
    delta : (R, V)
    """
    block = kl_block(log_p, delta)
    kl = kl_of_blocks([block])
    overflow = ~kl.isfinite()
    if overflow.any():
        log_p_there = log_p if log_p.dim() == 1 else log_p[overflow]
        kl[overflow] = (log_p_there + delta[overflow] - block.mean[overflow, None]).logsumexp(-1).clamp(min=0)
    return kl


class KLBlock(NamedTuple):
    """What KL needs of one block of the vocabulary: its mass under p, () or (R,); given the block, the mean of delta
    and that of phi(delta - mean), (R,) both."""

    mass: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor


def kl_block(log_p: torch.Tensor, delta: torch.Tensor) -> KLBlock:
    """The KLBlock of log-probabilities (V,) or (R, V), and of changes of logits delta (R, V)."""
    p = log_p.exp()
    mass = p.sum(-1)
    p = p / mass.clamp(min=torch.finfo(p.dtype).tiny)[..., None]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values @ p if p.dim() == 1 else torch.linalg.vecdot(values, p)
    centre = mean(delta)
    x = delta - centre[:, None]
    return KLBlock(mass, centre, mean(torch.expm1(x).sub_(x)))


def kl_of_blocks(blocks: Iterable[KLBlock]) -> torch.Tensor:
    """KL(p || q) in nats, (R,), from the blocks of a vocabulary; not finite where exponentials overflow.

    With y_b = mean_b - m, E_p[phi(delta - m)] = sum_b mass_b (phi(y_b) + exp(y_b) spread_b): what lies between the
    blocks b, and what lies within them. All terms are >= 0.
    """
    mass, mean, spread = (torch.stack(parts, -1) for parts in zip(*blocks))  # (R, blocks); mass also (blocks,)
    y = mean - (mass * mean).sum(-1, keepdim=True)
    terms = mass * (torch.expm1(y) - y + y.exp() * spread)
    return terms.sum(-1).clamp(min=0).log1p()


# --------------------------------------------------------------------------------------- the complex (section 3.2)


def edges(n: int) -> torch.Tensor:
    """All edges of the complete graph on n vertices, (E, 2), lexicographic (section 3.2).

    >>> edges(3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    return torch.triu_indices(n, n, offset=1).T.contiguous()


def edge_index(n: int, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Positions of the edges (i, j), i < j, in `edges(n)`; i and j of one shape.

    >>> edge_index(4, torch.tensor([0, 1, 2]), torch.tensor([3, 2, 3])).tolist()
    [2, 3, 5]
    """
    return i * (2 * n - i - 1) // 2 + j - i - 1


def relabel_edges(signal: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """An unsigned edge signal (E,) after relabelling: vertex r is the old vertex order[r], order (n,) a permutation.

    Entry (r, s) of the result (E,) is the signal on the edge {order[r], order[s]}. No sign changes.

    >>> relabel_edges(torch.tensor([1, 2, 12]), torch.tensor([2, 0, 1])).tolist()  # {0, 1}: 1, {0, 2}: 2, {1, 2}: 12
    [2, 12, 1]
    """
    n = len(order)
    old_edges = order[edges(n).to(order.device)].sort(1).values
    return signal[edge_index(n, *old_edges.unbind(1))]


def triangle_edges(n: int, triangles: torch.Tensor) -> torch.Tensor:
    """Positions in `edges(n)`, (F, 3), of the faces (i, j), (h, j), (h, i) of each triangle (h, i, j)."""
    h, i, j = triangles.unbind(1)
    return torch.stack((edge_index(n, i, j), edge_index(n, h, j), edge_index(n, h, i)), dim=1)


def boundary_matrices(n: int, triangles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundary operators d1 and d2 of the complete graph on n vertices with these triangles (F, 3) (section 3.2).

    d1 : (n, E), column (i, j) is +1 at vertex j, -1 at vertex i
    d2 : (E, F), column (h, i, j) is +1 at edge (i, j), -1 at edge (h, j), +1 at edge (h, i)

    >>> d1, d2 = boundary_matrices(3, torch.tensor([[0, 1, 2]]))
    >>> d2.T.tolist(), (d1 @ d2).abs().max().item()
    ([[1.0, -1.0, 1.0]], 0.0)
    """
    pairs = edges(n).to(triangles.device)
    edge = torch.arange(len(pairs), device=pairs.device)
    d1 = torch.zeros(n, len(pairs), dtype=torch.float64, device=pairs.device)
    d1[pairs[:, 0], edge] = -1
    d1[pairs[:, 1], edge] = 1
    triangle = torch.arange(len(triangles), device=pairs.device)
    d2 = torch.zeros(len(pairs), len(triangles), dtype=torch.float64, device=pairs.device)
    for face, sign in zip(triangle_edges(n, triangles).unbind(1), (1, -1, 1)):
        d2[face, triangle] = sign
    return d1, d2


def hodge_laplacian(d1: torch.Tensor, d2: torch.Tensor) -> torch.Tensor:
    """L1 = d1' d1 + d2 d2', (E, E), symmetric positive semi-definite (section 3.2).

    For teaching and small complexes only: the method never forms it.
    """
    return d1.T @ d1 + d2 @ d2.T


# ------------------------------------------------------------------------------ the Hodge decomposition (section 3.3)


def betti_1(d1: torch.Tensor, d2: torch.Tensor) -> int:
    """First Betti number E - rank d1 - rank d2 = dim ker L1 (section 3.3), by ranks of Gram matrices."""
    ranks = [int(torch.linalg.matrix_rank(gram, hermitian=True)) for gram in (d1 @ d1.T, d2.T @ d2)]
    return d1.shape[1] - sum(ranks)


class HodgeParts(NamedTuple):
    """The three parts of an edge signal, (E,) each: mutually orthogonal, and they sum to the signal."""

    gradient: torch.Tensor
    curl: torch.Tensor
    harmonic: torch.Tensor


def hodge_decompose(signal: torch.Tensor, d1: torch.Tensor, d2: torch.Tensor) -> HodgeParts:
    """Hodge decomposition of an edge signal (E,) float64 (section 3.3: theorem 1, and the projections of A.5).

    gradient = d1' (d1 d1')^+ d1 b, curl = d2 (d2' d2)^+ d2' b, harmonic = b - gradient - curl: what neither a vertex
    potential nor a triangle boundary explains, by least squares (proposition 1). Only n x n and F x F pseudo-inverses
    are formed.

    The vertices' order gives each edge its sign. A signal without signs, such as barriers, has other parts in another
    order.

    >>> d1, d2 = boundary_matrices(3, torch.empty(0, 3, dtype=torch.int64))  # an unfilled 3-cycle
    >>> hodge_decompose(torch.tensor([1.0, -1.0, 1.0]).double(), d1, d2).harmonic.tolist()
    [1.0, -1.0, 1.0]
    """
    gradient = d1.T @ (torch.linalg.pinv(d1 @ d1.T, hermitian=True) @ (d1 @ signal))
    curl = d2 @ (torch.linalg.pinv(d2.T @ d2, hermitian=True) @ (d2.T @ signal))
    return HodgeParts(gradient, curl, signal - gradient - curl)


# ---------------------------------------------------------------------------- the diagnostics of a layer (section 3.4)


class EnergyFractions(NamedTuple):
    """eta of each part: its share of |b|^2."""

    gradient: float
    curl: float
    harmonic: float


def energy_fractions(parts: HodgeParts) -> EnergyFractions:
    """Shares of the signal's energy |b|^2 (section 3.4, eq. 8 and its companions); all 0 if b = 0."""
    energy = sum(parts).square().sum()
    return EnergyFractions(*((part.square().sum() / energy).item() if energy > 0 else 0.0 for part in parts))


class Discordance(NamedTuple):
    """Share of triangles whose barrier exceeds (1 + margin) times that of each of its edges, and the quantiles
    (0, 1/4, 1/2, 3/4, 1) of barrier / largest edge barrier, over the triangles for which that is defined."""

    fraction: float
    ratio_quantiles: list[float]


def discordance(n: int, barriers: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor, margin: float
                ) -> Discordance:
    """The discordance fraction (section 3.4) of triangles (F, 3) with barriers `triplets` (F,), edge barriers (E,)."""
    if not len(triangles):
        return Discordance(0.0, [])
    worst = barriers[triangle_edges(n, triangles)].amax(1)
    ratio = (triplets / worst)[worst > 0]
    quarters = torch.linspace(0, 1, 5, dtype=ratio.dtype, device=ratio.device)
    quantiles = ratio.quantile(quarters).tolist() if len(ratio) else []
    return Discordance((triplets > (1 + margin) * worst).double().mean().item(), quantiles)


# ------------------------------------------------------------------------------ curated triangles (section 3.2, A.9)


def candidate_triangles(n: int, barriers: torch.Tensor, limit: int, seed: int) -> torch.Tensor:
    """Stage 1 (A.9): the 3-cliques of the graph of edges with barrier <= median, at most `limit` of them.

    The median of barriers (E,) is the lower of two. More cliques than `limit` are sampled without replacement, by a
    generator with this seed. Returns (F, 3) int64, lexicographic.
    """
    pairs = edges(n).to(barriers.device)
    cheap = pairs[barriers <= barriers.median()]
    adjacent = torch.zeros(n, n, dtype=torch.bool, device=barriers.device)
    adjacent[cheap[:, 0], cheap[:, 1]] = True  # only from lower to higher: each clique is found once, by its first edge
    edge, third = (adjacent[cheap[:, 0]] & adjacent[cheap[:, 1]]).nonzero().unbind(1)
    triangles = torch.cat((cheap[edge], third[:, None]), dim=1)
    if len(triangles) > limit:
        keep = torch.randperm(len(triangles), generator=torch.Generator().manual_seed(seed))[:limit]
        triangles = triangles[keep.sort().values]
    return triangles


def betti_curve(n: int, barriers: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor,
                thresholds: torch.Tensor) -> torch.Tensor:
    """Stage 2 (A.9): beta_1 of the complex K_tau for each threshold tau, int64 of the shape of `thresholds`.

    K_tau has the edges with barrier <= tau, and the triangles with barrier <= tau whose three edges are in; barriers
    (E,) of all edges, triangles (F, 3) with barriers `triplets` (F,).

    As tau grows, simplices only enter, and beta_1 = edges - rank d1 - rank d2. An edge raises rank d1 if it joins two
    components; a triangle raises rank d2 if its column is independent of the earlier ones. So one pass finds the
    thresholds at which the number of edges and each rank grow, and the curve counts them.
    """
    enters = torch.maximum(triplets, barriers[triangle_edges(n, triangles)].amax(1))  # (F,): after its edges
    order = enters.sort(stable=True).indices
    _, d2 = boundary_matrices(n, triangles[order])
    raise_rank_d2 = enters[order[independent_columns(d2)]]
    raise_rank_d1 = spanning_tree(n, barriers)

    def entered(values: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(values.sort().values, thresholds, right=True)
    return entered(barriers) - entered(raise_rank_d1) - entered(raise_rank_d2)


def spanning_tree(n: int, barriers: torch.Tensor) -> torch.Tensor:
    """Barriers (n - 1,) of a minimum spanning tree of the complete graph with barriers (E,), ascending (Kruskal)."""
    order = barriers.sort(stable=True).indices
    component = list(range(n))  # a label for each vertex
    tree = []
    for edge, (i, j) in zip(order.tolist(), edges(n)[order.cpu()].tolist()):
        joined, kept = component[j], component[i]
        if joined != kept:
            tree.append(edge)
            component = [kept if label == joined else label for label in component]
    return barriers[tree]


def independent_columns(matrix: torch.Tensor) -> list[int]:
    """Columns of a boundary matrix (rows, columns) that are linearly independent of all those before them.

    Cholesky's factorisation of the Gram matrix, skipping each column whose pivot vanishes: the pivot is the squared
    distance of the column from the span of the kept ones. (Measured on 500 triangles of 20 vertices: the others are
    above 0.06, those that vanish below 1e-13.)
    """
    gram = matrix.T @ matrix
    factor = torch.zeros_like(gram)  # lower triangular, of the kept columns, in the top left corner
    kept: list[int] = []
    for column in range(len(gram)):
        rank = len(kept)
        corner = factor[:rank, :rank]
        products = gram[kept, column, None]  # with the kept columns
        row = torch.linalg.solve_triangular(corner, products, upper=False).squeeze(1)
        pivot = gram[column, column] - row.square().sum()
        if pivot > 1e-7:
            factor[rank, :rank] = row
            factor[rank, rank] = pivot.sqrt()
            kept.append(column)
    return kept


# ------------------------------------------------------------------------------------------- HodgeCover (section 4.1)


def critical(values: torch.Tensor, percent: float, floor: float = 0.0) -> torch.Tensor:
    """Positions of the top `percent` % of values (M,), ascending (section 4.1: critical simplices).

    Their number is rounded up, and ties go to the first. Values up to `floor` are never critical: rounding must not
    elect the edges of a signal that has no harmonic part.
    """
    count = math.ceil(len(values) * percent / 100 - 1e-9)
    top = values.sort(descending=True, stable=True).indices[:count]
    return top[values[top] > floor].sort().values


def incidence(n: int, simplices: torch.Tensor) -> torch.Tensor:
    """(n, M) float64: 1 if the vertex belongs to the simplex; simplices (M, 2) or (M, 3)."""
    member = torch.zeros(n, len(simplices), dtype=torch.float64, device=simplices.device)
    return member.scatter_(0, simplices.T, 1.0)


def coverage(chosen: list[int], saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]]) -> float:
    """The coverage objective (section 4.1, eq. 10) of the chosen vertices, with saliency (n,).

    It is the sum of their saliencies plus, for each family of critical simplices (M, 2 or 3), its weight times the
    share of the family with a chosen vertex (0 for an empty family).
    """
    total = saliency[chosen].sum().item()
    for simplices, weight in families:
        if len(simplices):
            covered = incidence(len(saliency), simplices)[chosen].any(0)
            total += weight * covered.double().mean().item()
    return total


def greedy_cover(saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]], keep: int) -> list[int]:
    """`keep` times the vertex of largest marginal gain in `coverage`, ties to the lowest (section 4.1, eq. 11).

    Reaches at least 1 - 1/e of the best set of that size (proposition 2). The prefixes of the result are the choices
    for smaller sets.

    Parameters
    ----------
    saliency : (n,), non-negative
    families : (simplices (M, 2 or 3), weight) pairs, as for `coverage`
    keep : at most n

    >>> cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    >>> greedy_cover(torch.zeros(4), [(cycle, 1.0)], 2)  # {0, 1} ties by incidence count but covers only 3 edges
    [0, 2]
    """
    members = [incidence(len(saliency), simplices) for simplices, _ in families]  # (n, M) each
    weights = [weight for _, weight in families]
    uncovered = [torch.ones_like(member[0]) for member in members]  # (M,) each
    picks: list[int] = []
    while len(picks) < keep:
        gain = saliency.double().clone()
        for member, left, weight in zip(members, uncovered, weights):
            gain += weight * (member @ left) / max(len(left), 1)  # whole counts: ties stay ties
        gain[picks] = -math.inf
        best = int(gain.argmax())
        picks.append(best)
        uncovered = [left * (1 - member[best]) for member, left in zip(members, uncovered)]
    return picks


def redirect(survivors: list[int], barriers: torch.Tensor, harmonic: torch.Tensor, alpha: float) -> dict[int, int]:
    """Where each dropped vertex goes: argmin over survivors j of b_ij (1 + alpha |b_harm,ij| / |b|) (section 4.1).

    Ties go to the lowest survivor; the factor is 1 if |b| < 1e-12. barriers and harmonic: (E,). |b| is the norm over
    all E edges, so that the factor is near 1 unless alpha is of the size of sqrt(E).
    """
    norm = barriers.norm()
    cost = barriers * (1 + alpha * harmonic.abs() / norm) if norm >= 1e-12 else barriers
    n = (1 + math.isqrt(1 + 8 * len(barriers))) // 2  # from E = n (n - 1) / 2
    i, j = edges(n).to(cost.device).unbind(1)
    table = torch.zeros(n, n, dtype=cost.dtype, device=cost.device)
    table[i, j] = cost
    table[j, i] = cost
    kept = sorted(survivors)
    dropped = sorted(set(range(n)) - set(kept))
    return {vertex: kept[int(table[vertex, kept].argmin())] for vertex in dropped}


# ------------------------------------------------------------------------------- samples of the vocabulary (ours)


def sample_outcomes(log_p: torch.Tensor, count: int, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted samples of distributions, to estimate expectations from `count` outcomes each (ours).

    Likely outcomes, those with p >= tau, are certain to be in, with their own weight. Any other is in with
    probability p / tau, and then weighs tau; tau is such that `count` outcomes are in. The weights sum to 1, and
    E_p[v] is estimated without bias for every v. By Jensen's inequality, KL = log E_p[exp delta] - E_p[delta] is
    then underestimated on average.

    Parameters
    ----------
    log_p : (T, V) log-probabilities
    count : from 1 to V
    offset : (T,), uniform in [0, 1): where the systematic draw starts

    Returns (outcomes (T, count), log-weights (T, count)).

    >>> p = torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]])
    >>> sample_outcomes(p.log(), 3, torch.tensor([0.5]))[1].exp()
    tensor([[0.6000, 0.2000, 0.2000]])
    """
    p = log_p.double().exp()
    largest, likely = p.topk(count)  # (T, count), descending
    unlikely = p.scatter(1, likely, 0.0)  # (T, V), all but those
    certain = certain_slots(largest, unlikely.sum(1, keepdim=True))
    uncertain = unlikely.scatter(1, likely, largest.masked_fill(certain, 0))  # (T, V), all that may be drawn
    drawn, tau = systematic_draw(uncertain, certain, offset.double())
    outcomes = torch.where(certain, likely, drawn)
    weights = torch.where(certain, largest, tau)
    return outcomes, weights.log().to(log_p.dtype)


def certain_slots(largest: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Which of a sample's slots hold an outcome that is certain to be in it: (T, count) bool, a run from the first.

    An outcome is certain if it has at least an equal share of the mass left for its slot and those after it. Of
    probabilities 0.6, 0.1, 0.1, 0.1, 0.1 and 3 slots, the first is: 0.6 >= 1 / 3. The second is not: 0.1 < 0.4 / 2.
    largest (T, count): the largest probabilities, descending; remainder (T, 1): the mass of all others.
    """
    count = largest.shape[1]
    slots_left = count - torch.arange(count, device=largest.device)
    mass_left = largest.flip(1).cumsum(1).flip(1) + remainder
    at_least_its_share = largest * slots_left >= mass_left * (1 - 1e-12)
    return at_least_its_share.cumprod(1).bool()


def systematic_draw(mass: torch.Tensor, certain: torch.Tensor, offset: torch.Tensor
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the slots that are not certain: lay the outcomes' mass (T, V) end to end, read it off at steps of tau.

    tau (T, 1) is the mass per drawn slot; the first reading is at offset (T,) times tau. Returns (outcomes (T, count),
    tau); the outcomes at certain slots mean nothing.
    """
    count = certain.shape[1]
    draws = (~certain).sum(1, keepdim=True)
    ends = mass.cumsum(1)  # (T, V): where each outcome's stretch ends
    total = ends[:, -1:]
    tau = total / draws.clamp(min=1)
    step = torch.arange(count, device=mass.device) - (count - draws)  # 0 at the first slot that is drawn
    at = (step + offset[:, None]) * tau
    at = torch.minimum(at, total * (1 - 1e-12))  # rounding must not lead past the last outcome
    return torch.searchsorted(ends, at, right=True), tau


# -------------------------------------------------------------------------------------------------- the audit (ours)


class AdditiveModel(NamedTuple):
    """Least-squares fit b_ij ~ phi_i + phi_j: residual (E,), and the shares of the signal's energy and of its
    variance about the mean that the fit explains (1 if there is none to explain)."""

    residual: torch.Tensor
    energy: float
    variance: float


def additive_model(signal: torch.Tensor, d1: torch.Tensor) -> AdditiveModel:
    """The unsigned vertex model of a signal (E,), which no relabelling of the vertices changes; d1 (n, E)."""
    ends = d1.abs()
    phi = torch.linalg.pinv(ends @ ends.T, hermitian=True) @ (ends @ signal)
    residual = signal - ends.T @ phi
    unexplained = residual.square().sum()

    def explained(values: torch.Tensor) -> float:
        total = values.square().sum()
        return (1 - unexplained / total).item() if total > 1e-24 * signal.square().sum() else 1.0
    return AdditiveModel(residual, explained(signal), explained(signal - signal.mean()))


def covered_at(order: list[int], simplices: torch.Tensor) -> int:
    """After how many of the picks in `order` every simplex (M, 2 or 3) has a picked vertex.

    0 if there is no simplex, len(order) + 1 if one is never covered.

    >>> covered_at([0, 2, 1, 3], torch.tensor([[0, 1], [1, 2]]))
    2
    """
    pick = {vertex: number for number, vertex in enumerate(order, 1)}
    never = len(order) + 1
    return max((min(pick.get(vertex, never) for vertex in simplex) for simplex in simplices.tolist()), default=0)


class Retained(NamedTuple):
    """Shares of a signal's energy on the simplices with some vertex, and with all vertices, among the survivors."""

    some: float
    all: float


def retained(signal: torch.Tensor, simplices: torch.Tensor, survivors: list[int]) -> Retained:
    """What survivors retain of a signal (M,) on simplices (M, 2 or 3); 0 if it has no energy.

    >>> retained(torch.tensor([1.0, 2.0]).double(), torch.tensor([[0, 1], [1, 2]]), [0, 1])
    Retained(some=1.0, all=0.2)
    """
    energy = signal.square()
    total = energy.sum()
    survives = torch.isin(simplices, torch.tensor(survivors, device=simplices.device))

    def share(mask: torch.Tensor) -> float:
        return (energy[mask].sum() / total).item() if total > 0 else 0.0
    return Retained(some=share(survives.any(1)), all=share(survives.all(1)))


class Shortfall(NamedTuple):
    """How far estimates fall short: the number of pairs compared, 1 - sum(estimated) / sum(exact) and its standard
    error, the largest error of one pair either way, as a share of it, Spearman's rank correlation."""

    pairs: int
    shortfall: float
    standard_error: float
    largest: float
    rank_correlation: float


def shortfall(estimated: torch.Tensor, exact: torch.Tensor) -> Shortfall:
    """How far estimates of non-negative quantities fall short of the exact ones, both (R,).

    Shortfalls are 0 and the correlation is 1 if all exact ones are 0.
    """
    total = exact.sum()
    share = (estimated.sum() / total).item() if total > 0 else 1.0
    error = (estimated - share * exact).std(correction=0) * len(exact) ** 0.5 / total.clamp(min=1e-300)
    largest = torch.where(exact > 0, 1 - estimated / exact, 0).abs().max()
    return Shortfall(len(exact), 1 - share, error.item(), largest.item(), spearman(estimated, exact))


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors of one length; equal values share their mean rank; 1 if either is
    constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 6.0, 5.0])), 9)
    0.5
    """
    def centred_ranks(values: torch.Tensor) -> torch.Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count + 1) / 2).double()[place]
        return rank - rank.mean()
    u, v = centred_ranks(a), centred_ranks(b)
    norm = u.norm() * v.norm()
    return (u @ v / norm).item() if norm > 0 else 1.0
