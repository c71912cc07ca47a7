# SPDX-License-Identifier: MIT
"""The method: what is measured on a layer, plans against their parts called one by one, settings, degenerate input, and
what the command may write to. The paper's statements are in test_paper.py."""
import doctest
import hashlib
import json
import math
from functools import partial
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from conftest import QUICK, assert_refused, contents, named, refuse, run
from hodgecover import Settings, Signals
from model_io import Experts, InputError, Model
from strategies import (NO_TRIANGLES, SEEDS, TRIPLES, fast_barriers, given, random_layer, renumbered, triangle_tensor,
                        uniform)


def test_the_docstrings_examples_hold():
    results = doctest.testmod(hodgecover)
    assert results.failed == 0 and results.attempted > 4


def test_each_file_has_its_licence_and_the_same_version():
    for module in (hodgecover, mathx, model_io):
        assert Path(module.__file__).read_text().startswith("# SPDX-License-Identifier: MIT\n")
        assert module.__version__ == hodgecover.__version__


# ------------------------------------------------------------------------------------------ what is measured


def test_reap_saliency_word_by_word():
    layer = random_layer(unreached=3)
    expected = []
    for e in range(7):
        routed = [t for t in range(40) if layer.gates[t, e] > 0]
        norms = [layer.gates[t, e] * layer.experts(e, layer.x[t: t + 1]).norm() for t in routed]
        expected.append(sum(norms) / len(norms) if norms else torch.tensor(0.0).double())
    saliency = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates)
    torch.testing.assert_close(saliency, torch.stack(expected) / sum(expected))
    assert saliency[3] == 0
    assert hodgecover.reap_saliency(layer.experts, layer.x, layer.gates * 0).tolist() == [0] * 7


def test_both_readouts_agree_if_no_layer_comes_after():
    """And tell of their progress; samples belong to `lens` alone."""
    signals = []
    for readout in ("lens", "model"):
        seen = []
        settings = Settings(readout=readout, vocab_sample=0 if readout == "lens" else 20)
        signals.append(hodgecover.measure_layer(random_layer(), settings, tick=seen.append))
        assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == pytest.approx(1)
    for near, far in zip(*signals):
        torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_stay_as_stored_and_are_multiplied_in_the_dtype(dtype):
    """To the last bit what the widened weights give, at half of the memory or less."""
    layer = random_layer()
    layer = layer._replace(norm=partial(model_io.rms_norm, weight=torch.ones(12, dtype=dtype), eps=1e-5), **{
        name: getattr(layer, name).to(dtype) for name in ("x", "gates", "y", "unembedding")})
    stored = Experts(*(part.bfloat16() for part in layer.experts))
    both = (layer._replace(experts=of) for of in (stored, Experts(*(part.to(dtype) for part in stored))))
    held, plain = (hodgecover.measure_layer(of, Settings(max_triangles=20)) for of in both)
    assert all(map(torch.equal, held, plain))


def test_the_audit_foretells_the_shortfall():
    layer = random_layer(n=12, k=3, tokens=300, vocab=400)
    settings = Settings(vocab_sample=40, max_triangles=30)
    signals, exact = hodgecover.measure_layer(layer, settings), fast_barriers(layer, hodgecover.edges(12))
    audit = hodgecover.plan_from_signals(signals, 4, settings)["diagnostics"]["audit"]
    truth = 1 - (signals.barriers.sum() / exact.sum()).item()
    assert audit["pairs"] == 256 and abs(audit["shortfall"] - truth) < 3 * audit["standard_error"] < 0.2


