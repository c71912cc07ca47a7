# SPDX-License-Identifier: MIT
"""Put a checkpoint in order, so that one file serves every size; or cut a size out of such a file.

    python examples/nested.py CKPT --out DIR                     experts and their hidden units, best first
    python examples/nested.py CKPT --out DIR --plan PLAN         experts in the order of a plan
    python examples/nested.py DIR --slice 32 --out SMALL         the first 32 experts of every layer
    python examples/nested.py DIR --slice 32,512 --out SMALL     and of each of them the first 512 hidden units

The idea is Star Elastic's (arXiv 2605.07182), without its training: sort once by importance, then every prefix is a
smaller model and shares its weights with all larger ones. The first command permutes experts, with their router rows,
and the hidden units inside each expert. The model computes what it did before, up to the rounding of sums in another
order (and up to ties of the router), and loads anywhere. The second cuts a prefix, bit for bit what dropping and
narrowing in that order would have written. It needs no plan and no text, and works on what distil.py --prefixes has
trained for it.

Experts are ordered by REAP's saliency on the calibration text, as the paper does it, or by `order` in PLAN: a file of
hodgecover.py --plan-only, or the hodgecover.json of an output of hodgecover.py, of a selector of baselines.py or of
budgets.py. Of hope's order in baselines.py only the survivors mean something: another number has others. Hidden
units are ordered by CAMERA-P's score of heapr.py (ours; the paper takes mean activations). Of an FP8 source whole
blocks of them are, by the sum of their scores, and the units inside each, so that weights and scales keep their bytes;
so they do in a slice of whole blocks, while any other is bfloat16.

Left out: the paper's order of hidden dimensions and layers, and its budget router. Shared experts stay as they are.
"""
import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import baselines
import common
import export_plan
import heapr
import hodgecover
import model_io
import torch
from hodgecover import Tick
from model_io import RECORD
from model_io import InputError, Model
from torch.nn import functional

COMMAND = Path(__file__).name


class Order(NamedTuple):
    """The experts of a layer in their new order, and the hidden units (n, f) of each expert, by its old number, in
    theirs."""

    experts: list[int]
    units: torch.Tensor


def best_first(score: torch.Tensor, sides: set[int] = set()) -> torch.Tensor:
    """Return each expert's hidden units, by score (n, f), best first, ties to the lowest: blocks of each of these sides
    by their sum, an incomplete one last, and inside each its units.

    >>> best_first(torch.tensor([[1, 2, 0, 4, 9]])), best_first(torch.tensor([[1, 2, 0, 4, 9]]), {2})
    (tensor([[4, 3, 1, 0, 2]]), tensor([[3, 2, 1, 0, 4]]))
    """
    units, f = score.sort(dim=1, descending=True, stable=True).indices, score.shape[1]
    for side in sorted(sides):
        total = functional.pad(score, (0, -f % side)).unflatten(1, (-1, side)).double().sum(2)
        total[:, f // side:] = -torch.inf
        place = total.sort(dim=1, descending=True, stable=True).indices.argsort(1)  # of each block
        units = units.gather(1, place.gather(1, units // side).sort(dim=1, stable=True).indices)
    return units


def measure(model: Model, ids: torch.Tensor, plans: dict[str, hodgecover.Plan] | None = None,
            tick: Tick = lambda share: None) -> Iterator[tuple[str, Order]]:
    """Yield (name, order) of each sparse layer, from one forward pass over ids (B, L). The experts' orders are those of
    plans by layer name, REAP's if there are none. Raises InputError for scores that are not finite."""
    block = model_io.quantisation(model.checkpoint.raw_config)["weight_block_size"]
    sides = {*block} if block and common.has_fp8(model.checkpoint) else set()
    for step in baselines.routed_passes(model, ids, tick):
        experts = step.layer.experts
        score = heapr.settled(heapr.camera(step), experts, step.name)
        units = best_first(score, sides)
        best = baselines.descending(hodgecover.reap_saliency(experts, step.x, step.gates))
        yield step.name, Order(plans[step.name].order if plans else best, units)


def write_ordered(model: Model, orders: dict[str, Order], out: Path, files: dict[str, bytes]) -> None:
    """Write the checkpoint in new orders, by layer name, to the folder `out`; `files`, name -> content, lie beside the
    weights."""
    units = {name: order.units for name, order in orders.items()}
    heapr.export(model, units, out, files, {name: order.experts for name, order in orders.items()})


def write_slice(model: Model, keep: int, width: int, out: Path, files: dict[str, bytes]) -> None:
    """Write the checkpoint of the first `keep` experts and `width` hidden units of each to the folder `out`; `files`,
    name -> content, lie beside the weights."""
    names = [model.layer_names[index] for index in hodgecover.sparse_layers(model)]
    units = torch.arange(width).expand(max(config.num_experts for config in model.layer_configs), width)
    heapr.export(model, dict.fromkeys(names, units), out, files, dict.fromkeys(names, list(range(keep))))


# -------------------------------------------------------------------------------------------------------- the command


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, memory=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", metavar="PLAN", type=Path, help="order the experts as this plan does [by saliency]")
    what.add_argument("--slice", metavar="K[,F]", type=common.size_of, help="cut out the first K experts, and F hidden "
                      "units of each")
    return parser


def cut(model: Model, args: argparse.Namespace) -> None:
    """Write a prefix."""
    try:
        keep, width = common.check_size(model, args.slice)
        if width < max(config.expert_width for config in model.layer_configs):
            heapr.choose_width(model, width=width)
    except InputError as err:
        raise InputError(f"slice: {err}") from None
    path = model.checkpoint.path / RECORD
    history = model_io.read_history(path) if path.exists() else []
    if not any(isinstance(entry, dict) and entry.get("command") == COMMAND for entry in history):
        hodgecover.warn(f"{model.checkpoint.path}: its record has no {COMMAND}, so that its experts may be in no "
                        "order; cutting all the same")
    entry = model_io.record_entry(COMMAND, {"keep": keep, "width": width}, None, (), source=model)
    write_slice(model, keep, width, args.out, {RECORD: model_io.record_bytes(model.checkpoint, entry)})


def order(model: Model, args: argparse.Namespace) -> None:
    """Write the checkpoint in order."""
    settings = {"experts": "reap", "units": "camera", "seed": args.seed, "dtype": common.dtype_name(model)}
    plans = export_plan.read_orders(model, args.plan) if args.plan else None
    if args.plan:
        settings |= {"experts": "plan", "plan_sha256": hashlib.sha256(args.plan.read_bytes()).hexdigest()}
    ids = common.calibration_ids(model, args)
    bar = model_io.progress_bar()
    orders = dict(measure(model, ids, plans, bar))
    bar(None)
    layers = [{"layer": model.layer_names.index(name), "name": name, "order": found.experts}
              for name, found in orders.items()]
    for layer in layers:
        print(f"layer {layer['layer']}: experts {' '.join(map(str, layer['order'][:8]))} ...")
    entry = model_io.record_entry(COMMAND, settings, ids, args.calib, source=model) | {"layers": layers}
    write_ordered(model, orders, args.out, {RECORD: model_io.record_bytes(model.checkpoint, entry)})


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    if args.slice:
        unused = ("calib", "tokens", "seq_len", "seed", "dtype", "device")
        common.refuse_given(command_line(), args, unused, "--slice")
    model = common.open_model(args.checkpoint, args)
    hodgecover.sparse_layers(model)
    model_io.check_out(model, args.out)
    (cut if args.slice else order)(model, args)
    common.show_output(model, args.out)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
