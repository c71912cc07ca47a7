# SPDX-License-Identifier: MIT
"""The methods that HodgeCover is compared with: each by its own rule, the clustering by brute force, the command."""
import doctest
import itertools
import json
from dataclasses import replace

import baselines
import hodgecover
import mathx
import model_io
import pytest
import torch
from conftest import KINDS, QUICK, assert_refused, contents, named, record, refuse, run
from fake_device import Accelerator
from hodgecover import Settings, Signals
from hypothesis import given, settings
from hypothesis import strategies as st
from model_io import InputError, Model
from safetensors.torch import load_file
from strategies import cover_problems

PLAIN = named("olmoe-plain")
WIDE = Settings(max_triangles=20, edge_percent=15, triangle_percent=15)


@pytest.fixture(scope="module")
def measured() -> tuple[Model, torch.Tensor, hodgecover.Signals]:
    """A golden model of 8 experts, its text, and the signals of its first layer."""
    model = Model(PLAIN, torch.float64)
    ids = load_file(PLAIN / "golden.safetensors")["ids"]
    return model, ids, next(hodgecover.measure_model(model, ids, WIDE, [0]))[1]


@pytest.fixture(scope="module")
def facts(measured) -> baselines.Facts:
    """The facts of the first layer."""
    model, ids, _ = measured
    return baselines.layer_facts(next(model.stream(ids)))


def top(score) -> list[int]:
    """Experts in descending score, ties to the lowest."""
    return sorted(range(len(score)), key=lambda e: (-score[e], e))


def rows_of(model: Model, layer: int) -> torch.Tensor:
    return model.checkpoint.load(f"{model.layer_names[layer]}.mlp.gate.weight")


# ------------------------------------------------------------------------------------------------------- selectors

def order_of(measured, method: str, **choices) -> list[int]:
    model, ids, signals = measured
    if method not in (*baselines.ON_BARRIERS, *baselines.RECORDED):
        signals = baselines.measure_routing(next(model.stream(ids)))
    chosen = Settings(**{"max_triangles": 20, "edge_percent": 15, "triangle_percent": 15} | choices)
    return baselines.choose(signals, rows_of(model, 0), method, 4, chosen).order


def test_scores_rank_the_experts(measured):
    signals = measured[2]
    assert order_of(measured, "reap") == top(signals.saliency.tolist())
    assert order_of(measured, "frequency") == top(signals.frequency.tolist())


def test_equal_scores_go_to_the_lowest_expert(measured):
    signals = measured[2]
    equal = signals._replace(frequency=torch.ones(8, dtype=torch.int64))
    assert baselines.choose(equal, torch.eye(8), "frequency", 4, WIDE).order == list(range(8))
    for method in ("man", "msan", "aimer"):
        routing = baselines.Routing(signals.frequency, signals.saliency)._replace(**{method: torch.ones(8)})
        assert baselines.choose(routing, torch.eye(8), method, 4).order == list(range(8))


def test_norms_token_by_token(measured):
    """The norm alone, whatever the gate; an expert that no token is routed to has 0."""
    model, ids, _ = measured
    step = next(model.stream(ids))
    step = step._replace(gates=step.gates.index_fill(1, torch.tensor([2]), 0.0))
    norms = [[torch.linalg.vector_norm(step.layer.experts(e, step.x[t:t + 1])).item() for t in range(len(step.x))
              if step.gates[t, e] > 0] for e in range(8)]
    found = baselines.measure_routing(step)
    assert not norms[2] and found.man[2] == found.msan[2] == 0
    assert found.man.tolist() == pytest.approx([sum(own) / max(1, len(own)) for own in norms])
    assert found.msan.tolist() == pytest.approx([sum(norm**2 for norm in own) / max(1, len(own)) for own in norms])
    for method, score in (("man", found.man), ("msan", found.msan)):
        assert baselines.choose(found, rows_of(model, 0), method, 4).order == top(score.tolist())


def test_aimer_by_hand():
    """All of an expert's weights are one vector, here of 6; zeros count as equally large, and ties keep the lower."""
    gate = torch.tensor([[1, -1], [6, 0], [0, 0], [3, 0]])[:, None]
    up, down = torch.tensor([[1, 1], [0, 0], [0, 0], [0, -4]])[:, None], torch.tensor([[1, -1], [0, 0], [0, 0], [0, 0]])
    experts = model_io.Experts(gate.bfloat16(), up.bfloat16(), down.bfloat16()[:, :, None])
    scores = baselines.flatness(experts)
    assert scores.tolist() == pytest.approx([1, 6**-0.5, 1, 7 / 5 * 6**-0.5])
    routing = baselines.Routing(torch.ones(4), torch.ones(4), aimer=scores)
    assert baselines.choose(routing, torch.eye(4), "aimer", 2).order == [1, 3, 0, 2]


def test_random_differs_by_seed_and_by_layer(measured):
    model, ids, signals = measured
    orders = [baselines.choose(signals, rows_of(model, 0), "random", 4, Settings(seed=seed), layer).order
              for seed, layer in ((42, 0), (42, 1), (43, 0), (5, 0))]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[1] == orders[2] and len({*map(tuple, orders)}) == 3  # of seed + layer
    assert [plan.order for _, plan in baselines.select_model(model, ids, "random", 4)] == orders[:2]


