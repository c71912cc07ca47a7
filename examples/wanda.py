# SPDX-License-Identifier: MIT
"""Prune the weights of a checkpoint's experts with Wanda (arXiv 2306.11695): alone, or as the second stage of the
hybrid HodgeCover+Wanda (4.2, B.4).

    python hodgecover.py SOURCE --keep 51                                         OLMoE: r1 = 0.20 of 64 experts go
    python examples/wanda.py CKPT --total-rate 0.66 --source SOURCE --out DIR     the hybrid: CKPT is SOURCE-keep51
    python examples/wanda.py CKPT --rate 0.5 --out DIR                            half of each row
    python examples/wanda.py CKPT --nm 2:4 --out DIR                              2 of each 4 entries stay

Of each row of the matrices of routed and shared experts, the entries with the smallest |W_ij| |X_j| become 0, |X_j|
being the norm of input j over the calibration tokens that the expert gets. int(rate * columns) entries of a row go, as
in Wanda's published code, so that the rate that is reached is a little lower than the one asked for. --nm N:M keeps N
of each M consecutive entries. The files keep their size.

--total-rate R, the paper's way (equation 33, algorithm 2): r1 is the share of the source's experts that are gone in
CKPT, and each row loses r2 = max(0, (R - r1) / (1 - r1)). |X_j| are those of the source: one pass of it, and none of
the pruned model. Ours: an expert of CKPT is known by its router row, which every selector and merger here leaves as it
was; a merged expert has the norms of the expert whose row it has.

--rate and --nm, Wanda's published way: the layers are pruned in order; the norms of a layer are those that the pruned
layers before it give, all from one pass of the layer before it is pruned.

Ours in both: magnitude alone for an expert that no token is routed to. Left out: attention and dense layers, which the
published code prunes too; the router; and its variant that searches a rate for each row.

    n experts of a layer   d hidden size   f width of an expert   B sequences of L tokens   (o, i) shape of a matrix
"""
import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import common
import hodgecover
import model_io
import torch
from model_io import InputError, LayerPass, Model

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (weight (o, i), norms (i,)) -> kept entries (o, i) bool


# --------------------------------------------------------------------------------------------------------- the masks


def keep_largest(weight: torch.Tensor, norms: torch.Tensor, kept: int, group: int = 0) -> torch.Tensor:
    """Return which entries Wanda keeps: of each row, or of each `group` consecutive entries of it, the `kept` ones of
    largest |W_ij| |X_j|, or |W_ij| if all norms are 0; of equal ones the first go. weight (o, i), norms (i,) -> (o, i)
    bool.

    >>> keep_largest(torch.tensor([[3.0, -2.0, 1.0]]), torch.tensor([1.0, 1.0, 9.0]), 2)
    tensor([[ True, False,  True]])
    """
    score = weight.abs().double() * (norms.double() if norms.any() else 1.0)
    score = score.reshape(-1, group or score.shape[1])
    least = score.sort(dim=1, stable=True).indices[:, :score.shape[1] - kept]
    return torch.ones_like(score, dtype=torch.bool).scatter(1, least, False).view(weight.shape)


def keep_share(weight: torch.Tensor, norms: torch.Tensor, rate: float) -> torch.Tensor:
    """Return the entries that stay if int(rate * i) of each row go: weight (o, i), norms (i,) -> (o, i) bool.

    >>> keep_share(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(3), 1 - 2 / 3)  # 1 / 3, but for rounding
    tensor([[False,  True,  True]])
    """
    columns = weight.shape[1]
    return keep_largest(weight, norms, columns - int(rate * columns + 1e-9))


# -------------------------------------------------------------------------------------------------------- the layers


def activation_norms(step: LayerPass) -> dict[str, torch.Tensor]:
    """Return |X_j|_2 of the inputs of a sparse layer's matrices, over the tokens that each expert gets, on the CPU:
    `inputs` of gate and up projections (n, d), `hidden` of down projections (n, f), 0 for an expert without a token;
    `shared inputs` (d,) and `shared hidden` (its width,) of a shared expert."""
    x, w, experts, routed = step.x, step.layer.weights, step.layer.experts, step.gates > 0
    wide = model_io.widened(x.dtype)
    hidden = [experts.hidden(e, x[own]).to(wide).norm(dim=0) for e, own in enumerate(routed.T)]
    norms = {"inputs": (routed.to(wide).T @ x.to(wide).square()).sqrt(), "hidden": torch.stack(hidden)}
    if "mlp.shared_expert.gate_proj.weight" in w:
        norms["shared inputs"] = x.to(wide).norm(dim=0)
        norms["shared hidden"] = model_io.gated(x, w, "mlp.shared_expert").to(wide).norm(dim=0)
    return {name: norm.cpu() for name, norm in norms.items()}


