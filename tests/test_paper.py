# SPDX-License-Identifier: MIT
"""The paper (arXiv 2605.13997), statement by statement, in its order: properties and brute force on small complexes.

b is an edge signal, d = (d1, d2) the boundary matrices, L1 the Hodge Laplacian; see the symbols of hodgecover.py.
"""
import itertools
import math

import hodgecover
import mathx
import pytest
import torch
from conftest import KINDS
from hodgecover import MoELayer, Settings, Signals
from hypothesis import assume
from hypothesis import strategies as st
from model_io import Experts, Model
from safetensors.torch import load_file
from strategies import (NO_TRIANGLES, PAIRS, SEEDS, TRIPLES, barrier_by_hand, complexes, cover_problems, fast_barriers,
                        fifths, given, kl_of_logit_change, normal, on_edges, random_layer, rational_rank, renumbered,
                        triangle_tensor, uniform)


def value_of(n: int, signal: torch.Tensor) -> dict[tuple[int, int], float]:
    """An edge signal by its edges, both ways round."""
    by_edge = dict(zip(PAIRS[n], signal.tolist()))
    return by_edge | {(j, i): value for (i, j), value in by_edge.items()}


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the norm of the signal `scale`."""
    return (found - expected).norm().item() <= 1e-9 * scale.norm().item()


def laplacian(d1: torch.Tensor, d2: torch.Tensor) -> torch.Tensor:
    """L1 = d1' d1 + d2 d2' (section 3.2), (E, E): for small complexes only, the method never forms it."""
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


# --------------------------------------------------------------------------------- barriers are KL (section 3.1)

@pytest.mark.parametrize("case", [{"unreached": 3}, {"k": 7}])
@pytest.mark.parametrize("simplex", [[0, 1], [2, 3], [1, 3, 6]])
def test_a_barrier_is_the_kl_of_a_frequency_weighted_merge(case, simplex):
    """Section 3.1: replace the experts of a pair or a triple by their merge, and compare the next-token distributions,
    here token by token from the weights alone. An expert without tokens has no weight in its merges."""
    layer = random_layer(tokens=12, **case)
    expected = barrier_by_hand(layer, simplex)
    assert hodgecover.plain_barrier(layer, simplex).item() == pytest.approx(expected, rel=1e-9)
    assert fast_barriers(layer, torch.tensor([simplex])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
def test_a_barrier_at_the_end_of_the_model_runs_the_model_with_merged_experts(path, monkeypatch):
    """Section 3.1: the same, read out after all later layers, if each member of the simplex has the merged weights."""
    model, ids, read = Model(path, torch.float64), load_file(path / "golden.safetensors")["ids"], Model.layer
    log_p, head = model.logits(ids).log_softmax(-1), model.unembedding()
    for step in model.stream(ids):
        if step.gates is None or step.name.startswith("mtp."):
            continue
        norm = hodgecover.end_of_model(model, ids, step.index, step.norm)
        layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, norm, head)
        for simplex in ([0, 1], [3, 5, 7]):
            share = hodgecover.merge_weights(torch.tensor([simplex]), (step.gates > 0).sum(0))[0]
            merged = Experts(*(part.clone() for part in layer.experts))
            for part in merged:
                part[simplex] = torch.tensordot(share, part[simplex], 1)

            def changed(self, index):
                found = read(self, index)
                found.experts = merged if index == step.index else found.experts
                return found
            with monkeypatch.context() as patch:
                patch.setattr(Model, "layer", changed)
                log_q = Model(path, torch.float64).logits(ids).log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            torch.testing.assert_close(hodgecover.plain_barrier(layer, simplex), expected, rtol=1e-7, atol=1e-15)


@given(SEEDS, st.sampled_from([1e-9, 1.0, 1e9]))
def test_merge_weights_are_routing_rates(seed, unit):
    """Sections 3.1 and A.10: shares of the routing rate, in any unit; equal shares if all rates vanish."""
    rates = unit * uniform(seed, 6) * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    share = hodgecover.merge_weights(torch.tensor([[0, 1, 2], [0, 2, 3], [3, 4, 5]]), rates)
    torch.testing.assert_close(share[0], rates[:3] / rates[:3].sum())
    torch.testing.assert_close(share.sum(1), torch.ones(3).double())
    assert share[1, 2] == 0 and share[2].tolist() == pytest.approx([1 / 3] * 3)


@given(SEEDS)
def test_barriers_are_not_negative_and_equal_experts_merge_for_nothing(seed):
    """Section 3.1: a KL divergence, 0 if the merge changes nothing."""
    layer = random_layer(seed % 1000, tokens=8)
    same = layer._replace(experts=Experts(*(part[:1].expand_as(part) for part in layer.experts)))
    for simplices in (torch.tensor(PAIRS[7]), torch.tensor(TRIPLES[7])):
        assert (fast_barriers(layer, simplices) >= 0).all() and fast_barriers(same, simplices).max() < 1e-20


@given(SEEDS, st.sampled_from([0.1, 1.0, 5.0]), st.sampled_from([0.01, 0.1, 1.0, 5.0]))
def test_kl_of_a_logit_change_is_the_direct_kl(seed, peak, size):
    """Section 3.1: KL of two next-token distributions, from the change of the logits alone."""
    logits = peak * normal(seed, 20)
    delta = size * normal(seed + 1, 3, 20)
    log_p = logits.log_softmax(-1)
    direct = (log_p.exp() * (log_p - (logits + delta).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl_of_logit_change(log_p, delta), direct, rtol=1e-9, atol=1e-14)


# ----------------------------------------------------------------- the complex and the Laplacian (section 3.2)

@given(complexes())
def test_the_boundary_of_an_edge_and_of_a_triangle(case):
    """Section 3.2: d1 of (i, j) is j - i; d2 of (h, i, j) is (i, j) - (h, j) + (h, i)."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    assert (d1.shape, d2.shape) == ((n, len(PAIRS[n])), (len(PAIRS[n]), len(triangles)))
    for column, (i, j) in zip(d1.T.tolist(), PAIRS[n]):
        assert column == [(v == j) - (v == i) for v in range(n)]
    for column, (h, i, j) in zip(d2.T.tolist(), triangles.tolist()):
        assert column == [(edge == (i, j)) - (edge == (h, j)) + (edge == (h, i)) for edge in PAIRS[n]]


