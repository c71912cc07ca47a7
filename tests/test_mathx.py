# SPDX-License-Identifier: MIT
"""The numerics of mathx.py: the sweep against the barrier's definition, KL, samples, the audit; accuracy, chunks,
memory. What the paper states of them is in test_paper.py."""
import doctest
import math

import hodgecover
import mathx
import pytest
import torch
from conftest import GOLDEN, refuse
from hodgecover import MoELayer
from hypothesis import strategies as st
from model_io import Experts, Model
from safetensors.torch import load_file
from strategies import (NO_TRIANGLES, PAIRS, SEEDS, TRIPLES, converted, cover_problems, fast_barriers, given,
                        kl_by_hand, kl_of_logit_change, layers, normal, output_by_hand, plain_barriers,
                        random_layer, uniform)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def test_the_docstrings_examples_hold():
    results = doctest.testmod(mathx)
    assert results.failed == 0 and results.attempted > 3


# --------------------------------------------------------------------------------------------------- the sweep


def everything(layer: MoELayer) -> mathx.Sample:
    """The sample of the vocabulary that is all of it."""
    log_p = mathx.log_readout(layer, 10**9)
    return mathx.Sample(torch.arange(log_p.shape[1]).expand_as(log_p), log_p)


@given(layers(), st.sampled_from([2, 3]), st.booleans())
def test_the_sweep_is_the_plain_barrier(layer, size, sampled):
    """Of any layer: any top-k, gates with and without renormalisation, an expert that no token uses, tokens that are
    routed nowhere, weights of the norm far from 1. 1e-9 beside the 1e-12 that the plain difference of log-softmaxes of
    logits up to some thousands loses."""
    simplices = torch.combinations(torch.arange(len(layer.experts.gate)), size)
    sample = everything(layer) if sampled else None
    barriers = fast_barriers(layer, simplices, sample)
    assert barriers.dtype == torch.float64 and barriers.shape == (len(simplices),) and (barriers >= 0).all()
    torch.testing.assert_close(barriers, plain_barriers(layer, simplices), rtol=1e-9, atol=1e-12)


@given(layers(), st.sampled_from([2, 3]), st.sampled_from([0, 3, 1000]), st.sampled_from([1, 2000, 10**5]))
def test_chunks_and_blocks_change_nothing(layer, size, vocab_sample, memory):
    """Whatever the memory: chunks of a token, or of all; blocks of outcomes."""
    simplices = torch.combinations(torch.arange(len(layer.experts.gate)), size)
    sample, told = mathx.sample_vocabulary(layer, vocab_sample), []
    expected = fast_barriers(layer, simplices, sample)
    barriers = fast_barriers(layer, simplices, sample, memory=memory, tick=told.append)
    torch.testing.assert_close(barriers, expected, rtol=1e-10, atol=1e-18)  # eps / |delta| of the smallest ones
    torch.testing.assert_close(mathx.sample_vocabulary(layer, vocab_sample, memory=memory), sample)
    assert told == sorted(told) and told[-1] == 1
    assert memory > 1 or len(told) == len(layer.x)


def test_blocks_of_a_large_vocabulary_change_nothing(monkeypatch):
    """More than one block of outcomes, the last one narrower."""
    layer, pairs = random_layer(vocab=600, tokens=5), torch.tensor(PAIRS[7])
    expected = plain_barriers(layer, pairs)
    monkeypatch.setattr(mathx, "CACHE_BYTES", 1)
    torch.testing.assert_close(fast_barriers(layer, pairs), expected, rtol=1e-9, atol=1e-15)
    blocks = mathx.changed_logits(torch.zeros(1, 600), torch.ones(1, 2, 600), torch.zeros(1, 4, 3).long(),
                                  torch.zeros(1, 4, 3), numbers=1)
    assert [delta.shape[-1] for _, delta in blocks] == [256, 256, 88]