def test_covers_differ_in_their_critical_edges(measured):
    """Against a cover of the edges that each method names, found here by sorting."""
    model, _, signals = measured
    complex_ = hodgecover.decompose(signals, WIDE)
    edges = hodgecover.edges(8)
    count = 5  # 15% of 28, rounded up
    signal = {"hodge-no-triangle": complex_.parts.harmonic,
              "additive-residual": mathx.additive_residual(signals.barriers, complex_.d1)}
    triangles = critical_triangles(complex_)
    for method, values in signal.items():
        plan = baselines.choose(signals, rows_of(model, 0), method, 4, WIDE)
        critical = edges[sorted(top(values.abs().tolist())[:count])]
        families = [(critical, 1.0)]
        if method == "additive-residual":
            families.append((triangles, WIDE.lambda_triangle))
        assert plan.order == hodgecover.greedy_cover(signals.saliency, families, 8)
        assert plan.diagnostics.critical_edges.tolist() == critical.tolist()
        assert plan.diagnostics.critical_triangles.tolist() == triangles.tolist()


def critical_triangles(complex_: hodgecover.Complex) -> torch.Tensor:
    """The top 15% of the triangles, found by sorting."""
    ranked = top(complex_.triplets.tolist())
    return complex_.triangles[sorted(ranked[:-(-len(ranked) * 15 // 100)])]


def test_hodge_no_triangle_differs_from_hodgecover_by_lambda_alone(measured):
    """With all that its report says; and here lambda makes a difference, to the order alone."""
    model, _, signals = measured
    chosen = replace(WIDE, lambda_edge=0.0, lambda_triangle=5.0)
    plan = baselines.choose(signals, rows_of(model, 0), "hodge-no-triangle", 4, chosen)
    paper = hodgecover.plan_from_signals(signals, 4, chosen)
    without = hodgecover.plan_from_signals(signals, 4, replace(chosen, lambda_triangle=0.0))
    assert str(plan) == str(without)
    assert plan.order != paper.order
    for name in ("critical_edges", "critical_triangles", "betti_curve"):
        assert torch.equal(getattr(plan.diagnostics, name), getattr(paper.diagnostics, name))
    assert plan.diagnostics.eta == paper.diagnostics.eta and plan.diagnostics.tau == paper.diagnostics.tau


def test_selectors_are_no_synonyms(measured):
    orders = {method: tuple(order_of(measured, method)) for method in baselines.SELECTORS}
    assert len({*orders.values()}) >= 5, orders
    assert orders["hodge-no-triangle"] != orders["additive-residual"]


@pytest.mark.parametrize("method", baselines.ON_BARRIERS)
def test_on_barriers_the_redirect_is_the_paper_s(measured, method):
    """And is by expert: argmin over survivors of b_ij (1 + alpha |b_harm,ij| / |b|), here without the factor."""
    model, _, signals = measured
    plan = baselines.choose(signals, rows_of(model, 0), method, 4, Settings(max_triangles=20, alpha=0.0))
    b = {tuple(pair): value for pair, value in zip(hodgecover.edges(8).tolist(), signals.barriers.tolist())}
    kept, redirect = plan.survivors, plan.redirect
    assert redirect == {i: min(kept, key=lambda j: b[min(i, j), max(i, j)]) for i in range(8) if i not in kept}
    assert kept == sorted(plan.order[:4])
    assert plan.diagnostics.redirect_targets == len({*redirect.values()})
    harmonic = baselines.choose(signals, rows_of(model, 0), method, 4, Settings(max_triangles=20, alpha=1e6))
    assert harmonic.order == plan.order


def test_the_residual_s_critical_edges_know_no_order(measured):
    model, _, signals = measured
    for method, count in (("additive-residual", 1), ("hodge-no-triangle", 4)):
        sets = set()
        for order in ("saliency", "index", "random:1", "random:2"):
            plan = baselines.choose(signals, rows_of(model, 0), method, 4, replace(WIDE, order=order))
            sets.add(str(plan.diagnostics.critical_edges.tolist()))
        assert len(sets) == count, method


def cost_of(joint: torch.Tensor, dropped) -> float:
    """p'Fp."""
    return sum(joint[i, j].item() for i in dropped for j in dropped)


def test_hope_s_matrix_token_by_token(measured):
    """Off the diagonal over the tokens routed to both; on it REAP's own mean, squared, so that the diagonal alone ranks
    as REAP does."""
    model, ids, _ = measured
    step = next(model.stream(ids))
    joint, found = baselines.joint_norms(step.gates, baselines.output_norms(step)), baselines.measure_routing(step)
    assert torch.equal(found.joint, joint)
    norms = torch.stack([step.gates[:, e] * step.layer.experts(e, step.x).norm(dim=1) for e in range(8)], dim=1)
    for i, j in itertools.product(range(8), repeat=2):
        both = [t for t in range(len(step.x)) if step.gates[t, i] > 0 and step.gates[t, j] > 0]
        mean = sum((norms[t, i] * norms[t, j]).item() for t in both) / max(1, len(both))
        if i == j:
            mean = (sum(norms[t, i].item() for t in both) / len(both)) ** 2
        assert joint[i, j].item() == pytest.approx(mean, rel=1e-10)
    alone = torch.diag(joint.diagonal())
    for keep in (3, 5):
        kept = baselines.hope_order(baselines.Routing(found.frequency, found.saliency, alone), keep)
        assert kept == order_of(measured, "reap")
    idle = step._replace(gates=step.gates.index_fill(1, torch.tensor([2]), 0.0))
    found = baselines.measure_routing(idle).joint
    assert not found[2].any() and not found[:, 2].any() and found.isfinite().all()


def products(seed: int, n: int) -> torch.Tensor:
    """A matrix like hope's, of 20 tokens."""
    norms = torch.rand(20, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3)
    return norms.T @ norms


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(3, 8), st.data())
def test_hope_s_search_is_no_worse_than_greedy_and_leaves_no_swap_that_helps(seed, n, data):
    count = data.draw(st.integers(0, n))
    joint = products(seed, n)
    found = baselines.least_joint(joint, count)
    assert len({*found}) == count and found == sorted(found)
    greedy = []
    for _ in range(count):
        greedy.append(min({*range(n)} - {*greedy}, key=lambda e: cost_of(joint, [*greedy, e])))
    cost = cost_of(joint, found)
    assert baselines.greedy_joint(joint, count) == greedy and cost <= cost_of(joint, greedy) + 1e-9
    for i, j in itertools.product(found, {*range(n)} - {*found}):
        assert cost_of(joint, {*found} - {i} | {j}) >= cost - 1e-9


def test_hope_s_search_finds_the_best_of_all_sets():
    """A local optimum need not be the best one; of these 60 problems it always is."""
    for seed in range(60):
        joint = products(seed, 8)
        least = min(cost_of(joint, some) for some in itertools.combinations(range(8), 4))
        assert cost_of(joint, baselines.least_joint(joint, 4)) == pytest.approx(least, rel=1e-9)


def test_a_swap_mends_what_greedy_cannot():
    """Greedy takes 0, the cheapest alone; the pair 1, 2 costs less than any with it."""
    joint = torch.tensor([[1.0, 5.0, 5.0], [5.0, 2.0, 0.0], [5.0, 0.0, 2.0]])
    assert baselines.least_joint(joint, 1) == [0] and baselines.least_joint(joint, 2) == [1, 2]


def test_hope_keeps_what_its_search_leaves(measured):
    facts = baselines.measure_routing(next(measured[0].stream(measured[1])), "hope")
    for keep in (3, 4, 8):
        plan = baselines.choose(facts, rows_of(measured[0], 0), "hope", keep, WIDE)
        dropped = baselines.least_joint(facts.joint, 8 - keep)
        assert plan.survivors == [e for e in range(8) if e not in dropped]
        saliency = facts.saliency.tolist()
        assert plan.order[:keep] == sorted(plan.survivors, key=lambda e: -saliency[e])
        assert sorted(plan.order) == list(range(8)) and sorted(plan.redirect) == dropped


@settings(max_examples=30)
@given(cover_problems(), st.integers(0, 10**6))
def test_weighted_greedy_takes_the_largest_gain(problem, seed):
    """Each pick against the gains of Phi itself: saliency and the weights of all simplices with a vertex in S."""
    saliency, families = problem
    generator = torch.Generator().manual_seed(seed)
    weighted = [(simplices, torch.rand(len(simplices), generator=generator, dtype=torch.float64))
                for simplices, _ in families]

    def phi(chosen: list[int]) -> float:
        covered = sum(weight for simplices, weights in weighted
                      for simplex, weight in zip(simplices.tolist(), weights.tolist()) if {*simplex} & {*chosen})
        return sum(saliency[v].item() for v in chosen) + covered
    picks = baselines.greedy_weights(saliency, weighted)
    assert sorted(picks) == list(range(len(saliency)))
    for size, pick in enumerate(picks):
        gains = {v: phi([*picks[:size], v]) for v in range(len(saliency)) if v not in picks[:size]}
        assert gains[pick] >= max(gains.values()) - 1e-12


def test_weighted_cover_weighs_each_edge_by_its_barrier(measured):
    """Of HodgeCover's Phi the edges' term alone is another: sum of b over covered edges / sum of b."""
    signals = measured[2]
    complex_ = hodgecover.decompose(signals, WIDE)
    edges, b, saliency = hodgecover.edges(8).tolist(), signals.barriers.tolist(), signals.saliency.tolist()
    triangles = critical_triangles(complex_).tolist()
    for lambda_edge, lambda_triangle in ((1.0, 1.0), (3.0, 0.0), (0.0, 2.0), (0.0, 0.1), (0.0, 0.2), (0.3, 0.1)):
        chosen = Settings(max_triangles=20, edge_percent=15, triangle_percent=15, lambda_edge=lambda_edge,
                          lambda_triangle=lambda_triangle)

        def phi(some: list[int]) -> float:
            edge_term = sum(weight for pair, weight in zip(edges, b) if {*pair} & {*some}) / sum(b)
            triangle_term = sum(bool({*triangle} & {*some}) for triangle in triangles) / len(triangles)
            return sum(saliency[v] for v in some) + lambda_edge * edge_term + lambda_triangle * triangle_term
        picks, _, _ = baselines.weighted_cover(signals, complex_, chosen)
        for size, pick in enumerate(picks):
            gains = [phi([*picks[:size], v]) for v in range(8) if v not in picks[:size]]
            assert phi(picks[:size + 1]) >= max(gains) - 1e-12


def test_nearest_rows_are_by_cosine():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0], [0.1, 0.3]])
    assert baselines.nearest_rows(rows, [1, 0]) == {2: 0, 3: 1}
    assert baselines.nearest_rows(torch.tensor([[1.0, 0.0], [0.0, 9.0], [1.0, 0.5]]), [0, 1]) == {2: 0}
    assert baselines.nearest_rows(torch.ones(3, 2), [2, 0]) == {1: 0}  # a tie


