# SPDX-License-Identifier: MIT
"""Wanda: its masks entry by entry, its layers in order, and the command on every family."""
import json

import baselines
import common
import heapr
import model_io
import pytest
import torch
import wanda
from conftest import (DENSE, QUICK, assert_refused, contents, dropped, named, record, refuse, run, sparse_names,
                      with_tokenizer)
from fake_device import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from model_io import Model


def matrices(path) -> dict[str, torch.Tensor]:
    """The matrices of the experts of a checkpoint, and of its dense layers."""
    model = Model(path)
    return {name: model.turned(name, model.checkpoint.load(name)) for name in model.checkpoint.tensors
            if "_proj" in name and ".mlp." in name}


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 8), group=st.sampled_from([2, 4, 8]))
def test_the_masks_keep_the_largest_products(seed, count, group):
    """Against a plain loop, on few distinct numbers: of equal products the first go."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (5, 8), generator=generator).float()
    norms = torch.randint(0, 3, (8,), generator=generator).float()

    def best(entries: list[float], kept: int) -> list[bool]:
        least = sorted(range(len(entries)), key=lambda j: entries[j])[:len(entries) - kept]
        return [j not in least for j in range(len(entries))]
    products = (weight.abs() * (norms if norms.any() else 1)).tolist()
    assert wanda.keep_largest(weight, norms, count).tolist() == [best(row, count) for row in products]
    kept = min(count, group - 1)
    expected = [sum((best(row[j:j + group], kept) for j in range(0, 8, group)), []) for row in products]
    assert wanda.keep_largest(weight, norms, kept, group).tolist() == expected


def test_the_count_is_floored_as_in_the_published_code():
    weight = torch.arange(1.0, 11.0).view(2, 5)
    assert wanda.keep_share(weight, torch.ones(5), 0.59).sum(1).tolist() == [3, 3]
    assert wanda.keep_share(weight, torch.ones(5), 0.6).sum(1).tolist() == [2, 2]
    assert wanda.keep_share(weight, torch.zeros(5), 0.6).tolist() == [[False] * 3 + [True] * 2] * 2  # magnitude alone
    for before, after, total, columns, gone in ((64, 48, 0.5, 96, 32), (200, 100, 0.7, 80, 32)):  # not 31.999...
        rate = wanda.residual_rate(total, 1 - after / before)
        assert wanda.keep_share(torch.ones(1, columns), torch.ones(columns), rate).sum() == columns - gone


def zeroed(weight: torch.Tensor, x: torch.Tensor, rate: float) -> torch.Tensor:
    """A matrix (o, i) pruned as the paper says, on the inputs x (R, i); by magnitude if there are none."""
    norms = x.square().sum(0).sqrt() if len(x) else torch.ones(x.shape[1])
    score = weight.abs() * norms
    return weight.scatter(1, score.argsort(dim=1)[:, :int(rate * score.shape[1])], 0)


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen2-dense-between", "qwen3_5-vision-mtp", "qwen3_vl-published"])
def test_each_layer_is_pruned_on_what_the_pruned_layers_before_it_give(tmp_path, name):
    """Each matrix against the paper's rule, on the pass of a checkpoint whose earlier layers are pruned already. Some
    experts have no token."""
    source, idle = Model(named(name), torch.float64), 0
    ids = torch.arange(5)[None]
    for out in ("out", "so-far"):
        dropped(source.checkpoint.path, tmp_path / out, range(8))
    output, so_far = (Model(tmp_path / out, torch.float64) for out in ("out", "so-far"))
    shares = []
    pruned = wanda.prune(output, ids, lambda weight, norms: wanda.keep_share(weight, norms, 0.4), shares.append)
    assert pruned == sum((weight == 0).sum().item() for weight in matrices(tmp_path / "out").values())
    assert len(shares) == len(source.layer_names) and shares == sorted(shares) and shares[-1] == 1

    for index, layer in enumerate(source.layer_names):
        step = next(step for step in so_far.stream(ids) if step.index == index)
        if step.gates is None:
            continue
        found = output.layer(index)
        for e in range(8):
            gate, up, down = (part[e] for part in step.layer.experts)
            x = step.x[step.gates[:, e] > 0]
            idle += not len(x)
            assert torch.equal(found.experts.gate[e], zeroed(gate, x, 0.4))
            assert torch.equal(found.experts.up[e], zeroed(up, x, 0.4))
            assert torch.equal(found.experts.down[e], zeroed(down, step.layer.experts.hidden(e, x), 0.4))
        for key, weight in step.layer.weights.items():
            if "shared_expert." in key:
                x = model_io.gated(step.x, step.layer.weights, "mlp.shared_expert") if "down" in key else step.x
                assert torch.equal(found.weights[key], zeroed(weight, x, 0.4))
        for key in so_far.checkpoint.tensors:
            if key.startswith(f"{layer}."):
                common.overwrite(so_far.checkpoint, key, output.checkpoint.load(key))
    assert idle, "give fewer tokens, so that an expert has none"


@pytest.mark.parametrize("options", [["--rate", 0.5], ["--nm", "2:4"]], ids=["rate", "groups"])
def test_every_family(family, tmp_path, options):
    """All experts, shared and fused ones among them, and nothing else; the record; the input as it was."""
    before, given_files = matrices(family), contents(family)
    calib = ["--calib", tmp_path / "text.txt"]
    assert run(wanda, family, *options, *calib, *QUICK, "--out", tmp_path / "out") == 0
    after = matrices(tmp_path / "out")
    for name, weight in before.items():
        zeros = after[name] == 0
        assert torch.equal(after[name], weight.masked_fill(zeros, 0))  # the others bit for bit
        if "expert" not in name:
            assert torch.equal(after[name], weight)
        elif options[0] == "--rate":
            assert (zeros.sum(-1) == weight.shape[-1] // 2).all()
        else:
            assert (zeros.reshape(-1, 4).sum(1) == 2).all()
    assert contents(family) == given_files
    others = {name: content for name, content in contents(tmp_path / "out").items() if ".safetensors" not in name}
    assert others.keys() == {"hodgecover.json"} | {name for name in given_files if ".safetensors" not in name}
    entry = record(tmp_path / "out")
    assert entry["pruned"] == {"checkpoint": 0.5}
    assert entry["checkpoint"]["fingerprint"] == model_io.Checkpoint(family).fingerprint()
    assert Model(tmp_path / "out").logits(torch.arange(9)[None]).isfinite().all()


def test_a_total_rate_counts_the_experts_that_are_gone(small, tmp_path, capsys):
    ckpt, work = dropped(small, tmp_path / "half"), ["--calib", tmp_path / "text.txt", *QUICK]
    total = ["--total-rate", 0.75, "--source", small]
    assert run(wanda, ckpt, *total, *work, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    left = sum((weight != 0).sum().item() for weight in matrices(tmp_path / "out").values())
    before = sum(weight.numel() for weight in matrices(small).values())
    entry = record(tmp_path / "out")
    assert entry["settings"]["rate"] == 0.5 and entry["settings"]["total_rate"] == 0.75
    assert entry["settings"]["experts_gone"] == 0.5 and "r1 = 0.5000 of the experts, r2 = 0.5000" in said
    assert entry["pruned"] == {"checkpoint": 0.5, "source": 1 - left / before} and 1 - left / before == 0.75
    assert "50.00% of the checkpoint's expert parameters are gone" in said
    assert "75.00% of the source's expert parameters are gone" in said
    assert entry["source"]["fingerprint"] == model_io.Checkpoint(small).fingerprint()
    assert run(wanda, ckpt, *total, *work, "--out", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert run(wanda, tmp_path / "out", "--rate", 0.5, *work, "--out", tmp_path / "more") == 0  # the history goes on
    history = json.loads((tmp_path / "more" / "hodgecover.json").read_text())["history"]
    assert [step["command"] for step in history] == ["wanda.py"] * 2 and history[0] == entry
    assert all(torch.equal(weight, weight.masked_fill(matrices(tmp_path / "out")[name] == 0, 0))
               for name, weight in matrices(tmp_path / "more").items())  # zeros go first


def test_the_rate_of_the_rest_is_equation_33(tmp_path):
    """B.4: 0.1625 for 33% and 0.575 for 66% at r1 = 0.20; r1 counts routed experts alone."""
    assert wanda.residual_rate(0.33, 0.20) == pytest.approx(0.1625)
    assert wanda.residual_rate(0.66, 0.20) == pytest.approx(0.575)
    assert wanda.residual_rate(0.1, 0.20) == 0
    source = Model(named("qwen2-renormalised"))
    model = Model(dropped(source.checkpoint.path, tmp_path / "few", (1, 2, 3, 4, 6, 7)))
    args = wanda.command_line().parse_args(["CKPT", "--total-rate", "0.6", "--source", "SOURCE", "--out", "DIR"])
    said, _ = wanda.choose_mask(args, model, source)
    assert said == {"total_rate": 0.6, "experts_gone": 0.25, "rate": pytest.approx(0.35 / 0.75)}


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen2-renormalised", "qwen3_5-vision-mtp", "qwen3_vl-published"])
def test_the_hybrid_is_pruned_on_the_source_s_activations(tmp_path, name):
    """Each matrix, of shared experts too, by the source's pass (B.4), though the pruned model's would say otherwise."""
    source, kept = Model(named(name), torch.float64), [6, 0, 3, 5]
    ids = torch.arange(24).view(2, 12)
    for out in ("out", "other"):
        dropped(source.checkpoint.path, tmp_path / out, kept)
    output, other = Model(tmp_path / "out", torch.float64), Model(tmp_path / "other", torch.float64)
    mask = lambda weight, norms: wanda.keep_share(weight, norms, 0.4)  # noqa: E731
    pruned = wanda.prune_on_source(output, source, ids, mask)
    assert pruned == sum((weight == 0).sum().item() for weight in matrices(tmp_path / "out").values())
    wanda.prune(other, ids, mask)
    differ = 0
    for step in source.stream(ids):
        if step.gates is None:
            continue
        layer, remeasured = output.layer(step.index), other.layer(step.index)
        for e, own in enumerate(kept):
            gate, up, down = (part[own] for part in step.layer.experts)
            x = step.x[step.gates[:, own] > 0]
            assert torch.equal(layer.experts.gate[e], zeroed(gate, x, 0.4))
            assert torch.equal(layer.experts.up[e], zeroed(up, x, 0.4))
            assert torch.equal(layer.experts.down[e], zeroed(down, step.layer.experts.hidden(own, x), 0.4))
            differ += not torch.equal(layer.experts.gate[e], remeasured.experts.gate[e])
        for key, weight in step.layer.weights.items():
            if "shared_expert." in key:
                x = model_io.gated(step.x, step.layer.weights, "mlp.shared_expert") if "down" in key else step.x
                assert torch.equal(layer.weights[key], zeroed(weight, x, 0.4))
    assert differ


def test_a_merged_expert_has_the_norms_of_its_router_row(small, tmp_path):
    work = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(baselines, small, "--keep", 4, "--method", "mc-smoe", *work, "--out", tmp_path / "merged") == 0
    groups = record(tmp_path / "merged")["layers"][1]["groups"]
    model, source = Model(tmp_path / "merged"), Model(small)
    assert wanda.experts_of_source(model, source)["model.layers.1"] == sorted(group[0] for group in groups)
    total = ["--total-rate", 0.75, "--source", small]
    assert run(wanda, tmp_path / "merged", *total, *work, "--out", tmp_path / "out") == 0
    assert record(tmp_path / "out")["settings"]["rate"] == 0.5


def test_the_experts_that_are_gone_are_the_decoder_s(tmp_path):
    """r1 counts no expert of a multi-token head, which here keeps more of its own."""
    source = Model(named("qwen3_5-vision-mtp"))
    survivors = {name: [0, 2, 3, 4, 5, 7] if name.startswith("mtp.") else [0, 2, 3, 5] for name in sparse_names(source)}
    common.write_edited(source.checkpoint, tmp_path / "out", survivors, {})
    output = Model(tmp_path / "out")
    assert [config.num_experts for config in output.layer_configs if config.sparse][-2:] == [4, 6]
    assert wanda.experts_gone(output, source) == 0.5


@pytest.mark.parametrize("of", ["half", "small"])
def test_experts_that_are_not_the_source_s_are_refused(small, tmp_path, capsys, monkeypatch, of):
    """Before anything is copied: rows that the source has not, and a row that it has twice."""
    monkeypatch.setattr(common, "copied", refuse)
    dropped(small, tmp_path / "half")
    checkpoint, name = model_io.Checkpoint(tmp_path / of), "model.layers.1.mlp.gate.weight"
    rows = checkpoint.load(name)
    rows[1] = rows[0]
    common.overwrite(checkpoint, name, {"half": rows * 2, "small": rows}[of])
    work = ["--calib", tmp_path / "text.txt", *QUICK, "--out", tmp_path / "out"]
    status = run(wanda, tmp_path / "half", "--total-rate", 0.75, "--source", small, *work)
    assert_refused(capsys, status, "the experts of model.layers.1 are not the source's")
    assert not (tmp_path / "out").exists()


def test_narrower_experts_are_refused(small, tmp_path, capsys):
    """Their hidden units are not known to be the source's."""
    work = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(heapr, small, "--width", 8, *work, "--out", tmp_path / "narrow") == 0
    capsys.readouterr()
    status = run(wanda, tmp_path / "narrow", "--total-rate", 0.75, "--source", small, *work, "--out", tmp_path / "out")
    assert_refused(capsys, status, "another width")


