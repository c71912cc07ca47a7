# SPDX-License-Identifier: MIT
"""The method: what is measured on a layer, plans against their parts called one by one, settings, degenerate input, and
what the command may write to. The paper's statements are in test_paper.py."""
import doctest
import hashlib
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from conftest import QUICK, ROOT, assert_refused, contents, named, refuse, run
from hodgecover import Settings, Signals
from model_io import Experts, InputError, Model
from strategies import (NO_TRIANGLES, SEEDS, TRIPLES, converted, fast_barriers, given, random_layer, renumbered,
                        triangle_tensor, uniform)


def test_the_docstrings_examples_hold():
    results = doctest.testmod(hodgecover)
    assert results.failed == 0 and results.attempted > 4


def test_each_file_has_its_licence_and_the_same_version():
    for module in (hodgecover, mathx, model_io):
        assert Path(module.__file__).read_text().startswith("# SPDX-License-Identifier: MIT\n")
        assert module.__version__ == hodgecover.__version__


# ------------------------------------------------------------------------------------------ what is measured


def test_reap_saliency_word_by_word():
    """The mean of g_e |E_e(x)| over the tokens of e, as a share of the layer's largest."""
    layer = random_layer(unreached=3)
    expected = torch.zeros(7).double()
    for e in range(7):
        routed = [t for t in range(40) if layer.gates[t, e] > 0]
        norms = [layer.gates[t, e] * layer.experts(e, layer.x[t: t + 1]).norm() for t in routed]
        if routed:
            expected[e] = sum(norms) / len(norms)
    saliency = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates)
    torch.testing.assert_close(saliency, expected / expected.max())
    assert saliency[3] == 0 and saliency.max() == 1
    assert hodgecover.reap_saliency(layer.experts, layer.x, layer.gates * 0).tolist() == [0] * 7


def test_the_work_tells_of_its_progress():
    seen = []
    hodgecover.measure_layer(random_layer(), Settings(), tick=seen.append)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == pytest.approx(1)
    assert min(seen) <= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_stay_as_stored_and_are_multiplied_in_the_dtype(dtype):
    """To the last bit what the widened weights give, at half of the memory or less."""
    layer = converted(random_layer(), dtype)
    stored = Experts(*(weight.bfloat16() for weight in layer.experts))
    widened = Experts(*(weight.to(dtype) for weight in stored))
    held = hodgecover.measure_layer(layer._replace(experts=stored), Settings(max_triangles=20))
    plain = hodgecover.measure_layer(layer._replace(experts=widened), Settings(max_triangles=20))
    assert all(map(torch.equal, held, plain))


def test_the_audit_foretells_the_shortfall():
    layer = random_layer(n=12, k=3, tokens=300, vocab=400)
    settings = Settings(vocab_sample=40, max_triangles=30)
    signals, exact = hodgecover.measure_layer(layer, settings), fast_barriers(layer, hodgecover.edges(12))
    audit = hodgecover.plan_from_signals(signals, 4, settings).diagnostics.audit
    truth = 1 - (signals.barriers.sum() / exact.sum()).item()
    assert audit["pairs"] == 256 and abs(audit["shortfall"] - truth) < 3 * audit["standard_error"] < 0.2


@pytest.mark.parametrize("vocab_sample", [0, 9])
def test_the_signals_of_renumbered_experts_are_the_renumbered_signals(vocab_sample):
    """Candidates among them, of which there are more than the limit; in index order the survivors can change."""
    settings = Settings(max_triangles=12, vocab_sample=vocab_sample)
    by_index, kept = Settings(edge_percent=10, lambda_edge=3, max_triangles=12), set()
    layer = random_layer(3, n=10)
    signals = hodgecover.measure_layer(layer, settings)
    for seed in range(6):
        old = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        experts = Experts(*(weight[old] for weight in layer.experts))
        moved = layer._replace(experts=experts, gates=layer.gates[:, old])
        expected = renumbered(signals, old.argsort())
        for of_moved, of_layer in zip(hodgecover.measure_layer(moved, settings), expected[:-1]):
            torch.testing.assert_close(of_moved, of_layer, rtol=1e-9, atol=1e-15)
        survivors = hodgecover.plan_layer(moved, 5, by_index).survivors
        kept.add(tuple(old[survivors].sort().values.tolist()))
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
    layer = converted(layer._replace(unembedding=layer.unembedding * scale), dtype)
    found = hodgecover.measure_layer(layer, Settings(vocab_sample=vocab_sample))
    for barriers in (found.barriers, found.triplets):
        assert barriers.isfinite().all() and (barriers >= 0).all()


