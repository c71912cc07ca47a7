# SPDX-License-Identifier: MIT
"""The paper (arXiv 2605.13997), statement by statement: properties and brute force on small complexes, in its order, an
appendix beside the section that it belongs to. Equations 32 and 33 are in test_budgets.py and test_wanda.py.

b is an edge signal, d = (d1, d2) the boundary matrices, L1 the Hodge Laplacian; see the symbols of hodgecover.py.
"""
import itertools
import math

import hodgecover
import mathx
import pytest
import torch
from hodgecover import Settings, Signals
from hypothesis import assume
from hypothesis import strategies as st
from model_io import Experts
from strategies import (NO_TRIANGLES, PAIRS, SEEDS, TRIPLES, barrier_by_hand, complexes, cover_problems, fast_barriers,
                        fifths, given, kl_of_logit_change, normal, on_edges, random_layer, rational_rank, renumbered,
                        triangle_tensor, uniform)


def value_of(n: int, signal: torch.Tensor) -> dict[tuple[int, int], float]:
    """An edge signal by its edges, both ways round."""
    by_edge = dict(zip(PAIRS[n], signal.tolist()))
    return by_edge | {(j, i): value for (i, j), value in by_edge.items()}


def worst_edge(cost: dict[tuple[int, int], float], triangle: tuple[int, int, int]) -> float:
    """The largest cost of a triangle's edges."""
    return max(cost[pair] for pair in itertools.combinations(triangle, 2))


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the norm of the signal `scale`."""
    return (found - expected).norm().item() <= 1e-9 * scale.norm().item()


def laplacian(d1: torch.Tensor, d2: torch.Tensor) -> torch.Tensor:
    """L1 = d1' d1 + d2 d2' (equation 5), (E, E): for small complexes only, the method never forms it."""
    return d1.T @ d1 + d2 @ d2.T


def kernel(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the kernel of L1, (E, beta_1). (The other eigenvalues of a small complex are far from 0.)"""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[:, values < 1e-9]


def components(n: int, edges: list[tuple[int, int]]) -> int:
    """Connected components of a graph, by flooding."""
    label = list(range(n))
    for _ in range(n):
        for i, j in edges:
            label[i] = label[j] = min(label[i], label[j])
    return len(set(label))


# ------------------------------------------------------------------------- barriers are KL (section 3.1, appendix A.10)

@pytest.mark.parametrize("case", [{"unreached": 3}, {"k": 7}])
@pytest.mark.parametrize("simplex", [[0, 1], [2, 3], [1, 3, 6]])
def test_a_barrier_is_the_kl_of_a_frequency_weighted_merge(case, simplex):
    """Equations 2 and 30: replace the experts of a pair or a triple by the mean of their outputs, and compare the
    next-token distributions, here token by token from the weights alone. An expert without tokens has no weight."""
    layer = random_layer(tokens=12, **case)
    expected = barrier_by_hand(layer, simplex)
    assert hodgecover.plain_barrier(layer, simplex).item() == pytest.approx(expected, rel=1e-9)
    assert fast_barriers(layer, torch.tensor([simplex])).item() == pytest.approx(expected, rel=1e-9)


@given(SEEDS, st.sampled_from([1e-9, 1.0, 1e9]))
def test_merge_weights_are_routing_rates(seed, unit):
    """Equation 30: shares of the routing rate, in any unit; an expert that no token uses has none."""
    rates = unit * uniform(seed, 5)
    rates[3:] = 0
    shares = hodgecover.merge_weights(torch.tensor([[0, 1, 2], [0, 2, 3]]), rates)
    torch.testing.assert_close(shares[0], rates[:3] / rates[:3].sum())
    torch.testing.assert_close(shares.sum(1), torch.ones(2).double())
    assert shares[1, 2] == 0


@pytest.mark.parametrize("rates, expected", [
    ([0.0, 0.0], [1 / 2, 1 / 2]), ([3e-13, 6e-13], [1 / 2, 1 / 2]), ([3e-12, 6e-12], [1 / 3, 2 / 3]),
    ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]), ([9e-13, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
    ([2e-12, 0.0, 0.0], [1.0, 0.0, 0.0])])
def test_a_merge_of_experts_without_tokens_is_their_plain_mean(rates, expected):
    """Equation 30: if the rates of a pair or a triple sum to less than 1e-12."""
    simplex = torch.arange(len(rates))[None]
    shares = hodgecover.merge_weights(simplex, torch.tensor(rates, dtype=torch.float64))
    assert shares[0].tolist() == pytest.approx(expected, rel=1e-12)


@given(SEEDS)
def test_barriers_are_not_negative_and_equal_experts_merge_for_nothing(seed):
    """Section 3.1: a KL divergence, 0 if the merge changes nothing."""
    layer = random_layer(seed % 1000, tokens=8)
    same = layer._replace(experts=Experts(*(weight[:1].expand_as(weight) for weight in layer.experts)))
    for simplices in (torch.tensor(PAIRS[7]), torch.tensor(TRIPLES[7])):
        assert (fast_barriers(layer, simplices) >= 0).all()
        assert fast_barriers(same, simplices).max() < 1e-20