# ------------------------------------------------------------------------------------------- ablations that merge

def signals_by_hand(n: int, barriers: dict[str, float], triplets: dict[str, float],
                    frequency: list[int] | None = None) -> Signals:
    """Signals of n experts: barriers of pairs such as "01", 9 of all others, and of triples."""
    pairs = ["".join(pair) for pair in itertools.combinations("012345"[:n], 2)]
    b = torch.tensor([barriers.get(pair, 9.0) for pair in pairs], dtype=torch.float64)
    candidates = torch.tensor([[*map(int, triple)] for triple in triplets], dtype=torch.int64).reshape(-1, 3)
    values = torch.tensor([*triplets.values()], dtype=torch.float64)
    return Signals(torch.tensor(frequency or [1] * n), torch.ones(n, dtype=torch.float64), b, candidates, values)


BY_HAND = {"01": 1, "12": 2, "34": 3, "35": 4, "25": 4.75}


def test_the_ablations_by_hand():
    """Costs: 1, 2, 3, then 3 experts short of 6 are joined. The mean of the triplets is 2, p is 1.5 on the edges of 012
    and 0.5 on those of 345: the edges cost 2.5, 5, 4.5, 6 and 4.75. The veto is on 012, so that 12 is passed over."""
    signals = signals_by_hand(6, BY_HAND, {"012": 3, "345": 1})
    assert len(hodgecover.decompose(signals).triangles) == 2
    groups = {method: baselines.MERGING[method](signals, 3)[0] for method in baselines.MERGING_ON_BARRIERS}
    assert groups == {"greedy-barrier": [[0, 1, 2], [3, 4], [5]],
                      "triplet-penalty": [[0, 1], [2, 5], [3, 4]],
                      "triplet-hypergraph": [[0, 1], [2], [3, 4, 5]]}


