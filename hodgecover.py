# SPDX-License-Identifier: MIT
"""HodgeCover (arXiv 2605.13997): compress a sparse Mixture-of-Experts checkpoint without training.

    python hodgecover.py examples/tiny-olmoe --keep 32

The file is the paper, top to bottom: 1 calibrate, 2 barriers, 3 complex, 4 decompose, 5 select, 6 redirect; then the
plan of a layer, a whole model, the record and the command line. Experts keep the checkpoint's own numbers. `mathx.py`
has the fast form of the barriers, the Betti curve and the audit; `model_io.py` the checkpoints.

    n  experts of a layer         k  experts per token (top-k)      K  survivors
    T  calibration tokens         d  hidden size, f  an expert's    V  vocabulary size
    E  n (n - 1) / 2 edges        F  triangles                      M  simplices of one size

E_e(x) is the output of expert e; E*, T* are sets (4.1). Sections and equations are the paper's. Left out: its allocator
across layers (B), which the text at hand lacks: examples/budgets.py. Wanda on the survivors (4.2): examples/wanda.py.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache, reduce
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import torch

if __package__:
    from . import mathx, model_io
    from .model_io import Experts, InputError, Model, check_range
else:
    import mathx
    import model_io
    from model_io import Experts, InputError, Model, check_range

__version__ = "0.3.0"

RECORD, SCHEMA_VERSION = "hodgecover.json", 2
TOKENS, SEQ_LEN = 2048, 512  # default calibration sample
MEMORY = 10**9  # bytes of buffers of the sweep, beside the layer's weights and the head
TINY = torch.finfo(torch.float64).tiny
LAYER_HEAD = "layer  eta_harmonic (constant signal's)  picks until E*, T* are covered  kept       routed to survivors"
Tick = Callable[[float], None]  # told the share of the work that is done


def setting(default, says: str, low: float = 0, high: float = math.inf, pattern: str = "", measured: bool = False):
    """A choice of the method: its default, help, range or pattern, and whether the barriers depend on it."""
    return dataclasses.field(default=default, metadata=locals())  # all arguments, by name


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of the method, an option each. All default values are ours. A choice whose help names no section or
    equation of the paper is ours altogether. Raises InputError for a value out of range."""
    readout: str = setting("lens", "next-token distributions (3.1): the logit lens at the layer or, far slower, at the "
                           "model's end: lens or model", pattern="lens|model", measured=True)
    vocab_sample: int = setting(512, "next tokens sampled for a KL (lens), weighted and audited; 0: all", measured=True)
    max_triangles: int = setting(500, "candidate triangles (A.9)", measured=True)
    thresholds: int = setting(80, "thresholds of the filtration (A.9)", low=2)
    order: str = setting("saliency", "order of the experts that gives edges their signs (3.2): saliency, index or "
                         "random:SEED", pattern=r"saliency|index|random:\d{1,18}")
    margin: float = setting(0.1, "share by which a triplet exceeds its worst edge to count as discordant (3.4)")
    edge_percent: float = setting(5.0, "percent of the edges in E*, the harmonic-critical ones (4.1)", high=100)
    triangle_percent: float = setting(5.0, "percent of the triangles in T*, the triplet-critical ones (4.1)", high=100)
    lambda_edge: float = setting(1.0, "weight of the cover of E* (equation 10)")
    lambda_triangle: float = setting(1.0, "weight of the cover of T* (equation 10)")
    alpha: float = setting(1.0, "harmonic penalty of the redirect (4.1)")
    seed: int = setting(0, "seed of the samples of text, triangles and vocabulary", high=2**63 - 1, measured=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if not limits["pattern"]:
                check_range(field.name, value, limits["low"], limits["high"])
            elif not re.fullmatch(limits["pattern"], value):
                raise InputError(f"{field.name} {value}: must be {limits['says'].rpartition(': ')[2]}")


MEASURED = {field.name for field in dataclasses.fields(Settings) if field.metadata["measured"]}


# ----------------------------------------------------------------------------------------------------- 1 calibrate

class MoELayer(NamedTuple):
    """One layer on the calibration tokens: all that its barriers depend on. All but the experts have one dtype."""
    experts: Experts  # gate (n, f, d), up (n, f, d), down (n, d, f); experts(e, x) is E_e(x)
    x: torch.Tensor  # input of the MoE block (T, d)
    gates: torch.Tensor  # gate weights as the model applies them (T, n), > 0 on the top-k, else 0
    y: torch.Tensor  # residual stream after the layer (T, d)
    norm: Callable[[torch.Tensor], torch.Tensor]  # what the head reads: of some rows, widened (lens); of all T (model)
    unembedding: torch.Tensor  # the model's head W_U (V, d)


def reap_saliency(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """REAP output saliency (4.1; arXiv 2510.13999): the mean over the tokens routed to e of g_e |E_e(x)|, normalised to
    sum 1 over the layer. x (T, d), gates (T, n) -> (n,) float64."""
    saliency = torch.zeros(gates.shape[1], dtype=torch.float64)
    for e in range(len(saliency)):
        t = gates[:, e].nonzero().squeeze(1)
        if len(t):
            saliency[e] = (gates[t, e].double() * experts(e, x[t]).double().norm(dim=1)).mean()
    return saliency / saliency.sum().clamp(min=TINY)


# ------------------------------------------------------------------------------------- 2 barriers (section 3.1, A.10)

def merge_weights(simplices: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Weights of the experts in a merge: each one's share of the simplex's routing rate, equal shares if all rates
    are 0 (A.10). simplices (M, 2 or 3), rates (n,) in any unit -> (M, 2 or 3) float64, rows that sum to 1."""
    rate = rates.double()[simplices]
    total = rate.sum(1, keepdim=True)
    return torch.where(total > 0, rate / total.clamp(min=TINY), 1 / rate.shape[1])


def plain_barrier(layer: MoELayer, simplex: list[int]) -> torch.Tensor:
    """The barrier of a simplex S, a scalar in nats (3.1): average the parameters of its experts, run the layer, compare
    the next-token distributions. Ours: to read them by the logit lens, and how E_S is gated.

        b_S = mean_t KL( p_t || p_S,t ),   p = softmax(W_U norm(y))
        y_S = y + (sum_S g_e) E_S(x) - sum_S g_e E_e(x)

    Every token's gate weight on a member of S goes to the merged expert E_S. To read, and to test `mathx.sweep` by. If
    `norm` runs all later layers first, this is the barrier at the end of the model."""
    experts, x, gates = layer.experts, layer.x, layer.gates
    weights = merge_weights(torch.tensor([simplex]), (gates > 0).sum(0).cpu())[0].to(x)
    merged = Experts(*(torch.tensordot(weights, part[simplex].to(x), 1)[None] for part in experts))  # one, E_S
    y_merged = layer.y + gates[:, simplex].sum(1, keepdim=True) * merged(0, x)
    for e in simplex:
        y_merged = y_merged - gates[:, e, None] * experts(e, x)
    log_p, log_p_S = ((layer.norm(y) @ layer.unembedding.T).double().log_softmax(-1) for y in (layer.y, y_merged))
    return (log_p.exp() * (log_p - log_p_S)).sum(-1).mean()


class Signals(NamedTuple):
    """What is measured on a layer, and all that its plan needs besides K and the settings that are not in MEASURED."""
    frequency: torch.Tensor  # tokens routed to each expert (n,)
    saliency: torch.Tensor  # REAP saliency (n,)
    barriers: torch.Tensor  # of the pairs `edges(n)` (E,), nats
    candidates: torch.Tensor  # candidate triangles, rows ascending (F, 3)
    triplets: torch.Tensor  # their barriers (F,), nats
    audit: torch.Tensor = torch.empty(0, 2, dtype=torch.float64)  # R merges at one token each: sampled KL, exact KL


@torch.no_grad()
def measure_layer(layer: MoELayer, settings: Settings = Settings(), memory: int = MEMORY,
                  tick: Tick = lambda share: None) -> Signals:
    """Saliency, the barriers of all pairs, and those of the candidate triangles. `memory` is the bytes of the sweep's
    buffers. Raises InputError for a result that is not finite."""
    lens, frequency = settings.readout == "lens", (layer.gates > 0).sum(0).cpu()
    saliency = reap_saliency(layer.experts, layer.x, layer.gates)
    sample = mathx.sample_vocabulary(layer, settings.vocab_sample, settings.seed, memory) if lens else None

    def barriers_of(simplices: torch.Tensor, tick: Tick) -> torch.Tensor:
        if lens:
            return mathx.sweep(layer, simplices, merge_weights(simplices, frequency), sample, memory, tick)
        barriers = torch.zeros(len(simplices), dtype=torch.float64)
        for number, simplex in enumerate(simplices.tolist()):
            barriers[number] = plain_barrier(layer, simplex)
            tick((number + 1) / len(simplices))
        return barriers
    pairs = edges(len(frequency))
    share = len(pairs) / max(len(pairs) + settings.max_triangles, 1)
    barriers = barriers_of(pairs, lambda done: tick(share * done))
    candidates = candidate_triangles(barriers, saliency, settings.max_triangles, settings.seed)
    triplets = barriers_of(candidates, lambda done: tick(share + (1 - share) * done))
    if not torch.cat((saliency, barriers, triplets)).isfinite().all():
        raise InputError("a layer's saliencies or barriers are not finite: NaN or infinity in the weights of an "
                         f"expert, or an overflow of {layer.x.dtype}")
    audits = [mathx.audit_sample(layer, simplices, merge_weights(simplices, frequency), sample, settings.seed, memory)
              for simplices in (pairs, candidates) if sample]
    return Signals(frequency, saliency, barriers, candidates, triplets, *([torch.cat(audits)] if audits else []))


# --------------------------------------------------------------------------------------- 3 complex (section 3.2, A.9)

def edges(n: int) -> torch.Tensor:
    """All edges (i, j), i < j, of the complete graph on n vertices, (E, 2), lexicographic."""
    return torch.triu_indices(n, n, offset=1).T.contiguous()


def boundary_matrices(n: int, triangles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundary operators of the complete graph on n vertices with triangles (F, 3), rows ascending.

    d1 : (n, E), column (i, j) is +1 at vertex j, -1 at vertex i
    d2 : (E, F), column (h, i, j) is +1 at edge (i, j), -1 at edge (h, j), +1 at edge (h, i)

    >>> d1, d2 = boundary_matrices(3, torch.tensor([[0, 1, 2]]))
    >>> d2.T.tolist(), (d1 @ d2).abs().max().item()
    ([[1.0, -1.0, 1.0]], 0.0)
    """
    pairs = edges(n)
    d1 = torch.zeros(n, len(pairs), dtype=torch.float64)
    d1[pairs.T, torch.arange(len(pairs))] = d1.new_tensor([[-1], [1]])
    d2 = torch.zeros(len(pairs), len(triangles), dtype=torch.float64)
    d2[mathx.faces(n, triangles).T, torch.arange(len(triangles))] = d2.new_tensor([[1], [-1], [1]])
    return d1, d2


def candidate_triangles(barriers: torch.Tensor, saliency: torch.Tensor, limit: int, seed: int) -> torch.Tensor:
    """Stage 1 of the curation (A.9): 3-cliques of the graph of edges with barrier <= median (the lower of two), (F, 3);
    of more than `limit` a uniform sample, drawn so that the experts' numbering matters only where saliencies tie."""
    n = len(saliency)
    triangles = mathx.cliques(n, edges(n)[barriers <= barriers.median()])
    return mathx.sample_triangles(triangles, saliency, limit, seed) if len(triangles) > limit else triangles


def edge_signs(order: str, saliency: torch.Tensor) -> torch.Tensor:
    """Orientation (3.2) of each edge (i, j), i < j, a sign (E,): +1 if expert i comes first in the total order, -1 if j
    does. The paper fixes any order. Ours (least salient first) matters: barriers have no sign, so that another order
    gives the same edges other signs, other Hodge parts and other critical edges."""
    n = len(saliency)
    if order.startswith("random:"):
        place = torch.randperm(n, generator=torch.Generator().manual_seed(int(order[7:]))).argsort()
    else:
        place = saliency.sort(stable=True).indices.argsort() if order == "saliency" else torch.arange(n)
    return place[edges(n)].diff().squeeze(1).sign().double()


# ------------------------------------------------------------------------------------ 4 decompose (sections 3.2, 3.3)

class HodgeParts(NamedTuple):
    """The three parts of an edge signal, (E,) each: mutually orthogonal, and they sum to the signal."""
    gradient: torch.Tensor
    curl: torch.Tensor
    harmonic: torch.Tensor

    def shares(self) -> dict[str, float]:
        """eta, the shares of the signal's energy |b|^2 (equation 8 and its companions); all 0 if b = 0."""
        energy = max(sum(self).square().sum().item(), TINY)  # the parts sum to b
        return {name: part.square().sum().item() / energy for name, part in self._asdict().items()}


def hodge_decompose(b: torch.Tensor, d1: torch.Tensor, d2: torch.Tensor) -> HodgeParts:
    """Hodge decomposition of an edge signal b (E,) float64 (theorem 1, and the projections of A.5).

    gradient = d1' (d1 d1')^+ d1 b, curl = d2 (d2' d2)^+ d2' b, harmonic = b - gradient - curl, in the kernel of the
    Laplacian d1' d1 + d2 d2' (3.2): what no vertex potential plus triangle boundary explains (proposition 1).

    >>> d1, d2 = boundary_matrices(3, torch.empty(0, 3, dtype=torch.int64))  # an unfilled 3-cycle
    >>> hodge_decompose(torch.tensor([1.0, -1.0, 1.0]).double(), d1, d2).harmonic.tolist()
    [1.0, -1.0, 1.0]
    """
    gradient = d1.T @ (torch.linalg.pinv(d1 @ d1.T, hermitian=True) @ (d1 @ b))
    curl = d2 @ (torch.linalg.pinv(d2.T @ d2, hermitian=True) @ (d2.T @ b))
    return HodgeParts(gradient, curl, b - gradient - curl)


class Complex(NamedTuple):
    """The mergeability complex of a layer and the Hodge parts of its signed barriers."""
    triangles: torch.Tensor  # the candidates up to tau* (F, 3)
    triplets: torch.Tensor  # their barriers (F,)
    tau: float  # tau*, the first of evenly spaced thresholds that maximises beta_1 of K_tau
    betti_curve: torch.Tensor  # beta_1 of K_tau at each threshold
    d1: torch.Tensor  # boundary operators of the complex (n, E)
    d2: torch.Tensor  # and (E, F)
    signs: torch.Tensor  # orientation of each edge (E,)
    parts: HodgeParts  # of signs * barriers


def decompose(signals: Signals, settings: Settings = Settings()) -> Complex:
    """Build the complex (3.2): all edges, and the candidates with barrier <= tau* (stage 2 of A.9); give the barriers
    their signs, and decompose them (3.3). The complex has all edges, K_tau only those <= tau: beta_1 can differ."""
    n, b = len(signals.saliency), signals.barriers
    taus = torch.linspace(*torch.cat((b, signals.triplets)).aminmax(), settings.thresholds, dtype=torch.float64)
    curve = mathx.betti_curve(edges(n), boundary_matrices(n, signals.candidates)[1], b, signals.triplets, taus)
    tau = taus[curve.argmax()].item()
    inside = signals.triplets <= tau
    d1, d2 = boundary_matrices(n, signals.candidates[inside])
    signs = edge_signs(settings.order, signals.saliency)
    return Complex(signals.candidates[inside], signals.triplets[inside], tau, curve, d1, d2, signs,
                   hodge_decompose(signs * b, d1, d2))


# --------------------------------------------------------------------------------- 5 select, 6 redirect (section 4.1)

def critical(values: torch.Tensor, percent: float, floor: float = 0.0) -> torch.Tensor:
    """Positions, ascending, of the top `percent` % of values (M,), their number rounded up; ties go to the first.
    Values <= `floor` are left out: rounding errors must not elect the edges of a signal that has no harmonic part."""
    top = values.sort(descending=True, stable=True).indices[:math.ceil(len(values) * percent / 100 - 1e-9)]
    return top[values[top] > floor].sort().values


def greedy_cover(saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]], keep: int) -> list[int]:
    """Greedy cover: from S empty, add `keep` times the vertex of largest marginal gain F(S + v) - F(S) (equation 11),
    ties to the lowest. F(S) = sum_S saliency + sum over the families of weight |simplices that meet S| / |simplices|
    (equation 10), 0 for an empty family; saliency (n,), simplices (M, 2 or 3). Reaches at least 1 - 1/e of the largest
    F(S) with |S| = keep (proposition 2). The picks for a smaller K are a prefix.

    >>> cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    >>> greedy_cover(torch.zeros(4), [(cycle, 1.0)], 2)  # each is on 2 edges, but {0, 1} covers 3 of 4
    [0, 2]
    """
    picks: list[int] = []
    while len(picks) < keep:
        gain = saliency.double().clone()
        for simplices, weight in families:
            left = simplices[~torch.isin(simplices, torch.tensor(picks)).any(1)]
            gain += weight * left.flatten().bincount(minlength=len(gain)) / max(len(simplices), 1)
        gain[picks] = -math.inf
        picks.append(int(gain.argmax()))
    return picks


def redirect(survivors: list[int], barriers: torch.Tensor, harmonic: torch.Tensor, alpha: float) -> dict[int, int]:
    """Where a dropped expert e goes (4.1): argmin over survivors j of b_ej (1 + alpha |b_harm,ej| / |b|), ties to the
    lowest; the factor is 1 if |b| < 1e-12. For the record alone: the output loses the router rows of dropped experts
    and adds them to no survivor's. |b| is over all E edges, so that the factor is near 1 unless alpha is large."""
    norm = barriers.norm()
    cost = barriers * (1 + alpha * harmonic.abs() / norm) if norm >= 1e-12 else barriers
    table, kept = mathx.table_of_pairs(cost), sorted(survivors)
    return {e: kept[int(table[e, kept].argmin())] for e in range(len(table)) if e not in kept}


def select(signals: Signals, found: Complex, settings: Settings = Settings(), signal: torch.Tensor | None = None
           ) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Cover the harmonic-critical edges E* and the triplet-critical triangles T* greedily: (all experts as picked, of
    which the first K survive; E* (M, 2); T* (M, 3)). Triplet barriers enter here; before, they only choose triangles.
    Critical are the edges where |signal| (E,) is largest, by default that of the harmonic part."""
    n, floor = len(signals.saliency), 1e-12 * signals.barriers.norm().item()
    magnitude = (found.parts.harmonic if signal is None else signal).abs()
    pairs = edges(n)[critical(magnitude, settings.edge_percent, floor)]
    triangles = found.triangles[critical(found.triplets, settings.triangle_percent, floor)]
    families = [(pairs, settings.lambda_edge), (triangles, settings.lambda_triangle)]
    return greedy_cover(signals.saliency, families, n), pairs, triangles


# ------------------------------------------------------------------------------------------- the plan and its report

def plan_from_signals(signals: Signals, keep: int, settings: Settings = Settings(),
                      selector: Callable[[Signals, Complex, Settings], tuple] = select) -> dict:
    """The plan of a layer, as its record has it: decompose, select, redirect, diagnose (examples/README.md has the
    schema). Raises InputError if `keep` is not from 1 to n, and for fewer than two experts."""
    n = len(signals.saliency)
    if not 1 <= keep <= n or n < 2:
        raise InputError(f"keep {keep}: must be from 1 to the layer's {n} experts, of which there must be two")
    found = decompose(signals, settings)
    picks, pairs, triangles = selector(signals, found, settings)
    targets = redirect(picks[:keep], signals.barriers, found.parts.harmonic, settings.alpha)
    plan = plan_of(picks, targets, keep, signals.frequency, signals.saliency)
    return plan | {"diagnostics": diagnose(signals, found, (picks, pairs, triangles), targets, keep, settings.margin)}


def plan_of(order: list[int], targets: dict, keep: int, frequency: torch.Tensor, saliency: torch.Tensor) -> dict:
    """The plan that keeps the first `keep` experts of an order, with the targets of the others; no diagnostics."""
    survivors = sorted(order[:keep])
    share = frequency[survivors].sum() / frequency.sum().clamp(min=1)
    return {"survivors": survivors, "order": order, "redirect": targets, "routed_share": share.item(),
            "frequency": frequency.tolist(), "saliency": saliency.tolist(), "diagnostics": None}


def diagnose(signals: Signals, found: Complex, selection: tuple, targets: dict, keep: int, margin: float) -> dict:
    """Diagnostics: eta and discordance (3.4), beta_1 (3.3), retained energy (abstract); all others are ours."""
    n, b, (picks, pairs, triangles) = len(signals.saliency), signals.barriers, selection
    worst = b[mathx.faces(n, signals.candidates)].amax(1)  # of the edges of each candidate
    loads = [list(targets.values()).count(target) for target in set(targets.values())]  # redirects to a survivor
    components = {name: (part, edges(n)) for name, part in found.parts._asdict().items()}
    components["triplet"] = found.triplets, found.triangles
    constant = hodge_decompose(found.signs, found.d1, found.d2)  # of barriers that say nothing
    return {
        "eta": found.parts.shares(), "eta_constant": constant.shares(),
        "additive": mathx.additive_shares(b, found.d1),
        "betti_1": mathx.betti_1(found.d1, found.d2), "betti_curve": found.betti_curve.tolist(), "tau": found.tau,
        "triangles": len(found.triangles), "candidates": len(signals.candidates),
        "discordance": (signals.triplets > (1 + margin) * worst).double().mean().nan_to_num().item(),
        "discordance_quantiles": mathx.quartiles((signals.triplets / worst)[worst > 0]),
        "critical_edges": pairs.tolist(), "critical_triangles": triangles.tolist(),
        "covered_at": {"edges": mathx.covered_at(picks, pairs), "triangles": mathx.covered_at(picks, triangles)},
        "retained": {name: mathx.retained(*pair, picks[:keep]) for name, pair in components.items()},
        "redirect_targets": len(loads), "redirect_largest": max(loads, default=0), "mean_barrier": b.mean().item(),
        "audit": mathx.shortfall(*signals.audit.unbind(1)) if len(signals.audit) else None}


def plan_layer(layer: MoELayer, keep: int, settings: Settings = Settings()) -> dict:
    """Plan one MoE layer from tensors in memory: measure it, and do what `plan_from_signals` does."""
    return plan_from_signals(measure_layer(layer, settings), keep, settings)


# ------------------------------------------------------------------------------------------------- the whole model

def calibration_ids(model: Model, files: Sequence[Path] = (), tokens: int = TOKENS, seq_len: int = SEQ_LEN,
                    seed: int = 0, parts: Sequence[str] = ("calibration",)) -> torch.Tensor:
    """Sequences (tokens // seq_len, seq_len) of text files, of each as many, or of parts of Python's documentation; if
    the one text is short, fewer with a warning. Raises InputError for a bad number, and if one of several is short."""
    check_range("tokens", tokens, 2, 10**9)
    if len(files) > 1 and seq_len > tokens // len(files):
        raise InputError(f"tokens {tokens}: too few for a sequence of {seq_len} from each of {len(files)} files")
    check_range("seq_len", seq_len, 2, tokens)
    check_range("seed", seed, 0, 2**63 - 1)
    warn_of_length(model, seq_len)
    count, samples = tokens // seq_len, []
    for file, share in zip(files or [None], shares(count, len(files) or 1)):
        text = model.encode_file(file, share * seq_len) if file else model.encode(
            sum(map(model_io.python_documentation, parts), ()))
        if len(files) > 1 and len(text) < share * seq_len:
            raise InputError(f"{file}: has {len(text)} tokens, its share of tokens {share * seq_len}; give more")
        samples.append(model_io.sequences(text, seq_len, share, seed))
    if sum(map(len, samples)) < count:
        warn(f"the text has only {len(samples[0]) * seq_len} tokens in whole sequences, all used; {tokens} were asked")
    return torch.cat(samples)


def shares(count: int, files: int) -> list[int]:
    """Sequences that each of some files gives of a sample of `count`: as equal as can be."""
    return [len(range(i, count, files)) for i in range(files)]


def warn_of_length(model: Model, seq_len: int) -> None:
    """Warn if a sequence is longer than those that the model was trained on."""
    if (most := model.config.max_positions) and seq_len > most:
        warn(f"seq_len {seq_len}: the model is made for at most {most} tokens (max_position_embeddings)")


def sparse_layers(model: Model) -> list[int]:
    """Indices of the layers that have experts. Raises InputError if there is none, or no two experts."""
    found = [i for i, config in enumerate(model.layer_configs) if config.sparse]
    if not found or model.config.num_experts < 2:
        raise InputError(f"{model.checkpoint.path}: no layer has a router over two experts or more; it is dense")
    return found


def check_keep(model: Model, keep: int) -> None:
    """Raise InputError for a dense model, and if not every layer can keep `keep` experts."""
    n, k = min(model.layer_configs[i].num_experts for i in sparse_layers(model)), model.config.top_k
    if not k <= keep <= n:
        raise InputError(f"keep {keep}: must be from {k} to {n}: the model has {n} experts in its smallest layer, and "
                         f"routes a token to {k}")


def end_of_model(model: Model, ids: torch.Tensor, index: int, norm: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the head reads of the stream (T, d) after layer `index`: all later layers, held in memory, then the norm."""
    def run_layer(y: torch.Tensor, layer: model_io.Layer) -> torch.Tensor:
        return model_io.run_layer(y.view(*ids.shape, -1), layer, model.config)[2]
    layers = [model.layer(later) for later in range(index + 1, model.config.num_layers)]
    return lru_cache(maxsize=2)(lambda y: norm(reduce(run_layer, layers, y)))  # y itself is asked for each barrier


def text_hash(ids: torch.Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest()


def cache_key(model: Model, ids: torch.Tensor, settings: Settings) -> dict[str, str]:
    """All that a layer's signals depend on: content alone, so that copies of a checkpoint share a cache."""
    said = {name: str(value) for name, value in dataclasses.asdict(settings).items() if name in MEASURED}
    return said | {"format": "4", "weights": model.checkpoint.fingerprint(), "dtype": str(model.dtype),
                   "text": f"{[*ids.shape]} {text_hash(ids)}"}


def measure_model(model: Model, ids: torch.Tensor, settings: Settings, layers: Sequence[int], cache: Path | None = None,
                  memory: int = MEMORY, tick: Tick = lambda share: None) -> Iterator[tuple[int, Signals]]:
    """Signals of layers (ascending indices), from the cache or from one forward pass over ids (B, L), which stops at
    the last one that needs it. What is measured goes into the cache at once."""
    if cache:
        model_io.make_cache(cache := Path(cache))
    key = cache_key(model, ids, settings) if cache else {}
    stream, head = model.stream(ids), None
    for number, index in enumerate(layers):
        name = model.layer_names[index]
        tensors = model_io.read_cached(cache, name, key) if cache else None
        if not tensors:
            head = model.unembedding() if head is None else head
            step = next(step for step in stream if step.index == index)
            norm = step.norm if settings.readout == "lens" else end_of_model(model, ids, index, step.norm)
            layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, norm, head)
            tensors = measure_layer(layer, settings, memory, lambda done: tick((number + done) / len(layers)))._asdict()
            del step, layer, norm
            if cache:
                model_io.write_cached(cache, name, key, tensors)
        yield index, Signals(**tensors)


def plan_model(model: Model, ids: torch.Tensor, keep: int, settings: Settings = Settings(), cache: Path | None = None,
               memory: int = MEMORY, tick: Tick = lambda share: None) -> Iterator[tuple[str, dict]]:
    """(name, plan) of each sparse layer, from calibration on ids (B, L): a dict of them is what `export` takes. Raises
    InputError as its parts do, when the first one is asked for."""
    check_keep(model, keep)
    for index, signals in measure_model(model, ids, settings, sparse_layers(model), cache, memory, tick):
        yield model.layer_names[index], plan_from_signals(signals, keep, settings)


# ------------------------------------------------------------------------------------------ the record and the export

def record_entry(command: str, settings: dict, ids: torch.Tensor | None, files: Sequence[Path], **read: Model) -> dict:
    """An entry of a record's history: a command, its settings, its text ids (B, L), if it read any, of these files
    (none: Python's documentation), and the checkpoints that it read, by their role."""
    text = {} if ids is None else {"tokens": ids.numel(), "seq_len": ids.shape[1], "text_sha256": text_hash(ids),
                                   "text": [Path(file).name for file in files] or "python documentation"}
    if text and len(files) > 1:
        text["tokens_of_each"] = [share * ids.shape[1] for share in shares(len(ids), len(files))]
    return {"version": __version__, "command": command, "settings": settings | text} | {
        role: {"name": model_io.beside(model.checkpoint.path, "").name, "model_type": model.config.model_type,
               "num_experts": model.config.num_experts, "top_k": model.config.top_k,
               "fingerprint": model.checkpoint.fingerprint()} for role, model in read.items()}


def plan_entry(model: Model, plans: dict[str, dict], keep: int, settings: Settings, ids: torch.Tensor | None,
               files: Sequence[Path] = (), command: str = "hodgecover.py", **more: object) -> dict:
    """The entry of a record's history that holds plans by layer name; `files` name the text, as in `record_entry`."""
    said = {"keep": keep, **more} | dataclasses.asdict(settings) | {"dtype": str(model.dtype).removeprefix("torch.")}
    layers = [{"layer": model.layer_names.index(name), "name": name} | plan for name, plan in plans.items()]
    return record_entry(command, said, ids, files, source=model) | {"layers": layers}


def read_history(path: Path) -> list[dict]:
    """The history in a record, oldest entry first. Raises InputError if the file is no such record."""
    record = model_io.read_json(path)
    if record.get("schema_version") != SCHEMA_VERSION or not isinstance(record.get("history"), list):
        raise InputError(f"{path}: not a record of schema_version {SCHEMA_VERSION} with a history")
    return record["history"]


def record_bytes(checkpoint: model_io.Checkpoint, entry: dict) -> bytes:
    """The content of hodgecover.json: the checkpoint's record, if it has one, with one more entry in its history. A
    list of numbers takes one line. Raises InputError if the checkpoint's file of that name is no record."""
    path = checkpoint.path / RECORD
    record = {"schema_version": SCHEMA_VERSION, "history": [*(read_history(path) if path.exists() else []), entry]}
    text = json.dumps(record, indent=1, allow_nan=False)
    return (re.sub(r'\[\n[^{}"]*\]', lambda numbers: json.dumps(json.loads(numbers[0])), text) + "\n").encode()


def export(model: Model, plans: dict[str, dict], out: Path, entry: dict) -> None:
    """Write the checkpoint that keeps the survivors of all sparse layers' plans, by name, and its record, to `out`."""
    survivors = {name: plan["survivors"] for name, plan in plans.items()}
    model_io.write_checkpoint(model.checkpoint, Path(out), survivors, {RECORD: record_bytes(model.checkpoint, entry)})


def refuse_inside(model: Model, path: Path, parameter: str) -> None:
    """Raise InputError for a path in the checkpoint's folder."""
    if model.checkpoint.path.resolve() in (path.resolve(), *path.resolve().parents):
        raise InputError(f"{parameter} {path}: lies in the checkpoint, which is never written to; name another")


def check_out(model: Model, out: Path, cache: Path | None = None, plan: bool = False) -> None:
    """Raise InputError if an output folder, or a plan's file, lies in the checkpoint or around the cache, or cannot be
    made, and if the checkpoint has a record that cannot be continued."""
    record_bytes(model.checkpoint, {})
    refuse_inside(model, out, "out")
    if cache and out.resolve() in (cache.resolve(), *cache.resolve().parents):
        raise InputError(f"out {out}: would hold the cache {cache}; name another")
    model_io.check_new(out)
    if plan and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"out {out}: a plan is a file in a folder that is there; name another")


# ------------------------------------------------------------------------------------------------ the command line

def show_plans(model: Model, plans: Iterator[tuple[str, dict]], bar: Callable) -> dict[str, dict]:
    """Print a line for each layer as its plan is made, and one on its sample; return the plans by layer name."""
    shown = {}
    for name, plan in plans:
        bar(None)
        found, kept = plan["diagnostics"], f"{len(plan['survivors'])} of {len(plan['order'])}"
        eta = f"{found['eta']['harmonic']:.3f} ({found['eta_constant']['harmonic']:.3f})"
        covered = "{edges}, {triangles}".format(**found["covered_at"])
        line = f"{model.layer_names.index(name):5d}  {eta:<34}  {covered:<31}  {kept:<9}  {plan['routed_share']:.1%}"
        print(line if shown else f"{LAYER_HEAD}\n{line}", flush=True)
        if audit := found["audit"]:
            print(f"       barriers by sample: {-audit['shortfall']:+.2%} +- {audit['standard_error']:.2%} from exact "
                  f"ones, one by {audit['largest']:.1%}, rank correlation {audit['rank_correlation']:.4f}", flush=True)
        shown[name] = plan
    return shown


def progress_bar() -> Callable[[float | None], None]:
    """A function that shows the share of the work done and the time left on stderr; None clears the line. On a terminal
    the line is redrawn twice a second; elsewhere a line is printed twice a minute."""
    start, end, every = ("\r", "\x1b[K", 0.5) if sys.stderr.isatty() else ("", "\n", 30)
    shown, first = time.monotonic(), None  # first: time and share at the first call; earlier work was in the cache

    def bar(done: float | None) -> None:
        nonlocal shown, first
        now = time.monotonic()
        first = first or done is not None and (now, done)
        if done is None:
            print(start and start + end, end="", file=sys.stderr, flush=True)
        elif done > first[1] and now - shown >= every:
            left = timedelta(seconds=round((now - first[0]) * (1 - done) / (done - first[1])))
            print(f"{start}{done:4.0%} done, {left} left", end=end, file=sys.stderr, flush=True)
            shown = now
    return bar


def warn(message: str, kind: str = "warning") -> None:
    """Print a single line on stderr, whatever a stranger's file names have in it."""
    says = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"{kind}: {says}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of printing its usage, so that every error takes the same path."""
    def error(self, message: str):
        raise InputError(f"{message} (--help lists the options)")


def add_common_options(parser: argparse._ActionsContainer, tokens: int = TOKENS, use: str = "calibration",
                       memory: bool = True) -> None:
    """Options of every command: text for a `use`, if it reads any `tokens`; --memory, if any buffers; dtype, device."""
    if tokens:
        parser.add_argument("--calib", metavar="FILE", type=Path, nargs="+", default=[], help=f"{use} text: UTF-8, or "
                            ".jsonl with text or chat messages on each line; as much of each file [Python's own docs]")
        parser.add_argument("--tokens", metavar="T", type=int, default=tokens, help=f"{use} tokens [%(default)s]")
        parser.add_argument("--seq-len", metavar="L", type=int, default=SEQ_LEN, help="of a sequence [%(default)s]")
    if memory:
        parser.add_argument("--memory", metavar="SIZE", type=byte_count, default=MEMORY, help="of the buffers [1GB]")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
                        help="of the products; auto: bfloat16 if the processor multiplies it, else float32")
    parser.add_argument("--device", default="cpu", help="any device of torch; only cpu is tested [cpu]")


