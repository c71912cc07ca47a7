# SPDX-License-Identifier: MIT
"""Distillation: gradients against finite differences, losses in closed form, and the command on every family."""
import argparse
import json
import math
import shutil
import weakref
from pathlib import Path

import baselines
import common
import distil
import heapr
import hodgecover
import model_io
import pytest
import refit
import torch
import wanda
from conftest import (KINDS, PROSE, assert_disk_changes_nothing, assert_refused, assert_survives_kills, contents,
                      named, record, refuse, run, some_ids, with_tokenizer)
from fake_device import Accelerator
from model_io import InputError, Model
from safetensors.torch import load_file

QUICK = ["--tokens", 128, "--seq-len", 16, "--dtype", "float32"]  # 8 sequences: a step a pass


def plan_of(**changes: object) -> distil.Plan:
    return distil.Plan(1, 0.02, 1.0, [*distil.PARTS], 0, 10**9)._replace(**changes)


def perturbed(source: Path, folder: Path, size: float = 0.3, layers: str = "layers.") -> Model:
    """A copy of a checkpoint, float64 products, whose matrices in these layers have noise of this relative size."""
    shutil.copytree(source, folder)
    model, generator = Model(folder, torch.float64), torch.Generator().manual_seed(1)
    for name in model.layer_names[:model.config.num_layers]:
        if layers in name:
            weights = distil.layer_weights(model.layer(model.layer_names.index(name)))
            noise = {part: size * weight.std() * torch.randn(weight.shape, generator=generator)
                     for part, weight in weights.items() if weight.dim() > 1}
            common.store(model, name, {part: weights[part] + change for part, change in noise.items()})
    return model


@pytest.fixture
def slope_of(monkeypatch):
    """A function that gives what a training would work with: (weights with gradients, a function that adds the mean
    gradient of some sequences to theirs, and returns the loss)."""
    def caught(start, source, output, ids, plan):
        found = []

        def train(weights, loss_of, count, length, at_once, *_):
            found.append((weights, lambda which: distil.add_gradient(loss_of, which, at_once, len(which) * length)))
        with monkeypatch.context() as patch:
            patch.setattr(distil, "train", train)
            for _ in start(source, output, ids, 0, plan, torch.empty, lambda *_: None) or ():
                pass
        return found
    return caught


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
@pytest.mark.parametrize("start", [distil.distil, distil.distil_layers], ids=["end-to-end", "layerwise"])
def test_the_gradient_of_each_part_is_that_of_finite_differences(path, start, slope_of, tmp_path):
    """Along a random direction in the weights of each part; routing stands still over the step."""
    source, output, which = Model(path, torch.float64), perturbed(path, tmp_path / "ckpt"), torch.arange(3)
    generator, seen = torch.Generator().manual_seed(2), set()
    for weights, slope in slope_of(start, source, output, some_ids(), plan_of(kl_weight=0.7)):
        slope(which)
        gradient = {key: weight.grad.clone() for key, weight in weights.items()}
        for part in distil.PARTS:
            moved = {key: torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                     for key, weight in weights.items() if distil.part_of(key) == part}
            if not moved:
                continue
            expected = sum((gradient[key] * way).sum().item() for key, way in moved.items())
            losses = []
            for step in (1e-6, -2e-6):
                for key, way in moved.items():
                    weights[key].detach().add_(step * way)
                losses.append(slope(which))
            for key, way in moved.items():
                weights[key].detach().add_(1e-6 * way)
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=2e-5, abs=1e-7), part
            seen.add(part)
    assert seen == {*distil.PARTS}