@given(complexes())
def test_the_boundary_of_a_boundary_is_zero(case):
    """Section 3.2: the chain identity d1 d2 = 0, exactly."""
    d1, d2 = hodgecover.boundary_matrices(*case[:2])
    assert not (d1 @ d2).any()


@given(complexes())
def test_the_laplacian_is_symmetric_and_positive_semidefinite(case):
    """Section 3.2: L1 = d1' d1 + d2 d2', so that b' L1 b = |d1 b|^2 + |d2' b|^2."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    matrix = laplacian(d1, d2)
    assert torch.equal(matrix, matrix.T) and torch.linalg.eigvalsh(matrix).min() > -1e-9
    energy = (d1 @ b).square().sum() + (d2.T @ b).square().sum()
    torch.testing.assert_close(b @ matrix @ b, energy, rtol=1e-9, atol=1e-12 * b.square().sum().item())


@given(st.integers(2, 7), SEEDS, st.floats(0, 1))
def test_thresholding_edges_would_change_the_rank_of_d1(n, seed, tau):
    """Section 3.2: rank d1 = n - components, so that it falls when a thresholded graph is disconnected."""
    d1, _ = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    assert rational_rank(d1) == n - 1
    cheap = uniform(seed, len(PAIRS[n])) <= tau
    left = [edge for edge, is_in in zip(PAIRS[n], cheap) if is_in]
    assert rational_rank(d1[:, cheap]) == n - components(n, left)


def test_thresholding_edges_would_lose_a_harmonic_cycle():
    """Section 3.2: the unfilled cycle 0-1-2 is harmonic; without one of its edges nothing is."""
    d1, d2 = hodgecover.boundary_matrices(3, NO_TRIANGLES)
    assert kernel(laplacian(d1, d2)).shape[1] == 1
    assert kernel(laplacian(d1[:, :2], d2[:2])).shape[1] == 0


@given(complexes(), SEEDS, st.sampled_from([-3.0, 1e-6, 1e6]))
def test_barriers_are_a_signal_and_no_weights(case, seed, scale):
    """Sections 3.2 and A.3: the projectors depend on the complex alone, so that the parts are linear in the signal."""
    n, triangles, b = case
    d = hodgecover.boundary_matrices(n, triangles)
    other = normal(seed, len(b))
    both = hodgecover.hodge_decompose(scale * b + other, *d)
    for part, of_b, of_other in zip(both, hodgecover.hodge_decompose(b, *d), hodgecover.hodge_decompose(other, *d)):
        assert close(part, scale * of_b + of_other, torch.cat((scale * b, other)))


# ---------------------------------------------------------- the order of the experts (section 3.2), and what it does

def places(n: int, order: str, saliency: torch.Tensor) -> torch.Tensor:
    """The place of each expert in a total order, from the edges' signs: how many others come before it."""
    d1, _ = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    return ((d1 @ hodgecover.edge_signs(order, saliency) + n - 1) / 2).long()