def test_the_ablations_take_only_the_triangles_in_t():
    """012 is a candidate, but enters K after tau*: it neither weighs nor forbids. p is 1 on the edges of 345, which
    cost 6 and 8."""
    signals = signals_by_hand(6, BY_HAND, {"012": 30, "345": 1})
    assert hodgecover.decompose(signals).triangles.tolist() == [[3, 4, 5]]
    assert baselines.MERGING["triplet-penalty"](signals, 3)[0] == [[0, 1, 2, 5], [3], [4]]
    assert baselines.MERGING["triplet-hypergraph"](signals, 3)[0] == [[0, 1, 2], [3, 4], [5]]


def test_without_triangles_all_is_by_barriers():
    signals = signals_by_hand(6, BY_HAND, {})
    for method in baselines.MERGING_ON_BARRIERS:
        assert baselines.MERGING[method](signals, 3)[0] == [[0, 1, 2], [3, 4], [5]]


def test_a_veto_that_leaves_too_many_components_ends():
    """0, 1 and 2, 3 join; 4 may join neither, nor they each other, since 012, 014 and 234 are above the median, 1. Then
    the cheapest edge joins, 02, which the veto passed over at first; 24 would have been the next."""
    barriers = {"01": 1, "02": 1.5, "23": 2, "24": 3}
    triplets = {"012": 7, "014": 6, "024": 1, "034": 1, "124": 1, "234": 5}
    signals = signals_by_hand(5, barriers, triplets)
    assert len(hodgecover.decompose(signals).triangles) == 6
    assert baselines.MERGING["triplet-hypergraph"](signals, 3)[0] == [[0, 1], [2, 3], [4]]
    assert baselines.MERGING["triplet-hypergraph"](signals, 2)[0] == [[0, 1, 2, 3], [4]]
    barriers["02"] = 9
    signals = signals_by_hand(5, barriers, triplets)
    assert baselines.MERGING["triplet-hypergraph"](signals, 2)[0] == [[0, 1], [2, 3, 4]]


@settings(max_examples=60)
@given(st.integers(3, 7), st.data())
def test_groups_of_edges_by_brute_force(n, data):
    """At each step the cheapest edge between two components whose union has no vetoed triple, the lexicographically
    first of equal ones; if there is none, the cheapest of all."""
    pairs = list(itertools.combinations(range(n), 2))
    cost = dict(zip(pairs, data.draw(st.lists(st.integers(0, 5), min_size=len(pairs), max_size=len(pairs)))))
    vetoed = data.draw(st.sets(st.sampled_from([*itertools.combinations(range(n), 3)]), max_size=9))
    keep = data.draw(st.integers(1, n))

    def allowed(component) -> bool:
        return not any({*triple} <= {*component} for triple in vetoed)
    groups = [{e} for e in range(n)]
    while len(groups) > keep:
        joins = [(cost[i, j], i, j, some | others) for some, others in itertools.combinations(groups, 2)
                 for i, j in pairs if (i in some and j in others) or (j in some and i in others)]
        *_, union = min([join for join in joins if allowed(join[3])] or joins, key=lambda join: join[:3])
        groups = [group for group in groups if not group <= union] + [union]
    found = baselines.union_find_groups(torch.tensor([*cost.values()]).double(), keep, allowed)
    assert found == sorted(map(sorted, groups))


def test_the_most_frequent_of_a_component_comes_first():
    """Its router row stays; of equal ones that of the lowest number."""
    signals = signals_by_hand(6, BY_HAND, {}, frequency=[3, 5, 5, 0, 0, 1])
    groups, weights = baselines.MERGING["greedy-barrier"](signals, 3)
    assert groups == [[1, 2, 0], [3, 4], [5]]
    assert torch.equal(weights, signals.frequency)


@pytest.mark.parametrize("method", baselines.MERGING_ON_BARRIERS)
def test_an_ablation_stores_the_mean_parameters_of_its_components(small, tmp_path, method):
    """By frequency, over all members at once, as an independent sum over the experts gives them."""
    assert compress(small, tmp_path / "out", method) == 0
    model, output = Model(small), Model(tmp_path / "out")
    ids = model_io.calibration_ids(model, [tmp_path / "text.txt"], 64, 32)
    for step, layer in zip(model.stream(ids), record(tmp_path / "out")["layers"]):
        rates = (step.gates > 0).double().mean(0)
        member = torch.zeros(4, 8, dtype=torch.float64)
        for slot, group in enumerate(sorted(layer["groups"])):  # by the first member, whose slot it is
            member[slot, group] = rates[group]
        assert (member.sum(1) > 0).all() and max(map(len, layer["groups"])) > 1
        share = member / member.sum(1, keepdim=True)
        for stored, experts in zip(output.layer(step.index).experts, model.layer(step.index).experts):
            mean = torch.einsum("gn,nab->gab", share, experts.double())
            torch.testing.assert_close(stored.double(), mean, rtol=4e-3, atol=1e-7)  # stored in bfloat16


# -------------------------------------------------------------------------------------------------------- merging

