# SPDX-License-Identifier: MIT
"""The numerics behind `hodgecover.py`: barriers of all pairs and triples at once, fast and in bounded memory; KL from a
change of logits; samples of the vocabulary; simplices and Betti numbers of a filtration; the audit. Knows nothing of
models or files.

    n experts of a layer     T tokens              V vocabulary       d hidden size, f width of an expert
    M simplices of one size  R touched (token, simplex) pairs         E edges, F triangles

A `layer` has the fields of `hodgecover.MoELayer`. Sections are the paper's (arXiv 2605.13997).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce

import torch
from torch.nn import functional

__version__ = "0.3.0"

CACHE_BYTES = 1 << 21  # a block of logits that stays in a processor's cache
ROW_STEP = 32  # rows of a product are a multiple of this: torch keeps some 0.3 MB for every new shape


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32, or dtype itself if it is wider: the dtype of norms, softmaxes and sums."""
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------- the sweep: barriers of many simplices (3.1)

def sweep(layer, members: torch.Tensor, weights: torch.Tensor, sample: tuple | None = None, memory: int = 10**9,
          tick: Callable[[float], None] = lambda share: None) -> torch.Tensor:
    """Barriers of many simplices: `hodgecover.plain_barrier` of each, fast.

    A merge changes only the tokens routed to a member (`touching`), its pre-activations are weighted sums of its
    members' (`merge_change`), and KL needs no more than the change of the logits (`kl_of_blocks`).

    Parameters
    ----------
    members, weights : (M, 2 or 3), the simplices and `hodgecover.merge_weights` of them
    sample : what `sample_vocabulary` drew; None: all of the vocabulary, exactly
    memory : bytes that the sweep may take beside the layer
    tick : is told the share of the work that is done

    Returns (M,) float64 on the CPU, nats.
    """
    layer = layer._replace(gates=layer.gates.cpu())  # waits for the device once
    touched = touching(members, layer.gates)
    total = torch.zeros(len(members), dtype=torch.float64)
    size = tokens_at_once(layer, touched, members.shape[1], sample, memory)
    for start in range(0, len(layer.x), size):
        chunk = slice(start, start + size)
        own = sample and tuple(part[chunk] for part in sample)
        few = on_tokens(layer, chunk), members, weights, touched[chunk], own
        kl = kl_of_merges(*few, memory)
        if not kl.isfinite().all():  # exponentials overflow
            kl = kl_of_merges(*few, memory, careful=True)
        total.index_add_(0, touched[chunk].nonzero()[:, 1], kl.double())
        tick(min(chunk.stop / len(layer.x), 1))
    return total / len(layer.x)


def on_tokens(layer, which: slice | torch.Tensor):
    """The layer on some of the tokens."""
    return layer._replace(x=layer.x[which], gates=layer.gates[which], y=layer.y[which])