def test_nan_in_an_expert_is_an_error_not_a_plan():
    layer = random_layer()
    layer.experts.down[4, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        hodgecover.plan_layer(layer, 3)


@pytest.mark.parametrize("settings", [Settings(seed=1), Settings(max_triangles=3), Settings(vocab_sample=9)])
def test_what_is_measured_depends_on_the_settings_that_say_so(settings):
    """The seed, if something is drawn: of 20 outcomes of 30, or of 12 candidate triangles."""
    layer, drawn = random_layer(n=9), dict(vocab_sample=20, max_triangles=12)
    usual = hodgecover.measure_layer(layer, Settings(**drawn))
    changed = {name: getattr(settings, name) for name in hodgecover.MEASURED
               if getattr(settings, name) != getattr(Settings(), name)}
    other = hodgecover.measure_layer(layer, Settings(**drawn | changed))
    assert len(changed) == 1
    assert not all(map(torch.equal, usual, other))
    assert torch.equal(usual.saliency, other.saliency)


# --------------------------------------------------------------------------------------------------- complexes


def test_all_triangles_of_12_vertices_fill_every_cycle():
    """A complete 2-complex has no cycle left, rank d2 = C(11, 2), whatever the order of its 220 triangles; at first it
    has none to fill."""
    triangles = torch.combinations(torch.arange(12), 3)
    shuffled = triangles[torch.randperm(len(triangles), generator=torch.Generator().manual_seed(0))]
    assert hodgecover.betti_1(*hodgecover.boundary_matrices(12, shuffled)) == 0
    ranks = hodgecover.betti_curve(torch.zeros(66), shuffled, torch.arange(220) + 1.0, torch.tensor([0.0, 220.0]))
    assert ranks.tolist() == [55, 0]


@pytest.mark.parametrize("n", [2, 3, 7, 64, 256])
def test_a_table_of_pairs_holds_each_pair_twice(n):
    values = torch.arange(math.comb(n, 2)) + 1
    table, (i, j) = hodgecover.table_of_pairs(values), hodgecover.edges(n).T
    assert table.shape == (n, n) and not table.diagonal().any()
    assert torch.equal(table[i, j], values) and torch.equal(table[j, i], values)


LAYER_OF_256 = """
import math, hodgecover, mathx, torch
from tests.peak import peak_memory
before = peak_memory()  # a CUDA build of torch takes 650 MB by its import alone
n, generator = 256, torch.Generator().manual_seed(0)
b, saliency, triplets = (torch.rand(size, generator=generator, dtype=torch.float64)
                         for size in (math.comb(n, 2), n, 500))
triangles = hodgecover.candidate_triangles(b, saliency, 500, 0)
complex_ = hodgecover.decompose(hodgecover.Signals(saliency, saliency, b, triangles, triplets))
mathx.additive_shares(b, complex_.d1)
assert hodgecover.betti_1(complex_.d1, complex_.d2) > 0
assert len(complex_.betti_curve) == 80 and complex_.parts.harmonic.norm() > 0
print(peak_memory() - before)
"""


def test_256_experts_take_under_750_megabytes():
    """32,640 edges, 80 Betti numbers, 500 triangles; an E x E matrix alone would be 8.5 GB."""
    done = subprocess.run([sys.executable, "-c", LAYER_OF_256], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 7.5e8


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


def test_tau_is_the_last_threshold_of_the_largest_betti_number():
    """The cycle 0-1-2-3 closes at 0.35 and its chord 02 enters at 0.45; the triangles fill both halves by 0.75. So
    beta_1 is 2 from 0.5 to 0.7: tau* is 0.7, where 13 is not in yet. Thresholds are 0, 0.1, ..., 1.1."""
    b = torch.tensor([0.1, 0.45, 0.15, 0.25, 1.0, 0.35], dtype=torch.float64)  # 01 02 03 12 13 23
    settings, halves = Settings(thresholds=12), torch.tensor([[0, 1, 2], [0, 2, 3]])
    complex_ = hodgecover.decompose(signals_of(b, halves, [0.75, 0.75]), settings)
    assert complex_.betti_curve.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 0, 0, 1, 1]
    assert complex_.tau == pytest.approx(0.7) and complex_.triangles.tolist() == []
    signals = signals_of(b, halves, [0.3, 0.75])  # 012 fills as soon as 02 enters
    complex_ = hodgecover.decompose(signals, settings)
    assert complex_.betti_curve.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    assert complex_.tau == pytest.approx(1.1) and complex_.triangles.tolist() == halves.tolist()
    report = hodgecover.plan_from_signals(signals, 2, settings).diagnostics
    assert (report.triangles, report.candidates, report.discordance) == (2, 2, 0.5)  # 023
    signals = signals_of(b, halves, [0.3, 1.2])  # 023 is dearer than the last threshold
    report = hodgecover.plan_from_signals(signals, 2, settings).diagnostics
    assert (report.triangles, report.candidates, report.discordance) == (1, 2, 0.5)  # of the candidates


def test_discordance_by_hand():
    """Triangles 012, 034, 056 share no edge; all edges cost 1, but those of 056 nothing."""
    triangles = triangle_tensor([(0, 1, 2), (0, 3, 4), (0, 5, 6)])
    b = (~torch.isin(hodgecover.edges(7), torch.tensor([0, 5, 6])).all(1)).double()
    for some, triplets, share in (  # 1.2 does not exceed, 0.5 exceeds 0
            (slice(None), [1.2, 3.0, 0.5], 2 / 3), (slice(2, 3), [0.5], 1), (slice(0), [], 0)):
        report = hodgecover.plan_from_signals(signals_of(b, triangles[some], triplets), 1).diagnostics
        assert report.discordance == pytest.approx(share)


OTHERS = dict(lambda_edge=0.1, lambda_triangle=0.01, alpha=50.0, seed=3, thresholds=7, margin=1.0, order="random:2")


@pytest.fixture(params=[{}, OTHERS], ids=["defaults", "others"])
def planned(request):
    """A layer of 9 experts, top-2, on 40 tokens; settings; its plan for 4."""
    layer = random_layer(5, n=9)
    settings = Settings(edge_percent=10, triangle_percent=20, max_triangles=12, **request.param)
    return layer, settings, hodgecover.plan_layer(layer, 4, settings)


def signals_by_parts(layer: hodgecover.MoELayer, settings: Settings) -> Signals:
    """What is measured on a layer, function by function."""
    saliency = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates)
    b = fast_barriers(layer, hodgecover.edges(9))
    candidates = hodgecover.candidate_triangles(b, saliency, settings.max_triangles, settings.seed)
    return Signals((layer.gates > 0).sum(0), saliency, b, candidates, fast_barriers(layer, candidates))


