# SPDX-License-Identifier: MIT
"""How the studies make checkpoints. A way is a function (sample, value of the column, folder) that writes a checkpoint
there, as the commands do, and returns its model. For most the value is the share of the expert parameters that go.

A sample is a seed: of the 2,048 calibration tokens that choose what stays, of the 16,384 of a refit or of rco's search,
of the 131,072 of a training. Barriers are exact, and all products in float32.
"""
import argparse
import functools
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import audit  # noqa: E402
import baselines  # noqa: E402
import budgets  # noqa: E402
import distil  # noqa: E402
import dot_moe  # noqa: E402
import heapr  # noqa: E402
import hodgecover  # noqa: E402
import model_io  # noqa: E402
import nested  # noqa: E402
import rco  # noqa: E402
import refit  # noqa: E402
import wanda  # noqa: E402
from hodgecover import Plan, Settings, Signals  # noqa: E402
from model_io import InputError, Layer, LayerPass, Model  # noqa: E402

CALIBRATION, SEQ_LEN = 2048, 512  # tokens of a sample, and of a sequence
MORE = refit.TOKENS  # of a refit, of rco's search, and of a choice "on 16,384 tokens"
TRAINED, NESTED_TRAINED = 131_072, 65_536  # of a training; of one for several sizes
SEARCH_LENGTH = 128  # tokens of a sequence that rco or dot_moe.py sees
GENERATIONS, STEPS = 6, 200  # of evo and of rco
FIRST_RATE = 0.20  # r1: what a hybrid drops as experts (B.4)
RATES = {"25%": 0.25, "50%": 0.5, "66%": 0.66}
SPLIT = 16  # experts that a dense layer is split into


# ------------------------------------------------------------------------------------------------------------- samples

Documents = Callable[[str], Sequence[str]]  # of a part, as in common.TEXTS


