# SPDX-License-Identifier: MIT
"""Closed-form recovery: the block solver against the joint one, one layer, whole models, and the command."""
import json
import os
import shutil
import weakref
from functools import partial
from pathlib import Path

import common
import hodgecover
import model_io
import pytest
import refit
import torch
from conftest import (KINDS, QUICK, assert_refused, contents, dropped, named, record, refuse, run, some_ids,
                      sparse_names, with_tokenizer)
from fake_device import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from model_io import Model
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode


# --------------------------------------------------------------------------------------------------------- the solver


def problem(seed: int, n: int = 3, d: int = 4, f: int = 5, tokens: int = 40, top_k: int = 2):
    """(features, D^0 (n, d, f), residual (T, d), all features side by side (T, n f)) of a layer with random routing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, f, generator=generator, dtype=torch.float64)
    chosen = torch.rand(tokens, n, generator=generator).topk(top_k).indices
    x *= torch.zeros(tokens, n, dtype=torch.float64).scatter(1, chosen, 1.0)[:, :, None]
    rows = [x[:, e].any(1).nonzero().squeeze(1) for e in range(n)]
    start = torch.randn(n, d, f, generator=generator, dtype=torch.float64)
    residual = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    pieces = [[(t, x[t, e]) for t in of.split(7)] for e, of in enumerate(rows)]
    return pieces.__getitem__, start, residual, x.flatten(1)


def objective(change: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, ridge: float) -> float:
    """What `block_ridge` minimises, word by word; change (n, d, f)."""
    n, d, f = change.shape
    left = residual - x @ change.transpose(1, 2).flatten(0, 1)
    weights = [ridge * x[:, e * f:(e + 1) * f].square().sum() / f for e in range(n)]
    return (left.square().sum() + sum(w * change[e].square().sum() for e, w in enumerate(weights))).item()


@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), ridge=st.sampled_from([0.1, 10.0]))
def test_many_sweeps_reach_the_joint_ridge_solution(seed, ridge):
    features, start, residual, x = problem(seed)
    n, d, f = start.shape
    weights = torch.cat([torch.full((f,), ridge * x[:, e * f:(e + 1) * f].square().sum() / f) for e in range(n)])
    joint = torch.linalg.solve(x.T @ x + torch.diag(weights), x.T @ residual).T.view(d, n, f).transpose(0, 1)
    left = residual.clone()
    found = refit.block_ridge(features, start, left, ridge, sweeps=50) - start
    torch.testing.assert_close(found, joint, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(left, residual - x @ found.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-9)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), ridge=st.sampled_from([0.0, 0.1, 10.0]),
       sparse=st.lists(st.booleans(), min_size=3, max_size=3))
def test_no_sweep_raises_the_objective_and_only_sparse_blocks_keep_their_zeros(seed, ridge, sparse):
    features, start, residual, x = problem(seed)
    start = start * (torch.rand(start.shape, generator=torch.Generator().manual_seed(seed)) > 0.4)
    start[:, 0, 0] = 0
    values = [objective(torch.zeros_like(start), x, residual, ridge)]
    for sweeps in (1, 2, 3):
        found = refit.block_ridge(features, start, residual.clone(), ridge, sweeps, sparse)
        for block, given_block, fixed in zip(found, start, sparse):
            assert ((block[given_block == 0] == 0).all() if fixed else (block != 0).all())
        values.append(objective(found - start, x, residual, ridge))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(values, values[1:]))


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), kept=st.integers(1, 5))
def test_a_row_with_fixed_zeros_is_solved_over_its_own_entries(seed, kept):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    system = a.T @ a + 0.1 * torch.eye(5)
    wanted = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    chosen = torch.rand(4, 5, generator=generator).topk(kept).indices
    free = torch.zeros(4, 5, dtype=torch.bool).scatter(1, chosen, True)
    free[0] = torch.arange(5) == 2  # rows need not have equally many
    free[1] = False
    for numbers in (1, 1 << 24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "pinv", refuse)  # the padding of shorter rows keeps the systems definite
            found = refit.solve_rows(system, wanted, free, numbers)
        for row, mask, right in zip(found, free, wanted.T):
            expected = torch.zeros(5, dtype=torch.float64)
            expected[mask] = torch.linalg.solve(system[mask][:, mask], right[mask])
            torch.testing.assert_close(row, expected)


def test_planted_down_projections_are_recovered_and_a_large_ridge_changes_nothing():
    features, start, _, x = problem(1, tokens=200)
    planted = start + torch.randn(start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    residual = x @ (planted - start).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(refit.block_ridge(features, start, residual.clone(), 1e-12, 100), planted)
    torch.testing.assert_close(refit.block_ridge(features, start, residual.clone(), 1e12), start)


def test_an_expert_without_tokens_stays_and_one_with_few_takes_the_least_norm():
    features, start, residual, x = problem(3)
    row = x.view(40, 3, 5)[7:8, 1] + 1
    few = [(torch.tensor([7]), row)]
    none = [(torch.empty(0, dtype=torch.int64), torch.empty(0, 5, dtype=torch.float64))]
    left = residual.clone()
    found = refit.block_ridge(lambda e: (features(0), few, none)[e], start, left, 0.0, 1)
    assert torch.equal(found[2], start[2])
    after_first = residual - x[:, :5] @ (found[0] - start[0]).T
    torch.testing.assert_close(found[1] - start[1], after_first[7][:, None] * row / row.square().sum())


# ---------------------------------------------------------------------------------------------------------- one layer


def layer_pass(seed: int, dtype: torch.dtype = torch.float64) -> model_io.LayerPass:
    """The pass of a layer with random weights: 5 experts, the last without a token, each token to 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, 6), (3, 6), (6, 3)
    experts = model_io.Experts(*(torch.randn(5, *shape, generator=generator).to(dtype) for shape in shapes))
    x, gates = torch.randn(700, 6, generator=generator).to(dtype), torch.rand(700, 5, generator=generator).to(dtype)
    gates[:, 4] = 0
    gates = torch.zeros_like(gates).scatter(1, gates.topk(2).indices, gates.topk(2).values)
    return model_io.LayerPass(0, "", model_io.Layer(experts, None, {}), x[None], x, gates, x, torch.nn.Identity())


