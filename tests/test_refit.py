# SPDX-License-Identifier: MIT
"""Closed-form recovery: the block solver against the joint one, and the command."""
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from hodgecover import Settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_io import Model
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Path(__file__).parent / "golden"
QUICK = ["--tokens", "128", "--seq-len", "64", "--max-triangles", "20", "--dtype", "float32"]


def run(*argv: object) -> int:
    return hodgecover.main([str(a) for a in argv])


def problem(seed: int, n: int = 3, d: int = 4, f: int = 5, tokens: int = 40, top_k: int = 2):
    """(features, D^0 (n, d, f), residual (T, d), all features side by side (T, n f)) of a layer with random routing."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, f, generator=g, dtype=torch.float64)
    x *= torch.zeros(tokens, n, dtype=torch.float64).scatter(
        1, torch.rand(tokens, n, generator=g).topk(top_k).indices, 1.0)[:, :, None]
    rows = [x[:, e].any(1).nonzero().squeeze(1) for e in range(n)]
    start = torch.randn(n, d, f, generator=g, dtype=torch.float64)
    residual = torch.randn(tokens, d, generator=g, dtype=torch.float64)
    pieces = [[(t, x[t, e]) for t in of.split(7)] for e, of in enumerate(rows)]
    return pieces.__getitem__, start, residual, x.flatten(1)


def objective(step: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, ridge: float) -> float:
    """What `block_ridge` minimises, word by word; step (n, d, f)."""
    n, d, f = step.shape
    left = residual - x @ step.transpose(1, 2).flatten(0, 1)
    weights = [ridge * x[:, e * f:(e + 1) * f].square().sum() / f for e in range(n)]
    return (left.square().sum() + sum(w * step[e].square().sum() for e, w in enumerate(weights))).item()


@hypothesis_settings(max_examples=15)
@given(seed=st.integers(0, 10**6), ridge=st.sampled_from([0.03, 0.1, 10.0]))
def test_many_sweeps_reach_the_joint_ridge_solution(seed, ridge):
    features, start, residual, x = problem(seed)
    n, d, f = start.shape
    weights = torch.cat([torch.full((f,), ridge * x[:, e * f:(e + 1) * f].square().sum() / f) for e in range(n)])
    joint = torch.linalg.solve(x.T @ x + torch.diag(weights), x.T @ residual).T.view(d, n, f).transpose(0, 1)
    left = residual.clone()
    found = mathx.block_ridge(features, start, left, ridge, sweeps=100) - start
    torch.testing.assert_close(found, joint, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(left, residual - x @ found.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 10**6), ridge=st.sampled_from([0.0, 0.1, 10.0]), sparse=st.booleans())
def test_no_sweep_raises_the_objective(seed, ridge, sparse):
    features, start, residual, x = problem(seed)
    if sparse:
        start = start * (torch.rand(start.shape, generator=torch.Generator().manual_seed(seed)) > 0.4)
    values = [objective(torch.zeros_like(start), x, residual, ridge)]
    for sweeps in (1, 2, 3):
        found = mathx.block_ridge(features, start, residual.clone(), ridge, sweeps, fixed_zeros=sparse)
        assert not sparse or (found[start == 0] == 0).all()
        values.append(objective(found - start, x, residual, ridge))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(values, values[1:]))


@given(seed=st.integers(0, 10**6), kept=st.integers(1, 5))
def test_a_row_with_fixed_zeros_is_solved_over_its_own_entries(seed, kept):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(9, 5, generator=g, dtype=torch.float64)
    system, wanted = a.T @ a + 0.1 * torch.eye(5), torch.randn(5, 4, generator=g, dtype=torch.float64)
    free = torch.zeros(4, 5, dtype=torch.bool).scatter(1, torch.rand(4, 5, generator=g).topk(kept).indices, True)
    free[0] = torch.arange(5) == 2  # rows need not have equally many
    for entries in (1, 1 << 24):
        found = mathx.solve_rows(system, wanted, free, entries)
        for row, mask, of in zip(found, free, wanted.T):
            expected = torch.zeros(5, dtype=torch.float64)
            expected[mask] = torch.linalg.solve(system[mask][:, mask], of[mask])
            torch.testing.assert_close(row, expected)


def test_planted_down_projections_are_recovered_and_a_large_ridge_changes_nothing():
    features, start, _, x = problem(1, tokens=200)
    planted = start + torch.randn(start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    residual = x @ (planted - start).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(mathx.block_ridge(features, start, residual.clone(), 1e-12, 500), planted)
    torch.testing.assert_close(mathx.block_ridge(features, start, residual.clone(), 1e12, 3), start)


def test_an_expert_without_tokens_stays_and_one_with_few_leans_on_the_ridge():
    features, start, residual, x = problem(3)
    few = [(torch.tensor([7]), x.view(40, 3, 5)[7:8, 1])]
    none = [(torch.empty(0, dtype=torch.int64), torch.empty(0, 5, dtype=torch.float64))]
    found = mathx.block_ridge(lambda e: (features(0), few, none)[e], start, residual.clone(), 0.0, 2)
    assert torch.equal(found[2], start[2]) and found.isfinite().all()


def layer_pass(seed: int, dtype: torch.dtype = torch.float64) -> model_io.LayerPass:
    """The pass of a layer with random weights: 5 experts, the last without a token, each token to 2."""
    g = torch.Generator().manual_seed(seed)
    experts = model_io.Experts(*(torch.randn(5, *shape, generator=g).to(dtype) for shape in ((3, 6), (3, 6), (6, 3))))
    x, gates = torch.randn(700, 6, generator=g).to(dtype), torch.rand(700, 5, generator=g).to(dtype)
    gates[:, 4] = 0
    gates = torch.zeros_like(gates).scatter(1, gates.topk(2).indices, gates.topk(2).values)
    return model_io.LayerPass(0, "", model_io.Layer(experts, None, {}), x, gates, x, torch.nn.Identity())


@pytest.mark.parametrize("seed", range(3))
def test_the_factors_are_the_least_squares_solution_and_a_large_ridge_leaves_them_alone(seed):
    step, residual = layer_pass(seed), torch.randn(700, 6, generator=torch.Generator().manual_seed(9)).double()
    outputs = torch.stack([step.gates[:, e, None] * step.layer.experts(e, step.x) for e in range(4)])
    best = torch.linalg.lstsq(outputs.flatten(1).T, residual.flatten()).solution
    expected = torch.cat((1 + best, torch.ones(1, dtype=torch.float64)))  # no token: as it is
    torch.testing.assert_close(hodgecover.fit_scale(step, residual), expected)
    left = residual.clone()
    down = hodgecover.refit_layer(step, left, ridge=1e12)
    torch.testing.assert_close(down, step.layer.experts.down * expected[:, None, None])
    torch.testing.assert_close(left, residual - torch.einsum("e,etd->td", best, outputs))


def test_a_planted_scaling_comes_back():
    """A residual that is what wrong factors lack: no ridge bends that."""
    step, factor = layer_pass(3), torch.tensor([0.5, 1.0, 2.0, -1.0, 1.0]).double()
    residual = torch.zeros_like(step.x)
    hodgecover.add_outputs(residual, step, step.layer.experts.down * (factor - 1)[:, None, None])
    assert torch.equal(residual[:9], model_io.mix_experts(step.layer.experts._replace(
        down=step.layer.experts.down * (factor - 1)[:, None, None]), step.x[:9], step.gates[:9]))
    expected = step.layer.experts.down * factor[:, None, None]
    for sweeps in (1, 3):
        torch.testing.assert_close(hodgecover.refit_layer(step, residual.clone(), 0.1, sweeps), expected)


@pytest.mark.parametrize("path", sorted(p for p in GOLDEN.iterdir() if p.is_dir()), ids=lambda path: path.name)
def test_every_family_comes_nearer_to_the_source_and_all_experts_back_to_it(path, tmp_path):
    """Half of the experts: every sparse layer's error falls. All of them, their down projections spoilt: they come
    back, from more tokens than an expert is wide."""
    source = Path(shutil.copytree(path, tmp_path / "source"))
    ids = torch.randint(0, 96, (16, 64), generator=torch.Generator().manual_seed(0))
    model = Model(source, torch.float64)
    names = [layer for layer in model.layer_names if f"{layer}.mlp.gate.weight" in model.checkpoint.tensors]
    model_io.write_checkpoint(model.checkpoint, tmp_path / "half", {name: [0, 2, 3, 5] for name in names}, {})
    for error in hodgecover.refit(model, Model(tmp_path / "half", torch.float64), ids):
        assert error["after"] < 0.95 * error["before"]
    model_io.write_checkpoint(model.checkpoint, tmp_path / "all", {name: list(range(8)) for name in names}, {})
    spoilt = Model(tmp_path / "all", torch.float64)
    for name in names:
        down = spoilt.layer(spoilt.layer_names.index(name)).experts.down
        spoilt.store_down(name, down * 1.1 + 0.01)
    nearly_free = partial(hodgecover.refit_layer, ridge=1e-9, sweeps=200)
    for error in hodgecover.refit(model, Model(tmp_path / "all", torch.float64), ids, nearly_free):
        assert error["after"] < 1e-4 * error["before"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_stored_is_what_goes_on_and_is_cached(tmp_path, dtype):
    """Rounded to the type of the file, whatever the dtype of the products; refused where it overflows that."""
    source = Path(shutil.copytree(GOLDEN / "olmoe-plain", tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, source / "model.safetensors")
    model, ids = Model(source), torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    model_io.write_checkpoint(model.checkpoint, tmp_path / "out", {n: [0, 2, 3, 5] for n in model.layer_names}, {})
    *_, last = hodgecover.refit(model, Model(tmp_path / "out"), ids, cache=tmp_path)
    *_, target = model.stream(ids)
    *_, step = Model(tmp_path / "out").stream(ids)
    assert last["after"] == pytest.approx(((target.y - step.y).norm() / target.y.norm()).item(), rel=1e-4)
    cached = {load_file(file)["down"].dtype for file in tmp_path.glob("refit-*")}
    assert cached == {dtype}
    large = hodgecover.refit(model, Model(tmp_path / "out"), ids,
                             lambda step, _: step.layer.experts.down * (1e10 if dtype == torch.float16 else torch.inf))
    with pytest.raises(model_io.InputError, match=f"down_proj.weight: its new weights overflow {dtype}"):
        next(large)


def test_the_command_refits_says_so_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    work = [tiny, "--keep", 32, "--method", "reap", "--refit", 1024, "--cache", tmp_path / "cache", *QUICK]
    assert run(*work, "--out", tmp_path / "out") == 0
    plan, said = json.loads((tmp_path / "out" / "hodgecover.json").read_text()), capsys.readouterr().out
    assert plan["refit"]["tokens"] == 1024 and len(plan["refit"]["layers"]) == 4
    assert all(f"{layer['name']} refitted: output error {layer['before']:.4f} -> {layer['after']:.4f}" in said
               and layer["after"] < layer["before"] for layer in plan["refit"]["layers"])
    assert run(*work[:5], *work[7:], "--out", tmp_path / "plain") == 0
    plain, refitted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    changed = {name for name in plain if not torch.equal(plain[name], refitted[name])}
    assert changed == {name for name in plain if ".experts." in name and "down_proj" in name}
    assert all(plain[name].dtype == refitted[name].dtype for name in plain)

    def refuse(*_, **__):
        raise AssertionError("solved again")
    monkeypatch.setattr(mathx, "block_ridge", refuse)
    assert run(*work, "--out", tmp_path / "again") == 0
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(AssertionError, match="solved again"):  # another choice of survivors is another problem
        run(*work, "--method", "frequency", "--out", tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out", "plain", "again"}


def test_activations_beyond_the_memory_lie_on_disk_and_change_nothing(tiny, tmp_path, monkeypatch):
    made = []

    def scratch(folder: Path):
        made.append(folder)
        return real(folder)
    real = model_io.scratch
    monkeypatch.setattr(model_io, "scratch", scratch)
    for out, bytes_, files in (("all", 10**9, 0), ("none", 1, 1)):
        hodgecover.compress(tiny, 32, tmp_path / out, tokens=128, seq_len=64, settings=Settings("reap"), memory=bytes_,
                            refit_tokens=512)
        assert len(made) == files
    for file in (tmp_path / "all").iterdir():
        assert (tmp_path / "none" / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"all", "none"}


def test_scratch_tensors_are_files_that_go_with_them(tmp_path):
    empty, before = model_io.scratch(tmp_path), set(os.listdir("/dev/fd"))
    made = empty(3, 5, dtype=torch.bfloat16, device=torch.device("cpu"))
    made.fill_(2)
    assert made.shape == (3, 5) and made.sum() == 30 and not list(tmp_path.iterdir())
    del made
    assert set(os.listdir("/dev/fd")) == before


def test_operations_are_those_that_torch_counts():
    """But for the solves, which it does not count."""
    step, (n, f, d) = layer_pass(0), (5, 3, 6)
    with FlopCounterMode(display=False) as counter:
        hodgecover.add_outputs(step.x.clone(), step, hodgecover.refit_layer(step, step.x.clone()))
    solves = hodgecover.SWEEPS * n * (f**3 / 3 + 2 * f * f * d)
    expected = hodgecover.refit_operations(len(step.x), n, 2, d, f) - solves
    assert counter.get_total_flops() == pytest.approx(expected)


def test_the_estimate_is_near_what_happens(tiny, tmp_path, capsys):
    """Within a factor of 4 for small matrices beside other tests."""
    model, ids = Model(tiny), torch.randint(0, 2048, (16, 256), generator=torch.Generator().manual_seed(0))
    survivors = {name: list(range(32)) for name in model.layer_names}
    model_io.write_checkpoint(model.checkpoint, tmp_path / "out", survivors, {})
    cost = hodgecover.estimate_refit(model, 32, ids.numel())
    active = 4 * (4 * 96 * 96 + 64 * 96 + 4 * 96 + 8 * 3 * 96 * 16)
    assert cost.operations == 4 * hodgecover.refit_operations(4096, 32, 8, 96, 16) + 4 * 4096 * active
    started = time.perf_counter()
    assert len(list(hodgecover.refit(model, Model(tmp_path / "out"), ids, cache=tmp_path))) == 4
    assert 1 / 4 < cost.seconds / (time.perf_counter() - started) < 4
    assert cost.disk == pytest.approx(sum(file.stat().st_size for file in tmp_path.glob("refit-*")), rel=0.01)
    assert run(tiny, "--keep", 32, "--estimate", "--method", "reap", "--refit", 4096, "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert f"refit of 4 layers, float32: {cost.operations:.1e} operations" in said and "barriers" not in said


def test_pruned_entries_stay_pruned(tiny, tmp_path):
    """Also where another calibration sample has pruned others, and a layer refitted after that is in the cache."""
    for tokens in (128, 192):
        work = [tiny, "--keep", 64, "--method", "reap", "--total-rate", 0.6, "--cache", tmp_path / "cache", *QUICK,
                "--tokens", tokens]
        assert run(*work, "--out", tmp_path / f"plain{tokens}") == 0
        assert run(*work, "--refit", 1024, "--out", tmp_path / f"out{tokens}") == 0
        plain, refitted = (load_file(tmp_path / f"{name}{tokens}" / "model.safetensors") for name in ("plain", "out"))
        for name in plain:
            assert (refitted[name][plain[name] == 0] == 0).all()


@pytest.mark.parametrize("options, says", [
    (["--refit", 1], "--refit 1: must be from 2"), (["--refit", 100], "must be from 2 to the 100"),
    (["--refit", 100, "--estimate"], "2 to the 100 of --refit"),
    (["--refit", 1024, "--plan-only"], "do not go together"),
    (["--refit", 1024, "--router", "fold"], "--router drop"),
])
def test_wrong_choices_get_one_line(tiny, tmp_path, capsys, options, says):
    assert run(tiny, "--keep", 48, "--method", "reap", "--out", tmp_path / "out", "--seq-len", 128, *options) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not list(tmp_path.iterdir())
