# SPDX-License-Identifier: MIT
"""Methods, orders and Wanda by the command line."""
import json
import shutil
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from model_io import Model
from safetensors.torch import load_file

QUICK = ["--tokens", "128", "--seq-len", "64", "--max-triangles", "20", "--dtype", "float32"]
GOLDEN = Path(__file__).parent / "golden"


def run(*argv: object) -> int:
    return hodgecover.main([str(a) for a in argv])


def plan_of(out: Path) -> dict:
    return json.loads((out / "hodgecover.json").read_text())


def refuse(*_, **__):
    raise AssertionError("a barrier was measured")


@pytest.mark.parametrize("method", hodgecover.METHODS)
def test_every_method_runs_by_the_same_command(tiny, tmp_path, monkeypatch, capsys, method):
    """On one cache; those that need no barriers measure none, and redirect by the router's rows."""
    if method in hodgecover.NO_BARRIERS:
        monkeypatch.setattr(hodgecover, "lens_barriers", refuse)
    assert run(tiny, "--keep", 32, "--method", method, "--out", tmp_path / "out", *QUICK) == 0
    plan = plan_of(tmp_path / "out")
    assert plan["settings"]["method"] == method
    for layer in plan["layers"]:
        assert layer["survivors"] == sorted(layer["order"][:32]) and sorted(layer["order"]) == list(range(64))
        assert ("eta" in layer) == ("retained" in layer) == (method not in hodgecover.NO_BARRIERS)
        if method in hodgecover.NO_BARRIERS:
            rows = model_io.Checkpoint(tiny).load(f"{layer['name']}.mlp.gate.weight")
            expected = mathx.nearest_rows(rows, layer["survivors"])
            assert layer["redirect"] == {str(i): j for i, j in expected.items()} and len(expected) == 32
    assert Model(tmp_path / "out").config.num_experts == 32


def test_a_random_order_is_seeded(tiny, tmp_path):
    for name, order in (("a", "random:3"), ("b", "random:3"), ("c", "random:4"), ("d", "saliency")):
        assert run(tiny, "--keep", 32, "--order", order, "--plan-only", "--out", tmp_path / name, *QUICK) == 0
    eta = [plan_of(tmp_path / name)["layers"][0]["eta"]["harmonic"] for name in "abcd"]
    assert eta[0] == eta[1] and len(set(eta)) == 3


# --------------------------------------------------------------------------------------------------- Wanda