@pytest.mark.parametrize("vocab_sample", [0, 9])
def test_tables_that_one_sweep_keeps_serve_the_next(monkeypatch, vocab_sample):
    """All of them, or as many as half of the memory holds; the barriers are the same."""
    layer, triples = random_layer(vocab=200), torch.tensor(TRIPLES[7])
    sample = mathx.sample_vocabulary(layer, vocab_sample)
    expected = fast_barriers(layer, triples, sample)
    for memory in (10**9, 10**5):
        kept = {}
        fast_barriers(layer, torch.tensor(PAIRS[7]), sample, memory=memory, kept=kept)
        size = sum(tables.logits.nbytes + tables.gram.nbytes for tables in kept.values())
        assert kept and size <= memory / 2
        torch.testing.assert_close(fast_barriers(layer, triples, sample, memory=memory, kept=kept), expected)
    kept = {}
    fast_barriers(layer, torch.tensor(PAIRS[7]), sample, kept=kept)
    monkeypatch.setattr(mathx, "read_tables", refuse)
    torch.testing.assert_close(fast_barriers(layer, triples, sample, kept=kept), expected)


@pytest.mark.parametrize("pair", [(0, 1), (2, 5), (3, 6)])
def test_a_pair_moves_the_stream_along_the_difference_of_its_outputs(pair):
    """Ours, the gate of a merge: y_S - y = (g_i w_j - g_j w_i) (E_j(x) - E_i(x)), by hand from the weights. No
    token uses expert 3."""
    i, j = pair
    layer = random_layer(unreached=3, k=3)
    counts = (layer.gates > 0).sum(0).tolist()
    w_i, w_j = (counts[e] / (counts[i] + counts[j]) for e in pair)
    total = 0.0
    for x, y, gates in zip(layer.x, layer.y, layer.gates):
        difference = output_by_hand(layer, j, x) - output_by_hand(layer, i, x)
        total += kl_by_hand(layer, y, (gates[i] * w_j - gates[j] * w_i) * difference)
    barrier = fast_barriers(layer, torch.tensor([pair])).item()
    assert barrier == pytest.approx(total / len(layer.x), rel=1e-9)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_the_sweep_of_checkpoints_is_the_plain_barrier(path):
    """Pairs and triples, on every layer of each golden checkpoint."""
    model = Model(path, dtype=torch.float64)
    head = model.unembedding()
    for step in model.stream(load_file(path / "golden.safetensors")["ids"]):
        if step.gates is None:
            continue
        layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, step.norm, head)
        for simplices in (torch.tensor([[0, 1], [2, 7], [3, 5]]), torch.tensor([[0, 1, 2], [3, 5, 7]])):
            plain = plain_barriers(layer, simplices)
            torch.testing.assert_close(fast_barriers(layer, simplices), plain, rtol=1e-8, atol=1e-15)


def test_merges_that_change_nothing_cost_nothing():
    """Of no simplex; of experts that no token reaches. (Of equal experts: test_paper.py.)"""
    layer = random_layer(unreached=3)
    layer.gates[:, 5] = 0
    assert fast_barriers(layer, torch.tensor([[3, 5]])).item() == 0
    assert fast_barriers(layer, NO_TRIANGLES).shape == (0,)


@pytest.mark.parametrize("vocab_sample", [0, 20])
def test_barriers_whose_exponentials_overflow_are_the_plain_ones(vocab_sample):
    """Changes of logits up to many thousands: the chunk is read out again, by logsumexp."""
    layer, pairs = random_layer(), torch.tensor(PAIRS[7])
    loud = layer._replace(unembedding=layer.unembedding * 1e4)
    barriers = fast_barriers(loud, pairs, mathx.sample_vocabulary(loud, vocab_sample))
    assert barriers.isfinite().all() and barriers.max() > 710
    if not vocab_sample:
        torch.testing.assert_close(barriers, plain_barriers(loud, pairs), rtol=1e-9, atol=1e-9)


