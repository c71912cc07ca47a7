# SPDX-License-Identifier: MIT
"""The paper (arXiv 2605.13997), statement by statement, in its order: properties and brute force on small complexes.

b is an edge signal, d = (d1, d2) the boundary matrices, L1 the Hodge Laplacian; see the symbols of mathx.py.
"""
import itertools
import math

import hodgecover
import mathx
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from strategies import (PAIRS, SEEDS, TRIPLES, barrier_by_hand, complexes, cover_problems, fifths, given, normal,
                        random_layer, rational_rank, triangle_tensor, uniform)


def value_of(n: int, signal: torch.Tensor) -> dict[tuple[int, int], float]:
    """An edge signal by its edges, both ways round."""
    by_edge = dict(zip(PAIRS[n], signal.tolist()))
    return by_edge | {(j, i): value for (i, j), value in by_edge.items()}


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the norm of the signal `scale`."""
    return (found - expected).norm().item() <= 1e-9 * scale.norm().item()


def kernel(laplacian: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of ker L1, (E, beta_1). (The other eigenvalues of a small complex are far from 0.)"""
    values, vectors = torch.linalg.eigh(laplacian)
    return vectors[:, values < 1e-9]


def components(n: int, edges: list[tuple[int, int]]) -> int:
    """Connected components of a graph, by flooding."""
    label = list(range(n))
    for _ in range(n):
        for i, j in edges:
            label[i] = label[j] = min(label[i], label[j])
    return len(set(label))


# --------------------------------------------------------------------------------- barriers are KL (section 3.1)

@pytest.mark.parametrize("simplex", [[0, 1], [2, 3], [1, 3, 6]])
def test_a_barrier_is_the_kl_of_a_frequency_weighted_merge(simplex):
    """Section 3.1: replace the experts of a pair or a triple by their merge, and compare the next-token distributions,
    here token by token from the weights alone. Expert 3 has no token: in its merge with 2 it has no weight."""
    layer = random_layer(tokens=12, unreached=3)
    expected = barrier_by_hand(layer, simplex)
    assert hodgecover.plain_barrier(layer, simplex).item() == pytest.approx(expected, rel=1e-9)
    assert hodgecover.lens_barriers(layer, torch.tensor([simplex])).item() == pytest.approx(expected, rel=1e-6)


