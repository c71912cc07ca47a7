# SPDX-License-Identifier: MIT
"""Export from a plan that was made before, perhaps edited by hand: no calibration, no barriers.

    python hodgecover.py CKPT --keep 32 --plan-only --out plan.json
    (edit the survivors of plan.json)
    python examples/export_plan.py CKPT plan.json --out DIR

PLAN is a file of hodgecover.py --plan-only, or the hodgecover.json of an output of hodgecover.py, of a selector of
baselines.py or of budgets.py. Its last history entry is the plan, and must have been made from CKPT's weights. Of
each layer `survivors` decides what stays, ascending.

A plan that was not edited gives the same files, byte for byte, as the command that made it. All else in the record of
an edited one, but for `keep`, remains that of the plan before the edit.
"""
import argparse
import json
import sys
from pathlib import Path

import common
import hodgecover
import model_io
import torch
from model_io import InputError, Model

PLANNERS = ("hodgecover.py", "baselines.py", "budgets.py")
PLAN = ("survivors", "order", "redirect", "routed_share", "frequency", "saliency", "diagnostics")


def read_plan(model: Model, path: Path) -> tuple[dict, dict[str, hodgecover.Plan]]:
    """The plan in a record: its history entry, and the plans by layer name.

    Raises InputError if it is not a plan for this checkpoint: another fingerprint, or survivors that the export cannot
    take.
    """
    history = model_io.read_history(path)
    try:
        entry = history[-1]
        check_origin(model, entry)
        json.dumps(entry, allow_nan=False)
        plans = {layer["name"]: {key: layer[key] for key in PLAN} for layer in entry["layers"]}
        for plan in plans.values():
            plan["redirect"] = {int(dropped): target for dropped, target in plan["redirect"].items()}
        check_survivors(model, plans)
        plans = {name: hodgecover.Plan(**plan | {key: torch.tensor(plan[key]) for key in ("frequency", "saliency")})
                 for name, plan in plans.items()}
        counts = {len(plan.survivors) for plan in plans.values()}
        keep = {"keep": count for count in counts if len(counts) == 1}  # of an edited plan it may be another
        return entry | {"settings": entry["settings"] | keep}, plans
    except InputError as err:
        raise InputError(f"{path}: {err}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as err:
        raise InputError(f"{path}: not a plan that hodgecover.py wrote ({type(err).__name__}: {err})") from None


def read_orders(model: Model, path: Path) -> dict[str, hodgecover.Plan]:
    """The plans by layer name, as `read_plan`, of which `order` ranks all experts and begins with the survivors. Raises
    InputError if it does not."""
    plans = read_plan(model, path)[1]
    for name, plan in plans.items():
        order, everyone = plan.order, [*range(experts_of(model, name))]
        if not isinstance(order, list) or any(type(e) is not int for e in order) or sorted(order) != everyone \
                or sorted(order[:len(plan.survivors)]) != plan.survivors:
            raise InputError(f"{path}: order of {name} must have each of its experts once, the survivors first")
    return plans


def check_origin(model: Model, entry: dict) -> None:
    """Raise InputError if a record's last entry is not a plan made from the checkpoint's weights and layers."""
    if tuple(map(int, entry["version"].split("."))) < (0, 4):
        raise InputError(f"a plan of version {entry['version']}, whose constants were not the paper's; make it again")
    if entry["command"] not in PLANNERS or "survivors" not in entry["layers"][0]:
        step = " ".join([str(entry["command"]), *filter(None, [entry["settings"].get("method")])])
        raise InputError(f"its last step is {step}, which a plan cannot repeat; give the record of hodgecover.py, of a "
                         "selector of baselines.py or of budgets.py")
    if entry["source"]["fingerprint"] != model.checkpoint.fingerprint():
        raise InputError(f"made for {entry['source']['name']}, of other weights or another config.json than "
                         f"{model.checkpoint.path}")
    names = [model.layer_names[index] for index in hodgecover.sparse_layers(model)]
    if [layer["name"] for layer in entry["layers"]] != names:
        raise InputError(f"its layers must be {', '.join(names)}")


def experts_of(model: Model, name: str) -> int:
    """The number of experts of a layer."""
    return model.layer_configs[model.layer_names.index(name)].num_experts


def check_survivors(model: Model, plans: dict[str, dict]) -> None:
    """Raise InputError for plans by layer name whose survivors the export cannot take."""
    for name, plan in plans.items():
        kept, n = plan["survivors"], experts_of(model, name)
        if not isinstance(kept, list) or any(type(e) is not int for e in kept) or kept != sorted({*kept} & {*range(n)}):
            raise InputError(f"survivors of {name} must be ascending numbers from 0 to {n - 1}")
        if len(kept) < model.config.top_k:
            raise InputError(f"survivors of {name} must be {model.config.top_k} or more: a token is routed to so many")


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
    model_io.check_out(model, args.out)
    entry, plans = read_plan(model, args.plan)
    common.export(model, plans, args.out, entry)
    common.show_output(model, args.out)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