def test_the_gradient_is_that_of_one_graph_however_it_is_cut(slope_of, tmp_path):
    source, output = Model(named("olmoe-plain"), torch.float64), perturbed(named("olmoe-plain"), tmp_path / "ckpt")
    found = []
    for memory in (1, 10**9):
        (weights, slope), = slope_of(distil.distil, source, output, some_ids(), plan_of(memory=memory))
        loss = slope(torch.arange(3))
        found.append((loss, {key: weight.grad for key, weight in weights.items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
def test_no_slope_where_the_student_is_the_source(path, slope_of, tmp_path):
    source, ids = Model(path, torch.float64), some_ids()
    for kl_weight, start in ((1.0, distil.distil), (1.0, distil.distil_layers), (0.0, distil.distil)):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(path, tmp_path / "copy")
        output, largest = Model(tmp_path / "copy", torch.float64), 0.0
        for weights, slope in slope_of(start, source, output, ids, plan_of(kl_weight=kl_weight)):
            loss = slope(torch.arange(len(ids)))
            largest = max(largest, *(weight.grad.abs().max().item() for weight in weights.values()))
        if kl_weight:
            assert abs(loss) < 1e-12 and largest < 1e-12
        else:  # the loss of the next token alone
            assert loss == pytest.approx(math.log(source.perplexity(ids)), rel=1e-12) and largest > 1e-4


def test_the_losses_by_their_definitions(slope_of, tmp_path):
    path, ids = named("qwen2-renormalised"), some_ids()
    source, output = Model(path, torch.float64), perturbed(path, tmp_path / "ckpt")
    (_, slope), = slope_of(distil.distil, source, output, ids, plan_of())
    assert slope(torch.arange(3)) == pytest.approx(common.compare(source, output, ids).kl, rel=1e-10)
    (_, slope), = slope_of(distil.distil, source, output, ids, plan_of(kl_weight=0.25))
    wanted = 0.25 * common.compare(source, output, ids).kl + 0.75 * math.log(output.perplexity(ids))
    assert slope(torch.arange(3)) == pytest.approx(wanted, rel=1e-10)
    y, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert distil.stream_error(y, target).item() == pytest.approx(16 / 9 + 5 / 4)
    assert distil.mean_error(y, target) == pytest.approx((16 / 9 + 5 / 4) / 2) and distil.mean_error(y, y) == 0


# ------------------------------------------------------------------------------------------------------- the optimiser


def test_a_step_is_in_units_of_a_matrix(monkeypatch):
    """Adam's first step moves each weight by the learning rate, whatever its gradient; a matrix ten times as large
    moves ten times as far."""
    weights = {"a": torch.tensor([[3.0, -4.0]]), "b": torch.tensor([[30.0, -40.0]]), "zero": torch.zeros(1, 2)}
    start = {name: weight.clone() for name, weight in weights.items()}
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}

    def loss_of(which):
        return sum((weight * torch.tensor([[0.1, -0.2]])).sum() for weight in weights.values())
    distil.train(weights, loss_of, 1, 1, 1, plan_of(lr=0.1), "", lambda *_: None)
    for name, unit in (("a", 12.5**0.5), ("b", 1250**0.5), ("zero", distil.SMALLEST)):
        moved = weights[name].detach() - start[name]
        torch.testing.assert_close(moved, 0.1 * unit * torch.tensor([[-1.0, 1.0]]), rtol=1e-4, atol=1e-6)


def test_the_steps_are_adam_s_by_its_formula():
    """(Kingma and Ba, algorithm 1), with the gradient clipped to norm 1, warm-up and cosine; quadratic loss."""
    generator = torch.Generator().manual_seed(0)
    start, targets = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (40, 2, 3)))
    weight = start.clone().requires_grad_()
    plan = plan_of(lr=0.1, epochs=2)

    def loss_of(which):
        return (weight - targets[which]).square().sum() * (3 if 0 in which else 0.01)
    distil.train({"w": weight}, loss_of, 40, 2, 3, plan, "", lambda *_: None)
    plain, m, v, unit = start.clone(), 0.0, 0.0, start.square().mean().sqrt()
    steps = distil.batches(40, plan)
    for t, which in enumerate(steps, 1):
        scales = [3 if 0 in part else 0.01 for part in which.split(3) for _ in part]
        g = sum(2 * scale * (plain - targets[i]) for i, scale in zip(which.tolist(), scales)) / (2 * len(which))
        g = g / max(1, g.norm())
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        rate = t / 1 if t <= 1 else (1 + math.cos(math.pi * (t - 2) / (len(steps) - 1))) / 2
        plain = plain - 0.1 * unit * rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    assert len(steps) == 10
    torch.testing.assert_close(weight.detach(), plain, rtol=1e-4, atol=1e-6)


