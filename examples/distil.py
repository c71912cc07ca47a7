# SPDX-License-Identifier: MIT
"""Distil a compressed checkpoint: train it to its source's next-token distributions.

    python examples/distil.py SOURCE CKPT --out DIR --calib FILE --tokens 600000
    python examples/distil.py SOURCE CKPT --out DIR --calib FILE --tokens 600000 --layerwise

CKPT is any compressed checkpoint of SOURCE, whichever tool made it: experts dropped, merged or made narrower, refitted
or not. Zeros stay zeros in experts' matrices of which more than 1% are 0.

End to end (the default): the loss is KL(source || CKPT) over the whole vocabulary, a mean over positions, in nats. With
--kl-weight W below 1 it is W times that, and 1 - W times the loss of the next token. The source runs once, layer by
layer, before the training, and its last stream is kept. The weights, their gradients and two moments of Adam are in
memory, some 32 bytes a trained parameter: the command says beforehand what it needs, and refuses if that is not free.

--layerwise: one layer after the other, with no other in memory. Its loss is |y - y_source|^2 / |y_source|^2, a mean
over tokens: y is the residual stream after the layer at the compressed model's own inputs, the layers before it
trained, y_source the source's. A layer whose loss is not lower at the end keeps its weights. The final norm is not
trained.

Adam with betas 0.9 and 0.95, warm-up over a tenth of the steps, then a cosine to 0; the gradient is clipped to norm 1.
--lr is in units of each matrix's root mean square (ours; Adafactor's scaling, arXiv 1804.04235), so that one number
suits models of any scale. A step takes 8 sequences. Weights are trained in float32 and stored in CKPT's own types.

--train names the parts that are trained: experts (routed, shared and dense feed-forward), router, norms, attention.
The embedding, the head and a multi-token head stay as they are. Each line of progress says how evenly tokens are
routed: the load of the busiest expert of any layer, as a multiple of an even share, and how many of a layer are idle.

--prefixes K[,F] ... trains a checkpoint of nested.py so that its prefixes, the first K experts of each layer and the
first F hidden units of each of them, come near to the source, too: a step trains the whole model with probability 1/3,
else one of the prefixes at random (Star Elastic, arXiv 2605.07182, without its budget router). Progress tells the
held-out KL of the whole model, then of each prefix.

A killed run continues from its last saved step, a minute old at most, or more if saving takes long. Steps lie in
OUT-distil until the output is whole. --memory bounds the graph of a step; another value is another run.

    n experts of a layer    d hidden size    V vocabulary    B sequences of L tokens, T = B L
    h (B, L, d) stream before a layer    y (T, d) after it
"""
import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import common
import hodgecover
import model_io
import torch
from model_io import Config, Experts, InputError, Layer, LayerPass, Model
from torch.nn import functional

TOKENS = 524_288  # default sample
LR = 0.02
BETAS, WARM_UP, CLIP = (0.9, 0.95), 0.1, 1.0
BATCH = 8  # sequences a step
REPORTS = 10  # lines of progress
EVAL_TOKENS = 8192  # of held-out text
SAVE_SECONDS = 60  # between two saved steps
SPARSE = 0.01  # share of zeros from which an expert's matrix counts as pruned
SMALLEST = 1e-6  # a matrix's root mean square for --lr, at least: a router of dot_moe.py has 1e-4
PIECE = 4096  # tokens that are taken at a time
WHOLE = 1 / 3  # probability of a step of the whole model, if there are prefixes
SETTINGS = ("epochs", "lr", "kl_weight", "train", "layerwise", "prefixes", "seed", "memory")
PARTS = {"norms": r"norm(_\w+)?\.weight$", "router": r"mlp\.(gate|shared_expert_gate)\.weight$", "experts": r"mlp\.",
         "attention": r"(self_attn|linear_attn)\."}  # the first that fits a weight's name

Weights = dict[str, torch.Tensor]  # by name in the checkpoint; the experts' stacked, as in common.store
Loss = Callable[[torch.Tensor], torch.Tensor]  # numbers of sequences (b,) -> their summed loss


# --------------------------------------------------------------------------------------------------------- the weights


