# SPDX-License-Identifier: MIT
"""Make a sparse checkpoint of a dense one: DOT-MoE (arXiv 2606.01666), from qwen3 to qwen3_moe.

    python examples/dot_moe.py DENSE --experts 16 --top-k 4 --out DIR --calib FILE
    python examples/dot_moe.py DENSE --experts 16 --top-k 4 --out DIR --calib FILE --layerwise

Each feed-forward layer's f neurons are dealt out to n experts of f / n neurons; a router takes k experts for a token.
Neuron j adds h_j w_j to the layer's output, h_j = silu(gate_j x) (up_j x), w_j column j of the down projection; the
sparse layer adds those of the k experts that are taken, as they are: unit gates. Rows of the gate and up projections
are copied bit for bit; FP8 ones become bfloat16. The dense weights are frozen; what is learned is which neuron goes
where, and the router:

- A (f, n), the scores. exp(A / temperature) is scaled to row sums 1 and column sums f / n by 50 rounds of Sinkhorn's
  iteration on logarithms; its entries, the largest first, are rounded to one expert a neuron, f / n neurons an expert.
- W (n, d), the router: the k largest of softmax(W x).
- Both choices are hard in the forward pass, and have the gradient of the soft ones (straight-through).
- Loss: 2 KL(dense || sparse) + the loss of the next token + 0.001 mean log-sum-exp(W x)^2 + 0.01 n sum_e f_e p_e, with
  f_e the share of the choices that fall on expert e and p_e its mean probability; the last two are means over layers.
- The temperature falls from 1 to 0.1 by a constant factor a step.

--layerwise has one layer in memory, one after the other: its loss has |y - y_dense|^2 / |y_dense|^2 in the place of the
first two terms, y the stream after the layer, at the inputs that the sparse layers before it give.

--split takes another way to deal the neurons out, and trains the router alone, by the same loss:

random        by --seed
kmeans        balanced k-means on the rows of the up projection
coactivation  an expert begins with the busiest neuron that is left, and takes those that are most often active together
              with its own; active: among a token's 10% of largest |h_j|

In the file the gates are renormalised over the k experts. So that they are about 1 / k, the router is scaled by a power
of two to logits of a spread of a thousandth, and the down projections are multiplied by k: exact, if that is a power of
two. A smaller spread makes ties in float32, which route otherwise, too: measured, this one is best.

Ours: means over layers; the anneal over all steps; Adam as in distil.py (warm-up over a tenth of the steps, no weight
decay), its rate in units of 0.01, the scale at which A and W begin; one rate for few steps. The paper has 5e-4, AdamW
with 1e-4 and a fifth for 3,500 steps. Sources of the paper's setting disagree: experts of 128 neurons, or 8 experts of
which 1 or 2 are taken. Here you say. Left out: the training of all weights afterwards, for which there is distil.py.

A killed run continues from its last saved step; steps lie in OUT-dot-moe until the output is whole.

    n experts    k experts a token    f neurons of a layer    d hidden size    T tokens, B sequences of L
    h (B, L, d) stream before a layer, y (T, d) after it      x (T, d) input of the feed-forward layer
"""
import argparse
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import common
import distil
import hodgecover
import model_io
import torch
from model_io import Config, InputError, Layer, LayerPass, Model, Piece
from torch.nn import functional

SPLITS = ("dot", "random", "kmeans", "coactivation")
ROUNDS = 50  # of Sinkhorn's iteration
HOT, COLD = 1.0, 0.1  # temperatures
KL, NEXT_TOKEN, Z, BALANCE = 2.0, 1.0, 1e-3, 1e-2  # weights of the loss's terms
START = 0.01  # standard deviation of A and W at the start
LR = 0.5
SWEEPS = 20  # of k-means
ACTIVE = 0.1  # share of a token's neurons
SPREAD = 2.0**-10  # of a router's logits in the file
SETTINGS = ("experts", "top_k", "split", "layerwise", "epochs", "lr", "seed", "memory")
MATRIX = re.compile(r"(.+)\.mlp\.(gate|up|down)_proj\.weight")


# -------------------------------------------------------------------------------------------------- neurons to experts


