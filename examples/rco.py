# SPDX-License-Identifier: MIT
"""The search of `budgets.py CKPT rco`: logits of experts, kept on the surface of a budget (RCO, arXiv 2605.00649).

Each expert has logits (keep, prune). C, the expected number of pruned experts, is smooth in them, so that C = B is a
hypersurface. The gradient is projected onto its tangent, Adam makes a step, a shift of all prune logits, found by
bisection, brings C back to B, and Adam's first moment is projected onto the new tangent. With one surface for each
layer every layer keeps K experts; with one for all, other layers keep other numbers.

The gradient is straight-through: 4 samples of Gumbel noise a step, temperature 1 to 0.05; prune the budget's worst,
pass on the slope of the soft choice. The loss, on 4 sequences, is that of the published code: the sum of p (log p - log
q) over the source's 20 most likely tokens, where p is the source's distribution renormalised over them, and q the
student's over the whole vocabulary. So it charges the student for what it gives to other tokens, and is not 0 for the
source itself. (Theirs leaves out the last token of a sequence.) At last the experts are ranked by their logits, without
noise.

In the search a pruned expert's contribution is 0, and the gates of the others are scaled so that a token's gates keep
their sum. The scale is ours: of two published versions one scales them to 1, the other does not. In the result pruned
experts are gone from the router, and the next best takes their place. Ours, too: every layer keeps the model's top-k at
least.

    n experts of a layer    G budgets of N experts each: all layers in one, or a layer each    V vocabulary
    d hidden size           T tokens, B sequences of L
"""
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import baselines
import common
import hodgecover
import model_io
import torch
from model_io import Config, Experts, Layer, Model

LR, TAU, NOISES, SEQUENCES, TOP = 0.1, (1.0, 0.05), 4, 4, 20
BISECTIONS = 60
COSTS = torch.tensor([0.0, 1.0], dtype=torch.float64)  # of the options: keep, prune

# masks (layers, n), numbers of sequences -> the loss, and its gradient with respect to the masks
Loss = Callable[[torch.Tensor, torch.Tensor], tuple[float, torch.Tensor]]


# ------------------------------------------------------------------------------------------------------- the surface


def expected_cost(alpha: torch.Tensor) -> torch.Tensor:
    """C, the expected number of pruned experts of each budget, (G,): logits alpha (G, N, 2) of keep and prune."""
    return (alpha.softmax(-1) * COSTS).sum((1, 2))


def normal(alpha: torch.Tensor) -> torch.Tensor:
    """The gradient of C, (G, N, 2): p_k (c_k - E_p[c])."""
    p = alpha.softmax(-1)
    return p * (COSTS - (p * COSTS).sum(-1, keepdim=True))