def layer_weights(layer: Layer) -> Weights:
    """Return the weights of a layer by their name in it, as `common.store` takes them."""
    weights = dict(layer.weights)
    if layer.experts is not None:
        weights["mlp.gate.weight"] = layer.router
        weights |= {f"mlp.experts.{part}": stack for part, stack in layer.experts._asdict().items()}
    return weights


def as_layer(weights: Weights, dtypes: dict[str, torch.dtype]) -> Layer:
    """Return the layer with these weights, each in the dtype that it is multiplied in: `layer_weights`, inverted."""
    weights = {name: weight.to(dtypes[name]) for name, weight in weights.items()}
    router, experts = weights.pop("mlp.gate.weight", None), None
    if router is not None:
        experts = Experts(*(weights.pop(f"mlp.experts.{part}") for part in Experts._fields))
    return Layer(experts, router, weights)


def part_of(name: str) -> str | None:
    """Return which of PARTS a weight belongs to, None for the embedding and the head.

    >>> [part_of(name) for name in ("mlp.gate.weight", "mlp.experts.gate", "self_attn.q_norm.weight")]
    ['router', 'experts', 'norms']
    """
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), None)


class Student(NamedTuple):
    """Layers in training: all their weights by layer and name, float32 or wider, of which some have gradients; and the
    dtypes that they are multiplied in."""

    weights: dict[str, Weights]
    dtypes: dict[str, dict[str, torch.dtype]]

    def layer(self, name: str) -> Layer:
        """Return a layer as the forward pass takes it."""
        return as_layer(self.weights[name], self.dtypes[name])

    def trained(self) -> Weights:
        """Return the weights with gradients, by their name in the checkpoint."""
        return {f"{layer}.{name}": weight for layer, weights in self.weights.items() for name, weight in weights.items()
                if weight.requires_grad}

    def store(self, output: Model) -> None:
        """Write the trained weights into a checkpoint's files."""
        for layer, weights in self.weights.items():
            trained = {name: weight.detach() for name, weight in weights.items() if weight.requires_grad}
            common.store(output, layer, trained)


def read_student(output: Model, layers: list[str], parts: list[str]) -> Student:
    """Read layers of a checkpoint, by name, to train these PARTS of theirs; a name that is none stands for the final
    norm."""
    wide = Model(output.checkpoint.path, model_io.widened(output.dtype), str(output.device))

    def read(model: Model, name: str) -> Weights:
        if name not in model.layer_names:
            return {"norm.weight": model.tensor(f"{name}.norm.weight")}
        return layer_weights(model.layer(model.layer_names.index(name)))
    weights = {name: {part: weight.to(wide.dtype).requires_grad_(part_of(part) in parts)
                      for part, weight in read(wide, name).items()} for name in layers}
    dtypes = {name: {part: output.dtype if part.startswith("mlp.experts.") else weight.dtype
                     for part, weight in read(output, name).items()} for name in layers}
    return Student(weights, dtypes)


# -------------------------------------------------------------------------------------------------------- the training


class Plan(NamedTuple):
    """How to train: passes over the text, learning rate, weight of the KL, PARTS to train, seed of the order, bytes of
    a graph, the folder and key of what is saved, and prefixes (experts, hidden units) to train beside the whole."""

    epochs: int
    lr: float
    kl_weight: float
    parts: list[str]
    seed: int
    memory: int
    cache: Path | None = None
    key: dict[str, str] = {}
    prefixes: Sequence[tuple[int, int]] = ()


def batches(count: int, plan: Plan) -> list[torch.Tensor]:
    """Return the sequences of each step, (BATCH,) of 0 to count - 1, shuffled anew for each pass; the last step of a
    pass may have fewer."""
    generator = torch.Generator().manual_seed(plan.seed)
    return [batch for _ in range(plan.epochs) for batch in torch.randperm(count, generator=generator).split(BATCH)]