def matrices_of_layer(checkpoint: model_io.Checkpoint, layer: str, norms: dict[str, torch.Tensor]
                      ) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """Yield (name, row of a fused tensor or None, norms of its inputs) of each matrix of a layer's experts."""
    for name, match in common.expert_matrices(checkpoint).items():
        reads = "hidden" if match["part"] == "down" else "inputs"
        if match["layer"] == layer and match["shared"]:
            yield name, None, norms[f"shared {reads}"]
        elif match["layer"] == layer and match["expert"]:
            yield name, None, norms[reads][int(match["expert"])]
        elif match["layer"] == layer:
            yield from ((name, e, inputs) for e, inputs in enumerate(norms[reads]))


def prune_layer(model: Model, layer: str, norms: dict[str, torch.Tensor], mask: Mask) -> int:
    """Prune the experts of a layer in the checkpoint's files: entries outside mask(weight, norms) become 0, the others
    keep their bits. Returns how many became 0 by the mask."""
    pruned = 0
    for name, row, inputs in matrices_of_layer(model.checkpoint, layer, norms):
        weight = model.turned(name, model.checkpoint.load(name, row))
        kept = mask(weight, inputs)
        common.overwrite(model.checkpoint, name, model.turned(name, weight.masked_fill(~kept, 0)), row)
        pruned += kept.logical_not().sum().item()
    return pruned


def prune(model: Model, ids: torch.Tensor, mask: Mask, tick: hodgecover.Tick = lambda share: None) -> int:
    """Prune the experts of a checkpoint in its files on the calibration tokens ids (B, L), each layer on what the
    pruned ones before it give. Returns how many entries became 0 by the mask."""
    pruned = 0
    for step in model.stream(ids):
        if step.gates is not None:
            pruned += prune_layer(model, step.name, activation_norms(step), mask)
            step.y.copy_(common.rerun(model, step).y)  # the next layer reads what the pruned one gives
        tick((step.index + 1) / len(model.layer_names))
    return pruned


def prune_on_source(model: Model, source: Model, ids: torch.Tensor, mask: Mask,
                    tick: hodgecover.Tick = lambda share: None) -> int:
    """The same on the activations of one pass of the source (B.4). Raises InputError as `experts_of_source` does."""
    origins, pruned = experts_of_source(model, source), 0
    for step in source.stream(ids):
        if step.name in origins:
            norms = activation_norms(step)
            for reads in ("inputs", "hidden"):
                norms[reads] = norms[reads][origins[step.name]]
            pruned += prune_layer(model, step.name, norms, mask)
        tick((step.index + 1) / len(source.layer_names))
    return pruned


def experts_of_source(model: Model, source: Model) -> dict[str, list[int]]:
    """Return, of each sparse layer by name, the expert of the source that each of its experts comes from: the one with
    its router row. Raises InputError if there is not exactly one, and if the experts have become narrower."""
    widths = {name: config.expert_width for name, config in zip(source.layer_names, source.layer_configs)}
    origins = {}
    for name, config in zip(model.layer_names, model.layer_configs):
        if not config.sparse:
            continue
        rows, of_source = (each.checkpoint.load(f"{name}.mlp.gate.weight") for each in (model, source))
        places = [(of_source == row).all(1).nonzero().flatten().tolist() for row in rows]
        if config.expert_width != widths[name] or any(len(place) != 1 for place in places):
            raise InputError(f"{model.checkpoint.path}: the experts of {name} are not the source's: another width, or "
                             "a router row that is not one of the source's alone; give a checkpoint that only lost "
                             "experts, or merged them")
        origins[name] = [place[0] for place in places]
    return origins


# -------------------------------------------------------------------------------------------------------- the command


def parameters(model: Model) -> int:
    """Return the number of parameters of all routed and shared experts, zeros among them."""
    tensors = model.checkpoint.tensors
    return sum(math.prod(tensors[name].shape) for name in common.expert_matrices(model.checkpoint))


