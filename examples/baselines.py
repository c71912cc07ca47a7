# SPDX-License-Identifier: MIT
"""Compress a checkpoint by another rule than HodgeCover's: the methods that it is compared with.

    python examples/baselines.py CKPT --keep 32 --method reap --out DIR
    python examples/baselines.py CKPT --keep 32 --method hc-smoe --all-slots --out DIR

Selectors keep K experts of every layer bit for bit. A dropped one is redirected to the survivor whose router row is
nearest in cosine, REAP's rule:

random              K experts at random, others in each layer
frequency           the K experts that most tokens are routed to
reap                the K experts of largest REAP saliency (arXiv 2510.13999)
man, msan           the K of largest mean |E_e(x)|, or its square, over e's tokens, without gates (arXiv 2606.15716)
aimer               the K of least mean |w| / rms(w) over an expert's three matrices (arXiv 2603.18492). Needs no text;
                    one is read all the same, for the frequency and saliency of the record
hope                drop the experts P of least p'Fp (arXiv 2609.18916): F_ij is the mean over the tokens routed to both
                    of g_i |E_i| g_j |E_j|, and F_ii REAP's mean of g_i |E_i|, squared, so that REAP is the diagonal
                    alone (our reading: the paper's text was not at hand). Greedy, then swaps while they help

Selectors on barriers share the cache of hodgecover.py, its redirect and its report:

hodge-no-triangle   HodgeCover's ablation (B.7, E.1): lambda_t = 0, nothing else changes
additive-residual   HodgeCover's cover (ours), with the edges where b_ij = phi_i + phi_j is most wrong as critical ones
weighted-cover      HodgeCover's cover (ours), but of every edge by its barrier instead of a top few counted alike

Merging methods form K groups in every layer. A group becomes one expert, the weighted mean of its members' parameters.

HodgeCover's other ablations (B.7, E.1) share its cache, too: they take its barriers b_ij and its triangles T, at tau*.
Edges join the components at their ends in ascending order of cost (union-find; ties in lexicographic order), until K
components are left. Means are weighted by frequency. Ours: the most frequent member comes first.

greedy-barrier      the cost is b_ij
triplet-penalty     b_ij (1 + alpha_T p_ij): p_ij is the mean barrier of the triangles of T on the edge over that of all
                    of T, 0 on an edge of none (ours); alpha_T is 1 (ours: the paper does not say)
triplet-hypergraph  b_ij, but an edge is passed over if a triangle of T in the new component has a barrier above the
                    median of T. Ours: a triple that is not in T passes; when the edges end before K components are
                    left, they are gone through once more without the veto

The others are their papers' selections in a few lines, in our words. RESULTS.md has what a comparison with published
code showed:

mc-smoe (arXiv 2310.01334)  The K most frequent experts are dominant. Each other expert joins the one whose router
                            logits over the calibration tokens are nearest in cosine. Means are weighted by frequency.
                            Left out: one threshold of frequency over all layers, the alignment of hidden units before
                            a merge, the low-rank compression after it
hc-smoe (arXiv 2410.08589)  Average-linkage clusters of the experts' mean outputs. Means are weighted by frequency. Ours
                            for both: frequency is by the model's top-k. The published code of both counts a top-2,
                            whatever the model's k
ream    (arXiv 2604.04356)  The K most salient experts are centroids. The most salient first, each takes the free
                            experts that are most like it, 15 at most. Means are weighted by saliency. As in the
                            published code: saliency is REAP's with the softmax gate squared; likeness is half of
                            (1 + cosine) / 2 of the mean outputs, each token's times its softmax gate, and half of
                            1 - distance / largest distance of the router logits over the tokens, scaled to norm 1; an
                            expert that no token is routed to has the least saliency of the others; a layer reads the
                            stream that the merged layers before it give. Left out: alignment of hidden units; means
                            by batches of 8 sequences, as all tokens are one batch here. Ours: what no centroid has
                            room for joins the one most like it, where the published code refuses; with --all-slots,
                            which it has not, the stream has all slots, too
slimqwen (arXiv 2605.08738) Of the K experts of largest REAP saliency the first half stays as it is. Each dropped expert
                            joins that of the second half whose mean output is nearest in cosine. Means are weighted by
                            saliency. Left out: the paper's cuts in depth and width. Ours: which experts form the second
                            half, which the text leaves open. Its training is distil.py
stun    (arXiv 2409.06211)  The structured stage: complete-linkage clusters of the router's rows by Euclidean distance.
                            Of each cluster the expert nearest the mean of its weights stays; nothing is merged. Left
                            out: the routing statistics that the paper can add to the distance, and one threshold over
                            all layers

A merged expert has the router row of its group's first member; the routing to the others is lost. --all-slots keeps
the router and puts each merged expert into the slots of all members, as MC-SMoE and HC-SMoE evaluate them: nothing of
the routing is lost, and the files do not shrink.
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common
import hodgecover
import mathx
import model_io
from hodgecover import Complex, Plan, Selection, Settings, Signals, Tick
from model_io import Experts, InputError, Layer, Model

Groups = list[list[int]]  # the first of each is the one whose router row stays
ALPHA_T = 1.0  # of triplet-penalty (B.7)
TINY = torch.finfo(torch.float64).tiny  # keeps a quotient of zeros finite


# ----------------------------------------------------------------------------------- selectors without barriers

class Routing(NamedTuple):
    """What a selector without barriers looks at: tokens routed to each expert (n,), REAP saliency (n,); for hope its
    matrix F (n, n); the scores of man, msan and aimer (n,)."""
    frequency: torch.Tensor
    saliency: torch.Tensor
    joint: torch.Tensor | None = None
    man: torch.Tensor | None = None
    msan: torch.Tensor | None = None
    aimer: torch.Tensor | None = None


def measure_routing(step: model_io.LayerPass, method: str | None = None) -> Routing:
    """Frequency and saliency of a layer, and what one of WITHOUT_BARRIERS looks at beside them; of None what all do."""
    frequency = (step.gates > 0).sum(0).cpu()
    saliency = hodgecover.reap_saliency(step.layer.experts, step.x, step.gates)
    routing = Routing(frequency, saliency)
    if method in (None, "aimer"):
        routing = routing._replace(aimer=flatness(step.layer.experts))
    if method in (None, "man", "msan", "hope"):
        norms, tokens = output_norms(step), frequency.clamp(min=1)
        man = norms.sum(0).cpu() / tokens
        msan = norms.square().sum(0).cpu() / tokens
        joint = joint_norms(step.gates, norms)
        routing = routing._replace(joint=joint, man=man, msan=msan)
    return routing


def output_norms(step: model_io.LayerPass) -> torch.Tensor:
    """|E_e(x)| of each token and each expert that it is routed to, else 0, (T, n) float64."""
    norms = torch.zeros(step.gates.shape, dtype=torch.float64, device=step.gates.device)
    for e in range(norms.shape[1]):
        t = step.gates[:, e].nonzero().squeeze(1)
        norms[t, e] = step.layer.experts(e, step.x[t]).double().norm(dim=1)
    return norms


def flatness(experts: Experts) -> torch.Tensor:
    """Mean |w| / rms(w) over each expert's weights, (n,) float64: 1 if all are equally large, or 0."""
    size = sum(matrices[0].numel() for matrices in experts)

    def mean_power(order: int) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(matrices, order, (1, 2), dtype=torch.float64)
                 for matrices in experts]
        return torch.stack(norms).pow(order).sum(0) / size
    return ((mean_power(1) + TINY) / (mean_power(2).sqrt() + TINY)).cpu()