def test_overflow_in_float32_is_read_out_carefully():
    """float32's exponential overflows at 89, float64's does not; 1e-4: the error of float32 logits of thousands."""
    layer, pairs = random_layer(), torch.tensor(PAIRS[7])
    loud = converted(layer._replace(unembedding=layer.unembedding * 1000), torch.float32)
    exact = plain_barriers(converted(loud, torch.float64), pairs)
    assert exact.max() > 100
    torch.testing.assert_close(fast_barriers(loud, pairs), exact, rtol=1e-4, atol=0)


def cancelled_stream(layer: MoELayer, left: float) -> MoELayer:
    """A layer of which all tokens use all experts, with a stream y of which the merge of 0 and 1 leaves a share."""
    first, second = (layer.experts(e, layer.x) for e in (0, 1))
    change = (layer.gates[:, :1] - layer.gates[:, 1:2]) / 2 * (second - first)
    return layer._replace(y=-(1 + left) * change)


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-6, 0.0])
def test_a_merge_that_cancels_the_stream(left):
    """rms(y_S) falls to sqrt(eps). The growth of |y|^2 is then known to 1e-16 of |y|^2, which is 1e-11 of what is left
    with eps."""
    layer, pairs = cancelled_stream(random_layer(tokens=6, k=7), left), torch.tensor(PAIRS[7])
    plain = plain_barriers(layer, pairs)
    assert plain[0] > 0.1
    torch.testing.assert_close(fast_barriers(layer, pairs), plain, rtol=1e-6, atol=0)


def test_rounding_leaves_no_negative_mean_square():
    """Of a large stream in float32, cancelled, the rounding error of the growth exceeds eps."""
    layer = random_layer(k=7)
    layer.experts.down.mul_(1e3)
    layer = cancelled_stream(converted(layer, torch.float32), 0.0)
    assert fast_barriers(layer, torch.tensor(PAIRS[7])).isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_barriers_of_lesser_precision_stay_near(dtype, bound, scale):
    """A change of logits has the relative error of the outputs that it combines, 2^-24 or 2^-9 of each number, whatever
    its size: the difference of two read-outs would lose changes a thousandth as large. KL goes with their square."""
    layer = random_layer(tokens=200)
    layer.experts.down.mul_(scale)
    low = converted(layer, dtype)
    exact = fast_barriers(converted(low, torch.float64), torch.tensor(PAIRS[7]))
    torch.testing.assert_close(fast_barriers(low, torch.tensor(PAIRS[7])), exact, rtol=bound, atol=0)


def test_distributions_are_read_out_in_float32_of_a_layer_in_bfloat16():
    """1e-5: float32's rounding of logits of some 10; bfloat16's would be 0.05."""
    layer = converted(random_layer(), torch.bfloat16)
    exact = mathx.log_readout(converted(layer, torch.float64), 10**9)
    log_p = mathx.log_readout(layer, 10**4)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocab_sample, bound", [(0, 0.999), (64, 0.99)])