def touching(members: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Which tokens are routed to a member of each simplex (M, 2 or 3): (T, M) bool on the CPU. A merge changes no
    others."""
    routed = gates.cpu() > 0
    return reduce(torch.logical_or, (routed[:, column] for column in members.T))


def tokens_at_once(layer, touched: torch.Tensor, size: int, sample: tuple | None, memory: int) -> int:
    """How many tokens a chunk of the sweep takes: of each one's pairs, the hidden activation and the products of the
    members; the pre-activations of all experts; the distribution in three copies."""
    (n, f, d), narrow, wide = layer.experts.gate.shape, layer.x.itemsize, widened(layer.x.dtype).itemsize
    of_pair = narrow * (3 * f + size * d) + 128 * size
    of_token = narrow * n * (2 * f + d) + (0 if sample else 3 * wide * len(layer.unembedding))
    most = int(touched.sum(1).max()) if len(touched) else 0
    return max(1, memory * 3 // 4 // (most * of_pair + of_token))  # the rest is for a step's work


def merge_change(layer, members: torch.Tensor, weights: torch.Tensor, touched: torch.Tensor, memory: int, at_once: int
                 ) -> Iterator[tuple[slice, torch.Tensor]]:
    """Change of the layer's output, a step of `at_once` tokens after the other, by the simplices that touch each token:

        (sum_S g_e) E_S(x) - sum_S g_e E_e(x) = sum_{e in S} ( (sum_S g) w_e down_e h_S - g_e down_e h_e )

    Each product is one row of a table, ordered by expert; a change is a weighted sum of such rows. All indices go to
    the device first, and the host never waits.

    Yields (slice of t tokens, changes (t, most of R_t, d)); those beyond a token's own R_t are other tokens'.
    """
    x, size, own, per_token = layer.x, members.shape[1], layer.gates.cpu() > 0, touched.sum(1)
    used = own.sum(0).index_add(0, members.flatten(), touched.sum(0).repeat_interleave(size)).tolist()
    t, s, own_t, own_e, members, weights, gates, first = (
        part.to(x.device, non_blocking=True) for part in
        (*touched.nonzero().T, *own.nonzero().T, members, weights, layer.gates, per_token.cumsum(0) - per_token))
    members, weights = members.index_select(0, s), weights.index_select(0, s)  # (R, 2 or 3)
    alone = torch.eye(1, size, dtype=weights.dtype, device=x.device).expand(len(own_t), size)  # a merge of weight 1
    hidden = merged_hidden(layer, torch.cat((t, own_t)), torch.cat((members, own_e[:, None].expand(-1, size))),
                           torch.cat((weights, alone)), memory)

    def numbers(count: int) -> torch.Tensor:
        return torch.arange(count, device=x.device)
    expert = torch.cat((members.flatten(), own_e))  # of each product
    row = torch.cat((numbers(len(t)).repeat_interleave(size), len(t) + numbers(len(own_t))))  # of hidden
    by_expert = expert.argsort(stable=True)
    row = functional.pad(row.index_select(0, by_expert), (0, ROW_STEP))
    table, start = x.new_empty(len(row), x.shape[1]), 0
    for down, count in zip(layer.experts.down, used):
        few = row[start:start + count + -count % ROW_STEP]  # the next expert's rows cover the padding
        torch.mm(hidden.index_select(0, few), down.to(x).T, out=table[start:start + len(few)])
        start += count
    del hidden

    place = torch.empty_like(by_expert).index_copy_(0, by_expert, numbers(len(expert)))  # of each product in the table
    merged, own = place[:members.numel()].view_as(members), place[members.numel():]
    own = place.new_zeros(gates.shape).index_put((own_t, own_e), own)
    mass = gates[t[:, None], members].to(weights)
    index = torch.cat((merged, own[t[:, None], members]), 1)
    weights = torch.cat((mass.sum(1, keepdim=True) * weights, -mass), 1).to(x)
    pairs = (first[:, None] + numbers(int(per_token.max()))).clamp(max=len(t) - 1)  # of each token, and some after
    for step in map(slice, range(0, len(x), at_once), range(at_once, len(x) + at_once, at_once)):
        some = pairs[step, :per_token[step].max()]
        rows, shares = (part.index_select(0, some.flatten()) for part in (index, weights))
        yield step, functional.embedding_bag(rows, table, per_sample_weights=shares, mode="sum").view(
            *some.shape, x.shape[1])


def merged_hidden(layer, t: torch.Tensor, members: torch.Tensor, weights: torch.Tensor, memory: int) -> torch.Tensor:
    """Hidden activations of merged experts, (R, f): of token t (R,), members and weights (R, 2 or 3).

        h_S = silu(sum_S w_e gate_e x) * (sum_S w_e up_e x)

    The projections are linear in the weights: the sums are of the members' pre-activations, each computed once per
    token, and no merged matrix is formed.
    """
    x, (n, f, _) = layer.x, layer.experts.gate.shape
    pre_gate, pre_up = x.new_empty(2, n, len(x), f)
    for out, projections in ((pre_gate, layer.experts.gate), (pre_up, layer.experts.up)):
        for e, projection in enumerate(projections):
            torch.mm(x, projection.to(x).T, out=out[e])
    index, hidden = members * len(x) + t[:, None], x.new_empty(len(t), f)
    step = max(1, block_numbers(x, memory) // f)
    for rows, shares, out in zip(index.split(step), weights.to(x).split(step), hidden.split(step)):
        gate, up = (functional.embedding_bag(rows, table.flatten(0, 1), per_sample_weights=shares, mode="sum")
                    for table in (pre_gate, pre_up))
        torch.mul(functional.silu(gate, inplace=True), up, out=out)
    return hidden


def block_numbers(x: torch.Tensor, memory: int) -> int:
    """How many numbers to compute at a time: a share of `memory` bytes, on a CPU no more than its cache holds."""
    share = memory // 12
    return max(1, (min(share, CACHE_BYTES) if x.is_cpu else share) // widened(x.dtype).itemsize)


def log_readout(layer, memory: int) -> torch.Tensor:
    """Log-probabilities of the next token, (T, V), float32 or better; the head is widened piece by piece."""
    features = layer.norm(layer.y.to(widened(layer.x.dtype)))
    logits = features.new_empty(len(features), len(layer.unembedding))
    piece = max(1, block_numbers(features, memory) // features.shape[1])
    for out, rows in zip(logits.split(piece, dim=1), layer.unembedding.split(piece)):
        out.copy_(features @ rows.to(features).T)
    return logits.log_softmax(-1)


def kl_of_merges(layer, members: torch.Tensor, weights: torch.Tensor, touched: torch.Tensor, sample: tuple | None,
                 memory: int, careful: bool = False) -> torch.Tensor:
    """KL(p_t || p_S,t) at each touched (token, simplex) pair, in the order of `touched.nonzero()`, (R,) on the CPU.

    p is read out in float32 or better, each change of logits in the layer's dtype, less that of the most likely
    outcome, a block of the vocabulary at a time. The host waits for the device once. KL is not finite where
    exponentials overflow, unless `careful`.
    """
    which, log_p = sample or (None, log_readout(layer, memory))
    likely = log_p.argmax(-1, keepdim=True)
    likely = rows_of(layer.unembedding, likely if which is None else which.gather(1, likely))  # (T, 1, d)
    numbers = block_numbers(layer.x, memory)
    at_once = tokens_in_a_step(layer, touched, 0 if which is None else which.shape[1], numbers)
    stream = layer.y.to(widened(layer.x.dtype))[:, None]
    features = layer.norm(stream)
    per_token, kl, own = touched.sum(1), [], []
    is_own = torch.arange(int(per_token.max())) < per_token[:, None]
    for step, moved in merge_change(layer, members, weights, touched, memory, at_once):
        moved = layer.norm(moved.to(stream).add_(stream[step])).sub_(features[step])
        base = moved @ likely[step].to(stream).mT
        moved = moved.to(layer.x.dtype)
        head = layer.unembedding if which is None else rows_of(layer.unembedding, which[step])
        width = max(numbers // max(1, moved[..., 0].numel()) // 256, 1) * 256  # products of odd widths are slow
        blocks = zip(log_p[step].split(width, -1), head.split(width, -2))
        kl.append(kl_of_blocks(((p, readout(moved, rows) - base) for p, rows in blocks), careful).flatten())
        own.append(is_own[step, :moved.shape[1]].flatten())
    return torch.cat(kl).cpu()[torch.cat(own)]


def tokens_in_a_step(layer, touched: torch.Tensor, outcomes: int, numbers: int) -> int:
    """How many tokens a step reads out, in blocks of so many numbers: on a CPU one, whose block stays in the cache;
    elsewhere those whose rows, of changes or of the head for a sample of so many outcomes, are a quarter of a block."""
    rows = max(1, int(touched.sum(1).max()), outcomes)
    return 1 if layer.x.is_cpu else max(1, numbers // (4 * rows * layer.x.shape[1]))


def rows_of(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index], by the function that is fast."""
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])