def source_code(part: str) -> list[str]:
    """The standard library's own code, without the modules in folders."""
    return [common.code_alone(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


@functools.cache
def encoded(source: Model, documents: Documents, *parts: str) -> torch.Tensor:
    """The ids (T,) of these parts of a text, one after the other."""
    return source.encode([text for part in parts for text in documents(part)])


@dataclass(frozen=True, eq=False)
class Sample:
    """A calibration sample of a source, and what is measured on it once."""

    source: Model
    cache: Path  # of barriers and searches
    documents: Documents
    settings: Settings
    tokens: int = 0  # CALIBRATION, if it is 0

    def text(self, tokens: int, *parts: str, length: int = 0) -> torch.Tensor:
        """So many tokens of these parts of its text in sequences (B, length), or all there are."""
        ids, length = encoded(self.source, self.documents, *parts), length or SEQ_LEN
        return model_io.sequences(ids, length, tokens // length, self.settings.seed)

    @cached_property
    def ids(self) -> torch.Tensor:
        """Its tokens, (B, L)."""
        return self.text(self.tokens or CALIBRATION, "calibration")

    @functools.cache
    def of(self, tokens: int) -> "Sample":
        """The sample of the same seed with so many tokens."""
        return replace(self, tokens=tokens)

    @cached_property
    def signals(self) -> dict[str, Signals]:
        """What HodgeCover measures, by layer name; from the cache, if it is there."""
        layers = hodgecover.sparse_layers(self.source)
        measured = hodgecover.measure_model(self.source, self.ids, self.settings, layers, self.cache)
        return {self.source.layer_names[index]: signals for index, signals in measured}

    @cached_property
    def signals_at_end(self) -> dict[str, Signals]:
        """The same with barriers at the end of the model."""
        measured = audit.signals_at_end(self.source, self.ids, self.settings, self.cache)
        return {self.source.layer_names[index]: signals for index, signals in measured}

    @cached_property
    def routing(self) -> dict[str, baselines.Routing]:
        """What a selector without barriers looks at, by layer name."""
        passes = baselines.routed_passes(self.source, self.ids)
        return {step.name: baselines.measure_routing(step) for step in passes}


Way = Callable[[Sample, float, Path], Model]


# ------------------------------------------------------------------------------------------------------- fewer experts


def survivors(source: Model, dropped: float) -> int:
    """Experts of a layer that stay if the share `dropped` goes. Raises InputError if a token needs more."""
    keep = round((1 - dropped) * source.config.num_experts)
    hodgecover.check_keep(source, keep)
    return keep


def uniform(source: Model, dropped: float) -> dict[str, int]:
    """The same by layer name."""
    return dict.fromkeys(source.layer_names, survivors(source, dropped))


def plans(sample: Sample, method: str, kept: dict[str, int]) -> dict[str, Plan]:
    """The plans by layer name of HodgeCover or one of baselines.SELECTORS, with so many survivors in each layer."""
    source, settings = sample.source, sample.settings
    if method == "hodgecover":
        return plans_of(sample.signals, settings, kept)
    measured = sample.routing
    if method in baselines.ON_BARRIERS:
        measured = sample.signals
    chosen = {}
    for name, signals in measured.items():
        rows = source.checkpoint.load(f"{name}.mlp.gate.weight")
        index = source.layer_names.index(name)
        chosen[name] = baselines.choose(signals, rows, method, kept[name], settings, index)
    return chosen


def plans_of(measured: dict[str, Signals], settings: Settings,
             kept: dict[str, int]) -> dict[str, Plan]:
    """HodgeCover's plans of signals, by layer name."""
    return {name: hodgecover.plan_from_signals(signals, kept[name], settings)
            for name, signals in measured.items()}


def export(sample: Sample, chosen: dict[str, Plan], out: Path) -> Model:
    """Write the checkpoint of plans by layer name."""
    common.export(sample.source, chosen, out, {"command": "study.py"})
    return Model(out)


def select(sample: Sample, dropped: float, out: Path, method: str, **changes: object) -> Model:
    """The survivors of one method, with changed settings."""
    if changes:
        sample = replace(sample, settings=replace(sample.settings, **changes))
    return export(sample, plans(sample, method, uniform(sample.source, dropped)), out)


def select_at_end(sample: Sample, dropped: float, out: Path) -> Model:
    """HodgeCover's survivors by barriers at the end of the model."""
    kept = uniform(sample.source, dropped)
    return export(sample, plans_of(sample.signals_at_end, sample.settings, kept), out)


def with_tokens(sample: Sample, value: float, out: Path, way: Way, tokens: int) -> Model:
    """What a way does on another number of calibration tokens."""
    return way(sample.of(tokens), value, out)


def merge(sample: Sample, dropped: float, out: Path, method: str, all_slots: bool = False) -> Model:
    """The merged experts of one of baselines.MERGING."""
    source = sample.source
    keep = survivors(source, dropped)
    merges = baselines.merge_model(source, sample.ids, method, keep, all_slots=all_slots,
                                   settings=sample.settings, cache=sample.cache)
    baselines.export_merges(source, dict(merges), out, {}, all_slots)
    return Model(out)


class Folded(Model):
    """A model of which the survivors of plans by layer name run alone, p'_j = p_j + the sum of p_i over the dropped i
    that are redirected to j (4.1; the paper says logits). It runs in memory: no stock loader takes a fold."""

    def __init__(self, path: Path, chosen: dict[str, Plan]):
        super().__init__(path)
        self.targets = {}
        for name, plan in chosen.items():
            self.targets[name] = torch.tensor([plan.redirect.get(e, e) for e in sorted(plan.order)])

    def run(self, index: int, layer: Layer, *given: object) -> LayerPass:
        """Run a layer, and put what its folded gates give in place of what its own do."""
        step = super().run(index, layer, *given)
        if step.gates is None:
            return step
        p = (step.x @ layer.router.T).softmax(-1)
        top_p, top_e = torch.zeros_like(p).index_add(1, self.targets[step.name], p).topk(self.config.top_k)
        if self.config.norm_topk_prob:
            top_p = top_p / top_p.sum(-1, keepdim=True)
        gates = torch.zeros_like(p).scatter(1, top_e, top_p)
        step.y.add_(model_io.mix_experts(layer.experts, step.x, gates - step.gates))
        return step._replace(gates=gates)


def fold(sample: Sample, dropped: float, out: Path, rule: str) -> Model:
    """HodgeCover's survivors with the router folded by one of audit.REDIRECTS."""
    checkpoint = sample.source.checkpoint
    chosen = plans(sample, "hodgecover", uniform(sample.source, dropped))
    for name, signals in sample.signals.items():
        rows = checkpoint.load(f"{name}.mlp.gate.weight")
        complex_ = hodgecover.decompose(signals, sample.settings)
        targets = audit.REDIRECTS[rule](signals, complex_, chosen[name].survivors, rows)
        chosen[name] = chosen[name]._replace(redirect=targets)
    return Folded(checkpoint.path, chosen)


# ------------------------------------------------------------------------------------------- narrower or sparse experts


@functools.cache
def scores(sample: Sample, score: str) -> dict[str, torch.Tensor]:
    """What each hidden unit of a sample's source is worth, by layer name."""
    return heapr.score_units(sample.source, score, sample.ids, sample.settings.seed)


def write_narrow(model: Model, found: dict[str, torch.Tensor], width: int, out: Path) -> Model:
    """The `width` best hidden units of every expert, by scores (n, f) of each layer."""
    heapr.export(model, {name: heapr.best_units(score, width) for name, score in found.items()}, out, {})
    return Model(out)


def narrow(sample: Sample, rate: float, out: Path, score: str) -> Model:
    """All experts, narrower by one of heapr.SCORES."""
    width = round((1 - rate) * sample.source.config.expert_width)
    return write_narrow(sample.source, scores(sample, score), width, out)


def both(sample: Sample, rate: float, out: Path, score: str) -> Model:
    """Drop the share 1 - sqrt(1 - rate) of the experts by REAP, and narrow the rest until `rate` is gone."""
    cfg, left = sample.source.config, 1 - rate
    keep = round(left**0.5 * cfg.num_experts)
    width = round(left * cfg.num_experts * cfg.expert_width / keep)
    with tempfile.TemporaryDirectory() as folder:
        few = select(sample, 1 - keep / cfg.num_experts, Path(folder) / "few", "reap")
        return write_narrow(few, heapr.score_units(few, score, sample.ids, sample.settings.seed), width, out)


def whole(sample: Sample, rate: float, out: Path) -> Model:
    """A copy of the source."""
    model_io.write_checkpoint(sample.source.checkpoint, out, {}, {})
    return Model(out)


def then_wanda(sample: Sample, rate: float, out: Path, way: Way) -> Model:
    """A way at FIRST_RATE, then Wanda to a total of `rate` (B.4, equation 33)."""
    model = way(sample, FIRST_RATE, out)
    rest = wanda.residual_rate(rate, wanda.experts_gone(model, sample.source))
    wanda.prune_on_source(model, sample.source, sample.ids, partial(wanda.keep_share, rate=rest))
    return model


# ------------------------------------------------------------------------------------------- a budget for each layer


def sparse_names(sample: Sample) -> list[str]:
    """The names of the decoder layers with experts."""
    source = sample.source
    return [source.layer_names[i] for i in hodgecover.sparse_layers(source) if i < source.config.num_layers]


@functools.cache
def ranked(sample: Sample) -> dict[str, Plan]:
    """REAP's plan of a sample, by layer name; of its order every budget takes the first."""
    return plans(sample, "reap", uniform(sample.source, 0))


def by_barriers(sample: Sample, keep: int) -> budgets.Budget:
    """How many experts of each layer go by HodgeCover's barriers."""
    means = [sample.signals[name].barriers.mean().item() for name in sparse_names(sample)]
    return budgets.barrier_budget(means, budgets.expert_counts(sample.source), sample.source.config.top_k, keep)


def by_coverage(sample: Sample, keep: int) -> budgets.Budget:
    """The same by the mass of REAP's saliency."""
    ranks = [ranked(sample)[name] for name in sparse_names(sample)]
    saliencies = [plan.saliency[plan.order].tolist() for plan in ranks]
    return budgets.coverage_budget(saliencies, sample.source.config.top_k, keep)


@functools.cache
def by_evo(sample: Sample, keep: int) -> budgets.Budget:
    """The same by evo's search, which lies beside the barriers for the next run."""
    source, orders, cfg = sample.source, budgets.decoder_orders(sample.source, ranked(sample)), sample.source.config
    model_io.make_cache(sample.cache)
    worth = budgets.remembered(budgets.esap_of(source, sample.ids, orders), sample.cache,
                               budgets.search_key(source, sample.ids, "evo", orders))
    *_, (best, _) = budgets.evolve(worth, [cfg.num_experts - cfg.top_k] * len(orders),
                                   (cfg.num_experts - keep) * len(orders), GENERATIONS, sample.settings.seed)
    return best


def first_whole(sample: Sample, keep: int) -> budgets.Budget:
    """The same by hand: the first layer keeps all, the others lose its part. Raises InputError if they cannot."""
    cfg, others = sample.source.config, len(sparse_names(sample)) - 1
    gone, most = (cfg.num_experts - keep) * (others + 1), cfg.num_experts - cfg.top_k
    if gone > most * others:
        raise InputError(f"columns: if the first layer keeps all its experts, the others would lose {gone} of the "
                         f"{most * others} that they can")
    return 0, *budgets.largest_remainder([1] * others, [most] * others, gone)


def share_out(sample: Sample, dropped: float, out: Path, method: str,
              budget: Callable[[Sample, int], budgets.Budget]) -> Model:
    """The survivors of one method, with the budget that `budget` gives so many experts."""
    gone = budget(sample, survivors(sample.source, dropped))
    kept = {name: sample.source.config.num_experts - each for name, each in zip(sparse_names(sample), gone)}
    return export(sample, plans(sample, method, uniform(sample.source, dropped) | kept), out)


@functools.cache
def rco_found(sample: Sample, keep: int, ragged: bool) -> tuple[dict[str, list[int]], budgets.Budget]:
    """The orders that rco finds, by layer name, and how many experts go."""
    source, names, ids = sample.source, sparse_names(sample), sample.text(MORE, "calibration", length=SEARCH_LENGTH)
    model_io.make_cache(sample.cache)
    alpha, limits = rco.start(source.config, len(names), keep, ragged)
    key = budgets.search_key(source, ids, "rco", keep, ragged, STEPS, sample.settings.seed)
    loss_of = rco.masked_loss(source, ids, [source.layer_names.index(name) for name in names])
    for _ in rco.descend(loss_of, len(ids), alpha, limits, STEPS, sample.settings.seed, sample.cache, key):
        pass
    return rco.rank(alpha, names, limits)


def search(sample: Sample, dropped: float, out: Path, ragged: bool) -> Model:
    """What rco finds, with one budget for all layers or with one for each."""
    keep = survivors(sample.source, dropped)
    return export(sample, budgets.planned(sample.source, ranked(sample), *rco_found(sample, keep, ragged), keep), out)


# --------------------------------------------------------------------------------------------------------- afterwards


def refitted(sample: Sample, value: float, out: Path, way: Way, tokens: int = MORE, parts: Sequence[str] = (
        "calibration",), documents: Documents | None = None, **options: object) -> Model:
    """A way, refitted on so many tokens of its text's parts or of other documents, with options of refit_layer."""
    output = way(sample, value, out)
    ids = replace(sample, documents=documents or sample.documents).text(tokens, *parts)
    for _ in refit.refit(sample.source, output, ids, partial(refit.refit_layer, **options)):
        pass
    return output


def train(sample: Sample, output: Model, tokens: int, layerwise: bool = False, **changes: object) -> Model:
    """Train a checkpoint's files on so many tokens, with the defaults of distil.py but for changes of its plan."""
    plan = distil.Plan(1, distil.LR, 1.0, [*distil.PARTS], sample.settings.seed, hodgecover.MEMORY)._replace(**changes)
    way, ids = distil.distil_layers if layerwise else distil.distil, sample.text(tokens, "train", "calibration")
    for _ in way(sample.source, output, ids, 0, plan, torch.empty, lambda *_: None) or ():
        pass
    return output


def distilled(sample: Sample, value: float, out: Path, way: Way, tokens: int = TRAINED, **options: object) -> Model:
    """A way, trained."""
    return train(sample, way(sample, value, out), tokens, **options)


@functools.cache
def trained_together(sample: Sample) -> tuple[tempfile.TemporaryDirectory, Model]:
    """A nested checkpoint whose prefixes of all rates were trained together, and the folder that it goes with."""
    folder, source = tempfile.TemporaryDirectory(), sample.source
    out = Path(folder.name) / "nested"
    nested.write_ordered(source, dict(nested.measure(source, sample.ids)), out, {})
    sizes = [(survivors(source, rate), source.config.expert_width) for rate in RATES.values()]
    return folder, train(sample, Model(out), NESTED_TRAINED, prefixes=sizes)


def together(sample: Sample, dropped: float, out: Path) -> Model:
    """A slice of the checkpoint that was trained for all rates."""
    _, model = trained_together(sample)
    nested.write_slice(model, survivors(sample.source, dropped), model.config.expert_width, out, {})
    return Model(out)


# ---------------------------------------------------------------------------------------------------------- from dense


@functools.cache
def splits(sample: Sample, top_k: int, split: str, layerwise: bool) -> dict[str, dot_moe.Split]:
    """How to split the layers of a dense source, by their name. Raises InputError for another source."""
    dot_moe.check_options(sample.source, argparse.Namespace(experts=SPLIT, top_k=top_k, epochs=1, lr=dot_moe.LR))
    ids = sample.text(TRAINED, "train", "calibration").view(-1, SEARCH_LENGTH)
    kl = dot_moe.KL / (dot_moe.KL + dot_moe.NEXT_TOKEN)
    plan = distil.Plan(1, dot_moe.LR, kl, [], sample.settings.seed, hodgecover.MEMORY)
    way = dot_moe.align_layers if layerwise else dot_moe.align
    return way(sample.source, ids, 0, dot_moe.Want(SPLIT, top_k, split), plan, torch.empty, lambda *_: None)


def deal(sample: Sample, active: float, out: Path, split: str, layerwise: bool = False) -> Model:
    """The sparse checkpoint of a dense source, split by one of dot_moe.SPLITS; a token meets the share `active`."""
    top_k = round(active * SPLIT)
    dot_moe.export(sample.source, splits(sample, top_k, split, layerwise), top_k, out, {})
    return Model(out)


def deal_half(sample: Sample, active: float, out: Path, method: str) -> Model:
    """`dot` without half of its experts, by one method."""
    with tempfile.TemporaryDirectory() as folder:
        dealt = deal(sample, active, Path(folder) / "whole", "dot")
        select(replace(sample, source=dealt), 0.5, out, method)
    return Model(out)
