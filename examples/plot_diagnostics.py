# SPDX-License-Identifier: MIT
"""Draw what one or more hodgecover.json say, with matplotlib (which requirements.txt does not install).

    python examples/plot_diagnostics.py PLAN [PLAN ...] --barriers CKPT-barriers --out picture.png

PLAN is a file of hodgecover.py --plan-only, or the hodgecover.json of an output of hodgecover.py, of a selector of
baselines.py or of budgets.py. Of the first one: the shares of energy and the discordance of each layer. Of all of
them, to compare methods: the retained mass of each component (equation 34), the mean over the layers. --barriers names
the folder where the barriers are kept. With it the matrix of one --layer is drawn too, survivors first, with the
critical edges marked; and methods that measure no barriers have their retained mass taken from there. The format is
that of the name's ending.
"""
import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import common
import hodgecover
import model_io
from hodgecover import Selection, Settings, Signals
from model_io import InputError

PARTS = ("gradient", "curl", "harmonic")
COMPONENTS = (*PARTS, "triplet")


# ---------------------------------------------------------------------------------------------------- what is drawn

def read_entry(path: Path) -> dict:
    """The last entry of a record's history. Raises InputError if it holds no plan, or one of version 0.3."""
    history = model_io.read_history(path)
    try:
        entry = history[-1]
        layer = entry["layers"][0]
        layer["survivors"], entry["settings"]["keep"]
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{path}: its last step is no plan; give the record of hodgecover.py, of a selector of "
                         "baselines.py or of budgets.py") from None
    report = layer.get("diagnostics")
    if report and isinstance(report.get("retained", {}).get("harmonic"), dict):
        raise InputError(f"{path}: a plan of version 0.3, whose retained energy is not the paper's mass; plan anew")
    return entry


def label(entry: dict) -> str:
    """The method of a plan, and its number of survivors."""
    settings = entry["settings"]
    method = settings.get("method") or settings.get("search") or "hodgecover"
    return f"{method}, K = {settings['keep']}"