def test_the_copy_is_run_in_the_dtype_of_the_checkpoint(small, tmp_path):
    with common.copied(Model(small, torch.float64), tmp_path / "out", {"command": "a test"}) as output:
        assert output.dtype == torch.float64 and output.checkpoint.path != tmp_path / "out"
    assert record(tmp_path / "out")["command"] == "a test"


def test_on_another_device(small, tmp_path):
    for device in ("fake", "cpu"):
        with Accelerator():
            assert run(wanda, small, "--rate", 0.5, "--calib", tmp_path / "text.txt", *QUICK, "--device", device,
                       "--out", tmp_path / device) == 0
    assert contents(tmp_path / "fake") == contents(tmp_path / "cpu")


@pytest.mark.parametrize("options, says", [
    ([], "one of the arguments --rate --total-rate --nm is required"),
    (["--rate", 0.5, "--nm", "2:4"], "not allowed with"),
    (["--rate", 1], "--rate 1.0: must be from 0 to 0.99"),
    (["--rate", "nan"], "--rate nan: must be"),
    (["--total-rate", 0.5], "--source: goes with --total-rate"),
    (["--rate", 0.5, "--source", "SMALL"], "--source: goes with --total-rate"),
    (["--total-rate", 1.5, "--source", "SMALL"], "--total-rate 1.5: must be from 0 to 0.99"),
    (["--nm", "4:2"], "--nm 4:2: N must be below M"), (["--nm", "0:4"], "--nm 0:4: N must be below M"),
    (["--nm", "2:5"], "every expert's matrices, 16, 32"), (["--nm", "2"], "two numbers such as 2:4"),
    (["--rate", 0.5, "--memory", "1GB"], "--memory"),
    (["--rate", 0.5, "--out", "SMALL/out"], "lies in the checkpoint"),
    (["--total-rate", 0.75, "--source", "SMALL", "--out", "SMALL/out"], "lies in the checkpoint"),
    (["--rate", 0.5, "--tokens", 1], "--tokens 1: must be"),
])
def test_bad_input_gets_one_line_before_the_work(small, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "stream", None)
    in_ckpt = says == "lies in the checkpoint" and "--source" not in options
    ckpt = small if in_ckpt else dropped(small, tmp_path / "half")
    options = [str(option).replace("SMALL", str(small)) for option in options]
    status = run(wanda, ckpt, "--calib", tmp_path / "text.txt", *QUICK, "--out", tmp_path / "out", *options)
    assert_refused(capsys, status, says)
    assert not (tmp_path / "out").exists() and not (small / "out").exists()


