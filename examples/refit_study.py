# SPDX-License-Identifier: MIT
"""Show what refit.py brings on the tiny checkpoint, over several calibration samples.

    python examples/refit_study.py                          every method refitted, alone and with Wanda
    python examples/refit_study.py --curves --samples 3     HodgeCover's survivors: tokens, ridge, sweeps, text, fits
    python examples/refit_study.py --where                  what foretells how far a survivor is changed
    python examples/refit_study.py --samples 2 --tokens 1024    a first look

Tables are those of reproduce.py: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that choose the survivors and of the
16,384 that they are refitted on.

The other fits change the survivors otherwise, by the same regression on the same residual:

    factors            one for each expert's output, with which the refit begins
    r directions       the factors, and a change that reads only the r directions of largest energy of an expert's
                       hidden activations
    unscaled           the down projections without the factors
    router rows        one Gauss-Newton step on the router's logits of the tokens as they are routed
"""
import argparse
import functools
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

import common
import hodgecover
import mathx
import model_io
import refit
import reproduce
from model_io import InputError, LayerPass, Model
from reproduce import Make, Sample, Table

TOKENS = refit.TOKENS  # to refit on, unless a line says otherwise
KEPT = {name: reproduce.DROPPED[name] for name in ("50%", "66%")}  # columns of the curves
Change = Callable[[Model, Model, torch.Tensor], None]  # (source, output, ids): changes the output's files


# ----------------------------------------------------------------------------------------------------- the other fits


def fit_unscaled(step: LayerPass, residual: torch.Tensor) -> torch.Tensor:
    """`refit.refit_layer` about the down projections (n, d, f) as they are, without factors."""
    down = step.layer.experts.down
    return refit.block_ridge(partial(refit.gated_hidden, step), down, residual).to(down)


def fit_directions(step: LayerPass, residual: torch.Tensor, count: int) -> torch.Tensor:
    """The down projections (n, d, f), scaled, and changed on the `count` directions of largest energy of their
    inputs."""
    down = step.layer.experts.down
    factor = refit.fit_scale(step, residual).to(residual)[:, None, None]
    refit.add_outputs(residual, step, down.to(residual) * (1 - factor))
    grams = [sum(x.T @ x for _, x in refit.gated_hidden(step, e)) for e in range(len(down))]
    basis = torch.linalg.eigh(torch.stack(grams)).eigenvectors[:, :, -count:]  # (n, f, count)

    def projected(e: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(t, x @ basis[e]) for t, x in refit.gated_hidden(step, e)]
    change = refit.block_ridge(projected, residual.new_zeros(*down.shape[:2], count), residual)
    return (down.to(residual) * factor + change @ basis.transpose(1, 2)).to(down)


def fit_nothing(step: LayerPass, residual: torch.Tensor) -> torch.Tensor:
    """The down projections (n, d, f) as they are."""
    return step.layer.experts.down


def fit_routers(source: Model, output: Model, ids: torch.Tensor) -> None:
    """Change the router rows of a checkpoint in its files, layer by layer, by one Gauss-Newton step in which the choice
    of experts stands still.

    At a token routed to e, d output / d logit_e = g_e (E_e(x) - sum_i g_i E_i(x)). Raises InputError for gates that are
    normalised over the top-k, which have another slope.
    """
    if output.config.norm_topk_prob:
        raise InputError(f"{output.checkpoint.path}: normalises its gates over the top-k; the fit of router rows needs "
                         "gates that are not")
    for of_source, step in zip(source.stream(ids), output.stream(ids)):
        if step.gates is None:
            continue
        experts = step.layer.experts
        mix = model_io.mix_experts(experts, step.x, step.gates)
        router = fitted_router(step, mix, (of_source.y - step.y).double())
        output.checkpoint.overwrite(f"{step.name}.mlp.gate.weight", router)
        step.layer.router.copy_(router)
        step.y.add_(model_io.mix_experts(experts, step.x, model_io.route(step.x, step.layer, output.config)) - mix)


