# SPDX-License-Identifier: MIT
"""HodgeCover (arXiv 2605.13997): compress a sparse Mixture-of-Experts checkpoint without training.

    python hodgecover.py examples/tiny-olmoe --keep 32

The file follows the paper: calibrate, barriers, complex, Hodge decomposition, cover, redirect, export; then the
command line. `plan_layer` does one layer in memory, for people with model code of their own.

Shapes: T calibration tokens, hidden size d, n experts of width f, vocabulary V, M simplices of 2 or 3 experts.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to say of an interrupt while torch is imported

import safetensors.torch
import torch

if __package__:
    from . import mathx, model_io
    from .model_io import Experts, InputError, LayerPass, Model
else:
    import mathx
    import model_io
    from model_io import Experts, InputError, LayerPass, Model

__version__ = "0.1.0"

SCHEMA_VERSION, CACHE_VERSION = 1, "2"
TOKENS, SEQ_LEN = 2048, 512  # default calibration sample
MEMORY = 10**9  # bytes that the barrier sweep may take beside the layer's weights and the head
CACHE_BYTES = 1 << 21  # what its innermost step works on: a block of logits that a processor's cache holds
BASE_MEMORY = 4e8  # of a process that has imported torch
RIDGE, SWEEPS = 0.3, 3  # of the refit
PIECE = 4096  # rows of its activations that it takes at a time

Tick = Callable[[float], None]  # told the share of the work that is done
Readout = Callable[..., torch.Tensor]  # (experts, x, gates, y, simplices, tick=...) -> barriers (M,)


@dataclass(frozen=True)
class Settings:
    """Every choice of the method. The paper names these quantities; the values are ours (README)."""

    method: str = "hodgecover"
    readout: str = "lens"
    order: str = "saliency"
    router: str = "drop"
    edge_percent: float = 5.0
    triangle_percent: float = 5.0
    lambda_edge: float = 1.0
    lambda_triangle: float = 1.0
    alpha: float = 1.0
    max_triangles: int = 500
    vocab_sample: int = 0
    thresholds: int = 80
    margin: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if re.sub(r":\d{1,18}$", ":SEED", getattr(self, name)) not in choices:
                raise InputError(f"--{name} {getattr(self, name)}: must be {' or '.join(choices)}")
        for name, (low, high) in RANGES.items():
            check_range(name, getattr(self, name), low, high)
        if self.vocab_sample and self.readout != "lens":
            raise InputError("--vocab-sample goes with --readout lens alone")


METHODS = ("hodgecover", "random", "frequency", "reap", "greedy-barrier", "triplet-penalty", "triplet-hypergraph",
           "hodge-no-triangle", "additive-residual")
NO_BARRIERS = ("random", "frequency", "reap")
BY_SCORE = (*NO_BARRIERS, "greedy-barrier")
CHOICES = {"method": METHODS, "readout": ("lens", "model"), "order": ("saliency", "index", "random:SEED"),
           "router": ("drop", "fold")}
RANGES = {"edge_percent": (0, 100), "triangle_percent": (0, 100), "lambda_edge": (0, math.inf),
          "lambda_triangle": (0, math.inf), "alpha": (0, math.inf), "max_triangles": (0, math.inf),
          "vocab_sample": (0, math.inf), "thresholds": (2, math.inf), "margin": (0, math.inf), "seed": (0, 2**63 - 1)}
EXCLUDES = {"keep": ("expert_rate", "plan", "layers"), "expert_rate": ("plan", "layers"), "total_rate": ("nm",),
            "plan": ("layers", "plan_only", "total_rate", "nm", "refit"), "plan_only": ("eval", "refit"),
            "layers": ("plan_only", "eval", "total_rate", "nm", "refit"), "estimate": ("plan", "layers")}


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises InputError for an option that is no finite number from low to high."""
    if not low <= value <= high or value == math.inf:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be "
                         + (f"from {low} to {high}" if high < math.inf else f"a finite number, at least {low}"))


# ---------------------------------------------------------------------------------------------------------- 1 calibrate