@pytest.mark.parametrize("vocab_sample", [0, 9])
def test_the_signals_of_renumbered_experts_are_the_renumbered_signals(vocab_sample):
    """Candidates among them, of which there are more than the limit; in index order the survivors can change."""
    settings = Settings(max_triangles=12, vocab_sample=vocab_sample)
    by_index, kept = Settings(order="index", edge_percent=10, max_triangles=12), set()
    for seed in range(6):
        layer, old = random_layer(3, n=10), torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        moved = layer._replace(experts=Experts(*(part[old] for part in layer.experts)), gates=layer.gates[:, old])
        expected = renumbered(hodgecover.measure_layer(layer, settings), old.argsort())
        for found, of_layer in zip(hodgecover.measure_layer(moved, settings), expected[:-1]):
            torch.testing.assert_close(found, of_layer, rtol=1e-9, atol=1e-15)
        kept.add(tuple(old[hodgecover.plan_layer(moved, 5, by_index)["survivors"]].sort().values.tolist()))
    assert len(kept) > 1


def test_an_expert_that_no_token_reaches():
    """Its merges are free, whatever its weights, and saliency puts it last."""
    found = hodgecover.measure_layer(random_layer(n=8, unreached=7))
    assert found.saliency[7] == found.frequency[7] == 0
    assert (found.barriers[(hodgecover.edges(8) == 7).any(1)].abs() < 1e-15).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab_sample", [0, 9])
def test_barriers_are_finite_and_not_negative(scale, dtype, vocab_sample):
    """From logits all alike to logits of thousands, where most outcomes have a probability of 0."""
    layer = random_layer()
    layer = layer._replace(
        experts=Experts(*(part.to(dtype) for part in layer.experts)), unembedding=layer.unembedding.to(dtype) * scale,
        norm=partial(model_io.rms_norm, weight=torch.ones(12, dtype=dtype), eps=1e-5),
        **{name: getattr(layer, name).to(dtype) for name in ("x", "gates", "y")})
    found = hodgecover.measure_layer(layer, Settings(vocab_sample=vocab_sample))
    for barriers in (found.barriers, found.triplets):
        assert barriers.isfinite().all() and (barriers >= 0).all()


