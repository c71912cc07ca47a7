# SPDX-License-Identifier: MIT
"""Nested checkpoints: the order changes no function, a prefix is what dropping and narrowing write, and prefixes can be
trained together."""
import doctest
import hashlib
import json
from pathlib import Path

import baselines
import common
import distil
import dot_moe
import export_plan
import heapr
import hodgecover
import model_io
import nested
import pytest
import torch
import wanda
from conftest import QUICK, assert_refused, assert_survives_kills, contents, record, refuse, run, some_ids, sparse_names
from model_io import Model


@pytest.fixture
def ordered(family, tmp_path) -> tuple[Model, Model]:
    """Each golden checkpoint, and what the command makes of it; float64 products."""
    assert run(nested, family, "--calib", tmp_path / "text.txt", *QUICK, "--out", tmp_path / "nested") == 0
    return Model(family, torch.float64), Model(tmp_path / "nested", torch.float64)


# --------------------------------------------------------------------------------------------------------- the order


def test_the_order_changes_no_function_in_any_family(ordered):
    """Of no layer, those of a multi-token head among them; while experts and units did move."""
    source, output = ordered
    ids = some_ids()
    for before, after in zip(source.stream(ids), output.stream(ids), strict=True):
        torch.testing.assert_close(after.y, before.y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.logits(ids), source.logits(ids), rtol=1e-9, atol=1e-11)
    for name in sparse_names(source):
        router = f"{name}.mlp.gate.weight"
        assert not torch.equal(source.checkpoint.load(router), output.checkpoint.load(router))


def test_layer_by_layer_it_is_the_order_of_saliency_and_of_camera(ordered, tmp_path):
    """Each expert's matrices by hand, from the record's order; all other tensors, names, shapes and files as they
    were."""
    source, output = ordered
    model = Model(source.checkpoint.path)
    ids = hodgecover.calibration_ids(model, [tmp_path / "text.txt"], 64, 32)
    orders = {layer["name"]: layer["order"] for layer in record(output.checkpoint.path)["layers"]}
    assert list(orders) == sparse_names(source)
    for step in model.stream(ids):
        if step.gates is None:
            continue
        saliency = hodgecover.reap_saliency(step.layer.experts, step.x, step.gates)
        order = orders[step.name]
        assert order == sorted(range(8), key=lambda e: -saliency[e].item())
        units = heapr.settled(heapr.camera(step), step.layer.experts, step.name)
        old, new = step.layer, output.layer(step.index)
        assert torch.equal(new.router.float(), old.router[order])
        for place, e in enumerate(order):
            by_worth = sorted(range(units.shape[1]), key=lambda j: -units[e, j].item())
            assert torch.equal(new.experts.gate[place].float(), old.experts.gate[e][by_worth].float())
            assert torch.equal(new.experts.up[place].float(), old.experts.up[e][by_worth].float())
            assert torch.equal(new.experts.down[place].float(), old.experts.down[e][:, by_worth].float())
    for name, info in source.checkpoint.tensors.items():
        assert output.checkpoint.tensors[name][:3] == info[:3]
        if ".mlp.experts." not in name and not name.endswith(".mlp.gate.weight"):
            assert torch.equal(source.checkpoint.load(name), output.checkpoint.load(name))
    assert output.checkpoint.raw_config == source.checkpoint.raw_config


# -------------------------------------------------------------------------------------------------------- the slices


