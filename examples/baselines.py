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

greedy-barrier      the K experts of largest sum of pair barriers
triplet-penalty     HodgeCover's cover, with the edges of largest barrier as critical ones
triplet-hypergraph  drop the least salient expert again and again, but never the last of a critical triangle
hodge-no-triangle   HodgeCover's cover of harmonic-critical edges, without triangles
additive-residual   HodgeCover's cover, with the edges where b_ij = phi_i + phi_j is most wrong as critical ones
weighted-cover      HodgeCover's cover (ours), but of every edge by its barrier instead of a top few counted alike

Merging methods form K groups in every layer. Each is its paper's selection in a few lines, in our words. RESULTS.md has
what a comparison with published code showed:

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
from hodgecover import Complex, Settings, Signals, Tick
from model_io import Experts, InputError, Layer, Model

Groups = list[list[int]]  # the first of each is the one whose router row stays
Selection = tuple[list[int], torch.Tensor, torch.Tensor]  # all experts as picked, E* (M, 2), T* (M, 3)


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
    found = Routing((step.gates > 0).sum(0).cpu(), hodgecover.reap_saliency(step.layer.experts, step.x, step.gates))
    if method in (None, "aimer"):
        found = found._replace(aimer=flatness(step.layer.experts))
    if method in (None, "man", "msan", "hope"):
        norms = output_norms(step)
        man, msan = (part.sum(0).cpu() / found.frequency.clamp(min=1) for part in (norms, norms.square()))
        found = found._replace(joint=joint_norms(step.gates, norms), man=man, msan=msan)
    return found


def output_norms(step: model_io.LayerPass) -> torch.Tensor:
    """|E_e(x)| of each token and each expert that it is routed to, else 0, (T, n) float64."""
    norms = torch.zeros(step.gates.shape, dtype=torch.float64, device=step.gates.device)
    for e in range(norms.shape[1]):
        t = step.gates[:, e].nonzero().squeeze(1)
        norms[t, e] = step.layer.experts(e, step.x[t]).double().norm(dim=1)
    return norms


def flatness(experts: Experts) -> torch.Tensor:
    """Mean |w| / rms(w) over each expert's weights, (n,) float64: 1 if all are equally large, or 0."""
    size = sum(part[0].numel() for part in experts)
    first, second = (sum(torch.linalg.vector_norm(part, order, (1, 2), dtype=torch.float64)**order for part in experts)
                     for order in (1, 2))
    return ((first / size + hodgecover.TINY) / ((second / size).sqrt() + hodgecover.TINY)).cpu()


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

def greedy_barrier(signals: Signals, found: Complex, settings: Settings) -> Selection:
    """Rank the experts by the sum of their pair barriers."""
    _, *critical = hodgecover.select(signals, found, settings)
    return descending(found.d1.abs() @ signals.barriers), *critical


def triplet_hypergraph(signals: Signals, found: Complex, settings: Settings) -> Selection:
    """Let the critical triangles veto the loss of their last vertex."""
    _, pairs, triangles = hodgecover.select(signals, found, settings)
    return veto_order(signals.saliency, triangles), pairs, triangles


def weighted_cover(signals: Signals, found: Complex, settings: Settings) -> Selection:
    """Cover every edge by its share of the sum of all barriers, and the triangles (ours)."""
    _, pairs, triangles = hodgecover.select(signals, found, settings)
    b, n = signals.barriers, len(signals.saliency)
    share = settings.lambda_edge * b / b.sum().clamp(min=hodgecover.TINY)
    of_each = b.new_full((len(triangles),), settings.lambda_triangle / max(len(triangles), 1))
    families = [(hodgecover.edges(n), share), (triangles, of_each)]
    return greedy_weights(signals.saliency, families), pairs, triangles


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


def veto_order(saliency: torch.Tensor, simplices: torch.Tensor) -> list[int]:
    """All vertices, the first to keep first, by dropping one at a time: the least salient whose loss leaves every
    simplex (M, 3) a vertex, or the least salient of all if there is none.

    >>> veto_order(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([[0, 1, 2]]))  # 3 goes rather than the last of 012
    [2, 3, 1, 0]
    """
    kept = saliency.sort(stable=True).indices.tolist()
    dropped = []
    while kept:
        inside = torch.isin(simplices, torch.tensor(kept))
        last = simplices[inside & (inside.sum(1, keepdim=True) == 1)].tolist()
        dropped.append(next((v for v in kept if v not in last), kept[0]))
        kept.remove(dropped[-1])
    return dropped[::-1]


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
    return [sorted(group, key=lambda e: -facts.frequency[e].item()) for group in groups], facts.frequency