@given(st.integers(2, 8), SEEDS, st.integers(0, 99))
def test_the_signs_of_the_edges_are_a_total_order(n, seed, number):
    """Section 3.2: of the experts by ascending saliency, equal ones by index; by index; or at random."""
    saliency = fifths(seed, 4, n)
    assert places(n, "saliency", saliency).argsort().tolist() == sorted(range(n), key=lambda e: (saliency[e], e))
    assert places(n, "index", saliency).tolist() == list(range(n))
    drawn = places(n, f"random:{number}", saliency)
    assert sorted(drawn.tolist()) == list(range(n)) and torch.equal(drawn, places(n, f"random:{number}", saliency * 2))
    assert len({str(places(8, f"random:{other}", torch.ones(8))) for other in range(9)}) > 1


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


@given(st.integers(7, 9), SEEDS, ORDERS, st.randoms(use_true_random=False))
def test_the_plan_of_renumbered_experts_is_the_renumbered_plan(n, seed, order, random):
    """Section 3.2: in saliency order for any renumbering; any order is index order once the experts are in it."""
    triangles = torch.combinations(torch.arange(n), 3)
    triangles = triangles[normal(seed, len(triangles)).topk(8).indices.sort().values]
    signals = Signals(torch.arange(n), uniform(seed, n) / n, uniform(seed + 1, math.comb(n, 2)), triangles,
                      uniform(seed + 2, 8))
    settings = dict(edge_percent=10, triangle_percent=30)
    magnitude = hodgecover.decompose(signals, Settings(order=order)).parts.harmonic.abs()
    assume(magnitude.sort().values.diff().min() > 1e-9)  # of equal ones the numbering chooses
    label = torch.tensor(random.sample(range(n), n)) if order == "saliency" else places(n, order, signals.saliency)
    other = Settings(order="saliency" if order == "saliency" else "index", **settings)
    plan = hodgecover.plan_from_signals(signals, 4, Settings(order=order, **settings))
    moved = hodgecover.plan_from_signals(renumbered(signals, label), 4, other)
    new = label.tolist()
    assert moved["order"] == [new[e] for e in plan["order"]]
    assert moved["survivors"] == sorted(new[e] for e in plan["survivors"])
    assert moved["redirect"] == {new[e]: new[target] for e, target in plan["redirect"].items()}
    found, of_moved = plan["diagnostics"], moved["diagnostics"]
    for name in ("critical_edges", "critical_triangles"):
        simplices = [sorted(new[e] for e in simplex) for simplex in found.pop(name)]
        assert sorted(simplices) == of_moved.pop(name)
    for name in ("discordance_quantiles", "betti_curve"):
        assert of_moved.pop(name) == pytest.approx(found.pop(name))
    for name, value in found.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            assert (of_moved[name][key] if key else of_moved[name]) == pytest.approx(number, abs=1e-12)


# ------------------------------------------------------------------------------- Hodge decomposition (section 3.3)

@given(complexes())
def test_the_parts_sum_to_the_signal_and_are_orthogonal(case):
    """Theorem 1 (section 3.3): b = b_grad + b_curl + b_harm, pairwise orthogonal."""
    n, triangles, b = case
    parts = hodgecover.hodge_decompose(b, *hodgecover.boundary_matrices(n, triangles))
    assert close(sum(parts), b, b)
    for part, other in itertools.combinations(parts, 2):
        assert abs(part @ other) <= 1e-10 * b.square().sum()