def test_a_slice_is_bit_for_bit_what_dropping_and_narrowing_in_that_order_write(ordered, tmp_path):
    """In every family: one command that drops and narrows the source, against order, then slice."""
    source, output = ordered
    ids = hodgecover.calibration_ids(source, [tmp_path / "text.txt"], 64, 32)
    orders = dict(nested.measure(Model(source.checkpoint.path), ids))
    whole = source.config.expert_width
    for keep, width in ((5, whole), (3, whole // 2)):
        out, wanted = tmp_path / f"slice{width}", tmp_path / f"wanted{width}"
        size = keep if width == whole else f"{keep},{width}"
        assert run(nested, output.checkpoint.path, "--slice", size, "--out", out) == 0
        heapr.export(source, {name: order.units[:, :width] for name, order in orders.items()}, wanted, {},
                     {name: order.experts[:keep] for name, order in orders.items()})
        found, expected = contents(out), contents(wanted)
        found.pop("hodgecover.json")
        assert found == expected
        cfg = Model(out).config
        assert (cfg.num_experts, cfg.expert_width, cfg.shared_width) == (keep, width, source.config.shared_width)


def test_a_slice_of_experts_is_the_survivors_in_their_order(small, tmp_path):
    """The bytes of `write_checkpoint`, but for the order of the hidden units; in `--plan`'s order, the same function as
    the command's own output, and larger slices begin with smaller ones."""
    work = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(hodgecover, small, "--keep", 4, *work, "--out", tmp_path / "kept") == 0
    assert run(nested, small, "--plan", tmp_path / "kept" / "hodgecover.json", *work, "--out", tmp_path / "nested") == 0
    cut = {}
    for keep in (3, 4, 6):
        assert run(nested, tmp_path / "nested", "--slice", keep, "--out", tmp_path / f"cut{keep}") == 0
        cut[keep] = Model(tmp_path / f"cut{keep}", torch.float64)
    kept, source = Model(tmp_path / "kept", torch.float64), Model(small)
    torch.testing.assert_close(cut[4].logits(some_ids()), kept.logits(some_ids()), rtol=1e-9, atol=1e-11)
    plans = export_plan.read_orders(source, tmp_path / "kept" / "hodgecover.json")
    model_io.write_checkpoint(source.checkpoint, tmp_path / "plain",
                              {name: plan.order[:4] for name, plan in plans.items()}, {})
    plain = Model(tmp_path / "plain")
    for index, name in enumerate(source.layer_names):
        router = f"{name}.mlp.gate.weight"
        assert torch.equal(cut[4].checkpoint.load(router), plain.checkpoint.load(router))
        for before, after in zip(plain.layer(index).experts, cut[4].layer(index).experts):
            assert torch.equal(before.flatten(1).double().sort().values, after.flatten(1).sort().values)
        for smaller, larger in ((3, 4), (4, 6)):
            for less, more in zip(cut[smaller].layer(index).experts, cut[larger].layer(index).experts):
                assert torch.equal(less, more[:smaller])
    plan = hashlib.sha256((tmp_path / "kept" / "hodgecover.json").read_bytes()).hexdigest()
    assert record(tmp_path / "nested")["settings"]["plan_sha256"] == plan


def test_history_and_the_source_s_files(small, tmp_path, capsys):
    """The same command gives the same bytes; a slice of everything changes no weight; a checkpoint that was not put in
    order is cut with a warning."""
    given_files, work = contents(small), ["--calib", tmp_path / "text.txt", *QUICK]
    for out in ("a", "b"):
        assert run(nested, small, *work, "--out", tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert run(nested, tmp_path / "a", "--slice", "8,16", "--out", tmp_path / "all") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "all" / "model.safetensors").read_bytes()
    assert capsys.readouterr().err == ""
    assert run(nested, small, "--slice", "4,8", "--out", tmp_path / "cut") == 0
    assert "its record has no nested.py" in capsys.readouterr().err
    history = json.loads((tmp_path / "all" / "hodgecover.json").read_text())["history"]
    assert [entry["command"] for entry in history] == ["nested.py", "nested.py"]
    assert history[0]["settings"]["experts"] == "reap" and history[1]["settings"] == {"keep": 8, "width": 16}
    assert contents(small) == given_files


def test_a_killed_run_leaves_nothing(small, tmp_path, monkeypatch):
    before = contents(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(model_io, "copy_small_files", interrupted)
    assert run(nested, small, "--calib", tmp_path / "text.txt", *QUICK, "--out", tmp_path / "out") == 130
    assert run(nested, small, "--slice", 4, "--out", tmp_path / "out") == 130
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------ trained prefixes


@pytest.fixture
def in_order(small, tmp_path) -> tuple[Model, Model, torch.Tensor]:
    """The small checkpoint, an ordered copy of it to be trained, and text."""
    source = Model(small)
    ids = some_ids(16, 16)
    nested.write_ordered(source, dict(nested.measure(source, ids)), tmp_path / "nested", {})
    return source, Model(tmp_path / "nested"), ids


def kl_of(source: Model, output: Model, ids: torch.Tensor, size: tuple[int, int], out: Path) -> float:
    """KL from the source of a slice, as a checkpoint."""
    nested.write_slice(output, *size, out, {})
    return common.compare(source, Model(out, output.dtype), ids).kl


def test_the_loss_of_a_prefix_is_the_kl_of_its_slice(in_order, tmp_path, monkeypatch):
    source, output, ids = in_order
    found = []

    def train(weights, loss_of, count, length, *_):
        found.extend(loss_of(torch.arange(count), prefix=size).item() / (count * length) for size in ((8, 16), (4, 6)))
    monkeypatch.setattr(distil, "train", train)
    plan = distil.Plan(1, 0.01, 1.0, [*distil.PARTS], 0, 10**9)
    distil.distil(source, output, ids, 0, plan, torch.empty, lambda *_: None)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(kl_of(source, output, ids, (4, 6), tmp_path / "cut"), rel=1e-4)


def test_a_third_of_the_steps_train_the_whole_model():
    plan = distil.Plan(1, 0.01, 1.0, [*distil.PARTS], 3, 10**9, prefixes=[(4, 16), (3, 8)])
    drawn = distil.prefixes_of(9000, plan)
    shares = [drawn.count(size) / 9000 for size in (None, (4, 16), (3, 8))]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02)
    assert drawn[:99] != distil.prefixes_of(9000, plan._replace(seed=4))[:99]
    assert distil.prefixes_of(3, plan._replace(prefixes=())) == [None] * 3


def test_each_step_trains_its_own_prefix(in_order, monkeypatch):
    sizes, weight, real = [], torch.ones(2, 2, requires_grad=True), distil.train

    def loss_of(which, prefix=None):
        sizes.append(prefix)
        return weight.square().sum()
    plan = distil.Plan(4, 0.01, 1.0, [*distil.PARTS], 0, 10**9, prefixes=[(4, 16), (3, 8)])
    monkeypatch.setattr(distil, "train", lambda weights, _, *given: real({"w": weight}, loss_of, *given))
    distil.distil(*in_order[:2], in_order[2].new_zeros(24, 4), 0, plan, torch.empty, lambda *_: None)
    assert sizes == distil.prefixes_of(12, plan) and len({*sizes}) == 3


def test_trained_together_the_prefixes_come_nearer_and_the_whole_stays_near(in_order, tmp_path):
    source, output, ids = in_order
    sizes = [(6, 16), (4, 16), (3, 8)]
    before = [kl_of(source, output, ids, size, tmp_path / f"before{size}") for size in sizes]
    plan = distil.Plan(12, 0.008, 1.0, [*distil.PARTS], 0, 10**9, prefixes=sizes)
    distil.distil(source, output, ids, 0, plan, torch.empty, lambda *_: None)
    after = [kl_of(source, output, ids, size, tmp_path / f"after{size}") for size in sizes]
    assert sum(after) < 0.6 * sum(before) and all(new < old for new, old in zip(after, before))
    assert common.compare(source, output, ids).kl < min(after)


@pytest.fixture
def trained(small, tmp_path) -> list:
    """Arguments of distil.py for an ordered checkpoint."""
    text = ["--calib", tmp_path / "text.txt"]
    assert run(nested, small, *text, *QUICK, "--out", tmp_path / "nested") == 0
    return [small, tmp_path / "nested", *text, "--tokens", 256, "--seq-len", 16, "--dtype", "float32"]


def test_the_command_tells_of_each_prefix_and_a_slice_of_it_is_cut(trained, tmp_path, capsys):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("Zebras mix quartz. " * 10)
    assert run(distil, *trained, "--prefixes", "4", "3,8", "--epochs", 2, "--eval", held_out, "--out",
               tmp_path / "out") == 0
    said = [line.split("held-out KL ")[1].split() for line in capsys.readouterr().out.splitlines() if "load:" in line]
    assert all(len(kls) == 3 for kls in said) and len(said) > 1
    assert record(tmp_path / "out")["settings"]["prefixes"] == [[4, 16], [3, 8]]
    assert run(nested, tmp_path / "out", "--slice", "3,8", "--out", tmp_path / "cut") == 0
    assert capsys.readouterr().err == ""
    source = Model(trained[0])
    ids = model_io.sequences(source.encode([held_out.read_text()]), 16)
    found = common.compare(source, Model(tmp_path / "cut"), ids).kl
    assert float(said[-1][2]) == pytest.approx(found, abs=1e-4)


def test_a_killed_training_of_prefixes_continues_to_the_same_bytes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0)
    assert_survives_kills(monkeypatch, (distil, "add_gradient"), 4, distil, *trained, "--prefixes", "4", "3,8",
                          "--epochs", 2, folder=tmp_path)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("options, says", [
    (["--slice", "2"], "--slice: keep 2: must be from 3 to 8"),
    (["--slice", "9"], "--slice: keep 9"), (["--slice", "4,17"], "--slice: width 17: must be from 1 to 16"),
    (["--slice", "4,0"], "--slice: width 0: must be"), (["--slice", "4,"], "4,: must be K or K,F"),
    (["--slice", "half"], "half: must be K or K,F"), (["--slice", "4", "--plan", "x"], "not allowed with"),
    (["--slice", "4", "--tokens", 64], "--tokens: --slice does not use it"),
    (["--slice", "4", "--seed", 1], "--seed: --slice does not use it"),
    (["--slice", "4", "--dtype", "float64"], "--dtype: --slice does not use it"),
    (["--plan", "nowhere.json"], "nowhere.json: cannot be read"), (["--tokens", 1], "--tokens 1: must be"),
    (["--seed", -1], "--seed -1: must be"), (["--out", "SMALL/out"], "lies in the checkpoint")])
def test_bad_input_gets_one_line_before_the_work(small, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "layer", refuse)
    before = contents(tmp_path)
    options = [str(option).replace("SMALL", str(small)) for option in options]
    assert_refused(capsys, run(nested, small, "--out", tmp_path / "out", *options), says)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change, says", [
    (lambda entry: entry["layers"][0].update(order=[0, 1, 2]), "order of model.layers.0 must have each"),
    (lambda entry: entry["layers"][1].update(order=[*range(7), 6]), "order of model.layers.1 must have each"),
    (lambda entry: entry["layers"][0].update(order=[*map(float, range(8))]), "must have each of its experts once"),
    (lambda entry: entry["layers"][0].update(survivors=sorted(entry["layers"][0]["order"][4:])), "survivors first"),
    (lambda entry: entry["layers"][0].update(survivors=[0, 1]), "survivors of model.layers.0 must be 3 or more"),
    (lambda entry: entry["source"].update(fingerprint="other"), "of other weights")])