def ream(facts: Facts, keep: int) -> tuple[Groups, torch.Tensor]:
    """Group by gate profile and mean output around the most salient experts."""
    saliency = facts.squared
    saliency = torch.where(saliency > 0, saliency, saliency[saliency > 0].min())
    return take_nearest(saliency, ream_likeness(facts.logits, facts.gated), keep, most=16), saliency


def ream_likeness(logits: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """How alike experts are in their router logits (T, n) and mean outputs (n, d), (n, n) from 0 to 1."""
    profile = F.normalize(logits.T, dim=1)
    distance = torch.cdist(profile, profile)
    return (1 - distance / distance.max().clamp(min=hodgecover.TINY) + (1 + cosine(outputs)) / 2) / 2


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

BY_SCORE = {  # (what was measured, seed) -> score (n,)
    "random": lambda found, seed: torch.randperm(len(found.frequency), generator=torch.Generator().manual_seed(seed)),
    "frequency": lambda found, seed: found.frequency,
    "reap": lambda found, seed: found.saliency,
    "man": lambda found, seed: found.man,
    "msan": lambda found, seed: found.msan,
    "aimer": lambda found, seed: -found.aimer}
ON_BARRIERS = {  # what `hodgecover.plan_from_signals` takes
    "greedy-barrier": greedy_barrier,
    "triplet-penalty": lambda signals, found, settings: hodgecover.select(signals, found, settings, signals.barriers),
    "triplet-hypergraph": triplet_hypergraph,
    "hodge-no-triangle": lambda signals, found, settings: hodgecover.select(
        signals, found, replace(settings, lambda_triangle=0.0)),
    "additive-residual": lambda signals, found, settings: hodgecover.select(
        signals, found, settings, mathx.additive_residual(signals.barriers, found.d1)),
    "weighted-cover": weighted_cover}
# (facts, K) -> the K groups of a layer's experts, and the weight of each expert in its group's mean (n,)
MERGING = {"mc-smoe": mc_smoe, "hc-smoe": hc_smoe, "ream": ream, "slimqwen": slimqwen, "stun": stun}
SEQUENTIAL = ("ream",)  # of these: a layer is measured on what the merged layers before it give
WITHOUT_BARRIERS = (*BY_SCORE, "hope")
RECORDED = ("random", "frequency", "reap")  # of these: they look at what every plan records, no more
SELECTORS = (*WITHOUT_BARRIERS, *ON_BARRIERS)
METHODS = (*SELECTORS, *MERGING)


def choose(signals: Signals | Routing, rows: torch.Tensor, method: str, keep: int,
           settings: Settings = Settings(), layer: int = 0) -> dict:
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
        order = descending(BY_SCORE[method](signals, settings.seed + layer))
    return hodgecover.plan_of(order, nearest_rows(rows, order[:keep]), keep, signals.frequency, signals.saliency)


# ------------------------------------------------------------------------------------------------- the whole model

class Merge(NamedTuple):
    """The groups of a layer's experts, the weight of each expert in its group's mean (n,), tokens routed to each
    (n,)."""
    groups: Groups
    weights: torch.Tensor
    frequency: torch.Tensor

    def survivors(self, all_slots: bool = False) -> list[int]:
        """The experts whose slots and router rows stay."""
        return list(range(len(self.weights))) if all_slots else sorted(group[0] for group in self.groups)

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
                 ) -> Iterator[tuple[str, dict]]:
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
                all_slots: bool = False) -> Iterator[tuple[str, Merge]]:
    """Yield (name, merge) of each sparse layer by one of MERGING, from calibration on ids (B, L). `all_slots` is how
    they are exported, which those that are SEQUENTIAL depend on.

    Raises InputError for facts that are not finite, and if not every layer can keep `keep` experts.
    """
    hodgecover.check_keep(model, keep)
    for step in routed_passes(model, ids, tick):
        facts = layer_facts(step)
        merge = Merge(*MERGING[method](facts, keep), facts.frequency)
        if method in SEQUENTIAL:
            step.y.copy_(model.run(step.index, merged_layer(step.layer, merge, all_slots), step.h, step.norm).y)
        yield step.name, merge


