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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

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

SCHEMA_VERSION = 1
TOKENS, SEQ_LEN = 2048, 512  # default calibration sample
BUFFER_BYTES = 1 << 27  # what one step of the barrier sweep may take beside the layer's weights and the head
CACHE_BYTES = 1 << 21  # what its innermost step works on: a block of logits that a processor's cache holds

Tick = Callable[[float], None]  # told the share of the work that is done
Readout = Callable[..., torch.Tensor]  # (experts, x, gates, y, simplices, tick=...) -> barriers (M,)


@dataclass(frozen=True)
class Settings:
    """Every choice of the method. The paper names these quantities; the values are ours (README)."""

    readout: str = "lens"
    order: str = "saliency"
    router: str = "drop"
    edge_percent: float = 5.0
    triangle_percent: float = 5.0
    lambda_edge: float = 1.0
    lambda_triangle: float = 1.0
    alpha: float = 1.0
    max_triangles: int = 500
    thresholds: int = 80
    margin: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"--{name} {getattr(self, name)}: must be {' or '.join(choices)}")
        for name, (low, high) in RANGES.items():
            check_range(name, getattr(self, name), low, high)


CHOICES = {"readout": ("lens", "model"), "order": ("saliency", "index"), "router": ("drop", "fold")}
RANGES = {"edge_percent": (0, 100), "triangle_percent": (0, 100), "lambda_edge": (0, math.inf),
          "lambda_triangle": (0, math.inf), "alpha": (0, math.inf), "max_triangles": (0, math.inf),
          "thresholds": (2, math.inf), "margin": (0, math.inf), "seed": (0, 2**63 - 1)}


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises InputError for an option that is no finite number from low to high."""
    if not low <= value <= high or value == math.inf:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be "
                         + (f"from {low} to {high}" if high < math.inf else f"at least {low}"))


# ------------------------------------------------------------------------------------------------- 1 calibrate


def reap_saliency(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """REAP output saliency (arXiv 2510.13999): the mean over the tokens routed to e of g_e |E_e(x)|, normalised
    to sum 1 over the layer. x (T, d), gates (T, n) -> (n,) float64."""
    saliency = torch.zeros(gates.shape[1], dtype=torch.float64)
    for e in range(len(saliency)):
        t = gates[:, e].nonzero().squeeze(1)
        if len(t):
            saliency[e] = (gates[t, e].double() * experts(e, x[t]).double().norm(dim=1)).mean()
    return saliency / saliency.sum().clamp(min=torch.finfo(torch.float64).tiny)


# ------------------------------------------------------------------------ 2 barriers (paper section 3.1, A.10)


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
    n, f, _ = experts.gate.shape
    gate = (x @ experts.gate.flatten(0, 1).T).view(-1, n, f)
    up = (x @ experts.up.flatten(0, 1).T).view(-1, n, f)
    members, w = simplices[s], weights[s].to(x)
    g = gates[t[:, None], members]

    def merged(activation: torch.Tensor) -> torch.Tensor:
        return sum(w[:, c, None] * activation[t, members[:, c]] for c in range(members.shape[1]))
    hidden = torch.nn.functional.silu(merged(gate)) * merged(up) * g.sum(1, keepdim=True)
    own = torch.nn.functional.silu(gate) * up * gates[:, :, None]
    change = x.new_zeros(len(t), x.shape[1])
    for e in range(n):
        r, c = (members == e).nonzero().unbind(1)
        if len(r):
            change.index_add_(0, r, (w[r, c, None] * hidden[r] - own[t[r], e]) @ experts.down[e].T)
    return change


def token_chunks(sizes: torch.Tensor) -> Iterator[slice]:
    """Consecutive runs of tokens of about BUFFER_BYTES each (one token at least); sizes (T,) in bytes."""
    start = 0
    for count in torch.unique_consecutive(sizes.cumsum(0) // BUFFER_BYTES, return_counts=True)[1].tolist():
        yield slice(start, start + count)
        start += count


def lens_barriers(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, simplices: torch.Tensor,
                  norm: Callable[[torch.Tensor], torch.Tensor], unembedding: torch.Tensor,
                  tick: Tick = lambda share: None) -> torch.Tensor:
    """Barriers b_S = mean_t KL(p_t || p_S,t) under the `lens` readout p = softmax(W_U norm(y)).

    Parameters
    ----------
    x, gates, y : MoE input (T, d), gate weights as applied (T, n), residual stream after the layer (T, d)
    simplices : (M, 2 or 3) expert indices
    norm, unembedding : the model's final norm, and its head W_U (V, d)

    Returns (M,) float64, nats.
    """
    wide, (n, f, d) = model_io.widened(x.dtype), experts.gate.shape
    weights, hit = merge_weights(simplices, (gates > 0).sum(0)), touched(gates, simplices)
    total = torch.zeros(len(simplices), dtype=torch.float64, device=x.device)
    rows_at = hit.sum(1)  # merges that change the token
    sizes = wide.itemsize * (rows_at * 4 * (d + f) + 4 * n * f + 2 * len(unembedding))
    for chunk in token_chunks(sizes) if len(simplices) else ():
        t, s = hit[chunk].nonzero().unbind(1)
        change = merge_change(experts, x[chunk], gates[chunk], simplices, weights, t, s)
        stream = y[chunk].to(wide)
        u = norm(stream)
        du = (norm(stream[t] + change) - u[t]).to(x.dtype)
        log_p = torch.cat([u @ part.to(wide).T for part in unembedding.split(4096)], dim=1).log_softmax(-1)
        counts = rows_at[chunk].tolist()
        for token, rows, hits in zip(log_p, du.split(counts), s.split(counts)):
            blocks = (rows @ unembedding.T).split(max(1, CACHE_BYTES // (wide.itemsize * len(unembedding))))
            kl = torch.cat([mathx.kl_of_logit_change(token, block.to(wide)) for block in blocks])
            total.index_add_(0, hits, kl.double())
        tick(chunk.stop / len(x))
    return total.cpu() / len(x)


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
    """What a layer's plan is made from. Edges and triangles are in rank space: vertex r is expert rank[r].

    rank (n,), frequency (n,) tokens routed to each expert, saliency (n,), edge barriers (|E|,), candidate
    triangles (m, 3) and their triplet barriers (m,).
    """

    rank: torch.Tensor
    frequency: torch.Tensor
    saliency: torch.Tensor
    barriers: torch.Tensor
    candidates: torch.Tensor
    triplets: torch.Tensor


def measure_layer(experts: Experts, x: torch.Tensor, gates: torch.Tensor, y: torch.Tensor, readout: Readout,
                  settings: Settings = Settings(), tick: Tick = lambda share: None) -> Signals:
    """Saliency, the barriers of all pairs, and the triplet barriers of the candidate triangles of one layer.

    Parameters as for `lens_barriers`; readout is `partial(lens_barriers, norm=..., unembedding=...)` or the like.
    """
    n = gates.shape[1]
    saliency = reap_saliency(experts, x, gates)
    rank = saliency.sort(stable=True).indices if settings.order == "saliency" else torch.arange(n)
    pairs = mathx.edges(n)
    share = len(pairs) / (len(pairs) + settings.max_triangles)
    barriers = readout(experts, x, gates, y, rank[pairs].to(x.device), tick=lambda done: tick(share * done))
    candidates = mathx.candidate_triangles(n, barriers, settings.max_triangles, settings.seed)
    triplets = readout(experts, x, gates, y, rank[candidates].to(x.device),
                       tick=lambda done: tick(share + (1 - share) * done))
    if not torch.cat((saliency, barriers, triplets)).isfinite().all():
        raise InputError("a layer's saliencies or barriers are not finite: NaN or infinity in the weights of an "
                         f"expert, or an overflow of {x.dtype}")
    return Signals(rank, (gates > 0).sum(0).cpu(), saliency, barriers, candidates, triplets)


# ------------------------------------------- 3 to 6: complex, decomposition, cover, redirect (sections 3.2 to 4.1)


def curate_triangles(signals: Signals, settings: Settings) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Stage 2 of appendix A.9: the candidates with barrier <= tau*, where tau* is the first of evenly spaced
    thresholds, from the smallest to the largest barrier of edges and candidates, that maximises beta_1 of K_tau.

    Returns (mask of the candidates, tau*, beta_1 at each threshold). K_tau has only the edges up to tau; the complex
    of the decomposition then has all edges, whatever tau*.
    """
    n = len(signals.rank)
    both = torch.cat((signals.barriers, signals.triplets))
    thresholds = torch.linspace(both.min().item(), both.max().item(), settings.thresholds, dtype=torch.float64)
    curve = mathx.betti_curve(n, signals.barriers, signals.candidates, signals.triplets, thresholds)
    tau = thresholds[curve.argmax()].item()
    return signals.triplets <= tau, tau, curve