def test_each_pass_sees_every_sequence_once_in_another_order():
    steps = distil.batches(20, plan_of(epochs=2))
    assert [len(step) for step in steps] == [8, 8, 4] * 2
    passes = torch.cat(steps[:3]).tolist(), torch.cat(steps[3:]).tolist()
    assert sorted(passes[0]) == sorted(passes[1]) == [*range(20)] and passes[0] != passes[1]
    assert torch.equal(steps[0], distil.batches(20, plan_of())[0])
    assert not torch.equal(steps[0], distil.batches(20, plan_of(seed=1))[0])


def test_the_load_of_the_worst_layer_is_told():
    counts = {}
    distil.add_load(counts, "even", torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]))
    distil.add_load(counts, "uneven", torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    distil.add_load(counts, "uneven", torch.tensor([[0.5, 0.0, 0.5, 0.0]]))
    distil.add_load(counts, "dense", None)
    assert distil.load_line(counts) == "load: busiest expert 2.0 times an even share, 1 idle" and not counts


# ------------------------------------------------------------------------------------------------------ what it brings


def test_a_planted_perturbation_comes_back(tmp_path):
    """End to end, the KL; layer by layer, the error of each stream, and no more of the KL than that gives."""
    ids, source = some_ids(32, 16), Model(named("olmoe-plain"))
    perturbed(named("olmoe-plain"), tmp_path / "ckpt", 0.1)
    before = common.compare(source, Model(tmp_path / "ckpt"), ids).kl
    plan = plan_of(epochs=10, lr=0.01)
    for start in (distil.distil, distil.distil_layers):
        shutil.copytree(tmp_path / "ckpt", tmp_path / start.__name__)
        output = Model(tmp_path / start.__name__)
        layers = list(start(source, output, ids, 0, plan, torch.empty, lambda *_: None) or ())
        assert all(layer.after < 0.5 * layer.before for layer in layers)
        assert common.compare(source, Model(tmp_path / start.__name__), ids).kl < 0.35 * before


@pytest.mark.parametrize("name", ["olmoe-sharded", "qwen3_5-text"])
def test_a_layer_that_gets_worse_keeps_its_weights(name, tmp_path):
    """At an absurd learning rate, bit for bit; what it gives goes on into the next layer."""
    source, ids = Model(named(name)), some_ids()
    perturbed(named(name), tmp_path / "ckpt")
    given_files, output = contents(tmp_path / "ckpt"), Model(tmp_path / "ckpt")
    plan = plan_of(lr=1.0, epochs=4)
    for number, layer in enumerate(distil.distil_layers(source, output, ids, 1, plan, torch.empty, lambda *_: None)):
        assert layer.before == layer.after and layer.held_out_before == layer.held_out_after
        streams = [next(step.y for step in model.stream(ids) if step.index == number) for model in (output, source)]
        errors = [distil.mean_error(*parts) for parts in zip(*(y.tensor_split((24,)) for y in streams))]
        assert errors == pytest.approx([layer.after, layer.held_out_after], rel=1e-5)
    assert contents(tmp_path / "ckpt") == given_files


def test_held_out_text_is_watched_and_not_trained_on(slope_of, monkeypatch, tmp_path):
    source, output = (perturbed(named("olmoe-plain"), tmp_path / name, size) for name, size in (("a", 0.0), ("b", 0.1)))
    ids, lines, seen, real = some_ids(12), [], [], distil.add_gradient

    def watched(loss_of, which, *more):
        seen.extend(which.tolist())
        return real(loss_of, which, *more)
    monkeypatch.setattr(distil, "add_gradient", watched)
    distil.distil(source, output, ids, 3, plan_of(epochs=2), torch.empty, lambda share, line="": lines.append(line))
    assert sorted(seen) == sorted([*range(9)] * 2)
    last = [line for line in lines if line][-1]
    assert float(last.split("held-out KL ")[1]) == pytest.approx(common.compare(source, output, ids[9:]).kl, abs=1e-4)


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def half(small, tmp_path) -> list:
    """(source, a checkpoint of half of its experts) and quick options."""
    assert run(baselines, small, "--keep", 4, "--method", "reap", "--out", tmp_path / "half", "--calib",
               tmp_path / "text.txt", "--tokens", 64, "--seq-len", 32) == 0
    (tmp_path / "held-out.txt").write_text(PROSE[::-1])
    return [small, tmp_path / "half", "--calib", tmp_path / "text.txt", *QUICK]


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_every_family(family, tmp_path, mode, capsys):
    """After experts were dropped and made narrower: the KL falls; names, shapes and dtypes stay; embedding, head,
    vision tower and multi-token head stay bit for bit."""
    text, ckpt = tmp_path / "text.txt", tmp_path / "few"
    keep = max(4, Model(family).config.top_k)
    assert run(baselines, family, "--keep", keep, "--method", "reap", "--out", ckpt, "--calib", text, *QUICK) == 0
    given_files = contents(family), contents(ckpt)
    assert run(distil, family, ckpt, "--out", tmp_path / "out", "--calib", text, *QUICK, "--epochs", 3, "--lr", 0.005,
               "--eval", text, *mode) == 0
    said, model = capsys.readouterr().out, Model(tmp_path / "out")
    entry, mtp = record(tmp_path / "out"), [name for name in model.layer_names if name.startswith("mtp.")]
    before, after = (row["kl"] for row in entry["held_out"])
    assert after < before and ("the multi-token head stays as it is" in said) == bool(mtp)
    assert [layer["name"] for layer in entry.get("stream_error", [])] == (
        model.layer_names[:model.config.num_layers] if mode else [])
    assert all(layer["after"] < layer["before"] or layer["before"] == 0 for layer in entry.get("stream_error", []))
    assert (contents(family), contents(ckpt)) == given_files
    changed = set()
    for file in model.checkpoint.metadata:
        old, new = load_file(ckpt / file), load_file(tmp_path / "out" / file)
        assert {name: (each.shape, each.dtype) for name, each in old.items()} == \
            {name: (each.shape, each.dtype) for name, each in new.items()}
        changed |= {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all("layers." in name or name == f"{model.prefix}norm.weight" for name in changed)
    assert not any(name.startswith(("mtp.", "model.visual")) for name in changed)
    assert {distil.part_of(name) for name in changed} == {*distil.PARTS}


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_to_watch_held_out_text_changes_no_weight(mode, half, tmp_path):
    assert run(distil, *half, "--out", tmp_path / "plain", "--epochs", 2, *mode) == 0
    assert run(distil, *half, "--out", tmp_path / "watched", "--epochs", 2, "--eval", tmp_path / "held-out.txt",
               *mode) == 0
    plain, watched = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
@pytest.mark.parametrize("parts", [["router"], ["experts"], ["norms", "attention"]])
def test_only_the_named_parts_are_trained(parts, mode, half, tmp_path):
    assert run(distil, *half, "--out", tmp_path / "out", "--train", *parts, *mode) == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (half[1], tmp_path / "out"))
    assert {distil.part_of(name) for name in old if not torch.equal(old[name], new[name])} == {*parts}


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_pruned_weights_stay_pruned(mode, half, tmp_path):
    """And the others of their matrices move."""
    source, ckpt, *options = half
    assert run(wanda, ckpt, "--rate", 0.5, "--out", tmp_path / "sparse", "--calib", tmp_path / "text.txt", *QUICK) == 0
    assert run(distil, source, tmp_path / "sparse", "--out", tmp_path / "out", *options, *mode) == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "out"))
    experts = [name for name in old if ".experts." in name]
    assert experts and all(torch.equal(old[name] == 0, new[name] == 0) for name in experts)
    assert not any(torch.equal(old[name], new[name]) for name in experts)


