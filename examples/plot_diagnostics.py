# SPDX-License-Identifier: MIT
"""Draws what hodgecover.json says, with matplotlib (which requirements.txt does not install).

    python examples/plot_diagnostics.py PLAN [PLAN ...] --barriers CKPT-barriers --out picture.png

Of the first plan (a hodgecover.json): the shares of energy and the discordance of each layer. Of all of them, of
several --method say: the mass of each component that the survivors retain. With --barriers, the folder where the
barriers are kept, also the matrix of one --layer's barriers, survivors first, with the harmonic-critical edges marked;
and methods that measure no barriers have their retained mass taken from there.
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mathx  # noqa: E402
from hodgecover import Settings, Signals, plan_from_signals  # noqa: E402
from model_io import InputError, read_json  # noqa: E402

PARTS = ("gradient", "curl", "harmonic")


def cached(folder: Path, plan: dict, layer: dict) -> Signals:
    """The barriers in the folder that a plan, or one of another method, was made from. Raises InputError where they
    are not there."""
    chosen = plan["settings"]
    wanted = {"dtype": f"torch.{chosen['dtype']}"} | {
        name.replace("_", " "): str(chosen[name]) for name in ("readout", "vocab_sample", "max_triangles", "seed")}
    for file in sorted(folder.glob(f"{layer['name']}-*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found = f.metadata()
            if wanted.items() <= found.items() and found["calibration text"].endswith(chosen["calibration_sha256"]):
                return Signals(**{name: f.get_tensor(name) for name in f.keys()})
    raise InputError(f"{folder}: no barriers of {layer['name']} for the calibration text and settings of the plan")


def completed(plan: dict, folder: Path) -> dict:
    """A plan whose method measured no barriers, with what those in the folder say of its survivors."""
    settings = Settings(**{field: plan["settings"][field] for field in Settings.__dataclass_fields__})
    return plan | {"layers": [plan_from_signals(cached(folder, plan, layer), len(layer["survivors"]), settings,
                                                layer["layer"]) | layer for layer in plan["layers"]]}


def draw_eta(axes, layers: list[dict]) -> None:
    """Stacked shares of energy a layer, the constant signal's harmonic share as a mark."""
    index, base = [layer["layer"] for layer in layers], [0.0] * len(layers)
    for part in PARTS:
        share = [layer["eta"][part] for layer in layers]
        axes.bar(index, share, bottom=base, label=part)
        base = [a + b for a, b in zip(base, share)]
    axes.scatter(index, [1 - layer["eta_constant"]["harmonic"] for layer in layers], color="black", marker="_", s=200,
                 label="harmonic of a constant begins", zorder=3)
    axes.set(xlabel="layer", ylabel="share of energy", title="Hodge parts of the barriers", xticks=index)
    axes.legend(fontsize="small", loc="lower right")


def draw_discordance(axes, layers: list[dict]) -> None:
    """Share of the candidate triangles dearer than their edges, a layer."""
    index = [layer["layer"] for layer in layers]
    axes.bar(index, [layer["discordance"] for layer in layers], color="tab:red")
    axes.set(xlabel="layer", ylabel="share of triangles", ylim=(0, 1.05), title="Discordance", xticks=index)


def draw_retained(axes, plans: list[dict]) -> None:
    """Mean over layers of each component's energy on simplices with a survivor, and with survivors alone."""
    names = (*PARTS, "triplet")
    for i, plan in enumerate(plans):
        layers = plan["layers"]
        at = [j + 0.8 * (i + 0.5) / len(plans) - 0.4 for j in range(len(names))]
        for kind, alpha in (("some", 0.4), ("all", 1.0)):
            axes.bar(at, [sum(layer["retained"][name][kind] for layer in layers) / len(layers) for name in names],
                     width=0.8 / len(plans), color=f"C{i}", alpha=alpha,
                     label=f"{plan['settings']['method']}, K = {plan['settings']['keep']}" if kind == "all" else None)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="share of energy", ylim=(0, 1.3),
             title="Retained mass: pale with some, full with all vertices surviving")
    axes.legend(fontsize="small", ncols=2, loc="upper center")


def draw_barriers(axes, layer: dict, barriers: torch.Tensor) -> None:
    """Barriers of all pairs, survivors first, each group in descending saliency; harmonic-critical edges marked."""
    n, saliency = len(layer["saliency"]), layer["saliency"]
    kept = set(layer["survivors"])
    shown = sorted(range(n), key=lambda e: (e not in kept, -saliency[e]))
    place = {e: i for i, e in enumerate(shown)}
    matrix = torch.full((n, n), float("nan"), dtype=torch.float64)
    i, j = mathx.edges(n).unbind(1)
    matrix[i, j] = matrix[j, i] = barriers
    image = axes.imshow(matrix[shown][:, shown].log10(), cmap="viridis")
    marks = [(place[a], place[b]) for edge in layer["critical_edges"] for a, b in (edge, edge[::-1])]
    axes.scatter(*zip(*marks), s=5, color="red", label="harmonic-critical")
    axes.axhline(len(kept) - 0.5, color="white")
    axes.axvline(len(kept) - 0.5, color="white")
    axes.set(title=f"log10 barriers of layer {layer['layer']}; survivors above and left of the lines", xticks=[],
             yticks=[])
    axes.legend(fontsize="small", loc="lower right")
    axes.figure.colorbar(image, ax=axes)


def draw(args: argparse.Namespace) -> None:
    """The whole picture."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    plans = [read_json(path) for path in args.plans]
    if args.barriers:
        plans = [plan if "eta" in plan["layers"][0] else completed(plan, args.barriers) for plan in plans]
    plans = [plan for plan in plans if "eta" in plan["layers"][0]]
    if not plans:
        raise InputError("no plan's method measured barriers; say with --barriers where some are")
    layer = next((layer for layer in plans[0]["layers"] if layer["layer"] == args.layer), None)
    if layer is None:
        raise InputError(f"--layer {args.layer}: the plan has none of that number")
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    draw_eta(axes[0, 0], plans[0]["layers"])
    draw_discordance(axes[0, 1], plans[0]["layers"])
    draw_retained(axes[1, 0], plans)
    if args.barriers:
        draw_barriers(axes[1, 1], layer, cached(args.barriers, plans[0], layer).barriers)
    else:
        axes[1, 1].axis("off")
    figure.savefig(args.out, dpi=70)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", metavar="PLAN", type=Path, nargs="+")
    parser.add_argument("--barriers", metavar="DIR", type=Path)
    parser.add_argument("--layer", type=int, default=0, help="whose barriers to draw [0]")
    parser.add_argument("--out", type=Path, default=Path("diagnostics.png"))
    args = parser.parse_args()
    try:
        draw(args)
    except (InputError, OSError, SafetensorError) as err:
        print(f"plot_diagnostics.py: error: {err}", file=sys.stderr)
        return 2
    except (KeyError, IndexError, TypeError) as err:
        print(f"plot_diagnostics.py: error: not a plan that hodgecover.py wrote ({err!r})", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