def test_a_plans_complex_is_what_its_parts_say(planned):
    layer, settings, plan = planned
    signals, report = signals_by_parts(layer, settings), plan.diagnostics
    b, triplets = signals.barriers, signals.triplets
    assert torch.equal(plan.saliency, signals.saliency) and torch.equal(plan.frequency, signals.frequency)
    assert len(set(plan.saliency.tolist())) == 9 and plan.frequency.sum() == 40 * 2
    taus = torch.linspace(0, 1.1 * b.max().item(), settings.thresholds, dtype=torch.float64)
    curve = hodgecover.betti_curve(b, signals.candidates, triplets, taus)
    assert torch.equal(report.betti_curve, curve) and report.tau == taus[curve == curve.max()].max()
    complex_ = hodgecover.decompose(signals, settings)
    signs = hodgecover.edge_signs(settings.order, signals.saliency)
    assert report.candidates == len(triplets) == 12 and report.triangles == len(complex_.triangles)
    d1, d2 = hodgecover.boundary_matrices(9, complex_.triangles)
    assert report.eta == pytest.approx(hodgecover.hodge_decompose(signs * b, d1, d2).shares())
    assert report.eta_constant == hodgecover.hodge_decompose(signs, d1, d2).shares()
    assert report.additive == pytest.approx(mathx.additive_shares(b, d1))
    assert report.betti_1 == hodgecover.betti_1(d1, d2) and report.mean_barrier == pytest.approx(b.mean().item())
    worst = b[hodgecover.faces(9, signals.candidates)].amax(1)
    assert report.discordance == (triplets > (1 + settings.margin) * worst).double().mean().item()