def test_bfloat16_and_samples_rank_edges_as_float64_does(vocab_sample, bound):
    layer, pairs = random_layer(n=12, k=3, tokens=300, vocab=400), torch.combinations(torch.arange(12))
    low = converted(layer, torch.bfloat16)
    barriers = fast_barriers(low, pairs, mathx.sample_vocabulary(low, vocab_sample))
    assert bound < mathx.spearman(barriers, fast_barriers(layer, pairs)) < 1


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors over 64 kB that operations made beside a layer and that still live; `peak`: at
    most."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        held = *layer.experts, layer.x, layer.gates, layer.y, layer.unembedding
        on_cpu = [getattr(tensor, "held", tensor) for tensor in held]  # of fake_device.py
        self.held = {tensor.untyped_storage()._cdata for tensor in on_cpu}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, if it is new and large."""
        if storage._cdata in self.held or storage.nbytes() <= 1 << 16:
            return
        if storage._cdata in self.live and not self.live[storage._cdata][0].expired():
            return
        self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))


WIDE_SHAPES = [dict(d=64, f=400), dict(d=400, f=64), dict(d=32, f=32, vocab=20_000), dict(d=32, f=32, n=40, vocab=500)]


@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
@pytest.mark.parametrize("vocab_sample, size", [(0, 3), (50, 2)])
def test_the_sweep_takes_the_memory_that_it_may_and_no_more(vocab_sample, size, shape):
    """Whatever the tensors are: wide experts, a large vocabulary, many experts."""
    memory = 12 * 10**6
    layer = converted(random_layer(**dict(n=8, tokens=400, vocab=500) | shape), torch.float32)
    simplices = torch.combinations(torch.arange(len(layer.experts.gate)), size)
    simplices = simplices[::1 + len(simplices) // 780]
    with LiveBytes(layer) as count:
        sample = mathx.sample_vocabulary(layer, vocab_sample, memory=memory)
        fast_barriers(layer, simplices, sample, memory=memory)
    assert memory / 4 < count.peak < memory


def test_a_chunk_takes_the_tokens_that_a_third_of_the_memory_holds_and_at_least_one():
    layer = random_layer()

    def at_once(memory: float) -> int:
        return mathx.tokens_at_once(layer, None, int(memory))
    one = 10**12 / at_once(10**12)  # memory for each token
    assert [at_once(one * count) for count in (0.5, 1.9, 2.1, 9.9)] == [1, 1, 2, 9]


def test_a_sample_is_drawn_in_the_memory_that_it_may_take_in_float64():
    layer = random_layer(n=8, tokens=120, d=32, f=32, vocab=5000)
    with LiveBytes(layer) as count:
        mathx.sample_vocabulary(layer, 50, memory=10**7)
    assert 5e6 < count.peak < 10e6


def test_barriers_from_samples_of_the_vocabulary():
    """Unbiased but for Jensen's gap: the mean over 40 seeds is below the exact barrier, and near it."""
    layer, pairs = random_layer(vocab=200), torch.tensor(PAIRS[7])
    seeds = torch.stack([fast_barriers(layer, pairs, mathx.sample_vocabulary(layer, 40, seed)) for seed in range(40)])
    assert not torch.equal(seeds[0], seeds[1]) and (seeds >= 0).all()
    ratio = seeds.mean(0) / fast_barriers(layer, pairs)
    assert 0.9 < ratio.min() and ratio.max() < 1.02 and ratio.mean() < 1
    assert all(mathx.sample_vocabulary(layer, count) is None for count in (0, 200, 1000))


def audited(layer: MoELayer, simplices: torch.Tensor, sample: mathx.Sample, **more) -> torch.Tensor:
    weights = hodgecover.merge_weights(simplices, (layer.gates > 0).sum(0))
    return mathx.audit_sample(layer, simplices, weights, sample, seed=1, **more)


def test_the_audit_holds_what_the_sweep_estimates_and_the_exact_kl():
    """With one simplex that only the last of two tokens touches, the audited pair is twice the barrier, its sample that
    of the last token."""
    layer, simplex = random_layer(vocab=200, tokens=2, n=3, k=3), torch.tensor([[0, 2]])
    layer.gates[0] = 0
    sample = mathx.sample_vocabulary(layer, 20, 1)
    audit = audited(layer, simplex, sample)
    estimated, exact = fast_barriers(layer, simplex, sample), fast_barriers(layer, simplex)
    torch.testing.assert_close(audit, 2 * torch.stack((estimated, exact), 1))
    torch.testing.assert_close(exact, plain_barriers(layer, simplex))
    assert audit.shape == (1, 2) and audit[0, 0] != audit[0, 1]