def test_zeros_are_kept_by_matrix():
    """Of a stack, those of a matrix of which more than 1% are 0; none of a bias, nor of other parts."""
    stack = torch.ones(3, 10, 20)
    stack[0, 0, :3] = stack[1, 0, 0] = 0
    plain = stack[0].clone()
    weights = {"mlp.experts.up": stack, "mlp.up_proj.weight": plain, "mlp.shared_expert.up_proj.weight": stack[2],
               "self_attn.q_proj.weight": plain}
    (one, kept), (two, alone) = distil.zeros_to_keep(weights)
    assert one is stack and two is plain and torch.equal(alone, plain != 0)
    assert torch.equal(kept[0], stack[0] != 0) and kept[1:].all()


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_a_layer_without_the_part_is_left_alone(mode, tmp_path):
    """A dense layer has no router."""
    source = with_tokenizer(named("qwen2-dense-between"), tmp_path / "source")
    (tmp_path / "text.txt").write_text(PROSE)
    options = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(baselines, source, "--keep", 4, "--method", "reap", "--out", tmp_path / "few", *options) == 0
    assert run(distil, source, tmp_path / "few", "--out", tmp_path / "out", "--train", "router", *options, *mode) == 0


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_a_loss_that_is_not_finite_ends_it_and_is_not_saved(mode, half, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0)
    real, losses = distil.add_gradient, iter([1.0, float("nan")])
    monkeypatch.setattr(distil, "add_gradient", lambda *given: real(*given) * next(losses))
    capsys.readouterr()
    assert run(distil, *half, "--out", tmp_path / "out", "--epochs", 3, *mode) == 2
    assert "step 2 of 3: the loss or its gradient is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and len([*(tmp_path / "out-distil").iterdir()]) == 1
    monkeypatch.setattr(distil, "add_gradient", real)
    assert run(distil, *half, "--out", tmp_path / "out", "--epochs", 2, *mode) == 0  # another run
    assert not (tmp_path / "out-distil").exists()  # the other's steps go, too