def matrices(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = model_io.Checkpoint(path)
    return {name: checkpoint.load(name) for name in checkpoint.tensors if "_proj" in name and ".mlp." in name}


def test_wanda_prunes_the_survivors_to_the_total_rate(tiny, tmp_path, capsys):
    """The same survivors as without; each row of each matrix pruned as a plain loop over |W_ij| |X_j| says."""
    for name, options in (("plain", []), ("out", ["--total-rate", 0.6])):
        assert run(tiny, "--keep", 48, *options, "--out", tmp_path / name, *QUICK) == 0
    said = capsys.readouterr().out
    plan, dense, sparse = plan_of(tmp_path / "out"), matrices(tmp_path / "plain"), matrices(tmp_path / "out")
    assert plan["layers"] == plan_of(tmp_path / "plain")["layers"]
    rate = 1 - 0.4 * 64 / 48
    assert plan["settings"]["wanda"]["rate"] == pytest.approx(rate)
    before = sum(w.numel() for w in matrices(tiny).values())
    achieved = 1 - sum((w != 0).sum().item() for w in sparse.values()) / before
    assert plan["settings"]["wanda"]["total_rate"] == pytest.approx(achieved, abs=1e-3)
    assert achieved == pytest.approx(0.6, abs=0.02) and f"{plan['settings']['wanda']['total_rate']:.2%}" in said
    model = Model(tiny)
    ids = hodgecover.calibration_ids(model, [], 128, 64, 0)
    step = next(model.stream(ids))
    survivors = plan["layers"][0]["survivors"]
    for slot in (0, 17, 47):
        e = survivors[slot]
        x = step.x[step.gates[:, e] > 0]
        reads = {"gate": x, "up": x, "down": step.layer.experts.hidden(e, x)}
        for part, rows in reads.items():
            name = f"model.layers.0.mlp.experts.{slot}.{part}_proj.weight"
            norms = rows.norm(dim=0) if len(rows) else torch.ones(rows.shape[1])
            for kept, row in zip(sparse[name], dense[name]):
                score = (row.float().abs() * norms).tolist()
                least = sorted(range(len(row)), key=lambda j: score[j])[:round(rate * len(row))]
                assert (kept == 0).nonzero().squeeze(1).tolist() == sorted(least)
                assert torch.equal(kept[kept != 0], row[kept != 0])
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == \
        (tmp_path / "plain" / "model.safetensors").stat().st_size


def test_groups_of_weights(tiny, tmp_path, capsys):
    assert run(tiny, "--keep", 48, "--method", "reap", "--nm", "2:4", "--out", tmp_path / "out", *QUICK) == 0
    for weight in matrices(tmp_path / "out").values():
        assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
    assert plan_of(tmp_path / "out")["settings"]["wanda"] == {"nm": "2:4", "total_rate": 1 - 0.75 / 2}
    assert "62.50% of all experts' parameters are gone" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen2-plain", "qwen3_5-vision-mtp"])
def test_shared_and_fused_experts_are_pruned_too(tmp_path, name):
    """All experts kept, half of their weights gone: norms of every calibration token for the shared expert."""
    path = next(path for path in GOLDEN.iterdir() if path.name.startswith(name.split("-")[0]) and (
        "vision" in path.name) == ("vision" in name))
    source = Path(shutil.copytree(path, tmp_path / "c"))
    model = Model(source)
    ids = load_file(path / "golden.safetensors")["ids"]
    n = model.config.num_experts
    norms = {model.layer_names[i]: signals for i, signals in hodgecover.measure_saliency(model, ids)}
    settings, mask = hodgecover.wanda_settings(model, n, 0.5, None)
    edits = hodgecover.wanda_edits(model, norms, mask)
    survivors = {layer: list(range(n)) for layer in norms}
    model_io.write_checkpoint(model.checkpoint, tmp_path / "out", survivors, {}, edits)
    before, after = matrices(source), matrices(tmp_path / "out")
    pruned = {key for key in before if not torch.equal(before[key], after[key])}
    assert pruned == set(edits) and any("shared_expert" in key for key in pruned)
    for key in pruned:
        gone = (after[key] == 0).sum(-1)
        assert (gone == round(0.5 * after[key].shape[-1])).all()
    assert torch.isfinite(Model(tmp_path / "out").logits(ids)).all()


@pytest.mark.parametrize("options, says", [
    (["--keep", 48, "--total-rate", 0.1], "takes 0.2500 already"),
    (["--keep", 48, "--total-rate", 1.5], "from 0 to 0.99"),
    (["--keep", 48, "--total-rate", 0.5, "--nm", "2:4"], "--total-rate and --nm do not go together"),
    (["--keep", 48, "--expert-rate", 0.5], "--keep and --expert-rate do not go together"),
    (["--expert-rate", 0.95], "--expert-rate 0.95 keeps 3: the model has"),
    (["--keep", 48, "--nm", "4:2"], "N must be below M"), (["--keep", 48, "--nm", "2:7"], "M divide the width"),
    (["--keep", 48, "--nm", "2"], "two numbers such as 2:4"), (["--method", "best", "--keep", 48], "--method"),
    (["--keep", 48, "--order", "random:x"], "must be saliency or index or random:SEED"),
])
def test_wrong_choices_get_one_line(tiny, tmp_path, capsys, options, says):
    assert run(tiny, *options, "--out", tmp_path / "out", *QUICK) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and said.out == "" and not (tmp_path / "out").exists()


def test_an_expert_rate_is_a_number_of_experts(tiny, tmp_path):
    assert run(tiny, "--expert-rate", 0.25, "--method", "reap", "--plan-only", "--out", tmp_path / "out", *QUICK) == 0
    assert plan_of(tmp_path / "out")["settings"]["keep"] == 48


def test_a_plan_with_pruned_weights_is_not_exported_without_their_norms(tiny, tmp_path, capsys):
    plan = ["--keep", 48, "--method", "reap", "--total-rate", 0.5, "--plan-only", "--out", tmp_path / "plan"]
    assert run(tiny, *plan, *QUICK) == 0
    assert run(tiny, "--plan", tmp_path / "plan" / "hodgecover.json", "--out", tmp_path / "out") == 2
    assert "made with Wanda" in capsys.readouterr().err