def add_settings(parser: argparse._ActionsContainer, *names: str) -> None:
    """An option for each of Settings, or for those of these names."""
    for field in dataclasses.fields(Settings):
        if not names or field.name in names:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), metavar="X",
                                default=field.default, help=f"{field.metadata['says']} [%(default)s]")


def byte_count(text: str) -> int:
    """1GB, 500MB or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(|MB|GB)", text)
    size = int(float(match[1]) * {"": 1, "MB": 10**6, "GB": 10**9}[match[2]]) if match else 0
    if size < 10**7:
        raise argparse.ArgumentTypeError(f"{text}: must be a size of 10MB or more, such as 1GB or 500MB")
    return size


def layer_range(text: str) -> range:
    """3, or 0-7."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: must be a layer or a range of layers such as 0-7")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def choose_dtype(name: str, device: str, readout: str = "lens") -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 if the device has instructions for its products, but never for the
    `model` readout, and float32 otherwise. Raises InputError for a device that torch cannot use."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ValueError) as err:
        raise InputError(f"device {device}: this torch cannot use it ({str(err).splitlines()[0]}); use cpu") from None
    able = torch.cpu.get_capabilities() if device.startswith("cpu") else {"bf16": device.startswith("cuda")}
    native = any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16")) and readout == "lens"
    return getattr(torch, name) if name != "auto" else torch.bfloat16 if native else torch.float32