def test_weights_that_are_not_finite_are_the_checkpoint_s_fault(half, tmp_path, capsys):
    model = Model(half[1])
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    common.overwrite(model.checkpoint, name, model.checkpoint.load(name) * torch.nan)
    for mode in ([], ["--layerwise"]):
        capsys.readouterr()
        assert run(distil, *half, "--out", tmp_path / "out", *mode) == 2
        assert f"{half[1]}: expert 0 of model.layers.1 has NaN" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_load_is_that_of_the_trained_layer_on_the_text(half, tmp_path, capsys):
    (tmp_path / "held-out.txt").write_text("z" * 4000)  # routed to few experts, and not counted
    capsys.readouterr()
    assert run(distil, *half, "--out", tmp_path / "out", "--layerwise", "--train", "router", "--lr", 0.3, "--epochs", 4,
               "--eval", tmp_path / "held-out.txt") == 0
    said = [line.split("load: ")[1] for line in capsys.readouterr().out.splitlines() if "load: " in line]
    ids = hodgecover.calibration_ids(Model(half[0]), [tmp_path / "text.txt"], 128, 16)
    for line, step, before in zip(said, Model(tmp_path / "out").stream(ids), Model(half[1]).stream(ids), strict=True):
        counts = {}
        distil.add_load(counts, step.name, step.gates)
        assert f"load: {line}" == distil.load_line(counts)
        assert not torch.equal(step.gates > 0, before.gates > 0)


def test_after_narrowing_and_twice(half, tmp_path):
    """Commands compose; the history goes on."""
    source, ckpt, *options = half
    assert run(heapr, ckpt, "--width", 8, "--score", "magnitude", "--out", tmp_path / "thin") == 0
    assert run(distil, source, tmp_path / "thin", "--out", tmp_path / "a", *options) == 0
    assert run(distil, source, tmp_path / "a", "--out", tmp_path / "b", *options, "--layerwise") == 0
    history = json.loads((tmp_path / "b" / "hodgecover.json").read_text())["history"]
    assert [entry["command"] for entry in history] == ["baselines.py", "heapr.py", "distil.py", "distil.py"]
    assert history[2]["settings"]["lr"] == distil.LR and history[2]["source"] == history[0]["source"]


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_a_killed_run_continues_to_the_same_bytes(mode, half, tmp_path, monkeypatch):
    """Then the folder of saved steps goes."""
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0)
    assert_survives_kills(monkeypatch, (distil, "add_gradient"), 3 * (2 if mode else 1), distil, *half, "--epochs", 3,
                          "--eval", tmp_path / "held-out.txt", *mode, folder=tmp_path)
    assert not (tmp_path / "out-distil").exists()