def prefixes_of(steps: int, plan: Plan) -> list[tuple[int, int] | None]:
    """Return the prefix that each step trains, None for the whole model."""
    if not plan.prefixes:
        return [None] * steps
    generator = torch.Generator().manual_seed(plan.seed)
    whole = torch.rand(steps, generator=generator) < WHOLE
    which = torch.randint(len(plan.prefixes), (steps,), generator=generator)
    return [None if all_of_it else plan.prefixes[number] for all_of_it, number in zip(whole, which)]


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a linear warm-up, then a cosine to 0.

    >>> [round(schedule(step, 20), 3) for step in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.008]
    """
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def train(weights: Weights, loss_of: Loss, count: int, length: int, at_once: int, plan: Plan, name: str,
          report: Callable[[int, int, float], None], of_step: Callable[[int, int], dict] = lambda step, steps: {}
          ) -> None:
    """Train weights in place by Adam on `count` sequences of `length`, `at_once` of them in a graph.

    `loss_of` gives the summed loss of some sequences; at a step, from 0 on, of so many it also takes the arguments that
    `of_step` names. `report` is told the steps done, their number, and the loss of the last. What is saved, under
    `name` in the plan's cache, is taken up.
    """
    steps, masks = batches(count, plan), zeros_to_keep(weights)
    groups = [{"params": [weight], "unit": weight.detach().square().mean().sqrt().clamp(min=SMALLEST).item()}
              for weight in weights.values()]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    done, due = restore(weights, optimizer, plan, name), time.monotonic() + SAVE_SECONDS
    for step, which in enumerate(steps[done:], done):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * group["unit"] * schedule(step, len(steps))
        optimizer.zero_grad()
        loss = add_gradient(partial(loss_of, **of_step(step, len(steps))), which, at_once, len(which) * length)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
        if not math.isfinite(loss) or not norm.isfinite():
            raise InputError(f"step {step + 1} of {len(steps)}: the loss or its gradient is not finite: NaN or "
                             "infinity in the weights, or a learning rate that is too high")
        optimizer.step()
        for weight, mask in masks:
            weight.detach().mul_(mask)
        last = step + 1 == len(steps)
        if plan.cache and (last or time.monotonic() >= due):
            started = time.monotonic()
            save(weights, optimizer, step + 1, plan, name, last)
            due = time.monotonic() + max(SAVE_SECONDS, 10 * (time.monotonic() - started))
        report(step + 1, len(steps), loss)
    optimizer.zero_grad()


def zeros_to_keep(weights: Weights) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (weight, where it may move) of the experts' matrices, alone or stacked, for those of which more than 1%
    are 0: not there."""
    found = []
    for name, weight in weights.items():
        if part_of(name) == "experts":
            zero = weight.detach() == 0
            pruned = zero.flatten(-2).double().mean(-1) > SPARSE
            if pruned.any():
                found.append((weight, ~(zero & pruned[..., None, None])))
    return found


def save(weights: Weights, optimizer: torch.optim.Adam, step: int, plan: Plan, name: str, last: bool) -> None:
    """Write the number of steps done, the weights and, but for the last step, both moments to the plan's cache."""
    tensors, nothing = {"step": torch.tensor(step)}, torch.empty(0)
    for key, weight in weights.items():
        state = optimizer.state[weight]
        tensors |= {key: weight.detach(), f"{key} m": nothing if last else state["exp_avg"],
                    f"{key} v": nothing if last else state["exp_avg_sq"]}
    model_io.write_cached(plan.cache, name, plan.key, tensors)


def restore(weights: Weights, optimizer: torch.optim.Adam, plan: Plan, name: str) -> int:
    """Take up what is saved; return the number of steps done."""
    saved = model_io.read_cached(plan.cache, name, plan.key) if plan.cache else None
    if not saved:
        return 0
    for key, weight in weights.items():
        weight.detach().copy_(saved[key])
        optimizer.state[weight] = {"step": saved["step"].to(torch.float32), "exp_avg": saved[f"{key} m"].to(weight),
                                   "exp_avg_sq": saved[f"{key} v"].to(weight)}
    return int(saved["step"])


def add_gradient(loss_of: Loss, which: torch.Tensor, at_once: int, positions: int) -> float:
    """Add the gradient of a mean loss to the weights', and return the loss. `loss_of` gives the sum over some
    sequences; `which` has `positions` positions, and is taken `at_once` sequences at a time."""
    total = 0.0
    for part in which.split(at_once):
        loss = loss_of(part) / positions
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def mean_loss(loss_of: Loss, which: torch.Tensor, at_once: int, positions: int) -> float:
    """Return the mean of a loss, as `add_gradient` does."""
    return sum(loss_of(part).item() for part in which.split(at_once)) / positions