@given(layers(), st.sampled_from([2, 3]))
def test_the_audits_exact_kl_is_the_plain_kl_at_single_tokens(layer, size):
    """Each is that of some simplex at some token that is routed to a member: n of them if each token has one."""
    simplex = torch.arange(size)[None]
    audit = audited(layer, simplex, everything(layer))
    rates = (layer.gates > 0).double().mean(0)
    expected = []
    for token in mathx.touching(simplex, layer.gates).squeeze(1).nonzero().squeeze(1).tolist():
        change = torch.zeros_like(layer.y[0])
        weights, gates = hodgecover.merge_weights(simplex, rates)[0], layer.gates[token, :size]
        for e in range(size):
            change += (gates.sum() * weights[e] - gates[e]) * output_by_hand(layer, e, layer.x[token])
        expected.append(kl_by_hand(layer, layer.y[token], change))
    expected = torch.tensor(expected, dtype=torch.float64).sort().values
    torch.testing.assert_close(audit[:, 1].sort().values, expected, rtol=1e-6, atol=1e-11)
    torch.testing.assert_close(audit[:, 0], audit[:, 1], rtol=1e-6, atol=1e-11)


def test_the_audit_takes_a_random_simplex_at_each_of_many_tokens():
    """All differ, and their mean is near that of the barriers."""
    many, pairs = random_layer(vocab=200, tokens=300), torch.tensor(PAIRS[7])
    sample = mathx.sample_vocabulary(many, 20)
    audit = audited(many, pairs, sample)
    assert audit.shape == (128, 2) and (audit > 0).all() and len(audit.unique(dim=0)) == 128
    touching = 21 / 11  # 11 of the 21 pairs touch a token of top-2
    assert audit[:, 1].mean().item() == pytest.approx(fast_barriers(many, pairs).mean().item() * touching, rel=0.3)
    many.gates.zero_()
    assert audited(many, pairs, sample).shape == (0, 2)


# --------------------------------------------------------------------------------------------------------- KL


@given(SEEDS, st.sampled_from([1e-2, 1, 10, 60, 300]), st.sampled_from([1e-9, 1e-4, 1e-1, 1, 30, 2000]))
def test_kl_of_peaked_distributions_and_of_tiny_and_huge_changes(seed, peak, size):
    """In float64 against the direct KL, in float32 against float64, and one p for all rows or one for each."""
    logits = peak * normal(seed, 50)
    delta = size * normal(seed + 1, 3, 50)
    log_p = logits.log_softmax(-1)
    log_q = (logits + delta).log_softmax(-1)
    direct = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = kl_of_logit_change(log_p, delta)
    assert (kl >= 0).all() and kl.isfinite().all()
    noise = 1e-14 * max(peak * 10, size * 10, 1)  # the direct difference of log-softmaxes cancels
    torch.testing.assert_close(kl, direct, rtol=1e-8, atol=noise)
    each = torch.stack((log_p, (logits / 2).log_softmax(-1), (-logits).log_softmax(-1)))  # a p for each row
    rows = torch.cat([kl_of_logit_change(p, row[None]) for p, row in zip(each, delta)])
    torch.testing.assert_close(kl_of_logit_change(each, delta), rows, rtol=1e-9, atol=1e-300)
    single = kl_of_logit_change(log_p.float(), delta.float())
    assert (single >= 0).all() and single.isfinite().all()
    torch.testing.assert_close(single.double(), kl, rtol=1e-3, atol=1e-6 * min(size, 1) + 1e-6 * peak * (size > 1))


@given(SEEDS, st.sampled_from([1e-2, 1, 10, 300]), st.sampled_from([1e-9, 1e-4, 1e-1, 1, 30]), st.integers(1, 50))
def test_kl_from_blocks_of_the_vocabulary_is_that_from_the_whole(seed, peak, size, width):
    """Blocks without mass among them; a shift that all changes share, as common as it is in logits, changes nothing."""
    log_p = (peak * normal(seed, 50)).log_softmax(-1)
    delta = size * normal(seed + 1, 3, 50)
    whole = kl_of_logit_change(log_p, delta)
    for shift in (0, 3 * size):
        kl = kl_of_logit_change(log_p, delta + shift, width, careful=False)
        assert (kl >= 0).all()
        torch.testing.assert_close(kl, whole, rtol=1e-5, atol=1e-300)