def experts_gone(model: Model, source: Model) -> float:
    """Return r1, the share of the source's routed experts that are gone, over the decoder's layers."""
    def count(each: Model) -> int:
        decoder = each.layer_configs[:each.config.num_layers]
        return sum(config.num_experts for config in decoder if config.sparse)
    return 1 - count(model) / count(source)


def residual_rate(total_rate: float, gone: float) -> float:
    """Return r2, the sparsity of the survivors' rows that makes a total rate of `gone` experts, r1 (equation 33).

    >>> round(residual_rate(0.66, 0.2), 9), residual_rate(0.1, 0.2)
    (0.575, 0.0)
    """
    return max(0.0, (total_rate - gone) / (1 - gone))


def check_groups(model: Model, kept: int, group: int) -> None:
    """Raise InputError if not N < M, or M does not divide the width of every expert's matrices."""
    tensors = model.checkpoint.tensors
    widths = {tensors[name].shape[-2 if name in model.transposed else -1]
              for name in common.expert_matrices(model.checkpoint)}
    if not 0 < kept < group or any(width % group for width in widths):
        raise InputError(f"nm {kept}:{group}: N must be below M, and M divide the width of every expert's matrices, "
                         f"{', '.join(map(str, sorted(widths)))}")


def groups(text: str) -> tuple[int, int]:
    """2:4 -> (2, 4)."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: must be two numbers such as 2:4")
    return int(match[1]), int(match[2])


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, memory=False)
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--rate", metavar="R", type=float, help="share of each row that goes")
    how_many.add_argument("--total-rate", metavar="R", type=float,
                          help="total rate of the hybrid (B.4); needs --source")
    how_many.add_argument("--nm", metavar="N:M", type=groups, help="keep N of each M consecutive entries of a row")
    parser.add_argument("--source", metavar="SOURCE", type=Path, help="folder of the checkpoint it was made from")
    return parser


def choose_mask(args: argparse.Namespace, model: Model, source: Model | None) -> tuple[dict, Mask]:
    """Return what the record says of the rate, and the mask. Raises InputError for options that are out of range, or
    that the checkpoint does not admit."""
    if (source is None) != (args.total_rate is None):
        raise InputError("source: goes with --total-rate, and --total-rate with it")
    if args.nm:
        check_groups(model, *args.nm)
        kept, group = args.nm
        return {"nm": f"{kept}:{group}"}, partial(keep_largest, kept=kept, group=group)
    if source is None:
        hodgecover.check_range("rate", args.rate, 0, 0.99)
        return {"rate": args.rate}, partial(keep_share, rate=args.rate)
    hodgecover.check_range("total_rate", args.total_rate, 0, 0.99)
    gone = experts_gone(model, source)
    rate = residual_rate(args.total_rate, gone)
    return {"total_rate": args.total_rate, "experts_gone": gone, "rate": rate}, partial(keep_share, rate=rate)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    model = common.open_model(args.checkpoint, args)
    source = common.open_model(args.source, args) if args.source else None
    hodgecover.sparse_layers(model)  # refuses a dense one
    model_io.check_out(model, args.out)
    read = {"checkpoint": model}
    if source:
        hodgecover.sparse_layers(source)
        common.check_source(model, source)
        model_io.refuse_inside(source, args.out, "out")
        experts_of_source(model, source)  # refuses others before the copy
        read["source"] = source
    said, mask = choose_mask(args, model, source)
    ids = common.calibration_ids(model, args)
    settings = said | {"dtype": common.dtype_name(model), "seed": args.seed}
    entry = model_io.record_entry("wanda.py", settings, ids, args.calib, **read)

    bar = model_io.progress_bar()
    with common.copied(model, args.out, entry) as output:
        if source:
            pruned = prune_on_source(output, source, ids, mask, bar)
        else:
            pruned = prune(output, ids, mask, bar)
        left = parameters(model) - pruned
        entry["pruned"] = {role: 1 - left / parameters(each) for role, each in read.items()}
    bar(None)
    if source:
        print(f"r1 = {said['experts_gone']:.4f} of the experts, r2 = {said['rate']:.4f} of each row (equation 33)")
    for role, share in entry["pruned"].items():
        print(f"{share:.2%} of the {role}'s expert parameters are gone")
    print(f"output: {args.out}")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
