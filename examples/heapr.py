# SPDX-License-Identifier: MIT
"""Make all experts of a checkpoint narrower: of each one's hidden units, the least important go.

    python examples/heapr.py CKPT --rate 0.5 --out DIR                    half of each expert's hidden units go
    python examples/heapr.py CKPT --width 512 --score camera --out DIR    512 of each expert's hidden units stay

Hidden unit j of an expert adds h_j w_j to its output, h_j = silu(gate_j x) (up_j x), w_j column j of the down
projection. --score says what a unit is worth:

heapr      1/2 mean[h_j^2] w_j' G w_j, G = mean[g g'], means over the tokens routed to the expert (HEAPr, arXiv
           2509.22299). g is the gradient of the mean next-token loss with respect to the expert's output: its gate
           times dL/dy, by the chain rule. w_j' G w_j = mean[(g' w_j)^2], so that G is never formed
camera     |w_j|^2 sum[(gate h_j)^2] over these tokens: no gradient (CAMERA-P with alpha 1, arXiv 2508.02322)
magnitude  |gate_j| |up_j| |w_j|: no text
random     nothing, by --seed: no text

The gradients are the whole model's, with one layer in memory: a pass forward keeps each layer's input, on disk if they
need more than --memory; a pass back reads each layer again, runs it on its input and takes dL/dh from dL/dy. A killed
run continues from the layers that the pass back has done, which lie in OUT-heapr until the output is whole.

Ours: equally many units of every expert stay, in their old order, since a configuration has one width; the papers rank
all units of a model or a layer together, which gives each expert a width of its own that no stock loader takes. An
expert whose scores are all 0 (no token is routed to it) ranks by magnitude. A multi-token head, whose loss is not the
model's, ranks by camera. Shared experts and dense layers stay as they are.

Take a width that runtimes like. The grouped products that transformers uses by default want rows of 16 bytes: 8
numbers of 16 bits, 4 of float32; any width runs there with experts_implementation="eager" or "batched_mm". Of the down
projections llama.cpp's Q8_0 wants multiples of 32, else they stay F16, and its K-quants of 256, else they take a larger
type of blocks of 32, or F16. --rate takes the nearest multiple of 256 if that moves the rate by at most one point, else
of 32 likewise, else of 8 likewise, else the exact width, with a warning. A rate of 0 takes nothing.

Of an FP8 source the output is FP8 if each block of units that has a scale comes from one such block: if nothing is
narrowed, or one scale serves a matrix. Else it is bfloat16, since nothing is quantised anew.

    n experts of a layer    f width of an expert    d hidden size    T tokens, B sequences of L
    h stream before a layer, y after it             slope dL/dy (B, L, d), or (T, d)
"""
import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import baselines
import common
import hodgecover
import model_io
import refit
import torch
from hodgecover import Tick
from model_io import Experts, InputError, Layer, LayerPass, Model
from torch.nn import functional

SCORES = ("heapr", "camera", "magnitude", "random")
GRAPH_TOKENS = 1024  # tokens whose graph of a layer is held at a time, or one sequence
WIDTHS = (256, 32, common.ALIGNED)  # --rate gives a multiple of the first of these that is near
ROUNDING = 0.01  # share of the width that it may be off for that


# ------------------------------------------------------------------------------------------------- scores of one layer


class Moments(NamedTuple):
    """Sums over the tokens of each expert, float64: their number (n,), h_j^2 (n, f), (g' w_j)^2 (n, f)."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    slope: torch.Tensor

    def add(self, experts: Experts, x: torch.Tensor, gates: torch.Tensor, slope: torch.Tensor) -> None:
        """Add tokens: the experts' input x (T, d), their gates (T, n), dL/dy (T, d)."""
        for e, down in enumerate(experts.down):
            t = gates[:, e].nonzero().squeeze(1)
            g = gates[t, e, None] * slope[t]
            self.tokens[e] += len(t)
            self.hidden[e] += experts.hidden(e, x[t]).double().square().sum(0)
            self.slope[e] += (g @ down.to(g)).double().square().sum(0)

    def heapr(self) -> torch.Tensor:
        """Return 1/2 mean[h_j^2] w_j' G w_j, (n, f); 0 for an expert without a token."""
        tokens = self.tokens.clamp(min=1)[:, None]
        return 0.5 * (self.hidden / tokens) * (self.slope / tokens)


def camera(step: LayerPass) -> torch.Tensor:
    """Return |w_j|^2 sum[(gate h_j)^2] of each unit of a layer, (n, f) float64."""
    experts = step.layer.experts
    score = torch.stack([down.double().square().sum(0) for down in experts.down])
    for e, row in enumerate(score):
        row *= sum((x.double().square().sum(0) for _, x in refit.gated_hidden(step, e)), torch.zeros_like(row))
    return score


