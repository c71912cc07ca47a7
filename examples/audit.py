# SPDX-License-Identifier: MIT
"""What the Hodge decomposition of a checkpoint's barriers can and cannot say, with numbers: a table a layer.

    python examples/audit.py examples/tiny-olmoe --keep 32            in minutes
    python examples/audit.py CKPT --keep 32 --calib FILE... --vocab-sample 1024

Barriers have no sign and get one from the order of the experts; so each layer is planned in saliency order (the
default), in index order and in random ones. Shown are the shares of energy (eta) of the three parts, beside them the
harmonic share of a constant signal on the same complex; how much of E* and of the survivors each order shares with the
default's; and by which pick the cover was complete. The summary adds what an order-free additive model
b_ij = phi_i + phi_j leaves, and how many survivors saliency alone would have chosen; and with `--end-to-end`, where
every layer fits in memory, how the barriers rank edges beside those measured at the end of the model on so many tokens.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mathx  # noqa: E402
from hodgecover import (SEQ_LEN, TOKENS, Settings, Signals, calibration_ids, check_keep, check_range,  # noqa: E402
                        choose_dtype, measure_model, plan_from_signals, sparse_layers)
from model_io import InputError, Model  # noqa: E402

SUMMARY = ("layer", "harmonic share", "of a constant signal", "over random orders", "E* shared with them, median",
           "survivors shared with them", "energy the additive model leaves", "variance", "E* and T* covered at",
           "survivors that are top by saliency")


def shared(a: list, b: list) -> float:
    """Share of a that is in b."""
    return sum(item in b for item in a) / max(len(a), 1)


def facts(signals: Signals, keep: int, settings: Settings, default: dict) -> list[float]:
    """One line of the table: the plan in some order beside the default plan."""
    plan = plan_from_signals(signals, keep, settings)
    return [*plan["eta"].values(), plan["eta_constant"]["harmonic"],
            shared(plan["critical_edges"], default["critical_edges"]), shared(plan["survivors"], default["survivors"]),
            max(plan["covered_at"].values())]


def row(name: str, values: list[float]) -> str:
    *shares, covered = values
    return f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + f" | {covered:.0f} |"


def audit_layer(index: int, signals: Signals, keep: int, orders: int, settings: Settings) -> list[str]:
    """Prints the table of one layer; returns its line of the summary."""
    default = plan_from_signals(signals, keep, settings)
    print(f"\nLayer {index}\n\n| order | eta gradient | curl | harmonic | harmonic of a constant | E* shared | "
          "survivors shared | covered at |\n|---|---|---|---|---|---|---|---|")
    for order in ("saliency", "index"):
        print(row(order, facts(signals, keep, replace(settings, order=order), default)))
    spread = torch.tensor([facts(signals, keep, replace(settings, order=f"random:{seed}"), default)
                           for seed in range(orders)])
    low, middle, high = spread.amin(0), spread.median(0).values, spread.amax(0)
    for name, of in (("smallest", low), ("median", middle), ("largest", high)):
        print(row(f"{orders} random, {name}", of.tolist()), flush=True)
    reap = plan_from_signals(signals, keep, replace(settings, method="reap"))["survivors"]
    return [f"{default['eta']['harmonic']:.2f}", f"{default['eta_constant']['harmonic']:.2f}",
            f"{low[2]:.2f} to {high[2]:.2f}", f"{middle[4]:.0%}", f"{low[5]:.0%} to {high[5]:.0%}",
            f"{1 - default['additive']['energy']:.1%}", f"{1 - default['additive']['variance']:.1%}",
            f"{max(default['covered_at'].values())} of {keep}", f"{shared(default['survivors'], reap):.0%}"]


def end_to_end(model: Model, ids: torch.Tensor, settings: Settings) -> None:
    """Prints how the lens ranks the edges of each layer beside the model readout on the same few tokens."""
    found = [dict(measure_model(model, ids, replace(settings, readout=readout, vocab_sample=0, max_triangles=0),
                                sparse_layers(model))) for readout in ("lens", "model")]
    print(f"\nLens against the end of the model, on {ids.numel()} tokens\n\n| layer | Spearman of edges |\n"
          "|---|---|")
    for index, signals in found[0].items():
        print(f"| {index} | {mathx.spearman(signals.barriers, found[1][index].barriers):.3f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--keep", type=int, required=True)
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--calib", type=Path, nargs="+", default=[])
    parser.add_argument("--cache", type=Path, help="as of hodgecover.py [CKPT-barriers]")
    parser.add_argument("--vocab-sample", type=int, default=0)
    parser.add_argument("--end-to-end", metavar="TOKENS", type=int, default=0)
    args = parser.parse_args()
    try:
        model = Model(args.checkpoint, choose_dtype("auto", "lens", "cpu"))
        check_keep(model, args.keep, "--keep")
        check_range("orders", args.orders, 1)
        check_range("end-to-end", args.end_to_end, 0)
        settings = Settings(vocab_sample=args.vocab_sample)
        cache = args.cache or args.checkpoint.absolute().with_name(f"{args.checkpoint.absolute().name}-barriers")
        ids = calibration_ids(model, args.calib, TOKENS, SEQ_LEN, settings.seed)
        summary = {index: audit_layer(index, signals, args.keep, args.orders, settings)
                   for index, signals in measure_model(model, ids, settings, sparse_layers(model), cache)}
        print(f"\n| {' | '.join(SUMMARY)} |\n|{'---|' * len(SUMMARY)}")
        for index, cells in summary.items():
            print(f"| {index} | {' | '.join(cells)} |")
        if args.end_to_end:
            end_to_end(Model(args.checkpoint), ids[:, :max(2, args.end_to_end // len(ids))], settings)
    except InputError as err:
        print(f"audit.py: error: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