@given(SEEDS, st.sampled_from([0.1, 1.0, 5.0]), st.sampled_from([0.01, 0.1, 1.0, 5.0]))
def test_kl_of_a_logit_change_is_the_direct_kl(seed, peak, size):
    """Equation 2: KL of two next-token distributions, from the change of the logits alone."""
    logits = peak * normal(seed, 20)
    delta = size * normal(seed + 1, 3, 20)
    log_p = logits.log_softmax(-1)
    direct = (log_p.exp() * (log_p - (logits + delta).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl_of_logit_change(log_p, delta), direct, rtol=1e-9, atol=1e-14)


# ----------------------------------------------------- the complex and the Laplacian (section 3.2, appendices A.2, A.3)

@given(complexes())
def test_the_boundary_of_an_edge_and_of_a_triangle(case):
    """Equations 3 and 4: d1 of (i, j) is j - i; d2 of (h, i, j) is (i, j) - (h, j) + (h, i)."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    assert d1.shape == (n, len(PAIRS[n])) and d2.shape == (len(PAIRS[n]), len(triangles))
    for column, (i, j) in zip(d1.T.tolist(), PAIRS[n]):
        assert column == [(v == j) - (v == i) for v in range(n)]
    for column, (h, i, j) in zip(d2.T.tolist(), triangles.tolist()):
        assert column == [(edge == (i, j)) - (edge == (h, j)) + (edge == (h, i)) for edge in PAIRS[n]]


@given(complexes())
def test_the_boundary_of_a_boundary_is_zero(case):
    """Lemma 1 (A.2), the chain identity: d1 d2 = 0, exactly."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    assert not (d1 @ d2).any()


@given(complexes())
def test_the_laplacian_is_symmetric_and_positive_semidefinite(case):
    """Equations 5 and 14: L1 = d1' d1 + d2 d2', so that b' L1 b = |d1 b|^2 + |d2' b|^2."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    matrix = laplacian(d1, d2)
    assert torch.equal(matrix, matrix.T) and torch.linalg.eigvalsh(matrix).min() > -1e-9
    energy = (d1 @ b).square().sum() + (d2.T @ b).square().sum()
    torch.testing.assert_close(b @ matrix @ b, energy, rtol=1e-9, atol=1e-12 * b.square().sum().item())


@given(complexes())
def test_the_kernel_of_the_laplacian_is_that_of_both_boundaries(case):
    """Equation 15: ker L1 = ker d1 and ker d2', of one dimension and one within the other."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    both = torch.cat((d1, d2.T))
    cycles = kernel(laplacian(d1, d2))
    assert (both @ cycles).norm() < 1e-9
    assert cycles.shape[1] == len(PAIRS[n]) - rational_rank(both)


@given(complexes())
def test_betti_1_is_the_dimension_of_the_kernel(case):
    """Equations 16 and 17: dim ker L1 = beta_1 = E - n + 1 - rank d2, by ranks over the rationals. The Euler-Poincare
    count n - E + F = 1 - beta_1 + beta_2, beta_2 = F - rank d2."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    betti, rank = hodgecover.betti_1(d1, d2), rational_rank(d2)
    assert betti == len(PAIRS[n]) - n + 1 - rank == kernel(laplacian(d1, d2)).shape[1]
    assert rational_rank(d1) == n - 1
    beta_2 = len(triangles) - rank
    assert n - len(PAIRS[n]) + len(triangles) == 1 - betti + beta_2


def star(n: int, count: int) -> torch.Tensor:
    """Triangles (0, i, j), (count, 3): each has an edge (i, j) that no other has, so that they are independent."""
    edges = 1 + hodgecover.edges(n - 1)[:count]
    return torch.cat((torch.zeros(count, 1, dtype=torch.int64), edges), dim=1)


@pytest.mark.parametrize("rank", [500, 499, 498])
def test_betti_1_of_64_experts_is_1953_less_the_rank_of_d2(rank):
    """Equation 17 and the paper's OLMoE, 1,453 to 1,455: each triangle that closes a tetrahedron takes 1 off rank d2 of
    500 triangles."""
    closing = torch.tensor([[1, 2, 3], [1, 2, 4]])[:500 - rank]
    triangles = torch.cat((star(64, rank), closing))
    d1, d2 = hodgecover.boundary_matrices(64, triangles)
    assert hodgecover.betti_1(d1, d2) == 1953 - rank
    assert torch.linalg.matrix_rank(d2[d2.any(1)]) == rank


def test_betti_1_of_256_experts_with_500_independent_triangles_is_31885():
    """Equation 17 and the paper's Qwen3.5, by the ranks on the edges that the triangles use."""
    curve = hodgecover.betti_curve(torch.ones(32640), star(256, 500), torch.ones(500), torch.tensor([0.5, 1.0]))
    assert curve.tolist() == [0, 31885]


def weighted(d1: torch.Tensor, d2: torch.Tensor, of_edges: torch.Tensor, of_triangles: torch.Tensor) -> torch.Tensor:
    """The weighted Laplacian of remark 3 (E, E)."""
    root = of_edges.sqrt()
    return laplacian(d1 * root, d2 / root[:, None] * of_triangles.sqrt())


@given(complexes(), SEEDS)
def test_positive_weights_keep_the_dimension_of_the_kernel(case, seed):
    """Remark 3 (A.3): it is a topological invariant."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    matrix = weighted(d1, d2, 0.1 + uniform(seed, len(b)), 0.1 + uniform(seed + 1, len(triangles)))
    assert kernel(matrix).shape[1] == hodgecover.betti_1(d1, d2)


def test_positive_weights_change_the_projector():
    """Remark 3 (A.3), on a 4-cycle with a chord."""
    d1, d2 = hodgecover.boundary_matrices(4, torch.tensor([[0, 1, 2]]))
    cycles = kernel(laplacian(d1, d2))
    others = kernel(weighted(d1, d2, torch.arange(1.0, 7.0).double(), torch.ones(1).double()))
    assert cycles.shape == others.shape
    assert (cycles @ cycles.T - others @ others.T).abs().max() > 0.1


@given(complexes(), SEEDS, st.sampled_from([-3.0, 1e-6, 1e6]))
def test_barriers_are_a_signal_and_no_weights(case, seed, scale):
    """Sections 3.2 and A.3: the projectors depend on the complex alone, so that the parts are linear in the signal."""
    n, triangles, b = case
    d = hodgecover.boundary_matrices(n, triangles)
    other = normal(seed, len(b))
    both = hodgecover.hodge_decompose(scale * b + other, *d)
    for part, of_b, of_other in zip(both, hodgecover.hodge_decompose(b, *d), hodgecover.hodge_decompose(other, *d)):
        assert close(part, scale * of_b + of_other, torch.cat((scale * b, other)))


# ------------------------------------------------------------- the order of the experts (section 3.2), and what it does

def places(n: int, order: str, saliency: torch.Tensor) -> torch.Tensor:
    """The place of each expert in a total order, from the edges' signs: how many others come before it."""
    d1, _ = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    return ((d1 @ hodgecover.edge_signs(order, saliency) + n - 1) / 2).long()


@given(st.integers(2, 8), SEEDS, st.integers(0, 99))
def test_the_signs_of_the_edges_are_a_total_order(n, seed, number):
    """Section 3.2: by index; of the experts by ascending saliency, equal ones by index; or at random."""
    saliency = fifths(seed, 4, n)
    assert places(n, "index", saliency).tolist() == list(range(n))
    assert (hodgecover.edge_signs("index", saliency) == 1).all()
    assert places(n, "saliency", saliency).argsort().tolist() == sorted(range(n), key=lambda e: (saliency[e], e))
    drawn = places(n, f"random:{number}", saliency)
    assert sorted(drawn.tolist()) == list(range(n))
    assert torch.equal(drawn, places(n, f"random:{number}", saliency * 2))


def test_random_orders_differ():
    drawn = {str(places(8, f"random:{seed}", torch.ones(8))) for seed in range(9)}
    assert len(drawn) > 1


ORDERS = st.sampled_from(["saliency", "index", "random:0", "random:7"])


@given(complexes(), SEEDS, ORDERS)
def test_signs_are_the_decomposition_after_the_experts_take_their_places(case, seed, order):
    """Section 3.2: the signed barriers have the parts, up to signs, of the barriers of the experts in that order."""
    n, triangles, b = case
    signals = Signals(torch.ones(n), uniform(seed, n), b, triangles, torch.zeros(len(triangles)))
    signs, place = hodgecover.edge_signs(order, signals.saliency), places(n, order, signals.saliency)
    ordered = renumbered(signals, place)
    found = hodgecover.hodge_decompose(signs * b, *hodgecover.boundary_matrices(n, triangles))
    expected = hodgecover.hodge_decompose(ordered.barriers, *hodgecover.boundary_matrices(n, ordered.candidates))
    for part, of_ordered in zip(found, expected):
        assert close(signs * part, on_edges(n, of_ordered, place), b)


def assert_same_report(moved: hodgecover.Diagnostics, report: hodgecover.Diagnostics, new: list[int]) -> None:
    """The diagnostics of renumbered experts, new[e] for e, are the diagnostics with the simplices renumbered."""
    for name in ("critical_edges", "critical_triangles"):
        simplices = [sorted(new[e] for e in simplex) for simplex in getattr(report, name).tolist()]
        assert getattr(moved, name).tolist() == sorted(simplices)
    assert moved.betti_curve.tolist() == report.betti_curve.tolist()
    others = set(report._fields) - {"critical_edges", "critical_triangles", "betti_curve", "audit"}
    for name in others:
        assert getattr(moved, name) == pytest.approx(getattr(report, name), abs=1e-12), name


@given(st.integers(7, 9), SEEDS, ORDERS, st.randoms(use_true_random=False))
def test_the_plan_of_renumbered_experts_is_the_renumbered_plan(n, seed, order, random):
    """Section 3.2: in saliency order for any renumbering; any order is index order once the experts are in it."""
    triangles = torch.combinations(torch.arange(n), 3)
    triangles = triangles[normal(seed, len(triangles)).topk(8).indices.sort().values]
    signals = Signals(torch.arange(n), uniform(seed, n), uniform(seed + 1, math.comb(n, 2)), triangles,
                      uniform(seed + 2, 8))
    magnitude = hodgecover.decompose(signals, Settings(order=order)).parts.harmonic.abs()
    assume(magnitude.sort().values.diff().min() > 1e-9)  # of equal ones the numbering chooses
    label, other = places(n, order, signals.saliency), "index"
    if order == "saliency":
        label, other = torch.tensor(random.sample(range(n), n)), "saliency"
    settings = dict(edge_percent=10, triangle_percent=30)
    plan = hodgecover.plan_from_signals(signals, 4, Settings(order=order, **settings))
    moved = hodgecover.plan_from_signals(renumbered(signals, label), 4, Settings(order=other, **settings))
    new = label.tolist()
    assert moved.order == [new[e] for e in plan.order]
    assert moved.survivors == sorted(new[e] for e in plan.survivors)
    assert moved.redirect == {new[e]: new[target] for e, target in plan.redirect.items()}
    assert_same_report(moved.diagnostics, plan.diagnostics, new)


# ------------------------------------------------------------- Hodge decomposition (section 3.3, appendices A.4 to A.7)

@given(complexes())
def test_the_parts_sum_to_the_signal_and_are_orthogonal(case):
    """Theorems 1 and 2, equation 6: b = b_grad + b_curl + b_harm, pairwise orthogonal."""
    n, triangles, b = case
    parts = hodgecover.hodge_decompose(b, *hodgecover.boundary_matrices(n, triangles))
    assert close(sum(parts), b, b)
    for part, other in itertools.combinations(parts, 2):
        assert abs(part @ other) <= 1e-10 * b.square().sum()


@given(complexes())
def test_each_part_lies_in_its_subspace(case):
    """Theorem 2, equation 18: b_grad in im d1', b_curl in im d2, b_harm in ker L1."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    gradient, curl, harmonic = hodgecover.hodge_decompose(b, d1, d2)
    _, every_triangle = hodgecover.boundary_matrices(n, triangle_tensor(TRIPLES[n]))
    zero = torch.zeros_like(b)
    assert close(every_triangle @ (every_triangle.T @ gradient), zero, 100 * b)  # no circulation: a potential's lift
    assert close(d1.T @ (d1 @ curl), zero, 100 * b)  # no divergence, and ...
    assert close(kernel(d2 @ d2.T).T @ curl, zero[:1], b)  # ... orthogonal to all that is orthogonal to im d2
    assert close(laplacian(d1, d2) @ harmonic, zero, 100 * b)


@given(complexes(), SEEDS)
def test_the_decomposition_is_unique(case, seed):
    """Theorem 2: whatever split with parts in the three subspaces b has, it is this one."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    cycles = kernel(laplacian(d1, d2))
    split = d1.T @ normal(seed, n), d2 @ normal(seed + 1, len(triangles)), cycles @ normal(seed + 2, cycles.shape[1])
    b = sum(split)
    for part, planted in zip(hodgecover.hodge_decompose(b, d1, d2), split):
        assert close(part, planted, b)


@given(complexes())
def test_the_projection_formulas(case):
    """Equations 19 to 21: b_grad and b_curl are least-squares projections onto im d1' and im d2, b_harm onto L1's null
    vectors."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    gradient, curl, harmonic = hodgecover.hodge_decompose(b, d1, d2)
    for part, image in ((gradient, d1.T), (curl, d2)):
        assert close(part, image @ (torch.linalg.pinv(image) @ b), b)
    cycles = kernel(laplacian(d1, d2))
    assert close(harmonic, cycles @ (cycles.T @ b), b)


@given(complexes())
def test_the_gradient_is_a_score_of_each_expert(case):
    """Section 3.3: b_grad,ij = phi_j - phi_i; on a complete graph phi is an expert's mean signed barrier, d1 b / n."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    phi = d1 @ b / n
    expected = torch.stack([phi[j] - phi[i] for i, j in PAIRS[n]])
    assert close(hodgecover.hodge_decompose(b, d1, d2).gradient, expected, b)


@given(complexes(), SEEDS)
def test_no_potential_and_triangle_correction_explain_more_than_all_but_the_harmonic_part(case, seed):
    """Proposition 1: min over phi, psi of |b - d1' phi - d2 psi|^2 = |b_harm|^2, at b_grad + b_curl alone."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    harmonic = hodgecover.hodge_decompose(b, d1, d2).harmonic
    model = torch.cat((d1.T, d2), dim=1)  # (E, n + F)
    best = torch.linalg.lstsq(model, b, driver="gelsd").solution
    assert close(b - model @ best, harmonic, b)
    other = best + normal(seed, len(best))
    assert (b - model @ other).norm() >= harmonic.norm() * (1 - 1e-9)


@given(complexes(), SEEDS, st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_error_of_a_harmonic_blind_loss_is_the_harmonic_exposure(case, seed, epsilon):
    """Corollary 1 (A.7), equations 24 to 29: if the loss of an action a is beta_a + <w_a, b> + xi_a, and a blind one
    has b_grad + b_curl in place of b."""
    n, triangles, b = case
    d = hodgecover.boundary_matrices(n, triangles)
    low_gradient, low_curl, harmonic = hodgecover.hodge_decompose(b, *d)
    exposure, baseline = normal(seed, 2, len(b)), normal(seed + 1, 2)  # of two actions
    xi = epsilon * (2 * uniform(seed + 2, 2) - 1)
    loss = baseline + exposure @ b + xi
    blind = baseline + exposure @ (low_gradient + low_curl)
    projected = torch.stack([hodgecover.hodge_decompose(w, *d).harmonic for w in exposure])
    scale = torch.cat((b, xi, baseline)) * exposure.norm()
    assert close(loss - blind, projected @ harmonic + xi, scale)  # 26
    rounding = 1e-9 * scale.norm()
    assert ((loss - blind).abs() <= projected.norm(dim=1) * harmonic.norm() + epsilon + rounding).all()  # 27

    ranking = (loss[0] - loss[1]) - (blind[0] - blind[1])
    of_both = hodgecover.hodge_decompose(exposure[0] - exposure[1], *d).harmonic
    assert close(ranking, of_both @ harmonic + xi[0] - xi[1], scale)  # 28
    assert ranking.abs() <= of_both.norm() * harmonic.norm() + 2 * epsilon + rounding  # 29


# ----------------------------------------------------------------------------- diagnostics (section 3.4, appendix A.12)

@given(complexes(), st.sampled_from([1e-6, 3.0, 1e6]))
def test_the_harmonic_energy_fraction(case, scale):
    """Equation 8: rho_harm = |b_harm|^2 / |b|^2; the fractions sum to 1 and do not depend on scale (A.12)."""
    n, triangles, b = case
    d = hodgecover.boundary_matrices(n, triangles)
    parts = hodgecover.hodge_decompose(b, *d)
    rho = parts.shares()
    energy = sum(value ** 2 for value in b.tolist())
    for name, part in parts._asdict().items():
        of_part = sum(value ** 2 for value in part.tolist())
        assert rho[name] == pytest.approx(of_part / energy, rel=1e-9)
    assert sum(rho.values()) == pytest.approx(1)
    assert hodgecover.hodge_decompose(scale * b, *d).shares() == pytest.approx(rho, rel=1e-6, abs=1e-12)
    assert set(hodgecover.hodge_decompose(0 * b, *d).shares().values()) == {0}


@given(complexes(3), SEEDS, st.sampled_from([None, 0.0, 0.1, 0.5]), st.sampled_from([0.25, 1.0, 8.0]))
def test_the_discordance_fraction(case, seed, margin, scale):
    """Equation 9: the share of sampled triangles whose barrier exceeds 1.2 of their worst edge's, by default;
    scale-invariant."""
    n, triangles, _ = case
    b, triplets = fifths(seed, 6, len(PAIRS[n])), fifths(seed + 1, 8, len(triangles))
    settings, factor = Settings(thresholds=2), 1.2
    if margin is not None:
        settings, factor = Settings(thresholds=2, margin=margin), 1 + margin
    cost, discordant = value_of(n, b), 0
    for triplet, triangle in zip(triplets.tolist(), triangles.tolist()):
        discordant += triplet > factor * worst_edge(cost, triangle)
    signals = Signals(torch.ones(n), torch.ones(n).double(), scale * b, triangles, scale * triplets)
    report = hodgecover.plan_from_signals(signals, 1, settings).diagnostics
    assert report.discordance == pytest.approx(discordant / max(len(triangles), 1))


# ------------------------------------------------------------------------ thresholded edges (section 3.2, appendix A.8)

@given(st.integers(2, 7), SEEDS, st.floats(0, 1))
def test_thresholding_edges_would_change_the_rank_of_d1(n, seed, tau):
    """A.8, 1: rank d1 = n - components, so that it falls when a thresholded graph is disconnected."""
    d1, _ = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    cheap = uniform(seed, len(PAIRS[n])) <= tau
    left = [edge for edge, is_in in zip(PAIRS[n], cheap) if is_in]
    assert rational_rank(d1[:, cheap]) == n - components(n, left)


@given(complexes(3, 6), SEEDS, st.floats(0.3, 1))
def test_a_removed_bridge_takes_from_the_rank_and_another_edge_from_the_kernel(case, seed, tau):
    """A.8, 1 to 3: without a bridge rank d1 is 1 less and dim ker d1 the same; without another edge the reverse. Its
    triangles go with it, which changes rank d2, and beta_1 by equation 17."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    edges_in = uniform(seed, len(PAIRS[n])) <= tau

    def thresholded(edges_in: torch.Tensor) -> tuple[int, int, int, int]:
        """Components, rank d1, dim ker d1, and beta_1 of the complex of these edges."""
        left = [edge for edge, is_in in zip(PAIRS[n], edges_in) if is_in]
        filled = d2[:, (d2[~edges_in] == 0).all(0)][edges_in]
        graph, count = d1[:, edges_in], components(n, left)
        betti = len(left) - n + count - rational_rank(filled)
        assert hodgecover.betti_1(graph, filled) == betti == kernel(laplacian(graph, filled)).shape[1]
        return count, rational_rank(graph), len(left) - rational_rank(graph), betti
    count, rank, cycles, betti = thresholded(edges_in)
    for edge in edges_in.nonzero().squeeze(1).tolist():
        without = edges_in.clone()
        without[edge] = False
        count_left, rank_left, cycles_left, betti_left = thresholded(without)
        bridge = count_left > count
        assert (rank_left, cycles_left) == (rank - bridge, cycles - (not bridge))
        if bridge:
            assert betti_left == betti  # no triangle has a bridge


def test_thresholding_edges_would_lose_a_harmonic_cycle():
    """A.8: the unfilled cycle 0-1-2 is harmonic; without one of its edges nothing is."""
    d1, d2 = hodgecover.boundary_matrices(3, NO_TRIANGLES)
    assert kernel(laplacian(d1, d2)).shape[1] == 1
    assert kernel(laplacian(d1[:, :2], d2[:2])).shape[1] == 0


# ------------------------------------------------------------------------ curated triangles (section 3.2, appendix A.9)

@given(st.integers(3, 8), SEEDS, st.booleans(), st.sampled_from([0, 1, 2, 4, 60]))
def test_candidates_are_the_cliques_at_or_below_the_median(n, seed, ties, limit):
    """A.9, stage A: the 3-cliques of the edges with barrier <= median, no more than the limit. Renumbered experts have
    the renumbered ones."""
    b, saliency = uniform(seed, len(PAIRS[n])), uniform(seed + 1, n)
    if ties:
        b = fifths(seed, 4, len(PAIRS[n]))
    median, cost = sorted(b.tolist())[(len(b) - 1) // 2], value_of(n, b)
    cliques = [triangle for triangle in TRIPLES[n] if worst_edge(cost, triangle) <= median]
    candidates = hodgecover.candidate_triangles(b, saliency, limit, seed)
    rows = [tuple(row) for row in candidates.tolist()]
    assert len(rows) == min(limit, len(cliques))
    assert rows == sorted(set(rows)) and set(rows) <= set(cliques)
    moved = renumbered(Signals(saliency, saliency, b, candidates, torch.zeros(len(rows))), normal(seed, n).argsort())
    assert torch.equal(hodgecover.candidate_triangles(moved.barriers, moved.saliency, limit, seed), moved.candidates)


def test_the_sample_of_candidates_is_uniform():
    """A.9, stage A: each of 20 cliques is among 5 drawn in a quarter of 400 draws; 100 +- 8.7."""
    b, saliency = torch.ones(15, dtype=torch.float64), uniform(0, 6)
    drawn = torch.zeros(6, 6, 6)
    for seed in range(400):
        h, i, j = hodgecover.candidate_triangles(b, saliency, 5, seed).T
        drawn[h, i, j] += 1
    counts = drawn[drawn > 0]
    assert len(counts) == 20 and counts.sum() == 2000
    assert 60 < counts.min() and counts.max() < 140


def complex_at(n: int, b: torch.Tensor, triangles: torch.Tensor, triplets: torch.Tensor, tau: float
               ) -> tuple[int, int, list[list[int]]]:
    """beta_1, edges and triangles of K_tau (A.9, stage B), by the ranks of the whole matrices."""
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    edges_in, cost = b <= tau, value_of(n, b)
    rows = triangles.tolist()
    triangles_in = [place for place, row in enumerate(rows) if max(triplets[place], worst_edge(cost, row)) <= tau]
    ranks = rational_rank(d1[:, edges_in]) + rational_rank(d2[:, triangles_in])
    count = int(edges_in.sum())
    return count - ranks, count, [rows[place] for place in triangles_in]


@given(complexes(3, 6), SEEDS)
def test_the_betti_curve_is_that_of_each_thresholded_complex(case, seed):
    """A.9, stage B: beta_1 of K_tau at each threshold, by ranks over the rationals."""
    n, triangles, _ = case
    b, triplets = fifths(seed, 6, len(PAIRS[n])), fifths(seed + 1, 8, len(triangles))
    thresholds = torch.arange(-1, 17).double() / 10  # at the barriers and between them
    expected = [complex_at(n, b, triangles, triplets, tau)[0] for tau in thresholds]
    assert hodgecover.betti_curve(b, triangles, triplets, thresholds).tolist() == expected


@given(complexes(3, 5), SEEDS, st.booleans())
def test_tau_has_the_largest_betti_number_and_of_those_the_most_edges(case, seed, ties):
    """A.9, stage B: of 80 even thresholds on [0, 1.1 max b]; T are the candidates that are, with their edges, at or
    below it. Ours: of thresholds with the same edges and beta_1, the last; a triangle that closes a tetrahedron changes
    neither."""
    n, triangles, _ = case
    b, triplets = uniform(seed, len(PAIRS[n])), 1.5 * uniform(seed + 1, len(triangles))
    if ties:
        b, triplets = 0.2 + fifths(seed, 4, len(PAIRS[n])), fifths(seed + 1, 8, len(triangles))
    most = max(b.tolist())
    taus = [1.1 * most * place / 79 for place in range(80)]
    seen = [complex_at(n, b, triangles, triplets, tau) for tau in taus]
    last = max(range(80), key=lambda place: (*seen[place][:2], place))
    betti, count, inside = seen[last]
    signals = Signals(torch.ones(n), uniform(seed, n), b, triangles, triplets)
    complex_ = hodgecover.decompose(signals)
    assert complex_.betti_curve.tolist() == [found[0] for found in seen]
    assert complex_.betti_curve.max() == betti and (b <= complex_.tau).sum() == count
    assert complex_.triangles.tolist() == inside
    kept = [triplets[triangles.tolist().index(row)] for row in inside]
    assert complex_.triplets.tolist() == kept
    assert complex_.d1.shape[1] == len(PAIRS[n])  # the edges are complete whatever tau* is


@given(complexes(3, 7))
def test_without_triangles_all_that_is_no_gradient_is_harmonic(case):
    """A.9, regime 1: im d2 = 0, and ker L1 is the cycle space of the graph."""
    n, _, b = case
    d1, d2 = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    gradient, curl, harmonic = hodgecover.hodge_decompose(b, d1, d2)
    assert not curl.any() and torch.equal(harmonic, b - gradient)
    assert hodgecover.betti_1(d1, d2) == math.comb(n - 1, 2)


@given(complexes(3, 7))
def test_with_all_triangles_nothing_is_harmonic(case):
    """A.9, regime 2: beta_1 vanishes."""
    n, _, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangle_tensor(TRIPLES[n]))
    assert close(hodgecover.hodge_decompose(b, d1, d2).harmonic, torch.zeros_like(b), b)
    assert hodgecover.betti_1(d1, d2) == 0


@given(complexes(4, 7))
def test_with_some_triangles_the_harmonic_space_is_between(case):
    """A.9, regime 3: each triangle takes at most one dimension of the cycle space, the first takes one."""
    n, triangles, _ = case
    assume(len(triangles))
    betti = hodgecover.betti_1(*hodgecover.boundary_matrices(n, triangles))
    assert math.comb(n - 1, 2) - len(triangles) <= betti < math.comb(n - 1, 2)


# ------------------------------------------------------------------- HodgeCover (section 4.1, appendices B.1, B.2, C.1)

@given(st.lists(st.integers(1, 9), max_size=30), st.sampled_from([0, 1, 5, 10, 20, 33, 50, 100]))
def test_critical_simplices_are_the_top_percent(values, percent):
    """Section 4.1: the top-p% edges by |b_harm|, the top-q% triangles by barrier; rounded up, the first of equals."""
    count = -(-len(values) * percent // 100)
    top = sorted(range(len(values)), key=lambda position: (-values[position], position))[:count]
    assert hodgecover.critical(torch.tensor(values, dtype=torch.float64), percent).tolist() == sorted(top)


def phi(chosen, saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]]) -> float:
    """Equation 10 word by word: the saliencies, plus each family's weight times the share of it that is covered."""
    total = sum(saliency[vertex].item() for vertex in chosen)
    for simplices, weight in families:
        rows = simplices.tolist()
        covered = sum(not set(chosen).isdisjoint(row) for row in rows)
        total += weight * covered / max(len(rows), 1)
    return total