def magnitude(experts: Experts) -> torch.Tensor:
    """Return |gate_j| |up_j| |w_j| of each unit, (n, f) float64."""
    return torch.stack([gate.double().norm(dim=1) * up.double().norm(dim=1) * down.double().norm(dim=0)
                        for gate, up, down in zip(*experts)])


def settled(score: torch.Tensor, experts: Experts, name: str) -> torch.Tensor:
    """Return the scores (n, f) of layer `name` on the CPU, with magnitudes for an expert whose scores are all 0. Raises
    InputError if they are not finite."""
    idle = ~score.any(1, keepdim=True)
    if idle.any():
        score = torch.where(idle, magnitude(experts), score)
    if not score.isfinite().all():
        raise InputError(f"{name}: its scores are not finite: NaN or infinity in its weights, or a gradient that "
                         "overflows")
    return score.cpu()


# --------------------------------------------------------------------------------------------------- the pass back


def loss_slope(model: Model, step: LayerPass, ids: torch.Tensor) -> torch.Tensor:
    """Return the gradient (B, L, d) of the mean next-token loss over ids (B, L) with respect to the stream after the
    last layer, whose pass this is."""
    head = model.unembedding()
    slope = torch.empty_like(step.h)
    for y, out, tokens in zip(step.y.view_as(step.h), slope, ids.to(model.device)):
        y = y.detach().requires_grad_()
        logits = step.norm(y)[:-1] @ head.T
        loss = functional.cross_entropy(logits.to(model_io.widened(logits.dtype)), tokens[1:], reduction="sum")
        out.copy_(torch.autograd.grad(loss / ids[:, 1:].numel(), y)[0])
    return slope