def test_nan_in_an_expert_is_an_error_not_a_plan():
    layer = random_layer()
    layer.experts.down[4, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        hodgecover.plan_layer(layer, 3)


# --------------------------------------------------------------------------------------------------- selection


def test_ties_go_to_the_lowest_index():
    zeros, flat = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    assert hodgecover.greedy_cover(zeros, [(NO_TRIANGLES, 1.0)], 6) == [0, 1, 2, 3, 4, 5]
    thirds = [(torch.tensor([[0, 3], [1, 4], [2, 5]]), 0.1)]
    assert hodgecover.greedy_cover(zeros, thirds, 3) == [0, 1, 2]
    for barriers in (flat, zeros):
        assert hodgecover.redirect([3, 1], barriers, zeros, 1.0) == {0: 1, 2: 1}


@given(SEEDS)
def test_rounding_breaks_no_tie_between_equal_counts(seed):
    """Five stars of 13 edges each, in any order: sums of 13 times 0.3 / 65 differ with the order of summation."""
    stars = torch.tensor([[center, 5 + 13 * center + leaf] for center in range(5) for leaf in range(13)])
    shuffled = stars[torch.randperm(65, generator=torch.Generator().manual_seed(seed))]
    assert hodgecover.greedy_cover(torch.zeros(70).double(), [(shuffled, 0.3)], 5) == [0, 1, 2, 3, 4]


def test_critical_counts_are_rounded_up_and_values_up_to_the_floor_are_none():
    """3000 * 1.1 / 100 > 33 in floats; a count that is whole is not rounded up by that."""
    rising = torch.arange(1, 3001, dtype=torch.float64)
    assert [len(hodgecover.critical(rising, percent)) for percent in (0, 1.1, 1.11, 100)] == [0, 33, 34, 3000]
    for values, percent, floor, expected in (([0.0] * 10, 50, 0, []), ([0.0, 1.0, 1e-15], 100, 1e-12, [1]),
                                             ([], 50, 0, [])):
        assert hodgecover.critical(torch.tensor(values, dtype=torch.float64), percent, floor).tolist() == expected


def test_more_candidates_than_the_limit_are_sampled_by_seed():
    b, saliency = torch.arange(28, dtype=torch.float64), uniform(0, 8)
    assert len(hodgecover.candidate_triangles(b, saliency, 500, 0)) > 3
    samples = [hodgecover.candidate_triangles(b, saliency, 3, seed).tolist() for seed in (0, 1, 2, 3, 4, 5, 5)]
    assert len(set(map(str, samples))) > 1 and samples[5] == samples[6]


# --------------------------------------------------------------------------------------------------- the plan


def signals_of(barriers: torch.Tensor, candidates: torch.Tensor = NO_TRIANGLES, triplets: list[float] = ()) -> Signals:
    """Signals of as many experts as the barriers have, with saliencies that grow with the index."""
    n = round((2 * len(barriers)) ** 0.5 + 0.5)
    return Signals(torch.arange(n) + 1, (torch.arange(n) + 1) / 100, barriers.double(), candidates,
                   torch.tensor(triplets, dtype=torch.float64))


def test_tau_is_the_first_threshold_of_the_largest_betti_number():
    """The cycle 0-1-2-3 closes by 0.4 and its chord 02 enters by 0.5; the triangles fill both halves by 0.8."""
    b = torch.tensor([0.1, 0.45, 0.15, 0.25, 1.0, 0.35], dtype=torch.float64)  # 01 02 03 12 13 23
    settings, halves = Settings(order="index", thresholds=10), torch.tensor([[0, 1, 2], [0, 2, 3]])
    found = hodgecover.decompose(signals_of(b, halves, [0.75, 0.75]), settings)  # thresholds 0.1, 0.2, ..., 1.0
    assert found.betti_curve.tolist() == [0, 0, 0, 1, 2, 2, 2, 0, 0, 1]
    assert found.tau == pytest.approx(0.5) and found.triangles.tolist() == []
    fourth = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)[3].item()  # then 012 fills as soon as 02 enters
    signals = signals_of(b, halves, [fourth, 0.75])
    found = hodgecover.decompose(signals, settings)
    assert found.betti_curve.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    assert found.tau == fourth and found.triangles.tolist() == [[0, 1, 2]]  # at most tau*, whatever its edges
    said = hodgecover.plan_from_signals(signals, 2, settings)["diagnostics"]
    assert (said["triangles"], said["candidates"], said["discordance"]) == (1, 2, 0.5)  # of the candidates, 023


def test_discordance_by_hand():
    """Triangles 012, 034, 056 share no edge; all edges cost 1, but those of 056 nothing."""
    triangles = triangle_tensor([(0, 1, 2), (0, 3, 4), (0, 5, 6)])
    b = (~torch.isin(hodgecover.edges(7), torch.tensor([0, 5, 6])).all(1)).double()
    for some, triplets, fraction, quantiles in (  # 1.1 does not exceed; 0.5 / 0 is no ratio
            (slice(None), [1.1, 3.0, 0.5], 2 / 3, [1.1, 1.1 + 1.9 / 4, 1.1 + 1.9 / 2, 1.1 + 1.9 * 3 / 4, 3.0]),
            (slice(2, 3), [0.5], 1, []), (slice(0), [], 0, [])):
        found = hodgecover.plan_from_signals(signals_of(b, triangles[some], triplets), 1)["diagnostics"]
        assert found["discordance"] == pytest.approx(fraction)
        assert found["discordance_quantiles"] == pytest.approx(quantiles)


@pytest.mark.parametrize("choices", [{}, dict(lambda_edge=0.1, lambda_triangle=0.01, alpha=50.0, seed=3, thresholds=7,
                                             margin=1.0, order="random:2")], ids=["defaults", "others"])
