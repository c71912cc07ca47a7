# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the HodgeCover reference implementation's authors
"""The numerics behind `hodgecover.py`: barriers of all pairs and triples at once, fast and in bounded memory; samples
of the vocabulary; the audit. Knows nothing of models or files.

    n experts of a layer    T tokens, t of a step    V vocabulary, W outcomes of a block    d hidden size    E edges
    M simplices of one size, s members of each       R simplices that touch a token

A `layer` has the fields of `hodgecover.MoELayer`. Sections and equations are the paper's (arXiv 2605.13997).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

__version__ = "0.4.0"

CACHE_BYTES = 1 << 21  # a block of changed logits that stays in a processor's cache


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32, or dtype itself if it is wider: the dtype of norms, softmaxes and sums."""
    return torch.promote_types(dtype, torch.float32)


class Sample(NamedTuple):
    """Outcomes of each token that stand for the vocabulary, as `sample_outcomes` draws them."""
    outcomes: torch.Tensor  # token ids (T, W), ascending
    log_weights: torch.Tensor  # (T, W), in place of log-probabilities


class Tables(NamedTuple):
    """What the changed logits of some tokens are made of. The rows are of y, then of the outputs f_1 .. f_n."""
    log_p: torch.Tensor  # log-probabilities of the outcomes (T, W), float32 or wider
    logits: torch.Tensor  # what the head reads of each row, times the weight of the final norm, (T, n + 1, W)
    gram: torch.Tensor  # inner products of the rows, over d, (T, n + 1, n + 1)


# ------------------------------------------------------------- the sweep: barriers of many simplices (equations 2, 30)

def sweep(layer, members: torch.Tensor, weights: torch.Tensor, sample: Sample | None = None,
          memory: int = 10**9, tick: Callable[[float], None] = lambda share: None,
          kept: dict[int, Tables] | None = None) -> torch.Tensor:
    """Barriers of many simplices: `hodgecover.plain_barrier` of each, fast.

    A merge changes only the tokens that are routed to a member (`touching`). It adds to the stream a combination of its
    members' outputs. So the new logits are a combination of what the head reads of y and of each output, divided by an
    RMS that their inner products give (`read_tables`, `combinations`). No merged expert is formed.

    members, weights (M, 2 or 3): simplices and `hodgecover.merge_weights` of them; sample: `sample_vocabulary`'s, None
    for all outcomes; memory: bytes that the sweep may take; tick is told the share of the work that is done; kept: a
    dict that keeps tables for the next sweep, as many as half of memory holds. Returns (M,) float64 on the CPU, nats.
    """
    layer = layer._replace(gates=layer.gates.cpu())  # waits for the device once
    touched = touching(members, layer.gates)
    total = torch.zeros(len(members), dtype=torch.float64)
    if not touched.any():
        return total
    tokens = len(layer.x)
    size = tokens_at_once(layer, sample, memory)
    kept = {} if kept is None else kept
    room = memory // 2
    for start in range(0, tokens, size):
        chunk = slice(start, start + size)
        few = on_tokens(layer, chunk)
        tables = kept.get(start)
        if tables is None:
            tables = read_tables(few, sample and on_tokens(sample, chunk), memory)
        room -= tables.logits.nbytes + tables.gram.nbytes
        if room >= 0:
            kept[start] = tables
        arguments = few, tables, members, weights, touched[chunk], memory
        kl = kl_of_merges(*arguments)
        if not kl.isfinite().all():  # an exponential overflows
            kl = kl_of_merges(*arguments, careful=True)
        simplex = touched[chunk].nonzero()[:, 1]
        total.index_add_(0, simplex, kl.double())
        tick(min(chunk.stop / tokens, 1))
        del tables, arguments  # before the next chunk is read
    return total / tokens


def on_tokens(measured, which: slice | torch.Tensor):
    """A layer, or a sample of the vocabulary, on some of the tokens."""
    if isinstance(measured, Sample):
        return Sample(measured.outcomes[which], measured.log_weights[which])
    return measured._replace(x=measured.x[which], gates=measured.gates[which], y=measured.y[which])