def plan_from_signals(signals: Signals, keep: int, settings: Settings = Settings()) -> dict:
    """The plan of one layer from its barriers: Hodge parts, critical simplices, greedy cover, redirect.

    Returns the layer's entry of hodgecover.json (README), in expert indices.
    """
    n, rank, b = len(signals.rank), signals.rank, signals.barriers
    if not 1 <= keep <= n or n < 2:
        raise InputError(f"keep {keep}: must be from 1 to the layer's {n} experts, of which there must be two")
    inside, tau, curve = curate_triangles(signals, settings)
    triangles, triplets = signals.candidates[inside], signals.triplets[inside]
    d1, d2 = mathx.boundary_matrices(n, triangles)
    parts = mathx.hodge_decompose(b, d1, d2)
    flat = mathx.hodge_decompose(torch.ones_like(b), d1, d2)
    additive = mathx.additive_model(b, d1)
    discordance = mathx.discordance(n, b, signals.candidates, signals.triplets, settings.margin)

    tiny = 1e-12 * b.norm().item()
    critical_edges = mathx.edges(n)[mathx.critical(parts.harmonic.abs(), settings.edge_percent, tiny)]
    critical_triangles = triangles[mathx.critical(triplets, settings.triangle_percent, tiny)]
    families = [(critical_edges, settings.lambda_edge), (critical_triangles, settings.lambda_triangle)]
    order, covered_at = mathx.greedy_cover(signals.saliency[rank], families, n)
    target = mathx.redirect(order[:keep], b, parts.harmonic, settings.alpha)

    def experts(vertices: torch.Tensor | list[int]) -> list:
        return rank[torch.as_tensor(vertices, dtype=torch.int64)].sort(-1).values.tolist()
    survivors = experts(order[:keep])
    return {
        "survivors": survivors,
        "order": rank[order].tolist(),
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
        "covered_at": {"edges": covered_at[0], "triangles": covered_at[1]},
        "routed_share": (signals.frequency[survivors].sum() / signals.frequency.sum().clamp(min=1)).item(),
        "mean_barrier": b.mean().item(),
        "frequency": signals.frequency.tolist(),
        "saliency": signals.saliency.tolist(),
    }


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


