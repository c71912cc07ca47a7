# SPDX-License-Identifier: MIT
"""Times the barrier sweep of one layer with random weights against the machine's matrix rate and the plain way.

    python examples/bench_barriers.py                          OLMoE-1B-7B's shape, 64 tokens, bfloat16
    python examples/bench_barriers.py --scaling                the exponent in the number of experts

The plain way, in float32: merge the weights, run the layer on every token, two log-softmaxes over the vocabulary; a
sample of simplices is timed and scaled. The reference for the errors is the same in float64. Everything is measured
in one run; the table says what share of the bare product's rate the sweep reaches.
"""
import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mathx  # noqa: E402
from hodgecover import lens_barriers, touched  # noqa: E402
from model_io import Experts, rms_norm  # noqa: E402


def random_layer(n: int, k: int, d: int, f: int, vocab: int, tokens: int, peak: float, dtype: torch.dtype) -> dict:
    """A layer whose next-token distributions have logits of standard deviation `peak`."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype)
    top = torch.rand(tokens, n, generator=g).topk(k).indices
    gate, up, down = normal(n, f, d, std=d**-0.5), normal(n, f, d, std=d**-0.5), normal(n, d, f, std=f**-0.5)
    return {"experts": Experts(gate, up, down),
            "x": normal(tokens, d, std=1.0), "gates": torch.zeros(tokens, n).scatter(1, top, 1 / k).to(dtype),
            "y": normal(tokens, d, std=1.0), "unembedding": normal(vocab, d, std=peak * d**-0.5)}


def sweep(layer: dict, simplices: torch.Tensor) -> torch.Tensor:
    """The barriers by the library."""
    weight = torch.ones(layer["x"].shape[1], dtype=layer["x"].dtype)
    return lens_barriers(*(layer[name] for name in ("experts", "x", "gates", "y")), simplices,
                         norm=partial(rms_norm, weight=weight, eps=1e-5), unembedding=layer["unembedding"])


def plain_barrier(layer: dict, simplex: list[int], dtype: torch.dtype) -> float:
    """One barrier the straightforward way."""
    x, gates, y, head = (layer[name].to(dtype) for name in ("x", "gates", "y", "unembedding"))
    frequency = (gates[:, simplex] > 0).sum(0).to(dtype)
    w = frequency / frequency.sum() if frequency.sum() else torch.full_like(frequency, 1 / len(simplex))
    gate, up, down = (torch.tensordot(w, part[simplex].to(dtype), 1) for part in layer["experts"])
    change = gates[:, simplex].sum(1, keepdim=True) * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    for e in simplex:
        gate, up, down = (part[e].to(dtype) for part in layer["experts"])
        change = change - gates[:, e, None] * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    weight = torch.ones(x.shape[1], dtype=dtype)
    log_p, log_q = ((rms_norm(s, weight, 1e-5) @ head.T).log_softmax(-1) for s in (y, y + change))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def seconds(function, *args) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def product_rate(rows: int, layer: dict) -> float:
    """Operations a second of (rows, d) times the head, the best of three."""
    head = layer["unembedding"]
    a = torch.randn(rows, head.shape[1]).to(head.dtype)
    out = torch.empty(rows, len(head), dtype=head.dtype)
    return 2 * rows * head.numel() / min(seconds(lambda: torch.mm(a, head.T, out=out)) for _ in range(4))


def operations(layer: dict, simplices: torch.Tensor) -> tuple[int, int]:
    """(touched (token, simplex) pairs, operations of readout, pre-activations and down projections)."""
    n, f, d = layer["experts"].gate.shape
    tokens, vocab = len(layer["x"]), len(layer["unembedding"])
    rows = int(touched(layer["gates"], simplices).sum())
    return rows, 2 * d * (rows * (vocab + simplices.shape[1] * f) + tokens * (vocab + 2 * n * f))


def compare(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """The table: pairs and triangles, against the bare product and the plain way."""
    layer = random_layer(args.experts, args.top_k, args.hidden, args.width, args.vocab, args.tokens, args.peak, dtype)
    g = torch.Generator().manual_seed(1)
    triples = torch.combinations(torch.arange(args.experts), 3)
    cases = {"pairs": mathx.edges(args.experts), "triangles": triples[torch.randperm(len(triples), generator=g)[:500]]}
    print(f"n = {args.experts}, k = {args.top_k}, d = {args.hidden}, f = {args.width}, V = {args.vocab}, "
          f"T = {args.tokens}, logits of deviation {args.peak}, {dtype}, {torch.get_num_threads()} threads\n")
    print("| | merges | touched | operations | s | floor, s | share of the product's rate | plain way, s | faster | "
          "largest error of a sample |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, simplices in cases.items():
        rows, count = operations(layer, simplices)
        rate = product_rate(max(1, rows // args.tokens), layer)
        took = seconds(sweep, layer, simplices)
        reached = simplices[touched(layer["gates"], simplices).any(0)]
        sample = reached[torch.randperm(len(reached), generator=g)[:args.sample]]
        plain = sum(seconds(plain_barrier, layer, s, torch.float32) for s in sample.tolist()) / len(sample)
        exact = torch.tensor([plain_barrier(layer, s, torch.float64) for s in sample.tolist()]).double()
        error = ((sweep(layer, sample) - exact).abs() / exact).max().item()
        print(f"| {name} | {len(simplices)} | {rows} | {count:.2e} | {took:.1f} | {count / rate:.1f} | "
              f"{count / rate / took:.0%} | {plain * len(simplices):.0f} | {plain * len(simplices) / took:.0f} x | "
              f"{error:.1e} |", flush=True)


def scaling(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Seconds of the pair sweep and of 500 triangles from 16 to 256 experts at fixed k, and the fitted exponents."""
    sizes, times = (16, 32, 64, 128, 256), {"pairs": [], "triangles": []}
    print("| n | pairs, s | 500 triangles, s |\n|---|---|---|")
    for n in sizes:
        layer = random_layer(n, args.top_k, 256, 64, 4096, args.tokens, args.peak, dtype)
        triples = torch.combinations(torch.arange(n), 3)
        for name, simplices in (("pairs", mathx.edges(n)), ("triangles", triples[torch.randperm(len(triples))[:500]])):
            times[name].append(min(seconds(sweep, layer, simplices) for _ in range(2)))
        print(f"| {n} | {times['pairs'][-1]:.2f} | {times['triangles'][-1]:.2f} |", flush=True)
    for name, values in times.items():
        slope = math.log(values[-1] / values[-3]) / math.log(sizes[-1] / sizes[-3])
        print(f"{name}: exponent in n from {sizes[-3]} to {sizes[-1]}: {slope:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(experts=64, top_k=8, hidden=2048, width=1024, vocab=50304, tokens=64, sample=4).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--peak", type=float, default=1.0, help="standard deviation of the logits [1]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--scaling", action="store_true")
    args = parser.parse_args()
    (scaling if args.scaling else compare)(args, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
