# SPDX-License-Identifier: MIT
"""Baselines that merge experts, or cluster them, on the project's own loaders: the selection of each paper in a few
lines, in our words, with K experts in every layer and without what is named as left out.

    python examples/merging_baselines.py examples/tiny-olmoe --keep 32 --method hc-smoe --out DIR

mc-smoe (arXiv 2310.01334)  the K most frequent experts stay dominant; every other joins the one whose router logits
                            over the calibration tokens are nearest in cosine; frequency-weighted means. Left out: one
                            threshold of frequency over all layers, the alignment of hidden units before a merge, the
                            low-rank compression after it
hc-smoe (arXiv 2410.08589)  average-linkage clusters of the experts' mean outputs; frequency-weighted means
ream    (arXiv 2604.04356)  the K experts of largest REAP saliency are centroids; the most salient first, each takes
                            the experts still free that are most like it in gate profile and mean output, 15 at most;
                            saliency-weighted means. Left out: alignment, and merging layer after layer
stun    (arXiv 2409.06211)  structured stage: complete-linkage clusters of the router's rows by Euclidean distance; of
                            each the expert nearest the cluster's mean weights stays, nothing is merged. Left out: the
                            routing statistics that the paper can add to the distance, and one threshold over all layers

The output is a plain checkpoint of K experts with the router rows of each group's first member, so that the routing of
the others is lost; --all-slots instead keeps the router and puts each group's weights into all of its members' slots,
as these papers evaluate them.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model_io  # noqa: E402
from hodgecover import SEQ_LEN, TOKENS, calibration_ids, check_keep, check_out, reap_saliency  # noqa: E402

METHODS = ("mc-smoe", "hc-smoe", "ream", "stun")
Groups = list[list[int]]  # the first of each is the one that stays


def layer_facts(step: model_io.LayerPass) -> dict[str, torch.Tensor]:
    """What the baselines look at: frequency and saliency (n,), router logits (T, n), router rows (n, d), every
    expert's mean output over all tokens (n, d), and the inner products of all experts' weights (n, n)."""
    experts, n = step.layer.experts, step.gates.shape[1]
    return {"frequency": (step.gates > 0).sum(0).double(), "saliency": reap_saliency(experts, step.x, step.gates),
            "logits": (step.x @ step.layer.router.T).double(), "rows": step.layer.router.double(),
            "weights": sum((rows @ rows.T).double() for rows in (part.flatten(1).float() for part in experts)),
            "outputs": torch.stack([experts(e, step.x).double().mean(0) for e in range(n)])}


def cosine(rows: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of all pairs of rows (n, m), (n, n)."""
    direction = F.normalize(rows, dim=1)
    return direction @ direction.T


def cluster(distance: torch.Tensor, clusters: int, complete: bool = False) -> Groups:
    """Agglomerative clustering: the two groups of least mean distance, or least largest one where the linkage is
    complete, join until `clusters` are left; (n, n) -> groups.

    >>> cluster(torch.tensor([[0.0, 1, 5], [1, 0, 4], [5, 4, 0]]), 2)
    [[0, 1], [2]]
    """
    groups = [[e] for e in range(len(distance))]
    between = distance.double() + torch.diag(torch.full((len(distance),), torch.inf, dtype=torch.float64))
    while len(groups) > clusters:
        i, j = sorted(divmod(int(between.argmin()), len(groups)))
        joined = (len(groups[i]) * between[i] + len(groups[j]) * between[j]) / (len(groups[i]) + len(groups[j]))
        if complete:
            joined = torch.maximum(between[i], between[j])
        joined[i] = torch.inf
        between[i], between[:, i] = joined, joined
        groups[i] += groups.pop(j)
        left = [g for g in range(len(between)) if g != j]
        between = between[left][:, left]
    return [sorted(group) for group in groups]