def graph_bytes(cfg: Config, layers: int, length: int) -> int:
    """Return about what the graph of one sequence takes: streams, attention and gated units of each layer and, if they
    are several, the next-token distributions of both models."""
    d, dense = cfg.hidden_size, cfg.dense_width or 0
    units = max(cfg.top_k * (2 * d + 5 * cfg.expert_width), 2 * d + 5 * dense)
    layer = 16 * d + 4 * cfg.num_heads * cfg.head_dim + units
    return 4 * length * (layers * layer + 8 * cfg.vocab_size * (layers > 1))


def graph_sequences(cfg: Config, layers: int, length: int, memory: int) -> int:
    """Return how many sequences of a step to put into one graph of `memory` bytes, at least one."""
    return min(BATCH, max(1, memory // graph_bytes(cfg, layers, length)))


def add_load(counts: dict[str, torch.Tensor], name: str, gates: torch.Tensor | None) -> None:
    """Count the tokens that a layer's gates (T, n) route to each expert."""
    if gates is not None:
        counts[name] = counts.get(name, 0) + (gates > 0).sum(0)


def load_line(counts: dict[str, torch.Tensor]) -> str:
    """Say how unevenly the tokens lie in the worst layer, and forget them."""
    if not counts:
        return "load: not seen"
    busiest = max((count.max() * len(count) / count.sum()).item() for count in counts.values())
    idle = max(int((count == 0).sum()) for count in counts.values())
    counts.clear()
    return f"load: busiest expert {busiest:.1f} times an even share, {idle} idle"


def step_line(done: int, steps: int, loss: float, counts: dict[str, torch.Tensor]) -> str:
    """Say a step's loss and the load since the last line; nothing if no line is due."""
    due = done * REPORTS // steps > (done - 1) * REPORTS // steps
    return f"step {done} of {steps}: loss {loss:.4f}, {load_line(counts)}" if due else ""


def apart(model: Model, ids: torch.Tensor, held_out: int, empty: Callable) -> Iterator[list[LayerPass]]:
    """Yield each decoder layer's passes over ids (B, L): over all but the last `held_out` sequences and, if there are
    some, over those. A product's rounding depends on how many rows it has; to watch held-out text changes no weight."""
    first, last = ids.tensor_split((len(ids) - held_out,))
    h = model.embed(last, empty) if held_out else None
    for step in islice(model.stream(first, empty), model.config.num_layers):
        steps = [step, model.run(step.index, step.layer, h, step.norm, empty)] if held_out else [step]
        h = steps[-1].y.view_as(steps[-1].h)
        yield steps


# --------------------------------------------------------------------------------------------------------- end to end


def readout_loss(hidden: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor, head: torch.Tensor, kl_weight: float
                 ) -> torch.Tensor:
    """Return L times the sum over b sequences of kl_weight KL(source || student) + (1 - kl_weight) (loss of the next
    token), each a mean over the positions that have one; tokens (b, L). The head (V, d) reads hidden (b, L, d) of the
    student and target (b, L, d) of the source."""
    def log_probabilities(features: torch.Tensor) -> torch.Tensor:
        logits = features @ head.T
        return logits.to(model_io.widened(logits.dtype)).log_softmax(-1)
    log_q = log_probabilities(hidden)
    loss = kl_weight * functional.kl_div(log_q, log_probabilities(target), reduction="sum", log_target=True)
    if kl_weight < 1:
        next_token = functional.nll_loss(log_q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        length = tokens.shape[1]
        loss = loss + (1 - kl_weight) * next_token * length / (length - 1)
    return loss


def distil(source: Model, output: Model, ids: torch.Tensor, held_out: int, plan: Plan, empty: Callable, say: Callable
           ) -> None:
    """Train a checkpoint's files end to end on ids (B, L) but for the last `held_out` sequences, on which the KL is
    told. `empty` makes the source's streams; `say` is told the share that is done, and a line or nothing."""
    cfg, length, count = output.config, ids.shape[1], len(ids) - held_out
    of_source = 1 / (1 + 4 * plan.epochs)  # share of the time: a pass beside a pass, its way back, and two readouts
    for steps in apart(source, ids, held_out, empty):
        say(of_source * (steps[0].index + 1) / cfg.num_layers)
    steps[0].layer.unload()
    texts, targets, source_norm = ids.tensor_split((count,)), [step.y.view_as(step.h) for step in steps], steps[0].norm
    del steps
    layers, norm = output.layer_names[:cfg.num_layers], output.prefix.removesuffix(".")
    student, head, counts = read_student(output, [*layers, norm], plan.parts), output.unembedding(), {}

    def loss_of(which: torch.Tensor, kl_weight: float = plan.kl_weight, prefix: tuple[int, int] | None = None,
                text: int = 0) -> torch.Tensor:
        tokens = texts[text][which]
        h = output.embed(tokens)
        for name in layers:
            layer = student.layer(name)
            if prefix:
                layer = common.cut(layer, slice(prefix[0]), prefix[1])
            _, gates, y = model_io.run_layer(h, layer, cfg)
            add_load(counts, name, None if prefix else gates)
            h = y.view_as(h)
        weight = student.weights[norm]["norm.weight"].to(student.dtypes[norm]["norm.weight"])
        hidden = model_io.rms_norm(h, weight, cfg.rms_norm_eps)
        return readout_loss(hidden, source_norm(targets[text][which]), tokens.to(output.device), head, kl_weight)
    at_once = graph_sequences(cfg, cfg.num_layers, length, plan.memory)
    prefixes = prefixes_of(len(batches(count, plan)), plan)

    def report(done: int, steps: int, loss: float) -> None:
        line = step_line(done, steps, loss, counts)
        if line and held_out:
            kls = [mean_loss(partial(loss_of, kl_weight=1.0, prefix=prefix, text=1), torch.arange(held_out), at_once,
                             held_out * length) for prefix in (None, *plan.prefixes)]
            line += f", held-out KL {' '.join(f'{kl:.4f}' for kl in kls)}"
            counts.clear()
        say(of_source + (1 - of_source) * done / steps, line)
    train(student.trained(), loss_of, count, length, at_once, plan, "distil", report,
          lambda step, _: {"prefix": prefixes[step]})
    student.store(output)


# ------------------------------------------------------------------------------------------------------ layer by layer


def stream_error(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return |y - target|^2 / |target|^2 summed over the tokens of two streams (..., d), in float32 or better."""
    wide = model_io.widened(y.dtype)
    error, size = (y.to(wide) - target.to(wide)).square().sum(-1), target.to(wide).square().sum(-1)
    return (error / size.clamp(min=torch.finfo(wide).tiny)).sum()


class Trained(NamedTuple):
    """A layer, and its loss before and after, on the text; on held-out text, or None."""

    name: str
    before: float
    after: float
    held_out_before: float | None = None
    held_out_after: float | None = None


def mean_error(y: torch.Tensor, target: torch.Tensor) -> float:
    """Return the mean `stream_error` of the tokens of streams (T, d)."""
    return sum(stream_error(*few).item() for few in zip(y.split(PIECE), target.split(PIECE))) / len(y)


def distil_layers(source: Model, output: Model, ids: torch.Tensor, held_out: int, plan: Plan, empty: Callable,
                  say: Callable) -> Iterator[Trained]:
    """Train a checkpoint's files layer by layer; arguments as in `distil`. Yields what came of each layer."""
    layers = output.config.num_layers
    for targets, steps in zip(apart(source, ids, held_out, empty), apart(output, ids, held_out, empty)):
        targets[0].layer.unload()
        name, final = steps[0].name, steps

        def errors(passes: list[LayerPass]) -> list[float]:
            return [mean_error(step.y, target.y) for step, target in zip(passes, targets)]
        before = after = errors(steps)
        start = distil_layer(steps[0], targets[0].y, output, plan, lambda share: say((steps[0].index + share) / layers)
                             ) if before[0] > 0 else {}
        if start:
            final = [common.rerun(output, step, empty) for step in steps]
            after = errors(final)
        if start and not after[0] < before[0]:
            hodgecover.warn(f"{name}: its stream error would be {after[0]:.5f}, not lower; it keeps its weights; a "
                            "lower --lr may help")
            for tensor, stored in start.items():
                common.overwrite(output.checkpoint, tensor, stored)
            final, after = [common.rerun(output, step, empty) for step in steps], before
        counts: dict[str, torch.Tensor] = {}
        add_load(counts, name, final[0].gates)
        for step, trained in zip(steps, final):
            step.y.copy_(trained.y)
        del final, trained
        said = ", held out ".join(f"{old:.5f} -> {new:.5f}" for old, new in zip(before, after))
        say((steps[0].index + 1) / layers, f"{name}: stream error {said}, {load_line(counts)}")
        yield Trained(name, before[0], after[0], *before[1:], *after[1:])


def distil_layer(step: LayerPass, target: torch.Tensor, output: Model, plan: Plan, say: Callable
                 ) -> dict[str, torch.Tensor]:
    """Train one layer to the stream (T, d) after the source's, and write it into the output's files. Returns the
    tensors that it had, by name, of those that are trained."""
    cfg, (count, length, _), target = output.config, step.h.shape, target.view_as(step.h)
    step.layer.unload()
    student = read_student(output, [step.name], plan.parts)
    trained = student.trained()
    start = {name: output.checkpoint.load(name) for name in output.checkpoint.tensors
             if name.startswith(f"{step.name}.") and part_of(name) in plan.parts}

    def loss_of(which: torch.Tensor) -> torch.Tensor:
        y = model_io.run_layer(step.h[which], student.layer(step.name), cfg)[2]
        return stream_error(y, target[which].flatten(0, 1))
    at_once = graph_sequences(cfg, 1, length, plan.memory)
    if trained:
        train(trained, loss_of, count, length, at_once, plan, f"distil-{step.name}",
              lambda done, steps, loss: say(done / steps))
        student.store(output)
    return start


# -------------------------------------------------------------------------------------------------------- the command


def read_ids(source: Model, args: argparse.Namespace) -> tuple[torch.Tensor, int]:
    """The text to train on, then that to watch, (B, L); the number of the latter's sequences."""
    ids = hodgecover.calibration_ids(source, args.calib, args.tokens, args.seq_len, args.seed, ("train", "calibration"))
    if not args.eval:
        return ids, 0
    held_out = common.evenly_spaced(common.read_eval(source, args, EVAL_TOKENS), max(1, EVAL_TOKENS // args.seq_len))
    return torch.cat((ids, held_out)), len(held_out)


def training_bytes(model: Model, modules: Sequence[str], parts: Sequence[str]) -> int:
    """Return the bytes of the weights of some modules, by name, while some PARTS of theirs are trained: weights,
    gradients, two moments, a copy, and what is being saved."""
    wide, inside = model_io.widened(model.dtype).itemsize, tuple(f"{module}." for module in modules)
    return sum(math.prod(info.shape) * wide * (8 if part_of(name) in parts else 1)
               for name, info in model.checkpoint.weights.items() if name.startswith(inside))


def check_memory(model: Model, args: argparse.Namespace, tokens: int, of_layer: int = 0,
                 advice: str = "train fewer parts") -> None:
    """Say what the training of so many tokens needs, with `of_layer` more bytes a layer. Raises InputError if that is
    not free, with advice for what has one layer in memory already."""
    cfg, norm = model.config, model.prefix.removesuffix(".")
    layers = model.layer_names[:cfg.num_layers]
    if args.layerwise:
        at_once, weights = 1, max(training_bytes(model, [layer], args.train) for layer in layers)
        what = "a layer"
    else:
        others = [f"{norm}.norm", f"{norm}.embed_tokens", "lm_head"]
        at_once, weights = len(layers), training_bytes(model, layers + others, args.train)
        what, advice = "end to end: all layers", "give --layerwise"
    sequences = graph_sequences(cfg, at_once, args.seq_len, args.memory)
    streams = min(args.memory, common.activation_bytes(model, tokens))  # the rest lies on disk
    needed = weights + at_once * of_layer + sequences * graph_bytes(cfg, at_once, args.seq_len) + streams
    free = common.available_memory(model.device)
    if needed > free:
        raise InputError(f"{model.checkpoint.path}: {what} in training would take {needed / 1e9:.2f} GB, "
                         f"{free / 1e9:.2f} GB are free; {advice}")
    print(f"{what} in training: {needed / 1e9:.2f} GB of memory", flush=True)


def training_parser(file: str, description: str, lr: float, unit: str, source: bool = False) -> hodgecover.Parser:
    """The parser of a command that trains: its text, and the options of `train`."""
    parser = common.command_line(file, description, text=TOKENS, source=source, use="training")
    parser.add_argument("--epochs", metavar="E", type=int, default=1, help="passes over the text [%(default)s]")
    parser.add_argument("--lr", metavar="RATE", type=float, default=lr, help=f"peak learning rate, in units of {unit} "
                        "[%(default)s]")
    parser.add_argument("--layerwise", action="store_true", help="one layer after another, with only that one in "
                        "memory")
    parser.add_argument("--eval", metavar="FILE", type=Path, help="held-out text, on 8,192 tokens of which the output "
                        "is compared with its source")
    return parser


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = training_parser(__file__, __doc__, LR, "each matrix's root mean square", source=True)
    parser.add_argument("--kl-weight", metavar="W", type=float, default=1.0, help="weight of the KL; that of the "
                        "next token's loss is 1 - W [%(default)s]")
    parser.add_argument("--train", metavar="PART", nargs="+", choices=PARTS, default=[*PARTS], help="of "
                        f"{', '.join(PARTS)} [all]")
    parser.add_argument("--prefixes", metavar="K[,F]", nargs="+", type=common.size_of, default=[], help="prefixes of a "
                        "nested checkpoint to train, too")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError for an option out of range, and for one that the mode does not use. Sorts the parts."""
    hodgecover.check_range("epochs", args.epochs, 1, 10**6)
    hodgecover.check_range("lr", args.lr, 0, 1)
    hodgecover.check_range("kl_weight", args.kl_weight, 0, 1)
    args.train = [part for part in PARTS if part in args.train]
    if args.layerwise and args.kl_weight != 1:
        raise InputError(f"kl_weight {args.kl_weight}: does not go with --layerwise, which has another loss")
    if args.layerwise and args.prefixes:
        raise InputError("prefixes: do not go with --layerwise, which has no loss of a whole model")


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    check_options(args)
    source, model, cache = common.open_pair(args, "distil")
    try:
        args.prefixes = [common.check_size(model, size) for size in args.prefixes]
    except InputError as err:
        raise InputError(f"prefixes: {err}") from None
    ids, held_out = read_ids(source, args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"dtype": common.dtype_name(model), "held_out_sequences": held_out}
    trained = ids[:len(ids) - held_out]
    entry = model_io.record_entry("distil.py", settings, trained, args.calib, source=source, checkpoint=model)
    check_memory(model, args, ids.numel())
    if len(model.layer_names) > model.config.num_layers:
        print("the multi-token head stays as it is")

    bar = model_io.progress_bar()
    plan = Plan(args.epochs, args.lr, args.kl_weight, args.train, args.seed, args.memory, cache,
                common.work_key(settings, ids, source, model), args.prefixes)
    with common.made(cache, "distil-*.safetensors"), common.copied(model, args.out, entry) as output:
        empty = common.stream_maker(model, common.activation_bytes(model, ids.numel()), args.memory,
                                    output.checkpoint.path)
        work = (distil_layers if args.layerwise else distil)(source, output, ids, held_out, plan, empty,
                                                             partial(tell, bar))
        if args.layerwise:
            entry["stream_error"] = [layer._asdict() for layer in work]
        bar(None)
        if held_out:
            entry["held_out"] = compare(source, model, output, ids[len(ids) - held_out:])
    print(f"output: {args.out}")


def tell(bar: Callable[[float | None], None], share: float, line: str = "") -> None:
    """Show the share that is done, and print a line above it if there is one."""
    if line:
        bar(None)
        print(line, flush=True)
    bar(share)


def compare(source: Model, before: Model, after: Model, ids: torch.Tensor) -> list[dict]:
    """Compare a checkpoint and what came of it with the source on held-out ids (B, L), and print it."""
    found = [common.compare(source, model, ids) for model in (before, after)]
    print(f"held-out KL {found[0].kl:.4f} -> {found[1].kl:.4f}, perplexity {found[0].output_perplexity:.2f} -> "
          f"{found[1].output_perplexity:.2f} (source {found[1].source_perplexity:.2f})")
    return [each._asdict() for each in found]


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