@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(10, 14), st.integers(2, 5), st.booleans())
def test_clusters_by_brute_force(seed, n, count, complete):
    """The linkage recomputed from all pairs at each join."""
    points = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = torch.cdist(points, points)
    groups = [[e] for e in range(n)]

    def apart(some: list[int], others: list[int]) -> float:
        all_pairs = distance[some][:, others]
        return (all_pairs.max() if complete else all_pairs.mean()).item()
    while len(groups) > count:
        some, others = min(itertools.combinations(groups, 2), key=lambda pair: apart(*pair))
        groups = [group for group in groups if group not in (some, others)] + [sorted(some + others)]
    assert sorted(baselines.cluster(distance, count, complete)) == sorted(groups)


def test_mc_smoe_groups_around_the_most_frequent(facts):
    groups, weights = baselines.MERGING["mc-smoe"](facts, 3)
    dominant = top(facts.frequency.tolist())[:3]
    logits = facts.logits

    def cosine(i: int, j: int) -> float:
        return (logits[:, i] @ logits[:, j] / logits[:, i].norm() / logits[:, j].norm()).item()
    expected = {e: [e] for e in dominant}
    for e in set(range(8)) - {*dominant}:
        expected[max(dominant, key=lambda centre: cosine(e, centre))].append(e)
    assert {group[0]: sorted(group) for group in groups} == {e: sorted(group) for e, group in expected.items()}
    assert torch.equal(weights, facts.frequency)


def test_hc_smoe_clusters_mean_outputs(measured, facts):
    model, ids, _ = measured
    step = next(model.stream(ids))
    outputs = torch.stack([step.layer.experts(e, step.x).mean(0) for e in range(8)])
    torch.testing.assert_close(facts.outputs, outputs, rtol=1e-12, atol=0)
    groups, weights = baselines.MERGING["hc-smoe"](facts, 3)
    assert sorted(map(sorted, groups)) == sorted(baselines.cluster(torch.cdist(outputs, outputs), 3))
    frequency = (step.gates > 0).sum(0).tolist()
    assert weights.tolist() == frequency
    assert all(frequency[group[0]] == max(frequency[e] for e in group) for group in groups)


def test_ream_fills_groups_of_up_to_16_by_likeness(facts):
    groups, weights = baselines.MERGING["ream"](facts, 3)
    assert [group[0] for group in groups] == top(facts.squared.tolist())[:3] and torch.equal(weights, facts.squared)
    assert len(groups[0]) == 6  # the first centroid takes all that are free: fewer than 15
    many = 40
    score = torch.arange(many, 0, -1.0)
    generator = torch.Generator().manual_seed(0)
    likeness = torch.rand(many, many, generator=generator)
    found = baselines.take_nearest(score, likeness, 2, most=16)
    first = sorted(range(2, many), key=lambda e: -likeness[e, 0].item())[:15]
    rest = [e for e in range(2, many) if e not in first]
    second = sorted(rest, key=lambda e: -likeness[e, 1].item())[:15]
    left = [e for e in rest if e not in second]
    assert found[0][:16] == [0, *first] and found[1][:16] == [1, *second]
    assert [e for e in left if e in found[0]] == [e for e in left if likeness[e, 0] > likeness[e, 1]]
    likeness = baselines.ream_likeness(facts.logits, facts.gated)
    assert baselines.take_nearest(facts.squared, likeness, 3, most=16) == groups
    alike = baselines.ream_likeness(torch.ones(4, 3).double(), torch.ones(3, 2).double())
    torch.testing.assert_close(alike, torch.ones(3, 3).double())  # no distance


