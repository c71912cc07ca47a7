# SPDX-License-Identifier: MIT
"""Time the barrier sweep of one layer with random weights against the machine's matrix rate and the plain way.

    python examples/bench.py                      OLMoE-1B-7B's shape, 64 tokens; under 4 minutes
    python examples/bench.py --peak 8             sharply peaked next-token distributions
    python examples/bench.py --scaling            the exponents in n, T and V
    python examples/bench.py --refit 16384        the refit of half of the experts on so many tokens instead
    python examples/bench.py --gradients 4096     heapr.py's pass back and a step of distil.py --layerwise instead
    python examples/bench.py --selectors          what hodgecover.py and each method of baselines.py cost instead

The plain way is `hodgecover.plain_barrier` in float32: run the members on every token, mix their outputs, two
log-softmaxes over the vocabulary. A sample of simplices is timed and scaled. The errors are against the same in
float64. The floor of a sweep is the time of its operations (estimate.py) at the rate of the bare product, (n + 1, d)
times the head, which is taken before and after each of three sweeps, since a shared machine's rate moves. Times are
medians.

--selectors: processor seconds of what the commands measure for a method, taken once and counted in full for each that
shares it, and of its own work for half of the experts, the least of three: a plan, or the merged experts, and for ream
one more forward pass. The forward pass, of the experts on all tokens as they are routed, comes on top of each.
"""
import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

import baselines
import common
import distil
import estimate
import heapr
import hodgecover
import mathx
import model_io
import refit
from estimate import Shape
from hodgecover import MoELayer
from model_io import (PASS_TOKENS, Config, Experts, InputError, Layer, LayerPass, RMSNorm, layer_shapes, mix_experts,
                      read_config, run_layer)

SIZES = dict(experts=64, top_k=8, hidden=2048, width=1024, vocab=50304, sample=4)
SEQ_LEN = 512  # of --gradients
TOKENS = 64  # but of --selectors those of hodgecover.py
UNUSED = {"scaling": ("experts", "hidden", "width", "vocab", "sample"), "refit": ("vocab", "tokens", "sample", "peak"),
          "gradients": ("vocab", "tokens", "sample", "peak"), "selectors": ("sample",)}
ON_BARRIERS = ("hodgecover", *baselines.ON_BARRIERS, *baselines.MERGING_ON_BARRIERS)
MEASURED_BY = (dict.fromkeys(ON_BARRIERS, "barriers")  # what a method starts from
               | dict.fromkeys(baselines.RECORDED, "routing") | dict.fromkeys(("man", "msan", "hope"), "norms")
               | {"aimer": "weights"} | dict.fromkeys(baselines.MERGING_ON_FACTS, "facts"))
SCALED = dict(hidden=512, width=128)  # of --scaling, which varies one of the following, the others in the middle
SCALED_SIZES = {"n": (16, 32, 64, 128, 256), "T": (16, 32, 64, 128), "V": (4096, 8192, 16384, 32768)}
OUTCOMES = (256, 512, 1024, 4096)  # sizes of a sample of the vocabulary


# ------------------------------------------------------------------------------------------- a layer, and its sweeps

def random_layer(shape: Shape, tokens: int, peak: float, dtype: torch.dtype) -> MoELayer:
    """A layer whose next-token distributions have logits of standard deviation `peak`."""
    n, k, d, f, vocab, _ = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std).to(dtype)
    chosen = torch.rand(tokens, n, generator=generator).topk(k).indices
    experts = Experts(normal(n, f, d, std=d**-0.5), normal(n, f, d, std=d**-0.5), normal(n, d, f, std=f**-0.5))
    gates = torch.zeros(tokens, n).scatter(1, chosen, 1 / k).to(dtype)
    return MoELayer(experts, normal(tokens, d, std=1.0), gates, normal(tokens, d, std=1.0), norm_in(d, dtype),
                    normal(vocab, d, std=peak * d**-0.5))


def norm_in(d: int, dtype: torch.dtype) -> RMSNorm:
    """A final norm whose weights are 1."""
    return RMSNorm(torch.ones(d, dtype=dtype), 1e-5)


def in_dtype(layer: MoELayer, dtype: torch.dtype) -> MoELayer:
    """The layer in another dtype, but for its experts, which are widened when they are used."""
    return MoELayer(layer.experts, layer.x.to(dtype), layer.gates.to(dtype), layer.y.to(dtype),
                    norm_in(layer.x.shape[1], dtype), layer.unembedding.to(dtype))


