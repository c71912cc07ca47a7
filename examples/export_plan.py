# SPDX-License-Identifier: MIT
"""Export from a plan that was made before, perhaps edited by hand: no calibration, no barriers.

    python hodgecover.py CKPT --keep 32 --plan-only --out plan.json
    (edit the survivors or redirects of plan.json, or set its router to "fold")
    python examples/export_plan.py CKPT plan.json --out DIR

PLAN is a file of hodgecover.py --plan-only, or the hodgecover.json of an output of hodgecover.py, of a selector of
baselines.py or of budgets.py rco. Its last history entry is the plan, and must have been made from CKPT's weights. Of
each layer `survivors` decides what stays, ascending, the same number in every layer; `redirect` matters for the router
"fold" alone.

A plan that was not edited gives the same files, byte for byte, as the command that made it. An edited one, whose hash
differs, is marked by "exported_by"; its diagnostics remain those of the plan before the edit.
"""
import argparse
import sys
from pathlib import Path

import common
import hodgecover
from hodgecover import LayerPlan
from model_io import InputError, Model

PLANNERS = ("hodgecover.py", "baselines.py", "budgets.py")


def read_plan(model: Model, path: Path) -> tuple[dict, dict[str, LayerPlan]]:
    """The plan in a record: its history entry, and the plans by layer name.

    Raises InputError if it is not a plan for this checkpoint: another fingerprint, or survivors or redirects that the
    export cannot take.
    """
    history = hodgecover.read_history(path)
    try:
        entry = history[-1]
        check_origin(model, path, entry)
        hodgecover.to_json(entry)  # no NaN, which JSON does not have
        plans = {layer["name"]: layer_plan(layer) for layer in entry["layers"]}
        edited = entry.get("sha256") != hodgecover.entry_hash(entry)
        router = entry["settings"]["router"]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as err:
        if isinstance(err, InputError):
            raise
        raise InputError(f"{path}: not a plan that hodgecover.py wrote ({type(err).__name__}: {err})") from None
    check_plans(model, path, plans, router)
    return (marked(entry, plans) if edited else entry), plans


def read_orders(model: Model, path: Path) -> dict[str, LayerPlan]:
    """The plans by layer name, as `read_plan`, of which `order` ranks all experts and begins with the survivors.

    Raises InputError if it does not, and for the router fold, which no order carries.
    """
    entry, plans = read_plan(model, path)
    if entry["settings"]["router"] == "fold":
        raise InputError(f"{path}: has the router fold, which an order does not carry; use one with the router drop")
    for name, plan in plans.items():
        order, everyone = plan.order, [*range(model.config.num_experts)]
        if not isinstance(order, list) or any(type(e) is not int for e in order) or sorted(order) != everyone \
                or sorted(order[:len(plan.survivors)]) != plan.survivors:
            raise InputError(f"{path}: order of {name} must have each of its experts once, the survivors first")
    return plans


def check_origin(model: Model, path: Path, entry: dict) -> None:
    """Raise InputError if a record's last entry is not a plan made from the checkpoint's weights and layers."""
    if entry["command"] not in PLANNERS or "survivors" not in entry["layers"][0]:
        step = " ".join([str(entry["command"]), *filter(None, [entry["settings"].get("method")])])
        raise InputError(f"{path}: its last step is {step}, which a plan cannot repeat; give the record of "
                         "hodgecover.py, of a selector of baselines.py or of budgets.py rco")
    if entry["source"]["fingerprint"] != model.checkpoint.fingerprint():
        raise InputError(f"{path}: made for {entry['source']['name']}, of other weights or another config.json than "
                         f"{model.checkpoint.path}")
    names = [model.layer_names[index] for index in hodgecover.sparse_layers(model)]
    if [layer["name"] for layer in entry["layers"]] != names:
        raise InputError(f"{path}: its layers must be {', '.join(names)}")


def layer_plan(layer: dict) -> LayerPlan:
    """The plan of a layer as a record holds it."""
    redirect = {int(dropped): target for dropped, target in layer["redirect"].items()}
    return LayerPlan(layer["survivors"], layer["order"], dict(sorted(redirect.items())), layer["routed_share"],
                     layer["frequency"], layer["saliency"])


def check_plans(model: Model, path: Path, plans: dict[str, LayerPlan], router: str) -> None:
    """Raise InputError for plans by layer name that the export cannot take."""
    if router not in hodgecover.CHOICES["router"]:
        raise InputError(f"{path}: router {router!r}; must be {' or '.join(hodgecover.CHOICES['router'])}")
    n = model.config.num_experts
    for name, plan in plans.items():
        kept = plan.survivors
        if not isinstance(kept, list) or any(type(e) is not int for e in kept) or kept != sorted({*kept} & {*range(n)}):
            raise InputError(f"{path}: survivors of {name} must be ascending numbers from 0 to {n - 1}")
        if router == "fold" and (plan.redirect.keys() != {*range(n)} - {*kept}
                                 or any(target not in kept for target in plan.redirect.values())):
            raise InputError(f"{path}: redirect of {name} must send each dropped expert to a survivor")
    counts = {len(plan.survivors) for plan in plans.values()}
    if len(counts) > 1:
        raise InputError(f"{path}: survivors: all layers must keep the same number of experts; they keep "
                         f"{', '.join(map(str, sorted(counts)))}")
    try:
        hodgecover.check_keep(model, counts.pop())
    except InputError as err:
        raise InputError(f"{path}: survivors: {err}") from None


def marked(entry: dict, plans: dict[str, LayerPlan]) -> dict:
    """The entry of an edited plan, with its number of survivors and a hash of its own."""
    keep = len(next(iter(plans.values())).survivors)
    entry = entry | {"settings": entry["settings"] | {"keep": keep}, "exported_by": Path(__file__).name}
    return entry | {"sha256": hodgecover.entry_hash(entry)}


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.parser_of(__file__, __doc__)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder")
    parser.add_argument("plan", metavar="PLAN", type=Path, help="hodgecover.json, or a file of --plan-only")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="output folder")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    model = Model(args.checkpoint)
    hodgecover.check_out(model, args.out)
    entry, plans = read_plan(model, args.plan)
    hodgecover.export(model, plans, args.out, entry, entry["settings"]["router"])
    if "exported_by" in entry:
        print("plan: edited after it was made")
    common.show_output(model, args.out)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return hodgecover.run_command(command_line(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
