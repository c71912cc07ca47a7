# SPDX-License-Identifier: MIT
"""HodgeCover (arXiv 2605.13997): compress a sparse Mixture-of-Experts checkpoint without training.

    python hodgecover.py examples/tiny-olmoe --keep 32

The file follows the paper: 1 calibrate, 2 barriers, 3 complex, 4 decompose, 5 select, 6 redirect. Then come the report,
a whole model with its cache, export and the command line. `plan_layer` plans one layer from tensors in memory, for
people with model code of their own.

    n  experts of a layer         k  experts per token (top-k)      K  survivors
    T  calibration tokens         B  sequences of L tokens          d  hidden size
    f  width of an expert         V  vocabulary                     E  n (n - 1) / 2 edges
    F  triangles                  M  simplices of one size          R  (token, simplex) pairs

Left out: the paper's allocator of a budget across layers, since `num_experts` is one number in these configurations.
Wanda on the survivors (section 4.2) is a command of its own: examples/wanda.py.
"""
from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import safetensors.torch
import torch
from torch.nn import functional

if __package__:
    from . import mathx, model_io
    from .model_io import Experts, InputError, LayerPass, Model
else:
    import mathx
    import model_io
    from model_io import Experts, InputError, LayerPass, Model

__version__ = "0.2.0"

log = logging.getLogger("hodgecover")

RECORD = "hodgecover.json"
FOLD = "hodgecover-fold.st"  # not *.safetensors: loaders that read every such file must not find it
SCHEMA_VERSION, CACHE_VERSION = 2, "3"
TOKENS, SEQ_LEN = 2048, 512  # default calibration sample
MEMORY = 10**9  # bytes of buffers of the sweep, beside the layer's weights and the head
CACHE_BYTES = 1 << 21  # a block of logits that stays in a processor's cache
ROW_STEP = 32  # rows of a product are a multiple of this: torch keeps some 0.3 MB for every new shape
NOTICE = ("> **This is a compressed model.** HodgeCover removed experts from the model described below; the scores "
          f"below are the source model's. `{RECORD}` says what was removed, and why.\n\n")

Tick = Callable[[float], None]  # told the share of the work that is done


def no_tick(share: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Settings:
    """Every choice of the method. All values are ours; so are the quantities, unless a section of the paper is named.

    Raises InputError for a value out of range.
    """

    readout: str = "lens"  # next-token distributions at the layer (lens), or at the end of the model
    order: str = "saliency"  # the total order of 3.2
    router: str = "drop"  # renormalise over the survivors; `fold` also applies the redirect of 4.1
    edge_percent: float = 5.0  # of E*, 4.1
    triangle_percent: float = 5.0  # of T*, 4.1
    lambda_edge: float = 1.0  # equation 10
    lambda_triangle: float = 1.0  # equation 10
    alpha: float = 1.0  # of the redirect, 4.1
    max_triangles: int = 500  # candidates, A.9
    vocab_sample: int = 0  # outcomes a token is read out on; 0: all
    thresholds: int = 80  # of the filtration, A.9
    margin: float = 0.1  # of the discordance, 3.4
    seed: int = 0  # of the samples of text, triangles and vocabulary

    def __post_init__(self) -> None:
        order_seed(self.order)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)}: must be {' or '.join(choices)}")
        for name, (low, high) in RANGES.items():
            check_range(name, getattr(self, name), low, high)
        if self.vocab_sample and self.readout != "lens":
            raise InputError(f"vocab_sample {self.vocab_sample}: goes with the readout lens alone")


CHOICES = {"readout": ("lens", "model"), "router": ("drop", "fold")}
RANGES = {"edge_percent": (0, 100), "triangle_percent": (0, 100), "lambda_edge": (0, math.inf),
          "lambda_triangle": (0, math.inf), "alpha": (0, math.inf), "max_triangles": (0, math.inf),
          "vocab_sample": (0, math.inf), "thresholds": (2, math.inf), "margin": (0, math.inf), "seed": (0, 2**63 - 1)}


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise InputError if a parameter is not a finite number from low to high."""
    if not low <= value <= high or value == math.inf:
        allowed = f"from {low} to {high}" if high < math.inf else f"a finite number, at least {low}"
        raise InputError(f"{name} {value}: must be {allowed}")


def order_seed(order: str) -> int | None:
    """The seed of the order random:SEED; None for saliency and index. Raises InputError for anything else."""
    if order in ("saliency", "index"):
        return None
    match = re.fullmatch(r"random:(\d{1,18})", order)
    if not match:
        raise InputError(f"order {order}: must be saliency, index or random:SEED with a number for SEED")
    return int(match[1])


# ------------------------------------------------------------------------------ 1 calibrate: the layer and its saliency


class MoELayer(NamedTuple):
    """One layer on the calibration tokens: all that its barriers depend on (under the readout `lens`).

    experts      gate (n, f, d), up (n, f, d), down (n, d, f)
    x            input of the MoE block (T, d)
    gates        gate weights as the model applies them (T, n), zero off the top-k
    y            residual stream after the layer (T, d)
    norm         the model's final norm, a function of a stream (..., d)
    unembedding  the model's head W_U (V, d)
    """

    experts: Experts
    x: torch.Tensor
    gates: torch.Tensor
    y: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    unembedding: torch.Tensor

    def tokens(self, which: slice | torch.Tensor) -> MoELayer:
        """The layer on some of the tokens."""
        return self._replace(x=self.x[which], gates=self.gates[which], y=self.y[which])


def reap_saliency(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """REAP output saliency (section 4.1; arXiv 2510.13999): the mean over the tokens routed to e of g_e |E_e(x)|,
    normalised to sum 1 over the layer. x (T, d), gates (T, n) -> (n,) float64."""
    saliency = torch.zeros(gates.shape[1], dtype=torch.float64)
    for e in range(len(saliency)):
        t = gates[:, e].nonzero().squeeze(1)
        if len(t):
            saliency[e] = (gates[t, e].double() * experts(e, x[t]).double().norm(dim=1)).mean()
    return saliency / saliency.sum().clamp(min=torch.finfo(torch.float64).tiny)


# ------------------------------------------------------------------- 2 barriers: the definition (section 3.1, A.10)


def merge_weights(simplices: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Weights of the experts in a merge: each one's share of the simplex's routing rate, equal shares if all rates
    are 0 (A.10). simplices (M, 2 or 3), rates (n,) in any unit -> (M, 2 or 3) float64, rows that sum to 1."""
    rate = rates.double()[simplices]
    total = rate.sum(1, keepdim=True)
    return torch.where(total > 0, rate / total.clamp(min=torch.finfo(torch.float64).tiny), 1 / rate.shape[1])