def test_an_empty_critical_set_adds_nothing():
    """Section 4.1: by convention, the term of an empty E* or T* is 0."""
    saliency = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert hodgecover.greedy_cover(saliency, [(torch.empty(0, 2).long(), 1.0), (NO_TRIANGLES, 1.0)], 3) == [1, 2, 0]


@given(cover_problems(), st.randoms(use_true_random=False))
def test_the_objective_is_non_negative_monotone_and_submodular(problem, random):
    """Proposition 2: 0 <= Phi(A) <= Phi(B), and A gains no less from a vertex than B, for A within B."""
    n = len(problem[0])
    large = random.sample(range(n), random.randint(0, n - 1))
    small = large[:random.randint(0, len(large))]
    extra = random.choice([vertex for vertex in range(n) if vertex not in large])
    assert 0 <= phi(small, *problem) <= phi(large, *problem) + 1e-12
    gains = [phi([*chosen, extra], *problem) - phi(chosen, *problem) for chosen in (small, large)]
    assert gains[0] >= gains[1] - 1e-12


def assert_each_pick_gains_most(picks: list[int], start: int, problem: tuple) -> None:
    """Every pick after the first `start` has the largest marginal gain of the vertices left (equation 11)."""
    n = len(problem[0])
    for size in range(start, len(picks)):
        before, pick = picks[:size], picks[size]
        values = [phi([*before, vertex], *problem) for vertex in range(n) if vertex not in before]
        assert phi([*before, pick], *problem) == pytest.approx(max(values))


