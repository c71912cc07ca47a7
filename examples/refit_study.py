# SPDX-License-Identifier: MIT
"""What `--refit` brings on examples/tiny-olmoe, over several calibration samples.

    python examples/refit_study.py             every method and baseline refitted, alone and with Wanda
    python examples/refit_study.py --curves    HodgeCover's survivors: tokens, ridge, sweeps, other text, other fits
    python examples/refit_study.py --where     whether redirect, harmonic part or saliency foretell what it changes
    python examples/refit_study.py --samples 2 --tokens 1024    a first look

Tables as `reproduce.py` prints them: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that choose the survivors and of the
text that they are refitted on.

The other fits change the survivors otherwise, by the same regression on the same residual:
    factors            one for each expert's output, which the refit begins with
    r directions       the factors, and a change that reads only the r directions of largest energy of an expert's
                       hidden activations
    unscaled           the down projections without the factors
    router rows        one Gauss-Newton step on the router's logits of the tokens as they are routed
"""
import ast
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import mathx  # noqa: E402
import merging_baselines as baselines  # noqa: E402
import model_io  # noqa: E402
import reproduce  # noqa: E402
from hodgecover import (METHODS, RIDGE, SWEEPS, Settings, Signals, add_outputs, calibration_ids,  # noqa: E402
                        curate_triangles, expert_order, fit_scale, gated_hidden, in_order, measure_model,
                        plan_from_signals, refit, refit_layer, sparse_layers)

TOKENS = 16384  # to refit on, but where a line says otherwise
KEPT = {32: "50%", 22: "66%"}  # of the curves
Finish = Callable[[model_io.Model], object]


def finisher(source: model_io.Model, ids: torch.Tensor, *first: Callable, **options) -> Finish:
    """A refit of a written checkpoint on ids, after what comes first."""
    def finish(output: model_io.Model) -> None:
        for change in first:
            change(source, output, ids)
        for _ in refit(source, output, ids, **options):
            pass
    return finish


def fit_unscaled(step: model_io.LayerPass, residual: torch.Tensor) -> torch.Tensor:
    """`refit_layer` about the down projections (n, d, f) as they are, without a factor for each expert."""
    down = step.layer.experts.down
    return mathx.block_ridge(partial(gated_hidden, step), down, residual, RIDGE, SWEEPS).to(down)


def fit_directions(step: model_io.LayerPass, residual: torch.Tensor, count: int) -> torch.Tensor:
    """The down projections (n, d, f), scaled, and changed on the `count` directions of largest energy of what each
    reads."""
    down, factor = step.layer.experts.down, fit_scale(step, residual).to(residual)[:, None, None]
    add_outputs(residual, step, down.to(residual) * (1 - factor))
    grams = [sum(x.T @ x for _, x in gated_hidden(step, e)) for e in range(len(down))]
    basis = torch.linalg.eigh(torch.stack(grams)).eigenvectors[:, :, -count:]  # (n, f, count)
    change = mathx.block_ridge(lambda e: [(t, x @ basis[e]) for t, x in gated_hidden(step, e)],
                               residual.new_zeros(*down.shape[:2], count), residual, RIDGE, SWEEPS)
    return (down.to(residual) * factor + change @ basis.transpose(1, 2)).to(down)


def fit_routers(source: model_io.Model, output: model_io.Model, ids: torch.Tensor) -> None:
    """Changes the router rows of a written checkpoint, layer by layer, by one Gauss-Newton step in which the choice of
    experts stands still: at a token routed to e, d output / d logit_e = g_e (E_e(x) - sum_i g_i E_i(x)), for gates
    that are not normalised over the top-k."""
    assert not output.config.norm_topk_prob
    for of_source, step in zip(source.stream(ids), output.stream(ids)):
        experts, router = step.layer.experts, step.layer.router.clone()
        residual = (of_source.y - step.y).double()
        mix = model_io.mix_experts(experts, step.x, step.gates)
        for _ in range(SWEEPS):
            for e in range(len(router)):
                t, hidden = (torch.cat(of) for of in zip(*gated_hidden(step, e)))
                x, g = step.x[t].double(), step.gates[t, e, None]
                slope = (hidden @ experts.down[e].to(hidden).T - g * mix[t]).double()
                gram = (x * slope.square().sum(1, keepdim=True)).T @ x
                weight = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
                moved = (router[e] - step.layer.router[e]).double()
                wanted = x.T @ (slope * residual[t]).sum(1) - weight @ moved
                change = mathx.solve_spd(gram + weight, wanted[:, None]).squeeze(1)
                router[e] += change.to(router)
                residual[t] -= slope * (x @ change)[:, None]
        output.checkpoint.overwrite(f"{step.name}.mlp.gate.weight", router)
        step.layer.router.copy_(router)
        step.y.add_(model_io.mix_experts(experts, step.x, model_io.route(step.x, step.layer, output.config)) - mix)