def reap_saliency(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """REAP output saliency (arXiv 2510.13999): the mean over the tokens routed to e of g_e |E_e(x)|, normalised
    to sum 1 over the layer. x (T, d), gates (T, n) -> (n,) float64."""
    saliency = torch.zeros(gates.shape[1], dtype=torch.float64)
    for e in range(len(saliency)):
        t = gates[:, e].nonzero().squeeze(1)
        if len(t):
            saliency[e] = (gates[t, e].double() * experts(e, x[t]).double().norm(dim=1)).mean()
    return saliency / saliency.sum().clamp(min=torch.finfo(torch.float64).tiny)


# --------------------------------------------------------------------------------- 2 barriers (paper section 3.1, A.10)


def merge_weights(simplices: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """w_e = f_e / sum_S f for the members of each simplex, the plain mean when all f_e are 0 (appendix A.10).

    simplices (M, 2 or 3), frequency (n,) -> (M, 2 or 3) float64, rows summing to 1.
    """
    f = frequency.double()[simplices]
    total = f.sum(1, keepdim=True)
    return torch.where(total > 0, f / total.clamp(min=1), 1 / f.shape[1])


def touched(gates: torch.Tensor, simplices: torch.Tensor) -> torch.Tensor:
    """(T, M) bool: whether token t is routed to a member of simplex s; nothing changes where it is not."""
    routed = gates > 0
    hit = routed[:, simplices[:, 0]]
    for member in simplices.T[1:]:
        hit |= routed[:, member]
    return hit


def merge_change(experts: Experts, x: torch.Tensor, gates: torch.Tensor, simplices: torch.Tensor,
                 weights: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Change of the layer's output at token t[r] when simplex s[r] is merged (paper section 3.1), (R, d):

        (sum_S g_e) E_S(x) - sum_S g_e E_e(x) = sum_{e in S} D_e ( w_e (sum_S g) h_S - g_e h_e ),

    h = silu(gate x) * (up x). The projections are linear in the weights, so a merged expert's pre-activations are
    the weighted sum of its members', each computed once a token, and no merged matrix is formed.

    x (T, d), gates (T, n), simplices and weights (M, 2 or 3), t and s (R,) -> (R, d).
    """
    gate, up = (torch.stack([x @ one.to(x).T for one in part], 1) for part in (experts.gate, experts.up))  # (T, n, f)
    members, w = simplices[s], weights[s].to(x)
    g = gates[t[:, None], members]

    def merged(activation: torch.Tensor) -> torch.Tensor:
        return sum(w[:, c, None] * activation[t, members[:, c]] for c in range(members.shape[1]))
    hidden = torch.nn.functional.silu(merged(gate)) * merged(up) * g.sum(1, keepdim=True)
    own = torch.nn.functional.silu(gate) * up * gates[:, :, None]
    change = x.new_zeros(len(t), x.shape[1])
    for e, down in enumerate(experts.down):
        r, c = (members == e).nonzero().unbind(1)
        if len(r):
            rows = w[r, c, None] * hidden[r] - own[t[r], e]
            padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(r) % 256))  # torch keeps 0.3 MB a shape of product
            change.index_add_(0, r, (padded @ down.to(x).T)[:len(r)])
    return change


def sweep_bytes(experts: Experts, size: int, hit: torch.Tensor, vocab: int) -> torch.Tensor:
    """What one step of the sweep takes for each token, (T,) bytes: the hidden activations and the change of its
    touched simplices, the pre-activations of all experts, in numbers of `size` bytes; its distribution over the
    vocabulary in float32."""
    n, f, d = experts.gate.shape
    return hit.sum(1) * (size * (5 * f + d) + 64) + 5 * size * n * f + 40 * vocab


def token_chunks(sizes: torch.Tensor, memory: int) -> Iterator[slice]:
    """Consecutive runs of tokens of `memory` bytes at most, or of one token; sizes (T,) in bytes."""
    start = filled = 0
    for t, size in enumerate(sizes.tolist()):
        if t > start and filled + size > memory:
            yield slice(start, t)
            start, filled = t, 0
        filled += size
    if len(sizes):
        yield slice(start, len(sizes))


def sample_offsets(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Where each token's sample of the vocabulary starts, (T,) in [0, 1): the same for pairs and for triangles."""
    return torch.rand(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)


def lens_kl(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, simplices: torch.Tensor,
            weights: torch.Tensor, hit: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor],
            unembedding: torch.Tensor, outcomes: int, offsets: torch.Tensor, memory: int) -> torch.Tensor:
    """KL(p_t || p_S,t) under the `lens` readout for the R (token, simplex) pairs that hit (T, M) marks, row by row.

    Of x, gates and y as many tokens as fit in memory; offsets (T,) place the samples of `outcomes` of the vocabulary.
    The reference p is read out in float32 or better whatever the dtype, each change of logits in the dtype.
    """
    wide, vocab = model_io.widened(x.dtype), len(unembedding)
    t, s = hit.nonzero().unbind(1)
    counts = hit.sum(1).tolist()
    change = merge_change(experts, x, gates, simplices, weights, t, s)  # (R, d)
    stream = y.to(wide)
    u = norm(stream)
    p = torch.cat([u @ part.to(wide).T for part in unembedding.split(4096)], dim=1).log_softmax(-1)  # (T, V)
    if outcomes < vocab:
        columns, p = mathx.sample_outcomes(p, outcomes, offsets)  # (T, outcomes)
    limit = max(1, memory // (x.itemsize * outcomes))
    logits = x.new_empty(min(limit, max(counts)), outcomes)  # one buffer: fresh memory would cost as much as the KL
    block = max(1, CACHE_BYTES // (wide.itemsize * outcomes))
    kl = []
    for token, rows in enumerate(change.split(counts)):
        du = (norm(stream[token] + rows) - u[token]).to(x.dtype)
        head = unembedding if outcomes == vocab else unembedding[columns[token]]
        for part in du.split(limit):
            delta = torch.mm(part, head.T, out=logits[:len(part)])
            kl += [mathx.kl_of_logit_change(p[token], few.to(wide)) for few in delta.split(block)]
    return torch.cat(kl)


def lens_barriers(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, simplices: torch.Tensor,
                  norm: Callable[[torch.Tensor], torch.Tensor], unembedding: torch.Tensor, vocab_sample: int = 0,
                  seed: int = 0, memory: int = MEMORY, tick: Tick = lambda share: None) -> torch.Tensor:
    """Barriers b_S = mean_t KL(p_t || p_S,t) under the `lens` readout p = softmax(W_U norm(y)).

    Parameters
    ----------
    x, gates, y : MoE input (T, d), gate weights as applied (T, n), residual stream after the layer (T, d)
    simplices : (M, 2 or 3) expert indices
    norm, unembedding : the model's final norm, and its head W_U (V, d)
    vocab_sample : outcomes of the vocabulary to sample for each token (`mathx.sample_outcomes`); 0: all, exactly
    seed : of that sample
    memory : bytes that the sweep may take beside its arguments

    Returns (M,) float64, nats.
    """
    weights, hit = merge_weights(simplices, (gates > 0).sum(0)), touched(gates, simplices)
    total = torch.zeros(len(simplices), dtype=torch.float64, device=x.device)
    outcomes = min(vocab_sample or len(unembedding), len(unembedding))
    offsets = sample_offsets(x, seed)
    for chunk in token_chunks(sweep_bytes(experts, x.itemsize, hit, len(unembedding)), memory * 3 // 4):
        kl = lens_kl(experts, x[chunk], gates[chunk], y[chunk], simplices, weights, hit[chunk], norm, unembedding,
                     outcomes, offsets[chunk], memory // 4)
        total.index_add_(0, hit[chunk].nonzero()[:, 1], kl.double())
        tick(chunk.stop / len(x))
    return total.cpu() / len(x)


def audit_sample(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, simplices: torch.Tensor,
                 norm: Callable[[torch.Tensor], torch.Tensor], unembedding: torch.Tensor, vocab_sample: int,
                 seed: int = 0, memory: int = MEMORY, size: int = 128) -> torch.Tensor:
    """KL of up to `size` (token, simplex) pairs, one random simplex that touches each of so many random tokens: as
    `lens_barriers` estimates it from its sample of the vocabulary, and exactly, (A, 2) float64.

    Parameters are those of `lens_barriers`.
    """
    weights, hit = merge_weights(simplices, (gates > 0).sum(0)), touched(gates, simplices)
    generator = torch.Generator().manual_seed(seed)
    changed = hit.any(1).nonzero().squeeze(1).cpu()
    t = changed[torch.randperm(len(changed), generator=generator)[:size]].to(x.device)
    if not len(t):
        return torch.empty(0, 2, dtype=torch.float64)
    one = torch.multinomial(hit[t].double().cpu(), 1, generator=generator).to(x.device)
    few = torch.zeros_like(hit[t]).scatter(1, one, True)
    return torch.stack([lens_kl(experts, x[t], gates[t], y[t], simplices, weights, few, norm, unembedding,
                                outcomes, sample_offsets(x, seed)[t], memory // 4).double().cpu()
                        for outcomes in (min(vocab_sample, len(unembedding)), len(unembedding))], dim=1)


def model_barriers(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, simplices: torch.Tensor,
                   later: Callable[[torch.Tensor], torch.Tensor], unembedding: torch.Tensor,
                   tick: Tick = lambda share: None) -> torch.Tensor:
    """Barriers under the `model` readout: the modified stream goes through all later layers, end to end.

    As `lens_barriers`, but `later` maps a whole residual stream (T, d) to what the head reads, (T, d).
    """
    wide = model_io.widened(x.dtype)
    weights, hit = merge_weights(simplices, (gates > 0).sum(0)), touched(gates, simplices)
    base = later(y)
    barriers = torch.zeros(len(simplices), dtype=torch.float64)
    for start in range(0, len(simplices), 64):
        group = slice(start, start + 64)
        t, s = hit[:, group].nonzero().unbind(1)
        change = merge_change(experts, x, gates, simplices[group], weights[group], t, s)
        for m in range(len(simplices[group])):
            du = later(y.index_add(0, t[s == m], change[s == m])) - base
            for u, rows in zip(base.split(256), du.split(256)):
                log_p = (u @ unembedding.T).to(wide).log_softmax(-1)
                kl = mathx.kl_of_logit_change(log_p, (rows @ unembedding.T).to(wide))
                barriers[start + m] += kl.double().sum().cpu()
            tick((start + m + 1) / len(simplices))
    return barriers / len(x)


class Signals(NamedTuple):
    """What a layer's plan is made from, for any K, order, percentages and weights. Expert indices throughout.

    frequency (n,) tokens routed to each expert, saliency (n,), barriers (|E|,) of the pairs `mathx.edges(n)`,
    candidate triangles (m, 3) and their triplet barriers (m,), audit (A, 2) from `audit_sample`; norms over the tokens
    of what each expert's projections read, inputs (n, d) and hidden (n, f), and a shared expert's. Empty where the
    method needs no barriers, and where a layer comes without norms.
    """

    frequency: torch.Tensor
    saliency: torch.Tensor
    barriers: torch.Tensor = torch.empty(0, dtype=torch.float64)
    candidates: torch.Tensor = torch.empty(0, 3, dtype=torch.int64)
    triplets: torch.Tensor = torch.empty(0, dtype=torch.float64)
    audit: torch.Tensor = torch.empty(0, 2, dtype=torch.float64)
    inputs: torch.Tensor = torch.empty(0, 0)
    hidden: torch.Tensor = torch.empty(0, 0)
    shared_inputs: torch.Tensor = torch.empty(0)
    shared_hidden: torch.Tensor = torch.empty(0)


def measure_layer(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, readout: Readout,
                  settings: Settings = Settings(), tick: Tick = lambda share: None) -> Signals:
    """Saliency, the barriers of all pairs, and the triplet barriers of the candidate triangles of one layer.

    Parameters as for `lens_barriers`; readout is `partial(lens_barriers, norm=..., unembedding=...)` or the like.
    More candidates than `max_triangles` are sampled in saliency order, however the experts are numbered.
    """
    n = gates.shape[1]
    saliency = reap_saliency(experts, x, gates)
    rank = saliency.sort(stable=True).indices
    pairs = rank[mathx.edges(n)].sort(1).values
    share = len(pairs) / (len(pairs) + settings.max_triangles)
    barriers = readout(experts, x, gates, y, pairs.to(x.device), tick=lambda done: tick(share * done))
    candidates = rank[mathx.candidate_triangles(n, barriers, settings.max_triangles, settings.seed)].sort(1).values
    triplets = readout(experts, x, gates, y, candidates.to(x.device),
                       tick=lambda done: tick(share + (1 - share) * done))
    if not torch.cat((saliency, barriers, triplets)).isfinite().all():
        raise InputError("a layer's saliencies or barriers are not finite: NaN or infinity in the weights of an "
                         f"expert, or an overflow of {x.dtype}")
    barriers = barriers[mathx.edge_index(n, *pairs.unbind(1)).argsort()]  # from saliency order to that of edges(n)
    return Signals((gates > 0).sum(0).cpu(), saliency, barriers, candidates, triplets)


# ------------------------------------------------ 3 to 6: complex, decomposition, cover, redirect (sections 3.2 to 4.1)


def in_order(signals: Signals, rank: torch.Tensor) -> Signals:
    """The signals in rank space, where vertex r is expert rank[r]; its triangles are lexicographic again."""
    n = len(rank)
    place = rank.argsort()
    triangles = place[signals.candidates].sort(1).values
    first = (triangles @ torch.tensor([n * n, n, 1])).argsort()
    pairs = rank[mathx.edges(n)].sort(1).values
    return signals._replace(
        frequency=signals.frequency[rank], saliency=signals.saliency[rank], candidates=triangles[first],
        triplets=signals.triplets[first], barriers=signals.barriers[mathx.edge_index(n, *pairs.unbind(1))])


def curate_triangles(signals: Signals, settings: Settings) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Stage 2 of appendix A.9: the candidates with barrier <= tau*, where tau* is the first of evenly spaced
    thresholds, from the smallest to the largest barrier of edges and candidates, that maximises beta_1 of K_tau.

    Returns (mask of the candidates, tau*, beta_1 at each threshold). K_tau has only the edges up to tau; the complex
    of the decomposition then has all edges, whatever tau*.
    """
    n = len(signals.frequency)
    both = torch.cat((signals.barriers, signals.triplets))
    thresholds = torch.linspace(both.min().item(), both.max().item(), settings.thresholds, dtype=torch.float64)
    curve = mathx.betti_curve(n, signals.barriers, signals.candidates, signals.triplets, thresholds)
    tau = thresholds[curve.argmax()].item()
    return signals.triplets <= tau, tau, curve


def expert_order(signals: Signals, order: str) -> torch.Tensor:
    """The experts in the total order that orients the complex, (n,): ascending saliency, index, or random:SEED."""
    if order == "saliency":
        return signals.saliency.sort(stable=True).indices
    n = len(signals.frequency)
    return torch.arange(n) if order == "index" else seeded_permutation(n, int(order.removeprefix("random:")))


def seeded_permutation(n: int, seed: int) -> torch.Tensor:
    """A random order of 0..n-1."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def score_experts(signals: Signals, method: str, seed: int) -> torch.Tensor:
    """What a method without a cover ranks the experts by, (n,): the largest stay."""
    n = len(signals.frequency)
    if method == "random":
        return seeded_permutation(n, seed)
    if method == "frequency":
        return signals.frequency
    if method == "reap":
        return signals.saliency
    i, j = mathx.edges(n).unbind(1)
    return torch.zeros(n, dtype=torch.float64).index_add_(0, i, signals.barriers).index_add_(0, j, signals.barriers)


def plan_from_signals(signals: Signals, keep: int, settings: Settings = Settings(), layer: int = 0) -> dict:
    """The plan of one layer: survivors by `settings.method`, and, where its barriers were measured, their Hodge parts,
    critical simplices, redirect and diagnostics. `layer` seeds the method `random`, no two layers alike.

    Returns the layer's entry of hodgecover.json (README), in expert indices.
    """
    n = len(signals.frequency)
    if not 1 <= keep <= n or n < 2:
        raise InputError(f"keep {keep}: must be from 1 to the layer's {n} experts, of which there must be two")
    order, found = None, {}
    if settings.method in BY_SCORE:
        score = score_experts(signals, settings.method, settings.seed + layer)
        order = score.sort(descending=True, stable=True).indices.tolist()
    if len(signals.barriers):
        order, found = plan_from_barriers(signals, keep, settings, order)
    survivors = sorted(order[:keep])
    share = signals.frequency[survivors].sum() / signals.frequency.sum().clamp(min=1)
    return {"survivors": survivors, "order": order} | found | {
        "routed_share": share.item(), "frequency": signals.frequency.tolist(), "saliency": signals.saliency.tolist()}


def plan_from_barriers(signals: Signals, keep: int, settings: Settings, order: list[int] | None
                       ) -> tuple[list[int], dict]:
    """The order of the picks, by a cover or a veto unless it is given, and all that the plan says of the barriers.

    Vertices of the complex are ranks, from `in_order` on; what goes in and comes out are experts.
    """
    n, rank = len(signals.frequency), expert_order(signals, settings.order)
    ranked = in_order(signals, rank)
    b, edges = ranked.barriers, mathx.edges(n)
    inside, tau, curve = curate_triangles(ranked, settings)
    triangles, triplets = ranked.candidates[inside], ranked.triplets[inside]
    d1, d2 = mathx.boundary_matrices(n, triangles)
    parts = mathx.hodge_decompose(b, d1, d2)
    flat = mathx.hodge_decompose(torch.ones_like(b), d1, d2)
    additive = mathx.additive_model(b, d1)
    discordance = mathx.discordance(n, b, ranked.candidates, ranked.triplets, settings.margin)

    tiny = 1e-12 * b.norm().item()
    signal = {"triplet-penalty": b, "additive-residual": additive.residual}.get(settings.method, parts.harmonic)
    critical_edges = edges[mathx.critical(signal.abs(), settings.edge_percent, tiny)]
    critical_triangles = triangles[mathx.critical(triplets, settings.triangle_percent, tiny)]
    if order is not None:
        picks = rank.argsort()[order].tolist()
    elif settings.method == "triplet-hypergraph":
        picks = mathx.veto_order(ranked.saliency, critical_triangles)
    else:
        weight = 0.0 if settings.method == "hodge-no-triangle" else settings.lambda_triangle
        families = [(critical_edges, settings.lambda_edge), (critical_triangles, weight)]
        picks = mathx.greedy_cover(ranked.saliency, families, n)
    target = mathx.redirect(picks[:keep], b, parts.harmonic, settings.alpha)
    components = {name: (part, edges) for name, part in parts._asdict().items()} | {"triplet": (triplets, triangles)}

    def experts(vertices: torch.Tensor) -> list:
        return rank[vertices].sort(-1).values.tolist()
    return rank[picks].tolist(), {
        "redirect": {str(i): j for i, j in sorted((int(rank[i]), int(rank[j])) for i, j in target.items())},
        "eta": mathx.energy_fractions(parts),
        "eta_constant": mathx.energy_fractions(flat),
        "additive": {"energy": additive.energy, "variance": additive.variance},
        "betti_1": mathx.betti_1(d1, d2),
        "betti_curve": curve.tolist(),
        "tau": tau,
        "triangles": len(triangles),
        "candidates": len(signals.candidates),
        "discordance": discordance.fraction,
        "discordance_quantiles": discordance.ratio_quantiles,
        "critical_edges": experts(critical_edges),
        "critical_triangles": experts(critical_triangles),
        "covered_at": {"edges": mathx.covered_at(picks, critical_edges),
                       "triangles": mathx.covered_at(picks, critical_triangles)},
        "retained": {name: mathx.retained(part, simplices, picks[:keep])
                     for name, (part, simplices) in components.items()},
        "mean_barrier": b.mean().item(),
    } | ({"audit": mathx.shortfall(*signals.audit.unbind(1))} if len(signals.audit) else {})


def plan_layer(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, readout: Readout, keep: int,
               settings: Settings = Settings(), tick: Tick = lambda share: None) -> dict:
    """Plans one MoE layer from tensors in memory: which `keep` experts stay, and where the others' tokens go.

    Parameters
    ----------
    experts : Experts(gate (n, f, d), up (n, f, d), down (n, d, f))
    x, gates, y : MoE input (T, d), gate weights as applied (T, n; zero off the top-k), stream after the layer (T, d)
    readout : `partial(lens_barriers, norm=final_norm, unembedding=W_U)`, or `model_barriers` likewise
    keep : number of survivors, 1..n

    Returns a dict with `survivors` (sorted), `order` (all experts in greedy order), `redirect` and the diagnostics
    described in the README.
    """
    return plan_from_signals(measure_layer(experts, x, gates, y, readout, settings, tick), keep, settings)


# ------------------------------------------------------------------------------------------------------ the whole model


def check_sample(tokens: int, seq_len: int, option: str = "--tokens") -> None:
    """Raises InputError where the tokens of a sample, given by that option, do not make one sequence."""
    if not 2 <= seq_len <= tokens:
        raise InputError(f"--seq-len {seq_len}: must be from 2 to the {tokens} of {option}")


def calibration_ids(model: Model, files: list[Path], tokens: int, seq_len: int, seed: int) -> torch.Tensor:
    """Sequences (tokens // seq_len, seq_len) sampled from the user's files, or from Python's documentation."""
    check_sample(tokens, seq_len)
    documents = model_io.read_documents(files) if files else model_io.python_documentation("calibration")
    ids = model_io.sequences(model.encode(documents), seq_len, tokens // seq_len, seed)
    if ids.numel() < tokens // seq_len * seq_len:
        warn(f"the calibration text has only {ids.numel()} tokens in whole sequences, all used; {tokens} were asked")
    return ids


def sparse_layers(model: Model) -> list[int]:
    """Indices of the layers that have a router. Raises InputError where there is none, or no two experts."""
    found = [i for i, name in enumerate(model.layer_names) if f"{name}.mlp.gate.weight" in model.checkpoint.tensors]
    if not found or model.config.num_experts < 2:
        raise InputError(f"{model.checkpoint.path}: no layer has a router over two experts or more; it is dense")
    return found


def text_hash(ids: torch.Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def make_readout(model: Model, settings: Settings, ids: torch.Tensor, memory: int = MEMORY
                 ) -> Callable[[LayerPass], Readout]:
    """layer pass -> barrier function of that layer. For `model` this loads every layer; see `check_cost`."""
    head = model.unembedding()
    if settings.readout == "lens":
        return lambda step: partial(lens_barriers, norm=step.norm, unembedding=head, memory=memory,
                                    vocab_sample=settings.vocab_sample, seed=settings.seed)
    check_cost(model, ids, settings, memory)
    depth = model.config.num_layers
    layers = [model.layer(index) for index in range(depth)]

    def later(y: torch.Tensor, index: int, norm: Callable) -> torch.Tensor:
        for layer in layers[index + 1:]:
            y = model_io.run_layer(y.view(*ids.shape, -1), layer, model.config)[2]
        return norm(y)
    return lambda step: partial(model_barriers, unembedding=head,
                                later=partial(later, index=step.index, norm=step.norm))


def run_to(stream: Iterator[LayerPass], index: int) -> LayerPass:
    """The pass of layer `index`, running the layers before it."""
    while True:
        step = next(stream)
        if step.index == index:
            return step
        del step  # before the next layer is read


def measure_model(model: Model, ids: torch.Tensor, settings: Settings, layers: Sequence[int],
                  cache: Path | None = None, memory: int = MEMORY) -> Iterator[tuple[int, Signals]]:
    """Signals of the given layers (ascending indices), from the cache or from one forward pass over ids (B, L).

    What is measured is put into the cache as soon as it is done. The pass stops at the last layer that needs it.
    Raises InputError for the `model` readout in bfloat16, which loses the small difference of two streams.
    """
    if settings.readout == "model" and model.dtype == torch.bfloat16:
        raise InputError("--readout model compares streams that bfloat16 cannot tell apart; use --dtype float32")
    key = cache_key(model, ids, settings) if cache else {}
    stream, readout, bar = model.stream(ids), None, progress_bar()
    for at, index in enumerate(layers):
        tensors = read_entry(cache, model.layer_names[index], key, Signals._fields) if cache else None
        if tensors:
            signals = Signals(**tensors)
        else:
            if readout is None:
                readout = make_readout(model, settings, ids, memory)
                if cache:
                    make_cache(cache)
            step = run_to(stream, index)
            signals = measure_step(step, readout(step), settings, lambda done: bar((at + done) / len(layers)))
            bar(None)
            del step  # before the next layer is read
            if cache:
                write_entry(cache, model.layer_names[index], signals._asdict(), key)
        yield index, signals


def measure_saliency(model: Model, ids: torch.Tensor) -> Iterator[tuple[int, Signals]]:
    """Frequency and saliency alone of every sparse layer, from one forward pass over ids (B, L)."""
    for step in model.stream(ids):
        if step.gates is not None:
            saliency = reap_saliency(step.layer.experts, step.x, step.gates)
            yield step.index, Signals((step.gates > 0).sum(0).cpu(), saliency, **activation_norms(step))
        del step  # before the next layer is read


def activation_norms(step: LayerPass) -> dict[str, torch.Tensor]:
    """|X_j|_2 over the calibration tokens that a projection reads, for Wanda: `inputs` (n, d) of each expert's gate
    and up projections and `hidden` (n, f) of its down projection; the same of the shared expert, where there is one."""
    x, wide, experts = step.x, model_io.widened(step.x.dtype), step.layer.experts
    routed = step.gates > 0
    norms = {"inputs": (routed.to(wide).T @ x.to(wide).square()).sqrt().cpu(),
             "hidden": torch.stack([experts.hidden(e, x[routed[:, e]]).to(wide).norm(dim=0).cpu()
                                    for e in range(routed.shape[1])])}
    if "mlp.shared_expert.gate_proj.weight" in step.layer.weights:
        hidden = model_io.gated(x, step.layer.weights, "mlp.shared_expert")
        norms |= {"shared_inputs": x.to(wide).norm(dim=0).cpu(), "shared_hidden": hidden.to(wide).norm(dim=0).cpu()}
    return norms


def measure_step(step: LayerPass, readout: Readout, settings: Settings, tick: Tick) -> Signals:
    """`measure_layer`, the norms for Wanda, and the audit of a vocabulary sample."""
    tensors = step.layer.experts, step.x, step.gates, step.y
    signals = measure_layer(*tensors, readout, settings, tick)._replace(**activation_norms(step))
    if not settings.vocab_sample:
        return signals
    simplices = mathx.edges(len(signals.frequency)), signals.candidates
    audit = partial(audit_sample, *tensors, **readout.keywords)
    return signals._replace(audit=torch.cat([audit(simplices=chosen.to(step.x.device)) for chosen in simplices]))


def plan_model(model: Model, ids: torch.Tensor, keep: int, settings: Settings, cache: Path | None = None,
               memory: int = MEMORY, say: Callable[[str], None] = print) -> tuple[list[dict], dict[str, Signals]]:
    """The `layers` of hodgecover.json, from calibration on ids (B, L), and by each one's name what it is made from."""
    layers, found, barriers = [], {}, settings.method not in NO_BARRIERS
    for index, signals in (measure_model(model, ids, settings, sparse_layers(model), cache, memory) if barriers
                           else measure_saliency(model, ids)):
        if barriers and not layers:
            say(LAYER_HEAD)
        name = model.layer_names[index]
        found[name], plan = signals, plan_from_signals(signals, keep, settings, index)
        if not barriers:
            rows = model.checkpoint.load(f"{name}.mlp.gate.weight")
            plan["redirect"] = {str(i): j for i, j in mathx.nearest_rows(rows, plan["survivors"]).items()}
        layers.append({"layer": index, "name": name} | plan)
        say(layer_line(layers[-1]))
    if settings.vocab_sample:
        say(audit_line([layer["audit"] for layer in layers if "audit" in layer], settings.vocab_sample))
    return layers, found


# ------------------------------------------------------------------------------------------------- the barriers on disk


def cache_key(model: Model, ids: torch.Tensor, settings: Settings) -> dict[str, str]:
    """All that a layer's signals depend on, by name."""
    checkpoint = model.checkpoint
    modified = [(checkpoint.path / file).stat().st_mtime_ns for file in checkpoint.metadata]
    return {"format": CACHE_VERSION, "weights": f"{checkpoint.fingerprint()} of {modified}",
            "calibration text": f"{[*ids.shape]} {text_hash(ids)}",
            "dtype": str(model.dtype)} | {name.replace("_", " "): str(getattr(settings, name)) for name in
                                          ("readout", "vocab_sample", "max_triangles", "seed")}


def cache_file(cache: Path, name: str, key: dict[str, str]) -> Path:
    """Where an entry lies: settings have files of their own, so that a quick run costs no long one's."""
    return cache / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}.safetensors"


def read_entry(cache: Path, name: str, key: dict[str, str], fields: Sequence[str]) -> dict[str, torch.Tensor] | None:
    """The tensors of an entry of the cache; None, and a line that says why, where they are damaged or made from
    another key; None where there are none."""
    file = cache_file(cache, name, key)
    if not file.is_file():
        others = (path for path in cache.glob(f"{name}-*.safetensors") if path.is_file())
        file = max(others, key=os.path.getmtime, default=None)
    if file is None:
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            found = f.metadata() or {}
            other = [part for part in key if found.get(part) != key[part]]
            tensors = {} if other else {field: f.get_tensor(field).clone() for field in f.keys()}
    except (OSError, safetensors.SafetensorError) as err:
        warn(f"{file}: damaged ({err}); measured anew")
        return None
    if other:
        warn(f"{file}: made with other {', '.join(other)}; measured anew")
    elif tensors.keys() != {*fields} or found.get("sha256") != digest(tensors):
        warn(f"{file}: damaged (its hash differs); measured anew")
    else:
        return tensors
    return None


def write_entry(cache: Path, name: str, tensors: dict[str, torch.Tensor], key: dict[str, str]) -> None:
    """Writes a cache file beside and renames it, so that it is whole or absent however the process ends."""
    file = cache_file(cache, name, key)
    tensors = {field: tensor.cpu().contiguous() for field, tensor in tensors.items()}
    beside = file.with_name(f".{file.name}.{os.urandom(8).hex()}")
    try:
        beside.write_bytes(safetensors.torch.save(tensors, key | {"sha256": digest(tensors)}))
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors in the order of their names."""
    raw = (tensors[name].flatten().view(torch.uint8).numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(b"".join(raw)).hexdigest()


def make_cache(cache: Path) -> None:
    """Makes the folder of the cache. Raises InputError where it cannot be made or written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{cache}: cannot be made ({err.strerror}); name another folder with --cache") from None
    if not os.access(cache, os.W_OK | os.X_OK):
        raise InputError(f"{cache}: cannot be written to; name another folder with --cache")


# --------------------------------------------------------------------------- Wanda on the survivors (arXiv 2306.11695)


def wanda_parameters(model: Model) -> dict[str, tuple[int, int, bool]]:
    """(rows, columns, whether of a routed expert) of each weight matrix of routed and shared experts, fused ones
    counted as n matrices of their rows."""
    name = re.compile(r".+\.mlp\.(?:(experts)|shared_expert)\..*(?:gate|up|gate_up|down)_proj(?:\.weight)?")
    found = {key: (name.fullmatch(key), info.shape) for key, info in model.checkpoint.tensors.items()}
    return {key: (math.prod(shape[:-1]), shape[-1], bool(match[1])) for key, (match, shape) in found.items() if match}


def wanda_settings(model: Model, keep: int, total_rate: float | None, nm: tuple[int, int] | None
                   ) -> tuple[dict, Callable | None]:
    """(what the plan records, mask(weight, norms) or None where no weight is pruned).

    For a total rate R of the parameters of routed and shared experts, Wanda prunes those that stay at the rate
    1 - (1 - R) P_before / P_after. Raises InputError for a rate or a group that the matrices do not admit.
    """
    if total_rate is None and nm is None:
        return {}, None
    share = keep / model.config.num_experts
    matrices = [(rows * (share if routed else 1), columns, rows * columns)
                for rows, columns, routed in wanda_parameters(model).values()]
    before, after = sum(count for *_, count in matrices), sum(rows * columns for rows, columns, _ in matrices)
    if nm:
        kept, group = nm
        if not 0 < kept < group or any(columns % group for _, columns, _ in matrices):
            raise InputError(f"--nm {kept}:{group}: N must be below M, and M divide the width of every expert's "
                             "matrices")
        said, mask = {"nm": f"{kept}:{group}"}, partial(mathx.wanda_mask_nm, kept=kept, group=group)
        left = sum(rows * columns * kept / group for rows, columns, _ in matrices)
    else:
        rate = 1 - (1 - total_rate) * before / after
        if rate < 0:
            raise InputError(f"--total-rate {total_rate}: dropping to {keep} experts takes {1 - after / before:.4f} "
                             "already; it must be at least that")
        said, mask = {"rate": rate}, partial(mathx.wanda_mask, rate=rate)
        left = sum(rows * (columns - round(rate * columns)) for rows, columns, _ in matrices)
    return {"wanda": said | {"total_rate": 1 - left / before}}, mask


def wanda_edits(model: Model, norms: dict[str, Signals], mask: Callable) -> dict[str, model_io.Edit]:
    """What the export does to each matrix of routed and shared experts: entries outside mask(weight, norms) become 0.

    norms: by layer name.
    """
    def edit(weight: torch.Tensor, row: int, table: torch.Tensor, expert: int | None) -> torch.Tensor:
        """A shared expert's table is one row; an expert's own is `expert`, or `row` where experts are stored fused."""
        of = table if table.dim() == 1 else table[row if expert is None else expert]
        return weight.masked_fill(~mask(weight, of), 0)
    edits = {}
    for name in wanda_parameters(model):
        layer, expert, shared = re.fullmatch(r"(.+)\.mlp\.(?:experts\.(?:(\d+)\.)?|(shared)_expert\.).+", name).groups()
        kind = ("shared_" if shared else "") + ("hidden" if "down_proj" in name else "inputs")
        if layer in norms:
            edits[name] = partial(edit, table=getattr(norms[layer], kind), expert=expert and int(expert))
    return edits


# ------------------------------------------------------------------------------- closed-form recovery (ours, `--refit`)


def add_outputs(stream: torch.Tensor, step: LayerPass, down: torch.Tensor) -> None:
    """Adds to a stream (T, d) what the layer's experts give through other down projections (n, d, f)."""
    experts = step.layer.experts._replace(down=down.to(step.x))
    for rows, x, gates in zip(stream.split(PIECE), step.x.split(PIECE), step.gates.split(PIECE)):
        rows += model_io.mix_experts(experts, x, gates).to(rows)


def fit_scale(step: LayerPass, residual: torch.Tensor) -> torch.Tensor:
    """The factors (n,) float64 of the experts' outputs that best give the residual (T, d) besides what they give now,
    by least squares."""
    n, d = step.gates.shape[1], residual.shape[1]
    gram, wanted = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for t in torch.arange(len(residual), device=residual.device).split(PIECE // 16):
        outputs = residual.new_zeros(n, len(t), d, dtype=torch.float64)
        for e in range(n):
            hit = step.gates[t, e].nonzero().squeeze(1)
            outputs[e, hit] = (step.gates[t[hit], e, None] * step.layer.experts(e, step.x[t[hit]])).double()
        gram += (outputs.flatten(1) @ outputs.flatten(1).T).cpu()
        wanted += (outputs.flatten(1) @ residual[t].flatten().double()).cpu()
    return 1 + torch.linalg.pinv(gram, hermitian=True) @ wanted


def gated_hidden(step: LayerPass, e: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces (tokens routed to expert e (R,), what its down projection reads times their gates (R, f))."""
    routed = step.gates[:, e].nonzero().squeeze(1)
    return [(t, step.gates[t, e, None] * step.layer.experts.hidden(e, step.x[t])) for t in routed.split(PIECE)]


def refit_layer(step: LayerPass, residual: torch.Tensor, ridge: float = RIDGE, sweeps: int = SWEEPS,
                fixed_zeros: bool = False) -> torch.Tensor:
    """The down projections (n, d, f) of one layer that best give the residual (T, d) besides what they give now, in
    their dtype: a factor for each expert, then ridge regression about that (`mathx.block_ridge`). The gates and the
    hidden activations are the layer's own. The residual is changed in place."""
    down, factor = step.layer.experts.down, fit_scale(step, residual).to(residual)[:, None, None]
    add_outputs(residual, step, down.to(residual) * (1 - factor))
    start = down.to(residual) * factor
    return mathx.block_ridge(partial(gated_hidden, step), start, residual, ridge, sweeps, fixed_zeros).to(down)


def refit(source: Model, output: Model, ids: torch.Tensor,
          fit: Callable[[LayerPass, torch.Tensor], torch.Tensor] = refit_layer, cache: Path | None = None,
          key: dict[str, str] = {}, empty: Callable[..., torch.Tensor] = torch.empty) -> Iterator[dict]:
    """Refits the down projections of a compressed checkpoint's experts, in its files, layer by layer: the output stream
    of each layer comes as near to the source's as those can bring it by ridge regression, at the compressed model's
    own inputs, all layers before it refitted.

    Parameters
    ----------
    source, output : models with the same layers; the output's number and choice of experts, their weights and its
        router are free
    ids : (B, L), both models' calibration text
    fit : (layer pass of the output, what its stream lacks (T, d)) -> down projections (n, d, f)
    cache, key : folder of refitted layers, and all that they depend on
    empty : makes the four tensors (T, d) that are held at once (`model_io.scratch`)

    Yields for each layer its name and its error |y_source - y| / |y_source| `before` and `after`.
    """
    def length(rows: torch.Tensor) -> float:
        return math.sqrt(sum(part.double().square().sum().item() for part in rows.split(PIECE)))
    streams = source.stream(ids, empty), output.stream(ids, empty)
    for name in output.layer_names:
        target, step = next(streams[0]).y, next(streams[1])
        if step.gates is not None:
            residual = empty(*target.shape, dtype=model_io.widened(target.dtype), device=target.device)
            residual.copy_(target).sub_(step.y)
            before, old = length(residual), step.layer.experts.down
            found = read_entry(cache, f"refit-{name}", key, ["down"]) if cache else None
            down = output.store_down(name, found["down"] if found else fit(step, residual))
            if cache and not found:
                make_cache(cache)
                write_entry(cache, f"refit-{name}", {"down": down}, key)
            add_outputs(step.y, step, down.to(step.x) - old.to(step.x))
            residual.copy_(target).sub_(step.y)
            yield {"name": name, "before": before / length(target), "after": length(residual) / length(target)}
            del residual, old, down, found
        target = step = None  # before the next layer is read


# -------------------------------------------------------------------------------------------- the compressed checkpoint


def check_keep(model: Model, keep: int, where: str) -> None:
    """Raises InputError for a dense model, and where K is no number of experts that every layer can keep."""
    cfg = model.config
    if sparse_layers(model) and not cfg.top_k <= keep <= cfg.num_experts:
        raise InputError(f"{where} {keep}: the model has {cfg.num_experts} experts and routes each token to "
                         f"{cfg.top_k}; K must be from {cfg.top_k} to {cfg.num_experts}")


def refuse_inside(model: Model, path: Path, option: str) -> None:
    """Raises InputError for a path in the checkpoint's folder."""
    if model.checkpoint.path.resolve() in (path.resolve(), *path.resolve().parents):
        raise InputError(f"{path}: lies in the checkpoint, which is never written to; name another with {option}")


def check_out(model: Model, out: str | os.PathLike | None, keep: int, cache: Path | None = None) -> Path:
    """The output folder; CKPT-keepK beside the checkpoint where none is given. Raises InputError where it lies in the
    checkpoint or around the cache, or cannot become a new folder."""
    source = Path(os.path.abspath(model.checkpoint.path))
    out = Path(os.path.abspath(out)) if out else source.with_name(f"{source.name}-keep{keep}")
    refuse_inside(model, out, "--out")
    if cache and out.resolve() in (cache.resolve(), *cache.resolve().parents):
        raise InputError(f"{out}: would hold the cache {cache}; name another with --out")
    model_io.check_new(out)
    return out


def fold_file(model: Model, plans: list[dict]) -> bytes:
    """What `--router fold` needs beside the survivors (paper section 4.1: p'_j = sum of p_i over pi(i) = j)."""
    tensors = {}
    for plan in plans:
        router = f"{plan['name']}.mlp.gate.weight"
        dropped = sorted(map(int, plan["redirect"]))
        slots = [plan["survivors"].index(plan["redirect"][str(i)]) for i in dropped]
        tensors[f"{plan['name']}.dropped_rows"] = model.checkpoint.load(router)[dropped]
        tensors[f"{plan['name']}.slots"] = torch.tensor(slots, dtype=torch.int64)
    return safetensors.torch.save(tensors)


def as_json(plan: dict) -> bytes:
    """The content of hodgecover.json."""
    return (json.dumps(plan, indent=1, allow_nan=False) + "\n").encode()


def export(model: Model, plan: dict, out: Path, plan_only: bool = False, edits: dict[str, model_io.Edit] = {}) -> None:
    """Writes the checkpoint that a plan says, and the plan, to the folder `out`, with `edits` to the weights of
    survivors; or the plan alone."""
    files = {model_io.PLAN: as_json(plan)}
    if plan_only:
        with model_io.new_folder(out) as folder:
            (folder / model_io.PLAN).write_bytes(files[model_io.PLAN])
        return
    if plan["settings"]["router"] == "fold":
        files[model_io.FOLD] = fold_file(model, plan["layers"])
    survivors = {layer["name"]: layer["survivors"] for layer in plan["layers"]}
    model_io.write_checkpoint(model.checkpoint, out, survivors, files, edits)


def read_plan(model: Model, path: Path) -> dict:
    """The plan in a hodgecover.json, which may have been edited by hand. Raises InputError where it is not a plan
    for this checkpoint: another fingerprint, or survivors that the export cannot take."""
    plan, n = model_io.read_json(path), model.config.num_experts
    names = [model.layer_names[i] for i in sparse_layers(model)]
    try:
        if plan["source"]["fingerprint"] != model.checkpoint.fingerprint():
            raise InputError(f"{path}: made for {plan['source']['name']}, of other weights or another config.json than "
                             f"{model.checkpoint.path}")
        if [layer["name"] for layer in plan["layers"]] != names:
            raise InputError(f"{path}: its layers must be {', '.join(names)}")
        if "wanda" in plan["settings"] or "refit" in plan:
            raise InputError(f"{path}: made with Wanda or --refit, whose activations it does not hold; run the command "
                             "anew")
        if plan["schema_version"] != SCHEMA_VERSION:
            raise InputError(f"{path}: schema_version {plan['schema_version']!r}; it must be {SCHEMA_VERSION}")
        as_json(plan)
        if plan["settings"]["router"] not in CHOICES["router"]:
            raise InputError(f"{path}: router must be drop or fold")
        fold = plan["settings"]["router"] == "fold"
        keep = len(plan["layers"][0]["survivors"])
        check_keep(model, keep, f"{path}: survivors:")
        for layer in plan["layers"]:
            kept, redirect = layer["survivors"], layer["redirect"]
            if len(kept) != keep or any(type(e) is not int for e in kept) or kept != sorted({*kept} & {*range(n)}):
                raise InputError(f"{path}: survivors of {layer['name']} must be {keep} ascending numbers below {n}")
            dropped = {str(e) for e in range(n)} - {str(e) for e in kept}
            if fold and (redirect.keys() != dropped or not {*redirect.values()} <= {*kept}):
                raise InputError(f"{path}: redirect of {layer['name']} must send each dropped expert to a survivor")
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as err:
        raise InputError(f"{path}: not a plan that hodgecover.py wrote ({type(err).__name__}: {err})") from None
    return plan


def compress(path: str | os.PathLike, keep: int, out: str | os.PathLike | None = None, *, calib: Sequence[Path] = (),
             tokens: int = TOKENS, seq_len: int = SEQ_LEN, settings: Settings = Settings(), plan_only: bool = False,
             total_rate: float | None = None, nm: tuple[int, int] | None = None, refit_tokens: int = 0,
             cache: Path | None = None, memory: int = MEMORY, dtype: torch.dtype = torch.float32, device: str = "cpu",
             say: Callable[[str], None] = print) -> Path:
    """Plans the checkpoint at `path` and writes it with `keep` experts a layer to `out`.

    Parameters are those of the command line (README). `out` defaults to `path`-keep`keep` beside it; without a
    `cache` folder no barriers are kept.

    Returns the output folder. Raises InputError where something given is wrong; then no output is written.
    """
    model = Model(path, dtype, device)
    cfg = model.config
    check_keep(model, keep, "--keep")
    out = check_out(model, out, keep, cache)
    if refit_tokens:
        check_sample(refit_tokens, seq_len, "--refit")
    wanda, mask = wanda_settings(model, keep, total_rate, nm)
    ids = calibration_ids(model, list(calib), tokens, seq_len, settings.seed)
    layers, signals = plan_model(model, ids, keep, settings, cache, memory, say)
    plan = {
        "schema_version": SCHEMA_VERSION,
        "hodgecover_version": __version__,
        "layers": layers,
        "settings": {"keep": keep} | dataclasses.asdict(settings) | {
            "dtype": str(dtype).removeprefix("torch."), "tokens": ids.numel(), "seq_len": seq_len,
            "calibration": [Path(file).name for file in calib] or "python documentation",
            "calibration_sha256": text_hash(ids)} | wanda,
        "source": {"name": Path(os.path.abspath(path)).name, "model_type": cfg.model_type,
                   "num_experts": cfg.num_experts, "top_k": cfg.top_k, "fingerprint": model.checkpoint.fingerprint()},
    }
    if wanda:
        say(f"with Wanda, {wanda['wanda']['total_rate']:.2%} of all experts' parameters are gone")
    edits = wanda_edits(model, signals, mask) if mask else {}
    if not refit_tokens:
        export(model, plan, out, plan_only, edits)
        return out
    ids = calibration_ids(model, list(calib), refit_tokens, seq_len, settings.seed)
    with model_io.new_folder(out) as folder:
        export(model, plan, folder, edits=edits)
        plan["refit"] = refit_export(model, plan, folder, ids, cache, memory, say)
        (folder / model_io.PLAN).write_bytes(as_json(plan))
    return out


def refit_export(model: Model, plan: dict, folder: Path, ids: torch.Tensor, cache: Path | None, memory: int,
                 say: Callable[[str], None]) -> dict:
    """Refits the checkpoint that was exported to a folder; returns what the plan says of it."""
    settings, dtype, device = plan["settings"], model.dtype, model.device
    pruned = [settings["wanda"], settings["calibration_sha256"]] if "wanda" in settings else []
    made = json.dumps([pruned, *(layer["survivors"] for layer in plan["layers"])])
    key = cache_key(model, ids, Settings()) | {"refit": f"{RIDGE}, {SWEEPS}", "survivors": made} if cache else {}
    large = device.type == "cpu" and activation_bytes(model, ids.numel()) > memory
    empty, found = model_io.scratch(folder) if large else torch.empty, []
    fit = partial(refit_layer, fixed_zeros=bool(pruned))
    for error in refit(model, Model(folder, dtype, device), ids, fit, cache, key, empty):
        say(f"{error['name']} refitted: output error {error['before']:.4f} -> {error['after']:.4f}")
        found.append(error)
    return {"tokens": ids.numel(), "calibration_sha256": text_hash(ids),
            "ridge": RIDGE, "sweeps": SWEEPS, "layers": found}


def evaluate(source: Model, output: Model, ids: torch.Tensor) -> tuple[float, float, float]:
    """Perplexities of source and output on ids (B, L), and the mean KL(source || output) in nats a position."""
    heads = source.unembedding(), output.unembedding()
    loss, kl = [0.0, 0.0], 0.0
    for u, v, tokens in zip(source.hidden(ids), output.hidden(ids), ids.to(source.device)):
        log_p, log_q = ((h @ head.T).double().log_softmax(-1) for h, head in zip((u, v), heads))
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        for i, log in enumerate((log_p, log_q)):
            loss[i] -= log[:-1].gather(1, tokens[1:, None]).sum().item()
    predicted = ids[:, 1:].numel()
    first, second = (torch.tensor(loss) / predicted).exp().tolist()  # infinity where math.exp would raise
    return first, second, kl / ids.numel()


# ---------------------------------------------------------------------------------------------------- what it will cost


class Cost(NamedTuple):
    """operations of products; seconds on this machine; peak bytes of memory; bytes of the cache on disk."""

    operations: float
    seconds: float
    memory: float
    disk: float


def layer_sizes(model: Model) -> tuple[list[float], float]:
    """(bytes of each layer in memory, parameters of all of them that one token meets)."""
    cfg, held, active = model.config, [], 0.0
    for layer in model.layer_names:
        held.append(0.0)
        for name, info in model.checkpoint.tensors.items():
            if name.startswith(f"{layer}."):
                expert, size = ".experts." in name, math.prod(info.shape)
                held[-1] += size * (2 if expert and info.dtype == "BF16" else model.dtype.itemsize)
                active += size * cfg.top_k / cfg.num_experts if expert else size
    return held, active


def estimate(model: Model, settings: Settings, tokens: int, memory: int = MEMORY) -> Cost:
    """What measuring all layers costs, before it is done: counted operations over the rate at which a short sweep of
    a made-up layer of the same shape does them. Reading the checkpoint is not counted."""
    cfg, sparse, (held, active) = model.config, sparse_layers(model), layer_sizes(model)
    n, k, d, f = cfg.num_experts, cfg.top_k, cfg.hidden_size, cfg.expert_width
    vocab, item, depth = cfg.vocab_size, model.dtype.itemsize, len(held)
    merges, triangles = math.comb(n, 2), min(settings.max_triangles, math.comb(n, 3))
    outcomes = min(settings.vocab_sample or vocab, vocab)
    rate = sweep_rate(model, n, k, d, f, vocab, outcomes)
    if settings.readout == "lens":
        sweep = (sweep_operations(n, k, d, f, vocab, outcomes, 2, merges)
                 + sweep_operations(n, k, d, f, vocab, outcomes, 3, triangles))
        operations = tokens * (len(sparse) * sweep + 2 * active)
        peak = max(held) + item * (vocab * d + 16 * tokens * d) + memory
    else:
        later = sum((depth - 1 - i) / depth for i in sparse)
        operations = 2 * tokens * (merges + triangles) * (later * active + len(sparse) * vocab * d)
        peak = sum(held) + max(held) + item * (vocab * d + tokens * (4 * n * f + 100 * d)) + 16 * 256 * vocab
    disk = len(sparse) * (8 * (merges + 4 * triangles + 2 * n) + 4 * n * (d + f))
    return Cost(operations, operations / rate, BASE_MEMORY + peak, disk)


def estimate_refit(model: Model, keep: int, tokens: int, memory: int = MEMORY) -> Cost:
    """What `refit` costs, as `estimate` says of the barriers; its rate is that of two made-up experts."""
    cfg, sparse, (held, active) = model.config, sparse_layers(model), layer_sizes(model)
    k, d, f = cfg.top_k, cfg.hidden_size, cfg.expert_width
    operations = len(sparse) * refit_operations(tokens, keep, k, d, f) + 4 * tokens * active
    rows = min(PIECE, max(1, tokens * k // keep))
    filled = partial(made_up, model)
    layer = model_io.Layer(Experts(filled(2, f, d), filled(2, f, d), filled(2, d, f)), None, {})
    step = LayerPass(0, "", layer, filled(rows, d), filled(rows, 2), filled(rows, d), torch.nn.Identity())
    started = time.perf_counter()
    refit_layer(step, filled(rows, d).to(model_io.widened(model.dtype)))
    rate = refit_operations(rows, 2, 2, d, f) / (time.perf_counter() - started)
    own = 3 * model_io.widened(model.dtype).itemsize * keep * d * f  # down projections: change, scaled, refitted
    peak = max(held) * (1 + keep / cfg.num_experts) + own + min(memory, activation_bytes(model, tokens))
    stored = sum(info.end - info.start for name, info in model.checkpoint.tensors.items()
                 if ".experts." in name and "down_proj" in name)
    return Cost(operations, operations / rate, BASE_MEMORY + peak, stored * keep / cfg.num_experts)


def refit_operations(tokens: int, keep: int, k: int, d: int, f: int) -> float:
    """Operations of `refit_layer` and of applying its result: three passes through the chosen experts and the factors'
    normal matrix; then in each sweep hidden activations, normal matrices, both products with the residual, a solve."""
    rows = tokens * k
    once = 3 * 6 * rows * d * f + 2 * tokens * keep**2 * d
    return once + SWEEPS * (rows * (8 * d * f + 2 * f * f) + keep * (f**3 / 3 + 2 * f * f * d))


def activation_bytes(model: Model, tokens: int) -> int:
    """What the four streams (T, d) of a refit take."""
    return 4 * tokens * model.config.hidden_size * model_io.widened(model.dtype).itemsize


def made_up(model: Model, *shape: int) -> torch.Tensor:
    """A tensor to time products with."""
    return torch.full(shape, 0.01, dtype=model.dtype, device=model.device)


def sweep_operations(n: int, k: int, d: int, f: int, vocab: int, outcomes: int, members: int, count: int) -> float:
    """Operations a token in the products of the barriers of `count` simplices of `members` experts: the readout and
    the down projections of those that touch it, its own readout and pre-activations. Uniform routing."""
    rows = count * (1 - math.comb(n - k, members) / math.comb(n, members))
    return 2 * d * (rows * (outcomes + members * f) + vocab + 2 * n * f)


def sweep_rate(model: Model, n: int, k: int, d: int, f: int, vocab: int, outcomes: int) -> float:
    """Operations a second of a short sweep over pairs, as many a token as the real one has, of some 2 k experts."""
    filled = partial(made_up, model)
    few, pairs = min(n, 2 * k), math.comb(n, 2)
    wanted = sweep_operations(n, k, d, f, vocab, outcomes, 2, pairs)
    tokens = int(min(max(1.2e12 / wanted, 1), 64))
    simplices = mathx.edges(few).repeat(max(1, round((pairs - math.comb(n - k, 2)) /
                                                     (math.comb(few, 2) - math.comb(few - k, 2)))), 1)
    experts = Experts(filled(few, f, d), filled(few, f, d), filled(few, d, f))
    x, gates, head = filled(tokens, d), filled(tokens, few), filled(vocab, d)
    gates[:, k:] = 0
    norm = partial(model_io.rms_norm, weight=filled(d), eps=1.0)
    operations = tokens * sweep_operations(few, k, d, f, vocab, outcomes, 2, len(simplices))
    seconds = []
    for _ in range(2):  # a processor takes a moment to reach its speed
        started = time.perf_counter()
        lens_barriers(experts, x, gates, x, simplices.to(x.device), norm, head, outcomes)
        seconds.append(time.perf_counter() - started)
    return operations / min(seconds)


def check_cost(model: Model, ids: torch.Tensor, settings: Settings, memory: int) -> None:
    """Says what the `model` readout will cost. Raises InputError where it does not fit in memory."""
    cost = estimate(model, settings, ids.numel(), memory)
    warn(f"--readout model runs every merge through all later layers: {cost.operations:.1e} operations, about "
         f"{timedelta(seconds=round(cost.seconds))} on this machine, {cost.memory / 1e9:.1f} GB of memory")
    if cost.memory > available_memory(model.device):
        raise InputError(f"--readout model needs {cost.memory / 1e9:.1f} GB of memory, "
                         f"{available_memory(model.device) / 1e9:.1f} GB are free; use --readout lens")


def available_memory(device: torch.device) -> int:
    """Free bytes of the device that the model lives on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ----------------------------------------------------------------------------------------------------- the command line


LAYER_HEAD = (
    "layer  eta: gradient  curl           harmonic       additive residual  beta_1    T  discordance  covered at  "
    "routed to\n"
    "       (in brackets: of a constant signal)          energy  variance                              E*   T*    "
    "survivors")


def layer_line(plan: dict) -> str:
    """One line of a layer's findings, under LAYER_HEAD where its barriers were measured."""
    if "eta" not in plan:
        return f"layer {plan['layer']}: {plan['routed_share']:.1%} of the calibration tokens' choices are survivors"
    eta = "  ".join(f"{value:.3f} ({plan['eta_constant'][name]:.3f})" for name, value in plan["eta"].items())
    residual = "  ".join(f"{1 - plan['additive'][of]:{width}.2%}" for of, width in (("energy", 6), ("variance", 8)))
    at = plan["covered_at"]
    return (f"{plan['layer']:5d}  {eta}  {residual}   {plan['betti_1']:6d} {plan['triangles']:4d}  "
            f"{plan['discordance']:11.1%}  {at['edges']:3d}  {at['triangles']:3d}  {plan['routed_share']:10.1%}")


def audit_line(audits: list[dict], outcomes: int) -> str:
    """One line on what a sample of the vocabulary left out."""
    pairs = sum(audit["pairs"] for audit in audits)
    return (f"samples of {outcomes} outcomes, audited on {pairs} (token, simplex) pairs: barriers fall short by "
            f"{sum(audit['shortfall'] for audit in audits) / max(len(audits), 1):.2%} on average, "
            f"of one pair by {max((audit['largest'] for audit in audits), default=0):.1%} at most, "
            f"rank correlation {min((audit['rank_correlation'] for audit in audits), default=1):.4f} at least")


def warn(message: str) -> None:
    """One line on stderr, whatever a stranger's names have in them."""
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"hodgecover: {message}", file=sys.stderr, flush=True)


def progress_bar() -> Callable[[float | None], None]:
    """A function that shows the share of the work done and the time left on stderr; None clears the line.

    On a terminal the line is redrawn twice a second; elsewhere a line is printed twice a minute.
    """
    terminal, shown = sys.stderr.isatty(), time.monotonic()
    started = origin = None  # when, and at which share, the work began that was not in the cache

    def bar(done: float | None) -> None:
        nonlocal shown, started, origin
        now = time.monotonic()
        if started is None:
            started, origin = now, done
        if done is None:
            if terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        elif done > origin and now - shown >= (0.5 if terminal else 30):
            left = timedelta(seconds=round((now - started) * (1 - done) / (done - origin)))
            left = f"{done:4.0%} done, {left} left"
            print(f"\r{left}" if terminal else left, end="" if terminal else "\n", file=sys.stderr, flush=True)
            shown = now
    return bar


class Parser(argparse.ArgumentParser):
    """Raises InputError rather than printing its usage, so that every error takes the same path."""

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the options)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    default = Settings()
    parser = Parser(prog="hodgecover.py", description="Compress a sparse MoE checkpoint to K experts a layer, without "
                    "training. Defaults in brackets.")

    def add(name: str, metavar: str, kind: type, value: float | None, text: str) -> None:
        parser.add_argument(name, metavar=metavar, type=kind, default=value, help=text)

    def choose(name: str, text: str) -> None:
        parser.add_argument(f"--{name}", choices=CHOICES[name], default=getattr(default, name), help=text)
    add("checkpoint", "CKPT", Path, None, "folder with config.json, safetensors and tokenizer.json")
    add("--keep", "K", int, None, "experts to keep in every layer")
    add("--out", "DIR", Path, None, "output folder [CKPT-keepK beside CKPT]")
    parser.add_argument("--calib", metavar="FILE", type=Path, nargs="+", default=[], help="calibration text: UTF-8, or "
                        ".jsonl with a text field [Python's own documentation]")
    add("--tokens", "T", int, TOKENS, "calibration tokens [%(default)s]")
    add("--seq-len", "L", int, SEQ_LEN, "tokens of one sequence [%(default)s]")
    choose("method", "what chooses the survivors [%(default)s]")
    choose("readout", "where barriers are measured: at the layer's own next-token distribution, or end to end, which "
           "is far dearer [%(default)s]")
    add("--order", "ORDER", str, default.order, "total order of the experts that orients the complex: saliency, index "
        "or random:SEED [%(default)s]")
    choose("router", "dropped experts' gate mass: renormalised over the survivors, or folded into their redirect "
           "targets [%(default)s]")
    add("--edge-percent", "P", float, default.edge_percent, "harmonic-critical edges [%(default)s]")
    add("--triangle-percent", "Q", float, default.triangle_percent, "triplet-critical triangles [%(default)s]")
    add("--lambda-edge", "A", float, default.lambda_edge, "weight of covered edges [%(default)s]")
    add("--lambda-triangle", "B", float, default.lambda_triangle, "weight of covered triangles [%(default)s]")
    add("--alpha", "C", float, default.alpha, "harmonic penalty of the redirect [%(default)s]")
    add("--max-triangles", "M", int, default.max_triangles, "candidate triangles [%(default)s]")
    add("--vocab-sample", "N", int, default.vocab_sample, "read each token out on a weighted sample of N of the "
        "vocabulary, and audit that; 0: on all of it, exactly [%(default)s]")
    add("--expert-rate", "R1", float, None, "share of the experts to drop, in place of --keep")
    add("--total-rate", "R", float, None, "prune survivors and shared experts by Wanda until this share of all of the "
        "experts' parameters is gone")
    add("--nm", "N:M", group_of, None, "or keep N of each M consecutive weights of a row of survivors and shared "
        "experts")
    add("--refit", "TOKENS", int, None, "refit the survivors' down projections on so many calibration tokens")
    add("--cache", "DIR", Path, None, "folder of each layer's barriers, written and read [CKPT-barriers beside CKPT]")
    add("--layers", "A-B", layer_range, None, "only measure these layers, into the cache")
    add("--plan", "FILE", Path, None, "export from this hodgecover.json, without calibration")
    parser.add_argument("--estimate", action="store_true", help="only print what measuring the barriers will cost")
    parser.add_argument("--plan-only", action="store_true", help="write hodgecover.json alone")
    add("--eval", "FILE", Path, None, "perplexity of source and output on this text, and their KL")
    add("--seed", "S", int, default.seed, "of the calibration sample and of the triangle sample [%(default)s]")
    add("--memory", "SIZE", byte_count, MEMORY, "buffers of the sweep, beside a layer's weights and the head [1GB]")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
                        help="of the products; auto: bfloat16 where the processor multiplies it, else float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute [%(default)s]")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for name, others in EXCLUDES.items():
        for other in others:
            if {name, other} <= given:
                raise InputError(f"--{name} and --{other} do not go together".replace("_", "-"))
    for name, (low, high) in {"expert_rate": (0, 0.99), "total_rate": (0, 0.99), "tokens": (2, 10**9),
                              "seq_len": (2, 10**9), "refit": (2, 10**9)}.items():
        if getattr(args, name) is not None:
            check_range(name, getattr(args, name), low, high)
    for field in dataclasses.fields(Settings):
        if args.plan and getattr(args, field.name, field.default) != field.default:
            raise InputError(f"--plan and --{field.name} do not go together: the plan is made".replace("_", "-"))
    if not args.estimate and all(value is None for value in (args.keep, args.expert_rate, args.plan, args.layers)):
        raise InputError("give one of --keep K, --expert-rate R1, --plan FILE and --layers A-B")
    if args.refit and args.router == "fold":
        raise InputError("--refit goes with --router drop")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device cpu")
    return args


def group_of(text: str) -> tuple[int, int]:
    """2:4."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: must be two numbers such as 2:4")
    return int(match[1]), int(match[2])


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
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: must be a layer or a range of layers such as 0-7")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def choose_dtype(name: str, readout: str, device: str) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 where the processor has instructions for its products, but never
    for the `model` readout, and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    able = torch.cpu.get_capabilities()
    native = device == "cuda" or any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native and readout == "lens" else torch.float32


def measure_only(model: Model, args: argparse.Namespace, settings: Settings, cache: Path) -> None:
    """--layers: puts the barriers of these layers into the cache."""
    if settings.method in NO_BARRIERS:
        raise InputError(f"--layers measures barriers, which --method {settings.method} does without")
    layers = [index for index in sparse_layers(model) if index in args.layers]
    if args.layers[-1] >= len(model.layer_names) or not layers:
        raise InputError(f"--layers {args.layers[0]}-{args.layers[-1]}: the model has layers 0 to "
                         f"{len(model.layer_names) - 1}, of which with experts: {sparse_layers(model)}")
    ids = calibration_ids(model, args.calib, args.tokens, args.seq_len, settings.seed)
    for index, _ in measure_model(model, ids, settings, layers, cache, args.memory):
        print(f"layer {index}: barriers in {cache}", flush=True)


def say_cost(model: Model, args: argparse.Namespace, settings: Settings) -> None:
    """--estimate."""
    if args.keep is not None:
        check_keep(model, args.keep, "--keep")
    check_sample(args.tokens, args.seq_len)
    if settings.method in NO_BARRIERS and not args.refit:
        raise InputError(f"--estimate: --method {settings.method} measures no barriers; it costs one pass over the "
                         "checkpoint")
    if args.refit:
        check_sample(args.refit, args.seq_len, "--refit")
        if args.keep is None:
            raise InputError("--estimate of --refit needs --keep K")

    def say(what: str, cost: Cost, short: str) -> None:
        print(f"{what} of {len(sparse_layers(model))} layers, {str(model.dtype).removeprefix('torch.')}: "
              f"{cost.operations:.1e} operations, about {timedelta(seconds=round(cost.seconds))} on this machine, "
              f"where a short {short} does {cost.operations / cost.seconds:.1e} a second\n"
              f"  memory: {cost.memory / 1e9:.1f} GB\n  disk: {cost.disk / 1e6:.1f} MB of cache")
    if settings.method not in NO_BARRIERS:
        say("barriers", estimate(model, settings, args.tokens // args.seq_len * args.seq_len, args.memory), "sweep")
    if args.refit:
        tokens = args.refit // args.seq_len * args.seq_len
        say("refit", estimate_refit(model, args.keep, tokens, args.memory), "one")
    print(f"reading: {weight_bytes(model) / 1e9:.1f} GB, which comes on top")
    if args.keep is not None:
        survivors = {model.layer_names[i]: list(range(args.keep)) for i in sparse_layers(model)}
        kept = model_io.surviving_tensors(model.checkpoint, survivors)
        print(f"output: {sum(copy.nbytes() for copy in kept.values()) / 1e9:.1f} GB")


def weight_bytes(model: Model) -> int:
    """Size of a checkpoint's weight files."""
    return sum((model.checkpoint.path / file).stat().st_size for file in model.checkpoint.metadata)


def run(args: argparse.Namespace) -> None:
    """Everything the command line does, after parsing."""
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)
                           if hasattr(args, field.name)})
    dtype = choose_dtype(args.dtype, settings.readout, args.device)
    source, held_out = Model(args.checkpoint, dtype, args.device), None
    at = Path(os.path.abspath(args.checkpoint))
    cache = args.cache or at.with_name(f"{at.name}-barriers")
    refuse_inside(source, cache, "--cache")
    if args.expert_rate is not None:
        args.keep = round((1 - args.expert_rate) * source.config.num_experts)
        check_keep(source, args.keep, f"--expert-rate {args.expert_rate} keeps")
    if args.estimate:
        return say_cost(source, args, settings)
    if args.layers is not None:
        return measure_only(source, args, settings, cache)
    if args.eval:
        held_out = model_io.sequences(source.encode(model_io.read_documents([args.eval])), args.seq_len)
        source.unembedding()  # refused now rather than after the work
    if args.plan:
        plan = read_plan(source, args.plan)
        out = check_out(source, args.out, len(plan["layers"][0]["survivors"]))
        export(source, plan, out)
        router = plan["settings"]["router"]
    else:
        out = compress(args.checkpoint, args.keep, args.out, calib=args.calib, tokens=args.tokens,
                       seq_len=args.seq_len, settings=settings, plan_only=args.plan_only,
                       total_rate=args.total_rate, nm=args.nm, refit_tokens=args.refit or 0, cache=cache,
                       memory=args.memory, dtype=dtype, device=args.device)
        router = settings.router
    if args.plan_only:
        print(f"plan: {out / model_io.PLAN}")
        return
    output = Model(out, dtype, args.device, router=router)
    before, after = weight_bytes(source), weight_bytes(output)
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%})")
    if held_out is not None:
        first, second, kl = evaluate(source, output, held_out)
        print(f"perplexity: {first:.2f} -> {second:.2f}, KL(source || output) {kl:.4f} nats a token "
              f"({held_out.numel():,} tokens of {args.eval.name})")
    print(f"output: {out}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or after one line on stderr 2, or 130 for an interrupt."""
    try:
        run(parse_arguments(argv))
    except InputError as err:
        warn(f"error: {err}")
        return 2
    except OSError as err:  # a disk that is full, a folder that vanished
        warn(f"error: {err.filename or 'writing'}: {err.strerror or err}; the output is whole or absent, and the same "
             "command goes on from the layers that are done")
        return 2
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(err):
            raise
        warn("error: out of memory; --estimate says what is needed, and less goes to buffers with --memory 200MB, say")
        return 2
    except KeyboardInterrupt:
        warn("interrupted; the same command goes on from the layers that are done")
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks
    sys.exit(main())