@given(complexes())
def test_each_part_lies_in_its_subspace(case):
    """Theorem 1 (section 3.3): b_grad in im d1', b_curl in im d2, b_harm in ker L1."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    gradient, curl, harmonic = hodgecover.hodge_decompose(b, d1, d2)
    _, every_triangle = hodgecover.boundary_matrices(n, triangle_tensor(TRIPLES[n]))
    zero = torch.zeros_like(b)
    assert close(every_triangle @ (every_triangle.T @ gradient), zero, 100 * b)  # no circulation: a potential's lift
    assert close(d1.T @ (d1 @ curl), zero, 100 * b)  # no divergence, and ...
    assert close(kernel(d2 @ d2.T).T @ curl, zero[:1], b)  # ... orthogonal to all that is orthogonal to im d2
    assert close(laplacian(d1, d2) @ harmonic, zero, 100 * b)


@given(complexes())
def test_betti_1_is_the_dimension_of_the_kernel(case):
    """Theorem 1 (section 3.3): dim ker L1 = beta_1, by ranks over the rationals. Sections 3.4, A.3: the Euler-Poincare
    count n - E + F = 1 - beta_1 + beta_2, beta_2 = F - rank d2."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    betti = mathx.betti_1(d1, d2)
    assert betti == len(PAIRS[n]) - rational_rank(d1) - rational_rank(d2) == kernel(laplacian(d1, d2)).shape[1]
    beta_2 = len(triangles) - rational_rank(d2)
    assert n - len(PAIRS[n]) + len(triangles) == 1 - betti + beta_2


@given(complexes(), SEEDS)
def test_the_decomposition_is_unique(case, seed):
    """Theorem 1 (section 3.3): whatever split with parts in the three subspaces b has, it is this one."""
    n, triangles, _ = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    cycles = kernel(laplacian(d1, d2))
    split = d1.T @ normal(seed, n), d2 @ normal(seed + 1, len(triangles)), cycles @ normal(seed + 2, cycles.shape[1])
    b = sum(split)
    for part, planted in zip(hodgecover.hodge_decompose(b, d1, d2), split):
        assert close(part, planted, b)


@given(complexes())
def test_the_projection_formulas(case):
    """A.5: b_grad and b_curl are least-squares projections onto im d1' and im d2, b_harm onto L1's null vectors."""
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
    """Proposition 1 (section 3.3): min over phi, psi of |b - d1' phi - d2 psi|^2 = |b_harm|^2."""
    n, triangles, b = case
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    harmonic = hodgecover.hodge_decompose(b, d1, d2).harmonic
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
    d = hodgecover.boundary_matrices(n, triangles)
    parts = hodgecover.hodge_decompose(b, *d)
    eta = parts.shares()
    energy = sum(value ** 2 for value in b.tolist())
    for name, part in parts._asdict().items():
        assert eta[name] == pytest.approx(sum(value ** 2 for value in part.tolist()) / energy, rel=1e-9)
    assert sum(eta.values()) == pytest.approx(1)
    assert hodgecover.hodge_decompose(scale * b, *d).shares() == pytest.approx(eta, rel=1e-6, abs=1e-12)
    assert set(hodgecover.hodge_decompose(0 * b, *d).shares().values()) == {0}


@given(complexes(3), SEEDS, st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.25, 1.0, 8.0]))
def test_the_discordance_fraction(case, seed, margin, scale):
    """Section 3.4: the share of triangles whose barrier exceeds their worst edge's by a margin; scale-invariant."""
    n, triangles, _ = case
    b, triplets = fifths(seed, 6, len(PAIRS[n])), fifths(seed + 1, 8, len(triangles))
    cost = value_of(n, b)
    discordant = [triplet > (1 + margin) * max(cost[pair] for pair in itertools.combinations(triangle, 2))
                  for triplet, triangle in zip(triplets.tolist(), triangles.tolist())]
    signals = Signals(torch.ones(n), torch.ones(n).double(), scale * b, triangles, scale * triplets)
    found = hodgecover.plan_from_signals(signals, 1, Settings(margin=margin, thresholds=2))["diagnostics"]
    assert found["discordance"] == pytest.approx(sum(discordant) / max(len(triangles), 1))


# ------------------------------------------------------------------------------- curated triangles (section 3.2, A.9)

