# SPDX-License-Identifier: MIT
"""Details of mathx.py that the paper does not state: accuracy, sampling, ties, empty input, memory. The paper's own
statements are in test_paper.py."""
import doctest
import itertools
import math
import subprocess
import sys
from pathlib import Path

import mathx
import pytest
import torch
from hypothesis import strategies as st
from strategies import (PAIRS, SEEDS, complexes, cover_problems, fifths, given, normal, rational_rank,
                        triangle_tensor, uniform)


def test_the_docstrings_examples_hold():
    results = doctest.testmod(mathx)
    assert results.failed == 0 and results.attempted > 10


# ------------------------------------------------------------------------------------ complex and decomposition


@given(st.integers(2, 8), st.randoms(use_true_random=False))
def test_relabelled_edges_by_their_ends(n, random):
    signal = torch.arange(len(PAIRS[n]))
    order = random.sample(range(n), n)
    moved = mathx.relabel_edges(signal, torch.tensor(order))
    for value, (r, s) in zip(moved.tolist(), PAIRS[n]):
        assert set(PAIRS[n][value]) == {order[r], order[s]}


def test_a_zero_signal_has_no_energy():
    parts = mathx.hodge_decompose(torch.zeros(6, dtype=torch.float64),
                                  *mathx.boundary_matrices(4, triangle_tensor([])))
    assert mathx.energy_fractions(parts) == mathx.EnergyFractions(gradient=0, curl=0, harmonic=0)


@given(complexes())
def test_independent_columns_are_a_basis_and_the_first_of_it(case):
    _, d2 = mathx.boundary_matrices(*case[:2])
    expected = [column for column in range(d2.shape[1])
                if rational_rank(d2[:, :column + 1]) > rational_rank(d2[:, :column])]
    assert mathx.independent_columns(d2) == expected


def test_all_triangles_of_12_vertices_have_rank_55():
    """A complete 2-complex has no cycle left: rank d2 = C(11, 2). Its smallest pivot is about 0.3."""
    triangles = torch.tensor(list(itertools.combinations(range(12), 3)))
    shuffled = triangles[torch.randperm(len(triangles), generator=torch.Generator().manual_seed(0))]
    assert len(mathx.independent_columns(mathx.boundary_matrices(12, shuffled)[1])) == 55


@given(st.integers(2, 5), SEEDS)
def test_a_spanning_tree_is_the_cheapest(n, seed):
    b = fifths(seed, 9, len(PAIRS[n]))
    d1, _ = mathx.boundary_matrices(n, triangle_tensor([]))
    trees = [list(tree) for tree in itertools.combinations(range(len(b)), n - 1)
             if rational_rank(d1[:, list(tree)]) == n - 1]
    found = mathx.spanning_tree(n, b)
    assert found.tolist() == sorted(found.tolist()) and len(found) == n - 1
    assert found.sum().item() == pytest.approx(min(b[tree].sum().item() for tree in trees))


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [3, 7, 20])
def test_a_constant_signal_is_additive(n, value):
    d1, _ = mathx.boundary_matrices(n, triangle_tensor([]))
    fit = mathx.additive_model(torch.full((math.comb(n, 2),), value, dtype=torch.float64), d1)
    assert (fit.energy, fit.variance) == (pytest.approx(1), 1)


@given(st.integers(3, 8), SEEDS)
def test_additive_model_is_exact_on_sums_and_beats_other_potentials(n, seed):
    phi, noise = uniform(seed, 2, n)
    d1, _ = mathx.boundary_matrices(n, triangle_tensor([]))
    pairs = mathx.edges(n)
    exact = mathx.additive_model(phi[pairs].sum(1), d1)
    assert exact.residual.norm() < 1e-9
    assert (exact.energy, exact.variance) == pytest.approx((1, 1))
    b = uniform(seed + 1, len(pairs))
    best = mathx.additive_model(b, d1)
    assert best.residual.norm() <= (b - (phi + noise)[pairs].sum(1)).norm() + 1e-12
    assert (d1.abs() @ best.residual).norm() < 1e-9  # normal equations
    assert best.energy == pytest.approx(1 - (best.residual.norm() / b.norm()).item() ** 2)
    assert best.variance == pytest.approx(1 - (best.residual.norm() / (b - b.mean()).norm()).item() ** 2)


