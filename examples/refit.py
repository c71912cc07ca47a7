# SPDX-License-Identifier: MIT
"""Recover a compressed checkpoint in closed form: refit its experts' down projections to its source.

    python examples/refit.py SOURCE CKPT --out DIR

CKPT is any compressed checkpoint of SOURCE, whichever tool made it: experts dropped, merged, pruned or made narrower,
with a router of its own. Both run on the same text, layer by layer. In each layer the down projections are chosen so
that the residual stream after the layer comes as near to the source's as they can bring it, at the compressed model's
own inputs and gates, all layers before it refitted:

    1. one factor for each expert's output, by least squares;
    2. ridge regression about the scaled down projections, one expert at a time, in 3 sweeps, with the weight
       0.3 tr(A_e) / f, A_e being the normal matrix (f, f) of the expert's gated hidden activations.

Zeros stay zeros in an expert whose stored down projection has more than 1% of them. A killed run continues from the
layers that are done, which lie in OUT-refit until the output is whole. All of this is ours, not the paper's. Left out:
gate and up projections, routers, shared experts, attention and norms stay as they are.

    n experts of a layer   f width of an expert          d hidden size         T tokens, B sequences of L
    R tokens of an expert  D_e down projection (d, f)    x_te gated hidden activation of token t in expert e (f,)
"""
import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
import hodgecover
import model_io
import torch
from model_io import LayerPass, Model

TOKENS = 16384  # default calibration sample
RIDGE, SWEEPS = 0.3, 3
SPARSE = 0.01  # share of zeros from which an expert counts as sparse
PIECE = 2048  # tokens that are taken at a time
SYSTEM_NUMBERS = 1 << 24  # numbers of the systems that are solved at a time

Fit = Callable[[LayerPass, torch.Tensor], torch.Tensor]  # (layer pass, residual (T, d)) -> down projections (n, d, f)
Rows = tuple[torch.Tensor, torch.Tensor]  # which tokens (R,), their features x_e (R, f)
Features = Callable[[int], list[Rows]]  # expert -> pieces


# -------------------------------------------------------------------------------------------------------- the solver


def block_ridge(features: Features, start: torch.Tensor, residual: torch.Tensor, ridge: float = RIDGE,
                sweeps: int = SWEEPS, sparse: Sequence[bool] = ()) -> torch.Tensor:
    """Minimise sum_t |residual_t - sum_e (D_e - D_e^0) x_te|^2 + sum_e r_e |D_e - D_e^0|^2 by block Gauss-Seidel.

    One block D_e is solved at a time, with r_e = ridge tr(A_e) / f and A_e = sum_t x_te x_te': no matrix is larger
    than A_e.

    Parameters
    ----------
    features : e -> pieces (rows (R,) of the residual that block e touches, x_e (R, f)); asked again in every sweep
    start : D^0 (n, d, f)
    residual : (T, d) at D^0; changed in place to that at the result
    sparse : for each block whether its entries that are 0 stay 0, the others the best given that; empty: none

    Returns D (n, d, f), float32 or wider. A block that no row touches stays as it is.
    """
    blocks = start.to(model_io.widened(start.dtype), copy=True)
    solvers = []  # A_e is the same in every sweep
    for e, block in enumerate(blocks):
        gram = block.new_zeros(block.shape[1], block.shape[1], dtype=torch.float64)
        for _, x in features(e):
            torch.addmm(gram, x.double().T, x.double(), out=gram)
        weight = ridge * gram.trace() / len(gram)
        gram.diagonal().add_(weight)
        solvers.append((weight, solver(gram, start[e] == 0 if sparse and sparse[e] else None)))
    for _ in range(sweeps):
        for e, (block, (weight, solve)) in enumerate(zip(blocks, solvers)):
            pieces = features(e)
            wanted = residual.new_zeros(block.T.shape)  # sum_t x_te residual_t'
            for rows, x in pieces:
                torch.addmm(wanted, x.T.to(residual), residual.index_select(0, rows), out=wanted)
            change = solve(wanted.double() - weight * (block.double() - start[e].double()).T).T
            block.copy_(block.double() + change)
            subtract(residual, pieces, change)
    return blocks