def touched_pairs(layer: MoELayer, simplices: torch.Tensor) -> int:
    """(Token, simplex) pairs with a token that is routed to a member."""
    return int(mathx.touching(simplices, layer.gates).sum())


def random_triangles(n: int, count: int = 500) -> torch.Tensor:
    """`count` of all triples of n experts, or all of them if there are fewer, (F, 3)."""
    triples = torch.combinations(torch.arange(n), 3)
    return triples[torch.randperm(len(triples), generator=torch.Generator().manual_seed(1))[:count]]


def harmonic(barriers: torch.Tensor, n: int) -> torch.Tensor:
    """|b_harm| on the complete complex of n experts without triangles, (E,)."""
    boundaries = hodgecover.boundary_matrices(n, torch.empty(0, 3, dtype=torch.int64))
    return hodgecover.hodge_decompose(barriers, *boundaries).harmonic.abs()


# ---------------------------------------------------------------------------------------------------------- timing

def seconds(function: Callable, *args) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def processor_seconds(function: Callable, *args) -> tuple[float, object]:
    """Processor time of one call, of all threads, and what it returns."""
    started = time.process_time()
    found = function(*args)
    return time.process_time() - started, found


def product_seconds(rows: int, layer: MoELayer) -> float:
    """Wall time of (rows, d) times the head into a buffer that is there, the best of four."""
    head = layer.unembedding
    left = torch.randn(rows, head.shape[1]).to(head.dtype)
    out = torch.empty(rows, len(head), dtype=head.dtype)
    return min(seconds(lambda: torch.mm(left, head.T, out=out)) for _ in range(4))


def timed_sweep(layer: MoELayer, simplices: torch.Tensor, rows: int, outcomes: int = 0) -> tuple[float, float]:
    """Median seconds of three sweeps, and the median rate of the bare product around them, operations a second."""
    products, sweeps = [product_seconds(rows, layer)], []
    for _ in range(3):
        sweeps.append(seconds(estimate.sweep, layer, simplices, outcomes))
        products.append(product_seconds(rows, layer))
    return median(sweeps), 2 * rows * layer.unembedding.numel() / median(products)


