# SPDX-License-Identifier: MIT
"""The README's comparison on examples/tiny-olmoe: HodgeCover beside keeping the experts of largest REAP saliency.

    python examples/reproduce.py

Measures the barriers once, keeps K = 48, 32, 21, 16 of 64 experts, and prints perplexity on held-out text and mean
KL to the source. `fold` is HodgeCover's choice under `--router fold`.
"""
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import model_io  # noqa: E402
from hodgecover import (Settings, calibration_ids, evaluate, fold_file, make_readout, measure_layer,  # noqa: E402
                        plan_from_signals)


def main() -> None:
    source, settings = model_io.Model(HERE / "tiny-olmoe"), Settings()
    held_out = model_io.sequences(source.encode(model_io.python_documentation("held-out")), 512)
    ids = calibration_ids(source, [], 2048, 512, settings.seed)
    readout = make_readout(source, settings, ids)
    signals = {step.name: measure_layer(step.layer.experts, step.x, step.gates, step.y, readout(step), settings)
               for step in source.stream(ids)}
    print(f"source: perplexity {source.perplexity(held_out):.1f} on {held_out.numel():,} held-out tokens\n")
    print("| kept of 64 | HodgeCover | top-K by REAP saliency | HodgeCover, fold |")
    print("|---|---|---|---|")
    for keep in (48, 32, 21, 16):
        plans = [plan_from_signals(s, keep, settings) | {"name": name} for name, s in signals.items()]
        hodge = {plan["name"]: plan["survivors"] for plan in plans}
        reap = {name: s.saliency.sort(descending=True, stable=True).indices[:keep].sort().values.tolist()
                for name, s in signals.items()}
        cells = []
        for survivors, router in ((hodge, "drop"), (reap, "drop"), (hodge, "fold")):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                model_io.write_checkpoint(source.checkpoint, out, survivors, {model_io.FOLD: fold_file(source, plans)})
                _, perplexity, kl = evaluate(source, model_io.Model(out, router=router), held_out)
            cells.append(f"{perplexity:.1f} (KL {kl:.2f})")
        print(f"| {keep} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