def back_through(layer: Layer, config: model_io.Config, h: torch.Tensor, slope: torch.Tensor) -> Moments | None:
    """Take `slope` (B, L, d), in place, from dL/dy to dL/dh of a layer that reads h (B, L, d). Returns the moments of
    its units; None if it is dense."""
    moments = None
    if layer.experts is not None:
        n, _, f = layer.experts.down.shape
        shapes = (n,), (n, f), (n, f)
        moments = Moments(*(torch.zeros(shape, dtype=torch.float64, device=h.device) for shape in shapes))
    at_once = max(1, GRAPH_TOKENS // h.shape[1])  # sequences
    for h_part, slope_part in zip(h.split(at_once), slope.split(at_once)):
        h_part = h_part.detach().requires_grad_()
        x, gates, y = model_io.run_layer(h_part, layer, config)
        rows = slope_part.flatten(0, 1)
        if moments:
            moments.add(layer.experts, x.detach(), gates.detach(), rows)
        slope_part.copy_(torch.autograd.grad(y, h_part, rows)[0])
    return moments


def heapr_scores(model: Model, ids: torch.Tensor, empty: Callable[..., torch.Tensor] = torch.empty,
                 tick: Tick = lambda share: None, cache: Path | None = None) -> dict[str, torch.Tensor]:
    """Run ids (B, L) forward and back; return the scores (n, f) of each sparse layer, by its name: of the decoder
    layers, and of a multi-token head by camera. `empty` makes the inputs that are kept. `cache` is a folder of the
    layers that are done: the pass back goes on below them."""
    names, count, nothing = model.layer_names, model.config.num_layers, torch.empty(0)
    key = common.work_key({}, ids, model) if cache else {}

    def kept(name: str) -> dict[str, torch.Tensor] | None:
        return model_io.read_cached(cache, f"heapr-{name}", key) if cache else None

    def keep(name: str, score: torch.Tensor, slope: torch.Tensor = nothing) -> None:
        found[name] = score
        if cache:
            model_io.write_cached(cache, f"heapr-{name}", key, {"score": score, "slope": slope})
    found = {name: done["score"] for name in names[count:] if (done := kept(name))}
    passes, slope, todo, inputs = len(names), None, count, []
    while todo and (done := kept(names[todo - 1])):
        todo, slope = todo - 1, done["slope"].to(model.device)
        found[names[todo]] = done["score"]
    if found.keys() >= {*names[count:]}:
        passes = todo
    for step in islice(model.stream(ids, empty), passes):
        if step.index < todo:
            inputs.append(step.h)
        if step.index == count - 1:
            last = step
        if step.index >= count and step.gates is not None:
            keep(step.name, settled(camera(step), step.layer.experts, step.name))
        tick((step.index + 1) / passes / 4)  # the pass back runs each layer again, and back
    if passes:
        step.layer.unload()
    if slope is None:
        slope = loss_slope(model, last, ids)
    for index in reversed(range(todo)):
        layer, name = model.layer(index), names[index]
        moments = back_through(layer, model.config, inputs.pop(), slope)
        keep(name, settled(moments.heapr(), layer.experts, name) if moments else nothing, slope)
        layer.unload()
        tick(1 - 0.75 * index / todo)
    return {name: score for name, score in found.items() if len(score)}


# ------------------------------------------------------------------------------------------------- the whole model


def score_units(model: Model, score: str, ids: torch.Tensor | None = None, seed: int = 0,
                empty: Callable[..., torch.Tensor] = torch.empty, tick: Tick = lambda share: None,
                cache: Path | None = None) -> dict[str, torch.Tensor]:
    """Return what each hidden unit is worth by one of SCORES: of each sparse layer, by its name, (n, f) float64.

    ids (B, L) are for heapr and camera, `seed` is for random, `empty` and `cache` for heapr. Raises InputError if
    there is no sparse layer, and for scores that are not finite.
    """
    layers = hodgecover.sparse_layers(model)
    if score == "heapr":
        return heapr_scores(model, ids, empty, tick, cache)
    if score == "camera":
        passes = baselines.routed_passes(model, ids, tick)
        return {step.name: settled(camera(step), step.layer.experts, step.name) for step in passes}
    found = {}
    for index in layers:
        name = model.layer_names[index]
        if score == "random":
            generator, cfg = torch.Generator().manual_seed(seed + index), model.layer_configs[index]
            shape = cfg.num_experts, cfg.expert_width
            found[name] = torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            experts = model.layer(index).experts
            found[name] = settled(magnitude(experts), experts, name)
        tick((index + 1) / len(model.layer_names))
    return found


def best_units(score: torch.Tensor, width: int) -> torch.Tensor:
    """Return the `width` units of largest score of each expert, in ascending order, ties to the lowest: score (n, f)
    -> (n, width).

    >>> best_units(torch.tensor([[0.3, 0.1, 0.2, 0.3]]), 2)
    tensor([[0, 3]])
    """
    return score.sort(dim=1, descending=True, stable=True).indices[:, :width].sort(dim=1).values


def narrowed(matrix: torch.Tensor, units: torch.Tensor, projection: str) -> torch.Tensor:
    """Return an expert's matrix with these hidden units (width,): columns of `down` (d, f), rows of `gate` and `up`
    (f, d), of both in `gate_up` (2 f, d)."""
    if projection == "down":
        return matrix[:, units]
    return torch.cat([part[units] for part in matrix.chunk(2 if projection == "gate_up" else 1)])


def same_blocks(units: torch.Tensor, side: int, width: int) -> bool:
    """Return whether each `side` consecutive ones of an expert's hidden units (n, w) come from one block of as many of
    its `width`, so that the block's scale serves them, and no block but a last one of all units is short.

    >>> [same_blocks(torch.tensor([units]), 2, 6) for units in ([4, 5, 1, 0], [0, 1, 2], [0, 2])]
    [True, False, False]
    """
    blocks, w = units // side, units.shape[1]
    return w in (width, w // side * side) and torch.equal(blocks, blocks[:, ::side].repeat_interleave(side, 1)[:, :w])


def export(model: Model, kept: dict[str, torch.Tensor], out: Path, files: dict[str, bytes],
           experts: dict[str, list[int]] | None = None) -> None:
    """Write the checkpoint whose experts have the units kept[layer] (n, width) alone, one width in all sparse layers,
    to the folder `out`; `files`, name -> content, lie beside the weights.

    `experts`, layer -> indices, are those that stay, as many in each layer; None: all. Units and experts come in the
    order given. FP8 stays if each block of units is one of the source's.
    """
    checkpoint, width = model.checkpoint, next(iter(kept.values())).shape[1]
    experts = experts or {layer: list(range(len(units))) for layer, units in kept.items()}

    block = model_io.quantisation(checkpoint.raw_config)["weight_block_size"] or []

    def edit(matrix: torch.Tensor, row: int, match: re.Match, side: int = 1) -> torch.Tensor:
        own = kept[match["layer"]][row if match["expert"] is None else int(match["expert"])]
        return model.turned(match[0], narrowed(model.turned(match[0], matrix), own[::side] // side, match["part"]))
    routed = {name: match for name, match in common.expert_matrices(checkpoint).items() if not match["shared"]}
    widths = {name: config.expert_width for name, config in zip(model.layer_names, model.layer_configs)}
    edits, shapes = {name: partial(edit, match=match) for name, match in routed.items()}, {}
    for name, match in routed.items():
        down, turned = match["part"] == "down", name in model.transposed
        shapes[name], axis = [*checkpoint.tensors[name].shape], -2 + (down != turned)
        shapes[name][axis] = shapes[name][axis] // widths[match["layer"]] * width
        if match["expert"] is None:
            shapes[name][0] = len(experts[match["layer"]])
        scale = name + model_io.SCALE
        if block and scale in checkpoint.tensors:
            edits[scale], shapes[scale] = partial(edit, match=match, side=block[axis]), [
                *checkpoint.tensors[scale].shape]
            shapes[scale][axis] = -(-width // block[axis])
    config = {model_io.FAMILIES[model.config.model_type].width_key: width}
    stays = all(same_blocks(units, side, widths[name]) for name, units in kept.items() for side in block)
    common.write_edited(checkpoint, out, experts, files, edits, shapes, config, stays)


# -------------------------------------------------------------------------------------------------------- the command


def near_width(exact: float, most: int) -> int:
    """Return the nearest multiple of the first of WIDTHS that has one close by and from 1 to `most`; else the nearest
    number.

    >>> [near_width(exact, 1024) for exact in (512, 409.6, 300, 1010, 3)]
    [512, 416, 304, 1008, 3]
    """
    for side in WIDTHS:
        width = side * round(exact / side)
        if 0 < width <= most and abs(width - exact) <= ROUNDING * most:
            return width
    return round(exact)


def choose_width(model: Model, rate: float | None = None, width: int | None = None) -> int:
    """Return the width that stays: `width`, or (1 - rate) f, rounded as above, f the layers' least; warn if it is no
    multiple of 8. Raises InputError if it is not from 1 to f, and for a dense model."""
    most = min(model.layer_configs[index].expert_width for index in hodgecover.sparse_layers(model))
    if rate is not None:
        hodgecover.check_range("rate", rate, 0, 1)
        width = near_width((1 - rate) * most, most) if rate else most
        if width < 1:
            raise InputError(f"rate {rate}: no hidden unit of {most} would stay; must be lower")
    if not 1 <= width <= most:
        raise InputError(f"width {width}: must be from 1 to {most}, the width of the experts")
    if model.transposed and model.config.hidden_size in (width, 2 * width):
        raise InputError(f"width {width}: transposed experts that are square are read as others by transformers; take "
                         "another width")
    common.warn_of_width(width)
    return width


def activation_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of the tensors (T, d) that `heapr_scores` holds: each layer's input, x and y of the last layer
    and of the one that runs."""
    return common.activation_bytes(model, tokens, len(model.layer_names) + 4)


# option -> scores that do not use it
UNUSED = {"memory": ("camera", "magnitude", "random"), "seed": ("magnitude",)} | dict.fromkeys(
    ("calib", "tokens", "seq_len"), ("magnitude", "random"))


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for an option that the score does not use, and for a seed out of range."""
    unused = [name for name, scores in UNUSED.items() if args.score in scores]
    common.refuse_given(command_line(), args, unused, f"--score {args.score}")
    hodgecover.check_range("seed", args.seed, 0, 2**63 - 1)


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__)
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--rate", metavar="R", type=float, help="share of each expert's hidden units that goes")
    how_many.add_argument("--width", metavar="W", type=int, help="hidden units of each expert that stay")
    parser.add_argument("--score", choices=SCORES, default="heapr", help="what a unit is worth, as above [%(default)s]")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    model = common.open_model(args.checkpoint, args)
    width, before = choose_width(model, args.rate, args.width), max(each.expert_width for each in model.layer_configs)
    cache = common.folder_beside(args.out, "heapr", model)
    model_io.check_out(model, args.out, cache)
    settings = {"score": args.score, "width": width, "source_width": before, "rate": 1 - width / before,
                "dtype": common.dtype_name(model)} | ({} if args.score == "magnitude" else {"seed": args.seed})
    ids = common.calibration_ids(model, args) if args.score in ("heapr", "camera") else None
    entry = model_io.record_entry("heapr.py", settings, ids, args.calib, source=model)
    bar = model_io.progress_bar()
    with common.made(cache, "heapr-*.safetensors"), model_io.new_folder(args.out) as folder:
        size = activation_bytes(model, ids.numel()) if args.score == "heapr" else 0
        empty = common.stream_maker(model, size, args.memory, folder)
        scores = score_units(model, args.score, ids, args.seed, empty, bar, cache)
        bar(None)
        export(model, {name: best_units(score, width) for name, score in scores.items()}, folder,
               {model_io.RECORD: model_io.record_bytes(model.checkpoint, entry)})
    print(f"hidden units of each expert: {before} -> {width}, by {args.score}")
    common.show_output(model, args.out)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
