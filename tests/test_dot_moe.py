# SPDX-License-Identifier: MIT
"""From dense to sparse: the assignment against its definition, planted experts, and the command."""
import json
import math
import shutil
import weakref
from pathlib import Path

import common
import distil
import dot_moe
import hodgecover
import model_io
import pytest
import refit
import torch
from conftest import (DENSE, PROSE, assert_disk_changes_nothing, assert_refused, assert_survives_kills,
                      contents, named, record, refuse, run, some_ids, with_tokenizer)
from dot_moe import Split, Want
from fake_device import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from model_io import WEIGHTS, Model
from safetensors.torch import load_file, save_file
from torch.nn import functional

QUICK = ["--tokens", 128, "--seq-len", 16, "--dtype", "float32"]  # 8 sequences: a step a pass
MODES = pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_of(**changes: object) -> distil.Plan:
    return distil.Plan(1, 1.0, 2 / 3, [], 0, 10**9)._replace(**changes)


def first_pass(model: Model, ids: torch.Tensor) -> model_io.LayerPass:
    return next(model.stream(ids))


# --------------------------------------------------------------------------------------------------- neurons to experts


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), room=st.integers(1, 6), temperature=st.sampled_from([1.0, 0.3]))
def test_the_soft_assignment_has_its_marginals_and_its_form(seed, n, room, temperature):
    """Columns sum to f / n, rows to 1 as far as 50 rounds bring them; and log M - A / temperature is a sum of a row's
    and a column's number, which is what makes M the maximum."""
    scores = normal(n * room, n, seed=seed)
    soft = dot_moe.sinkhorn(scores, temperature)
    torch.testing.assert_close(soft.sum(0), torch.full((n,), room).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(soft.sum(1), torch.ones(n * room).double(), atol=0,
                               rtol=1e-4 if temperature == 1 else 0.05)  # at 0.3: at most 0.014 off in 3,000 draws
    rest = soft.log() - scores / temperature
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-9


def literal_rounding(values: torch.Tensor) -> list[int]:
    """Entry by entry, the largest first."""
    f, n = values.shape
    expert, room = [None] * f, [f // n] * n
    for at in values.flatten().sort(descending=True, stable=True).indices.tolist():
        if expert[at // n] is None and room[at % n]:
            expert[at // n] = at % n
            room[at % n] -= 1
    return expert


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), room=st.integers(1, 7))
def test_rounding_visits_the_entries_from_the_largest_on(seed, n, room):
    values = normal(n * room, n, seed=seed)
    found = dot_moe.rounded(values)
    assert found.tolist() == literal_rounding(values)
    assert found.bincount(minlength=n).tolist() == [room] * n


def test_a_low_temperature_gives_the_assignment_of_separated_scores():
    """Scores that agree with an assignment of exact capacity: the soft one goes to it, and rounding finds it."""
    expert = torch.tensor([2, 0, 1, 1, 2, 0, 0, 1])[:6].repeat(2)
    expert = torch.arange(12) % 3 if expert.bincount().unique().numel() > 1 else expert
    hard = functional.one_hot(expert, 3).double()
    scores = hard + 0.2 * normal(12, 3)
    far = [(dot_moe.sinkhorn(scores, temperature) - hard).abs().max().item() for temperature in (1.0, 0.1, 0.01)]
    assert far[0] > 0.1 and far[1] < far[0] and far[2] < 1e-6
    for temperature in (1.0, 0.1, 0.01):
        assert torch.equal(dot_moe.rounded(dot_moe.sinkhorn(scores, temperature)), expert)


def test_the_other_ways_find_what_is_planted():
    """k-means, clusters of rows; co-activation, neurons that are active together. Each expert has f / n neurons."""
    planted = torch.randperm(24, generator=torch.Generator().manual_seed(1)) % 4
    rows = 5 * normal(4, 6)[planted] + 0.3 * normal(24, 6, seed=2)
    layer = model_io.Layer(None, None, {"mlp.gate_proj.weight": functional.one_hot(planted, 4).double(),
                                        "mlp.up_proj.weight": torch.ones(24, 4).double()})
    x = torch.eye(4).double().repeat(10, 1) + 0.1 * normal(40, 4).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dot_moe, "ACTIVE", 0.25)
        patch.setattr(distil, "PIECE", 7)
        counts = dot_moe.count_together(x, layer)
    for found in (dot_moe.kmeans_split(rows, 4, 0), dot_moe.coactivation_split(counts, 4)):
        groups = {frozenset((found == e).nonzero().flatten().tolist()) for e in range(4)}
        assert groups == {frozenset((planted == e).nonzero().flatten().tolist()) for e in range(4)}
    rows = normal(24, 2, seed=3) + torch.tensor([2.0, 0.0])
    found = dot_moe.kmeans_split(rows, 4, 0)
    centres = torch.stack([rows[found == e].mean(0) for e in range(4)])
    assert torch.equal(found, dot_moe.rounded(-torch.cdist(rows, centres)))
    assert dot_moe.random_split(24, 4, 0).bincount().tolist() == [6] * 4
    assert not torch.equal(dot_moe.random_split(24, 4, 0), dot_moe.random_split(24, 4, 1))


def test_co_activation_is_greedy():
    """By hand: the busiest neuron, then the most often active with it; then of those that are left."""
    counts = torch.tensor([[5, 1, 4, 0], [1, 6, 2, 3], [4, 2, 4, 0], [0, 3, 0, 3]]).float()
    assert dot_moe.coactivation_split(counts, 2).tolist() == [1, 0, 1, 0]


# ------------------------------------------------------------------------------------------------------ a sparse layer


def materialised(step: model_io.LayerPass, split: Split, top_k: int) -> torch.Tensor:
    """The feed-forward output (T, d) of the k experts that a token takes, each on its own, with unit gates."""
    w, out = step.layer.weights, torch.zeros_like(step.x)
    for e in range(len(split.router)):
        own = split.expert == e
        taken = (step.x @ split.router.T).topk(top_k).indices.eq(e).any(1)
        hidden = functional.silu(step.x @ w["mlp.gate_proj.weight"][own].T) * (step.x @ w["mlp.up_proj.weight"][own].T)
        out += taken[:, None] * (hidden @ w["mlp.down_proj.weight"][:, own].T)
    return out


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_the_masked_layer_is_its_experts_and_all_of_them_are_the_dense_one(top_k):
    """The forward value is that of the hard choices, whatever the temperature."""
    model = Model(DENSE[0], torch.float64)
    step = first_pass(model, some_ids())
    split = Split(normal(8, 32), normal(24, 8, seed=1))
    temperature = 0.7
    hard = Split(split.router, None, dot_moe.rounded(dot_moe.sinkhorn(split.scores, temperature)))
    stream = step.y - model_io.mlp(step.x, step.layer.weights, "mlp")
    for each in (split, hard):
        passed = dot_moe.run_split(step.h, step.layer, each, temperature, top_k, model.config)
        torch.testing.assert_close(passed.y, stream + materialised(step, hard, top_k), rtol=1e-12, atol=1e-12)
        assert (passed.taken.sum(1) == top_k).all() and set(passed.taken.unique().tolist()) <= {0, 1}
    assert top_k < 8 or torch.allclose(passed.y, step.y, rtol=1e-12)


def test_gradients_are_those_of_the_soft_choices():
    """Of the scores, what Sinkhorn's iteration hands on of the mask's; of the router, what the softmax does; the dense
    weights have none."""
    model = Model(DENSE[0], torch.float64)
    step = first_pass(model, some_ids())
    split = Split(normal(8, 32).requires_grad_(), normal(24, 8, seed=1).requires_grad_())
    way, w = normal(36, 32, seed=2), step.layer.weights
    (dot_moe.run_split(step.h, step.layer, split, 0.5, 3, model.config).y * way).sum().backward()

    soft, p = dot_moe.sinkhorn(split.scores, 0.5), (step.x @ split.router.T).softmax(-1)
    members = functional.one_hot(dot_moe.rounded(soft), 8).double().requires_grad_()
    taken = torch.zeros_like(p).scatter(1, p.topk(3).indices, 1.0).requires_grad_()
    hidden = model_io.gated(step.x, w, "mlp") * (taken @ members.T)
    (hidden @ w["mlp.down_proj.weight"].T * way).sum().backward()
    for own, soft_choice, hard in ((split.scores, soft, members), (split.router, p, taken)):
        expected, = torch.autograd.grad(soft_choice, own, hard.grad)
        torch.testing.assert_close(own.grad, expected, rtol=1e-9, atol=1e-12)
        assert own.grad.abs().max() > 1e-4
    assert not any(weight.requires_grad for weight in w.values())


def test_the_router_is_charged_for_imbalance_and_for_large_logits():
    """At even use the balance is its weight, times 1: the least that it can be if use follows probability."""
    model = Model(DENSE[0], torch.float64)
    step = first_pass(model, some_ids())
    expert = torch.arange(24) % 8
    charges = []
    for router in (torch.zeros(8, 32), normal(8, 32, seed=3)):
        passed = dot_moe.run_split(step.h, step.layer, Split(router.double(), None, expert), 1.0, 2, model.config)
        logits = step.x @ router.double().T
        p, z = logits.softmax(-1).mean(0), logits.logsumexp(-1).square().mean()
        f = torch.stack([logits.topk(2).indices.eq(e).any(1).double().mean() / 2 for e in range(8)])
        charges.append((passed.charge - 1e-3 * z).item())
        assert charges[-1] == pytest.approx(1e-2 * 8 * (f * p).sum().item(), rel=1e-9)
    assert charges[0] == pytest.approx(1e-2) and charges[1] > 1e-2


# -------------------------------------------------------------------------------------------------------- the training


def planted(folder: Path, n: int = 4) -> tuple[Model, torch.Tensor]:
    """A dense model of one layer, without attention, whose neurons come in blocks, each for the tokens of its own class
    alone. Returns it, and the block of each neuron (f,)."""
    shutil.copytree(DENSE[1], folder)
    block, dense = torch.randperm(24, generator=torch.Generator().manual_seed(5)) % n, load_file(folder / WEIGHTS)
    mlp = {f"model.layers.0.mlp.{part}_proj.weight": normal(*shape, seed=seed).float()
           for seed, (part, shape) in enumerate((("gate", (24, 32)), ("up", (24, 32)), ("down", (32, 24))))}
    mlp = {name: (0.05 if "down" in name else 0.3) * weight for name, weight in mlp.items()}
    mlp["model.layers.0.mlp.gate_proj.weight"][:, :n] = 4 * functional.one_hot(block, n) - 3.0
    dense |= mlp | {name: torch.ones(32) for name in dense if "layernorm" in name}
    dense["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(32, 48)
    dense["model.norm.weight"] = torch.ones(32)
    dense["model.embed_tokens.weight"][:, :n] = 4.0 * functional.one_hot(torch.arange(96) % n, n)
    save_file({name: weight for name, weight in dense.items() if "layers.1." not in name}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    return Model(folder), block


@pytest.mark.parametrize("way, epochs, found", [(dot_moe.align, 10, 0.85), (dot_moe.align_layers, 5, 1.0)])
def test_planted_experts_are_found(way, epochs, found, tmp_path, monkeypatch):
    """Given a router that tells the classes apart, the neurons go to their own class's expert, layer by layer all of
    them; given the experts, the router learns the classes; and the output is nearly the dense one's."""
    monkeypatch.setattr(dot_moe, "ROUNDS", 10)
    model, block = planted(tmp_path / "dense")
    ids, plan, real = some_ids(32, 16), plan_of(epochs=epochs, lr=0.3, kl_weight=1.0), dot_moe.start

    def learned(out: str, **given: torch.Tensor) -> tuple[Split, float]:
        with monkeypatch.context() as patch:
            patch.setattr(dot_moe, "start", lambda *of: real(*of)._replace(**given))
            splits = way(model, ids, 0, Want(4, 1, "dot"), plan, torch.empty, lambda *_: None)
        dot_moe.export(model, splits, 1, tmp_path / out, {})
        return splits["model.layers.0"], common.compare(model, Model(tmp_path / out), ids).kl
    split, kl = learned("given-router", router=(0.1 * torch.eye(4, 32)).requires_grad_())
    assert sum(block[split.expert == e].bincount().max().item() for e in range(4)) >= found * 24
    _, random = learned("random", scores=None, expert=dot_moe.random_split(24, 4, 0))
    assert kl < 0.5 * random
    _, kl = learned("given-experts", scores=None, expert=block)
    assert kl < 0.01 * random


def caught_loss(way, model: Model, ids: torch.Tensor, want: Want) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of the first step of a training on ids (B, L), at temperature 1, and what is trained."""
    found = []

    def train(weights, loss_of, count, length, *_):
        found.append((loss_of(torch.arange(count)).item() / (count * length), weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "train", train)
        way(model, ids, 0, want, plan_of(), torch.empty, lambda *_: None)
    return found[0]


def test_the_losses_by_their_definitions(tmp_path):
    """2 KL + the next token's + what the routers are charged, a mean over layers; layer by layer the stream's error."""
    model, ids, want = Model(DENSE[0], torch.float64), some_ids(), Want(8, 3, "random")
    splits, charges, h = {}, [], model.embed(ids)
    for step in model.stream(ids):
        splits[step.name] = dot_moe.start(step, want, step.index).settled()
        passed = dot_moe.run_split(h, step.layer, splits[step.name], 1.0, 3, model.config)
        h, charges = passed.y.view_as(h), [*charges, passed.charge.item()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dot_moe, "SPREAD", 2.0**-16)
        dot_moe.export(model, splits, 3, tmp_path / "out", {})
    output = Model(tmp_path / "out", torch.float64)
    wanted = 2 * common.compare(model, output, ids).kl + math.log(output.perplexity(ids)) + sum(charges) / 2
    assert caught_loss(dot_moe.align, model, ids, want)[0] == pytest.approx(wanted, rel=1e-4)
    first, sparse = (next(each.stream(ids)).y for each in (model, output))
    wanted = (sparse - first).square().sum(1).div(first.square().sum(1)).mean().item() + charges[0]
    assert caught_loss(dot_moe.align_layers, model, ids, want)[0] == pytest.approx(wanted, rel=1e-4)


def test_a_layer_learns_at_the_inputs_that_the_sparse_layers_give(tmp_path, monkeypatch):
    model, ids, seen, real = Model(DENSE[0], torch.float64), some_ids(), [], dot_moe.align_layer
    monkeypatch.setattr(dot_moe, "align_layer", lambda step, h, *more: seen.append(h.clone()) or real(step, h, *more))
    monkeypatch.setattr(dot_moe, "SPREAD", 2.0**-16)
    splits = dot_moe.align_layers(model, ids, 0, Want(8, 3, "random"), plan_of(), torch.empty, lambda *_: None)
    dot_moe.export(model, splits, 3, tmp_path / "out", {})
    for h, step in zip(seen, Model(tmp_path / "out", torch.float64).stream(ids), strict=True):
        torch.testing.assert_close(h, step.h, rtol=1e-3, atol=1e-3)


def test_the_temperature_falls_over_the_steps(tmp_path, monkeypatch):
    seen, real = [], dot_moe.sinkhorn
    monkeypatch.setattr(dot_moe, "sinkhorn", lambda scores, temperature: seen.append(temperature) or real(scores, 1.0))
    for way in (dot_moe.align, dot_moe.align_layers):
        way(Model(DENSE[0]), some_ids(8), 0, Want(4, 2, "dot"), plan_of(epochs=4), torch.empty, lambda *_: None)
    by_step = [10 ** (-step / 4) for step in range(4)]
    together = [temperature for temperature in by_step for _ in range(2)] + [0.1, 0.1]
    assert seen == pytest.approx(together + 2 * [*by_step, 0.1])


# ---------------------------------------------------------------------------------------------------------- the output


def random_splits(model: Model, n: int, size: float = 0.1) -> dict[str, Split]:
    return {name: Split(size * normal(n, 32, seed=index).float(), None, dot_moe.random_split(24, n, index))
            for index, name in enumerate(model.layer_names)}


def test_gates_in_the_format_are_unit_gates_but_for_the_scale(tmp_path, monkeypatch):
    """The file's gates are softmax(scale W x) over the k taken experts: their distance from 1 / k, and that of the
    streams from unit gates, falls with the logits' spread, which is what was asked for; the same experts are taken."""
    model, ids, far = Model(DENSE[0], torch.float64), some_ids(), {}
    splits = random_splits(model, 8, 1.0)
    for power in (-2, -6, -10):
        monkeypatch.setattr(dot_moe, "SPREAD", 2.0**power)
        dot_moe.export(model, splits, 4, tmp_path / str(power), {})
        dense, step = first_pass(model, ids), first_pass(Model(tmp_path / str(power), torch.float64), ids)
        split = splits[step.name]._replace(router=splits[step.name].router.double())
        unit = dot_moe.run_split(dense.h, dense.layer, split, 1.0, 4, model.config)
        assert torch.equal(step.gates > 0, unit.taken > 0)
        assert 0.5 < (step.x @ step.layer.router.T).std() / 2.0**power < 2
        gates = (4 * step.gates[step.gates > 0] - 1).abs().max().item()
        far[power] = (gates, (step.y - unit.y).abs().max().item())
    for i in range(2):
        assert 8 < far[-2][i] / far[-6][i] < 32 and 12 < far[-6][i] / far[-10][i] < 20
    assert far[-10][0] < 0.005


def test_the_scale_of_a_router_is_a_power_of_two_and_knows_the_norm_before_it():
    """On inputs of mean square 1, times the norm's weight."""
    router, norm, x = normal(8, 512), normal(512, seed=1), normal(4000, 512, seed=2)
    scale = dot_moe.gate_scale(router, norm)
    assert math.log2(scale).is_integer() and dot_moe.gate_scale(4 * router, norm) == scale / 4
    assert 0.7 < (x * norm @ router.T * scale).std() / dot_moe.SPREAD < 1.42
    assert dot_moe.gate_scale(router, 8 * norm) == scale / 8 and dot_moe.gate_scale(0 * router, norm) < 2**11


def test_all_experts_are_the_dense_model(tmp_path):
    for path in DENSE:
        model, ids = Model(path), some_ids()
        dot_moe.export(model, random_splits(model, 8), 8, tmp_path / path.name, {})
        torch.testing.assert_close(Model(tmp_path / path.name).logits(ids), model.logits(ids), rtol=0, atol=0.01)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def dense(tmp_path, monkeypatch) -> list:
    """A dense checkpoint of 24 neurons a layer, and quick options; few rounds of Sinkhorn's iteration."""
    monkeypatch.setattr(dot_moe, "ROUNDS", 5)
    (tmp_path / "text.txt").write_text(PROSE)
    (tmp_path / "held-out.txt").write_text(PROSE[::-1])
    return [with_tokenizer(DENSE[0], tmp_path / "dense"), "--experts", 8, "--top-k", 4, "--calib",
            tmp_path / "text.txt", *QUICK]


@MODES
@pytest.mark.parametrize("path", DENSE, ids=lambda path: path.name)
def test_the_output_has_each_neuron_once_and_all_else_as_it_was(path, dense, mode, tmp_path, capsys):
    """Rows of gate and up bit for bit, columns of down times k; the record tells which; the source is untouched; the
    same command gives the same bytes."""
    dense[0] = with_tokenizer(path, tmp_path / "source")
    given_files = contents(dense[0])
    for name in ("out", "again"):
        assert run(dot_moe, *dense, "--out", tmp_path / name, "--epochs", 2, "--eval", tmp_path / "held-out.txt",
                   *mode) == 0
    assert contents(dense[0]) == given_files and contents(tmp_path / "out") == contents(tmp_path / "again")
    model, output, entry = Model(dense[0]), Model(tmp_path / "out"), record(tmp_path / "out")
    assert "feed-forward neurons a token meets: 12 of 24, by dot" in capsys.readouterr().out
    for layer, told in zip(model.layer_names, entry["layers"], strict=True):
        assert told["name"] == layer and sorted(sum(told["experts"], [])) == [*range(24)]
        old = {part: model.checkpoint.load(f"{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")}
        for e, own in enumerate(told["experts"]):
            new = {part: output.checkpoint.load(f"{layer}.mlp.experts.{e}.{part}_proj.weight") for part in old}
            assert torch.equal(new["gate"], old["gate"][own]) and torch.equal(new["up"], old["up"][own])
            assert torch.equal(new["down"], 4 * old["down"][:, own]) and len(own) == 3
    for name, info in model.checkpoint.tensors.items():
        if ".mlp." not in name:
            assert torch.equal(model.checkpoint.load(name), output.checkpoint.load(name))
            assert output.checkpoint.tensors[name].file == info.file
    assert entry["command"] == "dot_moe.py"
    assert entry["source"]["num_experts"] == 0 and entry["source"]["fingerprint"] == model.checkpoint.fingerprint()
    assert {"experts": 8, "top_k": 4, "split": "dot", "layerwise": bool(mode)}.items() <= entry["settings"].items()
    ids = model_io.sequences(model.encode([PROSE[::-1]]), 16)
    found = common.compare(model, output, common.evenly_spaced(ids, 512))
    assert entry["held_out"][0]["kl"] == pytest.approx(found.kl, abs=1e-9)
    small_files = {name for name in given_files if ".safetensors" not in name}
    assert {name for name in contents(tmp_path / "out") if ".safetensors" not in name} == small_files | {
        "hodgecover.json"}


@MODES
@pytest.mark.parametrize("split", ["random", "kmeans", "coactivation"])
def test_other_ways_train_the_router_alone(dense, split, mode, tmp_path):
    assert run(dot_moe, *dense, "--out", tmp_path / "out", "--split", split, *mode) == 0
    model, told = Model(dense[0], torch.float32), record(tmp_path / "out")["layers"]
    ids = hodgecover.calibration_ids(model, [tmp_path / "text.txt"], 128, 16)
    for step, layer in zip(model.stream(ids), told, strict=True):
        expert = dot_moe.start(step, Want(8, 4, split), 42 + step.index).expert
        assert [(expert == e).nonzero().flatten().tolist() for e in range(8)] == layer["experts"]
        start = dot_moe.start(step, Want(8, 4, split), 42 + step.index).router
        router = Model(tmp_path / "out").checkpoint.load(f"{step.name}.mlp.gate.weight")
        assert 0.1 < functional.cosine_similarity(router, start).mean() < 0.999


@MODES
def test_to_watch_held_out_text_changes_no_weight(dense, mode, tmp_path):
    for name, options in (("plain", []), ("watched", ["--eval", tmp_path / "held-out.txt"])):
        assert run(dot_moe, *dense, "--out", tmp_path / name, "--epochs", 2, *options, *mode) == 0
    plain, watched = ({file: content for file, content in contents(tmp_path / name).items() if ".safetensors" in file}
                      for name in ("plain", "watched"))
    assert plain == watched and plain


@MODES
def test_a_killed_run_continues_to_the_same_bytes(dense, mode, tmp_path, monkeypatch):
    """Then the folder of saved steps goes."""
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0)
    assert_survives_kills(monkeypatch, (distil, "add_gradient"), 3 * (2 if mode else 1), dot_moe, *dense, "--epochs", 3,
                          *mode, folder=tmp_path)
    assert not (tmp_path / "out-dot-moe").exists()


def test_layerwise_has_one_layer_in_memory(dense, monkeypatch):
    held, real_layer, real_train, trained = weakref.WeakSet(), Model.layer, distil.train, []

    def watched(self, index):
        assert not any(layer.weights for layer in held)
        layer = real_layer(self, index)
        held.add(layer)
        return layer

    def train(weights, *given):
        assert sum(bool(layer.weights) for layer in held) == 1
        trained.append({name: weight.shape for name, weight in weights.items()})
        return real_train(weights, *given)
    monkeypatch.setattr(Model, "layer", watched)
    monkeypatch.setattr(distil, "train", train)
    assert run(dot_moe, *dense, "--out", dense[0].with_name("out"), "--layerwise") == 0
    assert trained == [{"mlp.gate.weight": (8, 32), "mlp.assignment": (24, 8)}] * 2


@MODES
def test_streams_beyond_the_memory_lie_on_disk_and_change_nothing(mode, dense, tmp_path, monkeypatch):
    assert_disk_changes_nothing(monkeypatch, dot_moe, *dense, *mode, folder=tmp_path)


@pytest.mark.parametrize("options", [["--layerwise"], ["--split", "kmeans"], ["--split", "coactivation"], []],
                         ids=["layerwise", "kmeans", "coactivation", "end-to-end"])
def test_on_another_device(dense, options, tmp_path, monkeypatch):
    monkeypatch.setattr(dot_moe, "SWEEPS", 2)
    for device in ("fake", "cpu"):
        with Accelerator(), torch.autograd.set_multithreading_enabled(False):  # the mode is this thread's
            assert run(dot_moe, *dense, "--experts", 3, "--top-k", 1, "--tokens", 32, "--device", device, "--out",
                       tmp_path / device, *options) == 0
    assert record(tmp_path / "fake")["layers"] == record(tmp_path / "cpu")["layers"]


def test_the_two_ends_meet(dense, tmp_path):
    """hodgecover.py drops experts of the output; distil.py and refit.py bring it to the dense model; the history goes
    on."""
    source, _, _, _, _, *options = dense
    assert run(dot_moe, *dense, "--out", tmp_path / "moe") == 0
    assert run(hodgecover, tmp_path / "moe", "--keep", 6, *options, "--out", tmp_path / "few") == 0
    assert run(refit, source, tmp_path / "few", *options, "--out", tmp_path / "fit") == 0
    assert run(distil, source, tmp_path / "fit", *options, "--lr", 0.005, "--epochs", 3, "--eval",
               tmp_path / "text.txt", "--out", tmp_path / "trained") == 0
    history = json.loads((tmp_path / "trained" / "hodgecover.json").read_text())["history"]
    assert [entry["command"] for entry in history] == ["dot_moe.py", "hodgecover.py", "refit.py", "distil.py"]
    assert all(layer["after"] < layer["before"] for layer in history[2]["output_error"])
    before, after = (found["kl"] for found in history[3]["held_out"])
    assert after < before


@pytest.mark.parametrize("change, says", [
    ({"num_experts": 16, "moe_intermediate_size": 24}, "has 384 neurons in the experts of a layer"),
    ({"model_type": "olmoe"}, "its family is olmoe; must be qwen3_moe")])
def test_what_cannot_be_of_the_dense_model_is_refused(change, says, tmp_path, capsys):
    """Too many neurons; another family."""
    path = tmp_path / "moe"
    shutil.copytree(named("olmoe-plain" if "model_type" in change else "qwen3-plain-tied"), path)
    other = Model(path)
    assert other.config.num_experts * other.config.expert_width == 128
    assert_refused(capsys, run(distil, DENSE[0], path, "--out", tmp_path / "out"), says.replace("384", "128"))


@pytest.mark.parametrize("options, says", [
    (["--experts", 7], "--experts 7: must divide 24"), (["--experts", 1], "--experts 1: must be from 2 to 24"),
    (["--experts", 48], "--experts 48: must be"), (["--top-k", 9], "--top-k 9: must be from 1 to 8"),
    (["--top-k", 0], "--top-k 0: must be"), (["--split", "moefy"], "invalid choice"),
    (["--epochs", 0], "--epochs 0: must be"), (["--lr", -1], "--lr -1.0: must be"), (["--lr", "nan"], "--lr nan: must"),
    (["--tokens", 1], "--tokens 1: must be"), (["--seed", -1], "--seed -1: must be"),
    (["--eval", "nowhere"], "nowhere: cannot be read"), (["--out", "DENSE/out"], "lies in the checkpoint"),
    (["--out", "DENSE"], "lies in the checkpoint"), (["--out", "/"], "--out /: / is no folder that what is done"),
])
def test_bad_input_gets_one_line_before_the_work(tmp_path, capsys, monkeypatch, options, says):
    (tmp_path / "text.txt").write_text(PROSE)
    dense = with_tokenizer(DENSE[0], tmp_path / "dense")
    monkeypatch.setattr(Model, "layer", refuse)
    options = [str(option).replace("DENSE", str(dense)) for option in options]
    before = contents(tmp_path)
    assert_refused(capsys, run(dot_moe, dense, "--experts", 8, "--top-k", 4, "--calib", tmp_path / "text.txt", *QUICK,
                               "--out", tmp_path / "out", *options), says)
    assert contents(tmp_path) == before


def test_a_width_that_stock_products_refuse_is_said(dense, tmp_path, capsys):
    for experts, says in ((8, "width 3: no multiple of 8"), (3, "")):
        assert run(dot_moe, *dense, "--experts", experts, "--top-k", 2, "--split", "random", "--out",
                   tmp_path / str(experts)) == 0
        said = capsys.readouterr().err
        assert says in said and bool(said) == bool(says)


def test_a_sparse_checkpoint_is_refused(tmp_path, capsys):
    path = named("qwen3-dense-first")
    assert_refused(capsys, run(dot_moe, path, "--experts", 2, "--top-k", 1, "--out", tmp_path / "out"),
                   f"{path}: its model_type is qwen3_moe; must be a dense one: qwen3")


@pytest.mark.parametrize("mode, says", [([], "give --layerwise"), (["--layerwise"], "give fewer --experts")])
def test_what_does_not_fit_is_refused_before_the_work(mode, says, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "available_memory", lambda device: 10**5)
    monkeypatch.setattr(Model, "stream", refuse)
    assert_refused(capsys, run(dot_moe, *dense, "--out", tmp_path / "out", *mode), says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-dot-moe").exists()
