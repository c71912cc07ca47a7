# SPDX-License-Identifier: MIT
"""Say what a run of hodgecover.py, and of refit.py, will cost on this machine, in a minute and without doing it.

    python examples/estimate.py CKPT --keep 32
    python examples/estimate.py CKPT --vocab-sample 1024 --tokens 4096
    python examples/estimate.py CKPT --keep 32 --refit 16384

Operations are counted: those of the matrix products of the barrier sweep, and of one forward pass. The count for pairs
is exact, since each token touches the same number of them. That for triangles supposes that all experts are used alike.
Time is the count over the rate of a short sweep of a made-up layer of the same shape. Memory is one layer's weights,
the head, the residual stream and the buffers of --memory. Disk is the cache.

The estimate leaves out the time to read the checkpoint, which it prints in bytes, and the decomposition, which takes
seconds a layer.
"""
import argparse
import math
import re
import sys
import time
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch

import common
import hodgecover
import mathx
import model_io
import refit
from hodgecover import MoELayer, Settings
from model_io import Experts, InputError, Layer, LayerPass, Model

PROCESS_BYTES = 4e8  # of a process that has imported torch
TIMED_OPERATIONS = 1.2e12  # of a short sweep, at most
AUDITED = 256  # pairs of numbers that a layer's cache entry holds with a sample of the vocabulary


class Cost(NamedTuple):
    """Operations of products; seconds on this machine; peak bytes of memory; bytes of the cache on disk."""
    operations: float
    seconds: float
    memory: float
    disk: float


class Shape(NamedTuple):
    """Sizes of a layer and its readout: n experts, k per token, hidden size d, width f, vocabulary V, and how many of
    its outcomes are read out."""
    n: int
    k: int
    d: int
    f: int
    vocab: int
    outcomes: int


def shape_of(model: Model, vocab_sample: int = 0) -> Shape:
    """The Shape of a model's layers; of those that differ, the largest."""
    cfg, sparse = model.config, [model.layer_configs[index] for index in hodgecover.sparse_layers(model)]
    n, f = max(each.num_experts for each in sparse), max(each.expert_width for each in sparse)
    return Shape(n, cfg.top_k, cfg.hidden_size, f, cfg.vocab_size,
                 min(vocab_sample or cfg.vocab_size, cfg.vocab_size))


# ---------------------------------------------------------------------------------------------- operations of the sweep

def product_operations(shape: Shape, tokens: int, rows: float, members: int) -> float:
    """Operations of the products in the barriers of simplices of so many members, if `rows` (token, simplex) pairs
    touch: for each pair a readout and a down projection a member; for each token its own readout, the pre-activations
    of all experts and the down projections of its own."""
    n, k, d, f, vocab, outcomes = shape
    return 2 * d * (rows * (outcomes + members * f) + tokens * (vocab + (2 * n + k) * f))


def touched_share(n: int, k: int, members: int) -> float:
    """Share of the simplices that a token touches, if it is routed to k of n experts uniformly.

    >>> touched_share(4, 2, 2)  # of 6 pairs, all but the one that has neither of the token's two experts
    0.8333333333333334
    """
    return 1 - math.comb(n - k, members) / math.comb(n, members)


def sweep_operations(shape: Shape, members: int, count: int) -> float:
    """Operations a token of the barriers of `count` simplices under uniform routing."""
    return product_operations(shape, 1, count * touched_share(shape.n, shape.k, members), members)


def sweep(layer: MoELayer, simplices: torch.Tensor, outcomes: int = 0) -> torch.Tensor:
    """Barriers of simplices, (M,), read out on a sample of so many outcomes, which is drawn first, or on all (0)."""
    weights = hodgecover.merge_weights(simplices, (layer.gates > 0).sum(0).cpu())
    return mathx.sweep(layer, simplices, weights, mathx.sample_vocabulary(layer, outcomes))


def made_up(model: Model, *shape: int) -> torch.Tensor:
    """A tensor to time products with."""
    return torch.full(shape, 0.01, dtype=model.dtype, device=model.device)


