# SPDX-License-Identifier: MIT
"""The method: the fast barriers against their definition, and plans against their parts called one by one."""
import doctest
import itertools
import math
from functools import partial
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from conftest import GOLDEN
from hodgecover import MoELayer, Settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_io import Experts, InputError, Model
from safetensors.torch import load_file
from strategies import barrier_by_hand, random_layer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def in_dtype(layer: MoELayer, dtype: torch.dtype) -> MoELayer:
    """The layer's tensors in another dtype, and a norm without a weight."""
    return MoELayer(Experts(*(part.to(dtype) for part in layer.experts)), layer.x.to(dtype), layer.gates.to(dtype),
                    layer.y.to(dtype), partial(model_io.rms_norm, weight=torch.ones(12, dtype=dtype), eps=1e-5),
                    layer.unembedding.to(dtype))


def plain_barriers(layer: MoELayer, simplices: torch.Tensor) -> torch.Tensor:
    return torch.stack([hodgecover.plain_barrier(layer, simplex) for simplex in simplices.tolist()])


# ---------------------------------------------------------------------------------------------------- barriers


@pytest.mark.parametrize("case", [{}, {"unreached": 3}, {"k": 7}])
@pytest.mark.parametrize("simplex", [[0, 1], [2, 3], [1, 3, 6]])
def test_the_plain_barrier_is_the_definition(case, simplex):
    layer = random_layer(tokens=12, **case)
    assert hodgecover.plain_barrier(layer, simplex).item() == pytest.approx(barrier_by_hand(layer, simplex), rel=1e-9)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", [{}, {"renormalise": True}, {"unreached": 3}, {"k": 1}, {"k": 7}])
def test_fast_barriers_are_the_plain_ones(case, size):
    layer = random_layer(**case)
    simplices = torch.tensor(list(itertools.combinations(range(7), size)))
    barriers = hodgecover.lens_barriers(layer, simplices)
    assert barriers.dtype == torch.float64 and (barriers >= 0).all() and barriers.max() > 1e-3
    torch.testing.assert_close(barriers, plain_barriers(layer, simplices), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_barriers_of_checkpoints_are_the_plain_ones(path):
    """Both readouts, pairs and triples, on every layer of each golden checkpoint."""
    model = Model(path, dtype=torch.float64)
    ids = load_file(path / "golden.safetensors")["ids"]
    simplices = torch.tensor([[0, 1], [2, 7], [3, 5]]), torch.tensor([[0, 1, 2], [3, 5, 7]])
    later, head = hodgecover.end_of_model(model, ids), model.unembedding()
    for step in model.stream(ids):
        if step.gates is None:
            continue
        layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, step.norm, head)

        def to_the_end(y: torch.Tensor) -> torch.Tensor:
            for after in range(step.index + 1, model.config.num_layers):
                y = model_io.run_layer(y.view(*ids.shape, -1), model.layer(after), model.config)[2]
            return step.norm(y)
        for chosen in simplices:
            near = hodgecover.lens_barriers(layer, chosen)
            torch.testing.assert_close(near, plain_barriers(layer, chosen), rtol=1e-5, atol=1e-12)
            far = hodgecover.model_barriers(layer, chosen, partial(later, index=step.index, norm=step.norm))
            plain = plain_barriers(layer._replace(norm=to_the_end), chosen)
            torch.testing.assert_close(far, plain, rtol=1e-5, atol=1e-12)


def test_merge_weights_are_shares_of_the_rate_in_any_unit():
    simplices, counts = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([1, 3, 4, 0, 0, 0])
    expected = [[1 / 8, 3 / 8, 4 / 8], [1 / 3] * 3]
    for rates in (counts, counts / 1e9):
        torch.testing.assert_close(hodgecover.merge_weights(simplices, rates), torch.tensor(expected).double())


def test_merging_two_experts_that_no_token_reaches_costs_nothing():
    layer = random_layer(unreached=3)
    layer.gates[:, 5] = 0
    assert hodgecover.lens_barriers(layer, torch.tensor([[3, 5]])).item() == 0