LAYER_OF_256 = """
import math, mathx, torch
from tests.peak import peak_memory
n, generator = 256, torch.Generator().manual_seed(0)
b = torch.rand(math.comb(n, 2), generator=generator, dtype=torch.float64)
triangles = mathx.candidate_triangles(n, b, 500, 0)
triplets = torch.rand(500, generator=generator, dtype=torch.float64)
curve = mathx.betti_curve(n, b, triangles, triplets, torch.linspace(0, 1, 80, dtype=torch.float64))
d1, d2 = mathx.boundary_matrices(n, triangles)
harmonic = mathx.hodge_decompose(b, d1, d2).harmonic
mathx.additive_model(b, d1)
assert curve[-1] == mathx.betti_1(d1, d2) and harmonic.norm() > 0
print(peak_memory())
"""


def test_256_experts_take_under_a_gigabyte():
    """32,640 edges, 80 Betti numbers, 500 triangles; an E x E matrix alone would be 8.5 GB."""
    done = subprocess.run([sys.executable, "-c", LAYER_OF_256], capture_output=True, text=True,
                          cwd=Path(mathx.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e9


# ------------------------------------------------------------------------------------------ curated triangles


def test_more_candidates_than_the_limit_are_sampled_by_seed():
    b = torch.arange(28, dtype=torch.float64)
    assert len(mathx.candidate_triangles(8, b, 500, 0)) > 3
    samples = [mathx.candidate_triangles(8, b, 3, seed).tolist() for seed in range(6)]
    assert len({str(sample) for sample in samples}) > 1
    assert mathx.candidate_triangles(8, b, 3, 5).tolist() == samples[5]


def test_discordance_by_hand():
    """Triangles 012, 034, 056 share no edge; all edges cost 1, but those of 056 nothing."""
    triangles = triangle_tensor([(0, 1, 2), (0, 3, 4), (0, 5, 6)])
    b = torch.ones(21, dtype=torch.float64)
    b[mathx.triangle_edges(7, triangles[2:])] = 0
    triplets = torch.tensor([1.1, 3.0, 0.5], dtype=torch.float64)
    found = mathx.discordance(7, b, triangles, triplets, 0.1)
    assert found.fraction == pytest.approx(2 / 3)  # 1.1 does not exceed
    quantiles = [1.1, 1.1 + 1.9 / 4, 1.1 + 1.9 / 2, 1.1 + 1.9 * 3 / 4, 3.0]  # of two ratios; 0.5 / 0 is none
    assert found.ratio_quantiles == pytest.approx(quantiles)
    assert mathx.discordance(7, b, triangles[2:], triplets[2:], 0.1) == (1.0, [])
    assert mathx.discordance(7, b, triangle_tensor([]), triplets[:0], 0.1) == (0.0, [])


# --------------------------------------------------------------------------------------------------------- KL


@given(SEEDS, st.sampled_from([1e-2, 1, 10, 60, 300]), st.sampled_from([1e-9, 1e-4, 1e-1, 1, 30, 2000]))
def test_kl_of_peaked_distributions_and_of_tiny_and_huge_changes(seed, peak, size):
    """In float64 against the direct KL, in float32 against float64, and one p for all rows or one for each."""
    logits = peak * normal(seed, 50)
    delta = size * normal(seed + 1, 3, 50)
    log_p = logits.log_softmax(-1)
    log_q = (logits + delta).log_softmax(-1)
    direct = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = mathx.kl_of_logit_change(log_p, delta)
    assert (kl >= 0).all() and kl.isfinite().all()
    noise = 1e-14 * max(peak * 10, size * 10, 1)  # the direct difference of log-softmaxes cancels
    torch.testing.assert_close(kl, direct, rtol=1e-8, atol=noise)
    each = torch.stack((log_p, (logits / 2).log_softmax(-1), (-logits).log_softmax(-1)))  # a p for each row
    rows = torch.cat([mathx.kl_of_logit_change(p, row[None]) for p, row in zip(each, delta)])
    torch.testing.assert_close(mathx.kl_of_logit_change(each, delta), rows, rtol=1e-9, atol=1e-300)
    single = mathx.kl_of_logit_change(log_p.float(), delta.float())
    assert (single >= 0).all() and single.isfinite().all()
    torch.testing.assert_close(single.double(), kl, rtol=1e-3, atol=1e-6 * min(size, 1) + 1e-6 * peak * (size > 1))


@given(SEEDS, st.sampled_from([1e-2, 1, 10, 300]), st.sampled_from([1e-9, 1e-4, 1e-1, 1, 30]), st.integers(1, 50))
def test_kl_from_blocks_of_the_vocabulary_is_that_from_the_whole(seed, peak, size, width):
    """Blocks without mass among them; a shift that all changes share, as common as it is in logits, changes nothing."""
    log_p = (peak * normal(seed, 50)).log_softmax(-1)
    delta = size * normal(seed + 1, 3, 50)
    whole = mathx.kl_of_logit_change(log_p, delta)
    for shift in (0, 3 * size):
        blocks = zip(log_p.split(width), (delta + shift).split(width, dim=1))
        kl = mathx.kl_of_blocks(mathx.kl_block(*block) for block in blocks)
        assert (kl >= 0).all()
        torch.testing.assert_close(kl, whole, rtol=1e-5, atol=1e-300)


def test_kl_of_a_change_that_overflows():
    """The exponential of 2000 is infinite; KL is log E_p[exp delta] - E_p[delta] = 2000 - log 2 - 1000."""
    log_p = torch.full((2,), math.log(0.5), dtype=torch.float64)
    delta = torch.tensor([[2000.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    small = math.log((math.exp(0.1) + 1) / 2) - 0.05
    for p in (log_p, log_p.expand(2, 2)):
        assert mathx.kl_of_logit_change(p, delta).tolist() == pytest.approx([1000 - math.log(2), small])


def test_kl_is_accurate_if_a_difference_of_log_softmaxes_is_lost():
    """KL = Var_p(delta) / 2 to second order: 1e-16, which float64 log-softmaxes of size 5 cannot resolve."""
    log_p = torch.linspace(-3, 3, 40, dtype=torch.float64).log_softmax(-1)
    delta = 1e-8 * torch.sin(torch.arange(40, dtype=torch.float64))[None]
    p = log_p.exp()
    variance = (p * (delta[0] - p @ delta[0]).square()).sum()
    torch.testing.assert_close(mathx.kl_of_logit_change(log_p, delta)[0], variance / 2, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------ a sample of the vocabulary


@st.composite
def distributions(draw, low: int = 2, high: int = 40):
    """(p (V,) float64, a count from 1 to V), flat or peaked."""
    vocab = draw(st.integers(low, high))
    logits = normal(draw(SEEDS), vocab) * draw(st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    return logits.softmax(0), draw(st.integers(1, vocab))


@given(distributions(), st.floats(0, 1, exclude_max=True))
def test_a_sample_of_outcomes_is_a_distribution_that_keeps_the_likely_ones(case, offset):
    p, count = case
    outcomes, log_q = (part[0] for part in mathx.sample_outcomes(p.log()[None], count, torch.tensor([offset])))
    q = log_q.exp()
    assert len(outcomes) == len(set(outcomes.tolist())) == count
    assert q.sum().item() == pytest.approx(1)
    tau = q.min()
    assert ((q - p[outcomes]).abs() <= 1e-9).logical_or((q - tau).abs() <= 1e-9).all()  # its own weight, or tau
    left_out = [v for v in range(len(p)) if v not in outcomes]
    assert all(p[v] <= tau + 1e-9 for v in left_out)
    if count == len(p):
        torch.testing.assert_close(torch.zeros_like(p).scatter(0, outcomes, q), p)


@given(distributions(), SEEDS)
def test_samples_of_outcomes_are_unbiased_and_their_kl_is_a_lower_bound_on_average(case, seed):
    """Averaged over 4,000 evenly spaced offsets, at which each outcome is drawn to within 1 / 4,000 of p / tau."""
    p, count = case
    delta = normal(seed, len(p))
    offsets = (torch.arange(4000) + 0.5).double() / 4000
    outcomes, log_q = mathx.sample_outcomes(p.log().expand(4000, -1), count, offsets)
    mean = (log_q.exp() * delta[outcomes]).sum(1).mean().item()
    assert mean == pytest.approx((p @ delta).item(), abs=len(p) * delta.abs().max().item() / 4000)
    kl = mathx.kl_of_logit_change(log_q, delta[outcomes])
    exact = mathx.kl_of_logit_change(p.log(), delta[None]).item()
    assert (kl >= 0).all() and kl.mean().item() <= exact + len(p) * delta.exp().max().item() / 4000


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


def test_shortfall_by_hand():
    exact, estimated = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([1.75, 1.0, 3.25]).double()
    found = mathx.shortfall(estimated, exact)
    residuals = [1.75 - 0.75 * 1, 1 - 0.75 * 2, 3.25 - 0.75 * 5]
    error = math.sqrt(sum((r - sum(residuals) / 3) ** 2 for r in residuals)) / 8  # of the ratio 6 / 8
    assert found == mathx.Shortfall(
        pairs=3, shortfall=pytest.approx(0.25), standard_error=pytest.approx(error), largest=pytest.approx(0.75),
        rank_correlation=pytest.approx(0.5))
    nothing = mathx.shortfall(torch.zeros(2).double(), torch.zeros(2).double())
    assert nothing == mathx.Shortfall(pairs=2, shortfall=0, standard_error=0, largest=0, rank_correlation=1)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_spearman_is_the_correlation_of_mean_ranks(pairs):
    ranks = [[sum(w < v for w in side) + (side.count(v) + 1) / 2 for v in side] for side in map(list, zip(*pairs))]
    a, b = (torch.tensor(side).double() for side in zip(*pairs))
    expected = torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1].item()
    assert mathx.spearman(a, b) == (pytest.approx(expected) if math.isfinite(expected) else 1)


# --------------------------------------------------------------------------------------------------- selection


def test_ties_go_to_the_lowest_index():
    nothing = [(triangle_tensor([]), 1.0)]
    assert mathx.greedy_cover(torch.zeros(5, dtype=torch.float64), nothing, 5) == [0, 1, 2, 3, 4]
    thirds = [(torch.tensor([[0, 3], [1, 4], [2, 5]]), 0.1)]
    assert mathx.greedy_cover(torch.zeros(6, dtype=torch.float64), thirds, 3) == [0, 1, 2]
    flat = torch.ones(6, dtype=torch.float64)
    assert mathx.redirect([3, 1], flat, 0 * flat, 1.0) == {0: 1, 2: 1}


@given(SEEDS)
def test_rounding_breaks_no_tie_between_equal_counts(seed):
    """Five stars of 13 edges each, in any order: sums of 13 times 0.3 / 65 differ with the order of summation."""
    stars = torch.tensor([[center, 5 + 13 * center + leaf] for center in range(5) for leaf in range(13)])
    shuffled = stars[torch.randperm(65, generator=torch.Generator().manual_seed(seed))]
    assert mathx.greedy_cover(torch.zeros(70, dtype=torch.float64), [(shuffled, 0.3)], 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("percent, count", [(0, 0), (5, 3), (10, 5), (10.5, 6), (100, 50)])
def test_critical_rounds_up_and_breaks_ties_to_the_first(percent, count):
    values = torch.tensor([1.0, 2.0] * 25, dtype=torch.float64)
    expected = sorted((list(range(1, 50, 2)) + list(range(0, 50, 2)))[:count])
    assert mathx.critical(values, percent).tolist() == expected


def test_a_count_that_is_whole_is_not_rounded_up_by_its_binary_fraction():
    assert len(mathx.critical(torch.arange(3000, dtype=torch.float64), 1.1)) == 33  # 3000 * 1.1 / 100 > 33 in floats


def test_values_up_to_the_floor_are_never_critical():
    assert mathx.critical(torch.zeros(10, dtype=torch.float64), 50).tolist() == []
    assert mathx.critical(torch.tensor([0.0, 1.0, 1e-15], dtype=torch.float64), 100, 1e-12).tolist() == [1]
    assert mathx.critical(torch.zeros(0, dtype=torch.float64), 50).tolist() == []


@given(cover_problems())
def test_after_how_many_picks_all_are_covered(problem):
    saliency, families = problem
    n = len(saliency)
    order = mathx.greedy_cover(saliency, families, n)
    for simplices, _ in families:
        full = next(size for size in range(n + 1)
                    if all(set(simplex) & set(order[:size]) for simplex in simplices.tolist()))
        assert mathx.covered_at(order, simplices) == full
        assert mathx.covered_at(order[:full], simplices) == full
        assert mathx.covered_at(order[:max(full - 1, 0)], simplices) == full  # one more than there are picks


@given(complexes(3, 7), st.sets(st.integers(0, 6), min_size=1))
def test_retained_mass_word_by_word(case, chosen):
    n, _, b = case
    survivors = sorted(v for v in chosen if v < n)
    total = sum(value ** 2 for value in b.tolist())
    some = sum(value ** 2 for value, edge in zip(b.tolist(), PAIRS[n]) if set(edge) & set(survivors))
    whole = sum(value ** 2 for value, edge in zip(b.tolist(), PAIRS[n]) if set(edge) <= set(survivors))
    found = mathx.retained(b, mathx.edges(n), survivors)
    assert found == mathx.Retained(some=pytest.approx(some / total), all=pytest.approx(whole / total))
    assert mathx.retained(b * 0, mathx.edges(n), survivors) == mathx.Retained(some=0, all=0)


def test_redirect_of_a_zero_signal_goes_to_the_first_survivor():
    zero = torch.zeros(6, dtype=torch.float64)
    assert mathx.redirect([3, 1], zero, zero, 1.0) == {0: 1, 2: 1}