def sweep_rate(model: Model, shape: Shape) -> float:
    """Operations a second of a short sweep over pairs. As many of them are touched by a token as in the real one, but
    of 2 k experts, so that little memory is needed."""
    n, k, d, f, vocab, outcomes = shape
    few = min(n, 2 * k)
    real = sweep_operations(shape, 2, math.comb(n, 2))
    tokens = int(min(max(TIMED_OPERATIONS / real, 1), 64))
    per_round = math.comb(few, 2) * touched_share(few, k, 2)
    rounds = max(1, round(math.comb(n, 2) * touched_share(n, k, 2) / per_round))
    pairs = hodgecover.edges(few).repeat(rounds, 1)

    filled = partial(made_up, model)
    x, gates = filled(tokens, d), filled(tokens, few)
    gates[:, k:] = 0
    layer = MoELayer(Experts(filled(few, f, d), filled(few, f, d), filled(few, d, f)), x, gates, x,
                     partial(model_io.rms_norm, weight=filled(d), eps=1.0), filled(vocab, d))
    seconds = []
    for _ in range(2):  # a processor takes a moment to reach its speed
        started = time.perf_counter()
        sweep(layer, pairs, outcomes)
        seconds.append(time.perf_counter() - started)
    return tokens * sweep_operations(shape._replace(n=few), 2, len(pairs)) / min(seconds)


# ------------------------------------------------------------------------------------------------------- whole runs

def layer_sizes(model: Model) -> tuple[list[float], float]:
    """(bytes of each layer in memory, parameters of all of them that one token meets)."""
    active, layers = 0.0, dict(zip(model.layer_names, model.layer_configs))
    for name, info in model.checkpoint.weights.items():
        if cfg := layers.get(name[:re.match(r".*?layers\.\d+|", name).end()]):
            active += math.prod(info.shape) * (cfg.top_k / cfg.num_experts if ".experts." in name else 1)
    return [common.layer_bytes(model, layer) for layer in model.layer_names], active


def estimate(model: Model, settings: Settings, tokens: int, memory: int = hodgecover.MEMORY) -> Cost:
    """What `hodgecover.measure_model` costs on so many tokens, with `memory` bytes of buffers."""
    sparse = hodgecover.sparse_layers(model)
    shape = shape_of(model, settings.vocab_sample if settings.readout == "lens" else 0)
    pairs, triangles = math.comb(shape.n, 2), min(settings.max_triangles, math.comb(shape.n, 3))
    audited = AUDITED if shape.outcomes < shape.vocab else 0
    disk = len(sparse) * 8 * (2 * shape.n + pairs + 4 * triangles + 2 * audited)
    count, buffers = (model_readout, 0) if settings.readout == "model" else (lens_readout, memory)
    operations, peak = count(model, shape, tokens, pairs, triangles)
    return Cost(operations, operations / sweep_rate(model, shape), PROCESS_BYTES + peak + buffers, disk)


def lens_readout(model: Model, shape: Shape, tokens: int, pairs: int, triangles: int) -> tuple[float, float]:
    """(operations, peak bytes but for buffers) of the readout `lens`: one forward pass, and a sweep in each sparse
    layer."""
    held, active = layer_sizes(model)
    sweep = sweep_operations(shape, 2, pairs) + sweep_operations(shape, 3, triangles)
    operations = tokens * (len(hodgecover.sparse_layers(model)) * sweep + 2 * active)
    streams = 16 * tokens * shape.d
    sample = 12 * tokens * shape.outcomes if shape.outcomes < shape.vocab else 0
    return operations, max(held) + model.dtype.itemsize * (shape.vocab * shape.d + streams) + sample


def model_readout(model: Model, shape: Shape, tokens: int, pairs: int, triangles: int) -> tuple[float, float]:
    """The same of the readout `model`: every merge runs all later layers twice, without it and with it."""
    held, active = layer_sizes(model)
    sparse, depth = hodgecover.sparse_layers(model), len(held)
    later = sum((depth - 1 - index) / depth for index in sparse)
    heads = len(sparse) * shape.vocab * shape.d
    operations = 4 * tokens * (pairs + triangles) * (later * active + heads)
    streams = tokens * (4 * shape.f + 100 * shape.d)
    logits = 40 * tokens * shape.vocab  # five tensors of float64
    return operations, sum(held) + model.dtype.itemsize * (shape.vocab * shape.d + streams) + logits


