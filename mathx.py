# SPDX-License-Identifier: MIT
"""The mathematics of HodgeCover (arXiv 2605.13997) as pure functions on tensors.

Vertices are 0..n-1 in the total order that orients the complex. Edges are all pairs (i < j) in lexicographic
order, so that a signal on edges is a vector of length |E| = n (n - 1) / 2; triangles are the rows of a (|T|, 3)
int64 tensor, increasing in each row and lexicographic. Everything is float64, except the KL of a logit change,
which keeps the dtype it is given.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

__version__ = "0.1.0"


# --------------------------------------------------------------------------- the complex (paper section 3.2)


def edges(n: int) -> torch.Tensor:
    """All edges of the complete graph on n vertices, (|E|, 2), lexicographic.

    >>> edges(3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    return torch.triu_indices(n, n, offset=1).T.contiguous()


def edge_index(n: int, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Position of the edges (i, j), i < j, in `edges(n)`.

    >>> edge_index(4, torch.tensor([0, 1, 2]), torch.tensor([3, 2, 3])).tolist()
    [2, 3, 5]
    """
    return i * (2 * n - i - 1) // 2 + j - i - 1


def triangle_edges(n: int, triangles: torch.Tensor) -> torch.Tensor:
    """Edge positions (|T|, 3) of the faces (j, k), (i, k), (i, j) of each triangle (i, j, k)."""
    i, j, k = triangles.unbind(1)
    return torch.stack((edge_index(n, j, k), edge_index(n, i, k), edge_index(n, i, j)), dim=1)


def boundary_matrices(n: int, triangles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundary operators of the complete graph on n vertices with the given triangles (paper section 3.2).

    Parameters
    ----------
    triangles : (|T|, 3) int64, each row increasing

    Returns
    -------
    d1 : (n, |E|), column (i, j) is e_j - e_i
    d2 : (|E|, |T|), column (i, j, k) is e_(jk) - e_(ik) + e_(ij)

    >>> d1, d2 = boundary_matrices(3, torch.tensor([[0, 1, 2]]))
    >>> d2.T.tolist(), (d1 @ d2).abs().max().item()
    ([[1.0, -1.0, 1.0]], 0.0)
    """
    pairs = edges(n)
    d1 = torch.zeros(n, len(pairs), dtype=torch.float64)
    column = torch.arange(len(pairs))
    d1[pairs[:, 0], column], d1[pairs[:, 1], column] = -1, 1
    d2 = torch.zeros(len(pairs), len(triangles), dtype=torch.float64)
    faces = triangle_edges(n, triangles)
    for face, sign in enumerate((1, -1, 1)):
        d2[faces[:, face], torch.arange(len(triangles))] = sign
    return d1, d2


def hodge_laplacian(d1: torch.Tensor, d2: torch.Tensor) -> torch.Tensor:
    """L1 = d1' d1 + d2 d2', (|E|, |E|), symmetric positive semi-definite. For teaching and small complexes only:
    the method never forms it."""
    return d1.T @ d1 + d2 @ d2.T


def betti_1(d1: torch.Tensor, d2: torch.Tensor) -> int:
    """First Betti number |E| - rank d1 - rank d2 = dim ker L1 (paper section 3.3), by ranks of Gram matrices."""
    def rank(gram: torch.Tensor) -> int:
        return int(torch.linalg.matrix_rank(gram, hermitian=True)) if len(gram) else 0
    return d1.shape[1] - rank(d1 @ d1.T) - rank(d2.T @ d2)


# ------------------------------------------------------------------ the Hodge decomposition (paper section 3.3)


class HodgeParts(NamedTuple):
    """The three parts of an edge signal, (|E|,) each: mutually orthogonal, and they sum to the signal."""

    gradient: torch.Tensor
    curl: torch.Tensor
    harmonic: torch.Tensor


def hodge_decompose(signal: torch.Tensor, d1: torch.Tensor, d2: torch.Tensor) -> HodgeParts:
    """Hodge decomposition of an edge signal (paper section 3.3, theorem 1).

    gradient = d1' (d1 d1')^+ d1 b, curl = d2 (d2' d2)^+ d2' b, harmonic = b - gradient - curl. Only n x n and
    |T| x |T| pseudo-inverses are formed.

    Parameters
    ----------
    signal : (|E|,) float64
    d1, d2 : from `boundary_matrices`

    >>> d1, d2 = boundary_matrices(3, torch.empty(0, 3, dtype=torch.int64))  # an unfilled 3-cycle
    >>> hodge_decompose(torch.tensor([1.0, -1.0, 1.0]).double(), d1, d2).harmonic.tolist()
    [1.0, -1.0, 1.0]
    """
    gradient = d1.T @ (torch.linalg.pinv(d1 @ d1.T, hermitian=True) @ (d1 @ signal))
    curl = d2 @ (torch.linalg.pinv(d2.T @ d2, hermitian=True) @ (d2.T @ signal))
    return HodgeParts(gradient, curl, signal - gradient - curl)


def energy_fractions(parts: HodgeParts) -> dict[str, float]:
    """eta of each part: its share of |b|^2 (paper section 3.4, equation 8); all 0 where b = 0."""
    energy = sum(parts).square().sum()
    return {name: (part.square().sum() / energy).item() if energy > 0 else 0.0
            for name, part in parts._asdict().items()}


class AdditiveModel(NamedTuple):
    """Least-squares fit b_ij ~ phi_i + phi_j: residual (|E|,), and the shares of the signal's energy
    and of its variance about the mean that the fit explains (1 where there is none to explain)."""

    residual: torch.Tensor
    energy: float
    variance: float


def additive_model(signal: torch.Tensor, d1: torch.Tensor) -> AdditiveModel:
    """The unsigned vertex model, which no relabelling of the vertices changes (ours; not in the paper)."""
    incidence = d1.abs()
    phi = torch.linalg.pinv(incidence @ incidence.T, hermitian=True) @ (incidence @ signal)
    residual = signal - incidence.T @ phi
    left = residual.square().sum()

    def explained(of: torch.Tensor) -> float:
        total = of.square().sum()
        return (1 - left / total).item() if total > 1e-24 * signal.square().sum() else 1.0
    return AdditiveModel(residual, explained(signal), explained(signal - signal.mean()))


# ------------------------------------------------------------------- curated triangles (paper appendix A.9)


def candidate_triangles(n: int, barriers: torch.Tensor, limit: int, seed: int) -> torch.Tensor:
    """Stage 1: 3-cliques of the graph of edges with barrier <= median (the lower of two), at most `limit` of them.

    Parameters
    ----------
    barriers : (|E|,)
    limit, seed : more cliques than `limit` are sampled without replacement by a generator with this seed

    Returns (|T|, 3) int64, lexicographic.
    """
    cheap = edges(n)[barriers <= barriers.median()]
    adjacent = torch.zeros(n, n, dtype=torch.bool)
    adjacent[cheap[:, 0], cheap[:, 1]] = True  # upper triangle only: third vertices k > j
    edge, third = (adjacent[cheap[:, 0]] & adjacent[cheap[:, 1]]).nonzero().unbind(1)
    triangles = torch.cat((cheap[edge], third[:, None]), dim=1)
    if len(triangles) > limit:
        keep = torch.randperm(len(triangles), generator=torch.Generator().manual_seed(seed))[:limit]
        triangles = triangles[keep.sort().values]
    return triangles


def betti_curve(n: int, barriers: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor,
                thresholds: torch.Tensor) -> torch.Tensor:
    """beta_1 of K_tau for each threshold tau: edges with barrier <= tau, and triangles with barrier <= tau whose
    three edges are in.

    Adds the simplices once, in the order in which they enter: beta_1 = edges - rank d1 - rank d2, where an edge
    raises rank d1 iff it joins two components (Kruskal), and a triangle raises rank d2 iff its column is
    independent of the earlier ones.

    Parameters
    ----------
    barriers : (|E|,) of the edges; triplets : (|T|,) of the triangles; thresholds : (m,)

    Returns (m,) int64.
    """
    enters = torch.maximum(triplets, barriers[triangle_edges(n, triangles)].amax(1))
    order = enters.sort(stable=True).indices
    filling = enters[order[independent_columns(boundary_matrices(n, triangles[order])[1])]]
    joining = spanning_tree(n, barriers)

    def entered(values: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(values.sort().values, thresholds, right=True)
    return entered(barriers) - entered(joining) - entered(filling)


def spanning_tree(n: int, barriers: torch.Tensor) -> torch.Tensor:
    """Barriers (n - 1,) of a minimum spanning tree of the complete graph, ascending (Kruskal)."""
    parent = list(range(n))

    def root(v: int) -> int:
        while parent[v] != v:
            parent[v] = v = parent[parent[v]]
        return v
    tree = []
    order = barriers.sort(stable=True).indices
    for edge, (i, j) in zip(order.tolist(), edges(n)[order].tolist()):
        if root(i) != root(j):
            parent[root(i)] = root(j)
            tree.append(edge)
    return barriers[tree]


def independent_columns(matrix: torch.Tensor) -> list[int]:
    """Columns of a boundary matrix that are linearly independent of those before them: Cholesky of the Gram matrix,
    skipping a column whose pivot vanishes. (With entries 0 and +-1, other pivots are far from 0.)"""
    gram, kept = matrix.T @ matrix, []
    factor = torch.zeros_like(gram)  # lower triangular in the kept columns
    for column in range(len(gram)):
        rank = len(kept)
        row = torch.linalg.solve_triangular(factor[:rank, :rank], gram[kept, column, None], upper=False).squeeze(1)
        pivot = gram[column, column] - row.square().sum()
        if pivot > 1e-7:
            factor[rank, :rank], factor[rank, rank] = row, pivot.sqrt()
            kept.append(column)
    return kept


class Discordance(NamedTuple):
    """Share of triangles whose barrier exceeds (1 + margin) times that of each of its edges, and the quantiles
    (0, 1/4, 1/2, 3/4, 1) of barrier / largest edge barrier over the triangles where that is defined."""

    fraction: float
    ratio_quantiles: list[float]


def discordance(n: int, barriers: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor, margin: float
                ) -> Discordance:
    """The combinatorial diagnostic of paper section 3.4 over triangles (|T|, 3) with barriers `triplets` (|T|,)."""
    if not len(triangles):
        return Discordance(0.0, [])
    worst = barriers[triangle_edges(n, triangles)].amax(1)
    ratio = (triplets / worst)[worst > 0]
    quantiles = ratio.quantile(torch.linspace(0, 1, 5, dtype=ratio.dtype)).tolist() if len(ratio) else []
    return Discordance((triplets > (1 + margin) * worst).double().mean().item(), quantiles)


# --------------------------------------------------------------------------------- barriers (paper section 3.1)


def kl_of_logit_change(log_p: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """KL(p || p') in nats, where p' has the logits of p plus delta.

    With m = E_p[delta], KL = log1p(E_p[phi(delta - m)]), phi(x) = exp(x) - 1 - x >= 0: never negative, and with a
    relative error of about eps / |delta| where delta is small; a difference of log-softmaxes has eps / delta^2.
    Rows whose exponentials overflow take log E_p[exp delta] - m instead, which is accurate there.

    Parameters
    ----------
    log_p : (V,) or (R, V), log-probabilities
    delta : (R, V)

    Returns (R,).
    """
    p = log_p.exp()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values @ p if p.dim() == 1 else torch.linalg.vecdot(values, p)
    x = delta - mean(delta)[:, None]
    kl = mean(torch.expm1(x).sub_(x)).clamp_(min=0).log1p_()
    overflow = ~kl.isfinite()
    if overflow.any():
        rows = log_p if log_p.dim() == 1 else log_p[overflow]
        kl[overflow] = (rows + x[overflow]).logsumexp(-1).clamp(min=0)
    return kl


def sample_outcomes(log_p: torch.Tensor, count: int, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted samples of distributions, to estimate expectations from `count` outcomes each (ours).

    Outcomes with p >= tau are all in, with their own weight; every other is in with probability p / tau, by one
    systematic draw, and then weighs tau; tau is such that they are `count`. The weights sum to 1, and E_p[v] is
    estimated without bias for every v; so, by Jensen's inequality, KL = log E_p[exp delta] - E_p[delta] is on
    average estimated from below.

    Parameters
    ----------
    log_p : (T, V) log-probabilities
    count : from 1 to V
    offset : (T,) where the systematic draw starts, uniform in [0, 1)

    Returns (outcomes (T, count), log-weights (T, count)).

    >>> p = torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]])
    >>> sample_outcomes(p.log(), 3, torch.tensor([0.5]))[1].exp()
    tensor([[0.6000, 0.2000, 0.2000]])
    """
    p = log_p.double().exp()
    top, likely = p.topk(count)  # (T, count), descending
    slot = torch.arange(count, device=p.device)
    others = p.scatter(1, likely, 0.0)
    left = top.flip(1).cumsum(1).flip(1) + others.sum(1, keepdim=True)  # mass from each slot on
    certain = (top * (count - slot) >= left * (1 - 1e-12)).cumprod(1).bool()  # at least an equal share of it
    drawn = (~certain).sum(1, keepdim=True)
    cumulative = others.scatter(1, likely, top.masked_fill(certain, 0)).cumsum(1)  # (T, V)
    tau = cumulative[:, -1:] / drawn.clamp(min=1)
    at = (slot - (count - drawn) + offset[:, None].double()) * tau
    at = torch.minimum(at, cumulative[:, -1:] * (1 - 1e-12))
    outcomes = torch.where(certain, likely, torch.searchsorted(cumulative, at, right=True))
    return outcomes, torch.where(certain, top, tau).log().to(log_p.dtype)


def shortfall(estimated: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far estimates of positive quantities fall short of the exact ones, both (A,).

    Returns their number `pairs`; `shortfall`, 1 - sum(estimated) / sum(exact), and its `standard_error`; `largest`,
    of one pair; `rank_correlation` (Spearman). All 0 or 1 where the exact ones are 0.
    """
    share = (estimated.sum() / exact.sum()).item() if exact.sum() > 0 else 1.0
    error = (estimated - share * exact).std(correction=0) * len(exact) ** 0.5 / exact.sum().clamp(min=1e-300)
    largest = torch.where(exact > 0, 1 - estimated / exact, 0).max().item()
    return {"pairs": len(exact), "shortfall": 1 - share, "standard_error": error.item(), "largest": largest,
            "rank_correlation": spearman(estimated, exact)}


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of a and b, (A,); equal values share their mean rank; 1 where either is constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 6.0, 5.0])), 9)
    0.5
    """
    def ranks(values: torch.Tensor) -> torch.Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count + 1) / 2).double()[place]
        return rank - rank.mean()
    u, v = ranks(a), ranks(b)
    norm = u.norm() * v.norm()
    return (u @ v / norm).item() if norm > 0 else 1.0


# --------------------------------------------------------------- selection (paper section 4.1, appendix B.2)


def critical(values: torch.Tensor, percent: float, floor: float = 0.0) -> torch.Tensor:
    """Positions of the top `percent` % of values (m,), rounded up, ties to the first; ascending.

    Values up to `floor` are never critical: rounding must not elect the edges of a signal without harmonic part.
    """
    count = math.ceil(len(values) * percent / 100 - 1e-9)
    top = values.sort(descending=True, stable=True).indices[:count]
    return top[values[top] > floor].sort().values


def incidence(n: int, simplices: torch.Tensor) -> torch.Tensor:
    """(n, m) float64: 1 where vertex i belongs to simplex s; simplices (m, 2) or (m, 3)."""
    out = torch.zeros(n, len(simplices), dtype=torch.float64)
    return out.scatter_(0, simplices.T, 1.0) if len(simplices) else out


def coverage(chosen: list[int], saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]]) -> float:
    """The objective Phi (paper equation 10): sum of s_i over the chosen, plus for each family of critical
    simplices (m, 2 or 3) its weight times the share of them with a chosen vertex (0 for an empty family)."""
    total = saliency[chosen].sum().item()
    for simplices, weight in families:
        if len(simplices):
            total += weight * incidence(len(saliency), simplices)[chosen].any(0).double().mean().item()
    return total


def greedy_cover(saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]], k: int) -> list[int]:
    """k times the vertex of largest marginal gain in `coverage`, ties to the lowest index (paper equation 11).

    Reaches at least 1 - 1/e of the best k-subset (proposition 2).

    Parameters
    ----------
    saliency : (n,), non-negative
    families : (simplices, weight) pairs, as for `coverage`

    Returns the k vertices as picked; the prefixes are the choices for smaller k.

    >>> cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    >>> greedy_cover(torch.zeros(4), [(cycle, 1.0)], 2)  # {0, 1} ties by incidence count but covers only 3 edges
    [0, 2]
    """
    member = [incidence(len(saliency), simplices) for simplices, _ in families]
    uncovered = [torch.ones(len(simplices), dtype=torch.float64) for simplices, _ in families]
    order: list[int] = []
    while len(order) < k:
        gain = saliency.double().clone()
        for f, (simplices, weight) in enumerate(families):
            gain += weight * (member[f] @ uncovered[f]) / max(len(simplices), 1)  # whole counts: ties stay ties
        gain[order] = -math.inf
        order.append(int(gain.argmax()))
        for f in range(len(families)):
            uncovered[f] *= 1 - member[f][order[-1]]
    return order


def veto_order(saliency: torch.Tensor, simplices: torch.Tensor) -> list[int]:
    """All vertices, the first to keep first, by dropping one at a time: the least salient whose loss leaves every
    simplex (m, 3) a vertex; the least salient of all where each one's would not.

    >>> veto_order(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([[0, 1, 2]]))  # 3 goes rather than the last of 012
    [2, 3, 1, 0]
    """
    kept, dropped = saliency.sort(stable=True).indices.tolist(), []
    member = incidence(len(saliency), simplices)
    while kept:
        left = member[kept].sum(0)
        free = [v for v in kept if not (member[v] * (left == 1)).any()]
        dropped.append((free or kept)[0])
        kept.remove(dropped[-1])
    return dropped[::-1]


def covered_at(order: list[int], simplices: torch.Tensor) -> int:
    """After how many of the picks in `order` every simplex (m, 2 or 3) has a picked vertex; 0 where there is none,
    len(order) + 1 where one never has.

    >>> covered_at([0, 2, 1, 3], torch.tensor([[0, 1], [1, 2]]))
    2
    """
    pick = {vertex: number for number, vertex in enumerate(order, 1)}
    never = len(order) + 1
    return max((min(pick.get(vertex, never) for vertex in simplex) for simplex in simplices.tolist()), default=0)


def retained(signal: torch.Tensor, simplices: torch.Tensor, survivors: list[int]) -> dict[str, float]:
    """Shares of the energy of a signal (m,) on simplices (m, 2 or 3) with `some` vertex, and with `all` vertices
    among the survivors; 0 where there is no energy.

    >>> retained(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1], [1, 2]]), [0, 1])
    {'some': 1.0, 'all': 0.20000000298023224}
    """
    energy = signal.square()
    kept = torch.isin(simplices, torch.tensor(survivors))
    total = energy.sum()
    return {name: (energy[mask].sum() / total).item() if total > 0 else 0.0
            for name, mask in (("some", kept.any(1)), ("all", kept.all(1)))}


def wanda_mask(weight: torch.Tensor, norms: torch.Tensor, rate: float) -> torch.Tensor:
    """What Wanda (arXiv 2306.11695) keeps of a weight matrix: in each row all but the share `rate`, rounded to whole
    entries, of smallest |W_ij| |X_j|; ties go first; by magnitude alone where all norms are 0.

    weight (o, i), norms (i,) -> (o, i) bool.
    """
    score = weight.abs().double() * (norms.double() if norms.any() else 1.0)
    least = score.sort(dim=1, stable=True).indices[:, :round(rate * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter(1, least, False)


def wanda_mask_nm(weight: torch.Tensor, norms: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """The structured variant: of each `group` consecutive entries of a row the `kept` of largest |W_ij| |X_j|."""
    blocks, columns = weight.reshape(-1, group), norms.repeat(len(weight)).reshape(-1, group)
    columns = columns if norms.any() else torch.ones_like(columns)
    score = blocks.abs().double() * columns.double()
    least = score.sort(dim=1, stable=True).indices[:, :group - kept]
    return torch.ones_like(blocks, dtype=torch.bool).scatter(1, least, False).view_as(weight)


def nearest_rows(rows: torch.Tensor, survivors: list[int]) -> dict[int, int]:
    """Where each dropped vertex goes by REAP's rule (arXiv 2510.13999), without barriers: the survivor whose router
    row, of rows (n, d), is nearest in cosine; ties to the lowest index."""
    direction = torch.nn.functional.normalize(rows.double(), dim=1)
    kept = sorted(survivors)
    dropped = sorted(set(range(len(rows))) - set(kept))
    return {v: kept[int((direction[kept] @ direction[v]).argmax())] for v in dropped}


def redirect(survivors: list[int], barriers: torch.Tensor, harmonic: torch.Tensor, alpha: float) -> dict[int, int]:
    """Where each dropped vertex goes: argmin over survivors j of b_ij (1 + alpha |b_harm,ij| / |b|), ties to the
    lowest index (paper equation 13); the factor is 1 where |b| < 1e-12.

    Parameters
    ----------
    barriers, harmonic : (|E|,)
    """
    norm = barriers.norm()
    cost = barriers * (1 + alpha * harmonic.abs() / norm) if norm >= 1e-12 else barriers
    n = (1 + math.isqrt(1 + 8 * len(barriers))) // 2
    table = torch.zeros(n, n, dtype=cost.dtype)
    i, j = edges(n).unbind(1)
    table[i, j] = table[j, i] = cost
    kept = sorted(survivors)
    dropped = sorted(set(range(n)) - set(kept))
    return {v: kept[int(table[v, kept].argmin())] for v in dropped}


# ------------------------------------------------------------------------------- closed-form recovery (ours)


def block_ridge(features: Callable[[int], list[tuple[torch.Tensor, torch.Tensor]]], start: torch.Tensor,
                residual: torch.Tensor, ridge: float, sweeps: int, fixed_zeros: bool = False) -> torch.Tensor:
    """Block Gauss-Seidel on min_D sum_t |residual_t - sum_e (D_e - D_e^0) x_te|^2 + sum_e r_e |D_e - D_e^0|^2, one
    block D_e at a time, with r_e = ridge tr(A_e) / f and A_e = sum_t x_te x_te': no matrix is larger than A_e.

    Parameters
    ----------
    features : e -> pieces (rows (R,) of the residual that block e touches, x_e (R, f)); asked again in every sweep
    start : (n, d, f), D^0
    residual : (T, d) at D^0; changed in place to that at the result
    fixed_zeros : entries of D^0 that are 0 stay 0, and the others are the best given that

    Returns D (n, d, f), float32 or wider. A block that no row touches stays as it is.
    """
    blocks = start.to(torch.promote_types(start.dtype, torch.float32), copy=True)
    for _ in range(sweeps):
        for e in range(len(blocks)):
            pieces, first, block = features(e), start[e].double(), blocks[e].double()
            gram, wanted = first.new_zeros(first.shape[1], first.shape[1]), torch.zeros_like(first.T)
            for rows, x in pieces:
                gram += x.double().T @ x.double()
                wanted += x.T.to(residual) @ residual[rows]
            if not gram.any():
                continue
            weight = ridge * gram.trace() / len(gram)
            system = gram + weight * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            wanted -= weight * (block - first).T  # (f, d)
            step = solve_rows(system, wanted, first != 0) if fixed_zeros else solve_spd(system, wanted).T
            blocks[e] = block + step
            for rows, x in pieces:
                residual[rows] -= x.to(residual) @ step.T.to(residual)
    return blocks


def solve_spd(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """system^-1 wanted for positive (semi)definite systems (..., f, f) and (..., f, d); the least-norm solution, of a
    pseudoinverse, where Cholesky's factorisation fails."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        return torch.linalg.pinv(system, hermitian=True) @ wanted
    return torch.cholesky_solve(wanted, factor)


def solve_rows(system: torch.Tensor, wanted: torch.Tensor, free: torch.Tensor, entries: int = 1 << 24) -> torch.Tensor:
    """One system a row, over its free entries alone, the others 0: system (f, f), wanted (f, d), free (d, f) ->
    (d, f). At most `entries` numbers of systems at a time."""
    width = max(1, int(free.sum(1).max()))
    out = torch.zeros(free.shape, dtype=system.dtype, device=system.device)
    for at in torch.arange(len(free), device=free.device).split(max(1, entries // width**2)):
        own, index = free[at].to(torch.uint8).sort(dim=1, descending=True, stable=True)  # (r, f): free entries first
        own, index = own[:, :width].bool(), index[:, :width]
        part = system[index[:, :, None], index[:, None, :]] * (own[:, :, None] & own[:, None, :])
        part += torch.diag_embed((~own).to(part))  # a row with fewer free entries: 1 x = 0 for the rest
        rhs = wanted.T[at[:, None], index] * own
        out[at[:, None], index] = solve_spd(part, rhs[:, :, None])[:, :, 0]
    return out
