# SPDX-License-Identifier: MIT
"""Say what a run of hodgecover.py, and of refit.py, will cost on this machine, in a minute and without doing it.

    python examples/estimate.py CKPT --keep 32
    python examples/estimate.py CKPT --vocab-sample 1024 --tokens 4096
    python examples/estimate.py CKPT --keep 32 --refit 16384

Operations are counted: those of the matrix products of the barrier sweep, and of one forward pass. Most are of the
tables: all experts on all tokens, the head on each output. The triangles read those of the pairs, as far as half of
--memory holds them. The count for pairs is exact; that for triangles supposes that all experts are used alike. Time is
the count over the rate of a short sweep of a made-up layer of the same shape. Memory is one layer's weights, the head,
the residual stream and the buffers of --memory. Disk is the cache.

It also prints the experts that stay in each layer of the paper's hybrid, whose first stage drops r1 = 0.20 (B.4).

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

def table_operations(shape: Shape) -> int:
    """Operations a token of `mathx.read_tables`, and of its distribution: all experts, the head on y and on each
    output, their inner products, and y's readout."""
    n, _, d, f, vocab, outcomes = shape
    return 2 * d * (3 * n * f + (n + 1) * (outcomes + n + 1) + vocab)


def sweep_operations(shape: Shape, tokens: int, rows: float) -> float:
    """Operations of the products in a sweep whose tables are not kept, if `rows` (token, simplex) pairs touch: the
    tables, and for each pair two expectations over the outcomes."""
    return tokens * table_operations(shape) + 4 * rows * shape.outcomes


def touched_share(n: int, k: int, members: int) -> float:
    """Share of the simplices that a token touches, if it is routed to k of n experts uniformly.

    >>> touched_share(4, 2, 2)  # of 6 pairs, all but the one that has neither of the token's two experts
    0.8333333333333334
    """
    return 1 - math.comb(n - k, members) / math.comb(n, members)


def touched_simplices(shape: Shape, members: int, count: int) -> float:
    """How many of `count` simplices touch a token under uniform routing."""
    return count * touched_share(shape.n, shape.k, members)


def sweep(layer: MoELayer, simplices: torch.Tensor, outcomes: int = 0) -> torch.Tensor:
    """Barriers of simplices, (M,), read out on a sample of so many outcomes, which is drawn first, or on all (0)."""
    weights = hodgecover.merge_weights(simplices, (layer.gates > 0).sum(0).cpu())
    return mathx.sweep(layer, simplices, weights, mathx.sample_vocabulary(layer, outcomes))


def made_up(model: Model, *shape: int) -> torch.Tensor:
    """A tensor to time products with."""
    return torch.full(shape, 0.01, dtype=model.dtype, device=model.device)


def sweep_rate(model: Model, shape: Shape) -> float:
    """Operations a second of a short sweep over the pairs of 2 k experts, so that little memory is needed."""
    _, k, d, f, vocab, outcomes = shape
    few = min(shape.n, 2 * k)
    shape = shape._replace(n=few)
    pairs = hodgecover.edges(few)
    rows = touched_simplices(shape, 2, len(pairs))  # of a token: each is routed to k
    tokens = int(min(max(TIMED_OPERATIONS / sweep_operations(shape, 1, rows), 1), 64))

    filled = partial(made_up, model)
    x, gates = filled(tokens, d), filled(tokens, few)
    gates[:, k:] = 0
    experts = Experts(filled(few, f, d), filled(few, f, d), filled(few, d, f))
    layer = MoELayer(experts, x, gates, x, model_io.RMSNorm(filled(d), 1.0), filled(vocab, d))
    seconds = []
    for _ in range(2):  # a processor takes a moment to reach its speed
        started = time.perf_counter()
        sweep(layer, pairs, outcomes)
        seconds.append(time.perf_counter() - started)
    return sweep_operations(shape, tokens, tokens * rows) / min(seconds)


# ------------------------------------------------------------------------------------------------------- whole runs

