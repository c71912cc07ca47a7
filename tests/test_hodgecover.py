# SPDX-License-Identifier: MIT
"""The method against a plain oracle, and the command line from end to end."""
import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
import torch.nn.functional as F
from hodgecover import Settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_io import Experts, InputError, Model
from safetensors.torch import load_file, save_file

ROOT = Path(hodgecover.__file__).parent
GOLDEN = sorted(path for path in (Path(__file__).parent / "golden").iterdir() if path.is_dir())


def random_layer(seed: int = 0, n: int = 7, k: int = 2, renormalise: bool = False, unreached: int | None = None,
                 tokens: int = 40, d: int = 12, f: int = 5, vocab: int = 30) -> dict:
    """A float64 layer in memory: experts, x, gates, y, and the norm and head that read it out."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    logits = normal(tokens, n)
    if unreached is not None:
        logits[:, unreached] = -50
    p, index = logits.softmax(-1).topk(k)
    if renormalise:
        p = p / p.sum(-1, keepdim=True)
    weight = 1 + 0.1 * normal(d)
    return {"experts": Experts(normal(n, f, d) / 3, normal(n, f, d) / 3, normal(n, d, f) / 3), "x": normal(tokens, d),
            "gates": torch.zeros(tokens, n, dtype=torch.float64).scatter(1, index, p), "y": normal(tokens, d),
            "norm": lambda y: model_io.rms_norm(y, weight, 1e-5), "unembedding": normal(vocab, d)}


def plain_merged_stream(layer: dict, simplex: list[int]) -> torch.Tensor:
    """y_S of design 2.3: build the merged weights and run them on every token."""
    experts, x, gates = layer["experts"], layer["x"], layer["gates"]
    f = [(gates[:, e] > 0).sum().item() for e in simplex]
    w = [c / sum(f) if sum(f) else 1 / len(f) for c in f]
    gate, up, down = (sum(w_e * part[e] for w_e, e in zip(w, simplex)) for part in experts)
    merged = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    own = sum(gates[:, e, None] * ((F.silu(x @ experts.gate[e].T) * (x @ experts.up[e].T)) @ experts.down[e].T)
              for e in simplex)
    return layer["y"] + gates[:, simplex].sum(1, keepdim=True) * merged - own


def plain_barrier(layer: dict, simplex: list[int], features) -> float:
    """mean_t KL(p_t || p_S,t) from two log-softmaxes."""
    log_p, log_q = ((features(stream) @ layer["unembedding"].T).log_softmax(-1)
                    for stream in (layer["y"], plain_merged_stream(layer, simplex)))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def lens(layer: dict):
    return partial(hodgecover.lens_barriers, norm=layer["norm"], unembedding=layer["unembedding"])


def parts(layer: dict) -> tuple:
    return tuple(layer[name] for name in ("experts", "x", "gates", "y"))


def assert_is_the_plain_barrier(barriers: torch.Tensor, layer: dict, simplices: torch.Tensor, features) -> None:
    plain = torch.tensor([plain_barrier(layer, s, features) for s in simplices.tolist()], dtype=torch.float64)
    assert barriers.dtype == torch.float64
    torch.testing.assert_close(barriers, plain, rtol=1e-5, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- barriers


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", [{}, {"renormalise": True}, {"unreached": 3}, {"k": 1}, {"k": 7}])
def test_lens_barriers_are_the_plain_ones(case, size):
    layer = random_layer(**case)
    simplices = torch.tensor(list(itertools.combinations(range(7), size)))
    barriers = lens(layer)(*parts(layer), simplices)
    assert_is_the_plain_barrier(barriers, layer, simplices, layer["norm"])
    assert (barriers >= 0).all() and barriers.max() > 1e-3


def test_merging_two_experts_that_no_token_reaches_costs_nothing():
    layer = random_layer(unreached=3)
    layer["gates"][:, 5] = 0
    assert lens(layer)(*parts(layer), torch.tensor([[3, 5]])).item() == 0
    assert hodgecover.merge_weights(torch.tensor([[3, 5]]), torch.zeros(7)).tolist() == [[0.5, 0.5]]


def test_merging_equal_experts_costs_nothing():
    layer = random_layer()
    layer["experts"] = Experts(*(part[:1].expand_as(part) for part in layer["experts"]))
    assert lens(layer)(*parts(layer), mathx.edges(7)).max() < 1e-20


@pytest.mark.parametrize("vocab_sample", [0, 9])
def test_barriers_do_not_depend_on_the_buffers(monkeypatch, vocab_sample):
    layer = random_layer()
    whole = lens(layer)(*parts(layer), mathx.edges(7), vocab_sample=vocab_sample)
    monkeypatch.setattr(hodgecover, "CACHE_BYTES", 1)
    for memory in (1, 10**4, 10**5):
        again = lens(layer)(*parts(layer), mathx.edges(7), vocab_sample=vocab_sample, memory=memory)
        torch.testing.assert_close(again, whole, rtol=1e-12, atol=0)


def test_chunks_of_tokens_respect_the_budget():
    sizes = torch.tensor([3, 4, 5, 20, 1, 1, 1])
    chunks = list(hodgecover.token_chunks(sizes, 10))
    assert torch.cat([torch.arange(7)[chunk] for chunk in chunks]).tolist() == list(range(7))
    assert all(sizes[chunk].sum() <= 10 or chunk.stop - chunk.start == 1 for chunk in chunks)
    assert len(chunks) <= 4
    assert list(hodgecover.token_chunks(torch.zeros(0, dtype=torch.int64), 10)) == []


def test_barriers_from_samples_of_the_vocabulary():
    """Unbiased but for Jensen's gap: the mean over 40 seeds is below the exact barrier, and near it; one sample of
    the whole vocabulary is the barrier itself."""
    layer = random_layer(vocab=200)
    exact = lens(layer)(*parts(layer), mathx.edges(7))
    seeds = torch.stack([lens(layer)(*parts(layer), mathx.edges(7), vocab_sample=40, seed=s) for s in range(40)])
    assert not torch.equal(seeds[0], seeds[1]) and (seeds >= 0).all()
    ratio = seeds.mean(0) / exact
    assert 0.9 < ratio.min() and ratio.max() < 1.02 and ratio.mean() < 1
    for sample in (200, 1000):
        assert torch.equal(lens(layer)(*parts(layer), mathx.edges(7), vocab_sample=sample), exact)


def test_the_audit_holds_what_the_sweep_estimates_and_the_exact_kl():
    """With one simplex and one token at a time, an audited pair is T times the barrier of that token alone."""
    layer = random_layer(vocab=200, tokens=1, n=3, k=3)
    simplex = torch.tensor([[0, 2]])
    readout = lens(layer)
    audit = hodgecover.audit_sample(*parts(layer), simplex, **readout.keywords, vocab_sample=20, seed=4)
    estimated = readout(*parts(layer), simplex, vocab_sample=20, seed=4)
    torch.testing.assert_close(audit, torch.stack((estimated, readout(*parts(layer), simplex)), 1))
    assert audit.shape == (1, 2) and audit[0, 0] != audit[0, 1]
    many = random_layer(vocab=200, tokens=300)
    audit = hodgecover.audit_sample(*parts(many), mathx.edges(7), **lens(many).keywords, vocab_sample=20)
    assert audit.shape == (128, 2) and (audit > 0).all() and len(audit.unique(dim=0)) == 128
    assert audit[:, 1].mean().item() == pytest.approx(lens(many)(*parts(many), mathx.edges(7)).mean().item() * 21 / 11,
                                                      rel=0.3)  # 11 of the 21 pairs touch a token of top-2
    many["gates"].zero_()
    assert hodgecover.audit_sample(*parts(many), mathx.edges(7), **lens(many).keywords, vocab_sample=20).shape == (0, 2)


def test_no_simplices_no_barriers():
    layer = random_layer()
    assert lens(layer)(*parts(layer), torch.empty(0, 3, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_barriers_of_checkpoints_are_the_plain_ones(path):
    """Both readouts, pairs and triples, on every layer of each golden checkpoint."""
    model = Model(path, dtype=torch.float64)
    ids = load_file(path / "golden.safetensors")["ids"]
    simplices = {2: torch.tensor([[0, 1], [2, 7], [3, 5]]), 3: torch.tensor([[0, 1, 2], [3, 5, 7]])}
    for step in model.stream(ids):
        if step.gates is None:
            continue
        layer = {"experts": step.layer.experts, "x": step.x, "gates": step.gates, "y": step.y,
                 "unembedding": model.unembedding(), "norm": step.norm}

        def later(y: torch.Tensor, index: int = step.index, norm=step.norm) -> torch.Tensor:
            for after in range(index + 1, model.config.num_layers):
                y = model_io.run_layer(y.view(*ids.shape, -1), model.layer(after), model.config)[2]
            return norm(y)
        for name, features in (("lens", layer["norm"]), ("model", later)):
            readout = hodgecover.make_readout(model, Settings(readout=name), ids)(step)
            for chosen in simplices.values():
                assert_is_the_plain_barrier(readout(*parts(layer), chosen), layer, chosen, features)


def test_the_model_readout_agrees_where_no_layer_comes_after():
    """More simplices than one group of 64, more tokens than one block of 256; `later` is the norm alone."""
    layer = random_layer(n=13, tokens=300)
    barriers = hodgecover.model_barriers(*parts(layer), mathx.edges(13), later=layer["norm"],
                                         unembedding=layer["unembedding"])
    torch.testing.assert_close(barriers, lens(layer)(*parts(layer), mathx.edges(13)), rtol=1e-9, atol=1e-15)


def test_progress_is_told():
    seen = []
    lens(random_layer())(*parts(random_layer()), mathx.edges(7), tick=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_barriers_of_lesser_precision_stay_near(dtype, bound):
    layer = random_layer(tokens=200)
    layer["norm"] = partial(model_io.rms_norm, weight=torch.ones(12, dtype=dtype), eps=1e-5)
    exact = lens(layer)(*parts(layer), mathx.edges(7))
    low = layer | {"experts": Experts(*(part.to(dtype) for part in layer["experts"]))} | {
        name: layer[name].to(dtype) for name in ("x", "gates", "y", "unembedding")}
    torch.testing.assert_close(lens(low)(*parts(low), mathx.edges(7)), exact, rtol=bound, atol=0)


def test_reap_saliency_word_by_word():
    layer = random_layer(unreached=3)
    expected = []
    for e in range(7):
        routed = [t for t in range(40) if layer["gates"][t, e] > 0]
        norms = [layer["gates"][t, e] * layer["experts"](e, layer["x"][t: t + 1]).norm() for t in routed]
        expected.append(sum(norms) / len(norms) if norms else torch.tensor(0.0).double())
    saliency = hodgecover.reap_saliency(*parts(layer)[:3])
    torch.testing.assert_close(saliency, torch.stack(expected) / sum(expected))
    assert saliency[3] == 0
    assert hodgecover.reap_saliency(layer["experts"], layer["x"], layer["gates"] * 0).tolist() == [0] * 7


# --------------------------------------------------------------------------------------------------- the plan


def permuted(layer: dict, order: list[int]) -> dict:
    """The same layer with its experts numbered otherwise: expert i is the old order[i]."""
    return layer | {"experts": Experts(*(part[order] for part in layer["experts"])), "gates": layer["gates"][:, order]}


def survivors(layer: dict, **choices) -> list[int]:
    return hodgecover.plan_layer(*parts(layer), lens(layer), 5, Settings(edge_percent=10, **choices))["survivors"]


@given(st.integers(0, 1000), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=15)
def test_numbering_the_experts_otherwise_permutes_the_survivors(seed, random):
    layer, order = random_layer(seed, n=10), random.sample(range(10), 10)
    assert sorted(order[i] for i in survivors(permuted(layer, order))) == survivors(layer)


def test_under_index_order_the_numbering_can_change_the_survivors():
    layer = random_layer(3, n=10)
    found = {tuple(sorted(order[i] for i in survivors(permuted(layer, order), order="index")))
             for order in (torch.randperm(10, generator=torch.Generator().manual_seed(s)).tolist() for s in range(10))}
    assert len(found) > 1


def test_saliency_order_is_index_order_of_the_sorted_layer():
    """Plans of a layer in saliency order, and in index order of the layer with its experts sorted by saliency."""
    layer = random_layer(3, n=10)
    rank = hodgecover.reap_saliency(*parts(layer)[:3]).sort().indices.tolist()
    settings = dict(edge_percent=10, triangle_percent=30)
    plan = hodgecover.plan_layer(*parts(layer), lens(layer), 4, Settings(**settings))
    sorted_layer = permuted(layer, rank)
    other = hodgecover.plan_layer(*parts(sorted_layer), lens(sorted_layer), 4, Settings(order="index", **settings))
    assert plan["eta"] == pytest.approx(other["eta"]) and plan["covered_at"] == other["covered_at"]
    assert plan["order"] == [rank[i] for i in other["order"]]
    assert plan["redirect"] == {str(rank[int(i)]): rank[j] for i, j in other["redirect"].items()}
    for name in ("critical_edges", "critical_triangles"):
        assert plan[name] == [sorted(rank[i] for i in simplex) for simplex in other[name]] != []
    f = plan["frequency"]
    assert plan["routed_share"] == pytest.approx(sum(f[i] for i in plan["survivors"]) / sum(f))


@given(st.integers(3, 8), st.integers(0, 2**31))
def test_signals_in_another_order_are_the_same_signals(n, seed):
    g = torch.Generator().manual_seed(seed)
    rank, pairs = torch.randperm(n, generator=g), mathx.edges(n).tolist()
    triples = torch.combinations(torch.arange(n), 3)
    triples = triples[torch.randperm(len(triples), generator=g)[:5]]
    signals = hodgecover.Signals(*(torch.rand(m, generator=g).double() for m in (n, n, len(pairs))), triples,
                                 torch.rand(len(triples), generator=g).double())
    ranked = hodgecover.in_order(signals, rank)
    assert torch.equal(ranked.saliency, signals.saliency[rank])
    assert torch.equal(ranked.frequency, signals.frequency[rank])
    of = {frozenset(pair): value for pair, value in zip(pairs, signals.barriers.tolist())}
    assert [of[frozenset(rank[list(pair)].tolist())] for pair in pairs] == ranked.barriers.tolist()
    of = {frozenset(triple): value for triple, value in zip(triples.tolist(), signals.triplets.tolist())}
    assert ranked.candidates.tolist() == sorted(map(sorted, ranked.candidates.tolist()))
    assert [of[frozenset(rank[triple].tolist())] for triple in ranked.candidates] == ranked.triplets.tolist()


def test_tau_is_the_first_threshold_of_the_largest_betti_number():
    """The cycle 0-1-2-3 closes by 0.4 and its chord 02 enters by 0.5; the triangles fill both halves by 0.8."""
    b = torch.tensor([0.1, 0.45, 0.15, 0.25, 1.0, 0.35], dtype=torch.float64)  # 01 02 03 12 13 23
    signals = hodgecover.Signals(torch.ones(4), torch.ones(4).double() / 4, b,
                                 torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([0.75, 0.75]).double())
    inside, tau, curve = hodgecover.curate_triangles(signals, Settings(thresholds=10))  # 0.1, 0.2, ..., 1.0
    assert curve.tolist() == [0, 0, 0, 1, 2, 2, 2, 0, 0, 1]
    assert tau == pytest.approx(0.5) and inside.tolist() == [False, False]
    fourth = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)[3].item()  # then 012 fills as soon as 02 enters
    inside, tau, curve = hodgecover.curate_triangles(
        signals._replace(triplets=torch.tensor([fourth, 0.75], dtype=torch.float64)), Settings(thresholds=10))
    assert curve.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    assert tau == fourth and inside.tolist() == [True, False]  # at most tau*, whatever its edges
    assert hodgecover.plan_from_signals(signals, 2)["discordance"] == 1  # of the candidates, though T is empty


@pytest.mark.parametrize("choices", [{}, dict(lambda_edge=0.1, lambda_triangle=0.01, alpha=50.0, seed=3, thresholds=7,
                                             margin=1.0)])
def test_a_plan_is_what_its_parts_say(choices):
    """The plan of a layer in index order, from its barriers and the functions of mathx called one by one."""
    layer = random_layer(5, n=9)
    settings = Settings(order="index", edge_percent=10, triangle_percent=20, max_triangles=12, **choices)
    plan = hodgecover.plan_layer(*parts(layer), lens(layer), 4, settings)
    measured = hodgecover.measure_layer(*parts(layer), lens(layer), settings)
    rank = hodgecover.reap_saliency(*parts(layer)[:3]).sort().indices  # candidates are sampled in saliency order
    sampled = rank[mathx.candidate_triangles(9, lens(layer)(*parts(layer), rank[mathx.edges(9)]), 12, settings.seed)]
    assert torch.equal(measured.candidates, sampled.sort(1).values)
    torch.testing.assert_close(measured.barriers, lens(layer)(*parts(layer), mathx.edges(9)))
    torch.testing.assert_close(measured.triplets, lens(layer)(*parts(layer), sampled))
    _, _, b, candidates, triplets, *_ = hodgecover.in_order(measured, torch.arange(9))
    thresholds = torch.linspace(min(b.min(), triplets.min()).item(), max(b.max(), triplets.max()).item(),
                                settings.thresholds, dtype=torch.float64)
    curve = mathx.betti_curve(9, b, candidates, triplets, thresholds)
    assert plan["betti_curve"] == curve.tolist() and plan["tau"] == thresholds[curve.argmax()].item()
    triangles, triplets_in = candidates[triplets <= plan["tau"]], triplets[triplets <= plan["tau"]]
    assert plan["candidates"] == len(candidates) == 12 and plan["triangles"] == len(triangles)
    d1, d2 = mathx.boundary_matrices(9, triangles)
    parts_of = mathx.hodge_decompose(b, d1, d2)
    assert plan["eta"] == mathx.energy_fractions(parts_of)
    assert plan["eta_constant"] == mathx.energy_fractions(mathx.hodge_decompose(torch.ones_like(b), d1, d2))
    fit = mathx.additive_model(b, d1)
    assert plan["additive"] == {"energy": fit.energy, "variance": fit.variance}
    discordance = mathx.discordance(9, b, candidates, triplets, settings.margin)
    assert (plan["discordance"], plan["discordance_quantiles"]) == discordance
    assert plan["betti_1"] == mathx.betti_1(d1, d2) and plan["mean_barrier"] == b.mean().item()
    critical = [mathx.edges(9)[mathx.critical(parts_of.harmonic.abs(), 10)], triangles[mathx.critical(triplets_in, 20)]]
    assert [plan["critical_edges"], plan["critical_triangles"]] == [c.tolist() for c in critical]
    assert len(critical[0]) == math.ceil(3.6) and len(critical[1]) == math.ceil(0.2 * len(triangles))
    saliency = hodgecover.reap_saliency(*parts(layer)[:3])
    weights = settings.lambda_edge, settings.lambda_triangle
    order = mathx.greedy_cover(saliency, list(zip(critical, weights)), 9)
    assert plan["order"] == order
    assert list(plan["covered_at"].values()) == [mathx.covered_at(order, simplices) for simplices in critical]
    assert plan["survivors"] == sorted(plan["order"][:4])
    target = mathx.redirect(plan["survivors"], b, parts_of.harmonic, settings.alpha)
    assert plan["redirect"] == {str(i): j for i, j in target.items()}
    for name, part in parts_of._asdict().items():
        assert plan["retained"][name] == mathx.retained(part, mathx.edges(9), plan["survivors"])
    assert plan["retained"]["triplet"] == mathx.retained(triplets_in, triangles, plan["survivors"])
    assert sum(plan["frequency"]) == 40 * 2 and sum(plan["saliency"]) == pytest.approx(1)


def test_defaults_are_those_of_the_readme():
    assert Settings() == Settings(
        readout="lens", order="saliency", router="drop", edge_percent=5, triangle_percent=5, lambda_edge=1,
        lambda_triangle=1, alpha=1, max_triangles=500, vocab_sample=0, thresholds=80, margin=0.1, seed=0)


def chosen(signals: hodgecover.Signals, method: str, keep: int = 4, **choices) -> dict:
    settings = dict(edge_percent=15, triangle_percent=20, order="index") | choices
    return hodgecover.plan_from_signals(signals, keep, Settings(method=method, **settings))


def test_each_method_chooses_by_its_own_rule():
    layer = random_layer(8, n=9)
    signals = hodgecover.measure_layer(*parts(layer), lens(layer), Settings(max_triangles=20))
    b, pairs = signals.barriers, mathx.edges(9)

    def top(score: list[float]) -> list[int]:
        return sorted(range(9), key=lambda e: (-score[e], e))
    saliency, frequency = signals.saliency.tolist(), signals.frequency.tolist()
    assert chosen(signals, "reap")["order"] == top(saliency)
    assert chosen(signals, "frequency")["order"] == top(frequency)
    assert chosen(signals, "greedy-barrier")["order"] == top(
        [sum(v for v, pair in zip(b.tolist(), pairs.tolist()) if e in pair) for e in range(9)])
    full = chosen(signals, "hodgecover")
    triangles = torch.tensor(full["critical_triangles"])
    assert chosen(signals, "triplet-hypergraph")["order"] == mathx.veto_order(signals.saliency, triangles)
    parts_of = mathx.additive_model(b, mathx.boundary_matrices(9, signals.candidates)[0])
    edges = {"triplet-penalty": pairs[mathx.critical(b, 15)], "hodge-no-triangle": torch.tensor(full["critical_edges"]),
             "additive-residual": pairs[mathx.critical(parts_of.residual.abs(), 15)]}
    for method, critical in edges.items():
        plan = chosen(signals, method)
        assert plan["critical_edges"] == critical.tolist() and plan["critical_triangles"] == triangles.tolist()
        weight = 0.0 if method == "hodge-no-triangle" else 1.0
        assert plan["order"] == mathx.greedy_cover(signals.saliency, [(critical, 1.0), (triangles, weight)], 9)
    orders = {tuple(chosen(signals, method)["order"]) for method in hodgecover.METHODS}
    assert len(orders) >= 6  # they are no synonyms
    assert {tuple(chosen(signals, "random", seed=s)["order"]) for s in (1, 2)} != 1
    one, two = (hodgecover.plan_from_signals(signals, 4, Settings(method="random"), layer)["order"] for layer in (0, 1))
    assert one != two and sorted(one) == sorted(two) == list(range(9))


def test_additive_residual_knows_no_order():
    layer = random_layer(8, n=9)
    signals = hodgecover.measure_layer(*parts(layer), lens(layer), Settings(max_triangles=0))
    orders = "saliency", "index", "random:1", "random:2"
    for method, count in (("additive-residual", 1), ("hodgecover", 4)):
        found = {str(sorted(chosen(signals, method, order=order)["critical_edges"])) for order in orders}
        assert len(found) == count


def test_nan_in_an_expert_is_an_error_not_a_plan():
    layer = random_layer()
    layer["experts"].down[4, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        hodgecover.plan_layer(*parts(layer), lens(layer), 3)


@pytest.mark.parametrize("keep", [0, 8])
def test_keep_is_from_1_to_n(keep):
    layer = random_layer()
    with pytest.raises(InputError, match="from 1 to the layer's 7"):
        hodgecover.plan_layer(*parts(layer), lens(layer), keep)


def test_plans_of_fewer_survivors_nest():
    layer = random_layer(1, n=9)
    chosen = [set(hodgecover.plan_layer(*parts(layer), lens(layer), k)["survivors"]) for k in range(1, 10)]
    assert all(a < b for a, b in zip(chosen, chosen[1:])) and chosen[-1] == set(range(9))


def test_two_experts_are_a_gradient():
    layer = random_layer(n=2, k=1)
    plan = hodgecover.plan_layer(*parts(layer), lens(layer), 1)
    assert plan["eta"] == {"gradient": pytest.approx(1), "curl": 0, "harmonic": pytest.approx(0, abs=1e-20)}
    assert plan["triangles"] == plan["betti_1"] == 0
    assert plan["critical_edges"] == plan["critical_triangles"] == []


# -------------------------------------------------------------------------------------------- the command line

QUICK = ["--tokens", "256", "--seq-len", "128", "--max-triangles", "40", "--dtype", "float32"]


def run(*argv: object) -> int:
    return hodgecover.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def output(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint at half its experts, with what the dropped rows fold into."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert run(tiny, "--keep", 32, "--out", out, "--router", "fold", *QUICK) == 0
    return out


def test_the_plan_file_says_what_was_done(tiny, output):
    plan = json.loads((output / "hodgecover.json").read_text())
    assert plan["schema_version"] == 1 and plan["settings"]["keep"] == 32 and plan["settings"]["tokens"] == 256
    assert plan["source"]["fingerprint"] == model_io.Checkpoint(tiny).fingerprint()
    assert [layer["layer"] for layer in plan["layers"]] == [0, 1, 2, 3]
    for layer in plan["layers"]:
        kept = layer["survivors"]
        assert kept == sorted(layer["order"][:32]) and sorted(layer["order"]) == list(range(64))
        assert sorted(map(int, layer["redirect"])) == sorted(set(range(64)) - set(kept))
        assert set(layer["redirect"].values()) <= set(kept)
        for name in ("eta", "eta_constant"):
            assert sum(layer[name].values()) == pytest.approx(1)
    text = (output / "hodgecover.json").read_text()
    assert str(ROOT) not in text and not re.search(r"\d\d:\d\d", text)


def test_the_output_holds_the_planned_survivors(tiny, output):
    plan = json.loads((output / "hodgecover.json").read_text())
    before, after = (load_file(path / "model.safetensors") for path in (tiny, output))
    for layer in plan["layers"]:
        name = f"model.layers.{layer['layer']}.mlp"
        assert torch.equal(after[f"{name}.gate.weight"], before[f"{name}.gate.weight"][layer["survivors"]])
        for i, e in enumerate(layer["survivors"]):
            kept, source = (f"{name}.experts.{number}.up_proj.weight" for number in (i, e))
            assert torch.equal(after[kept], before[source])
    assert Model(output).config.num_experts == 32
    assert (output / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_folding_moves_the_gate_mass_to_the_redirect_target(tiny, output):
    plan = json.loads((output / "hodgecover.json").read_text())
    source, folded = Model(tiny), Model(output, router="fold")
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    for entry in plan["layers"]:
        p = (x @ source.layer(entry["layer"]).router.T).softmax(-1)
        mass = {j: p[:, j].clone() for j in entry["survivors"]}
        for i, j in entry["redirect"].items():
            mass[j] += p[:, int(i)]
        expected = torch.stack([mass[j] for j in entry["survivors"]], 1)
        gates = model_io.route(x, folded.layer(entry["layer"]), folded.config)
        top = expected.topk(8).indices
        torch.testing.assert_close(gates.gather(1, top), expected.gather(1, top))
        assert ((gates > 0).sum(1) == 8).all()
    assert not torch.equal(folded.logits(torch.ones(1, 4, dtype=torch.int64)),
                           Model(output).logits(torch.ones(1, 4, dtype=torch.int64)))


def test_the_same_command_gives_the_same_bytes(tiny, output, tmp_path):
    out = tmp_path / "again"
    assert run(tiny, "--keep", 32, "--out", out, "--cache", tmp_path / "cache", "--router", "fold", *QUICK) == 0
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in output.iterdir()}


def test_calibration_is_sampled_by_seed_and_a_short_text_is_said(tiny, tmp_path, capsys):
    model = Model(tiny)
    first, other = (hodgecover.calibration_ids(model, [], 256, 128, seed) for seed in (0, 1))
    assert first.shape == other.shape == (2, 128) and not torch.equal(first, other) and capsys.readouterr().err == ""
    (tmp_path / "short.txt").write_text("A short text. " * 100)
    assert hodgecover.calibration_ids(model, [tmp_path / "short.txt"], 2048, 128, 0).shape[0] < 16
    assert "all used; 2048 were asked" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [8, 64])
def test_the_least_and_the_most_that_can_be_kept(tiny, tmp_path, keep):
    assert run(tiny, "--keep", keep, "--out", tmp_path / "o", *QUICK, "--dtype", "float64", "--seed", 1,
               "--cache", tiny.with_name("barriers-of-the-extremes")) == 0
    plan = json.loads((tmp_path / "o" / "hodgecover.json").read_text())
    assert [len(layer["survivors"]) for layer in plan["layers"]] == [keep] * 4
    assert (plan["settings"]["dtype"], plan["settings"]["seed"]) == ("float64", 1)
    ids = hodgecover.calibration_ids(Model(tiny), [], 256, 128, 1)
    assert plan["settings"]["calibration_sha256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def test_the_fold_is_evaluated_as_a_fold(tiny, output, monkeypatch, capsys):
    monkeypatch.setattr(hodgecover, "compress", lambda *_, **__: output)
    text = output.parent / "held-out.txt"
    text.write_text("\n".join(model_io.python_documentation("held-out"))[:3000], encoding="utf-8")
    assert run(tiny, "--keep", 32, "--router", "fold", "--eval", text, "--seq-len", 128, "--dtype", "float32") == 0
    ids = model_io.sequences(Model(tiny).encode([text.read_text()]), 128)
    after = float(re.search(r"-> ([\d.]+), KL", capsys.readouterr().out)[1])
    assert after == pytest.approx(Model(output, router="fold").perplexity(ids), abs=0.01)


def test_lines_for_people(tiny, tmp_path, capsys):
    text = tmp_path / "eval.txt"
    text.write_text("\n".join(model_io.python_documentation("held-out"))[:20000], encoding="utf-8")
    shutil.copytree(tiny, tmp_path / "ckpt")
    assert run(tmp_path / "ckpt", "--keep", 16, *QUICK, "--eval", text, "--calib", text) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^ +\d  (\d\.\d{3} \(\d\.\d{3}\)  ){3}", said, re.M)) == 4
    figures = re.search(r"perplexity: ([\d.]+) -> ([\d.]+), KL\(source \|\| output\) ([\d.]+)", said)
    before, after, kl = map(float, figures.groups())
    ids = model_io.sequences(Model(tiny).encode([text.read_text()]), 128)
    out = tmp_path / "ckpt-keep16"
    assert before == pytest.approx(Model(tiny).perplexity(ids), abs=0.01)
    assert after == pytest.approx(Model(out).perplexity(ids), abs=0.01)
    log_p, log_q = (Model(path).logits(ids).double().log_softmax(-1) for path in (tiny, out))
    assert kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), abs=1e-4)
    assert f"output: {out}" in said and "weights: 3.6 MB -> 1.7 MB (48%)" in said
    settings = json.loads((out / "hodgecover.json").read_text())["settings"]
    assert settings["calibration"] == ["eval.txt"] and str(tmp_path) not in (out / "hodgecover.json").read_text()


def test_a_layers_line():
    plan = {"layer": 3, "eta": {"gradient": 0.5, "curl": 0.1, "harmonic": 0.4},
            "eta_constant": {"gradient": 0.6, "curl": 0.15, "harmonic": 0.25},
            "additive": {"energy": 0.99, "variance": 0.9}, "betti_1": 1453, "triangles": 500, "discordance": 0.75,
            "covered_at": {"edges": 20, "triangles": 18}, "routed_share": 0.5}
    assert hodgecover.layer_line(plan).split() == [
        "3", "0.500", "(0.600)", "0.100", "(0.150)", "0.400", "(0.250)", "1.00%", "10.00%", "1453", "500", "75.0%",
        "20", "18", "50.0%"]


def test_progress_tells_the_time_left(monkeypatch, capsys):
    now = iter((0.0, 10.0, 40.0))
    monkeypatch.setattr(hodgecover.time, "monotonic", lambda: next(now))
    bar = hodgecover.progress_bar()
    bar(0.1)
    bar(0.25)
    assert capsys.readouterr().err == " 25% done, 0:02:30 left\n"  # 0.15 in 30 s


def test_plan_only_writes_the_plan_alone(tiny, output, tmp_path):
    assert run(tiny, "--keep", 32, "--out", tmp_path / "plan", "--plan-only", *QUICK) == 0
    assert [f.name for f in (tmp_path / "plan").iterdir()] == ["hodgecover.json"]
    plans = [json.loads((path / "hodgecover.json").read_text()) for path in (tmp_path / "plan", output)]
    assert plans[0]["layers"] == plans[1]["layers"]


def test_the_model_readout_runs_and_says_its_cost(tmp_path, capsys):
    path = Path(__file__).parent / "golden" / "olmoe-plain"
    shutil.copytree(path, tmp_path / "c")
    shutil.copy(ROOT / "examples" / "tiny-olmoe" / "tokenizer.json", tmp_path / "c")
    model = Model(tmp_path / "c")
    ids = load_file(path / "golden.safetensors")["ids"]
    measured = [signals for _, signals in hodgecover.measure_model(model, ids, Settings(readout="model"), [0, 1])]
    assert "through all later layers" in capsys.readouterr().err
    near = [signals for _, signals in hodgecover.measure_model(model, ids, Settings(), [0, 1])]
    torch.testing.assert_close(measured[1].barriers, near[1].barriers, rtol=1e-3, atol=1e-9)  # no layer comes after
    assert not torch.allclose(measured[0].barriers, near[0].barriers, rtol=1e-2)


def test_the_model_readout_is_refused_where_it_does_not_fit(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hodgecover, "available_memory", lambda device: 1000)
    assert run(tiny, "--keep", 32, "--out", tmp_path / "o", "--readout", "model", *QUICK) == 2
    assert "GB are free; use --readout lens" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_cost_of_the_model_readout_counts_its_parts(monkeypatch, tiny, capsys):
    """Four layers of 500 + 2,016 merges over T tokens: layer l runs 3 - l later layers, and the head each time."""
    monkeypatch.setattr(hodgecover, "sweep_rate", lambda *_: 1e9)
    ids = torch.ones(2, 64, dtype=torch.int64)
    hodgecover.check_cost(Model(tiny), ids, Settings(readout="model"), 0)
    layer = 4 * 96 * 96 + 64 * 96 + 4 * 96 + 8 * 3 * 96 * 16  # attention, router, norms, 8 of 64 experts
    operations = 2 * 2516 * 128 * (layer * (3 + 2 + 1 + 0) + 4 * 2048 * 96)
    assert f"{operations:.1e} operations" in capsys.readouterr().err
    weights = 4 * 4 * (layer + 56 * 3 * 96 * 16)
    monkeypatch.setattr(hodgecover, "available_memory", lambda device: weights)
    with pytest.raises(InputError, match="GB are free"):
        hodgecover.check_cost(Model(tiny), ids, Settings(readout="model"), 0)


@pytest.mark.parametrize("name", ["qwen2-dense-between", "qwen3-dense-first", "qwen3_5-vision-mtp"])
def test_the_whole_command_on_the_other_families(tmp_path, capsys, characters, name):
    """With a fold, dense layers between, fused experts and a multi-token head; a tokenizer of 96 tokens."""
    source = tmp_path / name
    shutil.copytree(ROOT / "tests" / "golden" / name, source)
    (source / "tokenizer.json").write_text(characters)
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes an expert dull. " * 40)
    assert run(source, "--keep", 4, "--router", "fold", "--calib", text, "--eval", text, "--tokens", 256,
               "--seq-len", 64) == 0
    out = tmp_path / f"{name}-keep4"
    plan = json.loads((out / "hodgecover.json").read_text())
    routers = [n.removesuffix(".mlp.gate.weight") for n in model_io.Checkpoint(source).tensors if ".mlp.gate." in n]
    assert sorted(layer["name"] for layer in plan["layers"]) == sorted(routers)
    assert "perplexity" in capsys.readouterr().out
    ids = torch.arange(20).view(1, 20)
    assert not torch.equal(Model(out).logits(ids), Model(out, router="fold").logits(ids))


@pytest.mark.parametrize("options, says", [
    (["--keep", "65"], "from 8 to 64"),
    (["--keep", "7"], "from 8 to 64"),
    (["--keep", "many"], "--keep"),
    ([], "one of --keep K, --expert-rate R1, --plan FILE and --layers A-B"),
    (["--keep", "32", "--layers", "0"], "--keep and --layers do not go together"),
    (["--keep", "32", "--plan", "hodgecover.json"], "--keep and --plan do not go together"),
    (["--plan", "hodgecover.json", "--plan-only"], "--plan and --plan-only do not go together"),
    (["--layers", "0", "--estimate"], "do not go together"),
    (["--layers", "0", "--plan-only"], "--layers and --plan-only do not go together"),
    (["--layers", "0", "--total-rate", "0.5"], "--total-rate do not go together"),
    (["--plan", "hodgecover.json", "--nm", "2:4"], "--plan and --nm do not go together"),
    (["--layers", "2-1"], "range of layers such as 0-7"),
    (["--layers", "2-4"], "the model has layers 0 to 3"),
    (["--plan", "absent.json"], "absent.json: cannot be read (No such file or directory)"),
    (["--keep", "32", "--memory", "much"], "must be a size such as 1GB"),
    (["--keep", "32", "--memory", "1"], "must be 10MB or more"),
    (["--plan", "hodgecover.json", "--estimate"], "--estimate and --plan do not go together"),
    (["--keep", "32", "--vocab-sample", "-1"], "--vocab-sample -1"),
    (["--keep", "32", "--vocab-sample", "9", "--readout", "model"], "goes with --readout lens"),
    (["--keep", "65", "--estimate"], "from 8 to 64"),
    (["--estimate", "--seq-len", "0"], "--seq-len 0: must be from 2"),
    (["--estimate", "--tokens", "100"], "must be from 2 to the 100 of --tokens"),
    (["--estimate", "--method", "reap"], "measures no barriers"),
    (["--estimate", "--refit", "4096"], "needs --keep"),
    (["--plan", "hodgecover.json", "--router", "fold"], "--plan and --router do not go together"),
    (["--keep", "32", "--tokens", "100"], "must be from 2 to the 100 of --tokens"),
    (["--keep", "32", "--edge-percent", "101"], "--edge-percent 101.0: must be from 0 to 100"),
    (["--keep", "32", "--alpha", "nan"], "--alpha nan"),
    (["--keep", "32", "--alpha", "inf"], "--alpha inf"),
    (["--keep", "32", "--seed", "-1"], "--seed -1"),
    (["--keep", "32", "--lambda-triangle", "-1"], "--lambda-triangle -1"),
    (["--keep", "32", "--max-triangles", "-1"], "--max-triangles -1"),
    (["--keep", "32", "--seq-len", "1"], "--seq-len 1"),
    (["--keep", "32", "--tokens", "9" * 25, "--seq-len", "9" * 22], "--tokens 9"),
    (["--keep", "32", "--seq-len", "0", "--eval", __file__], "--seq-len 0"),
    (["--keep", "32", "--device", "cuda"], "sees no GPU"),
    (["--keep", "32", "--readout", "lense"], "lense"),
    (["--keep", "32", "--readout", "model", "--dtype", "bfloat16"], "use --dtype float32"),
    (["--keep", "32", "--calib", "absent.txt"], "absent.txt"),
    (["--keep", "32", "--eval", "absent.txt"], "absent.txt"),
    (["--keep", "32", "--eval", "x", "--plan-only"], "--plan-only and --eval do"),
])
def test_wrong_options_get_one_line(tiny, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tiny, "--out", "out", *options) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and says in said.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_is_refused_before_the_work(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hodgecover, "measure_model", None)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    for out, says in ((tmp_path, "not an empty folder"), (tmp_path / "notes.txt", "not an empty folder"),
                      (tmp_path / "notes.txt" / "out", "cannot be made"), (tmp_path / "link", "not an empty folder"),
                      (tmp_path / ("x" * 300), "too long or not printable"), (tiny / "out", "lies in the checkpoint")):
        assert run(tiny, "--keep", 32, "--out", out) == 2
        said = capsys.readouterr()
        assert says in said.err and said.err.count("\n") == 1
    assert run(tiny, "--keep", 32, "--out", tmp_path / "o", "--cache", tiny / "barriers") == 2
    assert "name another with --cache" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(hodgecover, "run", interrupt)
    assert run("x", "--keep", 1) == 130
    said = capsys.readouterr().err
    assert said == "hodgecover: interrupted; the same command goes on from the layers that are done\n"


def test_a_dense_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "dense"
    shutil.copytree(ROOT / "tests" / "golden" / "qwen3-dense-first", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if ".layers.1." not in name}, path / "model.safetensors")
    assert run(path, "--keep", 3) == 2 and "no layer has a router over two" in capsys.readouterr().err


def test_a_vendored_copy_works(tiny, tmp_path):
    package = tmp_path / "mypkg" / "vendor"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    for name in ("hodgecover.py", "model_io.py", "mathx.py"):
        shutil.copy(ROOT / name, package)
        head = (ROOT / name).read_text()
        assert head.startswith("# SPDX-License-Identifier: MIT\n") and re.search(r'^__version__ = "\d', head, re.M)
    script = ("import sys; from mypkg.vendor.hodgecover import main, mathx; "
              "assert mathx.__name__ == 'mypkg.vendor.mathx' and 'mathx' not in sys.modules; "
              "sys.exit(main(sys.argv[1:]))")
    command = [sys.executable, "-c", script, str(tiny), "--keep", "32", "--out", "out", "--plan-only", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "hodgecover.json").is_file()