@pytest.mark.parametrize("seed", range(3))
def test_the_factors_are_the_least_squares_solution_and_a_large_ridge_leaves_them_alone(seed):
    step, residual = layer_pass(seed), torch.randn(700, 6, generator=torch.Generator().manual_seed(9)).double()
    outputs = torch.stack([step.gates[:, e, None] * step.layer.experts(e, step.x) for e in range(4)])
    best = torch.linalg.lstsq(outputs.flatten(1).T, residual.flatten()).solution
    expected = torch.cat((1 + best, torch.ones(1, dtype=torch.float64)))  # no token: as it is
    torch.testing.assert_close(refit.fit_scale(step, residual), expected)
    left = residual.clone()
    down = refit.refit_layer(step, left, ridge=1e12)
    torch.testing.assert_close(down, step.layer.experts.down * expected[:, None, None])
    torch.testing.assert_close(left, residual - torch.einsum("e,etd->td", best, outputs))


def test_a_planted_scaling_comes_back():
    """A residual that is what wrong factors lack: no ridge bends that."""
    step, factor = layer_pass(3), torch.tensor([0.5, 1.0, 2.0, -1.0, 1.0]).double()
    lacking = step.layer.experts.down * (factor - 1)[:, None, None]
    residual = torch.zeros_like(step.x)
    refit.add_outputs(residual, step, lacking)
    assert torch.equal(residual[:9], model_io.mix_experts(step.layer.experts._replace(down=lacking), step.x[:9],
                                                          step.gates[:9]))
    expected = step.layer.experts.down * factor[:, None, None]
    for sweeps in (1, 3):
        torch.testing.assert_close(refit.refit_layer(step, residual.clone(), 0.1, sweeps), expected)