def layer_sizes(model: Model) -> tuple[list[float], float]:
    """(bytes of each layer in memory, parameters of all of them that one token meets)."""
    active, layers = 0.0, dict(zip(model.layer_names, model.layer_configs))
    for name, info in model.checkpoint.weights.items():
        if cfg := layers.get(name[:re.match(r".*?layers\.\d+|", name).end()]):
            active += math.prod(info.shape) * (cfg.top_k / cfg.num_experts if ".experts." in name else 1)
    return [common.layer_bytes(model, layer) for layer in model.layer_names], active


def estimate(model: Model, settings: Settings, tokens: int, memory: int = hodgecover.MEMORY) -> Cost:
    """What `hodgecover.measure_model` costs on so many tokens, with `memory` bytes of buffers: one forward pass, and
    two sweeps in each sparse layer."""
    layers = len(hodgecover.sparse_layers(model))
    shape = shape_of(model, settings.vocab_sample)
    pairs, triangles = math.comb(shape.n, 2), min(settings.max_triangles, math.comb(shape.n, 3))
    touched = touched_simplices(shape, 2, pairs) + touched_simplices(shape, 3, triangles)
    tables = 2 - kept_share(model, shape, tokens, memory)  # how often each token's are read
    sweeps = tables * table_operations(shape) + 4 * touched * shape.outcomes
    held, active = layer_sizes(model)
    operations = tokens * (layers * sweeps + 2 * active)

    sample, audited = 0, 0
    if shape.outcomes < shape.vocab:
        sample, audited = 12 * tokens * shape.outcomes, AUDITED
    streams = 16 * tokens * shape.d
    weights = max(held) + model.dtype.itemsize * (shape.vocab * shape.d + streams)
    disk = layers * 8 * (2 * shape.n + pairs + 4 * triangles + 2 * audited)
    return Cost(operations, operations / sweep_rate(model, shape), PROCESS_BYTES + weights + sample + memory, disk)


def kept_share(model: Model, shape: Shape, tokens: int, memory: int) -> float:
    """Share of the tokens whose tables are kept from the sweep of the pairs to that of the triangles."""
    rows = shape.n + 1
    of_token = model.dtype.itemsize * rows * shape.outcomes + model_io.widened(model.dtype).itemsize * rows**2
    return min(1.0, memory // 2 / (of_token * tokens))


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
    parser.add_argument("--seq-len", metavar="L", type=int, help="tokens per sequence [the model's "
                        "max_position_embeddings, at most T]")
    hodgecover.add_settings(parser, "vocab_sample", "max_triangles")
    parser.add_argument("--refit", metavar="TOKENS", type=int, help="also refit.py on so many tokens; needs --keep")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for values out of range, and for options that do not go together."""
    for name, tokens in (("tokens", args.tokens), ("refit", args.refit)):
        if tokens is not None:
            hodgecover.check_range(name, tokens, 2, 10**9)
            if args.seq_len is not None and not 2 <= args.seq_len <= tokens:
                raise InputError(f"seq_len {args.seq_len}: must be from 2 to {name} ({tokens})")
    if args.refit is not None and args.keep is None:
        raise InputError("refit: needs --keep K, the experts of the checkpoint that is refitted")


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
    dtype = model_io.choose_dtype(args.dtype, args.device)
    model = Model(args.checkpoint, dtype, args.device)
    hodgecover.sparse_layers(model)
    if args.keep is not None:
        hodgecover.check_keep(model, args.keep)

    def whole(tokens: int) -> int:
        length = args.seq_len or min(model.config.max_positions or 512, tokens)
        return tokens // length * length
    show("barriers", model, estimate(model, settings, whole(args.tokens), args.memory), "sweep")
    if args.refit is not None:
        show("refit", model, estimate_refit(model, args.keep, whole(args.refit), args.memory), "refit")
    print(f"reading: {in_units(model.checkpoint.nbytes())}, once for the fingerprint and once to run; comes on top")
    if args.keep is not None:
        print(f"output: {in_units(output_bytes(model, args.keep))}")
    n = model.config.num_experts
    print(f"the paper's hybrid: hodgecover.py --keep {n - round(0.2 * n)} (r1 = 0.20 of {n} experts), then wanda.py")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