def test_merging_equal_experts_costs_nothing():
    layer = random_layer()
    layer = layer._replace(experts=Experts(*(part[:1].expand_as(part) for part in layer.experts)))
    assert hodgecover.lens_barriers(layer, mathx.edges(7)).max() < 1e-20


def test_no_simplices_no_barriers():
    assert hodgecover.lens_barriers(random_layer(), torch.empty(0, 3, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("vocab_sample", [0, 9])
def test_barriers_do_not_depend_on_the_buffers(monkeypatch, vocab_sample):
    layer, pairs = random_layer(), mathx.edges(7)
    whole = hodgecover.lens_barriers(layer, pairs, vocab_sample)
    monkeypatch.setattr(hodgecover, "CACHE_BYTES", 1)
    for memory in (1, 10**4, 10**5):
        again = hodgecover.lens_barriers(layer, pairs, vocab_sample, memory=memory)
        torch.testing.assert_close(again, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("vocab_sample", [0, 20])
def test_barriers_whose_exponentials_overflow_are_the_plain_ones(vocab_sample):
    """Changes of logits up to many thousands: the chunk is read out again, by logsumexp."""
    layer, pairs = random_layer(), mathx.edges(7)
    loud = layer._replace(unembedding=layer.unembedding * 1e4)
    found = hodgecover.lens_barriers(loud, pairs, vocab_sample)
    assert found.max() > 710
    if not vocab_sample:
        torch.testing.assert_close(found, plain_barriers(loud, pairs), rtol=1e-5, atol=1e-12)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors over 64 kB that operations made and that still live; `peak`: at most."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 1 << 16:
                storage = value.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
                self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return found


@pytest.mark.parametrize("vocab_sample, size", [(0, 3), (50, 2)])
def test_the_sweep_takes_the_memory_that_it_may_and_no_more(vocab_sample, size):
    """Whatever the tensors are: wide experts, a large vocabulary, many simplices."""
    simplices = torch.combinations(torch.arange(8), size)
    for shape in (dict(d=64, f=400), dict(d=400, f=64), dict(d=32, f=32, vocab=20_000)):
        layer = in_dtype(random_layer(n=8, tokens=200, **{"vocab": 500} | shape), torch.float32)
        layer = layer._replace(norm=partial(model_io.rms_norm, weight=torch.ones(layer.x.shape[1]), eps=1e-5))
        with LiveBytes() as count:
            hodgecover.lens_barriers(layer, simplices, vocab_sample, memory=20 * 10**6)
        assert 10e6 < count.peak < 20e6


def test_a_sample_is_drawn_in_the_memory_that_it_may_take_in_float64():
    layer = random_layer(n=8, tokens=120, d=32, f=32, vocab=5000)
    with LiveBytes() as count:
        hodgecover.lens_barriers(layer, torch.tensor([[0, 1]]), 50, memory=10**7)
    assert count.peak < 10e6


def test_chunks_of_tokens_respect_the_budget():
    sizes = torch.tensor([3, 4, 5, 20, 1, 1, 1])
    chunks = list(hodgecover.token_chunks(sizes, 10))
    assert torch.cat([torch.arange(7)[chunk] for chunk in chunks]).tolist() == list(range(7))
    assert all(sizes[chunk].sum() <= 10 or chunk.stop - chunk.start == 1 for chunk in chunks)
    assert len(chunks) <= 4
    assert list(hodgecover.token_chunks(torch.zeros(0, dtype=torch.int64), 10)) == []


def test_barriers_from_samples_of_the_vocabulary():
    """Unbiased but for Jensen's gap: the mean over 40 seeds is below the exact barrier, and near it; a sample of the
    whole vocabulary is the barrier itself."""
    layer, pairs = random_layer(vocab=200), mathx.edges(7)
    exact = hodgecover.lens_barriers(layer, pairs)
    seeds = torch.stack([hodgecover.lens_barriers(layer, pairs, 40, seed) for seed in range(40)])
    assert not torch.equal(seeds[0], seeds[1]) and (seeds >= 0).all()
    ratio = seeds.mean(0) / exact
    assert 0.9 < ratio.min() and ratio.max() < 1.02 and ratio.mean() < 1
    for sample in (200, 1000):
        assert torch.equal(hodgecover.lens_barriers(layer, pairs, sample), exact)


def test_the_audit_holds_what_the_sweep_estimates_and_the_exact_kl():
    """With one simplex that only the last of two tokens touches, the audited pair is twice the barrier, its sample that
    of the last token; with many, all differ and their mean is near."""
    layer, simplex = random_layer(vocab=200, tokens=2, n=3, k=3), torch.tensor([[0, 2]])
    layer.gates[0] = 0
    audit = hodgecover.audit_sample(layer, simplex, vocab_sample=20, seed=1)
    estimated, exact = hodgecover.lens_barriers(layer, simplex, 20, 1), hodgecover.lens_barriers(layer, simplex)
    torch.testing.assert_close(audit, 2 * torch.stack((estimated, exact), 1))
    assert audit.shape == (1, 2) and audit[0, 0] != audit[0, 1]
    many, pairs = random_layer(vocab=200, tokens=300), mathx.edges(7)
    audit = hodgecover.audit_sample(many, pairs, vocab_sample=20)
    assert audit.shape == (128, 2) and (audit > 0).all() and len(audit.unique(dim=0)) == 128
    touching = 21 / 11  # 11 of the 21 pairs touch a token of top-2
    mean = hodgecover.lens_barriers(many, pairs).mean().item() * touching
    assert audit[:, 1].mean().item() == pytest.approx(mean, rel=0.3)
    many.gates.zero_()
    assert hodgecover.audit_sample(many, pairs, vocab_sample=20).shape == (0, 2)


def test_the_model_readout_agrees_if_no_layer_comes_after():
    """More simplices than one group of 64, more tokens than one block of 256; `later` is the norm alone."""
    layer = random_layer(n=13, tokens=300)
    barriers = hodgecover.model_barriers(layer, mathx.edges(13), later=layer.norm)
    torch.testing.assert_close(barriers, hodgecover.lens_barriers(layer, mathx.edges(13)), rtol=1e-9, atol=1e-15)


def test_progress_is_told():
    for settings, later in ((Settings(), None), (Settings(readout="model"), random_layer().norm)):
        seen = []
        hodgecover.measure_layer(random_layer(), settings, tick=seen.append, later=later)
        assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == pytest.approx(1)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_barriers_of_lesser_precision_stay_near(dtype, bound):
    layer = random_layer(tokens=200)
    exact = hodgecover.lens_barriers(in_dtype(layer, torch.float64), mathx.edges(7))
    low = hodgecover.lens_barriers(in_dtype(layer, dtype), mathx.edges(7))
    torch.testing.assert_close(low, exact, rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_stay_as_stored_and_are_multiplied_in_the_dtype(dtype):
    """To the last bit what the widened weights give, at half of the memory or less."""
    layer = in_dtype(random_layer(), torch.bfloat16)._replace(
        **{name: getattr(in_dtype(random_layer(), dtype), name) for name in ("x", "gates", "y", "norm", "unembedding")})
    wide = layer._replace(experts=Experts(*(part.to(dtype) for part in layer.experts)))
    held, plain = (hodgecover.measure_layer(of, Settings(max_triangles=20)) for of in (layer, wide))
    assert all(map(torch.equal, held, plain))


@pytest.mark.parametrize("vocab_sample, bound", [(0, 0.999), (64, 0.99)])
def test_bfloat16_and_samples_rank_edges_as_float64_does(vocab_sample, bound):
    layer = random_layer(n=12, k=3, tokens=300, vocab=400)
    exact = hodgecover.lens_barriers(in_dtype(layer, torch.float64), mathx.edges(12))
    low = hodgecover.lens_barriers(in_dtype(layer, torch.bfloat16), mathx.edges(12), vocab_sample)
    assert bound < mathx.spearman(low, exact) < 1


def test_the_audit_foretells_the_shortfall():
    layer = random_layer(n=12, k=3, tokens=300, vocab=400)
    settings = Settings(vocab_sample=40, max_triangles=30)
    signals, exact = hodgecover.measure_layer(layer, settings), hodgecover.lens_barriers(layer, mathx.edges(12))
    audit = hodgecover.plan_from_signals(signals, 4, settings).diagnostics.audit
    truth = 1 - (signals.barriers.sum() / exact.sum()).item()
    assert audit.pairs == 256 and abs(audit.shortfall - truth) < 3 * audit.standard_error < 0.2


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


# --------------------------------------------------------------------------------------------------- the plan


def permuted(layer: MoELayer, order: list[int]) -> MoELayer:
    """The same layer with its experts numbered otherwise: expert i is the old order[i]."""
    return layer._replace(experts=Experts(*(part[order] for part in layer.experts)), gates=layer.gates[:, order])


def survivors(layer: MoELayer, **choices) -> list[int]:
    return hodgecover.plan_layer(layer, 5, Settings(edge_percent=10, max_triangles=12, **choices)).survivors


@given(st.integers(0, 1000), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=15)
def test_numbering_the_experts_otherwise_permutes_the_survivors(seed, random):
    layer, order = random_layer(seed, n=10), random.sample(range(10), 10)
    assert sorted(order[i] for i in survivors(permuted(layer, order))) == survivors(layer)


def test_under_index_order_the_numbering_can_change_the_survivors():
    layer = random_layer(3, n=10)
    orders = [torch.randperm(10, generator=torch.Generator().manual_seed(s)).tolist() for s in range(10)]
    found = {tuple(sorted(order[i] for i in survivors(permuted(layer, order), order="index"))) for order in orders}
    assert len(found) > 1


def test_orders_of_the_experts():
    saliency = torch.tensor([0.3, 0.1, 0.1, 0.5])
    assert hodgecover.expert_order("saliency", saliency).tolist() == [1, 2, 0, 3]
    assert hodgecover.expert_order("index", saliency).tolist() == [0, 1, 2, 3]
    drawn = [hodgecover.expert_order(f"random:{seed}", torch.rand(20)).tolist() for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == list(range(20))


def test_saliency_order_is_index_order_of_the_sorted_layer():
    """Plans of a layer in saliency order, and in index order of the layer with its experts sorted by saliency."""
    layer = random_layer(3, n=10)
    rank = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates).sort().indices.tolist()
    settings = dict(edge_percent=10, triangle_percent=30)
    plan = hodgecover.plan_layer(layer, 4, Settings(**settings))
    other = hodgecover.plan_layer(permuted(layer, rank), 4, Settings(order="index", **settings))
    assert plan.order == [rank[i] for i in other.order]
    assert plan.redirect == {rank[i]: rank[j] for i, j in other.redirect.items()}
    found, of_other = plan.diagnostics, other.diagnostics
    assert found.eta == pytest.approx(of_other.eta) and found.covered_at == of_other.covered_at
    for name in ("critical_edges", "critical_triangles"):
        mapped = [sorted(rank[i] for i in simplex) for simplex in getattr(of_other, name)]
        assert getattr(found, name) == mapped != []
    frequency = plan.frequency
    assert plan.routed_share == pytest.approx(sum(frequency[i] for i in plan.survivors) / sum(frequency))


@given(st.integers(3, 8), st.integers(0, 2**31))
def test_signals_in_another_order_are_the_same_signals(n, seed):
    g = torch.Generator().manual_seed(seed)
    rank, pairs = torch.randperm(n, generator=g), mathx.edges(n).tolist()
    triples = torch.combinations(torch.arange(n), 3)
    triples = triples[torch.randperm(len(triples), generator=g)[:5]]
    signals = hodgecover.Signals(*(torch.rand(size, generator=g).double() for size in (n, n, len(pairs))), triples,
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
    inside, tau, curve = hodgecover.curate_triangles(signals, 10)  # thresholds 0.1, 0.2, ..., 1.0
    assert curve.tolist() == [0, 0, 0, 1, 2, 2, 2, 0, 0, 1]
    assert tau == pytest.approx(0.5) and inside.tolist() == [False, False]
    fourth = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)[3].item()  # then 012 fills as soon as 02 enters
    signals = signals._replace(triplets=torch.tensor([fourth, 0.75], dtype=torch.float64))
    inside, tau, curve = hodgecover.curate_triangles(signals, 10)
    assert curve.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    assert tau == fourth and inside.tolist() == [True, False]  # at most tau*, whatever its edges
    found = hodgecover.plan_from_signals(signals, 2, Settings(order="index", thresholds=10)).diagnostics
    assert (found.triangles, found.candidates, found.discordance) == (1, 2, 0.5)  # of the candidates, 023


@pytest.mark.parametrize("choices", [{}, dict(lambda_edge=0.1, lambda_triangle=0.01, alpha=50.0, seed=3, thresholds=7,
                                             margin=1.0)])
def test_a_plan_is_what_its_parts_say(choices):
    """The plan of a layer in index order, from its barriers and the functions of mathx called one by one."""
    layer = random_layer(5, n=9)
    settings = Settings(order="index", edge_percent=10, triangle_percent=20, max_triangles=12, **choices)
    plan = hodgecover.plan_layer(layer, 4, settings)
    found = plan.diagnostics
    saliency = hodgecover.reap_saliency(layer.experts, layer.x, layer.gates)
    rank, pairs = saliency.sort().indices, mathx.edges(9)  # candidates are sampled in saliency order
    b = hodgecover.lens_barriers(layer, pairs)
    in_rank = hodgecover.lens_barriers(layer, rank[pairs])
    sampled = rank[mathx.candidate_triangles(9, in_rank, 12, settings.seed)].sort(1).values
    candidates = torch.tensor(sorted(sampled.tolist()))
    triplets = hodgecover.lens_barriers(layer, candidates)

    low, high = min(b.min(), triplets.min()).item(), max(b.max(), triplets.max()).item()
    thresholds = torch.linspace(low, high, settings.thresholds, dtype=torch.float64)
    curve = mathx.betti_curve(9, b, candidates, triplets, thresholds)
    assert found.betti_curve == curve.tolist() and found.tau == pytest.approx(thresholds[curve.argmax()].item())
    inside = triplets <= found.tau * (1 + 1e-9)
    triangles, triplets_in = candidates[inside], triplets[inside]
    assert found.candidates == len(candidates) == 12 and found.triangles == len(triangles)
    d1, d2 = mathx.boundary_matrices(9, triangles)
    parts = mathx.hodge_decompose(b, d1, d2)
    assert found.eta == pytest.approx(mathx.energy_fractions(parts))
    assert found.eta_constant == mathx.energy_fractions(mathx.hodge_decompose(torch.ones_like(b), d1, d2))
    fit = mathx.additive_model(b, d1)
    assert found.additive == pytest.approx({"energy": fit.energy, "variance": fit.variance})
    discordance = mathx.discordance(9, b, candidates, triplets, settings.margin)
    assert found.discordance == discordance.fraction
    assert found.discordance_quantiles == pytest.approx(discordance.ratio_quantiles)
    assert found.betti_1 == mathx.betti_1(d1, d2) and found.mean_barrier == pytest.approx(b.mean().item())
    critical = [pairs[mathx.critical(parts.harmonic.abs(), 10)], triangles[mathx.critical(triplets_in, 20)]]
    assert [found.critical_edges, found.critical_triangles] == [simplices.tolist() for simplices in critical]
    assert len(critical[0]) == math.ceil(3.6) and len(critical[1]) == math.ceil(0.2 * len(triangles))
    order = mathx.greedy_cover(saliency, list(zip(critical, (settings.lambda_edge, settings.lambda_triangle))), 9)
    assert plan.order == order and plan.survivors == sorted(order[:4])
    assert list(found.covered_at.values()) == [mathx.covered_at(order, simplices) for simplices in critical]
    assert plan.redirect == mathx.redirect(plan.survivors, b, parts.harmonic, settings.alpha)
    loads = [list(plan.redirect.values()).count(target) for target in plan.survivors]
    assert found.redirect_targets == sum(load > 0 for load in loads) and found.redirect_largest == max(loads)
    for name, part in parts._asdict().items():
        assert found.retained[name] == pytest.approx(mathx.retained(part, pairs, plan.survivors))
    assert found.retained["triplet"] == pytest.approx(mathx.retained(triplets_in, triangles, plan.survivors))
    assert sum(plan.frequency) == 40 * 2 and sum(plan.saliency) == pytest.approx(1)


def test_the_defaults_are_those_of_the_readme():
    assert Settings() == Settings(
        readout="lens", order="saliency", router="drop", edge_percent=5, triangle_percent=5, lambda_edge=1,
        lambda_triangle=1, alpha=1, max_triangles=500, vocab_sample=0, thresholds=80, margin=0.1, seed=0)


@pytest.mark.parametrize("choice, says", [
    (dict(edge_percent=101), "edge_percent 101: must be from 0 to 100"),
    (dict(alpha=math.nan), "alpha nan"), (dict(alpha=math.inf), "alpha inf: must be a finite number"),
    (dict(lambda_triangle=-1), "lambda_triangle -1"), (dict(max_triangles=-1), "max_triangles -1"),
    (dict(thresholds=1), "thresholds 1"), (dict(seed=-1), "seed -1"), (dict(readout="lense"), "lens or model"),
    (dict(router="melt"), "drop or fold"), (dict(order="random:SEED"), "order random:SEED: must be"),
    (dict(order="random:-1"), "random:SEED with a number"), (dict(order="best"), "saliency, index or random:SEED"),
    (dict(vocab_sample=9, readout="model"), "lens alone"),
])
def test_wrong_settings_are_refused(choice, says):
    with pytest.raises(InputError, match=says):
        Settings(**choice)


def test_nan_in_an_expert_is_an_error_not_a_plan():
    layer = random_layer()
    layer.experts.down[4, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        hodgecover.plan_layer(layer, 3)


@pytest.mark.parametrize("keep", [0, 8])
def test_keep_is_from_1_to_n(keep):
    with pytest.raises(InputError, match="from 1 to the layer's 7"):
        hodgecover.plan_layer(random_layer(), keep)


def test_a_layer_by_itself_has_the_lens_readout():
    with pytest.raises(InputError, match="readout model: needs the later layers"):
        hodgecover.plan_layer(random_layer(), 3, Settings(readout="model"))


def test_plans_of_fewer_survivors_nest():
    signals = hodgecover.measure_layer(random_layer(1, n=9))
    chosen = [set(hodgecover.plan_from_signals(signals, keep).survivors) for keep in range(1, 10)]
    assert all(a < b for a, b in zip(chosen, chosen[1:])) and chosen[-1] == set(range(9))


def test_two_experts_are_a_gradient():
    found = hodgecover.plan_layer(random_layer(n=2, k=1), 1).diagnostics
    assert found.eta == (pytest.approx(1), 0, pytest.approx(0, abs=1e-20))
    assert found.triangles == found.betti_1 == 0
    assert found.critical_edges == found.critical_triangles == []


def test_a_layers_line():
    layer = hodgecover.plan_layer(random_layer(), 3)
    line = hodgecover.layer_line(3, layer)
    found = layer.diagnostics
    expected = [3, *(f"{v:.3f}" for pair in zip(found.eta, found.eta_constant) for v in pair)]
    expected = [str(v) if i % 2 or not i else f"({v})" for i, v in enumerate(expected)]
    residual = [f"{1 - found.additive[of]:.2%}" for of in ("energy", "variance")]
    covered = [str(found.covered_at[of]) for of in ("edges", "triangles")]
    assert line.split() == [*expected, *residual, str(found.betti_1), str(found.triangles),
                            f"{found.discordance:.1%}", *covered, str(found.redirect_targets),
                            f"({found.redirect_largest})", f"{layer.routed_share:.1%}"]


# ---------------------------------------------------------------------------------------- degenerate but right


def signals_of(barriers: torch.Tensor, candidates: list = (), triplets: list = ()) -> hodgecover.Signals:
    """Signals of as many experts as the barriers have, with saliencies that grow with the index."""
    n = round((2 * len(barriers)) ** 0.5 + 0.5)
    return hodgecover.Signals(torch.arange(n) + 1, (torch.arange(n) + 1) / 100, barriers.double(),
                              torch.tensor(list(candidates), dtype=torch.int64).view(-1, 3),
                              torch.tensor(list(triplets), dtype=torch.float64))


@pytest.mark.parametrize("value", [0.3, 1e-9, 1e9])
def test_equal_barriers(value):
    """Without triangles eta_gradient is (2/3)(n+1)/n, the additive model explains all; filled, all is gradient and
    curl."""
    n = 8
    barriers = torch.full((28,), value, dtype=torch.float64)
    found = hodgecover.plan_from_signals(signals_of(barriers), 3).diagnostics
    assert found.eta.gradient == pytest.approx(2 / 3 * (n + 1) / n) and found.eta.curl == 0
    assert found.additive == {"energy": pytest.approx(1), "variance": 1.0}
    assert found.eta == pytest.approx(found.eta_constant)
    triples = torch.combinations(torch.arange(n), 3).tolist()
    found = hodgecover.plan_from_signals(signals_of(barriers, triples, [value] * 56), 3).diagnostics
    assert found.betti_1 == 0 and found.eta.harmonic == pytest.approx(0, abs=1e-12)
    assert found.discordance == 0


def test_barriers_of_zero():
    """Nothing is critical, and saliency alone chooses."""
    triples = torch.combinations(torch.arange(6), 3).tolist()
    plan = hodgecover.plan_from_signals(signals_of(torch.zeros(15), triples, [0.0] * 20), 2)
    found = plan.diagnostics
    assert found.critical_edges == found.critical_triangles == [] and plan.order == [5, 4, 3, 2, 1, 0]
    assert set(plan.redirect.values()) <= {4, 5} and found.eta == (0, 0, 0)


def test_fewer_than_three_edges_under_the_median_give_no_triangle():
    """Of three experts two edges are at most the median."""
    assert len(mathx.candidate_triangles(3, torch.tensor([1.0, 2.0, 3.0]), 500, 0)) == 0
    found = hodgecover.plan_from_signals(signals_of(torch.tensor([1.0, 2.0, 3.0])), 1).diagnostics
    assert found.triangles == 0 and found.betti_1 == 1  # a three-cycle that nothing fills


def test_an_expert_that_no_token_reaches():
    """Its merges are free, whatever its weights, and saliency puts it last."""
    found = hodgecover.measure_layer(random_layer(n=8, unreached=7))
    assert found.saliency[7] == found.frequency[7] == 0
    assert (found.barriers[(mathx.edges(8) == 7).any(1)].abs() < 1e-15).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_barriers_are_finite_and_not_negative(scale, dtype):
    """From logits all alike to logits of thousands, where most outcomes have a probability of 0."""
    layer = in_dtype(random_layer(), dtype)
    found = hodgecover.measure_layer(layer._replace(unembedding=layer.unembedding * scale))
    for barriers in (found.barriers, found.triplets):
        assert barriers.isfinite().all() and (barriers >= 0).all()


def test_the_docstrings_examples_hold():
    assert doctest.testmod(hodgecover).failed == 0


def test_each_file_has_its_licence_and_the_same_version():
    for module in (hodgecover, mathx, model_io):
        assert Path(module.__file__).read_text().startswith("# SPDX-License-Identifier: MIT\n")
        assert module.__version__ == hodgecover.__version__