def test_a_plan_that_gives_no_order_is_refused(small, tmp_path, capsys, change, says):
    plan = tmp_path / "plan.json"
    assert run(baselines, small, "--keep", 4, "--method", "frequency", "--calib", tmp_path / "text.txt", *QUICK,
               "--out", tmp_path / "few") == 0
    found = json.loads((tmp_path / "few" / "hodgecover.json").read_text())
    change(found["history"][-1])
    plan.write_text(json.dumps(found))
    capsys.readouterr()
    assert_refused(capsys, run(nested, small, "--plan", plan, "--out", tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, says", [
    (["--prefixes", "2"], "--prefixes: keep 2"), (["--prefixes", "4,99"], "--prefixes: width 99"),
    (["--prefixes", "4", "--layerwise"], "--prefixes: do not go with --layerwise"),
    (["--prefixes", "x"], "x: must be K or K,F")])
def test_prefixes_that_there_are_not_are_refused(small, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "layer", refuse)
    assert_refused(capsys, run(distil, small, small, "--out", tmp_path / "out", *options), says)
    assert not (tmp_path / "out").exists()


def test_the_cut_of_a_layer_shares_its_weights_and_passes_a_dense_one(small):
    layer = Model(small).layer(0)
    found = common.cut(layer, slice(5), 7)
    assert [tuple(part.shape[:2]) for part in found.experts] == [(5, 7), (5, 7), (5, 32)] and len(found.router) == 5
    assert all(view.data_ptr() == whole.data_ptr() for view, whole in zip(found.experts, layer.experts))
    picked = common.cut(layer, [6, 2])
    assert torch.equal(picked.router, layer.router[[6, 2]])
    assert torch.equal(picked.experts.down, layer.experts.down[[6, 2]])
    dense = model_io.Layer(None, None, {})
    assert common.cut(dense, slice(2), 3) is dense


@pytest.mark.parametrize("module", [common, distil, dot_moe, heapr, nested, wanda])
def test_the_docstrings_examples_hold(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