def plain_barrier(layer: MoELayer, simplex: list[int]) -> torch.Tensor:
    """The barrier of a simplex, as section 3.1 defines it: merge the weights, run the layer, compare the next-token
    distributions.

        b_S = mean_t KL( p_t || p_S,t ),   p = softmax(W_U norm(y))
        y_S = y + (sum_S g_e) E_S(x) - sum_S g_e E_e(x)

    Every token's gate weight on a member of S goes to the merged expert E_S. To read, and to test `lens_barriers`
    against; pass a layer whose `norm` also runs all later layers for the `model` readout. Returns a scalar, nats.
    """
    experts, x, gates = layer.experts, layer.x, layer.gates
    rates = (gates > 0).double().mean(0)
    weights = merge_weights(torch.tensor([simplex], device=x.device), rates)[0].to(x)
    merged = Experts(*(torch.tensordot(weights, part[simplex].to(x), 1)[None] for part in experts))

    y_merged = layer.y + gates[:, simplex].sum(1, keepdim=True) * merged(0, x)
    for e in simplex:
        y_merged = y_merged - gates[:, e, None] * experts(e, x)

    log_p = (layer.norm(layer.y) @ layer.unembedding.T).log_softmax(-1)
    log_q = (layer.norm(y_merged) @ layer.unembedding.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# ------------------------------------------------------------------------------------- 2 barriers: the fast form


class Merges(NamedTuple):
    """Simplices to merge, all on the CPU: their members (M, 2 or 3), the weights of these (M, 2 or 3), the tokens'
    gates (T, n), and which tokens are routed to a member (T, M), since a merge changes no others."""

    members: torch.Tensor
    weights: torch.Tensor
    gates: torch.Tensor
    touched: torch.Tensor

    def tokens(self, which: slice | torch.Tensor) -> Merges:
        """The merges on some of the tokens."""
        return self._replace(gates=self.gates[which], touched=self.touched[which])


def merges_of(layer: MoELayer, simplices: torch.Tensor) -> Merges:
    """The merges of simplices (M, 2 or 3) on a layer."""
    members, gates = simplices.cpu(), layer.gates.cpu()
    routed = gates > 0
    touched = routed[:, members[:, 0]]
    for column in members.T[1:]:
        touched |= routed[:, column]
    return Merges(members, merge_weights(members, routed.sum(0)), gates, touched)


def weighted_rows(table: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of a table's rows (N, d), in one pass: index (R, c), weights (R, c) -> (R, d)."""
    return functional.embedding_bag(index, table, per_sample_weights=weights, mode="sum")


def block_numbers(x: torch.Tensor, memory: int) -> int:
    """How many numbers to compute at a time: a share of `memory` bytes, on a CPU no more than its cache holds."""
    share = memory // 12
    return max(1, (min(share, CACHE_BYTES) if x.is_cpu else share) // model_io.widened(x.dtype).itemsize)


def hidden_rows(layer: MoELayer, t: torch.Tensor, members: torch.Tensor, weights: torch.Tensor, numbers: int
                ) -> torch.Tensor:
    """Hidden activations h = silu(gate x) * (up x) of merged experts, (R, f): of token t (R,), members and weights
    (R, 2 or 3).

    The projections are linear in the weights: a merged expert's pre-activations are the weighted sum of its members',
    each computed once per token, and no merged matrix is formed.
    """
    x, (n, f, _) = layer.x, layer.experts.gate.shape
    pre_gate, pre_up = x.new_empty(2, n, len(x), f)
    for out, projections in ((pre_gate, layer.experts.gate), (pre_up, layer.experts.up)):
        for e, projection in enumerate(projections):
            torch.mm(x, projection.to(x).T, out=out[e])
    rows = (members * len(x) + t[:, None]).to(x.device)
    hidden = x.new_empty(len(t), f)
    parts = (tensor.split(max(1, numbers // f)) for tensor in (rows, weights.to(x), hidden))
    for row, weight, out in zip(*parts):
        gate, up = (weighted_rows(table.flatten(0, 1), row, weight) for table in (pre_gate, pre_up))
        torch.mul(functional.silu(gate, inplace=True), up, out=out)
    return hidden


def merge_change(layer: MoELayer, merges: Merges, memory: int = MEMORY) -> Iterator[torch.Tensor]:
    """Change of the layer's output at each token, by the simplices that touch it, in order, (R_t, d):

        (sum_S g_e) E_S(x) - sum_S g_e E_e(x) = sum_{e in S} ( (sum_S g) w_e down_e h_S - g_e down_e h_e )

    Each product is one row of a table, ordered by expert; a change is a weighted sum of such rows.
    """
    x, n, size = layer.x, merges.gates.shape[1], merges.members.shape[1]
    t, s = merges.touched.nonzero().unbind(1)
    members, weights = merges.members[s], merges.weights[s]  # (R, 2 or 3)
    own_t, own_e = merges.gates.nonzero().unbind(1)  # an expert by itself is a merge of weight 1
    own_weights = torch.eye(1, size, dtype=weights.dtype).expand(len(own_t), size)
    hidden = hidden_rows(layer, torch.cat((t, own_t)), torch.cat((members, own_e[:, None].expand_as(own_weights))),
                         torch.cat((weights, own_weights)), block_numbers(x, memory))

    expert = torch.cat((members.flatten(), own_e))  # of each product
    row = torch.cat((torch.arange(len(t)).repeat_interleave(size), len(t) + torch.arange(len(own_t))))  # of hidden
    by_expert = expert.argsort(stable=True).split(expert.bincount(minlength=n).tolist())
    padded = [functional.pad(numbers, (0, -len(numbers) % ROW_STEP), value=-1) for numbers in by_expert]
    sizes = [len(numbers) for numbers in padded]
    product = torch.cat(padded)  # at each row of the table; -1: padding
    rows, table = row[product].to(x.device), x.new_empty(len(product), x.shape[1])
    for down, used, out in zip(layer.experts.down, rows.split(sizes), table.split(sizes)):
        torch.mm(hidden.index_select(0, used), down.to(x).T, out=out)
    del hidden

    place = torch.empty_like(expert)  # row of the table of each product
    place[product[product >= 0]] = (product >= 0).nonzero().squeeze(1)
    merged, alone = place.tensor_split((members.numel(),))
    own = place.new_zeros(merges.gates.shape).index_put((own_t, own_e), alone)
    gates = merges.gates[t[:, None], members].to(weights)
    index = torch.cat((merged.view_as(members), own[t[:, None], members]), 1).to(x.device)
    weights = torch.cat((gates.sum(1, keepdim=True) * weights, -gates), 1).to(x)
    touching = merges.touched.sum(1).tolist()
    yield from map(partial(weighted_rows, table), index.split(touching), weights.split(touching))


class Sample(NamedTuple):
    """The outcomes that each token is read out on (T, count), and their log-weights, which stand for log p."""

    outcomes: torch.Tensor
    log_p: torch.Tensor


def log_readout(layer: MoELayer, memory: int) -> torch.Tensor:
    """Log-probabilities (T, V) of the tokens, float32 or better; the head is widened piece by piece."""
    features = layer.norm(layer.y.to(model_io.widened(layer.x.dtype)))
    logits = features.new_empty(len(features), len(layer.unembedding))
    piece = max(1, block_numbers(features, memory) // features.shape[1])
    for out, rows in zip(logits.split(piece, dim=1), layer.unembedding.split(piece)):
        out.copy_(features @ rows.to(features).T)
    return logits.log_softmax(-1)


def draw_sample(layer: MoELayer, vocab_sample: int, offsets: torch.Tensor, memory: int) -> Sample | None:
    """A sample of the vocabulary for each token, placed by offsets (T,); None if it would be all of it."""
    if not 0 < vocab_sample < len(layer.unembedding):
        return None
    copies = 3 * model_io.widened(layer.x.dtype).itemsize * len(layer.unembedding)  # bytes of a token
    sizes = torch.full((len(layer.x),), copies)
    drawn = []
    for chunk in token_chunks(sizes, memory * 3 // 4):  # the rest is for the eight tokens at work
        parts = log_readout(layer.tokens(chunk), memory).split(8), offsets[chunk].split(8)
        drawn += [mathx.sample_outcomes(log_p, vocab_sample, offset) for log_p, offset in zip(*parts)]
    return Sample(*map(torch.cat, zip(*drawn)))


def lens_moves(layer: MoELayer, merges: Merges, memory: int) -> Iterator[torch.Tensor]:
    """Change of what the head reads at each token, by the simplices that touch it, in order, (R_t, d) in x's dtype."""
    stream = layer.y.to(model_io.widened(layer.x.dtype))
    features = layer.norm(stream)
    for t, change in enumerate(merge_change(layer, merges, memory)):
        yield layer.norm(change.to(stream).add_(stream[t])).sub_(features[t]).to(layer.x.dtype)


def lens_kl(layer: MoELayer, merges: Merges, sample: Sample | None, memory: int, careful: bool = False
            ) -> torch.Tensor:
    """KL(p_t || p_S,t) at each touched (token, simplex) pair, in the order of `touched.nonzero()`, (R,).

    The reference p is read out in float32 or better, each change of logits in the layer's dtype, one block of the
    vocabulary at a time. KL is not finite where exponentials overflow, unless `careful`.
    """
    outcomes, log_p = sample or (None, log_readout(layer, memory))
    numbers = block_numbers(layer.x, memory)
    kl = []
    for t, moved in enumerate(lens_moves(layer, merges, memory)):
        head = layer.unembedding if outcomes is None else layer.unembedding.index_select(0, outcomes[t])
        if careful:
            kl += [mathx.kl_of_logit_change(log_p[t], (few @ head.T).to(log_p))
                   for few in moved.split(max(1, numbers // len(head)))]
        else:
            width = max(numbers // max(1, len(moved)) // 256, 1) * 256  # products of odd widths are slow
            blocks = zip(log_p[t].split(width), head.split(width))
            kl.append(mathx.kl_of_blocks(mathx.kl_block(p, (moved @ rows.T).to(p)) for p, rows in blocks))
    return torch.cat(kl)


def sweep_bytes(layer: MoELayer, merges: Merges, sample: Sample | None) -> torch.Tensor:
    """What one step of the sweep takes for each token, (T,) bytes: the pre-activations of all experts; for each touched
    simplex its hidden activation, its members' products and their indices; the whole distribution in three copies."""
    (n, f, d), size = layer.experts.gate.shape, merges.members.shape[1]
    wide = model_io.widened(layer.x.dtype)
    row = layer.x.itemsize * (f + size * d) + 128 * size
    readout = 3 * wide.itemsize * len(layer.unembedding) if sample is None else 0
    alone = (merges.gates > 0).sum(1)
    return merges.touched.sum(1) * row + alone * layer.x.itemsize * (f + d) + 2 * layer.x.itemsize * n * f + readout


def token_chunks(sizes: torch.Tensor, memory: int) -> Iterator[slice]:
    """Consecutive runs of tokens of at most `memory` bytes, or of one token; sizes (T,) in bytes."""
    start = filled = 0
    for t, size in enumerate(sizes.tolist()):
        if t > start and filled + size > memory:
            yield slice(start, t)
            start, filled = t, 0
        filled += size
    if len(sizes):
        yield slice(start, len(sizes))


def sample_offsets(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Offset of each token's sample of the vocabulary, (T,) in [0, 1): the same for pairs and for triangles."""
    return torch.rand(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)


def lens_barriers(layer: MoELayer, simplices: torch.Tensor, vocab_sample: int = 0, seed: int = 0, memory: int = MEMORY,
                  tick: Tick = no_tick, sample: Sample | None = None) -> torch.Tensor:
    """Barriers of simplices (M, 2 or 3) under the `lens` readout: `plain_barrier` of each, fast.

    A merge changes only the tokens routed to a member (`Merges`), its pre-activations are weighted sums of its
    members' (`hidden_rows`), and KL needs no more than the change of the logits (`mathx.kl_of_logit_change`).

    Parameters
    ----------
    vocab_sample : outcomes of the vocabulary to sample for each token (`mathx.sample_outcomes`); 0: all, exactly
    seed : of that sample
    memory : bytes that the sweep may take beside the layer
    sample : one that is drawn already

    Returns (M,) float64 on the CPU, nats.
    """
    if sample is None:
        sample = draw_sample(layer, vocab_sample, sample_offsets(layer.x, seed), memory)
    merges = merges_of(layer, simplices)
    total = torch.zeros(len(simplices), dtype=torch.float64)
    for chunk in token_chunks(sweep_bytes(layer, merges, sample), memory * 3 // 4):  # the rest is for one token's work
        few = layer.tokens(chunk), merges.tokens(chunk), sample and Sample(*(part[chunk] for part in sample))
        kl = lens_kl(*few, memory).cpu()
        if not kl.isfinite().all():
            kl = lens_kl(*few, memory, careful=True).cpu()
        total.index_add_(0, merges.touched[chunk].nonzero()[:, 1], kl.double())
        tick(chunk.stop / len(layer.x))
    return total / len(layer.x)


def audit_sample(layer: MoELayer, simplices: torch.Tensor, vocab_sample: int, seed: int = 0, memory: int = MEMORY,
                 size: int = 128) -> torch.Tensor:
    """KL of up to `size` (token, simplex) pairs, (R, 2) float64, nats: as `lens_barriers` estimates it from its sample
    of the vocabulary, and exactly. The tokens are random, each with one random simplex of those that touch it."""
    merges = merges_of(layer, simplices)
    generator = torch.Generator().manual_seed(seed)
    changed = merges.touched.any(1).nonzero().squeeze(1)
    t = changed[torch.randperm(len(changed), generator=generator)[:size]]
    if not len(t):
        return torch.empty(0, 2, dtype=torch.float64)
    merges = merges.tokens(t)
    chosen = torch.multinomial(merges.touched.double(), 1, generator=generator)
    merges = merges._replace(touched=torch.zeros_like(merges.touched).scatter(1, chosen, True))
    offsets, layer = sample_offsets(layer.x, seed)[t], layer.tokens(t)
    estimated = lens_kl(layer, merges, draw_sample(layer, vocab_sample, offsets, memory), memory, careful=True)
    parts = log_readout(layer, memory).split(32), torch.cat(list(lens_moves(layer, merges, memory))).split(32)
    exact = [mathx.kl_of_logit_change(log_p, (moved @ layer.unembedding.T).to(log_p)) for log_p, moved in zip(*parts)]
    return torch.stack((estimated, torch.cat(exact)), dim=1).double().cpu()


def model_barriers(layer: MoELayer, simplices: torch.Tensor, later: Callable[[torch.Tensor], torch.Tensor],
                   tick: Tick = no_tick) -> torch.Tensor:
    """Barriers of simplices (M, 2 or 3) under the `model` readout: the changed stream goes through all later layers.

    `later` maps a whole residual stream (T, d) to what the head reads, (T, d). Returns (M,) float64, nats.
    """
    wide = model_io.widened(layer.x.dtype)
    base = later(layer.y)
    barriers = torch.zeros(len(simplices), dtype=torch.float64)
    for group in torch.arange(len(simplices)).split(64):
        merges = merges_of(layer, simplices[group])
        change = torch.cat(list(merge_change(layer, merges)))
        t, s = merges.touched.nonzero().to(change.device).unbind(1)
        for member, m in enumerate(group.tolist()):
            own = s == member
            moved = later(layer.y.index_add(0, t[own], change[own])) - base
            for features, rows in zip(base.split(256), moved.split(256)):
                log_p = (features @ layer.unembedding.T).to(wide).log_softmax(-1)
                kl = mathx.kl_of_logit_change(log_p, (rows @ layer.unembedding.T).to(wide))
                barriers[m] += kl.double().sum().cpu()
            tick((m + 1) / len(simplices))
    return barriers / len(layer.x)


# ----------------------------------------------------------------------------------- 2 barriers: measure a layer


class Signals(NamedTuple):
    """What was measured on a layer: its plan for any K, order, percentages and weights depends on nothing else.

    frequency   tokens routed to each expert (n,)
    saliency    REAP saliency (n,)
    barriers    of the pairs `mathx.edges(n)` (E,), nats
    candidates  candidate triangles, the members of each ascending (F, 3)
    triplets    their barriers (F,), nats
    audit       sampled and exact KL (R, 2), see `audit_sample`; empty without `vocab_sample`
    """

    frequency: torch.Tensor
    saliency: torch.Tensor
    barriers: torch.Tensor
    candidates: torch.Tensor
    triplets: torch.Tensor
    audit: torch.Tensor = torch.empty(0, 2, dtype=torch.float64)


def measure_layer(layer: MoELayer, settings: Settings = Settings(), memory: int = MEMORY, tick: Tick = no_tick,
                  later: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Signals:
    """Saliency, the barriers of all pairs, and the triplet barriers of the candidate triangles of one layer.

    If there are more candidates than `max_triangles`, they are sampled in saliency order, whatever the order of the
    complex: so one measurement serves every order, and the numbering matters only among experts of equal saliency.
    `later` is what `model_barriers` needs, for the readout of that name. Raises InputError for a result that is not
    finite.
    """
    if settings.readout == "model":
        barriers_of = partial(model_barriers, layer, later=later)
    else:
        sample = draw_sample(layer, settings.vocab_sample, sample_offsets(layer.x, settings.seed), memory)
        barriers_of = partial(lens_barriers, layer, sample=sample, memory=memory)
    n = layer.gates.shape[1]
    pairs = mathx.edges(n)
    share = len(pairs) / (len(pairs) + settings.max_triangles)
    saliency = reap_saliency(layer.experts, layer.x, layer.gates)
    barriers = barriers_of(pairs, tick=lambda done: tick(share * done))

    expert_of = expert_order("saliency", saliency)
    by_saliency = mathx.relabel_edges(barriers, expert_of)
    cliques = mathx.candidate_triangles(n, by_saliency, settings.max_triangles, settings.seed)
    candidates = expert_of[cliques].sort(1).values
    triplets = barriers_of(candidates, tick=lambda done: tick(share + (1 - share) * done))
    if not torch.cat((saliency, barriers, triplets)).isfinite().all():
        raise InputError("a layer's saliencies or barriers are not finite: NaN or infinity in the weights of an "
                         f"expert, or an overflow of {layer.x.dtype}")
    signals = Signals((layer.gates > 0).sum(0).cpu(), saliency, barriers, candidates, triplets)
    if not settings.vocab_sample:
        return signals
    audits = [audit_sample(layer, simplices, settings.vocab_sample, settings.seed, memory)
              for simplices in (pairs, candidates)]
    return signals._replace(audit=torch.cat(audits))


# --------------------------------------------------------------------------- 3 complex, 4 decompose (sections 3.2, 3.3)


def expert_order(order: str, saliency: torch.Tensor) -> torch.Tensor:
    """The experts in the total order that orients the complex (section 3.2), (n,): ascending saliency, index or
    random:SEED.

    The paper fixes any order. It matters: barriers have no sign, so that another order gives the same edges other
    signs, other Hodge parts and other critical edges.
    """
    seed = order_seed(order)
    if seed is not None:
        return torch.randperm(len(saliency), generator=torch.Generator().manual_seed(seed))
    return saliency.sort(stable=True).indices if order == "saliency" else torch.arange(len(saliency))


def in_order(signals: Signals, expert_of: torch.Tensor) -> Signals:
    """The signals by vertex, if vertex r is expert expert_of[r]; the triangles are lexicographic again."""
    n = len(expert_of)
    vertex_of = expert_of.argsort()
    triangles = vertex_of[signals.candidates].sort(1).values
    lexicographic = (triangles @ torch.tensor([n * n, n, 1])).argsort()
    return signals._replace(
        frequency=signals.frequency[expert_of], saliency=signals.saliency[expert_of],
        barriers=mathx.relabel_edges(signals.barriers, expert_of),
        candidates=triangles[lexicographic], triplets=signals.triplets[lexicographic])


def curate_triangles(signals: Signals, thresholds: int) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Stage 2 of the curation (A.9): the candidates with barrier <= tau*, the first of evenly spaced thresholds, from
    the smallest to the largest barrier of edges and candidates, that maximises beta_1 of K_tau.

    Returns (mask of the candidates, tau*, beta_1 at each threshold). K_tau has only the edges up to tau, and the
    triangles whose edges are in; the complex of the decomposition then has all edges, and all candidates up to tau*.
    So its beta_1 is not the curve's at tau*.
    """
    both = torch.cat((signals.barriers, signals.triplets))
    taus = torch.linspace(both.min().item(), both.max().item(), thresholds, dtype=torch.float64)
    curve = mathx.betti_curve(len(signals.frequency), signals.barriers, signals.candidates, signals.triplets, taus)
    tau = taus[curve.argmax()].item()
    return signals.triplets <= tau, tau, curve


class Decomposition(NamedTuple):
    """The mergeability complex of a layer and the Hodge parts of its barriers, by vertex."""

    expert_of: torch.Tensor  # (n,): vertex r is expert expert_of[r]
    signals: Signals
    triangles: torch.Tensor  # of the complex (F, 3): the candidates up to tau*
    triplets: torch.Tensor  # their barriers (F,)
    tau: float  # tau*
    betti_curve: torch.Tensor  # see `curate_triangles`
    d1: torch.Tensor  # (n, E)
    d2: torch.Tensor  # (E, F)
    parts: mathx.HodgeParts


def decompose(signals: Signals, settings: Settings = Settings()) -> Decomposition:
    """Order the experts, build the complex (section 3.2), and decompose the barriers of its edges (section 3.3)."""
    expert_of = expert_order(settings.order, signals.saliency)
    ordered = in_order(signals, expert_of)
    inside, tau, curve = curate_triangles(ordered, settings.thresholds)
    triangles = ordered.candidates[inside]
    d1, d2 = mathx.boundary_matrices(len(expert_of), triangles)
    parts = mathx.hodge_decompose(ordered.barriers, d1, d2)
    return Decomposition(expert_of, ordered, triangles, ordered.triplets[inside], tau, curve, d1, d2, parts)


# ----------------------------------------------------------------------------------- 5 select, 6 redirect (section 4.1)


class Selection(NamedTuple):
    """Which vertices stay, and why."""

    picks: list[int]  # all vertices as picked; the first K survive
    redirect: dict[int, int]  # the target of each dropped vertex
    critical_edges: torch.Tensor  # E* (M, 2)
    critical_triangles: torch.Tensor  # T* (M, 3)


def select(found: Decomposition, keep: int, settings: Settings = Settings()) -> Selection:
    """Cover the harmonic-critical edges E* and the triplet-critical triangles T* greedily (equations 10 and 11);
    redirect the vertices that are dropped.

    The first `keep` picks survive. Triplet barriers enter the objective here; before, they only choose the triangles of
    the complex.
    """
    n, barriers = len(found.expert_of), found.signals.barriers
    floor = 1e-12 * barriers.norm().item()
    harmonic = mathx.critical(found.parts.harmonic.abs(), settings.edge_percent, floor)
    expensive = mathx.critical(found.triplets, settings.triangle_percent, floor)
    edges, triangles = mathx.edges(n)[harmonic], found.triangles[expensive]
    families = [(edges, settings.lambda_edge), (triangles, settings.lambda_triangle)]
    picks = mathx.greedy_cover(found.signals.saliency, families, n)
    redirect = mathx.redirect(picks[:keep], barriers, found.parts.harmonic, settings.alpha)
    return Selection(picks, redirect, edges, triangles)


# ------------------------------------------------------------------------------------------ report (section 3.4; audit)


@dataclass(frozen=True)
class Diagnostics:
    """What the barriers of a layer say (section 3.4), and what the decomposition cannot say (README), by expert."""

    eta: mathx.EnergyFractions  # shares of the barriers' energy (equation 8)
    eta_constant: mathx.EnergyFractions  # of a constant signal on the same complex: what eta is if barriers say nothing
    additive: dict[str, float]  # shares of energy and variance that b_ij ~ phi_i + phi_j explains
    betti_1: int
    betti_curve: list[int]  # beta_1 of K_tau at each threshold
    tau: float
    triangles: int
    candidates: int
    discordance: float  # of the candidates
    discordance_quantiles: list[float]
    critical_edges: list[list[int]]
    critical_triangles: list[list[int]]
    covered_at: dict[str, int]  # picks after which all critical simplices are covered
    retained: dict[str, mathx.Retained]  # shares of each part's energy that survivors retain
    redirect_targets: int  # survivors that any dropped expert is redirected to
    redirect_largest: int  # dropped experts that the busiest of them takes
    mean_barrier: float
    audit: mathx.Shortfall | None  # of a sample of the vocabulary


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer, by expert."""

    survivors: list[int]  # ascending
    order: list[int]  # all experts as picked; the first K survive
    redirect: dict[int, int]  # the target of each dropped expert: recorded, applied by the router `fold` alone
    routed_share: float  # of the tokens' choices of experts, those that fall on survivors
    frequency: list[int]  # tokens routed to each expert
    saliency: list[float]
    diagnostics: Diagnostics | None = None  # None if no barriers were measured


def layer_plan(order: list[int], redirect: dict[int, int], keep: int, frequency: torch.Tensor, saliency: torch.Tensor,
               diagnostics: Diagnostics | None = None) -> LayerPlan:
    """The plan that keeps the first `keep` experts of an order."""
    survivors = sorted(order[:keep])
    share = frequency[survivors].sum() / frequency.sum().clamp(min=1)
    return LayerPlan(survivors, order, dict(sorted(redirect.items())), share.item(), frequency.tolist(),
                     saliency.tolist(), diagnostics)


def diagnose(found: Decomposition, selection: Selection, keep: int, margin: float) -> Diagnostics:
    """All that is reported of a layer's barriers."""
    n, signals = len(found.expert_of), found.signals
    b, picks = signals.barriers, selection.picks
    additive = mathx.additive_model(b, found.d1)
    discordance = mathx.discordance(n, b, signals.candidates, signals.triplets, margin)
    constant = mathx.hodge_decompose(torch.ones_like(b), found.d1, found.d2)
    energies = {name: (part, mathx.edges(n)) for name, part in found.parts._asdict().items()}
    energies["triplet"] = found.triplets, found.triangles
    targets = list(selection.redirect.values())

    def by_expert(simplices: torch.Tensor) -> list[list[int]]:
        return found.expert_of[simplices].sort(-1).values.tolist()
    return Diagnostics(
        eta=mathx.energy_fractions(found.parts),
        eta_constant=mathx.energy_fractions(constant),
        additive={"energy": additive.energy, "variance": additive.variance},
        betti_1=mathx.betti_1(found.d1, found.d2),
        betti_curve=found.betti_curve.tolist(),
        tau=found.tau,
        triangles=len(found.triangles),
        candidates=len(signals.candidates),
        discordance=discordance.fraction,
        discordance_quantiles=discordance.ratio_quantiles,
        critical_edges=by_expert(selection.critical_edges),
        critical_triangles=by_expert(selection.critical_triangles),
        covered_at={"edges": mathx.covered_at(picks, selection.critical_edges),
                    "triangles": mathx.covered_at(picks, selection.critical_triangles)},
        retained={name: mathx.retained(part, simplices, picks[:keep]) for name, (part, simplices) in energies.items()},
        redirect_targets=len({*targets}),
        redirect_largest=max(map(targets.count, targets), default=0),
        mean_barrier=b.mean().item(),
        audit=mathx.shortfall(*signals.audit.unbind(1)) if len(signals.audit) else None)


def report(found: Decomposition, selection: Selection, keep: int, settings: Settings = Settings()) -> LayerPlan:
    """The plan of a layer by expert, with its diagnostics."""
    expert_of = found.expert_of.tolist()
    order = [expert_of[vertex] for vertex in selection.picks]
    redirect = {expert_of[dropped]: expert_of[target] for dropped, target in selection.redirect.items()}
    vertex_of = found.expert_of.argsort()
    frequency, saliency = found.signals.frequency[vertex_of], found.signals.saliency[vertex_of]
    return layer_plan(order, redirect, keep, frequency, saliency, diagnose(found, selection, keep, settings.margin))


def check_survivors(keep: int, n: int) -> None:
    """Raise InputError if a layer has fewer than two experts, or `keep` is not from 1 to their number."""
    if not 1 <= keep <= n or n < 2:
        raise InputError(f"keep {keep}: must be from 1 to the layer's {n} experts, and these at least two")


def plan_from_signals(signals: Signals, keep: int, settings: Settings = Settings()) -> LayerPlan:
    """Decompose, select, report. Raises InputError as `check_survivors` does."""
    check_survivors(keep, len(signals.frequency))
    found = decompose(signals, settings)
    return report(found, select(found, keep, settings), keep, settings)


def plan_layer(layer: MoELayer, keep: int, settings: Settings = Settings()) -> LayerPlan:
    """Plan one MoE layer from tensors in memory: which `keep` experts stay, and the redirect target of each other one.

    Raises InputError for barriers that are not finite, if `keep` is not from 1 to n, and for a readout but `lens`.
    """
    check_survivors(keep, layer.gates.shape[1])
    if settings.readout != "lens":
        raise InputError(f"readout {settings.readout}: needs the later layers; a layer by itself has the readout lens")
    return plan_from_signals(measure_layer(layer, settings), keep, settings)


# ------------------------------------------------------------------------------------------------- the whole model


def calibration_ids(model: Model, files: Sequence[Path] = (), tokens: int = TOKENS, seq_len: int = SEQ_LEN,
                    seed: int = 0) -> torch.Tensor:
    """Sequences (tokens // seq_len, seq_len) sampled from text files, or from Python's documentation if there are none.
    Fewer, with a warning, if the text is short.

    Raises InputError for a number out of range, and for a text that cannot be read or has not one whole sequence.
    """
    read = partial(model_io.read_documents, files) if files else partial(model_io.python_documentation, "calibration")
    return sample_ids(model, read, tokens, seq_len, seed)


def sample_ids(model: Model, read: Callable[[], Sequence[str]], tokens: int, seq_len: int, seed: int) -> torch.Tensor:
    """Sequences (tokens // seq_len, seq_len) sampled from the documents that `read` gives. Raises InputError as
    `calibration_ids` does."""
    check_range("tokens", tokens, 2, 10**9)
    check_range("seq_len", seq_len, 2, tokens)
    check_range("seed", seed, 0, 2**63 - 1)
    ids = model_io.sequences(model.encode(read()), seq_len, tokens // seq_len, seed)
    if len(ids) < tokens // seq_len:
        log.warning("the text has only %d tokens in whole sequences, all used; %d were asked", ids.numel(), tokens)
    return ids


def sparse_layers(model: Model) -> list[int]:
    """Indices of the layers that have a router. Raises InputError if there is none, or no two experts."""
    found = [i for i, name in enumerate(model.layer_names) if f"{name}.mlp.gate.weight" in model.checkpoint.tensors]
    if not found or model.config.num_experts < 2:
        raise InputError(f"{model.checkpoint.path}: no layer has a router over two experts or more; it is dense")
    return found


def check_keep(model: Model, keep: int) -> None:
    """Raise InputError for a dense model, and if not every layer can keep `keep` experts."""
    cfg = model.config
    if sparse_layers(model) and not cfg.top_k <= keep <= cfg.num_experts:
        raise InputError(f"keep {keep}: the model has {cfg.num_experts} experts and routes each token to {cfg.top_k}; "
                         f"must be from {cfg.top_k} to {cfg.num_experts}")


def available_memory(device: torch.device) -> int:
    """Free bytes of the device that a model lives on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def end_of_model(model: Model, ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    """later(y, index, norm): what the head reads if the stream after layer `index` is y (T, d). Loads every layer.

    Raises InputError if they do not fit in memory, and in bfloat16, which loses the small difference of two streams.
    """
    if model.dtype == torch.bfloat16:
        raise InputError("readout model: compares streams that bfloat16 cannot tell apart; use the dtype float32")
    needed = sum(math.prod(info.shape) for info in model.checkpoint.tensors.values()) * model.dtype.itemsize
    free = available_memory(model.device)
    if needed > free:
        raise InputError(f"readout model: needs {needed / 1e9:.1f} GB of memory for all layers, {free / 1e9:.1f} GB "
                         "are free; use the readout lens")
    layers = [model.layer(index) for index in range(model.config.num_layers)]

    def later(y: torch.Tensor, index: int, norm: Callable) -> torch.Tensor:
        for layer in layers[index + 1:]:
            y = model_io.run_layer(y.view(*ids.shape, -1), layer, model.config)[2]
        return norm(y)
    return later


def measure_model(model: Model, ids: torch.Tensor, settings: Settings, layers: Sequence[int],
                  cache: Path | None = None, memory: int = MEMORY, tick: Tick = no_tick
                  ) -> Iterator[tuple[int, Signals]]:
    """Signals of the given layers (ascending indices), from the cache or from one forward pass over ids (B, L).

    What is measured goes into the cache as soon as it is done. The pass stops at the last layer that needs it. Raises
    InputError as `end_of_model` does.
    """
    key = cache_key(model, ids, settings) if cache else {}
    stream, head, later = model.stream(ids), None, None
    for number, index in enumerate(layers):
        name = model.layer_names[index]
        tensors = read_entry(cache, name, key, Signals._fields) if cache else None
        if tensors:
            yield index, Signals(**tensors)
            continue
        if head is None:
            later = end_of_model(model, ids) if settings.readout == "model" else None
            head = model.unembedding()
            if cache:
                make_cache(cache)
        step = next(step for step in stream if step.index == index)
        layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, step.norm, head)
        signals = measure_layer(layer, settings, memory, lambda done: tick((number + done) / len(layers)),
                                later and partial(later, index=index, norm=step.norm))
        del step, layer
        if cache:
            write_entry(cache, name, signals._asdict(), key)
        yield index, signals


def plan_model(model: Model, ids: torch.Tensor, keep: int, settings: Settings = Settings(), cache: Path | None = None,
               memory: int = MEMORY, tick: Tick = no_tick) -> Iterator[tuple[str, LayerPlan]]:
    """(name, plan) of each sparse layer, from calibration on ids (B, L). Raises InputError as its parts do."""
    check_keep(model, keep)
    for index, signals in measure_model(model, ids, settings, sparse_layers(model), cache, memory, tick):
        yield model.layer_names[index], plan_from_signals(signals, keep, settings)


# ----------------------------------------------------------------------------------------------- barriers on disk


def text_hash(ids: torch.Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def cache_key(model: Model, ids: torch.Tensor, settings: Settings) -> dict[str, str]:
    """All that a layer's signals depend on, by name: content alone, so that copies of a checkpoint share a cache."""
    key = {"format": CACHE_VERSION, "weights": model.checkpoint.fingerprint(),
           "calibration text": f"{[*ids.shape]} {text_hash(ids)}", "dtype": str(model.dtype)}
    measured = ("readout", "vocab_sample", "max_triangles", "seed")
    return key | {name.replace("_", " "): str(getattr(settings, name)) for name in measured}


def cache_file(cache: Path, name: str, key: dict[str, str]) -> Path:
    """The file of an entry: other settings have other files, so that a quick run never overwrites a long one's."""
    return cache / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}.safetensors"


def read_entry(cache: Path, name: str, key: dict[str, str], fields: Sequence[str]) -> dict[str, torch.Tensor] | None:
    """Return the cached tensors, or None if the entry is missing, damaged or stale; warn if damaged or stale."""
    file = cache_file(cache, name, key)
    if not file.is_file():
        others = (path for path in cache.glob(f"{name}-*.safetensors") if path.is_file())
        file = max(others, key=os.path.getmtime, default=None)
    if file is None:
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
            stale = [part for part in key if found.get(part) != key[part]]
            tensors = {} if stale else {field: opened.get_tensor(field).clone() for field in opened.keys()}
    except (OSError, safetensors.SafetensorError) as err:
        log.warning("%s: damaged (%s); doing it again", file, err)
        return None
    if stale:
        log.warning("%s: made with other %s; doing it again", file, ", ".join(stale))
    elif tensors.keys() != {*fields} or found.get("sha256") != digest(tensors):
        log.warning("%s: damaged (its hash differs); doing it again", file)
    else:
        return tensors
    return None


def write_entry(cache: Path, name: str, tensors: dict[str, torch.Tensor], key: dict[str, str]) -> None:
    """Write a cache file, whole or not at all. Raises OSError if the disk is full."""
    tensors = {field: tensor.cpu().contiguous() for field, tensor in tensors.items()}
    file = cache_file(cache, name, key)
    try:
        with model_io.new_file(file) as beside:
            safetensors.torch.save_file(tensors, beside, key | {"sha256": digest(tensors)})
    except safetensors.SafetensorError as err:
        number = int(re.search(r"\(os error (\d+)\)|$", str(err))[1] or errno.EIO)
        raise OSError(number, os.strerror(number), str(file)) from None


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def make_cache(cache: Path) -> None:
    """Make the folder of the cache. Raises InputError if it cannot be made or written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"cache {cache}: cannot be made ({err.strerror}); name another folder") from None
    if not os.access(cache, os.W_OK | os.X_OK):
        raise InputError(f"cache {cache}: cannot be written to; name another folder")


# ---------------------------------------------------------------------------------------- the record and the export


def to_json(value: object, indent: str = "\n") -> str:
    """JSON for people: a container of numbers, or of lists of numbers, on one line. NamedTuples and dataclasses are
    objects. Raises ValueError for NaN and infinity.

    >>> print(to_json({"a": [1, 2], "b": {"c": "x"}}))
    {
     "a": [1, 2],
     "b": {
      "c": "x"
     }
    }
    """
    if dataclasses.is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()

    def plain(item: object) -> bool:
        return isinstance(item, (int, float)) or isinstance(item, list) and all(map(plain, item))
    if all(map(plain, items)):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        rows = [f"{json.dumps(str(name))}: {to_json(item, indent + ' ')}" for name, item in value.items()]
    else:
        rows = [to_json(item, indent + " ") for item in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return first + ",".join(f"{indent} {row}" for row in rows) + indent + last


def describe(model: Model) -> dict:
    """What a record says of a checkpoint that was read."""
    cfg = model.config
    return {"name": Path(os.path.abspath(model.checkpoint.path)).name, "model_type": cfg.model_type,
            "num_experts": cfg.num_experts, "top_k": cfg.top_k, "fingerprint": model.checkpoint.fingerprint()}


def describe_text(ids: torch.Tensor, files: Sequence[Path] | None = None) -> dict:
    """What a record says of a calibration text: ids (B, L) of these files, of Python's documentation if there are none,
    or of unknown origin."""
    names = "token ids" if files is None else [Path(file).name for file in files] or "python documentation"
    return {"tokens": ids.numel(), "seq_len": ids.shape[1], "text_sha256": text_hash(ids), "text": names}


def read_history(path: Path) -> list[dict]:
    """The history in a record, oldest entry first. Raises InputError if the file is no such record."""
    record = model_io.read_json(path)
    history = record.get("history")
    if record.get("schema_version") != SCHEMA_VERSION or not isinstance(history, list):
        raise InputError(f"{path}: not a record of schema_version {SCHEMA_VERSION} with a history")
    return history


def history_of(checkpoint: model_io.Checkpoint) -> list[dict]:
    """The history in a checkpoint's record; empty if it has none. Raises InputError as `read_history` does."""
    path = checkpoint.path / RECORD
    return read_history(path) if path.exists() else []


def record_bytes(checkpoint: model_io.Checkpoint, entry: dict) -> bytes:
    """The content of hodgecover.json: the input's record, if it has one, with one more entry in its history.

    Raises InputError if the input's file of that name is no record.
    """
    record = {"schema_version": SCHEMA_VERSION,
              "history": [*history_of(checkpoint), {"version": __version__} | entry]}
    return (to_json(record) + "\n").encode()


def layer_entries(model: Model, plans: dict[str, LayerPlan]) -> list[dict]:
    """The plans by layer name as a record's list of layers."""
    return [{"layer": model.layer_names.index(name), "name": name} | vars(plan) for name, plan in plans.items()]


def fold_bytes(model: Model, plans: dict[str, LayerPlan]) -> bytes:
    """What the router `fold` needs beside the survivors (section 4.1): p'_j = p_j + sum of p_i over pi(i) = j.

    Ours: probabilities are folded, where the paper says logits. Loaders that ignore the file give the router `drop`.
    """
    tensors = {}
    for name, plan in plans.items():
        slots = [plan.survivors.index(target) for target in plan.redirect.values()]
        tensors[f"{name}.dropped_rows"] = model.checkpoint.load(f"{name}.mlp.gate.weight")[list(plan.redirect)]
        tensors[f"{name}.slots"] = torch.tensor(slots, dtype=torch.int64)
    return safetensors.torch.save(tensors)


def folded_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """A checkpoint written with the router `fold`, run as one: the gate mass of dropped experts goes to their redirect
    targets before the top-k. Raises InputError if it was written without."""
    file = Path(path) / FOLD
    try:
        tensors = safetensors.torch.load_file(file)
        names = {name.removesuffix(".slots") for name in tensors if name.endswith(".slots")}
        folds = {name: (tensors[f"{name}.dropped_rows"], tensors[f"{name}.slots"]) for name in names}
    except (OSError, KeyError, safetensors.SafetensorError) as err:
        raise InputError(f"{file}: cannot be read ({err}); write the checkpoint with the router fold") from None
    return Model(path, dtype, device, folds)


def export(model: Model, plans: dict[str, LayerPlan], out: Path, entry: dict, router: str = "drop") -> None:
    """Write the checkpoint that keeps the survivors of plans by layer name, and its record, to the folder `out`."""
    files = {RECORD: record_bytes(model.checkpoint, entry)}
    if router == "fold":
        files[FOLD] = fold_bytes(model, plans)
    survivors = {name: plan.survivors for name, plan in plans.items()}
    model_io.write_checkpoint(model.checkpoint, out, survivors, files, notice=NOTICE)


def compress(model: Model, ids: torch.Tensor, keep: int, out: str | os.PathLike, settings: Settings = Settings(),
             cache: str | os.PathLike | None = None, memory: int = MEMORY) -> dict[str, LayerPlan]:
    """Plan a checkpoint on the calibration tokens ids (B, L), and write it with `keep` experts a layer to `out`.

    Without a `cache` folder no barriers are kept. Returns the plans by layer name. Raises InputError if something
    given is wrong; then nothing is written.
    """
    out, cache = Path(out), Path(cache) if cache else None
    if cache:
        refuse_inside(model, cache, "cache")
    check_out(model, out, cache)
    plans = dict(plan_model(model, ids, keep, settings, cache, memory))
    export(model, plans, out, plan_entry(model, plans, keep, settings, describe_text(ids)), settings.router)
    return plans


def plan_entry(model: Model, plans: dict[str, LayerPlan], keep: int, settings: Settings, text: dict,
               command: str = "hodgecover.py", **more: object) -> dict:
    """The entry of a record's history that holds a plan."""
    said = {"keep": keep, **more} | dataclasses.asdict(settings) | {"dtype": str(model.dtype).removeprefix("torch.")}
    entry = {"command": command, "settings": said | text, "source": describe(model),
             "layers": layer_entries(model, plans)}
    return entry | {"sha256": entry_hash(entry)}


def entry_hash(entry: dict) -> str:
    """SHA-256 of a plan's settings and layers: it tells a plan that was edited by hand."""
    return hashlib.sha256(to_json([entry["settings"], entry["layers"]]).encode()).hexdigest()


def refuse_inside(model: Model, path: Path, parameter: str) -> None:
    """Raise InputError for a path in the checkpoint's folder."""
    if model.checkpoint.path.resolve() in (path.resolve(), *path.resolve().parents):
        raise InputError(f"{parameter} {path}: lies in the checkpoint, which is never written to; name another")


def refuse_fold(model: Model) -> None:
    """Raise InputError for a checkpoint with a fold, which a plain Model does not apply and an output would lose."""
    path = model.checkpoint.path
    if (path / FOLD).exists():
        raise InputError(f"{path}: has the router fold, which this command does not know; use one with the router drop")


def check_out(model: Model, out: Path, cache: Path | None = None, plan: bool = False) -> None:
    """Raise InputError if an output folder, or a plan's file, lies in the checkpoint or around the cache, or cannot be
    made, and if the checkpoint has a fold, or a record that cannot be continued."""
    refuse_fold(model)
    history_of(model.checkpoint)
    refuse_inside(model, out, "out")
    if cache and out.resolve() in (cache.resolve(), *cache.resolve().parents):
        raise InputError(f"out {out}: would hold the cache {cache}; name another")
    model_io.check_new(out)
    if plan and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"out {out}: a plan is a file in a folder that is there; name another")


# ------------------------------------------------------------------------------------------------ the command line


LAYER_HEAD = (
    "layer  eta: gradient  curl           harmonic       additive residual  beta_1    F  discordance  covered at  "
    "redirect  routed to\n"
    "       (in brackets: of a constant signal)          energy  variance                              E*   T*    "
    "targets   survivors")


def layer_line(index: int, plan: LayerPlan) -> str:
    """One line of a layer's diagnostics, under LAYER_HEAD."""
    found = plan.diagnostics
    eta = "  ".join(f"{share:.3f} ({constant:.3f})" for share, constant in zip(found.eta, found.eta_constant))
    residual = f"{1 - found.additive['energy']:6.2%}  {1 - found.additive['variance']:8.2%}"
    covered = f"{found.covered_at['edges']:3d}  {found.covered_at['triangles']:3d}"
    targets = f"{found.redirect_targets} ({found.redirect_largest})"
    return (f"{index:5d}  {eta}  {residual}   {found.betti_1:6d} {found.triangles:4d}  {found.discordance:11.1%}  "
            f"{covered}   {targets:8}  {plan.routed_share:9.1%}")


def audit_line(audits: list[mathx.Shortfall], outcomes: int) -> str:
    """One line on what a sample of the vocabulary left out."""
    pairs = sum(audit.pairs for audit in audits)
    mean = sum(audit.shortfall for audit in audits) / len(audits)
    return (f"samples of {outcomes} outcomes, audited on {pairs} (token, simplex) pairs: barriers fall short by "
            f"{mean:.2%} on average, one is off by {max(audit.largest for audit in audits):.1%} at most, "
            f"rank correlation at least {min(audit.rank_correlation for audit in audits):.4f}")


def progress_bar() -> Callable[[float | None], None]:
    """A function that shows the share of the work done and the time left on stderr; None clears the line.

    On a terminal the line is redrawn twice a second; elsewhere a line is printed twice a minute.
    """
    terminal, shown = sys.stderr.isatty(), time.monotonic()
    started = origin = None  # time and share at the first call: earlier work was in the cache

    def bar(done: float | None) -> None:
        nonlocal shown, started, origin
        if done is None:
            if terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if started is None:
            started, origin = now, done
        if done > origin and now - shown >= (0.5 if terminal else 30):
            left = timedelta(seconds=round((now - started) * (1 - done) / (done - origin)))
            line = f"{done:4.0%} done, {left} left"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
            shown = now
    return bar


class Stderr(logging.Handler):
    """Messages as single lines on stderr, whatever a stranger's file names have in them."""

    def __init__(self, program: str):
        super().__init__()
        self.program = program

    def emit(self, record: logging.LogRecord) -> None:
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.getMessage())
        print(f"{self.program}: {message}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of printing its usage, so that every error takes the same path."""

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the options)")

    def options(self) -> dict[str, str]:
        """Each parameter's option, as in seq_len: --seq-len."""
        return {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}


def add_text_options(parser: argparse._ActionsContainer, tokens: int = TOKENS, use: str = "calibration") -> None:
    """The options that choose calibration text, or text of another use, the same in every command."""
    parser.add_argument("--calib", metavar="FILE", type=Path, nargs="+", default=[], help=f"{use} text: UTF-8, or "
                        ".jsonl with a text field on each line [Python's own documentation]")
    parser.add_argument("--tokens", metavar="T", type=int, default=tokens, help=f"{use} tokens [%(default)s]")
    parser.add_argument("--seq-len", metavar="L", type=int, default=SEQ_LEN, help="tokens per sequence [%(default)s]")


def add_resource_options(parser: argparse._ActionsContainer, seed: bool = True, memory: bool = True) -> None:
    """The options that say where and how to compute, the same in every command; without a seed or a limit of memory in
    one that has no use for it."""
    if seed:
        parser.add_argument("--seed", metavar="S", type=int, default=0, help="seed of every random choice: samples of "
                            "text, of triangles, of the vocabulary and its audit [0]")
    if memory:
        parser.add_argument("--memory", metavar="SIZE", type=byte_count, default=MEMORY, help="buffers, beside one "
                            "layer's weights and the head [1GB]")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
                        help="of the products; auto: bfloat16 if the processor multiplies it, else float32")
    parser.add_argument("--device", type=device_of, default="cpu", help="any device of torch; only cpu is tested [cpu]")


def command_line() -> Parser:
    """The parser of this command."""
    default = Settings()
    parser = Parser(prog="hodgecover.py", description="Compress a sparse MoE checkpoint to K experts a layer, without "
                    "training. Defaults in brackets.")
    parser.add_argument("--version", action="version", version=f"hodgecover {__version__}")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder with config.json, safetensors weights "
                        "and tokenizer.json")

    basic = parser.add_argument_group("what people need")
    basic.add_argument("--keep", metavar="K", type=int, help="experts to keep in every layer")
    basic.add_argument("--out", metavar="DIR", type=Path, help="output folder [CKPT-keepK beside CKPT]; with "
                       "--plan-only the output file [CKPT-keepK.json]")
    add_text_options(basic)
    basic.add_argument("--eval", metavar="FILE", type=Path, help="perplexity of source and output on this text, and "
                       "their KL")
    basic.add_argument("--vocab-sample", metavar="N", type=int, default=default.vocab_sample, help="read each token "
                       "out on a weighted sample of N of the vocabulary, and audit that; 0: on all of it [%(default)s]")
    basic.add_argument("--plan-only", action="store_true", help="write the plan alone, as a file")

    method = parser.add_argument_group("the method's choices")
    for name, choices in CHOICES.items():
        method.add_argument(f"--{name}", choices=choices, default=getattr(default, name), help=HELP[name])
    for name, (metavar, kind) in CONSTANTS.items():
        method.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, default=getattr(default, name),
                            help=HELP[name])

    resources = parser.add_argument_group("resources")
    add_resource_options(resources)
    resources.add_argument("--cache", metavar="DIR", type=Path, help="folder of each layer's barriers, read and "
                           "written [CKPT-barriers beside CKPT]")
    resources.add_argument("--layers", metavar="A-B", type=layer_range, help="only measure these layers, into the "
                           "cache")
    return parser


CONSTANTS = {"order": ("ORDER", str), "edge_percent": ("PERCENT", float), "triangle_percent": ("PERCENT", float),
             "lambda_edge": ("WEIGHT", float), "lambda_triangle": ("WEIGHT", float), "alpha": ("WEIGHT", float),
             "max_triangles": ("N", int)}
HELP = {"readout": "measure barriers at the layer's own next-token distribution, or end to end, which is far more "
                   "expensive [%(default)s]",
        "router": "renormalise over the survivors, or fold a dropped expert's gate mass into its redirect target "
                  "[%(default)s]",
        "order": "total order of the experts that orients the complex: saliency, index or random:SEED [%(default)s]",
        "edge_percent": "harmonic-critical edges [%(default)s]",
        "triangle_percent": "triplet-critical triangles [%(default)s]",
        "lambda_edge": "weight of covered edges [%(default)s]",
        "lambda_triangle": "weight of covered triangles [%(default)s]",
        "alpha": "harmonic penalty of the redirect [%(default)s]",
        "max_triangles": "candidate triangles [%(default)s]"}
MEASURES = {"checkpoint", "layers", "calib", "tokens", "seq_len", "readout", "max_triangles", "vocab_sample", "seed",
            "memory", "dtype", "device", "cache"}  # what --layers depends on


def byte_count(text: str) -> int:
    """1GB, 500MB or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(|MB|GB)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: must be a size such as 1GB or 500MB")
    size = int(float(match[1]) * {"": 1, "MB": 10**6, "GB": 10**9}[match[2]])
    if size < 10**7:
        raise argparse.ArgumentTypeError(f"{text}: must be 10MB or more")
    return size


def layer_range(text: str) -> range:
    """3, or 0-7."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: must be a layer or a range of layers such as 0-7")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def device_of(text: str) -> str:
    """A device that this torch can compute on."""
    try:
        torch.ones(1, device=text).sum().item()
    except (RuntimeError, AssertionError, ValueError) as err:
        raise argparse.ArgumentTypeError(f"{text}: this torch cannot use it ({str(err).splitlines()[0]}); use cpu")
    return text


def choose_dtype(name: str, device: str, readout: str = "lens") -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 if the device has instructions for its products, but never for the
    `model` readout, and float32 otherwise."""
    if name != "auto":
        return getattr(torch, name)
    able = torch.cpu.get_capabilities() if device.startswith("cpu") else {}
    native = device.startswith("cuda") or any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native and readout == "lens" else torch.float32


def measure_only(model: Model, args: argparse.Namespace, settings: Settings, cache: Path) -> None:
    """--layers: put the barriers of these layers into the cache."""
    layers = [index for index in sparse_layers(model) if index in args.layers]
    if args.layers[-1] >= len(model.layer_names) or not layers:
        raise InputError(f"layers {args.layers[0]}-{args.layers[-1]}: the model has layers 0 to "
                         f"{len(model.layer_names) - 1}, of which with experts: {sparse_layers(model)}")
    ids = calibration_ids(model, args.calib, args.tokens, args.seq_len, settings.seed)
    bar = progress_bar()
    for index, _ in measure_model(model, ids, settings, layers, cache, args.memory, bar):
        bar(None)
        print(f"layer {index}: barriers in {cache}", flush=True)


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together: none is ignored."""
    parser = command_line()
    if args.layers is not None:
        for name, value in vars(args).items():
            if name not in MEASURES and value != parser.get_default(name):
                raise InputError(f"{name}: does not go with --layers, which only measures barriers")
    elif args.keep is None:
        raise InputError("keep: missing; give the number of experts to keep, or --layers A-B to measure barriers only")
    if args.plan_only and args.eval:
        raise InputError("eval: does not go with --plan-only, which writes no checkpoint")
    if args.readout == "model" and args.memory != MEMORY:
        raise InputError("memory: goes with --readout lens; the readout model holds every layer")


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)
                           if hasattr(args, field.name)})
    source = Path(os.path.abspath(args.checkpoint))
    dtype = choose_dtype(args.dtype, args.device, settings.readout)
    model = Model(args.checkpoint, dtype, args.device)
    cache = args.cache or source.with_name(f"{source.name}-barriers")
    refuse_inside(model, cache, "cache")
    if args.layers is not None:
        return measure_only(model, args, settings, cache)

    check_keep(model, args.keep)
    name = f"{source.name}-keep{args.keep}" + (".json" if args.plan_only else "")
    out = Path(os.path.abspath(args.out)) if args.out else source.with_name(name)
    check_out(model, out, cache, args.plan_only)
    held_out = None
    if args.eval:
        held_out = model_io.sequences(model.encode(model_io.read_documents([args.eval])), args.seq_len)
        model.unembedding()  # refused now rather than after the work
    ids = calibration_ids(model, args.calib, args.tokens, args.seq_len, settings.seed)
    bar = progress_bar()
    planning = plan_model(model, ids, args.keep, settings, cache, args.memory, bar)
    plans = show_plans(model, planning, bar, settings.vocab_sample)
    entry = plan_entry(model, plans, args.keep, settings, describe_text(ids, args.calib))
    if args.plan_only:
        model_io.write_whole(out, record_bytes(model.checkpoint, entry))
        print(f"plan: {out}")
        return
    export(model, plans, out, entry, settings.router)
    output = (folded_model if settings.router == "fold" else Model)(out, dtype, args.device)
    before, after = weight_bytes(model), weight_bytes(output)
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%})")
    if held_out is not None:
        found = model_io.compare(model, output, held_out)
        print(f"perplexity: {found.source_perplexity:.2f} -> {found.output_perplexity:.2f}, KL(source || output) "
              f"{found.kl:.4f} nats a token ({held_out.numel():,} tokens of {args.eval.name})")
    print(f"output: {out}")


def show_plans(model: Model, plans: Iterator[tuple[str, LayerPlan]], bar: Callable[[float | None], None],
               vocab_sample: int) -> dict[str, LayerPlan]:
    """Print a line for each layer as its plan is made; return the plans by layer name."""
    found = {}
    for name, plan in plans:
        bar(None)
        if not found:
            print(LAYER_HEAD)
        print(layer_line(model.layer_names.index(name), plan), flush=True)
        found[name] = plan
    audits = [plan.diagnostics.audit for plan in found.values() if plan.diagnostics.audit]
    if audits:
        print(audit_line(audits, vocab_sample))
    return found


def weight_bytes(model: Model) -> int:
    """Size of a checkpoint's weight files, that of the router `fold` among them."""
    folder, fold = model.checkpoint.path, [FOLD] if model.folds else []
    return sum((folder / file).stat().st_size for file in [*model.checkpoint.metadata, *fold])


def run_command(parser: Parser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or after one line on stderr 2, or 130 for an interrupt.

    Errors name a parameter first, and here its option.
    """
    handler = Stderr(parser.prog)
    log.addHandler(handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks
    try:
        work(parser.parse_args(argv))
    except InputError as err:
        parameter = re.match(r"\w+", str(err))
        option = parser.options().get(parameter[0]) if parameter else None
        log.error("error: %s", option + str(err)[parameter.end():] if option else err)
        return 2
    except OSError as err:  # a disk that is full, a folder that vanished
        log.error("error: %s: %s; the output is whole or absent", err.filename or "writing", err.strerror or err)
        return 2
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(err):
            raise
        log.error("error: out of memory; examples/estimate.py says what is needed; give less to buffers, as in "
                  "--memory 200MB")
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; the output is absent, and a cache keeps the layers that are done")
        return 130
    finally:
        log.removeHandler(handler)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(command_line(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
