# SPDX-License-Identifier: MIT
"""Times the barrier sweep of one layer with random weights against the machine's matrix rate and the plain way.

    python examples/bench_barriers.py                      OLMoE-1B-7B's shape, 64 tokens; under 4 minutes
    python examples/bench_barriers.py --peak 8             sharply peaked next-token distributions
    python examples/bench_barriers.py --scaling            the exponent in the number of experts
    python examples/bench_barriers.py --refit 16384        the refit of half of the experts on so many tokens instead

The plain way, in float32: merge the weights, run the layer on every token, two log-softmaxes over the vocabulary; a
sample of simplices is timed and scaled. The reference for the errors is the same in float64. The rate of the bare
product, (rows of a token, d) times the head, is taken before and after each of three sweeps, since a shared machine's
rate moves; times are medians.
"""
import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mathx  # noqa: E402
from hodgecover import choose_dtype, lens_barriers, refit_layer, refit_operations, touched  # noqa: E402
from model_io import Experts, Layer, LayerPass, rms_norm  # noqa: E402


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


def sweep(layer: dict, simplices: torch.Tensor, vocab_sample: int = 0) -> torch.Tensor:
    """The barriers by the library."""
    weight = torch.ones(layer["x"].shape[1], dtype=layer["x"].dtype)
    return lens_barriers(*(layer[name] for name in ("experts", "x", "gates", "y")), simplices,
                         norm=partial(rms_norm, weight=weight, eps=1e-5), unembedding=layer["unembedding"],
                         vocab_sample=vocab_sample)


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


def product_seconds(rows: int, layer: dict) -> float:
    """Wall time of (rows, d) times the head into a buffer that is there, the best of three."""
    head = layer["unembedding"]
    a = torch.randn(rows, head.shape[1]).to(head.dtype)
    out = torch.empty(rows, len(head), dtype=head.dtype)
    return min(seconds(lambda: torch.mm(a, head.T, out=out)) for _ in range(4))


def timed_sweep(layer: dict, simplices: torch.Tensor, rows: int, vocab_sample: int = 0) -> tuple[float, float]:
    """Median seconds of three sweeps, and the median rate of the bare product around them, operations a second."""
    products, sweeps = [product_seconds(rows, layer)], []
    for _ in range(3):
        sweeps.append(seconds(sweep, layer, simplices, vocab_sample))
        products.append(product_seconds(rows, layer))
    return median(sweeps), 2 * rows * layer["unembedding"].numel() / median(products)


def operations(layer: dict, simplices: torch.Tensor, vocab_sample: int = 0) -> tuple[int, int]:
    """(touched (token, simplex) pairs, operations of readout, pre-activations and down projections)."""
    n, f, d = layer["experts"].gate.shape
    tokens, vocab = len(layer["x"]), len(layer["unembedding"])
    rows = int(touched(layer["gates"], simplices).sum())
    return rows, 2 * d * (rows * ((vocab_sample or vocab) + simplices.shape[1] * f) + tokens * (vocab + 2 * n * f))


def harmonic(barriers: torch.Tensor) -> torch.Tensor:
    """|b_harm| on the complete complex of 64 experts without triangles, |E| values."""
    n = round((2 * len(barriers)) ** 0.5 + 0.5)
    parts = mathx.hodge_decompose(barriers, *mathx.boundary_matrices(n, torch.empty(0, 3, dtype=torch.int64)))
    return parts.harmonic.abs()