def test_a_plan_is_what_its_parts_say(choices):
    """The plan of a layer, from its barriers and the functions of the method called one by one."""
    layer, pairs = random_layer(5, n=9), hodgecover.edges(9)
    settings = Settings(edge_percent=10, triangle_percent=20, max_triangles=12, **choices)
    plan = hodgecover.plan_layer(layer, 4, settings)
    found = plan["diagnostics"]
    saliency = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates)
    b = fast_barriers(layer, pairs)
    candidates = hodgecover.candidate_triangles(b, saliency, 12, settings.seed)
    triplets = fast_barriers(layer, candidates)
    assert plan["saliency"] == saliency.tolist() and plan["frequency"] == (layer.gates > 0).sum(0).tolist()
    assert len({*plan["saliency"]}) == 9 and sum(plan["frequency"]) == 40 * 2

    low, high = min(b.min(), triplets.min()).item(), max(b.max(), triplets.max()).item()
    thresholds = torch.linspace(low, high, settings.thresholds, dtype=torch.float64)
    d1, d2 = hodgecover.boundary_matrices(9, candidates)
    curve = mathx.betti_curve(pairs, d2, b, triplets, thresholds)
    assert found["betti_curve"] == curve.tolist() and found["tau"] == pytest.approx(thresholds[curve.argmax()].item())
    inside = triplets <= found["tau"] * (1 + 1e-9)
    triangles, triplets_in, d2 = candidates[inside], triplets[inside], d2[:, inside]
    assert found["candidates"] == len(candidates) == 12 and found["triangles"] == len(triangles)
    signs = hodgecover.edge_signs(settings.order, saliency)
    parts = hodgecover.hodge_decompose(signs * b, d1, d2)
    assert found["eta"] == pytest.approx(parts.shares())
    assert found["eta_constant"] == hodgecover.hodge_decompose(signs, d1, d2).shares()
    assert found["additive"] == pytest.approx(mathx.additive_shares(b, d1))
    worst = b[mathx.faces(9, candidates)].amax(1)
    assert found["discordance"] == (triplets > (1 + settings.margin) * worst).double().mean().item()
    assert found["discordance_quantiles"] == pytest.approx(mathx.quartiles(triplets / worst))
    assert found["betti_1"] == mathx.betti_1(d1, d2) and found["mean_barrier"] == pytest.approx(b.mean().item())
    critical = pairs[hodgecover.critical(parts.harmonic.abs(), 10)], triangles[hodgecover.critical(triplets_in, 20)]
    assert [found["critical_edges"], found["critical_triangles"]] == [simplices.tolist() for simplices in critical]
    assert len(critical[0]) == math.ceil(3.6) and len(critical[1]) == math.ceil(0.2 * len(triangles))
    families = list(zip(critical, (settings.lambda_edge, settings.lambda_triangle)))
    order = hodgecover.greedy_cover(saliency, families, 9)
    assert plan["order"] == order and plan["survivors"] == sorted(order[:4])
    assert list(found["covered_at"].values()) == [mathx.covered_at(order, simplices) for simplices in critical]
    assert plan["redirect"] == hodgecover.redirect(plan["survivors"], b, parts.harmonic, settings.alpha)
    loads = [list(plan["redirect"].values()).count(target) for target in plan["survivors"]]
    assert found["redirect_targets"] == sum(load > 0 for load in loads) and found["redirect_largest"] == max(loads)
    for name, part in parts._asdict().items():
        assert found["retained"][name] == pytest.approx(mathx.retained(part, pairs, plan["survivors"]))
    assert found["retained"]["triplet"] == mathx.retained(triplets_in, triangles, plan["survivors"])
    routed = sum(plan["frequency"][e] for e in plan["survivors"])
    assert plan["routed_share"] == pytest.approx(routed / 80) and found["audit"] is None