def test_steps_of_another_problem_are_not_taken(half, tmp_path):
    source, model, ids = Model(half[0]), Model(half[1]), some_ids()
    keys = [common.work_key(*given) for given in (
        ({"lr": 1}, ids, source, model), ({"lr": 1}, ids, model, model), ({"lr": 1}, ids, source, source),
        ({"lr": 1}, ids + 1, source, model), ({"lr": 1}, ids.view(1, -1), source, model),
        ({"lr": 2}, ids, source, model), ({"lr": 1}, ids, source, Model(half[1], torch.float64)),
        ({"lr": 1}, ids, source))]
    assert len({json.dumps(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_streams_beyond_the_memory_lie_on_disk_and_change_nothing(mode, half, tmp_path, monkeypatch):
    assert_disk_changes_nothing(monkeypatch, distil, *half, *mode, folder=tmp_path)


def test_layerwise_has_one_layer_in_memory(half, monkeypatch):
    """When a layer is trained, neither model holds one beside it."""
    held, real_layer, real_train, trained = weakref.WeakSet(), Model.layer, distil.train, []

    def watched(self, index):
        layer = real_layer(self, index)
        held.add(layer)
        return layer

    def train(weights, *given):
        assert held and not any(layer.weights for layer in held)
        trained.append(sum(weight.numel() for weight in weights.values()))
        return real_train(weights, *given)
    monkeypatch.setattr(Model, "layer", watched)
    monkeypatch.setattr(distil, "train", train)
    assert run(distil, *half, "--out", half[1].with_name("out"), "--layerwise") == 0
    model = Model(half[1])
    assert trained == [sum(torch.Size(info.shape).numel() for tensor, info in model.checkpoint.tensors.items()
                           if tensor.startswith(f"{name}.")) for name in model.layer_names]


def test_bfloat16_products_train_float32_weights(half, tmp_path):
    options = [option if option != "float32" else "bfloat16" for option in half]
    for mode in ([], ["--layerwise"]):
        out = tmp_path / f"out{len(mode)}"
        assert run(distil, *options, "--out", out, "--epochs", 3, "--eval", tmp_path / "held-out.txt", *mode) == 0
        before, after = (row["kl"] for row in record(out)["held_out"])
        assert after < before


@pytest.mark.parametrize("mode", [[], ["--layerwise"]], ids=["end-to-end", "layerwise"])
def test_on_another_device(half, tmp_path, mode):
    for device in ("fake", "cpu"):
        with Accelerator(), torch.autograd.set_multithreading_enabled(False):  # the mode is this thread's
            assert run(distil, *half, "--device", device, "--seed", 0, "--out", tmp_path / device, *mode) == 0
    fake, cpu = (load_file(tmp_path / device / "model.safetensors") for device in ("fake", "cpu"))
    for name, weight in cpu.items():  # Adam's kernels differ by device
        torch.testing.assert_close(fake[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode, says", [([], "give --layerwise"), (["--layerwise"], "train fewer parts")])
def test_what_does_not_fit_is_refused_before_the_work(mode, says, half, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "available_memory", lambda device: 10**5)
    monkeypatch.setattr(Model, "stream", refuse)
    capsys.readouterr()
    assert_refused(capsys, run(distil, *half, "--out", tmp_path / "out", *mode), says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-distil").exists()


def test_what_it_needs_is_counted(half):
    """Weights, gradients, two moments, a copy and three saved: 32 bytes a trained parameter, 4 of each other."""
    model = Model(half[1])
    size = {name: torch.Size(info.shape).numel() for name, info in model.checkpoint.tensors.items()}
    layer = model.layer_names[1]
    own = {name: count for name, count in size.items() if name.startswith(f"{layer}.")}
    router = own[f"{layer}.mlp.gate.weight"]
    assert distil.training_bytes(model, [layer], [*distil.PARTS]) == 32 * sum(own.values())
    assert distil.training_bytes(model, [layer], ["router"]) == 4 * sum(own.values()) + 28 * router


@pytest.mark.parametrize("memory, sequences", [(0, 1), (3.5, 3), (99, 8)])
def test_a_graph_has_what_fits_of_a_step(memory, sequences):
    cfg = Model(named("olmoe-plain")).config
    assert distil.graph_sequences(cfg, 2, 16, memory * distil.graph_bytes(cfg, 2, 16)) == sequences


@pytest.mark.parametrize("options, says", [
    (["--epochs", 0], "--epochs 0: must be"), (["--lr", -1], "--lr -1.0: must be"), (["--lr", "nan"], "--lr nan: must"),
    (["--kl-weight", 1.5], "--kl-weight 1.5: must be from 0 to 1"), (["--train", "head"], "invalid choice"),
    (["--layerwise", "--kl-weight", 0.5], "--kl-weight 0.5: does not go with --layerwise"),
    (["--tokens", 1], "--tokens 1: must be"), (["--seed", -1], "--seed -1: must be"),
    (["--eval", "nowhere"], "nowhere: cannot be read"), (["--out", "SOURCE/out"], "lies in the checkpoint"),
    (["--out", "CKPT"], "lies in the checkpoint"), (["--out", "/"], "--out /: / is no folder that what is done"),
    (["--eval", "short.txt"], "--eval: the text has 4 tokens"),
])
def test_bad_input_gets_one_line_before_the_work(half, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "layer", refuse)
    capsys.readouterr()
    (tmp_path / "short.txt").write_text("abc")
    paths = {"SOURCE": half[0], "CKPT": half[1], "short.txt": tmp_path / "short.txt"}
    options = [str(option) for option in options]
    for name, path in paths.items():
        options = [option.replace(name, str(path)) for option in options]
    before = contents(tmp_path)
    assert_refused(capsys, run(distil, *half, "--out", tmp_path / "out", *options), says)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("role", [0, 1], ids=["source", "checkpoint"])
def test_steps_never_lie_in_what_is_read(role, half, tmp_path, capsys):
    """OUT-distil may be an input by its name: then nothing is written to it, and nothing of it removed."""
    half[role] = Path(half[role]).rename(tmp_path / "out-distil")
    (tmp_path / "out-distil" / "distil-notes.txt").write_text("mine")
    before = contents(tmp_path)
    capsys.readouterr()
    assert_refused(capsys, run(distil, *half, "--out", tmp_path / "out"), "lies in the checkpoint")
    assert contents(tmp_path) == before


def test_the_folder_of_what_is_done_goes_if_nothing_is(tmp_path):
    for content, stays in (("", False), ("a step", True)):
        with pytest.raises(InputError), common.made(tmp_path / "out-distil"):
            if content:
                (tmp_path / "out-distil" / "distil-a.safetensors").write_text(content)
            raise InputError("a NaN")
        assert (tmp_path / "out-distil").exists() == stays


def test_a_file_in_the_place_of_the_steps_is_refused(half, tmp_path, capsys):
    (tmp_path / "out-distil").write_text("mine")
    capsys.readouterr()
    assert_refused(capsys, run(distil, *half, "--out", tmp_path / "out"), "out-distil is no folder that what is done")


@pytest.mark.parametrize("command, options", [(distil, []), (refit, [])])
def test_a_source_that_is_smaller_is_refused(command, options, half, tmp_path, capsys):
    capsys.readouterr()
    swapped = [half[1], half[0], *half[2:]]
    assert_refused(capsys, run(command, *swapped, "--out", tmp_path / "out"), "has more or wider experts than")


def test_another_model_is_refused(half, tmp_path, capsys):
    other = with_tokenizer(named("qwen2-renormalised"), tmp_path / "other")
    capsys.readouterr()
    assert_refused(capsys, run(distil, other, *half[1:], "--out", tmp_path / "out"), "its family is olmoe; must be")


def test_of_a_large_text_to_watch_windows_are_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(model_io, "LEAST_TEXT", 1 << 16)
    monkeypatch.setattr(model_io, "TEXT_BYTES", 1)
    (tmp_path / "large.txt").write_text("All work and no play. " * 10_000)
    args, model = argparse.Namespace(eval=tmp_path / "large.txt", seq_len=32), Model(small)
    held_out = common.read_eval(model, args, distil.EVAL_TOKENS)
    assert distil.EVAL_TOKENS <= held_out.numel() < len(model.encode_file(args.eval)) / 2