def subtract(residual: torch.Tensor, pieces: list[Rows], change: torch.Tensor) -> None:
    """Take what a change (d, f) of a block gives from the residual (T, d), in place; products in the residual's
    dtype."""
    for rows, x in pieces:
        residual.index_add_(0, rows, x.to(residual) @ change.T.to(residual), alpha=-1)


def solver(system: torch.Tensor, fixed: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return wanted (f, d) -> the solution (f, d) of a positive (semi)definite system (f, f), inverted once: that of
    least norm if Cholesky's factorisation fails; 0 where fixed (d, f), the others the best given that; 0 for a system
    of 0."""
    if not system.any():
        return torch.zeros_like
    if fixed is not None:
        return lambda wanted: solve_rows(system, wanted, ~fixed).T
    factor, failed = torch.linalg.cholesky_ex(system)
    inverse = torch.linalg.pinv(system, hermitian=True) if failed.any() else torch.cholesky_inverse(factor)
    return partial(torch.matmul, inverse)


def solve_spd(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return system^-1 wanted for positive (semi)definite systems (..., f, f) and right sides (..., f, d): the solution
    of least norm, by a pseudoinverse, if Cholesky's factorisation fails."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        return torch.linalg.pinv(system, hermitian=True) @ wanted
    return torch.cholesky_solve(wanted, factor)


def solve_rows(system: torch.Tensor, wanted: torch.Tensor, free: torch.Tensor, numbers: int = SYSTEM_NUMBERS
               ) -> torch.Tensor:
    """Solve one system for each row, over the row's free entries alone; the others are 0.

    system (f, f), wanted (f, d), free (d, f) bool -> (d, f). At most `numbers` numbers of systems are held at a time.
    """
    width = max(1, int(free.sum(1).max()))
    solution = torch.zeros(free.shape, dtype=system.dtype, device=system.device)
    for rows in torch.arange(len(free), device=free.device).split(max(1, numbers // width**2)):
        own, column = free[rows].to(torch.uint8).sort(dim=1, descending=True, stable=True)  # free entries come first
        own, column = own[:, :width].bool(), column[:, :width]
        part = system[column[:, :, None], column[:, None, :]] * (own[:, :, None] & own[:, None, :])
        part += torch.diag_embed((~own).to(part))  # 1 x = 0 pads a row that has fewer free entries
        right = wanted.T[rows[:, None], column] * own
        solution[rows[:, None], column] = solve_spd(part, right[:, :, None])[:, :, 0]
    return solution


# ---------------------------------------------------------------------------------------------------------- one layer


def gated_piece(step: LayerPass, e: int, piece: int) -> Rows:
    """Return (tokens of a piece that are routed to expert e (R,), the inputs of its down projection times their gates
    (R, f))."""
    tokens = slice(piece * PIECE, (piece + 1) * PIECE)
    t = tokens.start + step.gates[tokens, e].nonzero().squeeze(1)
    return t, step.gates[t, e, None] * step.layer.experts.hidden(e, step.x[t])


def gated_hidden(step: LayerPass, e: int, piece_of: Callable[..., Rows] = gated_piece) -> list[Rows]:
    """Return the pieces of expert e, for `block_ridge`."""
    return [piece_of(step, e, piece) for piece in range(-(-len(step.x) // PIECE))]


def add_outputs(stream: torch.Tensor, step: LayerPass, down: torch.Tensor) -> None:
    """Add to a stream (T, d), in place, what the layer's experts give with other down projections (n, d, f)."""
    experts = step.layer.experts._replace(down=down.to(step.x))
    for rows, x, gates in zip(stream.split(PIECE), step.x.split(PIECE), step.gates.split(PIECE)):
        rows += model_io.mix_experts(experts, x, gates).to(rows)


def fit_scale(step: LayerPass, residual: torch.Tensor, piece_of: Callable[..., Rows] = gated_piece) -> torch.Tensor:
    """Return the factors (n,) float64 of the experts' outputs that best give the residual (T, d) besides what they give
    now, by least squares; 1 for an expert without a token."""
    n, down = step.gates.shape[1], step.layer.experts.down
    gram = residual.new_zeros(n * n, dtype=torch.float64)
    wanted = residual.new_zeros(n, dtype=torch.float64)
    for piece, (gates, part) in enumerate(zip(step.gates.split(PIECE), residual.split(PIECE))):
        routed = gates != 0
        slot = routed.cumsum(1) - 1  # of each of a token's own experts
        outputs = part.new_zeros(len(part), routed.sum(1).max(), part.shape[1])  # (T, k, d)
        expert = slot.new_zeros(outputs.shape[:2])
        for e in range(n):
            rows, x = piece_of(step, e, piece)
            t = rows - piece * PIECE
            outputs[t, slot[t, e]] = (x @ down[e].to(x).T).to(outputs)
            expert[t, slot[t, e]] = e
        for own, e, lacking in zip(outputs.split(PIECE // 16), expert.split(PIECE // 16), part.split(PIECE // 16)):
            own = own.double()
            gram.index_add_(0, (e[:, :, None] * n + e[:, None]).flatten(), (own @ own.mT).flatten())
            wanted.index_add_(0, e.flatten(), (own @ lacking.double()[:, :, None]).flatten())
    return 1 + torch.linalg.pinv(gram.view(n, n), hermitian=True) @ wanted


def sparse_experts(down: torch.Tensor) -> list[bool]:
    """Return for each down projection of (n, d, f) whether more than 1% of its entries are 0."""
    return [(each == 0).sum().item() > SPARSE * each.numel() for each in down]


def refit_layer(step: LayerPass, residual: torch.Tensor, ridge: float = RIDGE, sweeps: int = SWEEPS,
                memory: int = hodgecover.MEMORY) -> torch.Tensor:
    """Return the down projections (n, d, f) of one layer that best give the residual (T, d) besides what they give now,
    in their dtype: a factor for each expert, then ridge regression about the scaled ones.

    The gates and the hidden activations are the layer's own; these are kept if they take at most `memory` bytes, and
    computed again in each sweep if not. The residual is changed in place.
    """
    down, piece_of = step.layer.experts.down, gated_piece
    if hidden_bytes((step.gates != 0).sum().item(), down.shape[2], step.x.dtype) <= memory:
        piece_of = functools.cache(lambda _, e, piece: gated_piece(step, e, piece))
    features = partial(gated_hidden, step, piece_of=piece_of)
    factor = fit_scale(step, residual, piece_of).to(residual)[:, None, None]
    start = down.to(residual) * factor
    for e, change in enumerate(start - down.to(residual)):
        subtract(residual, features(e), change)
    return block_ridge(features, start, residual, ridge, sweeps, sparse_experts(down)).to(down)


def hidden_bytes(rows: int, f: int, dtype: torch.dtype) -> int:
    """Return the bytes of the hidden activations (f,) of so many rows, and of their tokens."""
    return rows * (f * dtype.itemsize + 8)


def refit_operations(tokens: int, keep: int, k: int, d: int, f: int) -> float:
    """Return the operations of `refit_layer`, if the hidden activations are kept, and of applying its result, for
    `keep` experts, k of them a token.

    Once: the hidden activations, two passes through the down projections, one through the whole experts with
    the result, the factors' normal matrix, each expert's and its inverse. In each sweep: both products with the
    residual, a solve.
    """
    rows = tokens * k
    once = rows * ((4 + 2 + 2 + 6) * d * f + 2 * (k + 1) * d + 2 * f * f) + keep * f**3
    return once + SWEEPS * (rows * 4 * d * f + keep * 2 * f * f * d)


# ---------------------------------------------------------------------------------------------------------- the model


class Refitted(NamedTuple):
    """A layer, and its error |y_source - y| / |y_source| before and after its refit."""

    name: str
    before: float
    after: float


def refit(source: Model, output: Model, ids: torch.Tensor, fit: Fit = refit_layer,
          empty: Callable[..., torch.Tensor] = torch.empty) -> Iterator[Refitted]:
    """Refit the down projections of a compressed checkpoint's experts in its files; yield each sparse layer's errors.

    Parameters
    ----------
    source, output : models with the same layers and hidden size; the output's number and choice of experts, their
        weights and its router are free
    ids : (B, L), both models' calibration text
    fit : (layer pass of the output, what its stream lacks (T, d)) -> down projections (n, d, f)
    empty : makes the tensors (T, d) (`common.scratch`)

    Raises InputError if the new weights overflow the dtype of the files.
    """
    targets, passes = source.stream(ids, empty), output.stream(ids, empty)
    for _ in output.layer_names:
        refitted = refit_pass(next(targets).y, next(passes), output, fit, empty)  # no name holds a pass that is done
        if refitted:
            yield refitted


def refit_pass(target: torch.Tensor, step: LayerPass, output: Model, fit: Fit, empty: Callable[..., torch.Tensor]
               ) -> Refitted | None:
    """Fit one layer to the source's stream (T, d) after it, write it into the output's files, and change step.y to what
    the layer gives as it is written, for the layers that follow. Returns None for a dense layer."""
    if step.gates is None:
        return None
    residual = empty(*target.shape, dtype=model_io.widened(target.dtype), device=target.device)
    residual.copy_(target).sub_(step.y)
    before = length(residual)
    down = common.store_down(output, step.name, fit(step, residual))
    add_outputs(step.y, step, down.to(step.x) - step.layer.experts.down.to(step.x))
    residual.copy_(target).sub_(step.y)
    return Refitted(step.name, before / length(target), length(residual) / length(target))


def length(rows: torch.Tensor) -> float:
    """Return the Euclidean norm of a tensor (T, d), summed in float64."""
    return math.sqrt(sum(part.double().square().sum().item() for part in rows.split(PIECE)))


def activation_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of the tensors (T, d) that a refit holds."""
    return common.activation_bytes(model, tokens, dtype=model_io.widened(model.dtype))


def resumable(fit: Fit, cache: Path, key: dict[str, str], tick: Callable[[int], None]) -> Fit:
    """Return a fit that keeps each layer in a folder, and takes it from there if it is done. `tick` is told the index
    of each layer before it is fitted."""
    def fit_or_read(step: LayerPass, residual: torch.Tensor) -> torch.Tensor:
        done = model_io.read_cached(cache, f"refit-{step.name}", key)
        if done:
            return done["down"]
        tick(step.index)
        down = fit(step, residual)
        model_io.make_cache(cache)  # another run that shares it may have removed it
        model_io.write_cached(cache, f"refit-{step.name}", key, {"down": down})
        return down
    return fit_or_read


# --------------------------------------------------------------------------------------------------------- the command


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, text=TOKENS, source=True)
    parser.add_argument("--cache", metavar="DIR", type=Path, help="folder of the layers that are done, for a run that "
                        "continues [OUT-refit beside OUT]")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    source, model, cache = common.open_pair(args, "refit")
    ids = common.calibration_ids(source, args)
    settings = {"ridge": RIDGE, "sweeps": SWEEPS, "dtype": common.dtype_name(model), "seed": args.seed}
    key = common.work_key(settings, ids, source, model)
    entry = model_io.record_entry("refit.py", settings, ids, args.calib, source=source, checkpoint=model)

    bar = model_io.progress_bar()
    done = [model_io.cache_file(cache, f"refit-{name}", key).name for name in model.layer_names]
    with common.made(cache, *done), common.copied(model, args.out, entry) as output:
        fit = resumable(partial(refit_layer, memory=args.memory), cache, key,
                        lambda index: bar(index / len(model.layer_names)))
        empty = common.stream_maker(model, activation_bytes(model, ids.numel()), args.memory, output.checkpoint.path)
        entry["output_error"] = []
        for layer in refit(source, output, ids, fit, empty):
            bar(None)
            print(f"{layer.name}: output error {layer.before:.4f} -> {layer.after:.4f}", flush=True)
            entry["output_error"].append(layer._asdict())
    print(f"output: {args.out}")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