# ---------------------------------------------------------------------------------------------- the whole model


def calibration_ids(model: Model, files: list[Path], tokens: int, seq_len: int, seed: int) -> torch.Tensor:
    """Sequences (tokens // seq_len, seq_len) sampled from the user's files, or from Python's documentation."""
    if not 2 <= seq_len <= tokens:
        raise InputError(f"--seq-len {seq_len}: must be from 2 to the {tokens} of --tokens")
    documents = model_io.read_documents(files) if files else model_io.python_documentation("calibration")
    ids = model_io.sequences(model.encode(documents), seq_len, tokens // seq_len, seed)
    if ids.numel() < tokens // seq_len * seq_len:
        warn(f"the calibration text has only {ids.numel()} tokens in whole sequences, all used; {tokens} were asked")
    return ids


def make_readout(model: Model, settings: Settings, ids: torch.Tensor) -> Callable[[LayerPass], Readout]:
    """layer pass -> barrier function of that layer. For `model` this loads every layer; see `check_cost`."""
    head = model.unembedding()
    if settings.readout == "lens":
        return lambda step: partial(lens_barriers, norm=step.norm, unembedding=head)
    check_cost(model, ids, settings)
    depth = model.config.num_layers
    layers = [model.layer(index) for index in range(depth)]

    def later(y: torch.Tensor, index: int, norm: Callable) -> torch.Tensor:
        for layer in layers[index + 1:]:
            y = model_io.run_layer(y.view(*ids.shape, -1), layer, model.config)[2]
        return norm(y)
    return lambda step: partial(model_barriers, unembedding=head,
                                later=partial(later, index=step.index, norm=step.norm))


def check_cost(model: Model, ids: torch.Tensor, settings: Settings) -> None:
    """Says what the `model` readout will cost. Raises InputError where it does not fit in memory, or in bfloat16,
    which loses the small difference of two streams."""
    cfg, tokens = model.config, ids.numel()
    if model.dtype == torch.bfloat16:
        raise InputError("--readout model compares streams that bfloat16 cannot tell apart; use --dtype float32")
    depth, width = cfg.num_layers, cfg.hidden_size
    size = {name: math.prod(info.shape) for name, info in model.checkpoint.tensors.items()
            if name.startswith(f"{model.prefix}layers.")}
    experts = sum(count for name, count in size.items() if ".experts." in name)
    active = sum(size.values()) - experts * (1 - cfg.top_k / cfg.num_experts)  # parameters that a token meets
    merges = math.comb(cfg.num_experts, 2) + settings.max_triangles
    sparse = [i for i, name in enumerate(model.layer_names[:depth]) if f"{name}.mlp.gate.weight" in size]
    operations = 2 * merges * tokens * sum((depth - 1 - i) / depth * active + cfg.vocab_size * width for i in sparse)
    hidden = experts // (3 * width * max(len(sparse), 1))  # n f
    need = model.dtype.itemsize * (sum(size.values()) * (1 + 1 / depth) + cfg.vocab_size * width
                                   + tokens * (4 * hidden + 100 * width)) + 16 * 256 * cfg.vocab_size
    seconds = operations / matrix_rate(model.dtype, model.device)
    warn(f"--readout model runs {merges:,} merges a layer through all later layers: {operations:.1e} operations, "
         f"at least {clock(seconds)} on this machine, {need / 1e9:.1f} GB of memory")
    if need > available_memory(model.device):
        raise InputError(f"--readout model needs {need / 1e9:.1f} GB of memory, "
                         f"{available_memory(model.device) / 1e9:.1f} GB are free; use --readout lens")


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a matrix product of 512 x 512 matrices, from a tenth of a second's run."""
    a = torch.ones(512, 512, dtype=dtype, device=device)
    a @ a
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        (a @ a)[0, 0].item()
        runs += 1
    return runs * 2 * 512**3 / (time.perf_counter() - started)


def available_memory(device: torch.device) -> int:
    """Free bytes of the device that the model lives on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_model(model: Model, ids: torch.Tensor, keep: int, settings: Settings, say: Callable[[str], None] = print
               ) -> list[dict]:
    """Plans every sparse layer from one forward pass over ids (B, L); says one line a layer."""
    readout = make_readout(model, settings, ids)
    bar = progress_bar()

    def plan(step: LayerPass) -> dict:
        layer = plan_layer(step.layer.experts, step.x, step.gates, step.y, readout(step), keep, settings,
                           tick=lambda done: bar((step.index + done) / len(model.layer_names)))
        bar(None)
        say(layer_line({"layer": step.index} | layer))
        return {"layer": step.index, "name": step.name} | layer
    plans = []
    say(LAYER_HEAD)
    for step in model.stream(ids):
        if step.gates is not None:
            plans.append(plan(step))
        del step  # before the next layer is read
    return plans


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


def compress(path: str | os.PathLike, keep: int, out: str | os.PathLike | None = None, *, calib: Sequence[Path] = (),
             tokens: int = TOKENS, seq_len: int = SEQ_LEN, settings: Settings = Settings(), plan_only: bool = False,
             dtype: torch.dtype = torch.float32, device: str = "cpu", say: Callable[[str], None] = print) -> Path:
    """Plans the checkpoint at `path` and writes it with `keep` experts a layer to `out`.

    Parameters are those of the command line (README). `out` defaults to `path`-keep`keep` beside it.

    Returns the output folder. Raises InputError where something given is wrong; then nothing is written.
    """
    model = Model(path, dtype, device)
    cfg = model.config
    if not any(f"{name}.mlp.gate.weight" in model.checkpoint.tensors for name in model.layer_names):
        raise InputError(f"{path}: no layer has a router; the checkpoint is dense")
    if not cfg.top_k <= keep <= cfg.num_experts:
        raise InputError(f"--keep {keep}: the model has {cfg.num_experts} experts and routes each token to "
                         f"{cfg.top_k}; K must be from {cfg.top_k} to {cfg.num_experts}")
    source = Path(os.path.abspath(path))
    out = Path(out) if out else source.with_name(f"{source.name}-keep{keep}")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out}: lies in the checkpoint, which is never written to; name another with --out")
    model_io.check_new(out)
    ids = calibration_ids(model, list(calib), tokens, seq_len, settings.seed)
    layers = plan_model(model, ids, keep, settings, say)
    plan = {
        "schema_version": SCHEMA_VERSION,
        "hodgecover_version": __version__,
        "layers": layers,
        "settings": {"keep": keep} | dataclasses.asdict(settings) | {
            "dtype": str(dtype).removeprefix("torch."), "tokens": ids.numel(), "seq_len": seq_len,
            "calibration": [Path(file).name for file in calib] or "python documentation",
            "calibration_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()},
        "source": {"name": source.name, "model_type": cfg.model_type, "num_experts": cfg.num_experts,
                   "top_k": cfg.top_k, "fingerprint": model.checkpoint.fingerprint()},
    }
    files = {model_io.PLAN: (json.dumps(plan, indent=1, allow_nan=False) + "\n").encode()}
    if plan_only:
        with model_io.new_folder(out) as folder:
            (folder / model_io.PLAN).write_bytes(files[model_io.PLAN])
        return out
    if settings.router == "fold":
        files[model_io.FOLD] = fold_file(model, layers)
    survivors = {layer["name"]: layer["survivors"] for layer in layers}
    model_io.write_checkpoint(model.checkpoint, out, survivors, files)
    return out


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
    return math.exp(loss[0] / predicted), math.exp(loss[1] / predicted), kl / ids.numel()


# ------------------------------------------------------------------------------------------- the command line


LAYER_HEAD = (
    "layer  eta: gradient  curl           harmonic       additive residual  beta_1    T  discordance  covered at  "
    "routed to\n"
    "       (in brackets: of a constant signal)          energy  variance                              E*   T*    "
    "survivors")


def layer_line(plan: dict) -> str:
    """One line of a layer's findings, under LAYER_HEAD."""
    eta = "  ".join(f"{value:.3f} ({plan['eta_constant'][name]:.3f})" for name, value in plan["eta"].items())
    residual = "  ".join(f"{1 - plan['additive'][of]:{width}.2%}" for of, width in (("energy", 6), ("variance", 8)))
    at = plan["covered_at"]
    return (f"{plan['layer']:5d}  {eta}  {residual}   {plan['betti_1']:6d} {plan['triangles']:4d}  "
            f"{plan['discordance']:11.1%}  {at['edges']:3d}  {at['triangles']:3d}  {plan['routed_share']:10.1%}")


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"hodgecover: {message}", file=sys.stderr, flush=True)