@pytest.mark.parametrize("name", ["qwen3_vl-published", "qwen3_vl-resaved"])
def test_the_groups_of_transposed_experts_are_of_their_inputs(name):
    with pytest.raises(model_io.InputError, match="matrices, 8, 32$"):
        wanda.check_groups(Model(named(name)), 2, 16)


def test_a_source_of_another_family_is_refused(small, tmp_path, capsys):
    source = named("qwen3-plain-tied")
    status = run(wanda, small, "--total-rate", 0.75, "--source", source, *QUICK, "--out", tmp_path / "out")
    assert_refused(capsys, status, "its family is olmoe; must be qwen3_moe")


def test_a_dense_model_is_refused(tmp_path, capsys):
    dense = with_tokenizer(DENSE[0], tmp_path / "dense")
    assert_refused(capsys, run(wanda, dense, "--rate", 0.5, *QUICK, "--out", tmp_path / "out"), "it is dense")


def test_a_dense_source_is_refused(small, tmp_path, capsys):
    dense = with_tokenizer(DENSE[0], tmp_path / "dense")
    status = run(wanda, small, "--total-rate", 0.5, "--source", dense, "--out", tmp_path / "out")
    assert_refused(capsys, status, "dense: no layer has a router over two experts or more; it is dense")


def test_a_checkpoint_that_cannot_be_continued_is_refused_before_the_work(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Model, "stream", None)
    (small / "hodgecover.json").write_text('{"layers": []}')
    status = run(wanda, small, "--rate", 0.5, "--calib", tmp_path / "text.txt", *QUICK, "--out", tmp_path / "out")
    assert_refused(capsys, status, "not a record")
    assert not (tmp_path / "out").exists()