@given(SEEDS)
def test_merge_weights_are_routing_rates(seed):
    """Sections 3.1 and A.10: shares of the routing rate; equal shares if all rates vanish."""
    rates = uniform(seed, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    share = hodgecover.merge_weights(torch.tensor([[0, 1, 2], [0, 2, 3]]), rates)
    torch.testing.assert_close(share[0], rates[:3] / rates[:3].sum())
    assert share[1, 2] == 0
    none = hodgecover.merge_weights(torch.tensor([[0, 1, 2]]), torch.zeros(3))
    torch.testing.assert_close(none, torch.full((1, 3), 1 / 3).double())


@given(SEEDS)
def test_barriers_are_not_negative_and_equal_experts_merge_for_nothing(seed):
    """Section 3.1: a KL divergence, 0 if the merge changes nothing."""
    layer = random_layer(seed % 1000, tokens=8)
    pairs, triples = torch.tensor(PAIRS[7]), torch.tensor(TRIPLES[7])
    assert all((hodgecover.lens_barriers(layer, simplices) >= 0).all() for simplices in (pairs, triples))
    same = layer._replace(experts=type(layer.experts)(*(part[:1].expand_as(part) for part in layer.experts)))
    assert hodgecover.lens_barriers(same, triples).max() < 1e-20


@given(SEEDS, st.sampled_from([0.1, 1.0, 5.0]), st.sampled_from([0.01, 0.1, 1.0, 5.0]))
def test_kl_of_a_logit_change_is_the_direct_kl(seed, peak, size):
    """Section 3.1: KL of two next-token distributions, from the change of the logits alone."""
    logits = peak * normal(seed, 20)
    delta = size * normal(seed + 1, 3, 20)
    log_p = logits.log_softmax(-1)
    direct = (log_p.exp() * (log_p - (logits + delta).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(mathx.kl_of_logit_change(log_p, delta), direct, rtol=1e-9, atol=1e-14)


# ----------------------------------------------------------------- the complex and the Laplacian (section 3.2)


@given(complexes())
def test_the_boundary_of_an_edge_and_of_a_triangle(case):
    """Section 3.2: d1 of (i, j) is j - i; d2 of (h, i, j) is (i, j) - (h, j) + (h, i)."""
    n, triangles, _ = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    assert (d1.shape, d2.shape) == ((n, len(PAIRS[n])), (len(PAIRS[n]), len(triangles)))
    for column, (i, j) in zip(d1.T.tolist(), PAIRS[n]):
        assert column == [(v == j) - (v == i) for v in range(n)]
    for column, (h, i, j) in zip(d2.T.tolist(), triangles.tolist()):
        assert column == [(edge == (i, j)) - (edge == (h, j)) + (edge == (h, i)) for edge in PAIRS[n]]


@given(complexes())
def test_the_boundary_of_a_boundary_is_zero(case):
    """Section 3.2: the chain identity d1 d2 = 0, exactly."""
    d1, d2 = mathx.boundary_matrices(*case[:2])
    assert not (d1 @ d2).any()


@given(complexes())
def test_the_laplacian_is_symmetric_and_positive_semidefinite(case):
    """Section 3.2: L1 = d1' d1 + d2 d2', so that b' L1 b = |d1 b|^2 + |d2' b|^2."""
    n, triangles, b = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    laplacian = mathx.hodge_laplacian(d1, d2)
    assert torch.equal(laplacian, laplacian.T)
    assert torch.linalg.eigvalsh(laplacian).min() > -1e-9
    energy = (d1 @ b).square().sum() + (d2.T @ b).square().sum()
    torch.testing.assert_close(b @ laplacian @ b, energy, rtol=1e-9, atol=1e-12 * b.square().sum().item())


@given(st.integers(2, 7), SEEDS, st.floats(0, 1))
def test_thresholding_edges_would_change_the_rank_of_d1(n, seed, tau):
    """Section 3.2: rank d1 = n - components, so that it falls when a thresholded graph is disconnected."""
    d1, _ = mathx.boundary_matrices(n, triangle_tensor([]))
    assert rational_rank(d1) == n - 1
    cheap = uniform(seed, len(PAIRS[n])) <= tau
    left = [edge for edge, is_in in zip(PAIRS[n], cheap) if is_in]
    assert rational_rank(d1[:, cheap]) == n - components(n, left)


def test_thresholding_edges_would_lose_a_harmonic_cycle():
    """Section 3.2: the unfilled cycle 0-1-2 is harmonic; without one of its edges nothing is."""
    d1, d2 = mathx.boundary_matrices(3, triangle_tensor([]))
    assert kernel(mathx.hodge_laplacian(d1, d2)).shape[1] == 1
    assert kernel(mathx.hodge_laplacian(d1[:, :2], d2[:2])).shape[1] == 0


@given(complexes(), SEEDS, st.sampled_from([-3.0, 1e-6, 1e6]))
def test_barriers_are_a_signal_and_no_weights(case, seed, scale):
    """Sections 3.2 and A.3: the projectors depend on the complex alone, so that the parts are linear in the signal."""
    n, triangles, b = case
    d = mathx.boundary_matrices(n, triangles)
    other = normal(seed, len(b))
    both = mathx.hodge_decompose(scale * b + other, *d)
    for part, of_b, of_other in zip(both, mathx.hodge_decompose(b, *d), mathx.hodge_decompose(other, *d)):
        assert close(part, scale * of_b + of_other, torch.cat((scale * b, other)))


# ------------------------------------------------------------------------------- Hodge decomposition (section 3.3)


@given(complexes())
def test_the_parts_sum_to_the_signal_and_are_orthogonal(case):
    """Theorem 1 (section 3.3): b = b_grad + b_curl + b_harm, pairwise orthogonal."""
    n, triangles, b = case
    parts = mathx.hodge_decompose(b, *mathx.boundary_matrices(n, triangles))
    assert close(sum(parts), b, b)
    for part, other in itertools.combinations(parts, 2):
        assert abs(part @ other) <= 1e-10 * b.square().sum()


@given(complexes())
def test_each_part_lies_in_its_subspace(case):
    """Theorem 1 (section 3.3): b_grad in im d1', b_curl in im d2, b_harm in ker L1."""
    n, triangles, b = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    gradient, curl, harmonic = mathx.hodge_decompose(b, d1, d2)
    _, every_triangle = mathx.boundary_matrices(n, triangle_tensor(TRIPLES[n]))
    zero = torch.zeros_like(b)
    assert close(every_triangle @ (every_triangle.T @ gradient), zero, 100 * b)  # no circulation: a potential's lift
    assert close(d1.T @ (d1 @ curl), zero, 100 * b)  # no divergence, and ...
    assert close(kernel(d2 @ d2.T).T @ curl, zero[:1], b)  # ... orthogonal to all that is orthogonal to im d2
    assert close(mathx.hodge_laplacian(d1, d2) @ harmonic, zero, 100 * b)


@given(complexes())
def test_betti_1_is_the_dimension_of_the_kernel(case):
    """Theorem 1 (section 3.3): dim ker L1 = beta_1, by ranks over the rationals."""
    n, triangles, _ = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    betti = mathx.betti_1(d1, d2)
    assert betti == len(PAIRS[n]) - rational_rank(d1) - rational_rank(d2)
    assert betti == kernel(mathx.hodge_laplacian(d1, d2)).shape[1]


@given(complexes(), SEEDS)
def test_the_decomposition_is_unique(case, seed):
    """Theorem 1 (section 3.3): whatever split with parts in the three subspaces b has, it is this one."""
    n, triangles, _ = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    cycles = kernel(mathx.hodge_laplacian(d1, d2))
    split = d1.T @ normal(seed, n), d2 @ normal(seed + 1, len(triangles)), cycles @ normal(seed + 2, cycles.shape[1])
    b = sum(split)
    for part, planted in zip(mathx.hodge_decompose(b, d1, d2), split):
        assert close(part, planted, b)


@given(complexes())
def test_the_projection_formulas(case):
    """A.5: b_grad and b_curl are least-squares projections onto im d1' and im d2, b_harm onto L1's null vectors."""
    n, triangles, b = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    gradient, curl, harmonic = mathx.hodge_decompose(b, d1, d2)
    assert close(gradient, d1.T @ torch.linalg.lstsq(d1.T, b, driver="gelsd").solution, b)
    if len(triangles):
        assert close(curl, d2 @ torch.linalg.lstsq(d2, b, driver="gelsd").solution, b)
    else:
        assert not curl.any()
    cycles = kernel(mathx.hodge_laplacian(d1, d2))
    assert close(harmonic, cycles @ (cycles.T @ b), b)


@given(complexes(), SEEDS)
def test_the_projections_are_idempotent_and_symmetric(case, seed):
    """A.5: each part is an orthogonal projection: P P = P and c' P b = b' P c."""
    n, triangles, b = case
    d = mathx.boundary_matrices(n, triangles)
    c = normal(seed, len(b))
    for index, (part, of_c) in enumerate(zip(mathx.hodge_decompose(b, *d), mathx.hodge_decompose(c, *d))):
        assert close(mathx.hodge_decompose(part, *d)[index], part, b)
        assert abs(c @ part - b @ of_c) <= 1e-9 * b.norm() * c.norm()


@given(complexes())
def test_the_gradient_is_a_score_of_each_expert(case):
    """Section 3.3: b_grad,ij = phi_j - phi_i; on a complete graph phi is an expert's mean signed barrier, d1 b / n."""
    n, triangles, b = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    phi = d1 @ b / n
    expected = torch.stack([phi[j] - phi[i] for i, j in PAIRS[n]])
    assert close(mathx.hodge_decompose(b, d1, d2).gradient, expected, b)


@given(complexes(), SEEDS)
def test_no_potential_and_triangle_correction_explain_more_than_all_but_the_harmonic_part(case, seed):
    """Proposition 1 (section 3.3): min over phi, psi of |b - d1' phi - d2 psi|^2 = |b_harm|^2."""
    n, triangles, b = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    harmonic = mathx.hodge_decompose(b, d1, d2).harmonic
    model = torch.cat((d1.T, d2), dim=1)  # (E, n + F)
    best = torch.linalg.lstsq(model, b, driver="gelsd").solution
    assert close(b - model @ best, harmonic, b)  # the least residual is b_harm itself: the minimiser is unique
    other = best + normal(seed, len(best))
    assert (b - model @ other).norm() >= harmonic.norm() * (1 - 1e-9)


# --------------------------------------------------------------------------------------- diagnostics (section 3.4)


@given(complexes(), st.sampled_from([1e-6, 3.0, 1e6]))
def test_the_harmonic_energy_fraction(case, scale):
    """Eq. 8 (section 3.4): eta_harm = |b_harm|^2 / |b|^2; the fractions sum to 1 and do not depend on scale."""
    n, triangles, b = case
    d = mathx.boundary_matrices(n, triangles)
    parts = mathx.hodge_decompose(b, *d)
    eta = mathx.energy_fractions(parts)
    energy = sum(value ** 2 for value in b.tolist())
    for share, part in zip(eta, parts):
        assert share == pytest.approx(sum(value ** 2 for value in part.tolist()) / energy, rel=1e-9)
    assert sum(eta) == pytest.approx(1)
    assert mathx.energy_fractions(mathx.hodge_decompose(scale * b, *d)) == pytest.approx(eta, rel=1e-6, abs=1e-12)


@given(complexes(3), SEEDS, st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.25, 1.0, 8.0]))
def test_the_discordance_fraction(case, seed, margin, scale):
    """Section 3.4: the share of triangles whose barrier exceeds their worst edge's by a margin; scale-invariant."""
    n, triangles, _ = case
    b = fifths(seed, 6, len(PAIRS[n]))
    triplets = fifths(seed + 1, 8, len(triangles))
    cost = value_of(n, b)
    discordant = [triplet > (1 + margin) * max(cost[pair] for pair in itertools.combinations(triangle, 2))
                  for triplet, triangle in zip(triplets.tolist(), triangles.tolist())]
    found = mathx.discordance(n, scale * b, triangles, scale * triplets, margin)
    assert found.fraction == pytest.approx(sum(discordant) / max(len(triangles), 1))


@given(complexes())
def test_the_euler_poincare_count(case):
    """Sections 3.4, A.3: n - E + F = 1 - beta_1 + beta_2, beta_2 = F - rank d2: beta_1 = E - (n - 1) - rank d2."""
    n, triangles, _ = case
    d1, d2 = mathx.boundary_matrices(n, triangles)
    beta_2 = len(triangles) - rational_rank(d2)
    assert n - len(PAIRS[n]) + len(triangles) == 1 - mathx.betti_1(d1, d2) + beta_2


# ------------------------------------------------------------------------------- curated triangles (section 3.2, A.9)


@given(st.integers(3, 8), SEEDS, st.booleans(), st.integers(0, 60))
def test_candidates_are_the_cliques_at_or_below_the_median(n, seed, ties, limit):
    """A.9, stage 1: the 3-cliques of the edges with barrier <= median, no more than the limit."""
    b = fifths(seed, 4, len(PAIRS[n])) if ties else uniform(seed, len(PAIRS[n]))
    median = sorted(b.tolist())[(len(b) - 1) // 2]
    cost = value_of(n, b)
    cliques = [t for t in TRIPLES[n] if all(cost[pair] <= median for pair in itertools.combinations(t, 2))]
    found = [tuple(t) for t in mathx.candidate_triangles(n, b, limit, seed).tolist()]
    assert len(found) == min(limit, len(cliques))
    assert found == sorted(set(found)) and set(found) <= set(cliques)


@given(complexes(3, 6), SEEDS)
def test_the_betti_curve_is_that_of_each_thresholded_complex(case, seed):
    """A.9, stage 2: beta_1 of K_tau at each threshold, by ranks over the rationals."""
    n, triangles, _ = case
    b = fifths(seed, 6, len(PAIRS[n]))
    triplets = fifths(seed + 1, 8, len(triangles))
    thresholds = torch.arange(-1, 17).double() / 10  # at the barriers and between them
    d1, d2 = mathx.boundary_matrices(n, triangles)
    expected = []
    for tau in thresholds:
        edges_in = b <= tau
        faces_in = d2.abs().T @ edges_in.double() == 3
        triangles_in = (triplets <= tau) & faces_in
        expected.append(int(edges_in.sum()) - rational_rank(d1[:, edges_in]) - rational_rank(d2[:, triangles_in]))
    assert mathx.betti_curve(n, b, triangles, triplets, thresholds).tolist() == expected


# ---------------------------------------------------------------------------------------- HodgeCover (section 4.1)


@given(st.lists(st.integers(1, 9), max_size=30), st.sampled_from([0, 1, 5, 10, 33, 50, 100]))
def test_critical_simplices_are_the_top_percent(values, percent):
    """Section 4.1: the top-p% edges by |b_harm|, the top-q% triangles by barrier; rounded up, the first of equals."""
    count = -(-len(values) * percent // 100)
    top = sorted(range(len(values)), key=lambda position: (-values[position], position))[:count]
    assert mathx.critical(torch.tensor(values, dtype=torch.float64), percent).tolist() == sorted(top)


def phi(chosen, saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]]) -> float:
    """Eq. 10 word by word: the saliencies, plus each family's weight times the share of it that is covered."""
    total = sum(saliency[vertex].item() for vertex in chosen)
    for simplices, weight in families:
        rows = simplices.tolist()
        if rows:
            total += weight * sum(any(vertex in chosen for vertex in row) for row in rows) / len(rows)
    return total


@given(cover_problems(), st.sets(st.integers(0, 6)))
def test_the_coverage_objective_word_by_word(problem, chosen):
    """Eq. 10 (section 4.1); a term whose critical set is empty is 0, and no term exceeds its weight."""
    saliency, families = problem
    inside = [vertex for vertex in chosen if vertex < len(saliency)]
    assert mathx.coverage(inside, saliency, families) == pytest.approx(phi(inside, saliency, families))
    for family in families:
        assert 0 <= mathx.coverage(inside, 0 * saliency, [family]) <= family[1]


def test_an_empty_critical_set_adds_nothing():
    """Section 4.1: by convention, the term of an empty E* or T* is 0."""
    saliency = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    empty = [(torch.empty(0, 2, dtype=torch.int64), 1.0), (triangle_tensor([]), 1.0)]
    assert mathx.coverage([0, 1], saliency, empty) == pytest.approx(0.7)
    assert mathx.greedy_cover(saliency, empty, 3) == [1, 2, 0]


@given(cover_problems(), st.randoms(use_true_random=False))
def test_the_objective_is_non_negative_monotone_and_submodular(problem, random):
    """Proposition 2 (section 4.1): 0 <= Phi(A) <= Phi(B), and A gains no less from a vertex than B, for A within B."""
    saliency, families = problem
    n = len(saliency)
    large = random.sample(range(n), random.randint(0, n - 1))
    small = large[:random.randint(0, len(large))]
    extra = random.choice([vertex for vertex in range(n) if vertex not in large])

    def value(chosen: list[int]) -> float:
        return mathx.coverage(chosen, saliency, families)
    assert 0 <= value(small) <= value(large) + 1e-12
    assert value(small + [extra]) - value(small) >= value(large + [extra]) - value(large) - 1e-12


@given(cover_problems())
def test_greedy_takes_the_largest_marginal_gain(problem):
    """Eq. 11 (section 4.1): every pick has the largest gain of those left; fewer picks are a prefix of more."""
    saliency, families = problem
    n = len(saliency)
    picks = mathx.greedy_cover(saliency, families, n)
    assert sorted(picks) == list(range(n))
    for size, pick in enumerate(picks):
        before = picks[:size]
        assert mathx.greedy_cover(saliency, families, size) == before
        values = [phi([*before, vertex], saliency, families) for vertex in range(n) if vertex not in before]
        assert phi([*before, pick], saliency, families) == pytest.approx(max(values))


@given(cover_problems())
def test_greedy_reaches_1_minus_1_over_e_of_the_best(problem):
    """Proposition 2 (section 4.1): Phi(greedy) >= (1 - 1/e) max Phi, by brute force over all sets of each size."""
    saliency, families = problem
    n = len(saliency)
    for size in range(n + 1):
        best = max(phi(chosen, saliency, families) for chosen in itertools.combinations(range(n), size))
        assert phi(mathx.greedy_cover(saliency, families, size), saliency, families) >= (1 - 1 / math.e) * best - 1e-12


@given(cover_problems(), st.randoms(use_true_random=False))
def test_the_objective_is_a_sum_of_scores_only_if_no_critical_simplex_is_shared(problem, random):
    """Section 4.1: coverage is modular on a set of experts if and only if their incidence sets are disjoint."""
    saliency, ((edges, _), _) = problem
    assume(len(edges))
    chosen = random.sample(range(len(saliency)), random.randint(2, len(saliency)))
    shared = any(i in chosen and j in chosen for i, j in edges.tolist())
    sum_of_scores = sum(mathx.coverage([vertex], saliency, [(edges, 1.0)]) for vertex in chosen)
    together = mathx.coverage(chosen, saliency, [(edges, 1.0)])
    assert (together < sum_of_scores - 1e-9) == shared


def test_coverage_is_no_ranking_by_incidence():
    """B.2, section 4.1: on a 4-cycle all experts have incidence 2, yet {0, 1} covers 3 edges and {0, 2} all 4."""
    cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    nothing = torch.zeros(4, dtype=torch.float64)
    assert mathx.incidence(4, cycle).sum(1).tolist() == [2, 2, 2, 2]
    assert mathx.coverage([0, 1], nothing, [(cycle, 1.0)]) == 0.75
    assert mathx.coverage([0, 2], nothing, [(cycle, 1.0)]) == 1
    assert mathx.greedy_cover(nothing, [(cycle, 1.0)], 2) == [0, 2]


@given(st.integers(3, 8), SEEDS, st.sampled_from([0.0, 1.0, 5.0]), st.data())
def test_the_redirect_goes_to_the_nearest_survivor_by_hodge_weighted_barrier(n, seed, alpha, data):
    """Section 4.1: pi(i) = argmin over survivors j of b_ij (1 + alpha |b_harm,ij| / |b|)."""
    b = uniform(seed, len(PAIRS[n]))
    harmonic = normal(seed + 1, len(PAIRS[n]))
    survivors = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    cost = value_of(n, b * (1 + alpha * harmonic.abs() / math.sqrt(sum(value ** 2 for value in b.tolist()))))
    dropped = set(range(n)) - set(survivors)
    expected = {i: min(survivors, key=lambda j: cost[i, j]) for i in dropped}
    assert mathx.redirect(survivors, b, harmonic, alpha) == expected


@pytest.mark.parametrize("scale, target", [(1, 1), (1e-4, 1), (1e-11, 1), (1e-13, 0)])
def test_the_harmonic_factor_is_1_if_there_is_no_signal(scale, target):
    """Section 4.1: expert 2 shuns the harmonic edge to 0, unless |b| < 1e-12."""
    b = scale * torch.tensor([1.0, 0.5, 0.6], dtype=torch.float64)
    harmonic = scale * torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    assert mathx.redirect([0, 1], b, harmonic, alpha=1.0) == {2: target}


# ------------------------------------------------------------- what an auditor must know and the paper does not say


@pytest.mark.parametrize("n", [2, 3, 4, 9, 64])
def test_a_constant_signal_has_harmonic_energy(n):
    """b = 1 on the complex without triangles has eta_grad = (2/3) (n + 1) / n; all the rest is harmonic."""
    d = mathx.boundary_matrices(n, triangle_tensor([]))
    eta = mathx.energy_fractions(mathx.hodge_decompose(torch.ones(math.comb(n, 2), dtype=torch.float64), *d))
    assert eta.gradient == pytest.approx(2 / 3 * (n + 1) / n)
    assert eta.harmonic == pytest.approx(1 - 2 / 3 * (n + 1) / n, abs=1e-12)
    assert eta.curl == 0


def permuted(triangles: torch.Tensor, label: list[int]) -> torch.Tensor:
    """Triangles after vertex v becomes label[v], lexicographic again."""
    return triangle_tensor(sorted(tuple(sorted(label[v] for v in triangle)) for triangle in triangles.tolist()))


@given(complexes(3, 6), st.randoms(use_true_random=False))
def test_relabelling_only_permutes_the_parts_of_an_alternating_cochain(case, random):
    """A signal with b_ji = -b_ij has the same parts in any total order of the experts."""
    n, triangles, b = case
    label = random.sample(range(n), n)
    order = torch.tensor(label).argsort()
    flipped = torch.tensor([-1.0 if order[r] > order[s] else 1.0 for r, s in PAIRS[n]], dtype=torch.float64)

    def moved(signal: torch.Tensor) -> torch.Tensor:
        return mathx.relabel_edges(signal, order) * flipped
    before = mathx.hodge_decompose(b, *mathx.boundary_matrices(n, triangles))
    after = mathx.hodge_decompose(moved(b), *mathx.boundary_matrices(n, permuted(triangles, label)))
    for part, of_moved in zip(before, after):
        assert close(of_moved, moved(part), b)


def test_relabelling_changes_the_parts_of_barriers():
    """Barriers have b_ji = b_ij: a 3-cycle with barriers 1, 1, 0 has eta_harm 0 in one order, 2/3 in another."""
    d = mathx.boundary_matrices(3, triangle_tensor([]))
    b = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)  # on (0, 1), (0, 2), (1, 2)
    swapped = mathx.relabel_edges(b, torch.tensor([1, 0, 2]))
    assert mathx.energy_fractions(mathx.hodge_decompose(b, *d)).harmonic == pytest.approx(0, abs=1e-12)
    assert mathx.energy_fractions(mathx.hodge_decompose(swapped, *d)).harmonic == pytest.approx(2 / 3)