def sinkhorn(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the assignment (f, n) of row sums 1 and column sums f / n that maximises sum(A M) + temperature H(M), as
    far as 50 iterations bring it: scores A (f, n). The column sums are exact.

    >>> sinkhorn(torch.tensor([[4.0, 0.0], [3.0, 0.0]]), 1.0).round(decimals=2)
    tensor([[0.6200, 0.3800],
            [0.3800, 0.6200]])
    """
    log_m, capacity = scores / temperature, math.log(scores.shape[0] / scores.shape[1])
    for _ in range(ROUNDS):
        log_m = log_m - log_m.logsumexp(1, keepdim=True)
        log_m = log_m - log_m.logsumexp(0, keepdim=True) + capacity
    return log_m.exp()


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return the expert of each neuron (f,), f / n neurons an expert: the entries of values (f, n) are visited from the
    largest on, and a neuron that has no expert takes one that has room.

    Done in rounds: each neuron asks the expert of its largest entry that has not refused it, and an expert refuses all
    but the f / n largest that ask. That ends in the same assignment.

    >>> rounded(torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6], [0.2, 0.0]]))
    tensor([0, 0, 1, 1])
    """
    values, room = values.clone(), values.shape[0] // values.shape[1]
    while True:
        best, expert = values.max(1)
        order = best.sort(descending=True, stable=True).indices
        asked = functional.one_hot(expert[order], values.shape[1])
        place = (asked.cumsum(0) * asked).sum(1)  # among those that ask the same expert, from 1 on
        refused = order[place > room]
        if not len(refused):
            return expert
        values[refused, expert[refused]] = -torch.inf


def random_split(f: int, n: int, seed: int) -> torch.Tensor:
    """Return the expert of each neuron (f,), dealt out at random."""
    return torch.randperm(f, generator=torch.Generator().manual_seed(seed)) % n


def kmeans_split(rows: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Return the expert of each neuron (f,) by k-means on rows (f, d), with f / n rows a cluster: each time, the
    nearest pairs of row and centre first."""
    rows = rows.float()
    centres = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n].to(rows.device)]
    for _ in range(SWEEPS):
        expert = rounded(-torch.cdist(rows, centres))
        centres = functional.one_hot(expert, n).to(rows).T @ rows * (n / len(rows))
    return expert


def count_together(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return how many of the tokens x (T, d) two neurons of a dense layer are both active on, (f, f)."""
    counts = 0.0
    for part in x.split(distil.PIECE):
        size = model_io.gated(part, layer.weights, "mlp").abs()
        top = size.topk(max(1, round(ACTIVE * size.shape[1]))).indices
        active = torch.zeros(size.shape, device=x.device).scatter(1, top, 1.0)
        counts = counts + active.T @ active
    return counts


def coactivation_split(counts: torch.Tensor, n: int) -> torch.Tensor:
    """Return the expert of each neuron (f,), greedily: counts (f, f) of tokens on which two are both active, on the
    diagonal on which one is."""
    expert = torch.full((len(counts),), -1, device=counts.device)
    for e in range(n):
        tie = counts.diagonal()
        for _ in range(len(counts) // n):
            own = tie.masked_fill(expert >= 0, -1).argmax()
            tie = counts[own] if not (expert == e).any() else tie + counts[own]
            expert[own] = e
    return expert


# ------------------------------------------------------------------------------------------------------ a sparse layer


class Want(NamedTuple):
    """What to make of each layer: n experts of which a token takes k, the neurons dealt out by one of SPLITS."""

    experts: int
    top_k: int
    split: str


class Split(NamedTuple):
    """How a layer is split: the router's rows (n, d) for unit gates, and either the scores A (f, n), float32 as they
    are, or the expert of each neuron (f,)."""

    router: torch.Tensor
    scores: torch.Tensor | None = None
    expert: torch.Tensor | None = None

    def trained(self) -> distil.Weights:
        """Return what is trained, by name in the layer."""
        return {name: part for name, part in (("mlp.gate.weight", self.router), ("mlp.assignment", self.scores))
                if part is not None}

    def settled(self) -> "Split":
        """Return the split with the experts that the scores give in the end, and nothing to train."""
        expert = self.expert if self.scores is None else rounded(sinkhorn(self.scores.detach(), COLD))
        return Split(self.router.detach(), None, expert)


def start(step: LayerPass, want: Want, seed: int) -> Split:
    """Return the split of a dense layer from which its training starts."""
    up = step.layer.weights["mlp.up_proj.weight"]
    (f, d), n, generator = up.shape, want.experts, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (START * torch.randn(*shape, generator=generator)).to(up.device).requires_grad_()
    router = draw(n, d)
    if want.split == "dot":
        return Split(router, draw(f, n))
    if want.split == "random":
        return Split(router, None, random_split(f, n, seed).to(up.device))
    if want.split == "kmeans":
        return Split(router, None, kmeans_split(up, n, seed))
    return Split(router, None, coactivation_split(count_together(step.x, step.layer), n))


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return `hard`, with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def members(split: Split, temperature: float) -> torch.Tensor:
    """Return which neuron is of which expert, (f, n) of 0 and 1, with the gradient of the soft assignment."""
    n = len(split.router)
    if split.scores is None:
        return functional.one_hot(split.expert, n).to(split.router)
    soft = sinkhorn(split.scores, temperature)
    return straight_through(functional.one_hot(rounded(soft.detach()), n).to(soft), soft)


class SparsePass(NamedTuple):
    """A pass through a sparse layer: the stream after it y (T, d), the experts taken (T, n) of 0 and 1, and what the
    router is charged: BALANCE n sum_e f_e p_e + Z mean log-sum-exp^2."""

    y: torch.Tensor
    taken: torch.Tensor
    charge: torch.Tensor


def run_split(h: torch.Tensor, layer: Layer, split: Split, temperature: float, top_k: int, cfg: Config) -> SparsePass:
    """Run a dense layer, with its neurons split, on the stream h (B, L, d): y = h' + (silu(gate x) up x * R M') down',
    R (T, n) the experts taken and M (f, n) their neurons, with straight-through gradients."""
    w = layer.weights
    h, x = model_io.run_mixer(h, w, cfg)
    logits = x.to(split.router) @ split.router.T
    p = logits.softmax(-1)
    taken = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0)
    mask = straight_through(taken, p) @ members(split, temperature).T  # (T, f)
    y = h + model_io.linear(model_io.gated(x, w, "mlp") * mask.to(x), w, "mlp.down_proj")
    balance = p.shape[1] * (taken.mean(0) / top_k * p.mean(0)).sum()
    return SparsePass(y, taken, BALANCE * balance + Z * logits.logsumexp(-1).square().mean())


def of_step(step: int, steps: int) -> dict[str, float]:
    """Return what the loss of a step is told, as `distil.train` wants it.

    >>> [round(of_step(step, 2)["temperature"], 3) for step in (0, 1, 2)]
    [1.0, 0.316, 0.1]
    """
    return {"temperature": HOT * (COLD / HOT) ** (step / steps)}


# -------------------------------------------------------------------------------------------------------- the training


def align(model: Model, ids: torch.Tensor, held_out: int, want: Want, plan: distil.Plan, empty: Callable, say: Callable
          ) -> dict[str, Split]:
    """Learn how to split all layers of a dense model end to end on ids (B, L) but for the last `held_out` sequences;
    return each one's split by its name. `empty` and `say` as in `distil.distil`."""
    ids = ids[:len(ids) - held_out]
    cfg, (count, length), splits, of_source = model.config, ids.shape, {}, 1 / (1 + 4 * plan.epochs)
    for step in model.stream(ids, empty):
        splits[step.name] = start(step, want, plan.seed + step.index)
        say(of_source * (step.index + 1) / cfg.num_layers)
    step.layer.unload()
    target, norm = step.y.view(*ids.shape, -1), step.norm
    del step
    layers = {name: model.layer(index) for index, name in enumerate(model.layer_names)}
    head, counts = model.unembedding(), {}

    def loss_of(which: torch.Tensor, temperature: float = HOT) -> torch.Tensor:
        h, charge = model.embed(ids[which]), 0.0
        for name, layer in layers.items():
            passed = run_split(h, layer, splits[name], temperature, want.top_k, cfg)
            h, charge = passed.y.view_as(h), charge + passed.charge / len(layers)
            distil.add_load(counts, name, passed.taken)
        readout = distil.readout_loss(norm(h), norm(target[which]), ids[which].to(h.device), head, plan.kl_weight)
        return (KL + NEXT_TOKEN) * readout + which.numel() * length * charge

    def report(done: int, steps: int, loss: float) -> None:
        say(of_source + (1 - of_source) * done / steps, distil.step_line(done, steps, loss, counts))
    trained = {f"{layer}.{name}": part for layer, split in splits.items() for name, part in split.trained().items()}
    at_once = distil.graph_sequences(cfg, cfg.num_layers, length, plan.memory)
    distil.train(trained, loss_of, count, length, at_once, plan, "dot-moe", report, of_step)
    return {name: split.settled() for name, split in splits.items()}


def align_layers(model: Model, ids: torch.Tensor, held_out: int, want: Want, plan: distil.Plan, empty: Callable,
                 say: Callable) -> dict[str, Split]:
    """Learn how to split the layers of a dense model one after the other, as `align` does all at once."""
    cfg, splits = model.config, {}
    streams = [model.embed(text, empty) for text in ids.tensor_split((len(ids) - held_out,)) if len(text)]
    for steps in distil.apart(model, ids, held_out, empty):
        step, counts = steps[0], {}
        split = align_layer(step, streams[0], start(step, want, plan.seed + step.index), want, plan, cfg,
                            lambda share: say((step.index + share) / cfg.num_layers)).settled()
        for h in streams:
            for part in h.split(max(1, distil.PIECE // h.shape[1])):
                passed = run_split(part, step.layer, split, COLD, want.top_k, cfg)
                part.copy_(passed.y.view_as(part))
                if h is streams[0]:
                    distil.add_load(counts, step.name, passed.taken)
        errors = [distil.mean_error(h.flatten(0, 1), each.y) for h, each in zip(streams, steps)]
        said = ", held out ".join(f"{error:.5f}" for error in errors)
        say((step.index + 1) / cfg.num_layers, f"{step.name}: stream error {said}, {distil.load_line(counts)}")
        splits[step.name] = split
    return splits


def align_layer(step: LayerPass, h: torch.Tensor, split: Split, want: Want, plan: distil.Plan, cfg: Config,
                tick: hodgecover.Tick) -> Split:
    """Train the split of one layer, to bring the stream after it to the dense one's, on h (B, L, d), the stream before
    it; return the split."""
    (count, length, _), target = h.shape, step.y.view_as(h)

    def loss_of(which: torch.Tensor, temperature: float = HOT) -> torch.Tensor:
        passed = run_split(h[which], step.layer, split, temperature, want.top_k, cfg)
        return distil.stream_error(passed.y, target[which].flatten(0, 1)) + len(passed.y) * passed.charge
    at_once = distil.graph_sequences(cfg, 1, length, plan.memory)
    distil.train(split.trained(), loss_of, count, length, at_once, plan, f"dot-moe-{step.name}",
                 lambda done, steps, loss: tick(done / steps), of_step)
    return split


# ---------------------------------------------------------------------------------------------------------- the output


def sparse_config(raw: dict, cfg: Config, experts: int, top_k: int) -> dict:
    """Return the object of config.json of the qwen3_moe model that a qwen3 model becomes."""
    return raw | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
                  "num_experts_per_tok": top_k, "moe_intermediate_size": cfg.dense_width // experts,
                  "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": cfg.head_dim,
                  "output_router_logits": False, "router_aux_loss_coef": BALANCE}


def gate_scale(router: torch.Tensor, norm: torch.Tensor) -> float:
    """Return the power of two that brings the logits of a router (n, d) to about SPREAD, on inputs of mean square 1
    times the norm's weight (d,)."""
    spread = (router * norm.to(router)).square().sum(1).mean().sqrt().item()
    return 2.0 ** round(math.log2(SPREAD / max(spread, SPREAD**2)))


def sparse_tensors(checkpoint: model_io.Checkpoint, splits: dict[str, Split], top_k: int) -> dict[str, Piece]:
    """Return the tensors of the sparse checkpoint by name: expert e of a layer has the rows of its neurons of gate and
    up, and their columns of down times k, bfloat16 for FP8; the router's rows are scaled. All else stays as it is."""
    tensors, load = {}, lru_cache(maxsize=1)(checkpoint.load)
    for name, info in checkpoint.tensors.items():
        match, whole = MATRIX.fullmatch(name), model_io.copied(checkpoint, name)
        if info.dtype == model_io.FP8 and match:
            whole = whole._replace(dtype="BF16")
        if not match:
            tensors[name] = whole
            continue
        layer, part = match.groups()
        router, expert = splits[layer].router, splits[layer].expert
        for e in range(len(router)):
            own = (expert == e).nonzero().flatten()

            def read(name: str = name, own: torch.Tensor = own, dtype: str = whole.dtype) -> list[memoryview]:
                rows = load(name)[:, own] * top_k if ".down_proj." in name else load(name)[own]
                return [common.as_bytes(rows, model_io.DTYPES[dtype])]
            shape = [info.shape[0], len(own)] if part == "down" else [len(own), info.shape[1]]
            tensors[f"{layer}.mlp.experts.{e}.{part}_proj.weight"] = whole._replace(shape=shape, read=read)
        if part == "gate":
            scaled = router * gate_scale(router, checkpoint.load(f"{layer}.post_attention_layernorm.weight"))
            tensors[f"{layer}.mlp.gate.weight"] = common.edited(checkpoint, whole, lambda *_, scaled=scaled: scaled,
                                                                [*router.shape])
    return tensors


def export(model: Model, splits: dict[str, Split], top_k: int, out: Path, files: dict[str, bytes]) -> None:
    """Write the sparse checkpoint of splits by layer name to the folder `out`; `files`, name -> content, lie beside the
    weights."""
    experts = len(next(iter(splits.values())).router)
    config = sparse_config(model.checkpoint.raw_config, model.config, experts, top_k)
    tensors, config = common.in_bfloat16(model.checkpoint, sparse_tensors(model.checkpoint, splits, top_k), config)
    model_io.write_tensors(model.checkpoint, out, tensors, config, files)


# --------------------------------------------------------------------------------------------------------- the command


def sinkhorn_bytes(f: int, n: int) -> int:
    """Return about what the graph of a layer's assignment takes: two matrices (f, n) an iteration, each kept twice."""
    return 4 * 4 * ROUNDS * f * n


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = distil.training_parser(__file__, __doc__, LR, "0.01")
    parser.add_argument("--experts", metavar="N", type=int, required=True, help="experts of a layer")
    parser.add_argument("--top-k", metavar="K", type=int, required=True, help="experts that a token takes")
    parser.add_argument("--split", choices=SPLITS, default="dot", help="how to deal the neurons out [%(default)s]")
    parser.set_defaults(train=[])  # none of the dense model's own weights
    return parser


def check_options(model: Model, args: argparse.Namespace) -> None:
    """Raise InputError for a model that is not dense, and for an option out of range."""
    cfg = model.config
    if cfg.model_type not in common.SPLIT:
        raise InputError(f"{model.checkpoint.path}: its model_type is {cfg.model_type}; must be a dense one: "
                         f"{', '.join(common.SPLIT)}")
    hodgecover.check_range("experts", args.experts, 2, cfg.dense_width)
    if cfg.dense_width % args.experts:
        raise InputError(f"experts {args.experts}: must divide {cfg.dense_width}, the neurons of a layer")
    hodgecover.check_range("top_k", args.top_k, 1, args.experts)
    hodgecover.check_range("epochs", args.epochs, 1, 10**6)
    hodgecover.check_range("lr", args.lr, 0, 100)


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    model = common.open_model(args.checkpoint, args)
    check_options(model, args)
    cache = common.folder_beside(args.out, "dot-moe", model)
    model_io.check_out(model, args.out, cache)
    ids, held_out = distil.read_ids(model, args)
    count = len(ids) - held_out
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"dtype": common.dtype_name(model), "held_out_sequences": held_out}
    entry = model_io.record_entry("dot_moe.py", settings, ids[:count], args.calib, source=model)
    distil.check_memory(model, args, ids.numel(), sinkhorn_bytes(model.config.dense_width, args.experts),
                        "give fewer --experts")
    common.warn_of_width(model.config.dense_width // args.experts)

    bar = model_io.progress_bar()
    want = Want(args.experts, args.top_k, args.split)
    plan = distil.Plan(args.epochs, args.lr, KL / (KL + NEXT_TOKEN), [], args.seed, args.memory, cache,
                       common.work_key(settings, ids, model))
    with common.made(cache, "dot-moe*.safetensors"), model_io.new_folder(args.out) as folder:
        empty = common.stream_maker(model, common.activation_bytes(model, ids.numel()), args.memory, folder)
        way = align_layers if args.layerwise else align
        splits = way(model, ids, held_out, want, plan, empty, partial(distil.tell, bar))
        bar(None)
        export(model, splits, args.top_k, folder, {})
        entry["layers"] = [{"name": name, "experts": [(split.expert == e).nonzero().flatten().tolist()
                                                      for e in range(args.experts)]} for name, split in splits.items()]
        if held_out:
            found = common.compare(model, Model(folder, model.dtype, str(model.device)), ids[count:])
            print(f"held-out KL {found.kl:.4f}, perplexity {found.output_perplexity:.2f} (dense "
                  f"{found.source_perplexity:.2f})")
            entry["held_out"] = [found._asdict()]
        (folder / model_io.RECORD).write_bytes(model_io.record_bytes(model.checkpoint, entry))
    print(f"feed-forward neurons a token meets: {args.top_k * model.config.dense_width // args.experts} of "
          f"{model.config.dense_width}, by {args.split}")
    print(f"output: {args.out}")


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