def estimate_refit(model: Model, keep: int, tokens: int, memory: int = hodgecover.MEMORY) -> Cost:
    """What refit.py costs on so many tokens, for a checkpoint with `keep` of the model's experts. Time is at the rate
    of one refit of two made-up experts. Systems with fixed zeros are solved row by row, which is not counted."""
    sparse, (held, active), shape = hodgecover.sparse_layers(model), layer_sizes(model), shape_of(model)
    _, k, d, f, _, _ = shape
    operations = len(sparse) * refit.refit_operations(tokens, keep, k, d, f) + 4 * tokens * active
    weights = 3 * model_io.widened(model.dtype).itemsize * keep * d * f  # down projections: change, scaled, refitted
    hidden, inverses = refit.hidden_bytes(tokens * k, f, model.dtype), 8 * keep * f * f
    peak = (max(held) * (1 + keep / shape.n) + weights + inverses + hidden * (hidden <= memory)
            + min(memory, refit.activation_bytes(model, tokens)))
    stored = sum((info.end - info.start) * (2 if info.dtype == model_io.FP8 else 1)  # as bfloat16
                 for name, info in model.checkpoint.weights.items() if ".experts." in name and "down_proj" in name)
    rows = min(model_io.PASS_TOKENS, max(1, tokens * k // keep))
    return Cost(operations, operations / refit_rate(model, rows), PROCESS_BYTES + peak, stored * keep / shape.n)


def refit_rate(model: Model, rows: int) -> float:
    """Operations a second of a refit of two made-up experts that get `rows` tokens each."""
    filled, d, f = partial(made_up, model), model.config.hidden_size, model.config.expert_width
    experts = Experts(filled(2, f, d), filled(2, f, d), filled(2, d, f))
    stream = filled(rows, d)
    step = LayerPass(0, "", Layer(experts, None, {}), stream[None], filled(rows, d), filled(rows, 2), stream,
                     torch.nn.Identity())
    residual = filled(rows, d).to(model_io.widened(model.dtype))
    started = time.perf_counter()
    refit.refit_layer(step, residual)
    return refit.refit_operations(rows, 2, 2, d, f) / (time.perf_counter() - started)


def output_bytes(model: Model, keep: int) -> int:
    """Size of the weights with `keep` experts in each sparse layer."""
    survivors = {model.layer_names[index]: list(range(keep)) for index in hodgecover.sparse_layers(model)}
    return sum(copy.nbytes() for copy in model_io.surviving_tensors(model.checkpoint, survivors).values())


# ------------------------------------------------------------------------------------------------- the command line

def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, out=False, text=0, seed=False)
    parser.add_argument("--keep", metavar="K", type=int, help="experts to keep: adds the size of the output")
    parser.add_argument("--tokens", metavar="T", type=int, default=model_io.TOKENS, help="calibration tokens "
                        "[%(default)s]")
    parser.add_argument("--seq-len", metavar="L", type=int, default=512,
                        help="tokens per sequence [%(default)s]")
    hodgecover.add_settings(parser, "readout", "vocab_sample", "max_triangles")
    parser.add_argument("--refit", metavar="TOKENS", type=int, help="also refit.py on so many tokens; needs --keep")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for values out of range, and for options that do not go together."""
    for name, tokens in (("tokens", args.tokens), ("refit", args.refit)):
        if tokens is not None:
            hodgecover.check_range(name, tokens, 2, 10**9)
            if not 2 <= args.seq_len <= tokens:
                raise InputError(f"seq_len {args.seq_len}: must be from 2 to {name} ({tokens})")
    if args.refit is not None and args.keep is None:
        raise InputError("refit: needs --keep K, the experts of the checkpoint that is refitted")
    if args.readout == "model":
        unused = ["vocab_sample", "memory"][:1 if args.refit else 2]
        common.refuse_given(command_line(), args, unused, "--readout model")


def in_units(size: float) -> str:
    """A number of bytes for people.

    >>> in_units(13.84e9), in_units(3.6e6)
    ('13.8 GB', '3.6 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def show(what: str, model: Model, cost: Cost, short: str) -> None:
    """Print a cost."""
    print(f"{what} of {len(hodgecover.sparse_layers(model))} layers, {common.dtype_name(model)}: "
          f"{cost.operations:.1e} operations, about {timedelta(seconds=round(cost.seconds))} on this machine, where a "
          f"short {short} does {cost.operations / cost.seconds:.1e} a second\n"
          f"  memory: {in_units(cost.memory)}\n  disk: {in_units(cost.disk)} of cache", flush=True)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    settings = common.settings_of(args)
    dtype = model_io.choose_dtype(args.dtype, args.device, settings.readout)
    model = Model(args.checkpoint, dtype, args.device)
    hodgecover.sparse_layers(model)
    if args.keep is not None:
        hodgecover.check_keep(model, args.keep)

    def whole(tokens: int) -> int:
        return tokens // args.seq_len * args.seq_len
    show("barriers", model, estimate(model, settings, whole(args.tokens), args.memory), "sweep")
    if args.refit is not None:
        show("refit", model, estimate_refit(model, args.keep, whole(args.refit), args.memory), "refit")
    print(f"reading: {in_units(model.checkpoint.nbytes())}, once for the fingerprint and once to run; comes on top")
    if args.keep is not None:
        print(f"output: {in_units(output_bytes(model, args.keep))}")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