@given(cover_problems())
def test_greedy_takes_the_largest_marginal_gain(problem):
    """Equation 11, algorithm 1: every pick has the largest gain of those left; fewer picks are a prefix of more."""
    n = len(problem[0])
    picks = hodgecover.greedy_cover(*problem, n)
    assert sorted(picks) == list(range(n))
    for size in range(n):
        assert hodgecover.greedy_cover(*problem, size) == picks[:size]
    assert_each_pick_gains_most(picks, 0, problem)


@given(cover_problems(), st.data())
def test_protected_experts_are_kept_and_what_they_cover_is_covered(problem, data):
    """Algorithm 1, line 10: the cover goes on from S_E."""
    n = len(problem[0])
    named = data.draw(st.lists(st.integers(0, n - 1), max_size=n))
    protected = list(dict.fromkeys(named))  # some may be named twice
    keep = data.draw(st.integers(len(protected), n))
    picks = hodgecover.greedy_cover(*problem, keep, named)
    assert picks[:len(protected)] == protected and len(picks) == len(set(picks)) == keep
    assert_each_pick_gains_most(picks, len(protected), problem)


@given(cover_problems())
def test_greedy_reaches_the_bound_of_nemhauser_wolsey_and_fisher(problem):
    """Proposition 2, equations 12 and 31: Phi(greedy) >= (1 - (1 - 1/k)^k) max Phi >= (1 - 1/e) max Phi, by brute force
    over all sets of each size."""
    n = len(problem[0])
    for size in range(1, n + 1):
        best = max(phi(chosen, *problem) for chosen in itertools.combinations(range(n), size))
        bound = 1 - (1 - 1 / size) ** size
        assert bound >= 1 - 1 / math.e
        assert phi(hodgecover.greedy_cover(*problem, size), *problem) >= bound * best - 1e-12