def test_a_plans_selection_is_what_its_parts_say(planned):
    layer, settings, plan = planned
    signals, report = signals_by_parts(layer, settings), plan.diagnostics
    complex_, pairs = hodgecover.decompose(signals, settings), hodgecover.edges(9)
    critical_edges = pairs[hodgecover.critical(complex_.parts.harmonic.abs(), 10)]
    critical_triangles = complex_.triangles[hodgecover.critical(complex_.triplets, 20)]
    assert torch.equal(report.critical_edges, critical_edges) and len(critical_edges) == math.ceil(3.6)
    assert torch.equal(report.critical_triangles, critical_triangles)
    assert len(critical_triangles) == math.ceil(0.2 * len(complex_.triangles)) > 0
    families = [(critical_edges, settings.lambda_edge), (critical_triangles, settings.lambda_triangle)]
    order = hodgecover.greedy_cover(signals.saliency, families, 9)
    assert plan.order == order and plan.survivors == sorted(order[:4])
    assert report.covered_at == {"edges": mathx.covered_at(order, critical_edges),
                                 "triangles": mathx.covered_at(order, critical_triangles)}
    harmonic = complex_.parts.harmonic
    assert plan.redirect == hodgecover.redirect(plan.survivors, signals.barriers, harmonic, settings.alpha)
    targets = list(plan.redirect.values())
    loads = [targets.count(target) for target in plan.survivors]
    assert report.redirect_targets == sum(load > 0 for load in loads) and report.redirect_largest == max(loads)
    for name, part in complex_.parts._asdict().items():
        assert report.retained[name] == hodgecover.retained_mass(part, pairs, plan.survivors)
    triplet = hodgecover.retained_mass(complex_.triplets, complex_.triangles, plan.survivors)
    assert report.retained["triplet"] == triplet
    routed = plan.frequency[plan.survivors].sum().item()
    assert plan.routed_share == pytest.approx(routed / 80) and report.audit is None


def test_a_selector_takes_the_place_of_the_methods():
    """Critical edges by another signal than the harmonic part; all else of the plan as before."""
    signals, settings = hodgecover.measure_layer(random_layer(1, n=9)), Settings(edge_percent=10)
    by_barriers = partial(hodgecover.select, signal=-signals.barriers)
    report = hodgecover.plan_from_signals(signals, 4, settings, by_barriers).diagnostics
    largest = hodgecover.edges(9)[signals.barriers.topk(4).indices.sort().values]
    assert torch.equal(report.critical_edges, largest)
    usual = hodgecover.plan_from_signals(signals, 4, settings).diagnostics
    assert not torch.equal(usual.critical_edges, largest) and usual.eta == report.eta


def test_plans_of_fewer_survivors_nest():
    signals = hodgecover.measure_layer(random_layer(1, n=9))
    chosen = [set(hodgecover.plan_from_signals(signals, keep).survivors) for keep in range(1, 10)]
    assert all(a < b for a, b in zip(chosen, chosen[1:])) and chosen[-1] == set(range(9))


def test_a_layers_line(capsys):
    plan, name = hodgecover.plan_layer(random_layer(vocab=40), 3, Settings(vocab_sample=9)), "model.layers.1"
    shown = hodgecover.show_plans(Model(named("olmoe-plain")), iter([(name, plan)]), print)
    assert list(shown) == [name] and shown[name] is plan
    bar, head, line, of_audit = capsys.readouterr().out.splitlines()
    report, audit = plan.diagnostics, plan.diagnostics.audit
    eta, constant = (f"{shares['harmonic']:.3f}" for shares in (report.eta, report.eta_constant))
    edges, triangles = report.covered_at["edges"], report.covered_at["triangles"]
    assert line.split() == ["1", eta, f"({constant})", f"{edges},", str(triangles), "3", "of", "7",
                            f"{plan.routed_share:.1%}"]
    assert (bar, head) == ("None", hodgecover.LAYER_HEAD)
    for share in (f"{-audit['shortfall']:+.2%} +- {audit['standard_error']:.2%} from exact",
                  f"one by {audit['largest']:.1%}", f"rank correlation {audit['rank_correlation']:.4f}"):
        assert share in of_audit


# ------------------------------------------------------------------------------------------------ the settings


def test_the_defaults_are_the_papers():
    """C.1, A.9, A.11, equation 9; but for the outcomes, which are ours."""
    assert Settings() == Settings(
        edge_percent=20, triangle_percent=20, lambda_edge=1, lambda_triangle=0.5, alpha=3, max_triangles=500,
        thresholds=80, order="index", margin=0.2, seed=42, vocab_sample=512)


@pytest.mark.parametrize("choice, says", [
    (dict(edge_percent=101), "edge_percent 101: must be from 0 to 100"),
    (dict(alpha=math.nan), "alpha nan"), (dict(alpha=math.inf), "alpha inf: must be a finite number"),
    (dict(lambda_triangle=-1), "lambda_triangle -1"), (dict(max_triangles=-1), "max_triangles -1"),
    (dict(thresholds=1), "thresholds 1"), (dict(seed=-1), "seed -1"), (dict(vocab_sample=-1), "vocab_sample -1"),
    (dict(vocab_sample=1), "vocab_sample 1: must be 0 or 2 and more"),
    (dict(seed=2**63), "seed 9223372036854775808"),
    (dict(order="random:SEED"), "order random:SEED"), (dict(order="index "), "order index : must be"),
    (dict(order="random:-1"), "order random:-1: must be"), (dict(margin=-1), "margin -1"),
    (dict(order="best"), "^order best: must be index, saliency or random:SEED$"),
])
def test_settings_out_of_range_are_refused(choice, says):
    with pytest.raises(InputError, match=says):
        Settings(**choice)