def readout(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The product (t, R, W) of rows (t, R, d) and a head (W, d), or one for each token (t, W, d)."""
    return rows @ (head[0] if head.shape[:-2] == (1,) else head).mT  # a batch of one is slow in bfloat16


# ------------------------------------------------------------------------------ KL from a change of the logits (3.1)

def kl_of_blocks(blocks: Iterable[tuple[torch.Tensor, torch.Tensor]], careful: bool = False) -> torch.Tensor:
    """KL(p || q) in nats, (..., R), if q has the logits of p plus delta (section 3.1), from blocks of the vocabulary:
    the log-probabilities (..., V) and delta (..., R, V) of each.

    KL = log1p(E_p[expm1(delta)]) - E_p[delta] for delta less any constant. With that of the most likely outcome its
    relative error is about eps / |delta|; a difference of log-softmaxes has eps / delta^2. It is not finite where
    exponentials overflow, unless `careful`: there it is log E_p[exp(delta)] - E_p[delta].
    """
    means, growths, logs = [], [], []
    for log_p, delta in blocks:
        p = log_p.exp()[..., None]
        means.append(delta @ p)
        growths.append(delta.expm1() @ p)
        if careful:
            logs.append((log_p[..., None, :] + delta).logsumexp(-1))
    mean, growth = (torch.cat(parts, -1).sum(-1) for parts in (means, growths))
    kl = growth.log1p() - mean
    if careful:
        kl = torch.where(kl.isfinite(), kl, torch.stack(logs).logsumexp(0) - mean)
    return kl.clamp(min=0)


# ----------------------------------------------------------------------------------- samples of the vocabulary (ours)

def sample_vocabulary(layer, count: int, seed: int = 0, memory: int = 10**9) -> tuple | None:
    """A sample of the vocabulary for each token, (outcomes (T, count), log-weights (T, count)), as `sample_outcomes`
    draws it; None if it would be all of it (count 0 says all). One sample serves pairs and triangles."""
    if not 0 < count < len(layer.unembedding):
        return None
    offsets = torch.rand(len(layer.x), generator=torch.Generator().manual_seed(seed))
    offsets = offsets.to(layer.x.device, non_blocking=True)
    vocab = len(layer.unembedding)
    step = max(1, memory * 3 // 4 // (3 * widened(layer.x.dtype).itemsize * vocab))
    few = max(1, block_numbers(layer.x, memory) // (3 * vocab))  # in float64
    drawn = []
    for start in range(0, len(offsets), step):
        log_p = log_readout(on_tokens(layer, slice(start, start + step)), memory)
        drawn += [sample_outcomes(part, count, offset)
                  for part, offset in zip(log_p.split(few), offsets[start:start + step].split(few))]
    return tuple(map(torch.cat, zip(*drawn)))


def sample_outcomes(log_p: torch.Tensor, count: int, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted samples of distributions, to estimate expectations from `count` outcomes each.

    An outcome is in with probability min(1, p / tau), and then weighs max(p, tau); tau is such that `count` are in. So
    likely outcomes are certain to be in, and E_p[v] is estimated without bias for every v. By Jensen's inequality,
    KL = log E_p[exp delta] - E_p[delta] is then underestimated on average. The draw is systematic: lay the
    probabilities of being in end to end, and read off at offset, 1 + offset, 2 + offset, ...

    Parameters
    ----------
    log_p : (T, V) log-probabilities
    count : from 1 to V
    offset : (T,), uniform in [0, 1)

    Returns (outcomes (T, count), ascending, log-weights (T, count)).

    >>> p = torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]])
    >>> outcomes, log_weights = sample_outcomes(p.log(), 3, torch.tensor([0.5]))
    >>> outcomes, log_weights.exp()
    (tensor([[1, 2, 4]]), tensor([[0.2000, 0.6000, 0.2000]]))
    """
    p = log_p.double().exp()
    largest, likely = p.topk(count)
    tau = threshold(largest, p.scatter(1, likely, 0.0).sum(1, keepdim=True))
    ends = (p / tau).clamp_(max=1).cumsum(1)  # (T, V): where each outcome's stretch ends
    at = torch.arange(count, device=p.device) + offset.double()[:, None]
    outcomes = torch.searchsorted(ends, at, right=True).clamp_(max=p.shape[1] - 1)
    weights = p.gather(1, outcomes).clamp(min=tau).where(at < ends[:, -1:], tau)  # fewer than `count` may have p > 0
    return outcomes, weights.log().to(log_p.dtype)


def threshold(largest: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """tau of samples of `count` outcomes each, (T, 1), from the largest probabilities (T, count), descending, and the
    sum of all others (T, 1).

    An outcome is certain if it has at least an equal share of the mass left for its slot and those after it; tau is
    the share of the first slot that is not certain. Of probabilities 0.6, 0.1, 0.1, 0.1, 0.1 and 3 slots, the first
    outcome is certain: 0.6 >= 1 / 3. The second is not: 0.1 < 0.4 / 2, which is tau.
    """
    slots = torch.arange(largest.shape[1], 0, -1, device=largest.device)  # this one and those after it
    share = (largest.flip(1).cumsum(1).flip(1) + others) / slots
    certain = (largest >= share * (1 - 1e-12)).cumprod(1).sum(1, keepdim=True)
    return share.gather(1, certain.clamp(max=len(slots) - 1)).clamp(min=torch.finfo(share.dtype).tiny)


def audit_sample(layer, members: torch.Tensor, weights: torch.Tensor, sample: tuple, seed: int = 0,
                 memory: int = 10**9, size: int = 128) -> torch.Tensor:
    """KL of up to `size` (token, simplex) pairs, (R, 2) float64, nats: from a sample of the vocabulary, and exactly.
    The tokens are random, each with one random simplex of those that touch it. members, weights: as for `sweep`."""
    touched, generator = touching(members, layer.gates), torch.Generator().manual_seed(seed)
    changed = touched.any(1).nonzero().squeeze(1)
    t = changed[torch.randperm(len(changed), generator=generator)[:size]]
    if not len(t):
        return torch.empty(0, 2, dtype=torch.float64)
    one = torch.zeros_like(touched[t]).scatter(1, torch.multinomial(touched[t].double(), 1, generator=generator), True)
    few, both = on_tokens(layer, t), []
    for own in (tuple(part[t] for part in sample), None):
        both.append(kl_of_merges(few, members, weights, one, own, memory, careful=True))
    return torch.stack(both, 1).double()


# ---------------------------------------------------------------- simplices and Betti numbers of a filtration (A.9)

def table_of_pairs(values: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix (n, n) of values (E,) of all edges of n vertices, lexicographic; 0 on its diagonal."""
    n = (1 + math.isqrt(1 + 8 * len(values))) // 2  # from E = n (n - 1) / 2
    i, j = torch.triu_indices(n, n, offset=1)
    table = values.new_zeros(n, n)
    table[i, j] = table[j, i] = values
    return table


def faces(n: int, triangles: torch.Tensor) -> torch.Tensor:
    """Positions of the faces (i, j), (h, j), (h, i) of each triangle (h, i, j) among all edges of n vertices in
    lexicographic order: triangles (F, 3) -> (F, 3).

    >>> faces(4, torch.tensor([[0, 1, 2], [1, 2, 3]])).tolist()  # of 01, 02, 03, 12, 13, 23
    [[3, 1, 0], [5, 4, 3]]
    """
    number = table_of_pairs(torch.arange(n * (n - 1) // 2))
    h, i, j = triangles.T
    return torch.stack((number[i, j], number[h, j], number[h, i]), dim=1)


def cliques(n: int, pairs: torch.Tensor) -> torch.Tensor:
    """All triangles (F, 3) of the graph on n vertices with edges (M, 2), rows ascending and lexicographic."""
    adjacent = torch.zeros(n, n, dtype=torch.bool)
    adjacent[pairs[:, 0], pairs[:, 1]] = True  # only from lower to higher: each clique is found once
    edge, third = (adjacent[pairs[:, 0]] & adjacent[pairs[:, 1]]).nonzero().unbind(1)
    return torch.cat((pairs[edge], third[:, None]), dim=1)


def sample_triangles(triangles: torch.Tensor, saliency: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the triangles (F, 3), in their order, sampled uniformly without replacement from their list sorted by
    saliency (n,), so that the numbering of the vertices matters only where saliencies tie."""
    n = len(saliency)
    place = saliency.sort(stable=True).indices.argsort()[triangles].sort(1).values
    by_saliency = (place @ torch.tensor([n * n, n, 1])).argsort()
    drawn = torch.randperm(len(triangles), generator=torch.Generator().manual_seed(seed))[:count]
    return triangles[by_saliency[drawn].sort().values]


def betti_1(d1: torch.Tensor, d2: torch.Tensor) -> int:
    """First Betti number E - rank d1 - rank d2 = dim ker (d1' d1 + d2 d2'), by ranks of Gram matrices (3.3)."""
    return d1.shape[1] - sum(int(torch.linalg.matrix_rank(gram, hermitian=True)) for gram in (d1 @ d1.T, d2.T @ d2))


def betti_curve(pairs: torch.Tensor, d2: torch.Tensor, barriers: torch.Tensor, triplets: torch.Tensor,
                thresholds: torch.Tensor) -> torch.Tensor:
    """beta_1 of the complex K_tau for each threshold tau, int64 of the shape of `thresholds`.

    K_tau has the edges, of all `pairs` (E, 2), with barrier <= tau, and the triangles, columns of d2 (E, F), with
    barrier <= tau whose three edges are in. As tau grows, simplices only enter, and beta_1 = edges - rank d1 - rank d2.
    An edge raises rank d1 if it joins two components; a triangle raises rank d2 if its column is independent of the
    earlier ones. So one pass finds where the number of edges and each rank grow, and the curve counts them.
    """
    enters = torch.maximum(triplets, (d2.abs() * barriers[:, None]).amax(0))  # (F,): after its edges
    order = enters.sort(stable=True).indices
    raise_rank_d2 = enters[order[independent_columns(d2[:, order])]]
    raise_rank_d1 = spanning_tree(pairs, barriers)

    def entered(values: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(values.sort().values, thresholds, right=True)
    return entered(barriers) - entered(raise_rank_d1) - entered(raise_rank_d2)


def spanning_tree(pairs: torch.Tensor, barriers: torch.Tensor) -> torch.Tensor:
    """Barriers (n - 1,) of a minimum spanning tree of the complete graph with barriers (E,), ascending (Kruskal)."""
    order = barriers.sort(stable=True).indices
    component = list(range(int(pairs.max()) + 1))  # a label for each vertex
    tree = []
    for edge, (i, j) in zip(order.tolist(), pairs[order].tolist()):
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


# -------------------------------------------------------------------------------------------------- the audit (ours)

def additive_residual(signal: torch.Tensor, d1: torch.Tensor) -> torch.Tensor:
    """What the least-squares fit b_ij ~ phi_i + phi_j leaves of a signal (E,), which no order of the vertices changes;
    d1 (n, E)."""
    ends = d1.abs()
    return signal - ends.T @ (torch.linalg.pinv(ends @ ends.T, hermitian=True) @ (ends @ signal))


def additive_shares(signal: torch.Tensor, d1: torch.Tensor) -> dict[str, float]:
    """Shares of a signal's energy, and of its variance about the mean, that b_ij ~ phi_i + phi_j explains; 1 if there
    is none to explain."""
    unexplained = additive_residual(signal, d1).square().sum()

    def explained(values: torch.Tensor) -> float:
        total = values.square().sum()
        return (1 - unexplained / total).item() if total > 1e-24 * signal.square().sum() else 1.0
    return {"energy": explained(signal), "variance": explained(signal - signal.mean())}


def quartiles(values: torch.Tensor) -> list[float]:
    """The quantiles 0, 1/4, 1/2, 3/4, 1; none if there are no values."""
    return values.quantile(torch.linspace(0, 1, 5, dtype=values.dtype)).tolist() if len(values) else []


def covered_at(order: list[int], simplices: torch.Tensor) -> int:
    """After how many of the picks in `order` every simplex (M, 2 or 3) has a picked vertex.

    0 if there is no simplex, len(order) + 1 if one is never covered.

    >>> covered_at([0, 2, 1, 3], torch.tensor([[0, 1], [1, 2]]))
    2
    """
    pick = {vertex: number for number, vertex in enumerate(order, 1)}
    never = len(order) + 1
    return max((min(pick.get(vertex, never) for vertex in simplex) for simplex in simplices.tolist()), default=0)


def retained(signal: torch.Tensor, simplices: torch.Tensor, survivors: list[int]) -> dict[str, float]:
    """Shares of a signal's energy (M,) on the simplices (M, 2 or 3) with some vertex, and with all vertices, among the
    survivors; 0 if it has no energy.

    >>> retained(torch.tensor([1.0, 2.0]).double(), torch.tensor([[0, 1], [1, 2]]), [0, 1])
    {'some': 1.0, 'all': 0.2}
    """
    energy = signal.square()
    survives = torch.isin(simplices, torch.tensor(survivors))
    total = energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    some, all_of_them = (energy[mask].sum() / total for mask in (survives.any(1), survives.all(1)))
    return {"some": some.item(), "all": all_of_them.item()}


def shortfall(estimated: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far estimates of non-negative quantities fall short of the exact ones, both (R,): how many `pairs` were
    compared; `shortfall` 1 - sum(estimated) / sum(exact) and its `standard_error`; the `largest` error of one pair
    either way, as a share of it; Spearman's `rank_correlation`. Shortfalls are 0 and the correlation is 1 if all exact
    ones are 0."""
    total = exact.sum()
    share = (estimated.sum() / total).item() if total > 0 else 1.0
    error = (estimated - share * exact).std(correction=0) * len(exact) ** 0.5 / total.clamp(min=1e-300)
    largest = torch.where(exact > 0, 1 - estimated / exact, 0).abs().max()
    return {"pairs": len(exact), "shortfall": 1 - share, "standard_error": error.item(), "largest": largest.item(),
            "rank_correlation": spearman(estimated, exact)}


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank; 1 if either is constant."""
    def centred_ranks(values: torch.Tensor) -> torch.Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count + 1) / 2).double()[place]
        return rank - rank.mean()
    u, v = centred_ranks(a), centred_ranks(b)
    norm = u.norm() * v.norm()
    return (u @ v / norm).item() if norm > 0 else 1.0