def compare(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """The tables: pairs and triangles against the bare product and the plain way; samples of the vocabulary."""
    layer = random_layer(args.experts, args.top_k, args.hidden, args.width, args.vocab, args.tokens, args.peak, dtype)
    g = torch.Generator().manual_seed(1)
    triples = torch.combinations(torch.arange(args.experts), 3)
    cases = {"pairs": mathx.edges(args.experts), "triangles": triples[torch.randperm(len(triples), generator=g)[:500]]}
    print(f"n = {args.experts}, k = {args.top_k}, d = {args.hidden}, f = {args.width}, V = {args.vocab}, "
          f"T = {args.tokens}, logits of deviation {args.peak:g}, {dtype}, {torch.get_num_threads()} threads\n")
    print("| | merges | touched | operations | s | floor, s | share of the product's rate | plain way, s | faster | "
          "largest error of a sample |\n|---|---|---|---|---|---|---|---|---|---|")
    took = {}
    for name, simplices in cases.items():
        rows, count = operations(layer, simplices)
        took[name], rate = timed_sweep(layer, simplices, max(1, rows // args.tokens))
        reached = simplices[touched(layer["gates"], simplices).any(0)]
        sample = reached[torch.randperm(len(reached), generator=g)[:args.sample]]
        plain = sum(seconds(plain_barrier, layer, s, torch.float32) for s in sample.tolist()) / len(sample)
        exact = torch.tensor([plain_barrier(layer, s, torch.float64) for s in sample.tolist()]).double()
        error = ((sweep(layer, sample) - exact).abs() / exact).max().item()
        print(f"| {name} | {len(simplices)} | {rows} | {count:.2e} | {took[name]:.1f} | {count / rate:.1f} | "
              f"{count / rate / took[name]:.0%} | {plain * len(simplices):.0f} | "
              f"{plain * len(simplices) / took[name]:.0f} x | {error:.1e} |", flush=True)
    print("\n| pairs, outcomes sampled | operations | s | faster | mean error | largest error | rank correlation of "
          "barriers | of abs(b_harm) |\n|---|---|---|---|---|---|---|---|")
    exact = sweep(layer, cases["pairs"])
    for outcomes in (256, 1024, 4096):
        rows, count = operations(layer, cases["pairs"], outcomes)
        spent, _ = timed_sweep(layer, cases["pairs"], max(1, rows // args.tokens), outcomes)
        sampled = sweep(layer, cases["pairs"], outcomes)
        error = (sampled / exact - 1)[exact > 0]
        print(f"| {outcomes} | {count:.2e} | {spent:.1f} | {took['pairs'] / spent:.1f} x | {error.mean():+.2%} | "
              f"{error.abs().max():.1%} | {mathx.spearman(sampled, exact):.5f} | "
              f"{mathx.spearman(harmonic(sampled), harmonic(exact)):.5f} |", flush=True)


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Exponent of a power law through the values, by least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().log()
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def scaling(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Touched rows and seconds of the pair sweep and of 500 triangles at fixed k, and the fitted exponents in n."""
    sizes, found = (16, 32, 64, 128, 256), {"pairs": ([], []), "500 triangles": ([], [])}
    print("| n | pairs: touched | s | 500 triangles: touched | s |\n|---|---|---|---|---|")
    for n in sizes:
        layer = random_layer(n, args.top_k, 512, 128, 16384, args.tokens, args.peak, dtype)
        triples = torch.combinations(torch.arange(n), 3)
        triples = triples[torch.randperm(len(triples), generator=torch.Generator().manual_seed(1))[:500]]
        for (rows, times), simplices in zip(found.values(), (mathx.edges(n), triples)):
            rows.append(operations(layer, simplices)[0])
            times.append(median(seconds(sweep, layer, simplices) for _ in range(3)))
        print(f"| {n} | " + " | ".join(f"{rows[-1]} | {times[-1]:.2f}" for rows, times in found.values()) + " |",
              flush=True)
    for name, (rows, times) in found.items():
        print(f"{name}: exponent in n of the touched pairs {slope(sizes, rows):.2f}, of the time "
              f"{slope(sizes, times):.2f}")


def time_refit(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """The refit of one layer, and the rates of its operations and of a bare float64 product."""
    keep = args.experts // 2
    layer = random_layer(keep, args.top_k, args.hidden, args.width, args.vocab, args.refit, args.peak, dtype)
    x, y, held = layer["x"], layer["y"], Layer(layer["experts"], None, {})
    step = LayerPass(0, "", held, x, layer["gates"], y, torch.nn.Identity())
    count = refit_operations(args.refit, keep, args.top_k, args.hidden, args.width)
    residual = y.float()
    before = residual.norm()
    spent = seconds(refit_layer, step, residual)
    a = torch.randn(args.width, 4096, dtype=torch.float64)
    product = 2 * 4096 * args.width**2 / min(seconds(torch.mm, a, a.T) for _ in range(3))
    print(f"{keep} experts of {args.experts}, {args.refit:,} tokens, {dtype}, {torch.get_num_threads()} threads: "
          f"{count:.2e} operations in {spent:.1f} s, {count / spent:.1e} a second; a float64 product does "
          f"{product:.1e}; residual {residual.norm() / before:.4f} of what it was")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(experts=64, top_k=8, hidden=2048, width=1024, vocab=50304, tokens=64, sample=4).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--peak", type=float, default=4.0, help="standard deviation of the logits [4, about a "
                        "trained model's entropy]")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--refit", type=int, metavar="TOKENS")
    args = parser.parse_args()
    (scaling if args.scaling else time_refit if args.refit else compare)(args, choose_dtype(args.dtype, "lens", "cpu"))


if __name__ == "__main__":
    main()