def touching(members: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Which tokens are routed to a member of each simplex (M, 2 or 3), and so changed: (T, M) bool on the CPU."""
    routed = gates.cpu() > 0
    touched = routed[:, members[:, 0]]
    for member in members.T[1:]:
        touched |= routed[:, member]
    return touched


def tokens_at_once(layer, sample: Sample | None, memory: int) -> int:
    """How many tokens a chunk of the sweep takes, to fill a third of `memory`; one at least."""
    rows = len(layer.experts.gate) + 1
    width, d = layer.unembedding.shape
    if sample is not None:
        width = sample.outcomes.shape[1]
    narrow, wide = layer.x.itemsize, widened(layer.x.dtype).itemsize
    routed = int((layer.gates > 0).sum(1).max())
    of_token = narrow * rows * (d + width + rows)  # `read_tables`
    of_token += wide * (rows**2 + 3 * width)
    of_token += 64 * wide * rows * routed  # `combinations`: some n k pairs touch a token
    return max(1, memory // 3 // of_token)


def read_tables(layer, sample: Sample | None, memory: int) -> Tables:
    """Run all experts, and the head on y and on each output. log_p is in float32 or better, the rest in the layer's
    dtype before it is widened."""
    n, (tokens, d) = len(layer.experts.gate), layer.x.shape
    rows = layer.x.new_empty(tokens, n + 1, d)
    rows[:, 0] = layer.y
    for e in range(n):
        rows[:, 1 + e] = layer.experts(e, layer.x)
    gram = rows @ rows.mT
    gram = gram.to(widened(rows.dtype)) / d
    rows *= layer.norm.weight
    if sample is None:
        return Tables(log_readout(layer, memory), rows @ layer.unembedding.T, gram)
    width = sample.outcomes.shape[1]
    logits = rows.new_empty(tokens, n + 1, width)
    size = max(1, block_numbers(rows, memory) // (width * d))  # tokens whose rows of the head are a block
    for start in range(0, tokens, size):
        step = slice(start, start + size)
        outcomes = sample.outcomes[step].flatten()
        head = layer.unembedding.index_select(0, outcomes).view(-1, width, d)
        logits[step] = product(rows[step], head.mT)
    return Tables(sample.log_weights, logits, gram)


def kl_of_merges(layer, tables: Tables, members: torch.Tensor, weights: torch.Tensor, touched: torch.Tensor,
                 memory: int, careful: bool = False) -> torch.Tensor:
    """KL(p_t || p_S,t) at each touched (token, simplex) pair, in the order of `touched.nonzero()`, on the CPU. The host
    waits for the device once. KL is not finite where exponentials overflow, unless `careful`."""
    log_p, logits, gram = tables
    device, wide = log_p.device, log_p.dtype

    # What each token's simplices change, as combinations of its rows: (T, R, s + 1).
    simplex, own = simplices_of_tokens(touched)
    simplex = simplex.to(device, non_blocking=True)
    members = members.to(device, non_blocking=True)[simplex]
    weights = weights.to(device, wide, non_blocking=True)[simplex]
    gates = layer.gates.to(device, wide, non_blocking=True)
    index, share = combinations(gates, gram, layer.norm.eps, members, weights)

    kl = share.new_zeros(own.shape)
    count = own.sum(1)
    numbers = block_numbers(log_p, memory)
    of_token = max(1, own.shape[1] * log_p.shape[1])
    size = max(1, numbers // of_token)
    for start in range(0, len(log_p), size):
        step = slice(start, start + size)
        most = int(count[step].max())
        if most == 0:
            continue
        used = step, slice(most)
        blocks = changed_logits(log_p[step], logits[step], index[used], share[used], numbers)
        kl[used] = kl_of_blocks(blocks, careful)
    return kl.cpu()[own]


def simplices_of_tokens(touched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The simplices that touch each token, side by side: touched (T, M) bool -> numbers (T, R), and which of them are
    the token's own (T, R) bool. A token with fewer than R borrows the next one's."""
    simplex = touched.nonzero()[:, 1]
    count = touched.sum(1)
    first = count.cumsum(0) - count
    column = torch.arange(int(count.max()))
    place = first[:, None] + column
    return simplex[place.clamp(max=len(simplex) - 1)], column < count[:, None]


def combinations(gates: torch.Tensor, gram: torch.Tensor, eps: float, members: torch.Tensor,
                 weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The changes of what the head reads, as combinations of the rows of `Tables`. A merge S changes y by

        y_S - y = sum_S c_e f_e(x),   c_e = (sum_S g) w_e - g_e

    and y / rms(y) by (scale - 1) y / rms(y) + scale sum_S c_e f_e(x) / rms(y), with scale = rms(y) / rms(y_S).

    gates (T, n), gram (T, n + 1, n + 1), members, weights (T, R, s) -> rows, 0 for y, and their coefficients,
    (T, R, s + 1) each."""
    gate = gates.gather(1, members.flatten(1)).view_as(members)
    mass = gate.sum(-1, keepdim=True)
    change = mass * weights - gate  # c_e
    index = functional.pad(1 + members, (1, 0))
    with_y = functional.pad(change, (1, 0), value=1.0)

    # |y_S|^2 - |y|^2, free of the rounding error of a difference: all inner products but |y|^2.
    token = torch.arange(len(gram), device=gram.device)[:, None, None]
    row = token * gram.shape[1] + index  # of the Gram matrices of all tokens, one below the other
    products = gram.take(row[..., None] * gram.shape[2] + index[..., None, :])  # (T, R, s + 1, s + 1)
    products[..., 0, 0] = 0
    products *= with_y[..., :, None]
    products *= with_y[..., None, :]
    growth = products.sum((-2, -1))

    square = gram[:, 0, 0, None]  # of rms(y)
    least = torch.finfo(square.dtype).eps - 1
    growth = torch.maximum(growth, least * square)  # a mean square is positive, also after rounding
    square = square + eps
    less_1 = torch.expm1(-torch.log1p(growth / square) / 2)[..., None]  # scale - 1
    share = torch.cat((less_1, (1 + less_1) * change), -1)
    share *= square.rsqrt()[..., None]
    return index, share


def changed_logits(log_p: torch.Tensor, logits: torch.Tensor, index: torch.Tensor, share: torch.Tensor,
                   numbers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the log-probabilities (t, W) and the changes of the logits (t, R, W), less that of the most likely outcome,
    a block of about so many numbers at a time. log_p, logits: of `Tables`; index, share: of `combinations`."""
    t, many, _ = index.shape
    rows = logits.shape[1]
    likely = log_p.argmax(-1)[:, None, None].expand(t, rows, 1)
    base = logits.gather(2, likely).to(share.dtype)
    token = torch.arange(t, device=index.device)[:, None, None]
    place = (token * rows + index).flatten(0, 1)  # in the rows of all tokens, one below the other
    share = share.flatten(0, 1)
    width = max(256, numbers // len(place))
    for log_p_block, block in zip(log_p.split(width, -1), logits.split(width, -1)):
        table = (block.to(share.dtype) - base).flatten(0, 1)  # (t (n + 1), W)
        delta = functional.embedding_bag(place, table, per_sample_weights=share, mode="sum")
        yield log_p_block, delta.view(t, many, -1)


def block_numbers(x: torch.Tensor, memory: int) -> int:
    """How many numbers to compute at a time: a share of `memory` bytes, on a CPU no more than its cache holds."""
    share = memory // 12
    if x.is_cpu:
        share = min(share, CACHE_BYTES)
    return max(1, share // widened(x.dtype).itemsize)


def log_readout(layer, memory: int) -> torch.Tensor:
    """Log-probabilities of the next token, (T, V), float32 or better; the head is widened piece by piece."""
    wide = widened(layer.x.dtype)
    features = layer.norm(layer.y.to(wide))
    logits = features.new_empty(len(features), len(layer.unembedding))
    size = max(1, block_numbers(features, memory) // features.shape[1])
    pieces = zip(logits.split(size, dim=1), layer.unembedding.split(size))
    for out, rows in pieces:
        out.copy_(features @ rows.to(wide).T)
    return logits.log_softmax(-1)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product of left (t, R, d) and right (t, d, W) or (d, W)."""
    if right.dim() == 2 or not left.is_cpu:
        return left @ right
    return torch.stack([one @ other for one, other in zip(left, right)])  # a CPU's batched products are slow


def kl_of_blocks(blocks: Iterable[tuple[torch.Tensor, torch.Tensor]], careful: bool = False) -> torch.Tensor:
    """KL(p || q) in nats, (t, R), if q has the logits of p plus delta (equation 2), from blocks of the vocabulary: the
    log-probabilities (t, W) and delta (t, R, W) of each, which is overwritten.
    KL = log1p(E_p[expm1(delta)]) - E_p[delta] for delta less any constant. With that of the most likely outcome its
    relative error is about eps / |delta|; a difference of log-softmaxes has eps / delta^2. It is not finite where
    exponentials overflow, unless `careful`: there it is log E_p[exp(delta)] - E_p[delta].
    """
    mean, growth, log_mean = 0.0, 0.0, torch.tensor(-torch.inf)
    for log_p, delta in blocks:
        p = log_p.exp()[..., None]
        mean = mean + product(delta, p)  # (t, R, 1)
        if careful:
            of_block = (log_p[:, None, :] + delta).logsumexp(-1, keepdim=True)
            log_mean = torch.logaddexp(log_mean.to(of_block), of_block)
        growth = growth + product(delta.expm1_(), p)
    kl = growth.log1p() - mean
    if careful:
        kl = torch.where(kl.isfinite(), kl, log_mean - mean)
    return kl.clamp(min=0).squeeze(-1)


# ----------------------------------------------------------------------------------- samples of the vocabulary (ours)

def sample_vocabulary(layer, count: int, seed: int = 0, memory: int = 10**9) -> Sample | None:
    """A sample of the vocabulary for each token, `count` outcomes each; None if it would be all of it (count 0 says
    all). One sample serves pairs and triangles."""
    tokens, vocab = len(layer.x), len(layer.unembedding)
    if not 0 < count < vocab:
        return None
    offsets = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    offsets = offsets.to(layer.x.device, non_blocking=True)
    size = max(1, memory // (4 * widened(layer.x.dtype).itemsize * vocab))  # tokens that are read out at once
    few = max(1, block_numbers(layer.x, memory) // (3 * vocab))  # and of those, in float64
    samples = []
    for start in range(0, tokens, size):
        chunk = slice(start, start + size)
        log_p = log_readout(on_tokens(layer, chunk), memory)
        for block, offset in zip(log_p.split(few), offsets[chunk].split(few)):
            samples.append(sample_outcomes(block, count, offset))
    outcomes, log_weights = zip(*samples)
    return Sample(torch.cat(outcomes), torch.cat(log_weights))


def sample_outcomes(log_p: torch.Tensor, count: int, offset: torch.Tensor) -> Sample:
    """Weighted samples, `count` outcomes each, of distributions log_p (T, V); offset (T,) is uniform in [0, 1).

    An outcome is in with probability min(1, p / tau), and then weighs max(p, tau); tau is such that `count` are in. So
    likely outcomes are certain, and E_p[v] is estimated without bias; KL falls short on average (Jensen). The draw is
    systematic: lay the probabilities of being in end to end, and read off at offset, 1 + offset, 2 + offset, ...

    >>> p = torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]])
    >>> sample = sample_outcomes(p.log(), 3, torch.tensor([0.5]))
    >>> sample.outcomes, sample.log_weights.exp()
    (tensor([[1, 2, 4]]), tensor([[0.2000, 0.6000, 0.2000]]))
    """
    p = log_p.double().exp()
    tau = threshold(p, count)
    ends = (p / tau).clamp_(max=1).cumsum(1)  # (T, V): where each outcome's stretch ends
    at = torch.arange(count, device=p.device)
    at = at + offset.double()[:, None]
    outcomes = torch.searchsorted(ends, at, right=True).clamp_(max=p.shape[1] - 1)
    weights = p.gather(1, outcomes).clamp(min=tau)
    weights = weights.where(at < ends[:, -1:], tau)  # fewer than `count` may have p > 0
    return Sample(outcomes, weights.log().to(log_p.dtype))


def threshold(p: torch.Tensor, count: int) -> torch.Tensor:
    """tau of samples of `count` outcomes of each distribution (T, V), (T, 1).

    An outcome is certain if it has at least an equal share of the mass left for its slot and those after it; tau is the
    share of the first slot that is not. Of 0.6, 0.1, 0.1, 0.1, 0.1 and 3 slots, the first is certain: 0.6 >= 1 / 3. The
    second is not: 0.1 < 0.4 / 2, which is tau.
    """
    largest, likely = p.topk(count)
    others = p.scatter(1, likely, 0.0).sum(1, keepdim=True)
    left = others + largest.flip(1).cumsum(1).flip(1)  # the mass of an outcome and of those after it
    slots = torch.arange(count, 0, -1, device=p.device)
    share = left / slots
    certain = largest >= share * (1 - 1e-12)
    last = certain.cumprod(1).sum(1, keepdim=True)
    tau = share.gather(1, last.clamp(max=count - 1))
    return tau.clamp(min=torch.finfo(p.dtype).tiny)


def audit_sample(layer, members: torch.Tensor, weights: torch.Tensor, sample: Sample, seed: int = 0,
                 memory: int = 10**9, size: int = 128) -> torch.Tensor:
    """KL of up to `size` (token, simplex) pairs, (R, 2) float64, nats: from a sample of the vocabulary, and exactly.
    The tokens are random, each with one random simplex of those that touch it. members, weights: as for `sweep`."""
    touched = touching(members, layer.gates)
    generator = torch.Generator().manual_seed(seed)
    t = touched.any(1).nonzero().squeeze(1)
    drawn = torch.randperm(len(t), generator=generator)[:size]
    t = t[drawn]
    if not len(t):
        return torch.empty(0, 2, dtype=torch.float64)
    simplex = torch.multinomial(touched[t].double(), 1, generator=generator).squeeze(1)
    t = t.to(layer.x.device)
    layer, sample = on_tokens(layer, t), on_tokens(sample, t)
    log_p = log_readout(layer, memory)
    # What the head reads of each merge, less what it reads of y: (R, d).
    stream, change = layer.y.to(log_p.dtype), changes_of_stream(layer, members[simplex], weights[simplex])
    moved = layer.norm(stream + change) - layer.norm(stream)
    delta = (moved.to(layer.x.dtype) @ layer.unembedding.T).to(log_p.dtype)
    delta -= delta.gather(1, log_p.argmax(-1, keepdim=True))

    of_sample = delta.gather(1, sample.outcomes)
    sampled = kl_of_blocks([(sample.log_weights, of_sample[:, None])], careful=True)
    exact = kl_of_blocks([(log_p, delta[:, None])], careful=True)
    return torch.cat((sampled, exact), 1).double().cpu()


def changes_of_stream(layer, members: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y_S - y, (T, d) float32 or wider, of one simplex at each token: members, weights (T, s)."""
    device, wide = layer.x.device, widened(layer.x.dtype)
    members, weights = members.to(device), weights.to(device, wide)
    gate = layer.gates.to(device, wide).gather(1, members)
    mass = gate.sum(1, keepdim=True)
    share = mass * weights - gate
    change = torch.zeros_like(layer.y, dtype=wide)
    for e in members.unique().tolist():
        t, member = (members == e).nonzero().T
        output = layer.experts(e, layer.x[t]).to(wide)
        change.index_add_(0, t, share[t, member, None] * output)
    return change


# -------------------------------------------------------------------------------------------------- the audit (ours)

def additive_residual(signal: torch.Tensor, d1: torch.Tensor) -> torch.Tensor:
    """What the least-squares fit b_ij ~ phi_i + phi_j leaves of a signal (E,), which no order of the vertices changes;
    d1 (n, E)."""
    ends = d1.abs()
    phi = torch.linalg.pinv(ends @ ends.T, hermitian=True) @ (ends @ signal)
    return signal - ends.T @ phi


def additive_shares(signal: torch.Tensor, d1: torch.Tensor) -> dict[str, float]:
    """Shares of a signal's energy, and of its variance about the mean, that b_ij ~ phi_i + phi_j explains; 1 if there
    is none to explain."""
    unexplained = additive_residual(signal, d1).square().sum()

    def explained(values: torch.Tensor) -> float:
        total = values.square().sum()
        if total <= 1e-24 * signal.square().sum():
            return 1.0
        return (1 - unexplained / total).item()
    return {"energy": explained(signal), "variance": explained(signal - signal.mean())}


def covered_at(order: list[int], simplices: torch.Tensor) -> int:
    """After how many of the picks in `order`, of all vertices, every simplex (M, 2 or 3) has a picked vertex.

    >>> covered_at([0, 2, 1, 3], torch.tensor([[0, 1], [1, 2]]))
    2
    """
    if not len(simplices):
        return 0
    pick = torch.tensor(order).argsort()  # of each vertex
    return int(pick[simplices].amin(1).max()) + 1


def shortfall(estimated: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far estimates of non-negative quantities fall short of the exact ones, both (R,): how many `pairs` were
    compared; `shortfall` 1 - sum(estimated) / sum(exact) and its `standard_error`; the `largest` error of one pair
    either way, as a share of it; Spearman's `rank_correlation`. Shortfalls are 0 and the correlation is 1 if all exact
    ones are 0."""
    total = exact.sum()
    share = 1.0
    if total > 0:
        share = (estimated.sum() / total).item()
    spread = (estimated - share * exact).std(correction=0)
    error = spread * len(exact) ** 0.5 / total.clamp(min=1e-300)
    errors = torch.where(exact > 0, 1 - estimated / exact, 0)
    largest = errors.abs().max()
    return {"pairs": len(exact), "shortfall": 1 - share, "standard_error": error.item(),
            "largest": largest.item(), "rank_correlation": spearman(estimated, exact)}


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank; 1 if either is constant."""
    def centred_ranks(values: torch.Tensor) -> torch.Tensor:
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count + 1) / 2).double()[place]
        return rank - rank.mean()
    u, v = centred_ranks(a), centred_ranks(b)
    norm = u.norm() * v.norm()
    if norm == 0:
        return 1.0
    return (u @ v / norm).item()