def fitted_router(step: LayerPass, mix: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The router (n, d) after the step; mix (T, d) is what the experts give together. The residual (T, d) is changed in
    place."""
    router = step.layer.router.clone()
    for _ in range(refit.SWEEPS):
        for e in range(len(router)):
            t, hidden = (torch.cat(pieces) for pieces in zip(*refit.gated_hidden(step, e)))
            x, g = step.x[t].double(), step.gates[t, e, None]
            slope = (hidden @ step.layer.experts.down[e].to(hidden).T - g * mix[t]).double()
            gram = (x * slope.square().sum(1, keepdim=True)).T @ x
            weight = refit.RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
            moved = (router[e] - step.layer.router[e]).double()
            wanted = x.T @ (slope * residual[t]).sum(1) - weight @ moved
            change = refit.solve_spd(gram + weight, wanted[:, None]).squeeze(1)
            router[e] += change.to(router)
            residual[t] -= slope * (x @ change)[:, None]
    return router


# ----------------------------------------------------------------------------------------------------------- the text


def source_code() -> list[str]:
    """The standard library's own code, without the modules in folders."""
    return [common.code_alone(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def licences() -> list[str]:
    """The licence texts of the packages that lie beside Python's own."""
    folders = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share/common-licenses")
    files = {path.resolve() for folder in folders for path in Path(folder).rglob("*")
             if path.name.upper().startswith(("LICEN", "GPL", "LGPL", "GFDL", "MPL", "APACHE", "ARTISTIC", "COPYING"))}
    texts = {path.read_text("utf-8", errors="ignore") for path in files if path.is_file() and path.suffix != ".py"}
    return sorted(texts)


PARTS = {"calibration text": ["calibration"], "with training text": ["train", "calibration"]}  # of a sample's documents
OTHER = {"source code": source_code, "licences": licences}


@functools.cache
def other(source: Model, text: str) -> torch.Tensor:
    """The ids (T,) of one of OTHER."""
    return source.encode(OTHER[text]())


def training_ids(sample: Sample, text: str, tokens: int) -> torch.Tensor:
    """So many tokens of one of PARTS or of OTHER, (B, L), or all there are."""
    source = sample.source
    ids = other(source, text) if text in OTHER else reproduce.encoded(source, sample.documents, *PARTS[text])
    return model_io.sequences(ids, reproduce.SEQ_LEN, tokens // reproduce.SEQ_LEN, sample.seed)


# --------------------------------------------------------------------------------------------------------- the tables


def refitted(sample: Sample, value: object, out: Path, make: Make, text: str = "calibration text",
             tokens: int = TOKENS, first: Change | None = None, fit: refit.Fit = refit.refit_layer) -> Model:
    """Make a checkpoint, and refit it on so many tokens of a text; `first`: a change before that."""
    output = make(sample, value, out)
    ids = training_ids(sample, text, tokens)
    if first:
        first(sample.source, output, ids)
    for _ in refit.refit(sample.source, output, ids, fit):
        pass
    return output


def method_tables() -> list[Table]:
    """Methods and hybrids, refitted."""
    lines = reproduce.method_lines()
    hybrids = reproduce.hybrid_lines(("hodgecover", "reap", "random"), lines)

    def each(makes: dict[str, Make]) -> dict[str, Make]:
        return {label: partial(refitted, make=make) for label, make in makes.items()}
    return [Table(f"experts dropped, refitted on {TOKENS:,} tokens", reproduce.DROPPED, each(lines)),
            Table(f"parameters of the experts gone, refitted on {TOKENS:,} tokens", reproduce.HYBRIDS, each(hybrids),
                  rates=True)]


def curve_tables() -> list[Table]:
    """Tokens, ridge, sweeps, other text and other fits, of HodgeCover's survivors."""
    def way(text: str = "calibration text", tokens: int = TOKENS, **options: object) -> Make:
        return partial(refitted, make=reproduce.hodgecover_way, text=text, tokens=tokens, **options)

    def layer(**options: object) -> refit.Fit:
        return partial(refit.refit_layer, **options)
    by_tokens = {"not refitted": reproduce.hodgecover_way}
    by_tokens |= {f"{tokens:,} tokens": way(tokens=tokens) for tokens in (2048, 4096, 8192, 16384, 32768, 65536)}
    by_tokens |= {f"{tokens:,} tokens, with training text": way("with training text", tokens)
                  for tokens in (65536, 131072)}
    by_ridge = {f"ridge {ridge}, {tokens:,} tokens": way(tokens=tokens, fit=layer(ridge=ridge))
                for tokens in (2048, 16384, 65536) for ridge in (0.03, 0.3, 3.0)}
    by_sweeps = {f"{sweeps} sweeps": way(fit=layer(sweeps=sweeps)) for sweeps in (1, 2, 3, 10)}
    by_text = {text: way(text) for text in ("calibration text", *OTHER)}
    by_fit = {"factors and down projections (refit.py)": way(), "factors": way(fit=layer(sweeps=0))}
    by_fit |= {f"factors and {count} directions": way(fit=partial(fit_directions, count=count)) for count in (2, 4, 8)}
    by_fit |= {"down projections, unscaled": way(fit=fit_unscaled),
               "router rows": way(first=fit_routers, fit=fit_nothing),
               "router rows, then factors and down projections": way(first=fit_routers)}
    titled = {"tokens": by_tokens, "ridge, tokens": by_ridge, "sweeps": by_sweeps, "text": by_text, "fit": by_fit}
    return [Table(title, KEPT, lines) for title, lines in titled.items()]


# ------------------------------------------------------------------------------------------------------ where to look


def foretold(found: hodgecover.Decomposition, plan: hodgecover.LayerPlan) -> dict[str, torch.Tensor]:
    """What might foretell how far each survivor of a layer is changed: (K,) numbers by name."""
    kept, dropped, n = plan.survivors, list(plan.redirect), len(found.expert_of)
    frequency = torch.tensor(plan.frequency, dtype=torch.float64)
    i, j = found.expert_of[mathx.edges(n)].unbind(1)

    def to_dropped(edges: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(n, n, dtype=torch.float64)
        table[i, j] = table[j, i] = edges
        return table[kept][:, dropped].sum(1)
    targets = torch.tensor(list(plan.redirect.values()), dtype=torch.int64)
    redirected = torch.zeros(n, dtype=torch.float64).index_add(0, targets, frequency[dropped])
    return {"tokens of the experts redirected to it": redirected[kept],
            "its own tokens": frequency[kept],
            "its saliency": torch.tensor(plan.saliency, dtype=torch.float64)[kept],
            "its barriers to dropped experts": to_dropped(found.signals.barriers),
            "abs(b_harm) to dropped experts": to_dropped(found.parts.harmonic.abs())}


def down_projections(model: Model, name: str) -> torch.Tensor:
    """Those of a layer, one vector an expert, (n, d f)."""
    return model.layer(model.layer_names.index(name)).experts.down.float().flatten(1)


def correlations(sample: Sample, dropped: float) -> list[dict[str, float]]:
    """For each layer, Spearman's correlation of |D - D0| / |D0| over its survivors with what might foretell it, D being
    a survivor's down projection and D0 the source's."""
    plans = reproduce.hodgecover_plans(sample, dropped, sample.settings())
    layers = reproduce.decompositions(sample, sample.settings())
    with tempfile.TemporaryDirectory() as folder:
        output = refitted(sample, dropped, Path(folder) / "out", reproduce.hodgecover_way)
        found = []
        for name, plan in plans.items():
            before = down_projections(sample.source, name)[plan.survivors]
            moved = (down_projections(output, name) - before).norm(dim=1) / before.norm(dim=1)
            found.append({sign: mathx.spearman(values, moved)
                          for sign, values in foretold(layers[name], plan).items()})
        return found


def show_correlations(samples: list[Sample], dropped: float = 0.5) -> None:
    """Print the rank correlations: mean and standard deviation over layers and samples."""
    bar, found = hodgecover.progress_bar(), []
    for number, sample in enumerate(samples):
        bar(number / len(samples))
        found += correlations(sample, dropped)
    bar(None)
    reproduce.print_head("with", [f"rank correlation of the change of a survivor, {dropped:.0%} dropped"])
    for sign in found[0]:
        values = [layer[sign] for layer in found]
        reproduce.print_line(sign, [f"{mean(values):+.2f} ± {stdev(values):.2f}"])


# --------------------------------------------------------------------------------------------------- the command line


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = reproduce.command_line(__file__, __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--curves", action="store_true", help="what the refit depends on instead")
    which.add_argument("--where", action="store_true", help="what foretells the change of a survivor instead")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    if args.where:
        common.refuse_given(command_line(), args, ("only", "columns", "tokens"), "--where")
    tables = reproduce.picked(curve_tables() if args.curves else method_tables(), args.only, args.columns)
    samples = reproduce.read_samples(args)
    if args.where:
        return show_correlations(samples)
    reproduce.show_held_out(tables, samples, args.tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return hodgecover.run_command(command_line(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