def step_by_hand(renormalised: bool) -> model_io.LayerPass:
    """Two tokens, three experts, top-2. The softmax is (5, 2, 1) / 8 and (1, 5, 2) / 8, the logits are the logarithms
    of the numerators. The outputs are (4, 0, 0) and (0, 8, 0) on both tokens, and -1.5 v and v, v = (0, 3, 4)."""
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    router = torch.tensor([[0.0, 5.0, 1.0], [0.0, 2.0, 5.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    router[:, 1:] = router[:, 1:].log()
    gate = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(3, 1, 3)  # silu(1) everywhere
    up = torch.tensor([[[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.0, -1.5, 1.0]]], dtype=torch.float64)
    down = torch.tensor([[4.0, 0.0, 0.0], [0.0, 8.0, 0.0], [0.0, 3.0, 4.0]], dtype=torch.float64)[:, :, None]
    layer = model_io.Layer(model_io.Experts(gate, up, down / 0.7310585786300049), router, {})
    gates = torch.tensor([[5.0, 2.0, 0.0], [0.0, 5.0, 2.0]], dtype=torch.float64)
    gates = gates / (7.0 if renormalised else 8.0)
    return model_io.LayerPass(0, "layer", layer, x[None], x, gates, x, lambda h: h)


@pytest.mark.parametrize("renormalised", [False, True])
def test_ream_by_hand(renormalised):
    """The values of the published code's formulas. Saliency: (5/8)^2 4; ((2/8)^2 + (5/8)^2) / 2 times 8; (2/8)^2 5; by
    the softmax even where the model renormalises its gates. Mean outputs: 6/16 (4, 0, 0); 7/16 (0, 8, 0); (-1.5/8 +
    2/8) / 2 v. Cosines: 0, 0 and 0.6. Profiles: (log 5, log 1), (log 2, log 5), (log 1, log 2) to norm 1, or (1, 0),
    (0.395551, 0.918443), (0, 1): distances 1.099499, sqrt 2, 0.403872, likenesses 0.222537, 0 and 0.714419."""
    facts = baselines.layer_facts(step_by_hand(renormalised))
    assert facts.squared.tolist() == pytest.approx([1.5625, 1.8125, 0.3125])
    assert facts.gated.flatten().tolist() == pytest.approx([1.5, 0, 0, 0, 3.5, 0, 0, 0.09375, 0.125])
    likeness = baselines.ream_likeness(facts.logits, facts.gated)
    for i, j, value in ((0, 1, (0.222537 + 0.5) / 2), (0, 2, 0.25), (1, 2, (0.714419 + 0.8) / 2)):
        assert likeness[i, j].item() == likeness[j, i].item() == pytest.approx(value, abs=1e-5)
    groups, weights = baselines.MERGING["ream"](facts, 2)
    assert groups == [[1, 2], [0]] and weights.tolist() == pytest.approx([1.5625, 1.8125, 0.3125])
    merged = baselines.merged_layer(step_by_hand(renormalised).layer, baselines.Merge(groups, weights, weights))
    down = merged.experts.down.squeeze(2) * 0.7310585786300049  # weights 1.8125 and 0.3125: 29/34 and 5/34
    assert down.flatten().tolist() == pytest.approx([4, 0, 0, 0, 247 / 34, 20 / 34])
    assert merged.experts.up.flatten().tolist() == pytest.approx([1, 0, 0, 29 / 34, -7.5 / 34, 5 / 34])
    assert torch.equal(merged.router, step_by_hand(renormalised).layer.router[[0, 1]])


def test_ream_gives_an_expert_without_tokens_the_least_saliency(facts):
    squared = facts.squared.clone()
    squared[[2, 5]] = 0.0
    _, weights = baselines.MERGING["ream"](facts._replace(squared=squared), 3)
    assert weights[[2, 5]].tolist() == [squared[squared > 0].min().item()] * 2


@pytest.mark.parametrize("all_slots", [False, True])
def test_ream_measures_a_layer_on_what_the_merged_layers_before_it_give(measured, tmp_path, monkeypatch, all_slots):
    """The facts of each layer are of the stream of the output, with the source's layer; another method's, of the
    source's stream."""
    model, ids, _ = measured
    seen, real = [], baselines.layer_facts
    monkeypatch.setattr(baselines, "layer_facts", lambda step: seen.append(step.x.clone()) or real(step))
    merges = dict(baselines.merge_model(model, ids, "ream", 4, all_slots=all_slots))
    baselines.export_merges(model, merges, tmp_path / "out", {}, all_slots)
    output = Model(tmp_path / "out", torch.float64)
    own, source = ([step.x for step in each.stream(ids)] for each in (output, model))
    assert len(seen) == 2 and torch.equal(seen[0], source[0])
    torch.testing.assert_close(seen[1], own[1], rtol=1e-6, atol=1e-6)
    assert (seen[1] - source[1]).abs().max() > 1e-3
    seen.clear()
    dict(baselines.merge_model(model, ids, "hc-smoe", 4))
    torch.testing.assert_close(seen, source)


@pytest.mark.parametrize("keep", [1, 3, 4, 8])
def test_slimqwen_preserves_half_and_merges_into_the_other(measured, facts, keep):
    """The preserved half is stored bit for bit; each dropped expert joins the base of most similar mean output."""
    groups, weights = baselines.MERGING["slimqwen"](facts, keep)
    ranked = top(facts.saliency.tolist())
    base = ranked[keep // 2:keep]

    def likeness(e: int, b: int) -> float:
        return torch.cosine_similarity(facts.outputs[e], facts.outputs[b], dim=0).item()
    expected = {e: [e] for e in ranked[:keep]}
    for e in ranked[keep:]:
        expected[max(base, key=lambda b: likeness(e, b))].append(e)
    assert {group[0]: sorted(group) for group in groups} == {e: sorted(group) for e, group in expected.items()}
    assert torch.equal(weights, facts.saliency)
    checkpoint = measured[0].checkpoint
    edits = baselines.merge_edits(checkpoint, "model.layers.0", groups, weights)
    for e in ranked[:keep // 2]:
        stored = checkpoint.load(f"model.layers.0.mlp.experts.{e}.up_proj.weight")
        assert torch.equal(edits[f"model.layers.0.mlp.experts.{e}.up_proj.weight"](stored, 0), stored)


def test_stun_keeps_the_expert_nearest_its_cluster_s_mean(measured, facts):
    model, _, _ = measured
    experts = model.layer(0).experts
    flat = torch.cat([part.flatten(1).double() for part in experts], dim=1)
    rows = rows_of(model, 0).double()
    groups, weights = baselines.MERGING["stun"](facts, 3)
    clusters = baselines.cluster(torch.cdist(rows, rows), 3, complete=True)
    assert sorted(map(sorted, groups)) == sorted(clusters)
    for group in groups:
        away = [(flat[e] - flat[group].mean(0)).norm().item() for e in group]
        assert away == sorted(away)
        assert weights[group].tolist() == [1.0] + [0.0] * (len(group) - 1)


@pytest.mark.parametrize("all_slots", [False, True])
@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
def test_merged_weights_are_the_weighted_means(tmp_path, path, all_slots):
    """In every family: one-by-one and fused experts, dense layers between, a multi-token head."""
    model = Model(path)
    groups = [[1, 0, 4], [2], [7, 3], [5, 6]] if model.config.num_experts == 8 else None
    assert groups, model.config.num_experts
    weights = torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64)  # group [5, 6] has none
    names = [model.layer_names[index] for index in hodgecover.sparse_layers(model)]
    merges = {name: baselines.Merge(groups, weights, weights) for name in names}
    baselines.export_merges(model, merges, tmp_path / "out", {}, all_slots)
    output = Model(tmp_path / "out")
    assert output.config.num_experts == (8 if all_slots else 4)
    share = {1: {1: 3 / 4, 0: 1 / 4}, 2: {2: 1}, 7: {7: 1}, 5: {5: 0.5, 6: 0.5}}
    slots = [next(group[0] for group in groups if e in group) for e in range(8)] if all_slots else [1, 2, 5, 7]
    for index in hodgecover.sparse_layers(model):
        before, after = model.layer(index), output.layer(index)
        for slot, first in enumerate(slots):
            for part, merged in zip(before.experts, after.experts):
                mean = sum(w * part[e].double() for e, w in share[first].items())
                torch.testing.assert_close(merged[slot].double(), mean, rtol=8e-3, atol=1e-7)  # stored in bfloat16
        rows = before.router if all_slots else before.router[slots]
        assert torch.equal(after.router, rows)
    ids = load_file(path / "golden.safetensors")["ids"]
    assert output.logits(ids).isfinite().all()


def test_a_group_of_one_stays_bit_for_bit(tmp_path):
    model = Model(PLAIN)
    merge = baselines.Merge([[e] for e in range(8)], torch.ones(8), torch.ones(8))
    baselines.export_merges(model, dict.fromkeys(model.layer_names, merge), tmp_path / "out", {})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (PLAIN / "model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------- the command

def compress(small, out, method, *options) -> int:
    return run(baselines, small, "--keep", 4, "--method", method, "--calib", small.parent / "text.txt", *QUICK, "--out",
               out, *options)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_by_the_same_command(small, tmp_path, monkeypatch, capsys, method):
    """Those that need no barriers measure none. The survivors' weights are the source's, unless they are merged."""
    if method in baselines.OFF_BARRIERS:
        monkeypatch.setattr(mathx, "sweep", refuse)
    assert compress(small, tmp_path / "out", method) == 0
    entry = record(tmp_path / "out")
    assert (entry["command"], entry["settings"]["method"], entry["settings"]["keep"]) == ("baselines.py", method, 4)
    model, output = Model(small), Model(tmp_path / "out")
    assert entry["source"]["fingerprint"] == model.checkpoint.fingerprint() and output.config.num_experts == 4
    said = capsys.readouterr().out
    ids = model_io.calibration_ids(model, [tmp_path / "text.txt"], 64, 32)
    read = output if method in baselines.SEQUENTIAL else model  # whose stream each layer's router reads
    passes = {step.name: model_io.route(step.x, model.layer(step.index), model.config) for step in read.stream(ids)}
    for index, layer in enumerate(entry["layers"]):
        frequency = (passes[layer["name"]] > 0).sum(0)
        stays = layer.get("survivors") or sorted(group[0] for group in layer["groups"])
        assert layer["routed_share"] == pytest.approx((frequency[stays].sum() / frequency.sum()).item())
        if method not in baselines.ON_BARRIERS:
            assert f"layer {index}: {layer['routed_share']:.1%} of the tokens' choices" in said
        assert torch.equal(output.layer(index).router, model.layer(index).router[stays])
        if method in baselines.MERGING:
            assert sorted(sum(layer["groups"], [])) == list(range(8)) and len(layer["groups"]) == 4
        if method in (*baselines.SELECTORS, "stun"):
            for after, before in zip(output.layer(index).experts, model.layer(index).experts):
                assert torch.equal(after, before[stays])
        if method in baselines.SELECTORS:
            assert (layer["diagnostics"] is None) == (method in baselines.WITHOUT_BARRIERS)
        if method in baselines.WITHOUT_BARRIERS:
            nearest = baselines.nearest_rows(rows_of(model, index), stays)
            assert layer["redirect"] == {str(e): target for e, target in nearest.items()} and len(nearest) == 4
    assert ("eta" in said) == (method in baselines.ON_BARRIERS)
    assert f"output: {tmp_path / 'out'}" in said


def test_methods_on_barriers_share_one_cache_with_hodgecover(small, tmp_path, monkeypatch, capsys):
    """No barrier is measured twice, and the plan of the same rule is HodgeCover's own."""
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(hodgecover, small, "--keep", 4, "--lambda-triangle", 0, "--out", tmp_path / "own", *text) == 0
    own = capsys.readouterr().out
    monkeypatch.setattr(mathx, "sweep", refuse)
    for method in (*baselines.ON_BARRIERS, *baselines.MERGING_ON_BARRIERS):
        assert compress(small, tmp_path / method, method) == 0
    assert record(tmp_path / "hodge-no-triangle")["layers"] == record(tmp_path / "own")["layers"]
    capsys.readouterr()
    assert compress(small, tmp_path / "again", "hodge-no-triangle") == 0
    assert capsys.readouterr().out.splitlines()[:3] == own.splitlines()[:3]  # the same report


def test_barriers_go_to_the_named_cache_with_the_named_settings(small, tmp_path, monkeypatch, capsys):
    options = ["--cache", tmp_path / "kept", "--vocab-sample", 40, "--max-triangles", 3]
    assert compress(small, tmp_path / "merged", "triplet-penalty", *options) == 0
    assert len([*(tmp_path / "kept").iterdir()]) == 2 and not (tmp_path / "small-barriers").exists()
    said = record(tmp_path / "merged")["settings"]
    assert [said[name] for name in ("vocab_sample", "max_triangles", "thresholds")] == [40, 3, 80]
    options += ["--order", "saliency"]
    with monkeypatch.context() as patch:  # both read the one cache
        patch.setattr(mathx, "sweep", refuse)
        assert compress(small, tmp_path / "out", "additive-residual", *options) == 0
    said = record(tmp_path / "out")
    assert [said["settings"][name] for name in ("vocab_sample", "max_triangles", "order")] == [40, 3, "saliency"]
    assert said["layers"][0]["diagnostics"]["candidates"] == 3
    assert "barriers by sample: " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["hc-smoe", "greedy-barrier"])
def test_all_slots_keep_the_router_and_the_size(small, tmp_path, capsys, method):
    assert compress(small, tmp_path / "out", method, "--all-slots") == 0
    model, output = Model(small), Model(tmp_path / "out")
    assert output.config.num_experts == 8 and "100.0% of the tokens' choices" in capsys.readouterr().out
    entry = record(tmp_path / "out")
    assert entry["settings"]["all_slots"] and entry["layers"][0]["routed_share"] == 1
    for index, layer in enumerate(entry["layers"]):
        assert torch.equal(output.layer(index).router, model.layer(index).router)
        for group in layer["groups"]:
            for part in output.layer(index).experts:
                assert all(torch.equal(part[group[0]], part[e]) for e in group)


@pytest.mark.parametrize("method", ["reap", "ream", "additive-residual", "triplet-hypergraph"])
def test_the_same_command_gives_the_same_bytes(small, tmp_path, method):
    before = contents(small)
    for name in ("one", "two"):
        assert compress(small, tmp_path / name, method) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and contents(small) == before


@pytest.mark.parametrize("method", ["random", "ream", "triplet-penalty"])
def test_every_family(family, tmp_path, method):
    assert run(baselines, family, "--keep", 4, "--method", method, "--calib", tmp_path / "text.txt", *QUICK, "--out",
               tmp_path / "out") == 0
    ids = torch.arange(24).view(2, 12)
    assert Model(tmp_path / "out").logits(ids).isfinite().all()


@pytest.mark.parametrize("method", ["hope", "man", "aimer", "ream", "stun", "weighted-cover", "triplet-hypergraph"])
def test_on_another_device(small, tmp_path, method):
    assert compress(small, tmp_path / "cpu", method, "--tokens", 32) == 0
    with Accelerator():
        assert compress(small, tmp_path / "fake", method, "--tokens", 32, "--device", "fake") == 0
    fake, cpu = (record(tmp_path / device)["layers"] for device in ("fake", "cpu"))
    chosen = "groups" if method in baselines.MERGING else "order"
    assert [layer[chosen] for layer in fake] == [layer[chosen] for layer in cpu]
    fake, cpu = (load_file(tmp_path / device / "model.safetensors") for device in ("fake", "cpu"))
    for name, tensor in cpu.items():  # the last bit of a saliency, which weighs a mean, may differ
        torch.testing.assert_close(fake[name], tensor)


def test_a_history_goes_on(small, tmp_path):
    assert compress(small, tmp_path / "one", "reap") == 0
    assert run(baselines, tmp_path / "one", "--keep", 3, "--method", "stun", "--calib", tmp_path / "text.txt", *QUICK,
               "--out", tmp_path / "two") == 0
    history = json.loads((tmp_path / "two" / "hodgecover.json").read_text())["history"]
    assert [entry["settings"]["method"] for entry in history] == ["reap", "stun"]


@pytest.mark.parametrize("method, options, says", [
    ("reap", ["--vocab-sample", 5], "--vocab-sample: --method reap does not use it"),
    ("reap", ["--cache", "x"], "--cache: --method reap does not use it"),
    ("hope", ["--cache", "x"], "--cache: --method hope does not use it"),
    ("stun", ["--max-triangles", 5], "--max-triangles: --method stun does not use it"),
    ("random", ["--memory", "200MB"], "--memory: --method random does not use it"),
    ("frequency", ["--order", "saliency"], "--order: --method frequency does not use it"),
    ("stun", ["--all-slots"], "--all-slots: --method stun does not use it"),
    ("hodge-no-triangle", ["--all-slots"], "--all-slots: --method hodge-no-triangle does not use it"),
    ("triplet-penalty", ["--order", "saliency"], "--order: --method triplet-penalty does not use it"),
    ("additive-residual", ["--order", "random:x"], "--order random:x: must be"),
    ("greedy-barrier", ["--max-triangles", -1], "--max-triangles -1: must be"),
    ("greedy-barrier", ["--keep", 2], "--keep 2: must be from 3 to 8"),
    ("best", [], "--method: invalid choice: 'best'"),
    ("reap", ["--keep", 2], "--keep 2: must be from 3 to 8"),
    ("hc-smoe", ["--keep", 9], "--keep 9: must be from 3 to 8"),
    ("reap", ["--seq-len", 65], "--seq-len 65: must be from 2 to"),
    ("reap", ["--seed", -1], "--seed -1: must be"),
])
def test_wrong_choices_get_one_line_before_the_work(small, tmp_path, monkeypatch, capsys, method, options, says):
    monkeypatch.setattr(Model, "stream", refuse)
    assert_refused(capsys, compress(small, tmp_path / "out", method, *options), says)
    assert not (tmp_path / "out").exists()


def test_outputs_and_caches_lie_outside_the_checkpoint(small, tmp_path, capsys):
    assert_refused(capsys, compress(small, small / "out", "reap"), "--out")
    assert_refused(capsys, compress(small, tmp_path / "out", "triplet-penalty", "--cache", small / "kept"), "--cache")
    assert_refused(capsys, compress(small, small.parent, "reap"), "exists and is not an empty folder")


def test_an_expert_that_is_not_finite_is_refused_even_if_no_token_reaches_it(measured):
    """The model's own check sees the stream alone."""
    model, ids, _ = measured
    step = next(model.stream(ids))
    step.layer.experts.down[2, 0, 0] = torch.nan
    with pytest.raises(InputError, match="model.layers.0: an expert's outputs or weights are not finite"):
        baselines.layer_facts(step._replace(gates=step.gates.index_fill(1, torch.tensor([2]), 0.0)))


def test_a_library_call_checks_keep(measured):
    model, ids, _ = measured
    for start, method in ((baselines.select_model, "reap"), (baselines.merge_model, "ream"),
                          (baselines.merge_model, "greedy-barrier")):
        with pytest.raises(InputError, match="keep 9"):
            next(start(model, ids, method, 9))


def test_the_docstrings_examples_hold():
    assert doctest.testmod(baselines).failed == 0