MATCHINGS = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]]])  # of K4


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_every_vertex_score_covers_half_of_one_matching_of_k4_and_the_cover_all(scores):
    """Remark 1 (B.2): E* is one of the three perfect matchings of K4, and all that a vertex sees is the same; so its
    pair is an edge of one matching, and misses the other edge of that. The cover sees E*."""
    pair = sorted(range(4), key=lambda vertex: -scores[vertex])[:2]
    nothing = torch.zeros(4, dtype=torch.float64)
    of_scores = [phi(pair, nothing, [(matching, 1.0)]) for matching in MATCHINGS]
    assert sorted(of_scores) == [0.5, 1, 1]
    for matching in MATCHINGS:
        assert matching.flatten().bincount().tolist() == [1, 1, 1, 1]
        picks = hodgecover.greedy_cover(nothing, [(matching, 1.0)], 2)
        assert phi(picks, nothing, [(matching, 1.0)]) == 1


def test_coverage_is_no_ranking_by_incidence():
    """Section 4.1: on a 4-cycle all experts have incidence 2, yet {0, 1} covers 3 edges and {0, 2} all 4."""
    cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    problem = torch.zeros(4, dtype=torch.float64), [(cycle, 1.0)]
    assert cycle.flatten().bincount().tolist() == [2, 2, 2, 2]
    assert (phi([0, 1], *problem), phi([0, 2], *problem)) == (0.75, 1)
    assert hodgecover.greedy_cover(*problem, 2) == [0, 2]