def test_kl_of_a_change_that_overflows():
    """The exponential of 2000 is infinite; KL is log E_p[exp delta] - E_p[delta] = 2000 - log 2 - 1000."""
    log_p = torch.full((2,), math.log(0.5), dtype=torch.float64)
    delta = torch.tensor([[2000.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    small = math.log((math.exp(0.1) + 1) / 2) - 0.05
    for p in (log_p, log_p.expand(2, 2)):
        assert kl_of_logit_change(p, delta).tolist() == pytest.approx([1000 - math.log(2), small])


def test_kl_is_accurate_if_a_difference_of_log_softmaxes_is_lost():
    """KL = Var_p(delta) / 2 to second order: 1e-16, which float64 log-softmaxes of size 5 cannot resolve."""
    log_p = torch.linspace(-3, 3, 40, dtype=torch.float64).log_softmax(-1)
    delta = 1e-8 * torch.sin(torch.arange(40, dtype=torch.float64))[None]
    p = log_p.exp()
    variance = (p * (delta[0] - p @ delta[0]).square()).sum()
    torch.testing.assert_close(kl_of_logit_change(log_p, delta)[0], variance / 2, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------ a sample of the vocabulary


@st.composite
def distributions(draw, low: int = 2, high: int = 40):
    """(p (V,) float64, a count from 1 to V), flat or peaked."""
    vocab = draw(st.integers(low, high))
    logits = normal(draw(SEEDS), vocab) * draw(st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    return logits.softmax(0), draw(st.integers(1, vocab))


def tau_of(p: torch.Tensor, count: int) -> float:
    """The largest tau for which the chances min(1, p / tau) sum to `count`, by bisection."""
    low, high = -700.0, 1e-9
    for _ in range(100):
        middle = (low + high) / 2
        enough = (p / math.exp(middle)).clamp(max=1).sum().item() >= count * (1 - 1e-15)
        low, high = (middle, high) if enough else (low, middle)
    return math.exp(low)


@given(distributions())
def test_a_threshold_makes_the_chances_sum_to_the_count(case):
    p, count = case
    tau = mathx.threshold(p[None], count)
    assert tau.shape == (1, 1) and tau.item() == pytest.approx(tau_of(p, count), rel=1e-9)


@given(distributions(), SEEDS)
def test_samples_of_outcomes_by_all_offsets(case, seed):
    """As the offset goes from 0 to 1, the sample changes where the end of an outcome's stretch passes: over the parts
    between, each outcome weighs p on average, and so KL is no more than the exact one. Each sample is a distribution of
    `count` outcomes, ascending; likely ones are certain and keep their p, the others weigh tau, those left out less."""
    p, count = case
    tau = tau_of(p, count)
    ends = (p / tau).clamp(max=1).cumsum(0)
    cuts = torch.cat((torch.zeros(1), ends % 1, torch.ones(1))).sort().values
    cuts = cuts[[True, *(cuts.diff() > 1e-9).tolist()]]
    share, offsets = cuts.diff(), (cuts[1:] + cuts[:-1]) / 2
    outcomes, log_q = mathx.sample_outcomes(p.log().expand(len(offsets), -1), count, offsets)
    q = log_q.exp()
    assert outcomes.shape == (len(offsets), count) and (outcomes.diff() > 0).all()
    torch.testing.assert_close(q, p[outcomes].clamp(min=tau))
    torch.testing.assert_close(q.sum(1), torch.ones(len(offsets)).double())
    mean = torch.zeros(len(offsets), len(p)).double().scatter(1, outcomes, q).T @ share
    torch.testing.assert_close(mean, p, rtol=0, atol=1e-7)
    delta = normal(seed, len(p))
    kl, exact = kl_of_logit_change(log_q, delta[outcomes]), kl_of_logit_change(p.log(), delta[None])
    assert (kl >= 0).all() and (kl @ share).item() <= exact.item() + 1e-6


@pytest.mark.parametrize("offset, drawn", [
    (0, [1, 2]), (0.5, [1, 2]), (0.7, [1, 3]), (0.9, [2, 3]), (1 - 2**-53, [2, 3]),
])
def test_a_sample_of_outcomes_by_hand(offset, drawn):
    """Outcome 0 is certain. The others lie end to end, up to 0.2, 0.4, 0.5, and are read at 0.25 offset and 0.25 on.

    At offset 0 the empty stretch of outcome 0 is not read; rounding of the last offset does not lead past outcome 3.
    """
    log_p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log()
    outcomes, log_q = mathx.sample_outcomes(log_p, 3, torch.tensor([offset], dtype=torch.float64))
    assert outcomes.tolist() == [[0, *drawn]]
    assert log_q.exp()[0].tolist() == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize("certain", [0, 2, 3])
def test_a_sample_of_a_certain_outcome(certain):
    """All other outcomes have a probability of 0: whatever is drawn beside it has no weight."""
    log_p = torch.full((1, 4), -math.inf, dtype=torch.float64)
    log_p[0, certain] = 0
    outcomes, log_q = mathx.sample_outcomes(log_p, 3, torch.tensor([0.5]))
    assert (log_q.exp() * (outcomes == certain)).sum() == log_q.exp().sum() == 1
    assert kl_of_logit_change(log_q, normal(0, 4)[outcomes]).item() == pytest.approx(0, abs=1e-300)


# --------------------------------------------------------------------------------------------------- the audit


@given(st.integers(3, 20), SEEDS)
def test_additive_model_is_exact_on_sums_and_beats_other_potentials(n, seed):
    """A constant signal, also of 0, is a sum, and has no variance to explain."""
    phi, noise = uniform(seed, 2, n)
    d1, _ = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    pairs = hodgecover.edges(n)
    for exact in (phi[pairs].sum(1), torch.full((len(pairs),), round(phi[0].item(), 1), dtype=torch.float64)):
        assert mathx.additive_residual(exact, d1).norm() < 1e-9
        assert mathx.additive_shares(exact, d1) == pytest.approx({"energy": 1, "variance": 1})
    b = uniform(seed + 1, len(pairs))
    residual = mathx.additive_residual(b, d1)
    assert residual.norm() <= (b - (phi + noise)[pairs].sum(1)).norm() + 1e-12
    assert (d1.abs() @ residual).norm() < 1e-9  # normal equations
    totals = {"energy": b, "variance": b - b.mean()}
    assert mathx.additive_shares(b, d1) == pytest.approx({
        name: 1 - (residual.norm() / of.norm()).item() ** 2 for name, of in totals.items()})


def test_shortfall_by_hand():
    exact, estimated = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([1.75, 1.0, 3.25]).double()
    residuals = [1.75 - 0.75 * 1, 1 - 0.75 * 2, 3.25 - 0.75 * 5]
    error = math.sqrt(sum((r - sum(residuals) / 3) ** 2 for r in residuals)) / 8  # of the ratio 6 / 8
    assert mathx.shortfall(estimated, exact) == pytest.approx({
        "pairs": 3, "shortfall": 0.25, "standard_error": error, "largest": 0.75, "rank_correlation": 0.5})
    assert mathx.shortfall(torch.zeros(2).double(), torch.zeros(2).double()) == {
        "pairs": 2, "shortfall": 0, "standard_error": 0, "largest": 0, "rank_correlation": 1}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_spearman_is_the_correlation_of_mean_ranks(pairs):
    ranks = [[sum(w < v for w in side) + (side.count(v) + 1) / 2 for v in side] for side in map(list, zip(*pairs))]
    a, b = (torch.tensor(side).double() for side in zip(*pairs))
    expected = torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1].item()
    assert mathx.spearman(a, b) == (pytest.approx(expected) if math.isfinite(expected) else 1)


@given(cover_problems())
def test_after_how_many_picks_all_are_covered(problem):
    saliency, families = problem
    n = len(saliency)
    order = hodgecover.greedy_cover(saliency, families, n)
    for simplices, _ in families:
        full = next(size for size in range(n + 1)
                    if all(set(simplex) & set(order[:size]) for simplex in simplices.tolist()))
        assert mathx.covered_at(order, simplices) == full