def progress_bar() -> Callable[[float | None], None]:
    """A function that shows the share of the work done and the time left on stderr; None clears the line.

    On a terminal the line is redrawn twice a second; elsewhere a line is printed twice a minute.
    """
    started, terminal = time.monotonic(), sys.stderr.isatty()
    shown = started

    def bar(done: float | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if done is None:
            if terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        elif done > 0 and now - shown >= (0.5 if terminal else 30):
            left = f"{done:4.0%} done, {clock((now - started) * (1 - done) / done)} left"
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
    parser.add_argument("--keep", metavar="K", type=int, required=True, help="experts to keep in every layer")
    add("--out", "DIR", Path, None, "output folder [CKPT-keepK beside CKPT]")
    parser.add_argument("--calib", metavar="FILE", type=Path, nargs="+", default=[], help="calibration text: UTF-8, or "
                        ".jsonl with a text field [Python's own documentation]")
    add("--tokens", "T", int, TOKENS, "calibration tokens [%(default)s]")
    add("--seq-len", "L", int, SEQ_LEN, "tokens of one sequence [%(default)s]")
    choose("readout", "where barriers are measured: at the layer's own next-token distribution, or end to end, which "
           "is far dearer [%(default)s]")
    choose("order", "total order of the experts that orients the complex [%(default)s]")
    choose("router", "dropped experts' gate mass: renormalised over the survivors, or folded into their redirect "
           "targets [%(default)s]")
    add("--edge-percent", "P", float, default.edge_percent, "harmonic-critical edges [%(default)s]")
    add("--triangle-percent", "Q", float, default.triangle_percent, "triplet-critical triangles [%(default)s]")
    add("--lambda-edge", "A", float, default.lambda_edge, "weight of covered edges [%(default)s]")
    add("--lambda-triangle", "B", float, default.lambda_triangle, "weight of covered triangles [%(default)s]")
    add("--alpha", "C", float, default.alpha, "harmonic penalty of the redirect [%(default)s]")
    add("--max-triangles", "M", int, default.max_triangles, "candidate triangles [%(default)s]")
    parser.add_argument("--plan-only", action="store_true", help="write hodgecover.json alone")
    add("--eval", "FILE", Path, None, "perplexity of source and output on this text, and their KL")
    add("--seed", "S", int, default.seed, "of the calibration sample and of the triangle sample [%(default)s]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32",
                        help="of the computation [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute [%(default)s]")
    args = parser.parse_args(argv)
    if args.plan_only and args.eval:
        raise InputError("--eval needs an output checkpoint; leave out --plan-only")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device cpu")
    return args


def weight_bytes(model: Model) -> int:
    """Size of a checkpoint's weight files."""
    return sum((model.checkpoint.path / file).stat().st_size for file in model.checkpoint.metadata)


def run(args: argparse.Namespace) -> None:
    """Everything the command line does, after parsing."""
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)
                           if hasattr(args, field.name)})
    dtype = getattr(torch, args.dtype)
    source, held_out = Model(args.checkpoint, dtype, args.device), None
    if args.eval:
        held_out = model_io.sequences(source.encode(model_io.read_documents([args.eval])), args.seq_len)
    out = compress(args.checkpoint, args.keep, args.out, calib=args.calib, tokens=args.tokens, seq_len=args.seq_len,
                   settings=settings, plan_only=args.plan_only, dtype=dtype, device=args.device)
    if args.plan_only:
        print(f"plan: {out / model_io.PLAN}")
        return
    output = Model(out, dtype, args.device, router=settings.router)
    before, after = weight_bytes(source), weight_bytes(output)
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%})")
    if held_out is not None:
        first, second, kl = evaluate(source, output, held_out)
        print(f"perplexity: {first:.2f} -> {second:.2f}, KL(source || output) {kl:.4f} nats a token "
              f"({held_out.numel():,} tokens of {args.eval.name})")
    print(f"output: {out}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line on stderr if an input is wrong."""
    try:
        run(parse_arguments(argv))
    except InputError as err:
        warn(f"error: {err}")
        return 2
    except KeyboardInterrupt:
        warn("interrupted; the output folder is whole or absent")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