@given(st.integers(3, 8), SEEDS, st.sampled_from([0.0, 1.0, 3.0]), st.data())
def test_the_redirect_goes_to_the_nearest_survivor_by_hodge_weighted_barrier(n, seed, alpha, data):
    """Equation 13: pi(i) = argmin over survivors j of b_ij (1 + alpha |b_harm,ij| / |b|)."""
    b, harmonic = uniform(seed, len(PAIRS[n])), normal(seed + 1, len(PAIRS[n]))
    survivors = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    norm = math.sqrt(sum(value ** 2 for value in b.tolist()))
    cost = value_of(n, b * (1 + alpha * harmonic.abs() / norm))
    dropped = set(range(n)) - set(survivors)
    expected = {i: min(survivors, key=lambda j: cost[i, j]) for i in dropped}
    assert hodgecover.redirect(survivors, b, harmonic, alpha) == expected


@pytest.mark.parametrize("scale, target", [(1, 1), (1e-4, 1), (1e-11, 1), (1e-13, 0)])
def test_the_harmonic_factor_is_1_if_there_is_no_signal(scale, target):
    """Algorithm 1, line 20: expert 2 shuns the harmonic edge to 0, unless |b| < 1e-12."""
    b = scale * torch.tensor([1.0, 0.5, 0.6], dtype=torch.float64)
    harmonic = scale * torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    assert hodgecover.redirect([0, 1], b, harmonic, alpha=1.0) == {2: target}