def test_a_selector_takes_the_place_of_the_methods():
    """Critical edges by another signal than the harmonic part; all else of the plan as before."""
    signals, settings = hodgecover.measure_layer(random_layer(1, n=9)), Settings(edge_percent=10)
    plan = hodgecover.plan_from_signals(signals, 4, settings, partial(hodgecover.select, signal=-signals.barriers))
    largest = hodgecover.edges(9)[signals.barriers.topk(4).indices.sort().values].tolist()
    assert plan["diagnostics"]["critical_edges"] == largest
    usual = hodgecover.plan_from_signals(signals, 4, settings)
    assert usual["diagnostics"]["critical_edges"] != largest
    assert usual["diagnostics"]["eta"] == plan["diagnostics"]["eta"]


def test_plans_of_fewer_survivors_nest():
    signals = hodgecover.measure_layer(random_layer(1, n=9))
    chosen = [set(hodgecover.plan_from_signals(signals, keep)["survivors"]) for keep in range(1, 10)]
    assert all(a < b for a, b in zip(chosen, chosen[1:])) and chosen[-1] == set(range(9))


def test_a_layers_line(capsys):
    plan, name = hodgecover.plan_layer(random_layer(vocab=40), 3, Settings(vocab_sample=9)), "model.layers.1"
    assert hodgecover.show_plans(Model(named("olmoe-plain")), iter([(name, plan)]), print) == {name: plan}
    bar, head, line, audit = capsys.readouterr().out.splitlines()
    found, shortfall = plan["diagnostics"], plan["diagnostics"]["audit"]
    eta, constant = (f"{found[of]['harmonic']:.3f}" for of in ("eta", "eta_constant"))
    edges, triangles = found["covered_at"].values()
    assert line.split() == ["1", eta, f"({constant})", f"{edges},", str(triangles), "3", "of", "7",
                            f"{plan['routed_share']:.1%}"]
    assert (bar, head) == ("None", hodgecover.LAYER_HEAD)
    for share in (f"{-shortfall['shortfall']:+.2%} +- {shortfall['standard_error']:.2%} from exact",
                  f"one by {shortfall['largest']:.1%}", f"rank correlation {shortfall['rank_correlation']:.4f}"):
        assert share in audit


# ------------------------------------------------------------------------------------------------ the settings


def test_the_defaults_are_those_of_the_readme():
    assert Settings() == Settings(
        readout="lens", order="saliency", edge_percent=5, triangle_percent=5, lambda_edge=1, lambda_triangle=1, alpha=1,
        max_triangles=500, vocab_sample=512, thresholds=80, margin=0.1, seed=0)


@pytest.mark.parametrize("choice, says", [
    (dict(edge_percent=101), "edge_percent 101: must be from 0 to 100"),
    (dict(alpha=math.nan), "alpha nan"), (dict(alpha=math.inf), "alpha inf: must be a finite number"),
    (dict(lambda_triangle=-1), "lambda_triangle -1"), (dict(max_triangles=-1), "max_triangles -1"),
    (dict(thresholds=1), "thresholds 1"), (dict(seed=-1), "seed -1"), (dict(vocab_sample=-1), "vocab_sample -1"),
    (dict(readout="lense"), "^readout lense: must be lens or model$"), (dict(order="random:SEED"), "order random:SEED"),
    (dict(order="random:-1"), "order random:-1: must be"), (dict(margin=-1), "margin -1"),
    (dict(order="best"), "^order best: must be saliency, index or random:SEED$"),
])
def test_wrong_settings_are_refused(choice, says):
    with pytest.raises(InputError, match=says):
        Settings(**choice)


@pytest.mark.parametrize("keep", [0, 8])
def test_keep_is_from_1_to_n(keep):
    with pytest.raises(InputError, match="from 1 to the layer's 7"):
        hodgecover.plan_layer(random_layer(), keep)


# ---------------------------------------------------------------------------------------- degenerate but right