def take_nearest(score: torch.Tensor, likeness: torch.Tensor, keep: int, most: int = 16) -> Groups:
    """The `keep` experts of largest score (n,), the first first, each with the experts still free that are most like
    it by likeness (n, n), up to `most` together; any that are left at the end join those most like them."""
    ranked = score.sort(descending=True, stable=True).indices.tolist()
    groups, free = {e: [e] for e in ranked[:keep]}, ranked[keep:]
    for centre, group in groups.items():
        group += sorted(free, key=lambda e: -likeness[e, centre].item())[:most - 1]
        free = [e for e in free if e not in group]
    for e in free:
        groups[max(groups, key=lambda centre: likeness[e, centre].item())].append(e)
    return list(groups.values())


def group_experts(facts: dict[str, torch.Tensor], method: str, keep: int) -> tuple[Groups, torch.Tensor]:
    """(groups, weights (n,) of the experts in their group's mean; a weight of 0 merges nothing)."""
    frequency, saliency, outputs = facts["frequency"], facts["saliency"], facts["outputs"]
    if method == "mc-smoe":
        return take_nearest(frequency, cosine(facts["logits"].T), keep, most=1), frequency
    if method == "ream":
        return take_nearest(saliency, cosine(facts["logits"].softmax(1).T) + cosine(outputs), keep), saliency
    if method == "hc-smoe":
        groups, of = cluster(torch.cdist(outputs, outputs), keep), frequency
        return [sorted(group, key=lambda e: -of[e].item()) for group in groups], of
    rows, product = facts["rows"], facts["weights"]
    groups = [sorted(group, key=lambda e: (product[e, e] - 2 * product[e, group].mean()).item())  # |W_e - mean|^2 + c
              for group in cluster(torch.cdist(rows, rows), keep, complete=True)]
    return groups, torch.zeros(len(rows)).index_fill(0, torch.tensor([group[0] for group in groups]), 1.0)


def merge_edits(checkpoint: model_io.Checkpoint, layer: str, groups: Groups, weights: torch.Tensor
                ) -> dict[str, model_io.Edit]:
    """What the export does to each expert of a layer: its weights become the weighted mean of its group's."""
    group_of = {e: group for group in groups for e in group}
    fused = [f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]

    def stored(name: str, e: int) -> torch.Tensor:
        return checkpoint.load(name, e) if name in fused else checkpoint.load(name.format(e))

    def mean(_: torch.Tensor, row: int, name: str, e: int | None) -> torch.Tensor:
        members = group_of[row if e is None else e]
        w = weights[members].double()
        w = w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / len(w))
        total = sum(w_i * stored(name, i).double() for w_i, i in zip(w, members) if w_i)
        return total.to(stored(name, members[0]).dtype)
    if fused[0] in checkpoint.tensors:
        return {name: partial(mean, name=name, e=None) for name in fused}
    parts = [f"{layer}.mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")]
    return {name.format(e): partial(mean, name=name, e=e) for name in parts for e in group_of}


def merge(checkpoint: model_io.Checkpoint, facts: dict[str, dict], method: str, keep: int, all_slots: bool = False
          ) -> tuple[dict[str, Groups], dict[str, list[int]], dict[str, model_io.Edit]]:
    """(groups, survivors, edits) of a baseline, for `model_io.write_checkpoint`; facts, groups, survivors by layer."""
    grouped, survivors, edits = {}, {}, {}
    for layer, of in facts.items():
        grouped[layer], weights = group_experts(of, method, keep)
        edits |= merge_edits(checkpoint, layer, grouped[layer], weights)
        survivors[layer] = list(range(len(weights))) if all_slots else sorted(group[0] for group in grouped[layer])
    return grouped, survivors, edits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--keep", type=int, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--all-slots", action="store_true")
    parser.add_argument("--calib", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    try:
        model = model_io.Model(args.checkpoint)
        check_keep(model, args.keep, "--keep")
        check_out(model, args.out, args.keep)
        ids = calibration_ids(model, args.calib, TOKENS, SEQ_LEN, 0)
        facts = {step.name: layer_facts(step) for step in model.stream(ids) if step.gates is not None}
        _, survivors, edits = merge(model.checkpoint, facts, args.method, args.keep, args.all_slots)
        model_io.write_checkpoint(model.checkpoint, args.out, survivors, {}, edits)
    except model_io.InputError as err:
        print(f"merging_baselines.py: error: {err}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