# ------------------------------------------------------------------------------------------ retained mass (equation 34)

@given(complexes(3, 7), st.sets(st.integers(0, 6), min_size=1), SEEDS)
def test_retained_mass_is_the_share_of_the_l1_mass_that_meets_the_survivors(case, chosen, seed):
    """Equation 34: of a Hodge part on the edges, and of the barriers on the triangles."""
    n, triangles, b = case
    survivors = sorted(vertex for vertex in chosen if vertex < n)
    for simplices, signal in ((hodgecover.edges(n), b), (triangles, uniform(seed, len(triangles)))):
        total = met = 0.0
        for value, simplex in zip(signal.tolist(), simplices.tolist()):
            total += abs(value)
            if set(simplex) & set(survivors):
                met += abs(value)
        share = met / total if total else 0
        assert hodgecover.retained_mass(signal, simplices, survivors) == pytest.approx(share)
        assert hodgecover.retained_mass(0 * signal, simplices, survivors) == 0


# ----------------------------------------------------------------- what an auditor must know and the paper does not say

@pytest.mark.parametrize("n", [2, 3, 4, 9, 64])
def test_a_constant_signal_has_harmonic_energy(n):
    """b = 1 on the complex without triangles has rho_grad = (2/3) (n + 1) / n; all the rest is harmonic."""
    d = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    rho = hodgecover.hodge_decompose(torch.ones(math.comb(n, 2), dtype=torch.float64), *d).shares()
    share = 2 / 3 * (n + 1) / n
    assert rho == pytest.approx({"gradient": share, "curl": 0, "harmonic": 1 - share}, abs=1e-12)