def merged_layer(layer: Layer, merge: Merge, all_slots: bool = False) -> Layer:
    """A layer with the experts of a merge in place of its own, as the export writes it."""
    slots = merge.survivors(all_slots)
    group_of = {e: group for group in merge.groups for e in group}
    experts = [torch.stack([group_mean(group_of[e], merge.weights, part.__getitem__).to(part.dtype) for e in slots])
               for part in layer.experts]
    return Layer(Experts(*experts), layer.router[slots], layer.weights)


def group_mean(members: list[int], weights: torch.Tensor, load: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The mean of what `load` gives for each member, by weights (n,), float64; the plain mean if they have none."""
    share = weights[members].double()
    share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(share))
    return sum(part * load(e).double() for part, e in zip(share.tolist(), members) if part)


def merge_edits(checkpoint: model_io.Checkpoint, layer: str, groups: Groups, weights: torch.Tensor
                ) -> dict[str, common.Edit]:
    """What the export does to a layer's experts: each one's tensors become the weighted mean of its group's.

    Returns edits for `common.write_edited`.
    """
    group_of = {e: group for group in groups for e in group}

    def mean(own: torch.Tensor, row: int, load: Callable[[int], torch.Tensor], expert: int | None = None
             ) -> torch.Tensor:
        return group_mean(group_of[row if expert is None else expert], weights, load).to(own.dtype)

    def single(e: int, name: str) -> torch.Tensor:
        return checkpoint.load(name.format(e))
    fused = [f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    if fused[0] in checkpoint.tensors:
        return {name: partial(mean, load=partial(checkpoint.load, name)) for name in fused}
    parts = [f"{layer}.mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")]
    return {name.format(e): partial(mean, load=partial(single, name=name), expert=e)
            for name in parts for e in group_of}


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


# option -> methods that do not use it
UNUSED = {"all_slots": (*SELECTORS, "stun")} | dict.fromkeys(
    ("cache", "vocab_sample", "max_triangles", "order", "memory"), (*WITHOUT_BARRIERS, *MERGING))


def select(model: Model, ids: torch.Tensor, args: argparse.Namespace, settings: Settings, cache: Path | None) -> None:
    """Plan by a selector, show the layers, write the output."""
    bar = hodgecover.progress_bar()
    found = select_model(model, ids, args.method, args.keep, settings, cache, args.memory, bar)
    if args.method in ON_BARRIERS:
        plans = hodgecover.show_plans(model, found, bar)
    else:
        plans = {}
        for name, plan in found:
            show_share(model, name, plan["routed_share"], bar)
            plans[name] = plan
    entry = hodgecover.plan_entry(model, plans, args.keep, settings, ids, args.calib, "baselines.py",
                                  method=args.method)
    hodgecover.export(model, plans, args.out, entry)


def merge(model: Model, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Merge, show the layers, write the output."""
    bar = hodgecover.progress_bar()
    merges = {}
    for name, found in merge_model(model, ids, args.method, args.keep, bar, args.all_slots):
        largest = max(map(len, found.groups))
        show_share(model, name, found.routed_share(args.all_slots), bar, f"; largest group: {largest} experts")
        merges[name] = found
    settings = {"keep": args.keep, "method": args.method, "all_slots": args.all_slots, "seed": args.seed,
                "dtype": common.dtype_name(model)}
    layers = [{"layer": model.layer_names.index(name), "name": name, "groups": found.groups,
               "routed_share": found.routed_share(args.all_slots)} for name, found in merges.items()]
    entry = hodgecover.record_entry("baselines.py", settings, ids, args.calib, source=model) | {"layers": layers}
    files = {hodgecover.RECORD: hodgecover.record_bytes(model.checkpoint, entry)}
    export_merges(model, merges, args.out, files, args.all_slots)


def show_share(model: Model, name: str, share: float, bar: Callable[[float | None], None], more: str = "") -> None:
    """Print one layer's line."""
    bar(None)
    print(f"layer {model.layer_names.index(name)}: {share:.1%} of the tokens' choices fall on experts that stay in the "
          f"router{more}", flush=True)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    unused = [name for name, methods in UNUSED.items() if args.method in methods]
    common.refuse_given(command_line(), args, unused, f"--method {args.method}")
    settings = common.settings_of(args)
    model = common.open_model(args.checkpoint, args)
    hodgecover.check_keep(model, args.keep)
    cache = common.barrier_cache(model, args) if args.method in ON_BARRIERS else None
    hodgecover.check_out(model, args.out, cache)
    ids = common.calibration_ids(model, args)
    if args.method in MERGING:
        merge(model, ids, args)
    else:
        select(model, ids, args, settings, cache)
    common.show_output(model, args.out)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