def onto_tangent(way: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """A direction (G, N, 2) without its part along the normal of each budget's surface at alpha."""
    n = normal(alpha)
    along = (way * n).sum((1, 2), keepdim=True) / (n * n).sum((1, 2), keepdim=True).clamp(min=1e-300)
    return way - along * n


def retracted(alpha: torch.Tensor, gone: int) -> torch.Tensor:
    """Logits (G, N, 2) shifted along the costs, so that C = gone in each budget; bisection, since C grows with the
    shift. `gone` is neither 0 nor N."""
    def cost_at(shift: torch.Tensor) -> torch.Tensor:
        return expected_cost(alpha + shift[:, None, None] * COSTS)
    low, high = (sign * torch.ones(len(alpha), dtype=torch.float64) for sign in (-1, 1))
    while (short := cost_at(high) < gone).any():
        high = torch.where(short, 2 * high, high)
    while (above := cost_at(low) > gone).any():
        low = torch.where(above, 2 * low, low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = cost_at(middle) < gone
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return alpha + high[:, None, None] * COSTS


# --------------------------------------------------------------------------------------------------------- the masks


class Limits(NamedTuple):
    """The number of layers, how many experts of each budget go, and how many each layer keeps at least."""

    layers: int
    gone: int
    least: int


def start(cfg: Config, layers: int, keep: int, ragged: bool) -> tuple[torch.Tensor, Limits]:
    """Equal logits (G, N, 2) of the experts of some layers, of which `keep` stay, on average if ragged; the limits."""
    n = cfg.num_experts
    shape = (1, layers * n, 2) if ragged else (layers, n, 2)
    return torch.zeros(shape, dtype=torch.float64), Limits(layers, (n - keep) * (layers if ragged else 1), cfg.top_k)


def best_mask(logits: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Which experts stay, (layers, n) of 0 and 1: of each budget in logits (G, N, 2) those of largest prune - keep go,
    but for the `least` of each layer that would be last."""
    advantage = (logits[..., 1] - logits[..., 0]).view(limits.layers, -1)
    last = advantage.topk(limits.least, largest=False).indices
    by_budget = advantage.scatter(1, last, -torch.inf).view(logits.shape[:2])
    return torch.ones_like(by_budget).scatter(1, by_budget.topk(limits.gone).indices, 0).view(advantage.shape)


def sampled_mask(alpha: torch.Tensor, tau: float, limits: Limits, generator: torch.Generator) -> torch.Tensor:
    """`best_mask` of logits with Gumbel noise at temperature tau; its gradient is that of the soft choice."""
    uniform = torch.rand(alpha.shape, generator=generator, dtype=torch.float64).clamp(min=1e-20)
    noisy = (alpha - (-uniform.log()).log()) / tau
    soft = noisy.softmax(-1)[..., 0].view(limits.layers, -1)
    return best_mask(noisy.detach(), limits) + (soft - soft.detach())


def masked_layer(h: torch.Tensor, mask: torch.Tensor, layer: Layer, cfg: Config) -> torch.Tensor:
    """The stream (B, L, d) after a layer that reads h, with its experts' contributions times mask (n,), and a token's
    gates scaled by what they lose, if any is left. An expert with mask 0 has a gradient, too."""
    nobody = Experts(*(part[:0] for part in layer.experts))
    x, gates, y = model_io.run_layer(h, replace(layer, experts=nobody), cfg)
    whole, left = gates.sum(1, keepdim=True), (gates * mask).sum(1, keepdim=True)
    scale = whole / torch.where(left > 0, left, whole)
    experts = layer.experts._replace(down=layer.experts.down.to(x) * mask[:, None, None])
    return (y + model_io.mix_experts(experts, x, gates * scale)).view_as(h)


def top_kl(hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The sum of p (log p - log q) over the source's TOP most likely tokens, a mean over positions: p is the source's
    distribution renormalised over them, q the student's over all tokens. The head (V, d) reads hidden of the student
    and target of the source, (B, L, d)."""
    wide = model_io.widened(hidden.dtype)
    logits, tokens = (target @ head.T).topk(min(TOP, len(head)))
    log_p = logits.to(wide).log_softmax(-1)
    log_q = (hidden @ head.T).to(wide).log_softmax(-1).gather(-1, tokens)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def masked_loss(model: Model, ids: torch.Tensor, sparse: list[int], memory: int = hodgecover.MEMORY) -> Loss:
    """The Loss of the masks of some sparse layers on ids (B, L): `top_kl`.

    A pass forward keeps each layer's input, and a pass back runs each layer again, so that one layer is in memory at a
    time; all are, if they take at most `memory` bytes.
    """
    target, head, norm = model.hidden(ids), model.unembedding(), model.norm(f"{model.prefix}norm.weight")
    layers = sum(common.layer_bytes(model, name) for name in model.layer_names)
    read = functools.cache(model.layer) if layers <= memory else model.layer

    def run(h: torch.Tensor, mask: torch.Tensor | None, index: int) -> torch.Tensor:
        layer = read(index)
        if mask is None:
            return model_io.run_layer(h, layer, model.config)[2].view_as(h)
        return masked_layer(h, mask, layer, model.config)

    def loss_of(masks: torch.Tensor, which: torch.Tensor) -> tuple[float, torch.Tensor]:
        mask_of = {index: mask.requires_grad_() for index, mask in zip(sparse, masks.to(target).detach())}
        inputs, slopes = [model.embed(ids[which])], {}
        for index in range(model.config.num_layers):
            with torch.no_grad():
                inputs.append(run(inputs[-1], mask_of.get(index), index))
        hidden = inputs.pop().requires_grad_()
        loss = top_kl(norm(hidden), target[which], head)
        slope, = torch.autograd.grad(loss, hidden)
        for index in reversed(range(sparse[0], model.config.num_layers)):
            h = inputs.pop().requires_grad_()
            given = (h, mask_of[index]) if index in mask_of else (h,)
            slope, *slopes[index] = torch.autograd.grad(run(h, mask_of.get(index), index), given, slope)
        return loss.item(), torch.stack([slopes[index][0] for index in sparse]).to(masks)
    return loss_of


# -------------------------------------------------------------------------------------------------------- the search


def descend(loss_of: Loss, count: int, alpha: torch.Tensor, limits: Limits, steps: int, seed: int = 0,
            cache: Path | None = None, key: dict[str, str] = {}) -> Iterator[tuple[int, float]]:
    """Move logits alpha (G, N, 2), in place, towards a low loss on some of `count` sequences a step, within the limits;
    yield (steps done, loss of the last). What lies in the folder is taken up."""
    generator = torch.Generator().manual_seed(seed)
    alpha.copy_(retracted(alpha, limits.gone)).requires_grad_()
    optimizer, first = torch.optim.Adam([alpha], lr=LR), 0
    saved = model_io.read_cached(cache, "budgets-rco", key) if cache else None
    if saved:
        alpha.detach().copy_(saved["alpha"])
        generator.set_state(saved["noise"])
        optimizer.state[alpha] = {"step": saved["step"].float(), "exp_avg": saved["m"], "exp_avg_sq": saved["v"]}
        first = int(saved["step"])
    for step in range(first, steps):
        tau, total = TAU[0] * (TAU[1] / TAU[0]) ** (step / max(steps - 1, 1)), 0.0
        optimizer.zero_grad()
        for _ in range(NOISES):
            which = torch.randperm(count, generator=generator)[:SEQUENCES]
            mask = sampled_mask(alpha, tau, limits, generator)
            loss, slope = loss_of(mask.detach(), which)
            mask.backward(slope / NOISES)
            total += loss / NOISES
        alpha.grad = onto_tangent(alpha.grad, alpha.detach())
        optimizer.step()
        moved, state = alpha.detach(), optimizer.state[alpha]
        moved.copy_(retracted(moved, limits.gone))
        state["exp_avg"] = onto_tangent(state["exp_avg"], moved)
        if cache:
            model_io.write_cached(cache, "budgets-rco", key, {
                "step": torch.tensor(step + 1), "alpha": moved, "m": state["exp_avg"], "v": state["exp_avg_sq"],
                "noise": generator.get_state()})
        yield step + 1, total


def rank(alpha: torch.Tensor, names: list[str], limits: Limits) -> tuple[dict[str, list[int]], tuple[int, ...]]:
    """The experts of each layer, by name, the last to go first, and how many go: of logits (G, N, 2) without noise."""
    mask = best_mask(alpha.detach(), limits)
    score = (alpha.detach()[..., 0] - alpha.detach()[..., 1]).view(len(names), -1)
    orders = dict(zip(names, map(baselines.descending, score)))
    return orders, tuple(int((kept == 0).sum()) for kept in mask)