def command_line() -> Parser:
    """The parser of this command."""
    parser = Parser(prog="hodgecover.py", description="Compress a sparse MoE checkpoint without training.")
    parser.add_argument("--version", action="version", version=f"hodgecover {__version__}")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder of config, weights and tokenizer.json")
    basic, method = map(parser.add_argument_group, ("what people need [defaults]", "the method's choices [defaults]"))
    what = basic.add_mutually_exclusive_group(required=True)
    what.add_argument("--keep", metavar="K", type=int, help="experts to keep in every layer")
    what.add_argument("--layers", metavar="A-B", type=layer_range, help="only measure these layers, into the cache")
    basic.add_argument("--out", metavar="DIR", type=Path, help="output folder, or file of --plan-only [CKPT-keepK]")
    basic.add_argument("--plan-only", action="store_true", help="write the plan alone, as a file")
    add_common_options(basic)
    add_settings(method)
    basic.add_argument("--cache", metavar="DIR", type=Path, help="folder of the layers' barriers [CKPT-barriers]")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together: none is ignored."""
    given = {name for name, value in vars(args).items() if value != command_line().get_default(name)}
    for name in sorted(given & {*vars(Settings()), "out", "plan_only"} - MEASURED) if args.layers is not None else ():
        raise InputError(f"{name}: does not go with --layers, which only measures barriers")
    for name in sorted(given & {"memory", "vocab_sample"}) if args.readout == "model" else ():
        raise InputError(f"{name}: does not go with --readout model, which is exact and holds every layer")
    if args.readout == "model" and args.dtype == "bfloat16":
        raise InputError("dtype bfloat16: loses the small difference of streams that --readout model compares")


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    settings = Settings(**{name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__})
    model = Model(args.checkpoint, choose_dtype(args.dtype, args.device, settings.readout), args.device)
    cache, sparse = args.cache or model_io.beside(args.checkpoint, "-barriers"), sparse_layers(model)
    refuse_inside(model, cache, "cache")
    if args.layers is None:
        check_keep(model, args.keep)
        out = args.out or model_io.beside(args.checkpoint, f"-keep{args.keep}{'.json' * args.plan_only}")
        check_out(model, out, cache, args.plan_only)
    elif not (wanted := sorted({*sparse} & {*args.layers})) or args.layers[-1] >= len(model.layer_names):
        raise InputError(f"layers {args.layers[0]}-{args.layers[-1]}: the model has experts in layers {sparse}")
    ids, bar = calibration_ids(model, args.calib, args.tokens, args.seq_len, settings.seed), progress_bar()
    if args.layers is not None:
        for index, _ in measure_model(model, ids, settings, wanted, cache, args.memory, bar):
            bar(None)
            print(f"layer {index}: barriers in {cache}", flush=True)
        return
    plans = show_plans(model, plan_model(model, ids, args.keep, settings, cache, args.memory, bar), bar)
    entry = plan_entry(model, plans, args.keep, settings, ids, args.calib)
    text = ", ".join(map(str, args.calib)) or "Python's documentation; --calib FILE: text of the model's own kind"
    print(f"calibration: {ids.numel():,} tokens of {text}")
    if args.plan_only:
        model_io.write_whole(out, record_bytes(model.checkpoint, entry))
        return print(f"plan: {out}; examples/export_plan.py writes its checkpoint")
    export(model, plans, out, entry)
    before, after = model.checkpoint.nbytes(), model_io.Checkpoint(out).nbytes()
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%})\noutput: {out}\n"
          f"compare: python examples/evaluate.py {args.checkpoint} {out} --text FILE")


def run_command(parser: Parser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or after one line on stderr 2, or 130 for an interrupt. Errors name a
    parameter first, and here its option."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks
    try:
        work(parser.parse_args(argv))
        return 0
    except InputError as err:
        options = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
        says = re.sub(r"^\w+", lambda parameter: options.get(parameter[0], parameter[0]), str(err))
    except (OSError, model_io.SafetensorError) as err:  # a disk that is full, a folder that vanished
        what, why = (getattr(err, name, None) for name in ("filename", "strerror"))
        says = f"{what or 'writing'}: {why or err}; the output is whole or absent"
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(err):
            raise
        says = "out of memory; examples/estimate.py says what is needed; give less to buffers, as in --memory 200MB"
    except KeyboardInterrupt:
        warn("the output is absent; the same command goes on from what was saved", f"{parser.prog}: interrupted")
        return 130
    warn(says, f"{parser.prog}: error")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(command_line(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