@given(st.integers(3, 8), SEEDS, st.booleans(), st.sampled_from([0, 1, 2, 4, 60]))
def test_candidates_are_the_cliques_at_or_below_the_median(n, seed, ties, limit):
    """A.9, stage 1: the 3-cliques of the edges with barrier <= median, no more than the limit. Renumbered experts have
    the renumbered ones."""
    b = fifths(seed, 4, len(PAIRS[n])) if ties else uniform(seed, len(PAIRS[n]))
    median, cost, saliency = sorted(b.tolist())[(len(b) - 1) // 2], value_of(n, b), uniform(seed + 1, n)
    cliques = [t for t in TRIPLES[n] if all(cost[pair] <= median for pair in itertools.combinations(t, 2))]
    candidates = hodgecover.candidate_triangles(b, saliency, limit, seed)
    found = list(map(tuple, candidates.tolist()))
    assert len(found) == min(limit, len(cliques))
    assert found == sorted(set(found)) and set(found) <= set(cliques)
    moved = renumbered(Signals(saliency, saliency, b, candidates, torch.zeros(len(found))), normal(seed, n).argsort())
    assert torch.equal(hodgecover.candidate_triangles(moved.barriers, moved.saliency, limit, seed), moved.candidates)


@given(complexes(3, 6), SEEDS)
def test_the_betti_curve_is_that_of_each_thresholded_complex(case, seed):
    """A.9, stage 2: beta_1 of K_tau at each threshold, by ranks over the rationals."""
    n, triangles, _ = case
    b, triplets = fifths(seed, 6, len(PAIRS[n])), fifths(seed + 1, 8, len(triangles))
    thresholds = torch.arange(-1, 17).double() / 10  # at the barriers and between them
    d1, d2 = hodgecover.boundary_matrices(n, triangles)
    expected = []
    for tau in thresholds:
        edges_in = b <= tau
        faces_in = d2.abs().T @ edges_in.double() == 3
        triangles_in = (triplets <= tau) & faces_in
        expected.append(int(edges_in.sum()) - rational_rank(d1[:, edges_in]) - rational_rank(d2[:, triangles_in]))
    assert mathx.betti_curve(hodgecover.edges(n), d2, b, triplets, thresholds).tolist() == expected


# ---------------------------------------------------------------------------------------- HodgeCover (section 4.1)

@given(st.lists(st.integers(1, 9), max_size=30), st.sampled_from([0, 1, 5, 10, 33, 50, 100]))
def test_critical_simplices_are_the_top_percent(values, percent):
    """Section 4.1: the top-p% edges by |b_harm|, the top-q% triangles by barrier; rounded up, the first of equals."""
    count = -(-len(values) * percent // 100)
    top = sorted(range(len(values)), key=lambda position: (-values[position], position))[:count]
    assert hodgecover.critical(torch.tensor(values, dtype=torch.float64), percent).tolist() == sorted(top)


def phi(chosen, saliency: torch.Tensor, families: list[tuple[torch.Tensor, float]]) -> float:
    """Eq. 10 word by word: the saliencies, plus each family's weight times the share of it that is covered."""
    total = sum(saliency[vertex].item() for vertex in chosen)
    for simplices, weight in families:
        rows = simplices.tolist()
        total += weight * sum(any(vertex in chosen for vertex in row) for row in rows) / max(len(rows), 1)
    return total


def test_an_empty_critical_set_adds_nothing():
    """Section 4.1: by convention, the term of an empty E* or T* is 0."""
    saliency = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert hodgecover.greedy_cover(saliency, [(torch.empty(0, 2).long(), 1.0), (NO_TRIANGLES, 1.0)], 3) == [1, 2, 0]


@given(cover_problems(), st.randoms(use_true_random=False))
def test_the_objective_is_non_negative_monotone_and_submodular(problem, random):
    """Proposition 2 (section 4.1): 0 <= Phi(A) <= Phi(B), and A gains no less from a vertex than B, for A within B."""
    n = len(problem[0])
    large = random.sample(range(n), random.randint(0, n - 1))
    small = large[:random.randint(0, len(large))]
    extra = random.choice([vertex for vertex in range(n) if vertex not in large])
    assert 0 <= phi(small, *problem) <= phi(large, *problem) + 1e-12
    gains = [phi([*chosen, extra], *problem) - phi(chosen, *problem) for chosen in (small, large)]
    assert gains[0] >= gains[1] - 1e-12


@given(cover_problems())
def test_greedy_takes_the_largest_marginal_gain(problem):
    """Eq. 11 (section 4.1): every pick has the largest gain of those left; fewer picks are a prefix of more."""
    n = len(problem[0])
    picks = hodgecover.greedy_cover(*problem, n)
    assert sorted(picks) == list(range(n))
    for size, pick in enumerate(picks):
        before = picks[:size]
        assert hodgecover.greedy_cover(*problem, size) == before
        values = [phi([*before, vertex], *problem) for vertex in range(n) if vertex not in before]
        assert phi([*before, pick], *problem) == pytest.approx(max(values))


@given(cover_problems())
def test_greedy_reaches_1_minus_1_over_e_of_the_best(problem):
    """Proposition 2 (section 4.1): Phi(greedy) >= (1 - 1/e) max Phi, by brute force over all sets of each size."""
    n = len(problem[0])
    for size in range(n + 1):
        best = max(phi(chosen, *problem) for chosen in itertools.combinations(range(n), size))
        assert phi(hodgecover.greedy_cover(*problem, size), *problem) >= (1 - 1 / math.e) * best - 1e-12


def test_coverage_is_no_ranking_by_incidence():
    """B.2, section 4.1: on a 4-cycle all experts have incidence 2, yet {0, 1} covers 3 edges and {0, 2} all 4."""
    cycle = torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])
    problem = torch.zeros(4, dtype=torch.float64), [(cycle, 1.0)]
    assert cycle.flatten().bincount().tolist() == [2, 2, 2, 2]
    assert (phi([0, 1], *problem), phi([0, 2], *problem)) == (0.75, 1)
    assert hodgecover.greedy_cover(*problem, 2) == [0, 2]