@given(complexes(3), st.randoms(use_true_random=False))
def test_relabelling_only_permutes_the_residual_of_the_additive_model(case, random):
    """The unsigned model b_ij ~ phi_i + phi_j needs no order."""
    n, _, b = case
    d1, _ = mathx.boundary_matrices(n, triangle_tensor([]))
    order = torch.tensor(random.sample(range(n), n))
    fit, moved_fit = mathx.additive_model(b, d1), mathx.additive_model(mathx.relabel_edges(b, order), d1)
    assert close(moved_fit.residual, mathx.relabel_edges(fit.residual, order), b)
    assert (moved_fit.energy, moved_fit.variance) == pytest.approx((fit.energy, fit.variance), abs=1e-9)


@pytest.mark.parametrize("triangles, eta", [
    ([], (0, 0, 1)),
    ([(0, 1, 2)], (0, 1, 0)),
    ([(1, 2, 3)], (0, 1 / 9, 8 / 9)),
], ids=["unfilled", "filled", "neighbour-filled"])
def test_a_filled_three_cycle_is_curl_and_an_unfilled_one_harmonic(triangles, eta):
    """The cycle 0 -> 1 -> 2 -> 0 among 4 experts; a filled triangle that shares an edge with it takes a part."""
    cycle = torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    d = mathx.boundary_matrices(4, triangle_tensor(triangles))
    assert mathx.energy_fractions(mathx.hodge_decompose(cycle, *d)) == pytest.approx(eta, abs=1e-12)