def source_code() -> list[str]:
    """The standard library's own code without the docstrings, comments and strings of its documentation."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                documented = ast.get_docstring(node) is not None
                node.body = node.body[documented:] or [ast.Pass()]
        found.append(ast.unparse(tree))
    return found


def licences() -> list[str]:
    """The licence texts of the packages that lie beside Python's own."""
    folders = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share/common-licenses")
    files = {path.resolve() for folder in folders for path in Path(folder).rglob("*")
             if path.name.upper().startswith(("LICEN", "GPL", "LGPL", "GFDL", "MPL", "APACHE", "ARTISTIC", "COPYING"))}
    texts = {path.read_text("utf-8", errors="ignore") for path in files if path.is_file() and path.suffix != ".py"}
    return sorted(texts)


def compare_methods(source: model_io.Model, samples: list[torch.Tensor], text: torch.Tensor) -> None:
    """The tables of methods and hybrids, refitted."""
    output = reproduce.compressors(source, samples)
    ids = [calibration_ids(source, [], TOKENS, 512, seed) for seed in range(len(samples))]
    columns, found = list(reproduce.KEPT.values()), {}
    reproduce.head(f"experts dropped, refitted on {TOKENS:,} tokens", columns)
    for label in ("hodgecover", *(name for name in METHODS if name != "hodgecover"), *baselines.METHODS):
        found[label] = {keep: [reproduce.score(source, text, output(label, seed, keep), finisher(source, ids[seed]))
                               for seed in range(len(samples))] for keep in reproduce.KEPT}
        reproduce.row(label, found[label])
    reproduce.differences(found, columns)
    columns, found = [f"{rate:.0%}" for rate in reproduce.HYBRIDS], {}
    reproduce.head(f"parameters of the experts gone with Wanda, refitted on {TOKENS:,} tokens", columns)
    for label in ("hodgecover", "reap", "random", "Wanda alone"):
        found[label] = {}
        for rate, keep in reproduce.HYBRIDS.items():
            keep = source.config.num_experts if label == "Wanda alone" else keep
            name = "reap" if label == "Wanda alone" else label
            found[label][rate] = [
                reproduce.score(source, text, reproduce.pruned(source, output(name, seed, keep), rate, keep),
                                finisher(source, ids[seed], fit=partial(refit_layer, fixed_zeros=True)))
                for seed in range(len(samples))]
        reproduce.row(label, found[label])
    reproduce.differences(found, columns)