def cached(folder: Path, entry: dict, layer: dict, settings: Settings | None = None) -> Signals:
    """The barriers in a folder of the weights and text of a plan, measured with settings, the plan's own if there are
    none. Raises InputError if there are no such barriers."""
    text = entry["settings"]
    choices = vars(settings) if settings else text
    wanted = {name: str(choices[name]) for name in hodgecover.MEASURED}
    wanted |= {"weights": entry["source"]["fingerprint"], "dtype": f"torch.{text['dtype']}"}
    for file in sorted(folder.glob(f"{layer['name']}-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                key = opened.metadata() or {}
                if wanted.items() <= key.items() and key["text"].endswith(text["text_sha256"]):
                    return Signals(**{name: opened.get_tensor(name) for name in opened.keys()})
        except SafetensorError as err:
            raise InputError(f"{file}: damaged ({err}); remove it") from None
    raise InputError(f"barriers {folder}: has none of {layer['name']} for the weights, calibration text and settings "
                     "of the plan")


def diagnosed(entry: dict, layer: dict, settings: Settings, folder: Path) -> dict:
    """The layer of a plan whose method measured no barriers, with what those in the folder, measured with some settings
    on the plan's calibration text, say of its survivors."""
    signals = cached(folder, entry, layer, settings)

    def select(*given: object) -> Selection:
        return hodgecover.select(*given)._replace(order=layer["order"])
    plan = hodgecover.plan_from_signals(signals, len(layer["survivors"]), settings, select)
    report = {}
    for name, value in plan.diagnostics._asdict().items():
        report[name] = value.tolist() if isinstance(value, torch.Tensor) else value
    return layer | {"diagnostics": report}


def mean_retained(entry: dict, component: str) -> float:
    """Mean over layers of the retained mass of a component: its share on simplices that meet the survivors."""
    shares = [layer["diagnostics"]["retained"][component] for layer in entry["layers"]]
    return sum(shares) / len(shares)


def survivors_first(layer: dict) -> list[int]:
    """All experts, the survivors first, each group in descending saliency."""
    kept = set(layer["survivors"])
    return sorted(range(len(layer["saliency"])), key=lambda e: (e not in kept, -layer["saliency"][e]))


def barrier_matrix(barriers: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Barriers (E,) as a symmetric matrix (n, n) with the experts in some order, NaN on the diagonal.

    >>> barrier_matrix(torch.tensor([1.0, 2.0, 3.0]), [2, 0, 1]).tolist()[0]
    [nan, 2.0, 3.0]
    """
    matrix = hodgecover.table_of_pairs(barriers.double()).fill_diagonal_(torch.nan)
    return matrix[order][:, order]


# ------------------------------------------------------------------------------------------------------ the picture

def draw_eta(axes, layers: list[dict]) -> None:
    """Stacked shares of energy a layer, the constant signal's harmonic share as a mark."""
    index = [layer["layer"] for layer in layers]
    base = [0.0] * len(layers)
    for part in PARTS:
        share = [layer["diagnostics"]["eta"][part] for layer in layers]
        axes.bar(index, share, bottom=base, label=part)
        base = [below + own for below, own in zip(base, share)]
    constant = [1 - layer["diagnostics"]["eta_constant"]["harmonic"] for layer in layers]
    axes.scatter(index, constant, color="black", marker="_", s=200, zorder=3,
                 label="harmonic of a constant begins")
    axes.set(xlabel="layer", ylabel="share of energy", title="Hodge parts of the barriers", xticks=index)
    axes.legend(fontsize="small", loc="lower right")


def draw_discordance(axes, layers: list[dict]) -> None:
    """Share of the candidate triangles that are discordant (equation 9), a layer."""
    index = [layer["layer"] for layer in layers]
    axes.bar(index, [layer["diagnostics"]["discordance"] for layer in layers], color="tab:red")
    axes.set(xlabel="layer", ylabel="share of triangles", ylim=(0, 1.05), title="Discordance",
             xticks=index)


def draw_retained(axes, entries: list[dict]) -> None:
    """Mean over layers of each component's retained mass, the plans side by side."""
    width = 0.8 / len(entries)
    for number, entry in enumerate(entries):
        centre = width * (number + 0.5) - 0.4
        masses = [mean_retained(entry, component) for component in COMPONENTS]
        places = [place + centre for place in range(len(masses))]
        axes.bar(places, masses, width=width, label=label(entry))
    axes.set(xticks=range(len(COMPONENTS)), xticklabels=COMPONENTS,
             ylabel="share of the l1 mass", ylim=(0, 1.3),
             title="Retained mass: share on simplices with a survivor (equation 34)")
    axes.legend(fontsize="small", ncols=2, loc="upper center")


def draw_barriers(axes, layer: dict, barriers: torch.Tensor) -> None:
    """Barriers of all pairs, survivors first; critical edges marked, on both sides of the diagonal."""
    order = survivors_first(layer)
    place = {e: slot for slot, e in enumerate(order)}
    image = axes.imshow(barrier_matrix(barriers, order).log10(), cmap="viridis")
    first, second = [], []
    for i, j in layer["diagnostics"]["critical_edges"]:
        first += [place[i], place[j]]
        second += [place[j], place[i]]
    axes.scatter(first, second, s=5, color="red", label="critical (E*)")
    border = len(layer["survivors"]) - 0.5
    axes.axhline(border, color="white")
    axes.axvline(border, color="white")
    axes.set(xticks=[], yticks=[], title=f"log10 barriers of layer {layer['layer']}; survivors "
             "above and left of the lines")
    axes.legend(fontsize="small", loc="lower right")
    axes.figure.colorbar(image, ax=axes)


def draw(pyplot, entries: list[dict], layer: dict, barriers: torch.Tensor | None):
    """The picture, as a figure."""
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    draw_eta(axes[0, 0], entries[0]["layers"])
    draw_discordance(axes[0, 1], entries[0]["layers"])
    draw_retained(axes[1, 0], entries)
    if barriers is None:
        axes[1, 1].axis("off")
    else:
        draw_barriers(axes[1, 1], layer, barriers)
    return figure


# ------------------------------------------------------------------------------------------------- the command line

def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.parser_of(__file__, __doc__)
    parser.add_argument("plans", metavar="PLAN", type=Path, nargs="+", help="records of a plan")
    parser.add_argument("--barriers", metavar="DIR", type=Path, help="folder of barriers, such as CKPT-barriers")
    parser.add_argument("--layer", metavar="N", type=int, help="the layer whose barriers are drawn [the first]")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("diagnostics.png"), help="[%(default)s]")
    return parser


def drawable(entries: list[dict], folder: Path | None) -> list[dict]:
    """The plans with their diagnostics. Those of methods that measured no barriers come from the folder's, measured
    with the settings of the first plan that has its own. Raises InputError if they are not there."""
    without = [entry for entry in entries if entry["layers"][0]["diagnostics"] is None]
    if without and folder is None:
        raise InputError(f"barriers: needed for {label(without[0])}, which measured none")
    with_own = [entry for entry in entries if entry not in without]
    choices = (with_own or entries)[0]["settings"]
    settings = Settings(**{field.name: choices[field.name] for field in fields(Settings)})
    drawn = []
    for entry in entries:
        if entry in without:
            layers = [diagnosed(entry, layer, settings, folder) for layer in entry["layers"]]
            entry = entry | {"layers": layers}
        drawn.append(entry)
    return drawn


def layer_to_draw(entry: dict, number: int | None) -> dict:
    """The layer of that number of a plan, or the first. Raises InputError if there is none."""
    layers = {layer["layer"]: layer for layer in entry["layers"]}
    if number is None:
        number = min(layers)
    if number not in layers:
        raise InputError(f"layer {number}: the plan has the layers {', '.join(map(str, layers))}")
    return layers[number]


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    if args.layer is not None and args.barriers is None:
        raise InputError("layer: goes with --barriers, which holds the matrix to draw")
    pyplot = common.import_pyplot(args.out)
    entries = [read_entry(path) for path in args.plans]
    try:
        entries = drawable(entries, args.barriers)
        layer, barriers = layer_to_draw(entries[0], args.layer), None
        if args.barriers:
            barriers = cached(args.barriers, entries[0], layer).barriers
        figure = draw(pyplot, entries, layer, barriers)
    except (KeyError, IndexError, TypeError) as err:
        raise InputError(f"a plan that hodgecover.py did not write ({type(err).__name__}: {err})") from None
    common.write_picture(figure, args.out, dpi=70)
    print(args.out)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