@given(complexes(3, 6), st.permutations(range(6)))
def test_relabelling_only_permutes_the_parts_of_an_alternating_cochain(case, drawn):
    """A signal with b_ji = -b_ij has the same parts in any total order of the experts; the unsigned additive model
    b_ij ~ phi_i + phi_j needs no order."""
    n, triangles, b = case
    label = torch.tensor([v for v in drawn if v < n])
    old = label.argsort()
    i, j = hodgecover.edges(n).T
    flipped = (old[j] - old[i]).sign()
    signals = Signals(torch.ones(n), torch.ones(n), b, triangles, torch.zeros(len(triangles)))
    moved = renumbered(signals, label)
    d, moved_d = (hodgecover.boundary_matrices(n, of.candidates) for of in (signals, moved))
    after = hodgecover.hodge_decompose(flipped * moved.barriers, *moved_d)
    for part, of_moved in zip(hodgecover.hodge_decompose(b, *d), after):
        assert close(of_moved, flipped * on_edges(n, part, old), b)
    residual = on_edges(n, mathx.additive_residual(b, d[0]), old)
    assert close(mathx.additive_residual(moved.barriers, d[0]), residual, b)
    assert mathx.additive_shares(moved.barriers, d[0]) == pytest.approx(mathx.additive_shares(b, d[0]), abs=1e-9)


def test_relabelling_changes_the_parts_of_barriers():
    """Barriers have b_ji = b_ij: a 3-cycle with barriers 1, 1, 0 has rho_harm 0 in one order, 2/3 in another."""
    d = hodgecover.boundary_matrices(3, NO_TRIANGLES)
    b = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)  # on (0, 1), (0, 2), (1, 2)
    swapped = on_edges(3, b, torch.tensor([1, 0, 2]))
    assert hodgecover.hodge_decompose(b, *d).shares()["harmonic"] == pytest.approx(0, abs=1e-12)
    assert hodgecover.hodge_decompose(swapped, *d).shares()["harmonic"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("triangles, rho", [
    ([], (0, 0, 1)),
    ([(0, 1, 2)], (0, 1, 0)),
    ([(1, 2, 3)], (0, 1 / 9, 8 / 9)),
], ids=["unfilled", "filled", "neighbour-filled"])
def test_a_filled_three_cycle_is_curl_and_an_unfilled_one_harmonic(triangles, rho):
    """The cycle 0 -> 1 -> 2 -> 0 among 4 experts; a filled triangle that shares an edge with it takes a part."""
    cycle = torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    d = hodgecover.boundary_matrices(4, triangle_tensor(triangles))
    assert tuple(hodgecover.hodge_decompose(cycle, *d).shares().values()) == pytest.approx(rho, abs=1e-12)