def draw_curves(source: model_io.Model, samples: list[torch.Tensor], text: torch.Tensor) -> None:
    """The table of tokens, ridge, sweeps, other text and other fits, of HodgeCover's survivors."""
    output = reproduce.compressors(source, samples)
    texts = {"documentation": model_io.python_documentation("calibration"), "source code": source_code(),
             "licences": licences()}
    texts["with training text"] = model_io.python_documentation("train") + texts["documentation"]
    encoded = {name: source.encode(documents) for name, documents in texts.items()}

    def table(title: str, lines: dict[str, Callable[[int], Finish]]) -> None:
        reproduce.head(title, list(KEPT.values()))
        for label, finish in lines.items():
            reproduce.row(label, {keep: [reproduce.score(source, text, output("hodgecover", seed, keep), finish(seed))
                                         for seed in range(len(samples))] for keep in KEPT})

    def on(text: str, tokens: int, *first: Callable, **options) -> Callable[[int], Finish]:
        return lambda seed: finisher(source, model_io.sequences(encoded[text], 512, tokens // 512, seed), *first,
                                     **options)
    here = partial(on, "documentation", TOKENS)
    table("tokens", {"not refitted": lambda seed: lambda model: None} | {
        f"{tokens:,}": on("documentation", tokens) for tokens in (2048, 4096, 8192, 16384, 32768, 65536)} | {
        f"{tokens:,}, with training text": on("with training text", tokens) for tokens in (65536, 131072)})
    table("ridge, tokens", {f"{ridge}, {tokens:,}": on("documentation", tokens, fit=partial(refit_layer, ridge=ridge))
                            for tokens in (2048, 16384, 65536) for ridge in (0.03, 0.3, 3.0)})
    table("sweeps", {str(sweeps): here(fit=partial(refit_layer, sweeps=sweeps)) for sweeps in (1, 2, 3, 10)})
    table("text", {text: on(text, TOKENS) for text in ("documentation", "source code", "licences")})
    table("fit", {
        "factors and down projections (--refit)": here(), "factors": here(fit=partial(refit_layer, sweeps=0))} | {
        f"factors and {count} directions of 16": here(fit=partial(fit_directions, count=count)) for count in (2, 4, 8)
    } | {"down projections, unscaled": here(fit=fit_unscaled),
         "router rows": here(fit_routers, fit=lambda step, residual: step.layer.experts.down),
         "router rows, then factors and down projections": here(fit_routers)})


def foretold(signals: Signals, keep: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """A layer's survivors, and what might foretell how far each is moved: (K,) numbers by name."""
    plan, rank = plan_from_signals(signals, keep), expert_order(signals, "saliency")
    ranked, n = in_order(signals, rank), len(rank)
    triangles = ranked.candidates[curate_triangles(ranked, Settings())[0]]
    harmonic = mathx.hodge_decompose(ranked.barriers, *mathx.boundary_matrices(n, triangles)).harmonic
    i, j = rank[mathx.edges(n)].unbind(1)
    kept, dropped = plan["survivors"], sorted(map(int, plan["redirect"]))

    def to_dropped(edges: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(n, n, dtype=torch.float64)
        whole[i, j] = whole[j, i] = edges
        return whole[kept][:, dropped].sum(1)
    redirected = torch.zeros(n, dtype=torch.float64)
    for source, target in plan["redirect"].items():
        redirected[target] += signals.frequency[int(source)]
    return kept, {
        "tokens of the experts redirected to it": redirected[kept], "its own tokens": signals.frequency[kept],
        "its saliency": signals.saliency[kept], "barriers to dropped experts": to_dropped(ranked.barriers),
        "abs(b_harm) to dropped experts": to_dropped(harmonic.abs())}


def look(source: model_io.Model, samples: list[torch.Tensor], keep: int = 32) -> None:
    """Prints rank correlations over the survivors of a layer, mean +- standard deviation over layers and samples."""
    found = {}
    for seed, ids in enumerate(samples):
        layers = {source.layer_names[index]: foretold(signals, keep) for index, signals in
                  measure_model(source, ids, Settings(seed=seed), sparse_layers(source))}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            model_io.write_checkpoint(source.checkpoint, out, {name: kept for name, (kept, _) in layers.items()}, {})
            output = model_io.Model(out)
            before = [output.layer(index).experts.down.float() for index in range(len(layers))]
            finisher(source, calibration_ids(source, [], TOKENS, 512, seed))(output)
            for index, (start, (_, signs)) in enumerate(zip(before, layers.values())):
                moved = (output.layer(index).experts.down - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
                for name, values in signs.items():
                    found.setdefault(name, []).append(mathx.spearman(values, moved))
    print(f"| {keep} survivors | rank correlation with the change of their down projections |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {mean(values):+.2f} ± {stdev(values):.2f} |")


def main() -> None:
    args = reproduce.parse(__doc__, curves="what the refit depends on, rather than methods",
                           where="what foretells the change of a survivor instead")
    source = model_io.Model(HERE / "tiny-olmoe")
    samples = [calibration_ids(source, [], 2048, 512, seed) for seed in range(args.samples)]
    if args.where:
        return look(source, samples)
    (draw_curves if args.curves else compare_methods)(source, samples, reproduce.held_out(source, args.tokens))


if __name__ == "__main__":
    main()