def joint_norms(gates: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Hope's F, (n, n) float64, from gates and `output_norms` (T, n): F_ij is the mean of g_i |E_i| g_j |E_j| over the
    tokens routed to both, 0 if there are none; F_ii is the square of the mean of g_i |E_i|."""
    norms = gates.double() * norms
    routed = (gates > 0).double()
    together = (routed.T @ routed).clamp(min=1)
    means = norms.sum(0) / together.diagonal()
    return (norms.T @ norms / together).diagonal_scatter(means.square()).cpu()


def descending(score: torch.Tensor) -> list[int]:
    """Positions of a score (n,), the largest first, ties to the lowest."""
    return score.sort(descending=True, stable=True).indices.tolist()


def greedy_joint(joint: torch.Tensor, count: int) -> list[int]:
    """`count` experts P, one after the other that adds least to p'Fp, F (n, n); ties to the lowest."""
    chosen: list[int] = []
    for _ in range(count):
        added = joint.diagonal() + 2 * joint[:, chosen].sum(1)
        added[chosen] = torch.inf
        chosen.append(int(added.argmin()))
    return chosen


def least_joint(joint: torch.Tensor, count: int) -> list[int]:
    """`count` experts P of small p'Fp, F (n, n): `greedy_joint`, then the swap of one in P for one outside that helps
    most, as long as one helps.

    >>> joint = torch.tensor([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    >>> least_joint(joint, 2)  # of the two least alone, both together cost 20
    [0, 2]
    """
    chosen = greedy_joint(joint, count)
    others = [e for e in range(len(joint)) if e not in chosen]
    while chosen and others:
        shared = joint[:, chosen].sum(1)  # F p
        removed = 2 * shared[chosen] - joint.diagonal()[chosen]
        added = 2 * shared[others] + joint.diagonal()[others]
        change = added - removed[:, None] - 2 * joint[chosen][:, others]  # (in P, outside)
        if change.min() >= -1e-12 * joint.sum():
            break
        i, j = divmod(int(change.argmin()), len(others))
        chosen[i], others[j] = others[j], chosen[i]
    return sorted(chosen)


def hope_order(routing: Routing, keep: int) -> list[int]:
    """All experts, the `keep` that hope leaves first, each part by descending saliency. No order serves another
    `keep`."""
    dropped = {*least_joint(routing.joint, len(routing.joint) - keep)}
    return sorted(descending(routing.saliency), key=lambda e: e in dropped)


def nearest_rows(rows: torch.Tensor, survivors: list[int]) -> dict[int, int]:
    """The target of each dropped expert by REAP's rule: the survivor whose router row, of rows (n, d), is nearest in
    cosine; ties to the lowest index.

    >>> nearest_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0]]), [0, 1])
    {2: 0}
    """
    direction = F.normalize(rows.double(), dim=1)
    kept = sorted(survivors)
    dropped = sorted({*range(len(rows))} - {*kept})
    return {e: kept[int((direction[kept] @ direction[e]).argmax())] for e in dropped}


# ---------------------------------------------------------------------------------------- selectors on barriers

def no_triangle(signals: Signals, complex_: Complex, settings: Settings) -> Selection:
    """HodgeCover's selection without the triangles' term of Phi (B.7, E.1)."""
    return hodgecover.select(signals, complex_, replace(settings, lambda_triangle=0.0))


def residual_cover(signals: Signals, complex_: Complex, settings: Settings) -> Selection:
    """HodgeCover's selection with the additive residual in place of the harmonic part (ours)."""
    residual = mathx.additive_residual(signals.barriers, complex_.d1)
    return hodgecover.select(signals, complex_, settings, residual)


def weighted_cover(signals: Signals, complex_: Complex, settings: Settings) -> Selection:
    """Cover every edge by its share of the sum of all barriers, and the triangles (ours)."""
    selection = hodgecover.select(signals, complex_, settings)
    b, triangles = signals.barriers, selection.triangles
    of_edges = settings.lambda_edge * b / b.sum().clamp(min=TINY)
    weight = settings.lambda_triangle / max(len(triangles), 1)
    of_triangles = torch.full((len(triangles),), weight, dtype=b.dtype)
    pairs = hodgecover.edges(len(signals.saliency))
    families = [(pairs, of_edges), (triangles, of_triangles)]
    return selection._replace(order=greedy_weights(signals.saliency, families))


def greedy_weights(saliency: torch.Tensor, families: list[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """All vertices, each the one that adds most to its saliency (n,) and the weights (M,) of the simplices (M, 2 or 3)
    that it is the first to cover; ties to the lowest.

    >>> path = torch.tensor([[0, 1], [1, 2], [2, 3]])
    >>> greedy_weights(torch.zeros(4), [(path, torch.tensor([1.0, 1.0, 5.0]))])
    [2, 0, 1, 3]
    """
    picks: list[int] = []
    while len(picks) < len(saliency):
        gain = saliency.double().clone()
        for simplices, weights in families:
            left = weights.double() * ~torch.isin(simplices, torch.tensor(picks)).any(1)
            for vertices in simplices.T:
                gain.index_add_(0, vertices, left)
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
    return picks


# ---------------------------------------------------------------------------- ablations that merge (B.7, E.1)

def greedy_barrier(signals: Signals, keep: int, settings: Settings = Settings()
                   ) -> tuple[Groups, torch.Tensor]:
    """Join experts by their barriers alone."""
    groups = union_find_groups(signals.barriers, keep)
    return most_frequent_first(groups, signals.frequency), signals.frequency


def triplet_penalty(signals: Signals, keep: int, settings: Settings = Settings()
                    ) -> tuple[Groups, torch.Tensor]:
    """Join experts by their barriers, those on triangles of large barrier later."""
    complex_ = hodgecover.decompose(signals, settings)
    penalty = triangle_means(len(signals.frequency), complex_.triangles, complex_.triplets)
    groups = union_find_groups(signals.barriers * (1 + ALPHA_T * penalty), keep)
    return most_frequent_first(groups, signals.frequency), signals.frequency


def triangle_means(n: int, triangles: torch.Tensor, triplets: torch.Tensor) -> torch.Tensor:
    """p, the mean barrier of the triangles (F, 3) on each edge of n experts over the mean of all
    (F,), (E,) float64; 0 on an edge of none (ours).

    >>> triangle_means(4, torch.tensor([[0, 1, 2], [0, 1, 3]]), torch.tensor([1.0, 3.0])).tolist()
    [1.0, 0.5, 1.5, 0.5, 1.5, 0.0]
    """
    edge = hodgecover.faces(n, triangles).flatten()  # (3 F,)
    count = edge.bincount(minlength=n * (n - 1) // 2)
    total = torch.zeros(len(count), dtype=torch.float64)
    total.index_add_(0, edge, triplets.double().repeat_interleave(3))
    mean = triplets.double().sum() / max(1, len(triplets))
    return total / count.clamp(min=1) / mean.clamp(min=TINY)


def triplet_hypergraph(signals: Signals, keep: int, settings: Settings = Settings()
                       ) -> tuple[Groups, torch.Tensor]:
    """Join experts by their barriers, but none into a triangle whose barrier is above the median."""
    complex_ = hodgecover.decompose(signals, settings)
    above = complex_.triplets > complex_.triplets.median()
    vetoed = complex_.triangles[above]

    def allowed(component: list[int]) -> bool:
        inside = torch.isin(vetoed, torch.tensor(component)).all(1)
        return not inside.any()
    groups = union_find_groups(signals.barriers, keep, allowed)
    return most_frequent_first(groups, signals.frequency), signals.frequency


def no_veto(component: list[int]) -> bool:
    """True: any component is allowed."""
    return True


def union_find_groups(cost: torch.Tensor, keep: int, allowed: Callable[[list[int]], bool] = no_veto) -> Groups:
    """The `keep` components that are left when edges join experts in ascending order of cost (E,).

    Ties go in lexicographic order. An edge is passed over if its new component, experts in ascending
    order, is not `allowed`; a larger one must not be allowed either. If the edges end before `keep`
    components are left, they are gone through once more without the veto (ours).

    >>> union_find_groups(torch.tensor([1.0, 3.0, 9.0, 2.0, 9.0, 4.0]), 2)  # of 01, 02, 03, 12, 13, 23
    [[0, 1, 2], [3]]
    >>> union_find_groups(torch.tensor([1.0, 3.0, 9.0, 2.0, 9.0, 4.0]), 2, lambda component: len(component) < 3)
    [[0, 1], [2, 3]]
    """
    n = len(hodgecover.table_of_pairs(cost))
    pairs = hodgecover.edges(n)[cost.sort(stable=True).indices].tolist()
    components = [[e] for e in range(n)]  # of each expert; the members of one share a list
    count = n
    for may_join in (allowed, no_veto):
        for i, j in pairs:
            if count == keep:
                break
            if components[i] is components[j]:
                continue
            joined = sorted(components[i] + components[j])
            if may_join(joined):
                count -= 1
                for e in joined:
                    components[e] = joined
    return [component for e, component in enumerate(components) if component[0] == e]


def most_frequent_first(groups: Groups, frequency: torch.Tensor) -> Groups:
    """Groups whose members are in descending frequency (n,), ties in ascending order."""
    tokens = frequency.tolist()
    return [sorted(group, key=lambda e: (-tokens[e], e)) for group in groups]


# ----------------------------------------------------------------------------------------------- merging methods

class Facts(NamedTuple):
    """What a merging method looks at.

    frequency  tokens routed to each expert (n,)
    saliency   REAP saliency (n,)
    logits     of the router (T, n)
    rows       of the router (n, d)
    outputs    mean output of each expert over all tokens (n, d)
    gated      for ream: the same, each token's times the softmax of its logits (n, d)
    squared    for ream: the mean over the tokens routed to e of p_e^2 |E_e(x)|, p the softmax of the logits (n,)
    products   inner products of the experts' weights, all of an expert's as one vector (n, n)
    """
    frequency: torch.Tensor
    saliency: torch.Tensor
    logits: torch.Tensor
    rows: torch.Tensor
    outputs: torch.Tensor
    gated: torch.Tensor
    squared: torch.Tensor
    products: torch.Tensor


def layer_facts(step: model_io.LayerPass) -> Facts:
    """The facts of a layer, float64 on the CPU. Raises InputError if they are not finite."""
    experts, router = step.layer.experts, step.layer.router
    routing = measure_routing(step, "reap")
    logits = (step.x @ router.T).double()
    outputs, gated, squared = [], [], []
    for e, p in enumerate(logits.softmax(1).T):
        output, t = experts(e, step.x).double(), step.gates[:, e].nonzero().squeeze(1)
        outputs.append(output.mean(0))
        gated.append((p[:, None] * output).mean(0))
        squared.append((p[t].square() * output[t].norm(dim=1)).sum() / max(1, len(t)))
    flat = [part.flatten(1).float() for part in experts]
    products = sum((part @ part.T).double() for part in flat)
    facts = Facts(routing.frequency.double(), routing.saliency, logits.cpu(), router.double().cpu(),
                  *(torch.stack(each).cpu() for each in (outputs, gated, squared)), products.cpu())
    if not all(fact.isfinite().all() for fact in facts):
        raise InputError(f"{step.name}: an expert's outputs or weights are not finite, or overflow {step.x.dtype}")
    return facts


def mc_smoe(facts: Facts, keep: int) -> tuple[Groups, torch.Tensor]:
    """Group by router logits around the most frequent experts."""
    return take_nearest(facts.frequency, cosine(facts.logits.T), keep, most=1), facts.frequency


def hc_smoe(facts: Facts, keep: int) -> tuple[Groups, torch.Tensor]:
    """Cluster mean outputs; the most frequent of each cluster comes first."""
    groups = cluster(torch.cdist(facts.outputs, facts.outputs), keep)
    return most_frequent_first(groups, facts.frequency), facts.frequency


def ream(facts: Facts, keep: int) -> tuple[Groups, torch.Tensor]:
    """Group by gate profile and mean output around the most salient experts."""
    saliency = facts.squared
    saliency = torch.where(saliency > 0, saliency, saliency[saliency > 0].min())
    return take_nearest(saliency, ream_likeness(facts.logits, facts.gated), keep, most=16), saliency


def ream_likeness(logits: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """How alike experts are in their router logits (T, n) and mean outputs (n, d), (n, n) from 0 to 1."""
    profile = F.normalize(logits.T, dim=1)
    distance = torch.cdist(profile, profile)
    return (1 - distance / distance.max().clamp(min=TINY) + (1 + cosine(outputs)) / 2) / 2


def slimqwen(facts: Facts, keep: int) -> tuple[Groups, torch.Tensor]:
    """Group by mean output around the less salient half of the survivors; the more salient half stays alone."""
    return take_nearest(facts.saliency, cosine(facts.outputs), keep, most=1, alone=keep // 2), facts.saliency


def stun(facts: Facts, keep: int) -> tuple[Groups, torch.Tensor]:
    """Cluster router rows; the expert nearest its cluster's mean weights comes first and has all the weight."""
    products = facts.products

    def distance(e: int, group: list[int]) -> float:
        """|W_e - mean W|^2, but for a constant of the group."""
        return (products[e, e] - 2 * products[e, group].mean()).item()
    groups = [sorted(group, key=partial(distance, group=tuple(group)))
              for group in cluster(torch.cdist(facts.rows, facts.rows), keep, complete=True)]
    first = torch.tensor([group[0] for group in groups])
    return groups, torch.zeros(len(products), dtype=torch.float64).index_fill(0, first, 1.0)


def cosine(rows: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of all pairs of rows (n, any), (n, n)."""
    direction = F.normalize(rows, dim=1)
    return direction @ direction.T


def cluster(distance: torch.Tensor, clusters: int, complete: bool = False) -> Groups:
    """Agglomerative clustering: the two groups of least mean distance, or of least largest distance if the linkage is
    complete, join until `clusters` are left. distance (n, n).

    >>> cluster(torch.tensor([[0.0, 1, 5], [1, 0, 4], [5, 4, 0]]), 2)
    [[0, 1], [2]]
    """
    groups = [[e] for e in range(len(distance))]
    between = distance.double() + torch.diag(torch.full((len(distance),), torch.inf, dtype=torch.float64))
    while len(groups) > clusters:
        i, j = sorted(divmod(int(between.argmin()), len(groups)))
        size_i, size_j = len(groups[i]), len(groups[j])
        if complete:
            joined = torch.maximum(between[i], between[j])
        else:
            joined = (size_i * between[i] + size_j * between[j]) / (size_i + size_j)
        joined[i] = torch.inf
        between[i] = between[:, i] = joined
        groups[i] += groups.pop(j)
        left = [group for group in range(len(between)) if group != j]
        between = between[left][:, left]
    return [sorted(group) for group in groups]


def take_nearest(score: torch.Tensor, likeness: torch.Tensor, keep: int, most: int, alone: int = 0) -> Groups:
    """Groups around the `keep` experts of largest score (n,), these first. In descending order of score each but the
    first `alone` takes the free experts that are most like it by likeness (n, n), up to `most` together; any left over
    join those most like them.

    >>> likeness = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.8], [0.9, 0.8, 1.0]])
    >>> take_nearest(torch.tensor([1.0, 2.0, 0.5]), likeness, 2, most=2)
    [[1, 2], [0]]
    >>> take_nearest(torch.tensor([1.0, 2.0, 0.5]), likeness, 2, most=1)
    [[1], [0, 2]]
    >>> take_nearest(torch.tensor([1.0, 2.0, 0.5]), torch.eye(3), 2, most=1, alone=1)
    [[1], [0, 2]]
    """
    ranked = descending(score)
    groups, centres, free = {e: [e] for e in ranked[:keep]}, ranked[alone:keep], ranked[keep:]
    for centre in centres:
        groups[centre] += sorted(free, key=lambda e: -likeness[e, centre].item())[:most - 1]
        free = [e for e in free if e not in groups[centre]]
    for e in free:
        groups[max(centres, key=lambda centre: likeness[e, centre].item())].append(e)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------- the table of methods

BY_SCORE = ("random", "frequency", "reap", "man", "msan", "aimer")  # `score_of` ranks the experts
ON_BARRIERS = {  # selectors: what `hodgecover.plan_from_signals` takes
    "hodge-no-triangle": no_triangle,
    "additive-residual": residual_cover,
    "weighted-cover": weighted_cover}
# -> the K groups of a layer's experts, and the weight of each expert in its group's mean (n,)
MERGING_ON_BARRIERS = {  # (Signals, K, Settings)
    "greedy-barrier": greedy_barrier,
    "triplet-penalty": triplet_penalty,
    "triplet-hypergraph": triplet_hypergraph}
MERGING_ON_FACTS = {  # (Facts, K)
    "mc-smoe": mc_smoe,
    "hc-smoe": hc_smoe,
    "ream": ream,
    "slimqwen": slimqwen,
    "stun": stun}
MERGING = MERGING_ON_BARRIERS | MERGING_ON_FACTS
SEQUENTIAL = ("ream",)  # of these: a layer is measured on what the merged layers before it give
WITHOUT_BARRIERS = (*BY_SCORE, "hope")
RECORDED = ("random", "frequency", "reap")  # of these: they look at what every plan records, no more
SELECTORS = (*WITHOUT_BARRIERS, *ON_BARRIERS)
METHODS = (*SELECTORS, *MERGING)


def choose(signals: Signals | Routing, rows: torch.Tensor, method: str, keep: int,
           settings: Settings = Settings(), layer: int = 0) -> Plan:
    """The plan of one layer by one of SELECTORS, from what was measured on it.

    signals : `Signals` for a method on barriers; for the others a `Routing`, for RECORDED `Signals`, too
    rows : of the router (n, d), for a method without barriers
    layer : seeds `random`, so that no two layers are alike
    """
    if method in ON_BARRIERS:
        return hodgecover.plan_from_signals(signals, keep, settings, ON_BARRIERS[method])
    if method == "hope":
        order = hope_order(signals, keep)
    else:
        order = descending(score_of(signals, method, settings.seed + layer))
    targets = nearest_rows(rows, order[:keep])
    return hodgecover.plan_of(order, targets, keep, signals.frequency, signals.saliency)


def score_of(routing: Signals | Routing, method: str, seed: int) -> torch.Tensor:
    """The score (n,) of the experts by one of BY_SCORE, the largest of those to keep."""
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(routing.frequency), generator=generator)
    if method == "aimer":
        return -routing.aimer
    if method == "reap":
        return routing.saliency
    return getattr(routing, method)


# ------------------------------------------------------------------------------------------------- the whole model

class Merge(NamedTuple):
    """The groups of a layer's experts, the weight of each expert in its group's mean (n,), tokens routed to each
    (n,)."""
    groups: Groups
    weights: torch.Tensor
    frequency: torch.Tensor

    def survivors(self, all_slots: bool = False) -> list[int]:
        """The experts whose slots and router rows stay."""
        if all_slots:
            return list(range(len(self.weights)))
        return sorted(group[0] for group in self.groups)

    def routed_share(self, all_slots: bool = False) -> float:
        """Share of the tokens' choices that fall on an expert whose router row stays."""
        return (self.frequency[self.survivors(all_slots)].sum() / self.frequency.sum().clamp(min=1)).item()


def routed_passes(model: Model, ids: torch.Tensor, tick: Tick = lambda share: None) -> Iterator[model_io.LayerPass]:
    """Yield the pass of each layer with a router over ids (B, L)."""
    layers = hodgecover.sparse_layers(model)
    for step in model.stream(ids):
        if step.gates is not None:
            yield step
            tick((layers.index(step.index) + 1) / len(layers))


def select_model(model: Model, ids: torch.Tensor, method: str, keep: int, settings: Settings = Settings(),
                 cache: Path | None = None, memory: int = hodgecover.MEMORY, tick: Tick = lambda share: None
                 ) -> Iterator[tuple[str, Plan]]:
    """Yield (name, plan) of each sparse layer by one of SELECTORS, from calibration on ids (B, L).

    `cache` and `memory` are for methods on barriers. Raises InputError as `hodgecover.plan_model` does.
    """
    hodgecover.check_keep(model, keep)
    if method in ON_BARRIERS:
        layers = hodgecover.sparse_layers(model)
        measured = hodgecover.measure_model(model, ids, settings, layers, cache, memory, tick)
    else:
        measured = ((step.index, measure_routing(step, method)) for step in routed_passes(model, ids, tick))
    for index, signals in measured:
        name = model.layer_names[index]
        rows = model.checkpoint.load(f"{name}.mlp.gate.weight")
        yield name, choose(signals, rows, method, keep, settings, index)


def merge_model(model: Model, ids: torch.Tensor, method: str, keep: int, tick: Tick = lambda share: None,
                all_slots: bool = False, settings: Settings = Settings(), cache: Path | None = None,
                memory: int = hodgecover.MEMORY) -> Iterator[tuple[str, Merge]]:
    """Yield (name, merge) of each sparse layer by one of MERGING, from calibration on ids (B, L). `all_slots` is how
    they are exported, which those that are SEQUENTIAL depend on; `settings`, `cache` and `memory` are for those on
    barriers.

    Raises InputError for what is measured and not finite, and if not every layer can keep `keep` experts.
    """
    hodgecover.check_keep(model, keep)
    if method in MERGING_ON_BARRIERS:
        layers = hodgecover.sparse_layers(model)
        for index, signals in hodgecover.measure_model(model, ids, settings, layers, cache, memory, tick):
            groups, weights = MERGING[method](signals, keep, settings)
            yield model.layer_names[index], Merge(groups, weights, signals.frequency)
        return
    for step in routed_passes(model, ids, tick):
        facts = layer_facts(step)
        groups, weights = MERGING[method](facts, keep)
        merge = Merge(groups, weights, facts.frequency)
        if method in SEQUENTIAL:
            merged = merged_layer(step.layer, merge, all_slots)
            step.y.copy_(model.run(step.index, merged, step.h, step.norm).y)
        yield step.name, merge


def merged_layer(layer: Layer, merge: Merge, all_slots: bool = False) -> Layer:
    """A layer with the experts of a merge in place of its own, as the export writes it."""
    slots = merge.survivors(all_slots)
    group_of = groups_by_member(merge.groups)

    def merged(matrices: torch.Tensor) -> torch.Tensor:  # (n, any, any) -> (slots, any, any)
        means = [group_mean(group_of[e], merge.weights, matrices.__getitem__) for e in slots]
        return torch.stack(means).to(matrices.dtype)
    experts = Experts(*map(merged, layer.experts))
    return Layer(experts, layer.router[slots], layer.weights)


def groups_by_member(groups: Groups) -> dict[int, list[int]]:
    """The group of each expert."""
    return {e: group for group in groups for e in group}


def group_mean(members: list[int], weights: torch.Tensor, load: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The mean of what `load` gives for each member, by weights (n,), float64; the plain mean if they have none."""
    share = weights[members].double()
    if share.sum() == 0:
        share = torch.ones_like(share)
    share = share / share.sum()
    return sum(weight * load(e).double() for weight, e in zip(share.tolist(), members) if weight)


def merge_edits(checkpoint: model_io.Checkpoint, layer: str, groups: Groups, weights: torch.Tensor
                ) -> dict[str, common.Edit]:
    """What the export does to a layer's experts: each one's tensors become the weighted mean of its group's.

    Returns edits for `common.write_edited`.
    """
    group_of = groups_by_member(groups)

    def mean(stored: torch.Tensor, row: int, load: Callable[[int], torch.Tensor], expert: int | None = None
             ) -> torch.Tensor:
        members = group_of[row if expert is None else expert]
        return group_mean(members, weights, load).to(stored.dtype)

    def single(e: int, name: str) -> torch.Tensor:
        return checkpoint.load(name.format(e))
    fused = [f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    edits = {}
    if fused[0] in checkpoint.tensors:
        for name in fused:
            edits[name] = partial(mean, load=partial(checkpoint.load, name))
        return edits
    for matrix in ("gate", "up", "down"):
        name = f"{layer}.mlp.experts.{{}}.{matrix}_proj.weight"
        for e in group_of:
            edits[name.format(e)] = partial(mean, load=partial(single, name=name), expert=e)
    return edits


def export_merges(model: Model, merges: dict[str, Merge], out: Path, files: dict[str, bytes], all_slots: bool = False
                  ) -> None:
    """Write the checkpoint whose experts are merged by layer name, and files by name, to the folder `out`."""
    edits = {}
    for name, merge in merges.items():
        edits |= merge_edits(model.checkpoint, name, merge.groups, merge.weights)
    survivors = {name: merge.survivors(all_slots) for name, merge in merges.items()}
    common.write_edited(model.checkpoint, out, survivors, files, edits)


# ------------------------------------------------------------------------------------------------- the command line

def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__)
    parser.add_argument("--keep", metavar="K", type=int, required=True, help="experts to keep in every layer")
    parser.add_argument("--method", choices=METHODS, required=True, help="the rule, as above")
    parser.add_argument("--all-slots", action="store_true", help="of the methods that merge: keep the router")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="on barriers: their folder [CKPT-barriers]")
    hodgecover.add_settings(parser, "vocab_sample", "max_triangles", "order")
    return parser


OFF_BARRIERS = (*WITHOUT_BARRIERS, *MERGING_ON_FACTS)
UNUSED = {  # option -> methods that do not use it
    "all_slots": (*SELECTORS, "stun"),
    "cache": OFF_BARRIERS,
    "vocab_sample": OFF_BARRIERS,
    "max_triangles": OFF_BARRIERS,
    "memory": OFF_BARRIERS,
    "order": (*OFF_BARRIERS, *MERGING_ON_BARRIERS)}


def select(model: Model, ids: torch.Tensor, args: argparse.Namespace, settings: Settings, cache: Path | None) -> None:
    """Plan by a selector, show the layers, write the output."""
    bar = model_io.progress_bar()
    chosen = select_model(model, ids, args.method, args.keep, settings, cache, args.memory, bar)
    if args.method in ON_BARRIERS:
        plans = hodgecover.show_plans(model, chosen, bar)
    else:
        plans = {}
        for name, plan in chosen:
            show_share(model, name, plan.routed_share, bar)
            plans[name] = plan
    entry = hodgecover.plan_entry(model, plans, args.keep, settings, ids, args.calib, "baselines.py",
                                  method=args.method)
    hodgecover.export(model, plans, args.out, entry)


def merge(model: Model, ids: torch.Tensor, args: argparse.Namespace, settings: Settings, cache: Path | None) -> None:
    """Merge, show the layers, write the output."""
    bar = model_io.progress_bar()
    merges = {}
    measured = merge_model(model, ids, args.method, args.keep, bar, args.all_slots, settings, cache, args.memory)
    for name, merged in measured:
        largest = max(map(len, merged.groups))
        share = merged.routed_share(args.all_slots)
        show_share(model, name, share, bar, f"; largest group: {largest} experts")
        merges[name] = merged
    entry = merge_entry(model, merges, ids, args, settings)
    files = {model_io.RECORD: model_io.record_bytes(model.checkpoint, entry)}
    export_merges(model, merges, args.out, files, args.all_slots)


def merge_entry(model: Model, merges: dict[str, Merge], ids: torch.Tensor, args: argparse.Namespace,
                settings: Settings) -> dict:
    """The entry of a record's history that holds merges by layer name."""
    choices = {"keep": args.keep, "method": args.method, "all_slots": args.all_slots, "seed": args.seed,
               "dtype": common.dtype_name(model)}
    if args.method in MERGING_ON_BARRIERS:
        for name in ("max_triangles", "thresholds", "vocab_sample"):
            choices[name] = getattr(settings, name)
    layers = []
    for name, merged in merges.items():
        layers.append({"layer": model.layer_names.index(name), "name": name, "groups": merged.groups,
                       "routed_share": merged.routed_share(args.all_slots)})
    return model_io.record_entry("baselines.py", choices, ids, args.calib, source=model) | {"layers": layers}


def show_share(model: Model, name: str, share: float, bar: Callable[[float | None], None], more: str = "") -> None:
    """Print one layer's line."""
    bar(None)
    index = model.layer_names.index(name)
    print(f"layer {index}: {share:.1%} of the tokens' choices fall on experts that stay in the router{more}",
          flush=True)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    unused = [name for name, methods in UNUSED.items() if args.method in methods]
    common.refuse_given(command_line(), args, unused, f"--method {args.method}")
    settings = common.settings_of(args)
    model = common.open_model(args.checkpoint, args)
    hodgecover.check_keep(model, args.keep)
    cache = None
    if args.method not in OFF_BARRIERS:
        cache = common.barrier_cache(model, args)
    model_io.check_out(model, args.out, cache)
    ids = common.calibration_ids(model, args)
    work = merge if args.method in MERGING else select
    work(model, ids, args, settings, cache)
    common.show_output(model, args.out)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