@pytest.mark.parametrize("choice", [
    dict(seed=1.5), dict(seed=True), dict(seed="42"), dict(seed=None), dict(thresholds=80.0), dict(max_triangles=[1]),
    dict(vocab_sample=True), dict(alpha="3"), dict(alpha=None), dict(alpha=True), dict(margin=[0.2]),
    dict(edge_percent="20"), dict(order=3), dict(order=None), dict(order=True)], ids=str)
def test_settings_of_another_type_are_refused(choice):
    (name, value), = choice.items()
    with pytest.raises(InputError, match=f"^{name} "):
        Settings(**choice)


def test_whole_numbers_are_real_numbers():
    assert Settings(alpha=3, edge_percent=20) == Settings()


def test_there_is_no_readout():
    with pytest.raises(TypeError, match="readout"):
        Settings(readout="lens")


@pytest.mark.parametrize("keep", [0, 8])
def test_keep_is_from_1_to_n(keep):
    with pytest.raises(InputError, match="from 1 to the layer's 7"):
        hodgecover.plan_layer(random_layer(), keep)


# ---------------------------------------------------------------------------------------- degenerate but right


def test_two_experts_are_a_gradient():
    report = hodgecover.plan_layer(random_layer(n=2, k=1), 1).diagnostics
    assert report.eta == pytest.approx({"gradient": 1, "curl": 0, "harmonic": 0}, rel=1e-9, abs=1e-20)
    assert report.triangles == report.betti_1 == 0
    assert len(report.critical_edges) == len(report.critical_triangles) == 0


def test_one_expert_is_refused():
    with pytest.raises(InputError, match="of which there must be two"):
        hodgecover.plan_from_signals(signals_of(torch.empty(0)), 1)


@pytest.mark.parametrize("value", [0.3, 1e-9, 1e9])
def test_equal_barriers(value):
    """Without triangles eta_gradient is (2/3)(n+1)/n, the additive model explains all; filled, all is gradient and
    curl."""
    n, barriers = 8, torch.full((28,), value, dtype=torch.float64)
    report = hodgecover.plan_from_signals(signals_of(barriers), 3).diagnostics
    assert report.eta["gradient"] == pytest.approx(2 / 3 * (n + 1) / n) and report.eta["curl"] == 0
    assert report.additive == {"energy": pytest.approx(1), "variance": 1.0}
    assert report.eta == pytest.approx(report.eta_constant)
    complex_ = hodgecover.decompose(signals_of(barriers, torch.tensor(TRIPLES[8]), [value] * 56))
    assert complex_.betti_curve.max() == 0 and complex_.parts.shares()["harmonic"] == pytest.approx(0, abs=1e-12)


def test_barriers_of_zero():
    """Nothing is critical, and saliency alone chooses."""
    plan = hodgecover.plan_from_signals(signals_of(torch.zeros(15), torch.tensor(TRIPLES[6]), [0.0] * 20), 2)
    report = plan.diagnostics
    assert len(report.critical_edges) == len(report.critical_triangles) == 0
    assert plan.order == [5, 4, 3, 2, 1, 0]
    assert set(plan.redirect.values()) <= {4, 5} and set(report.eta.values()) == {0}
    assert report.retained == {"gradient": 0, "curl": 0, "harmonic": 0, "triplet": 0}


def test_rounding_elects_no_edge_of_a_signal_without_a_harmonic_part():
    """A potential's barriers are a gradient; the harmonic part is rounding error."""
    pairs = hodgecover.edges(8)
    potential = torch.arange(8).double() ** 2 / 7
    signals = signals_of(potential[pairs].diff().squeeze(1))
    report = hodgecover.plan_from_signals(signals, 3).diagnostics
    assert report.eta["harmonic"] < 1e-20 and len(report.critical_edges) == 0


def test_fewer_than_three_edges_under_the_median_give_no_triangle():
    """Of three experts two edges are at most the median: a three-cycle that nothing fills."""
    b = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert len(hodgecover.candidate_triangles(b, uniform(0, 3), 500, 0)) == 0
    report = hodgecover.plan_from_signals(signals_of(b), 1).diagnostics
    assert report.triangles == 0 and report.betti_1 == 1


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
        ids = model_io.calibration_ids(model, [text], 64, 32, seed)
        assert said["seed"] == seed and said["text_sha256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        seen.add(said["text_sha256"])
    assert len(seen) == 3