def test_two_experts_are_a_gradient():
    found = hodgecover.plan_layer(random_layer(n=2, k=1), 1)["diagnostics"]
    assert found["eta"] == pytest.approx({"gradient": 1, "curl": 0, "harmonic": 0}, rel=1e-9, abs=1e-20)
    assert found["triangles"] == found["betti_1"] == 0
    assert found["critical_edges"] == found["critical_triangles"] == []


@pytest.mark.parametrize("value", [0.3, 1e-9, 1e9])
def test_equal_barriers(value):
    """Without triangles eta_gradient is (2/3)(n+1)/n, the additive model explains all; filled, all is gradient and
    curl."""
    n, barriers = 8, torch.full((28,), value, dtype=torch.float64)
    found = hodgecover.plan_from_signals(signals_of(barriers), 3)["diagnostics"]
    assert found["eta"]["gradient"] == pytest.approx(2 / 3 * (n + 1) / n) and found["eta"]["curl"] == 0
    assert found["additive"] == {"energy": pytest.approx(1), "variance": 1.0}
    assert found["eta"] == pytest.approx(found["eta_constant"])
    found = hodgecover.plan_from_signals(signals_of(barriers, torch.tensor(TRIPLES[8]), [value] * 56), 3)["diagnostics"]
    assert found["betti_1"] == found["discordance"] == 0 and found["eta"]["harmonic"] == pytest.approx(0, abs=1e-12)


def test_barriers_of_zero():
    """Nothing is critical, and saliency alone chooses."""
    plan = hodgecover.plan_from_signals(signals_of(torch.zeros(15), torch.tensor(TRIPLES[6]), [0.0] * 20), 2)
    found = plan["diagnostics"]
    assert found["critical_edges"] == found["critical_triangles"] == [] and plan["order"] == [5, 4, 3, 2, 1, 0]
    assert set(plan["redirect"].values()) <= {4, 5} and set(found["eta"].values()) == {0}


def test_fewer_than_three_edges_under_the_median_give_no_triangle():
    """Of three experts two edges are at most the median: a three-cycle that nothing fills."""
    b = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert len(hodgecover.candidate_triangles(b, uniform(0, 3), 500, 0)) == 0
    found = hodgecover.plan_from_signals(signals_of(b), 1)["diagnostics"]
    assert found["triangles"] == 0 and found["betti_1"] == 1


# ----------------------------------------------------------------------------------------------- the command


def plan_only(path: Path, *options: object) -> int:
    """The command on a checkpoint beside text.txt, the plan alone; later options win."""
    return run(hodgecover, path, "--keep", 4, "--calib", path.parent / "text.txt", *QUICK, "--plan-only", *options)


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_an_output_or_cache_in_the_checkpoint_is_refused_whatever_leads_there(small, monkeypatch, capsys, option):
    """A link to the checkpoint, the checkpoint as a link, `..`."""
    link, before = small.parent / "link", contents(small)
    link.symlink_to(small)
    monkeypatch.setattr(mathx, "sweep", refuse)
    for source, path in ((small, link / "new"), (link, small / "new"), (small, small / ".." / small.name / "new"),
                         (small, small / "new" / ".." / "other"), (small, link)):
        assert_refused(capsys, plan_only(source, option, path), "lies in the checkpoint, which is never written to")
    assert contents(small) == before and not (small / "new").exists()


def test_the_seed_samples_the_text(small):
    """The hash of the text in the record is that of `calibration_ids` with the seed."""
    text, model, seen = small.parent / "text.txt", Model(small), set()
    for seed in (0, 1, 2):
        assert plan_only(small, "--seed", seed, "--out", small.parent / f"{seed}.json") == 0
        said = json.loads((small.parent / f"{seed}.json").read_text())["history"][-1]["settings"]
        ids = hodgecover.calibration_ids(model, [text], 64, 32, seed)
        assert said["seed"] == seed and said["text_sha256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        seen.add(said["text_sha256"])
    assert len(seen) == 3