def test_pieces_of_any_size_give_the_same_kept_or_not(monkeypatch):
    step, residual = layer_pass(1), torch.randn(700, 6, generator=torch.Generator().manual_seed(9)).double()
    whole = refit.refit_layer(step, residual.clone())
    torch.testing.assert_close(refit.refit_layer(step, residual.clone(), memory=0), whole)  # nothing is kept
    monkeypatch.setattr(refit, "PIECE", 160)
    torch.testing.assert_close(refit.refit_layer(step, residual.clone()), whole)


def test_more_than_one_zero_in_a_hundred_makes_an_expert_sparse():
    step, residual = layer_pass(2), torch.randn(700, 6, generator=torch.Generator().manual_seed(9)).double()
    down = torch.ones(3, 10, 20)
    down[1, 0, :2] = 0
    down[2, 0, :3] = 0
    assert refit.sparse_experts(down) == [False, False, True]
    step.layer.experts.down[1, 2, :2] = 0
    found = refit.refit_layer(step, residual)
    assert (found[1] == 0).nonzero().tolist() == [[2, 0], [2, 1]] and (found[[0, 2, 3]] != 0).all()


def test_operations_are_those_that_torch_counts():
    """But for the inverses, which it does not count; an expert without a token has none, and no solves."""
    step, (n, f, d) = layer_pass(0), (5, 3, 6)
    with FlopCounterMode(display=False) as counter:
        refit.add_outputs(step.x.clone(), step, refit.refit_layer(step, step.x.clone()))
    solves = n * f**3 + refit.SWEEPS * 2 * f * f * d
    expected = refit.refit_operations(len(step.x), n, 2, d, f) - solves
    assert counter.get_total_flops() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
def test_every_family_comes_nearer_to_the_source(path, tmp_path):
    """The reported errors are those of the files as they are written; layers before the first sparse one count not."""
    model, ids = Model(path, torch.float64), some_ids(8, 32)
    out = dropped(path, tmp_path / "half")
    before = {step.name: step.y.clone() for step in Model(out, torch.float64).stream(ids)}
    found = list(refit.refit(model, Model(out, torch.float64), ids))
    assert [layer.name for layer in found] == sparse_names(model)
    after = {step.name: step.y for step in Model(out, torch.float64).stream(ids)}
    target = {step.name: step.y for step in model.stream(ids)}
    first = found[0].name
    for layer in found:
        length = target[layer.name].norm()
        assert layer.after < 0.95 * layer.before
        assert layer.after == pytest.approx(((target[layer.name] - after[layer.name]).norm() / length).item(), rel=1e-5)
    assert found[0].before == pytest.approx(((target[first] - before[first]).norm() / target[first].norm()).item())


@pytest.mark.parametrize("name", ["olmoe-gqa-clip", "qwen2-dense-between", "qwen3_5-vision-mtp"])
def test_spoilt_down_projections_come_back(name, tmp_path):
    """All experts are there, and more tokens of each than it is wide."""
    model, ids = Model(named(name), torch.float64), some_ids(16, 32)
    spoilt = Model(dropped(named(name), tmp_path / "all", [*range(8)]), torch.float64)
    for index in hodgecover.sparse_layers(model):
        common.store_down(spoilt, model.layer_names[index], spoilt.layer(index).experts.down * 1.1 + 0.01)
    nearly_free = partial(refit.refit_layer, ridge=1e-9, sweeps=25)
    for layer in refit.refit(model, spoilt, ids, nearly_free):
        assert layer.after < 1e-2 * layer.before