@given(st.integers(3, 8), SEEDS, st.sampled_from([0.0, 1.0, 5.0]), st.data())
def test_the_redirect_goes_to_the_nearest_survivor_by_hodge_weighted_barrier(n, seed, alpha, data):
    """Section 4.1: pi(i) = argmin over survivors j of b_ij (1 + alpha |b_harm,ij| / |b|)."""
    b, harmonic = uniform(seed, len(PAIRS[n])), normal(seed + 1, len(PAIRS[n]))
    survivors = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    cost = value_of(n, b * (1 + alpha * harmonic.abs() / math.sqrt(sum(value ** 2 for value in b.tolist()))))
    dropped = set(range(n)) - set(survivors)
    expected = {i: min(survivors, key=lambda j: cost[i, j]) for i in dropped}
    assert hodgecover.redirect(survivors, b, harmonic, alpha) == expected


@pytest.mark.parametrize("scale, target", [(1, 1), (1e-4, 1), (1e-11, 1), (1e-13, 0)])
def test_the_harmonic_factor_is_1_if_there_is_no_signal(scale, target):
    """Section 4.1: expert 2 shuns the harmonic edge to 0, unless |b| < 1e-12."""
    b = scale * torch.tensor([1.0, 0.5, 0.6], dtype=torch.float64)
    harmonic = scale * torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    assert hodgecover.redirect([0, 1], b, harmonic, alpha=1.0) == {2: target}


# ------------------------------------------------------------- what an auditor must know and the paper does not say

@pytest.mark.parametrize("n", [2, 3, 4, 9, 64])
def test_a_constant_signal_has_harmonic_energy(n):
    """b = 1 on the complex without triangles has eta_grad = (2/3) (n + 1) / n; all the rest is harmonic."""
    d = hodgecover.boundary_matrices(n, NO_TRIANGLES)
    eta = hodgecover.hodge_decompose(torch.ones(math.comb(n, 2), dtype=torch.float64), *d).shares()
    share = 2 / 3 * (n + 1) / n
    assert eta == pytest.approx({"gradient": share, "curl": 0, "harmonic": 1 - share}, abs=1e-12)


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
    """Barriers have b_ji = b_ij: a 3-cycle with barriers 1, 1, 0 has eta_harm 0 in one order, 2/3 in another."""
    d = hodgecover.boundary_matrices(3, NO_TRIANGLES)
    b = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)  # on (0, 1), (0, 2), (1, 2)
    swapped = on_edges(3, b, torch.tensor([1, 0, 2]))
    assert hodgecover.hodge_decompose(b, *d).shares()["harmonic"] == pytest.approx(0, abs=1e-12)
    assert hodgecover.hodge_decompose(swapped, *d).shares()["harmonic"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("triangles, eta", [
    ([], (0, 0, 1)),
    ([(0, 1, 2)], (0, 1, 0)),
    ([(1, 2, 3)], (0, 1 / 9, 8 / 9)),
], ids=["unfilled", "filled", "neighbour-filled"])
def test_a_filled_three_cycle_is_curl_and_an_unfilled_one_harmonic(triangles, eta):
    """The cycle 0 -> 1 -> 2 -> 0 among 4 experts; a filled triangle that shares an edge with it takes a part."""
    cycle = torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    d = hodgecover.boundary_matrices(4, triangle_tensor(triangles))
    assert tuple(hodgecover.hodge_decompose(cycle, *d).shares().values()) == pytest.approx(eta, abs=1e-12)