def timed_floor(layer: MoELayer, shape: Shape, simplices: torch.Tensor) -> tuple[int, float, float, float]:
    """Of a sweep on the shape's outcomes: touched pairs, operations, median seconds, and the floor of the seconds."""
    rows, outcomes = touched_pairs(layer, simplices), shape.outcomes % shape.vocab
    count = estimate.sweep_operations(shape, len(layer.x), rows)
    spent, rate = timed_sweep(layer, simplices, shape.n + 1, outcomes)
    return rows, count, spent, count / rate


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Exponent of a power law through the values, by least squares.

    >>> round(slope((1, 2, 4), [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().log()
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


# ---------------------------------------------------------------------------------------------------------- tables

def compare(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print two tables: pairs and triangles against the bare product and the plain way; samples of the vocabulary."""
    shape = Shape(args.experts, args.top_k, args.hidden, args.width, args.vocab, args.vocab)
    layer = random_layer(shape, args.tokens, args.peak, dtype)
    print(f"n = {shape.n}, k = {shape.k}, d = {shape.d}, f = {shape.f}, V = {shape.vocab}, T = {args.tokens}, logits "
          f"of deviation {args.peak:g}, {dtype}, {torch.get_num_threads()} threads\n")
    took = compare_plain(layer, shape, args.sample)
    print()
    compare_samples(layer, shape, took)


def compare_plain(layer: MoELayer, shape: Shape, sample: int) -> dict[str, float]:
    """Print a line for pairs and one for triangles; return the seconds of each."""
    print("| | merges | touched | operations | s | floor, s | share of the product's rate | plain way, s | faster | "
          "largest error of a sample |\n|---|---|---|---|---|---|---|---|---|---|")
    generator, times = torch.Generator().manual_seed(1), {}
    narrow, wide = in_dtype(layer, torch.float32), in_dtype(layer, torch.float64)
    for name, simplices in {"pairs": hodgecover.edges(shape.n), "triangles": random_triangles(shape.n)}.items():
        costly = costly_merges(layer, simplices)
        if not len(costly):
            raise InputError(f"tokens {len(layer.x)}: no {name} of experts that are not always used together; give "
                             "more, or a smaller --top-k")
        some = costly[torch.randperm(len(costly), generator=generator)[:sample]]
        plain_seconds = sum(seconds(hodgecover.plain_barrier, narrow, simplex) for simplex in some.tolist())
        plain = plain_seconds / len(some) * len(simplices)
        exact = torch.stack([hodgecover.plain_barrier(wide, simplex) for simplex in some.tolist()])
        error = (estimate.sweep(layer, some) / exact - 1).abs().max().item()

        rows, count, spent, floor = timed_floor(layer, shape, simplices)
        times[name] = spent
        print(f"| {name} | {len(simplices)} | {rows} | {count:.2e} | {spent:.1f} | {floor:.1f} | {floor / spent:.0%} | "
              f"{plain:.0f} | {plain / spent:.0f} x | {error:.1e} |", flush=True)
    return times


def costly_merges(layer: MoELayer, simplices: torch.Tensor) -> torch.Tensor:
    """The simplices (M, 2 or 3) of which some token is routed to one expert and not to another that is used. The
    barriers of all others are 0, as a token's gates are alike here."""
    routed = (layer.gates > 0)[:, simplices]  # (T, M, 2 or 3)
    missing = routed.any(0) & ~routed
    return simplices[(routed.any(2) & missing.any(2)).any(0)]


def compare_samples(layer: MoELayer, shape: Shape, exact_seconds: dict[str, float]) -> None:
    """Print a line for each size of the sample of the vocabulary, on pairs and on triangles."""
    print("| outcomes sampled | merges | operations | s | floor, s | share of the product's rate | faster | mean error "
          "| largest error | rank correlation of barriers | of abs(b_harm) |\n" + "|---" * 11 + "|")
    for name, simplices in {"pairs": hodgecover.edges(shape.n), "triangles": random_triangles(shape.n)}.items():
        exact = estimate.sweep(layer, simplices)
        for outcomes in (size for size in OUTCOMES if size < shape.vocab):
            _, count, spent, floor = timed_floor(layer, shape._replace(outcomes=outcomes), simplices)
            sampled = estimate.sweep(layer, simplices, outcomes)
            error = (sampled / exact - 1)[exact > 0]
            ranks, of_harmonic = mathx.spearman(sampled, exact), "-"
            if name == "pairs":
                of_harmonic = f"{mathx.spearman(harmonic(sampled, shape.n), harmonic(exact, shape.n)):.5f}"
            print(f"| {outcomes} | {name} | {count:.2e} | {spent:.1f} | {floor:.1f} | {floor / spent:.0%} | "
                  f"{exact_seconds[name] / spent:.1f} x | {error.mean():+.2%} | {error.abs().max():.1%} | "
                  f"{ranks:.5f} | {of_harmonic} |", flush=True)


def scaling(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print touched rows and seconds of the pair sweep and of 500 triangles at fixed k, and the exponents in the number
    of experts n, of tokens T and of the vocabulary V."""
    print("| varied | n | T | V | pairs: touched | s | 500 triangles: touched | s |\n|---|---|---|---|---|---|---|---|")
    exponents = []
    for varied, sizes in SCALED_SIZES.items():
        found = {"pairs": ([], []), "500 triangles": ([], [])}
        for size in sizes:
            n, tokens, vocab = (dict(n=64, T=args.tokens, V=16384) | {varied: size}).values()
            layer = random_layer(Shape(n, args.top_k, *SCALED.values(), vocab, vocab), tokens, args.peak, dtype)
            for (rows, times), simplices in zip(found.values(), (hodgecover.edges(n), random_triangles(n))):
                rows.append(touched_pairs(layer, simplices))
                times.append(median(seconds(estimate.sweep, layer, simplices) for _ in range(3)))
            print(f"| {varied} | {n} | {tokens} | {vocab} | "
                  + " | ".join(f"{rows[-1]} | {times[-1]:.2f}" for rows, times in found.values()) + " |", flush=True)
        exponents += [f"{name}: exponent in {varied} of the touched pairs {slope(sizes, rows):.2f}, of the time "
                      f"{slope(sizes, times):.2f}" for name, (rows, times) in found.items()]
    print("\n".join(exponents))


def time_refit(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the time of the refit of one layer, and the rates of its operations and of a bare float64 product."""
    keep = args.experts // 2
    shape = Shape(keep, args.top_k, args.hidden, args.width, vocab=1, outcomes=1)  # its readout plays no part
    layer = random_layer(shape, args.refit, args.peak, dtype)
    step = LayerPass(0, "", Layer(layer.experts, None, {}), layer.y[None], layer.x, layer.gates, layer.y,
                     torch.nn.Identity())
    residual = layer.y.float()
    before = residual.norm()
    spent = seconds(refit.refit_layer, step, residual)
    count = refit.refit_operations(args.refit, keep, args.top_k, args.hidden, args.width)

    factor = torch.randn(args.width, 4096, dtype=torch.float64)
    product = 2 * 4096 * args.width**2 / min(seconds(torch.mm, factor, factor.T) for _ in range(3))
    print(f"{keep} experts of {args.experts}, {args.refit:,} tokens, {dtype}, {torch.get_num_threads()} threads: "
          f"{count:.2e} operations in {spent:.1f} s, {count / spent:.1e} a second; a float64 product does "
          f"{product:.1e}; residual {residual.norm() / before:.4f} of what it was")


def random_decoder_layer(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Config, Layer]:
    """A decoder layer of OLMoE's kind with its attention, heads of width 128, and its configuration."""
    cfg = read_config(dict(model_type="olmoe", vocab_size=1, hidden_size=args.hidden, num_hidden_layers=1,
                           num_attention_heads=max(1, args.hidden // 128), num_experts=args.experts,
                           intermediate_size=args.width, num_experts_per_tok=args.top_k))
    generator = torch.Generator().manual_seed(0)

    def normal(shape: list[int]) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1]**-0.5).to(dtype)
    n, d, f = args.experts, args.hidden, args.width
    experts = Experts(normal([n, f, d]), normal([n, f, d]), normal([n, d, f]))
    shapes = layer_shapes(cfg, fused=True)
    weights = {name: normal(shape) for name, shape in shapes.items() if ".experts." not in name}
    return cfg, Layer(experts, weights.pop("mlp.gate.weight"), weights)


def time_gradients(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the times of a layer's forward pass, of heapr.py's pass back, and of a step of distil.py --layerwise, Adam
    included, and the process's largest memory after each."""
    cfg, layer = random_decoder_layer(args, dtype)
    length = min(SEQ_LEN, args.gradients)
    h, target = torch.randn(2, args.gradients // length, length, args.hidden).to(dtype)
    weights = distil.layer_weights(layer)
    dtypes = dict.fromkeys(weights, dtype)

    def forward() -> None:
        with torch.no_grad():
            for part in h.split(max(1, PASS_TOKENS // length)):
                run_layer(part, layer, cfg)

    def step() -> None:
        own = {name: weight.to(torch.float32, copy=True).requires_grad_() for name, weight in weights.items()}
        at_once = max(1, hodgecover.MEMORY // distil.graph_bytes(cfg, 1, length))

        def loss_of(which: torch.Tensor) -> torch.Tensor:
            y = run_layer(h[which], distil.as_layer(own, dtypes), cfg)[2]
            return distil.stream_error(y, target[which].flatten(0, 1))
        plan = distil.Plan(1, distil.LR, 1.0, [*distil.PARTS], 0, hodgecover.MEMORY)
        distil.train(own, loss_of, len(h), length, at_once, plan, "", lambda *_: None)
    print(f"n = {args.experts}, k = {args.top_k}, d = {args.hidden}, f = {args.width}, {h[..., 0].numel():,} tokens, "
          f"{dtype}, {torch.get_num_threads()} threads\n\n| | s | of the forward pass | peak so far, GB |\n"
          "|---|---|---|---|")
    back = partial(heapr.back_through, layer, cfg, h, target.clone())
    works = {"forward pass": forward, "pass back of heapr.py": back,
             f"steps of distil.py: {-(-len(h) // distil.BATCH)}": step}
    forward()  # the first call pays for what the others find ready
    bare = None
    for name, work in works.items():
        spent = seconds(work)
        bare = bare or spent
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {name} | {spent:.1f} | {spent / bare:.1f} x | {memory:.1f} |", flush=True)


def own_work(method: str, measured: NamedTuple, keep: int, layer: Layer) -> None:
    """What a method does with what was measured: a plan, or groups and their merged experts."""
    if method in baselines.MERGING:
        settings = [hodgecover.Settings()] if method in baselines.MERGING_ON_BARRIERS else []
        groups, weights = baselines.MERGING[method](measured, keep, *settings)
        baselines.merged_layer(layer, baselines.Merge(groups, weights, measured.frequency))
    elif method in baselines.SELECTORS:
        baselines.choose(measured, layer.router, method, keep)
    else:
        hodgecover.plan_from_signals(measured, keep)


def time_selectors(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print a line for each measurement of a layer, and one for each method: the parts of its time, and the sum."""
    n, k, d, f, vocab, _ = shape = Shape(args.experts, args.top_k, args.hidden, args.width, args.vocab, args.vocab)
    layer, keep = random_layer(shape, args.tokens, args.peak, dtype), n // 2
    router = (torch.randn(n, d, generator=torch.Generator().manual_seed(1)) * d**-0.5).to(dtype)
    step = LayerPass(0, "layer", Layer(layer.experts, router, {}), layer.y[None], *layer[1:5])
    forward = partial(mix_experts, layer.experts, layer.x, layer.gates)
    forward()  # the first call pays for what the others find ready
    works = {"forward pass": forward, "routing": partial(baselines.measure_routing, step, "reap"),
             "norms": partial(baselines.measure_routing, step, "hope"),
             "weights": partial(baselines.measure_routing, step, "aimer"),
             "facts": partial(baselines.layer_facts, step), "barriers": partial(hodgecover.measure_layer, layer)}
    print(f"n = {n}, K = {keep}, k = {k}, d = {d}, f = {f}, V = {vocab}, T = {args.tokens}, {dtype}, "
          f"{torch.get_num_threads()} threads\n\n| | s | of the forward pass |\n|---|---|---|")
    took, measured = {}, {}
    for name, work in works.items():
        took[name], measured[name] = processor_seconds(work)
        print(f"| {name} | {took[name]:.3f} | {took[name] / took['forward pass']:.2f} x |", flush=True)
    print("\n| | measurement | its s | own s | sum, s | of the forward pass |\n|---|---|---|---|---|---|")
    for method, name in MEASURED_BY.items():
        own = min(processor_seconds(own_work, method, measured[name], keep, step.layer)[0] for _ in range(3))
        if method in baselines.SEQUENTIAL:
            own += took["forward pass"]
        both = took[name] + own
        share = both / took["forward pass"]
        print(f"| {method} | {name} | {took[name]:.3f} | {own:.3f} | {both:.3f} | {share:.2f} x |", flush=True)


# ------------------------------------------------------------------------------------------------- the command line

def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.parser_of(__file__, __doc__)
    meaning = dict(experts="n, experts of the layer", top_k="k, experts a token takes", hidden="d, the hidden size",
                   width="f, the width of an expert", vocab="V, the vocabulary",
                   sample="simplices of a kind that the plain way is timed on")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", default=value,
                            help=f"{meaning[name]} [%(default)s]")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"T, tokens [{TOKENS}, selectors: {model_io.TOKENS}]")
    parser.add_argument("--peak", type=float, default=4.0, metavar="STD", help="standard deviation of the logits [4, "
                        "about a trained model's entropy]")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                        help="of the products; auto: bfloat16 if the processor multiplies it, else float32")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--scaling", action="store_const", const=True, help="the exponents in n, T and V instead")
    mode.add_argument("--refit", type=int, metavar="TOKENS", help="the refit of one layer instead")
    mode.add_argument("--gradients", type=int, metavar="TOKENS", help="gradients of one layer instead")
    mode.add_argument("--selectors", action="store_const", const=True, help="the methods on one layer instead")
    return parser


MODES = {"scaling": scaling, "refit": time_refit, "gradients": time_gradients, "selectors": time_selectors,
         "compare": compare}


def mode_of(args: argparse.Namespace) -> str:
    """Return which of MODES the options ask for."""
    return next((name for name in MODES if getattr(args, name, None) is not None), "compare")


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for sizes that make no layer, and for options that the mode does not use."""
    mode = mode_of(args)
    for name in SIZES:
        hodgecover.check_range(name, getattr(args, name), 3 if name == "experts" else 1, 10**9)
    for name in ("tokens", "refit", "gradients"):
        if (given := getattr(args, name)) is not None:
            hodgecover.check_range(name, given, 1, 10**9)
    hodgecover.check_range("peak", args.peak, 0)
    half = args.experts // 2
    experts = {"scaling": min(SCALED_SIZES["n"]), "refit": half, "selectors": half}.get(mode, args.experts)
    if args.top_k > experts:
        raise InputError(f"top_k {args.top_k}: must be at most {experts}, the experts of the layer")
    common.refuse_given(command_line(), args, UNUSED.get(mode, ()), f"--{mode}")


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    args.tokens = args.tokens or (model_io.TOKENS if args.selectors else TOKENS)
    MODES[mode_of(args)](args, model_io.choose_dtype(args.dtype, "cpu"))


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