def test_a_checkpoint_without_the_multi_token_head_is_refitted(tmp_path):
    """As transformers saves one."""
    model = Model(named("qwen3_5-vision-mtp"))
    output = Model(dropped(model.checkpoint.path, tmp_path / "half"))
    with_head = [layer.name for layer in refit.refit(model, output, some_ids(2, 32))]
    assert output.layer_names.pop().startswith("mtp.") and output.layer_configs.pop()
    common.check_source(output, model)
    assert [layer.name for layer in refit.refit(model, output, some_ids(2, 32))] == with_head[:-1]
    with pytest.raises(model_io.InputError, match="list of layers with experts"):
        common.check_source(model, output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_stored_is_what_goes_on(tmp_path, dtype):
    """Rounded to the type of the file, whatever the dtype of the products; refused if it overflows that."""
    source = Path(shutil.copytree(named("olmoe-plain"), tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, source / "model.safetensors")
    model, ids = Model(source, torch.float64), some_ids(4, 32)
    out = dropped(source, tmp_path / "out")
    *_, last = refit.refit(model, Model(out, torch.float64), ids)
    *_, target = model.stream(ids)
    *_, step = Model(out, torch.float64).stream(ids)
    assert last.after == pytest.approx(((target.y - step.y).norm() / target.y.norm()).item(), rel=1e-10)
    large = 1e10 if dtype == torch.float16 else torch.inf
    overflowing = refit.refit(model, Model(out), ids, lambda step, _: step.layer.experts.down * large)
    with pytest.raises(model_io.InputError, match=f"down_proj.weight: its new weights overflow {dtype}"):
        next(overflowing)


def test_scratch_tensors_are_files_that_go_with_them(tmp_path):
    empty, before = common.scratch(tmp_path), set(os.listdir("/dev/fd"))
    made = empty(3, 5, dtype=torch.bfloat16, device=torch.device("cpu"))
    made.fill_(2)
    assert made.shape == (3, 5) and made.sum() == 30 and not list(tmp_path.iterdir())
    del made
    assert set(os.listdir("/dev/fd")) == before


def test_the_activations_are_counted(tmp_path):
    """As many tensors (T, d) live at once as `activation_bytes` says, from the third layer on."""
    model, ids = Model(named("qwen3_5-text")), some_ids(4, 32)
    live, most = weakref.WeakSet(), 0

    def empty(*shape, **options):
        nonlocal most
        made = torch.empty(*shape, **options)
        assert shape == (ids.numel(), model.config.hidden_size)
        live.add(made.untyped_storage())
        most = max(most, len(live))
        return made
    list(refit.refit(model, Model(dropped(model.checkpoint.path, tmp_path / "out")), ids, empty=empty))
    assert refit.activation_bytes(model, ids.numel()) == most * ids.numel() * model.config.hidden_size * 4


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def work(small, tmp_path) -> list:
    """A refit of half of the experts of `small` on 256 tokens, without the output."""
    return [small, dropped(small, tmp_path / "half"), "--calib", tmp_path / "text.txt", *QUICK, "--tokens", 256]


def test_the_command_refits_any_checkpoint_of_the_source(work, tmp_path, capsys):
    """One without a record, made by hand. Only down projections of routed experts change."""
    source, ckpt, *_ = work
    given_files = contents(source), contents(ckpt)
    assert run(refit, *work, "--out", tmp_path / "out") == 0
    said, entry = capsys.readouterr().out, record(tmp_path / "out")
    assert [layer["name"] for layer in entry["output_error"]] == ["model.layers.0", "model.layers.1"]
    for layer in entry["output_error"]:
        assert f"{layer['name']}: output error {layer['before']:.4f} -> {layer['after']:.4f}\n" in said
        assert layer["after"] < layer["before"]
    assert entry["command"] == "refit.py" and entry["settings"]["tokens"] == 256
    assert (entry["settings"]["ridge"], entry["settings"]["sweeps"]) == (0.3, 3)
    for role, path in (("source", source), ("checkpoint", ckpt)):
        assert entry[role]["fingerprint"] == model_io.Checkpoint(path).fingerprint()
    plain, refitted = (load_file(path / "model.safetensors") for path in (ckpt, tmp_path / "out"))
    assert {name for name in plain if not torch.equal(plain[name], refitted[name])} == \
        {name for name in plain if ".experts." in name and "down_proj" in name}
    assert (contents(source), contents(ckpt)) == given_files
    assert contents(tmp_path / "out").keys() == given_files[1].keys() | {"hodgecover.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"small", "text.txt", "half", "out"}
    assert run(refit, source, tmp_path / "out", *work[2:], "--out", tmp_path / "twice") == 0  # the history goes on
    history = json.loads((tmp_path / "twice" / "hodgecover.json").read_text())["history"]
    assert len(history) == 2 and history[0] == entry


@pytest.mark.parametrize("cache", [None, "mine"])
def test_a_killed_run_continues_from_the_layers_that_are_done(work, tmp_path, monkeypatch, cache):
    """To the same bytes; then the folder of the layers goes, but not what others put there."""
    assert run(refit, *work, "--out", tmp_path / "undisturbed") == 0
    work = [*work, "--out", tmp_path / "out"] + (["--cache", tmp_path / cache] if cache else [])
    folder, solve, fit, fitted = tmp_path / (cache or "out-refit"), refit.block_ridge, refit.refit_layer, []

    def killed_in_the_second(step, residual, **options):
        if step.index:
            raise KeyboardInterrupt
        return fit(step, residual, **options)
    monkeypatch.setattr(refit, "refit_layer", killed_in_the_second)
    assert run(refit, *work) == 130
    done, = folder.iterdir()
    assert "model.layers.0" in done.name and not (tmp_path / "out").exists()
    done.with_name(f".{done.name}.0123").write_bytes(b"half of a layer")
    if cache:
        (folder / "notes.txt").write_text("mine")

    monkeypatch.setattr(refit, "refit_layer", lambda step, *given, **options: fitted.append(step.index)
                        or fit(step, *given, **options))
    monkeypatch.setattr(refit, "block_ridge", lambda *given: fitted.append("solved") or solve(*given))
    assert run(refit, *work) == 0 and fitted == [1, "solved"]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert ([path.name for path in folder.iterdir()] == ["notes.txt"]) if cache else not folder.exists()


def test_layers_of_another_problem_are_not_taken(work, tmp_path):
    """By their key. The folder is made again if a run that shared it has removed it."""
    models, ids = (Model(work[0]), Model(work[1])), some_ids(2, 32)
    key, other = (common.work_key({"ridge": ridge}, ids, *models) for ridge in (0.3, 0.4))
    step = layer_pass(0)
    told = []
    kept = refit.resumable(lambda step, _: step.layer.experts.down, tmp_path / "cache", key, told.append)(step, None)
    assert told == [step.index]
    again = refit.resumable(refuse, tmp_path / "cache", key, refuse)
    assert torch.equal(again(step, None), kept)
    with pytest.raises(AssertionError, match="done again"):
        refit.resumable(refuse, tmp_path / "cache", other, [].append)(step, None)


def test_activations_beyond_the_memory_lie_on_disk_and_change_nothing(work, tmp_path, monkeypatch):
    made, real = [], common.scratch
    monkeypatch.setattr(common, "scratch", lambda folder: made.append(folder) or real(folder))
    assert run(refit, *work, "--out", tmp_path / "all") == 0 and not made
    monkeypatch.setattr(hodgecover, "MEMORY", 1)
    assert run(refit, *work, "--out", tmp_path / "none") == 0
    assert [folder.parent for folder in made] == [tmp_path]  # the disk of the output
    assert contents(tmp_path / "none") == contents(tmp_path / "all")


@pytest.mark.parametrize("name", ["qwen2-renormalised", "qwen3_5-vision-mtp"])
def test_pruned_entries_stay_pruned(name, tmp_path):
    """In one-by-one and fused experts, whoever pruned them; those of an expert that is dense change."""
    (tmp_path / "text.txt").write_text("All work and no play makes an expert dull. " * 40)
    source = with_tokenizer(named(name), tmp_path / "source")
    model = Model(dropped(source, tmp_path / "half"))
    for index in hodgecover.sparse_layers(model):
        down = model.layer(index).experts.down
        down[1:, :, ::2] = 0
        common.store_down(model, model.layer_names[index], down)
    assert run(refit, source, tmp_path / "half", "--calib", tmp_path / "text.txt", *QUICK, "--tokens", 512,
               "--out", tmp_path / "out") == 0
    for index in hodgecover.sparse_layers(model):
        before, after = (Model(tmp_path / path).layer(index).experts.down for path in ("half", "out"))
        assert (after[before == 0] == 0).all() and not torch.equal(after, before)
        assert (after[0] != before[0]).any()


def test_on_another_device(work, tmp_path):
    for device in ("fake", "cpu"):
        with Accelerator():
            assert run(refit, *work, "--device", device, "--out", tmp_path / device) == 0
    there, here = (load_file(tmp_path / device / "model.safetensors") for device in ("fake", "cpu"))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options, says", [
    (["--tokens", 1], "--tokens 1: must be"), (["--tokens", 100, "--seq-len", 128], "--seq-len 128: must be from 2"),
    (["--out", "SOURCE/out", "--cache", "FREE"], "--out"), (["--out", "CKPT/out", "--cache", "FREE"], "--out"),
    (["--cache", "SOURCE/cache"], "--cache"), (["--cache", "CKPT"], "--cache"),
    (["--cache", "OUT/cache"], "would hold the cache"), (["--cache", "TEXT"], "--cache"),
    (["--ridge", 1], "--ridge"),
])
def test_bad_input_gets_one_line_before_the_work(work, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "stream", None)
    places = {"SOURCE": work[0], "CKPT": work[1], "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt",
              "FREE": tmp_path / "free"}
    for place, path in places.items():
        options = [str(option).replace(place, str(path)) for option in options]
    before = contents(tmp_path)
    assert_refused(capsys, run(refit, *work, "--out", tmp_path / "out", *options), says)
    assert contents(tmp_path) == before and {path.name for path in tmp_path.iterdir()} == {"small", "half", "text.txt"}


def test_the_text_model_of_a_vision_model_is_of_its_family():
    """Other tools save it as qwen3_5_moe_text."""
    families = {common.outline(Model(named(name)), 4)["family"] for name in ("qwen3_5-text", "qwen3_5-vision-mtp")}
    assert families == {"qwen3_5_moe"}


@pytest.mark.parametrize("other, says", [
    ("olmoe-gqa-clip", None), ("qwen3-plain-tied", "its family is olmoe; must be qwen3_moe")])
def test_a_checkpoint_of_another_source_is_refused(work, tmp_path, capsys, monkeypatch, other, says):
    """As far as shapes tell: another family is none, other weights of the same shape are not seen."""
    other = with_tokenizer(named(other), tmp_path / "other")
    if says is None:
        return common.check_source(Model(work[1]), Model(other))
    monkeypatch.setattr(Model, "stream", None)
    assert_refused(capsys, run(refit, other, *work[1:], "--out", tmp_path / "out"), says)


@pytest.mark.parametrize("change, says", [
    ({"hidden_size": 64}, "hidden size is 32; must be 64"), ({"vocab_size": 99}, "vocabulary is 96; must be 99"),
    ({"num_layers": 3}, "number of decoder layers is 2; must be 3")])
def test_a_checkpoint_of_other_shapes_is_refused(work, change, says):
    source, model = Model(work[0]), Model(work[1])
    source.config = model_io.Config(**(vars(source.config) | change))
    with pytest.raises(model_io.InputError, match=says):
        common.check_source(model, source)
