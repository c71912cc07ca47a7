# SPDX-License-Identifier: MIT
"""Narrower experts: the scores against brute force and plain autograd, and the command on every family."""
import dataclasses
import json
import os
import weakref
from pathlib import Path

import common
import heapr
import hodgecover
import model_io
import pytest
import refit
import torch
from conftest import (DENSE, KINDS, PROSE, QUICK, assert_refused, assert_survives_kills, contents, named, record,
                      refuse, run, some_ids, sparse_names, with_tokenizer)
from fake_device import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from model_io import Experts, InputError, Model
from torch.nn import functional


def random_layer(seed: int, n: int = 4, d: int = 5, f: int = 6, tokens: int = 30, top_k: int = 2):
    """(experts, x (T, d), gates (T, n) that leave the last expert without a token, dL/dy (T, d)), float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    chosen = torch.rand(tokens, n - 1, generator=generator).topk(top_k).indices
    gates = torch.zeros(tokens, n, dtype=torch.float64).scatter(1, chosen, normal(tokens, top_k).exp())
    return Experts(normal(n, f, d), normal(n, f, d), normal(n, d, f)), normal(tokens, d), gates, normal(tokens, d)


def moments_of(experts: Experts, x, gates, slope, parts: int = 1) -> heapr.Moments:
    n, _, f = experts.down.shape
    moments = heapr.Moments(*(torch.zeros(shape, dtype=torch.float64) for shape in ((n,), (n, f), (n, f))))
    for some in zip(*(rows.chunk(parts) for rows in (x, gates, slope))):
        moments.add(experts, *some)
    return moments


# ------------------------------------------------------------------------------------------------- scores of one layer


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), parts=st.integers(1, 4))
def test_the_score_is_the_mean_over_tokens_of_half_a_quadratic_form(seed, parts):
    """1/2 e_j(x)' G e_j(x), token by token, with G as a matrix."""
    experts, x, gates, slope = random_layer(seed)
    found = moments_of(experts, x, gates, slope, parts).heapr()
    for e, down in enumerate(experts.down):
        t = gates[:, e].nonzero().squeeze(1).tolist()
        if not t:
            assert not found[e].any()
            continue
        g = [gates[i, e] * slope[i] for i in t]
        fisher = sum(torch.outer(each, each) for each in g) / len(t)
        outputs = [experts.hidden(e, x[i:i + 1])[0] * down for i in t]  # (d, f): what each unit adds
        brute = sum(torch.einsum("dj,dc,cj->j", out, fisher, out) for out in outputs) / 2 / len(t)
        torch.testing.assert_close(found[e], brute, rtol=1e-10, atol=0)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.01, 3.0, 1e4]))
def test_what_moves_between_up_and_down_leaves_the_scores(seed, factor):
    """All three: a unit's output is the same."""
    experts, x, gates, slope = random_layer(seed)
    c = torch.where(torch.arange(6) % 2 == 0, factor, 1.0).double()
    other = Experts(experts.gate, experts.up * c[:, None], experts.down / c)
    of = [(moments_of(each, x, gates, slope).heapr(), heapr.camera(layer_pass(each, x, gates)), heapr.magnitude(each))
          for each in (experts, other)]
    for before, after in zip(*of):
        torch.testing.assert_close(before, after, rtol=1e-9, atol=0)


def layer_pass(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> model_io.LayerPass:
    return model_io.LayerPass(0, "layer", model_io.Layer(experts, torch.ones(len(experts.down), 1), {}), None, x, gates,
                              None, None)


def test_camera_and_magnitude_by_their_definitions():
    experts, x, gates, _ = random_layer(1)
    found = heapr.camera(layer_pass(experts, x, gates))
    sizes = heapr.magnitude(experts)
    for e in range(4):
        for j in range(6):
            w = experts.down[e, :, j]
            gate, up = experts.gate[e, j], experts.up[e, j]
            energy = sum(gates[t, e] ** 2 * (functional.silu(gate @ x[t]) * (up @ x[t])) ** 2 for t in range(len(x)))
            torch.testing.assert_close(found[e, j], (w @ w) * energy)
            torch.testing.assert_close(sizes[e, j], gate.norm() * up.norm() * w.norm())


def test_an_expert_that_no_token_reaches_ranks_by_magnitude():
    experts, x, gates, slope = random_layer(2)
    score = moments_of(experts, x, gates, slope).heapr()
    found = heapr.settled(score, experts, "layer")
    assert torch.equal(found[:3], score[:3]) and not score[3].any()
    assert torch.equal(found[3], heapr.magnitude(experts)[3])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(model_io.InputError, match="layer: its scores are not finite"):
            heapr.settled(score.index_fill(0, torch.tensor([1]), bad), experts, "layer")


@settings(max_examples=20)
@given(score=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=3),
       width=st.integers(1, 5))
def test_the_best_units_stay_in_their_order(score, width):
    expected = [sorted(sorted(range(5), key=lambda j: -row[j])[:width]) for row in score]
    assert heapr.best_units(torch.tensor(score).double(), width).tolist() == expected


def test_a_unit_that_goes_takes_its_own_part_of_the_output_along():
    experts, x, *_ = random_layer(3)
    before = experts(1, x)
    for j in range(6):
        left = torch.tensor([i for i in range(6) if i != j])
        parts = {name: heapr.narrowed(part[1], left, name)[None] for name, part in experts._asdict().items()}
        change = Experts(**parts)(0, x) - before
        expected = -torch.outer(experts.hidden(1, x)[:, j], experts.down[1, :, j])
        torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)
    stacked = heapr.narrowed(torch.cat((experts.gate[1], experts.up[1])), left, "gate_up")
    assert torch.equal(stacked, torch.cat((experts.gate[1][left], experts.up[1][left])))


# ------------------------------------------------------------------------------------------------------ the gradients


def plain_backward(model: Model, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[dict]]:
    """The whole model as one graph: the stream before each decoder layer with its gradient, and (h, E_e(x) with its
    gradient) of each layer's experts that have a token."""
    h = model.embed(ids).requires_grad_()
    streams, outputs = [], []

    def watched(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        mixed = torch.zeros_like(x)
        for e in gates.any(0).nonzero().flatten().tolist():
            t = gates[:, e].nonzero().squeeze(1)
            out = experts(e, x[t])
            out.retain_grad()
            outputs[-1][e] = experts.hidden(e, x[t]).detach(), out
            mixed = mixed.index_add(0, t, gates[t, e, None] * out)
        return mixed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_io, "mix_experts", watched)
        for index in range(model.config.num_layers):
            outputs.append({})
            streams.append(h)
            h.retain_grad()
            h = model_io.run_layer(h, model.layer(index), model.config)[2].view_as(h)
    logits = model.norm(f"{model.prefix}norm.weight")(h) @ model.unembedding().T
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return streams, outputs


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
@pytest.mark.parametrize("at_once", [1, 64], ids=["one-by-one", "together"])
def test_the_sweep_gives_what_autograd_gives_through_the_whole_model(path, at_once, monkeypatch):
    """The gradient of the loss before each layer; and the scores, from the gradients of the experts' own outputs."""
    monkeypatch.setattr(heapr, "GRAPH_TOKENS", at_once)
    model, ids, swept = Model(path, torch.float64), some_ids(3, 20), []
    real = heapr.back_through

    def watched(layer, config, h, slope):
        moments = real(layer, config, h, slope)
        swept.append(slope.clone())
        return moments
    monkeypatch.setattr(heapr, "back_through", watched)
    shares = []
    found = dict(heapr.heapr_scores(model, ids, tick=shares.append))
    assert shares == sorted(shares) and shares[-1] == 1

    streams, outputs = plain_backward(model, ids)
    for stream, gradient in zip(streams, reversed(swept), strict=True):
        torch.testing.assert_close(gradient, stream.grad, rtol=1e-8, atol=1e-14)
    checked = 0
    for index, of_layer in enumerate(outputs):
        for e, (hidden, out) in of_layer.items():
            fisher = out.grad.T @ out.grad / len(out)
            down = model.layer(index).experts.down[e].double()
            expected = 0.5 * hidden.square().mean(0) * torch.einsum("dj,dc,cj->j", down, fisher, down)
            torch.testing.assert_close(found[model.layer_names[index]][e], expected, rtol=1e-7, atol=1e-20)
            checked += 1
    assert checked >= 8 and found.keys() == {*sparse_names(model)}


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen3_5-text"])
def test_the_slope_is_that_of_finite_differences(name, monkeypatch):
    """The loss after a small step of the stream before a layer, along random directions."""
    model, ids = Model(named(name), torch.float64), some_ids(1, 12)
    swept, real = {}, heapr.back_through

    def watched(layer, config, h, slope):
        moments = real(layer, config, h, slope)
        swept[model.config.num_layers - 1 - len(swept)] = h.clone(), slope.clone()
        return moments
    monkeypatch.setattr(heapr, "back_through", watched)
    dict(heapr.heapr_scores(model, ids))

    def loss(h: torch.Tensor, first: int) -> float:
        for index in range(first, model.config.num_layers):
            h = model_io.run_layer(h, model.layer(index), model.config)[2].view_as(h)
        log_p = common.log_probabilities(model.norm(f"{model.prefix}norm.weight")(h[0]), model.unembedding())
        return functional.nll_loss(log_p[:-1], ids[0, 1:]).item()
    for index, (h, slope) in swept.items():
        way = torch.randn(h.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        difference = (loss(h + 1e-6 * way, index) - loss(h - 1e-6 * way, index)) / 2e-6
        assert difference == pytest.approx((slope * way).sum().item(), rel=1e-5)


@pytest.mark.parametrize("decay", [1.0, 400.0], ids=["mild", "strong"])
def test_the_recurrence_in_chunks_has_the_plain_ones_gradient(decay):
    """That of chunks of a token each. A decay whose inverse overflows gives no NaN."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 9, 2, 3, generator=generator, dtype=torch.float64) / 2 for _ in range(3)]
    parts += [-decay * torch.rand(1, 9, 2, generator=generator, dtype=torch.float64),
              torch.rand(1, 9, 2, generator=generator, dtype=torch.float64)]
    gradients = []
    for size in (1, 4):
        leaves = [part.clone().requires_grad_() for part in parts]
        out = model_io.chunked_gated_delta_rule(*leaves, size=size)
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    for plain, chunked in zip(*gradients):
        torch.testing.assert_close(chunked, plain, rtol=1e-8, atol=1e-12)


def test_one_layer_is_in_memory_at_a_time(monkeypatch):
    model, held, real = Model(named("olmoe-sharded")), [], Model.layer

    def watched(self, index):
        assert all(layer.experts is None and not layer.weights for layer in held)
        held.append(real(self, index))
        return held[-1]
    monkeypatch.setattr(Model, "layer", watched)
    heapr.score_units(model, "heapr", some_ids(2, 20))
    assert len(held) == 6  # each layer forward and back
    assert held[-1].experts is None


@pytest.mark.parametrize("name", ["olmoe-sharded", "qwen3_5-vision-mtp"])
def test_the_activations_are_counted(name):
    """As many tensors (T, d) live at once as `activation_bytes` says: those that `empty` makes, beside
    the slope."""
    model, ids, live, most = Model(named(name)), some_ids(2, 20), weakref.WeakSet(), 0

    def empty(*shape, **kind):
        nonlocal most
        made = torch.empty(*shape, **kind)
        live.add(made.untyped_storage())
        most = max(most, len(live))
        return made
    dict(heapr.heapr_scores(model, ids, empty))
    counted = heapr.activation_bytes(model, ids.numel()) // (ids.numel() * 32 * 4)
    assert counted == most + 1


def test_activations_beyond_the_memory_go_to_disk(small, tmp_path, monkeypatch):
    made, real, limit = [], common.scratch, hodgecover.byte_count("10MB")
    monkeypatch.setattr(common, "scratch", lambda folder: made.append(folder) or real(folder))
    for out, size in (("out", limit), ("mapped", limit + 1)):
        monkeypatch.setattr(heapr, "activation_bytes", lambda model, tokens: size)
        assert run(heapr, small, "--width", 9, "--calib", tmp_path / "text.txt", *QUICK, "--memory", "10MB", "--out",
                   tmp_path / out) == 0
    assert len(made) == 1 and contents(tmp_path / "out") == contents(tmp_path / "mapped")


# -------------------------------------------------------------------------------------------------------- the command


def zero_columns(model: Model, kept: dict[str, torch.Tensor], out: Path) -> Path:
    """The checkpoint with the down projections' columns of all other units 0: the same function at the old width."""
    edits = {}
    for layer, units in kept.items():
        for e, own in enumerate(units):
            gone = [j for j in range(model.config.expert_width) if j not in own.tolist()]

            def zeroed(down, row, gone=gone):
                return down.index_fill(1, torch.tensor(gone), 0)
            edits[f"{layer}.mlp.experts.{e}.down_proj.weight"] = zeroed
            edits.setdefault(f"{layer}.mlp.experts.down_proj", {})[e] = zeroed
    fused = {name: lambda down, row, name=name, of=of: model.turned(name, of[row](model.turned(name, down), row))
             for name, of in edits.items() if isinstance(of, dict)}
    everyone = {layer: list(range(len(units))) for layer, units in kept.items()}
    common.write_edited(model.checkpoint, out, everyone, {}, edits | fused)
    return out


def test_every_family(family, tmp_path):
    """The command: smaller tensors, one key of the configuration, all else byte for byte; and the narrower model gives
    what the old one gives with the columns at 0."""
    given_files, model = contents(family), Model(family, torch.float64)
    assert run(heapr, family, "--rate", 0.3, "--calib", tmp_path / "text.txt", *QUICK, "--out", tmp_path / "out") == 0
    assert contents(family) == given_files
    output = Model(tmp_path / "out", torch.float64)
    width = round(0.7 * model.config.expert_width)
    assert output.config.expert_width == width and output.config.shared_width == model.config.shared_width
    key = "intermediate_size" if model.config.model_type == "olmoe" else "moe_intermediate_size"
    expected = json.loads(given_files["config.json"])
    expected.get("text_config", expected)[key] = width
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected

    ids = hodgecover.calibration_ids(model, [tmp_path / "text.txt"], 64, 32)
    scores = heapr.score_units(Model(family), "heapr", ids)
    kept = {name: heapr.best_units(score, width) for name, score in scores.items()}
    assert kept.keys() == {*sparse_names(model)}
    for name, info in model.checkpoint.tensors.items():
        if ".mlp.experts." not in name:
            assert torch.equal(model.checkpoint.load(name), output.checkpoint.load(name))
        assert output.checkpoint.tensors[name].file == info.file
    for layer, units in kept.items():
        index = model.layer_names.index(layer)
        of_source, of_output = model.layer(index).experts, output.layer(index).experts
        for e, own in enumerate(units):
            assert torch.equal(of_output.gate[e], of_source.gate[e][own])
            assert torch.equal(of_output.up[e], of_source.up[e][own])
            assert torch.equal(of_output.down[e], of_source.down[e][:, own])
    zeros = Model(zero_columns(model, kept, tmp_path / "zeros"), torch.float64)
    for narrow, wide in zip(output.stream(ids), zeros.stream(ids), strict=True):  # a multi-token head, too
        torch.testing.assert_close(narrow.y, wide.y, rtol=1e-9, atol=1e-9)

    others = {name for name in contents(tmp_path / "out") if ".safetensors" not in name}
    assert others == {"hodgecover.json"} | {name for name in given_files if ".safetensors" not in name}
    if model.checkpoint.sharded:
        index = json.loads((tmp_path / "out" / model_io.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(i.end - i.start for i in output.checkpoint.tensors.values())
    entry = record(tmp_path / "out")
    before = model.config.expert_width
    wanted = {"score": "heapr", "width": width, "source_width": before, "rate": 1 - width / before, "seed": 42,
              "dtype": "float32"}
    assert wanted.items() <= entry["settings"].items() and entry["settings"]["tokens"] == 64
    assert entry["source"]["fingerprint"] == model.checkpoint.fingerprint()


def test_nothing_gone_leaves_the_weights_bytes(family, tmp_path):
    assert run(heapr, family, "--rate", 0, "--score", "magnitude", "--out", tmp_path / "out") == 0
    before, after = contents(family), contents(tmp_path / "out")
    assert json.loads(before.pop("config.json")) == json.loads(after.pop("config.json"))
    after.pop("hodgecover.json")
    for files in (before, after):
        if model_io.INDEX in files:
            files[model_io.INDEX] = json.loads(files[model_io.INDEX])
    assert before == after


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen3_5-vision-mtp"])
def test_each_score_chooses_by_itself(name):
    model, ids = Model(named(name)), some_ids(2, 20)
    found = {score: heapr.score_units(model, score, ids) for score in heapr.SCORES}
    for step in model.stream(ids):
        if step.gates is None:
            continue
        torch.testing.assert_close(found["magnitude"][step.name], heapr.magnitude(step.layer.experts))
        torch.testing.assert_close(found["camera"][step.name], heapr.camera(step))
        if step.name.startswith("mtp."):
            assert torch.equal(found["heapr"][step.name], found["camera"][step.name])
        else:
            assert not torch.equal(found["heapr"][step.name], found["camera"][step.name])
    first, second, *_ = found["random"].values()
    assert not torch.equal(first, second)  # layers are not alike
    assert torch.equal(first, heapr.score_units(model, "random")[next(iter(found["random"]))])
    assert not torch.equal(first, heapr.score_units(model, "random", seed=1)[next(iter(found["random"]))])


def test_the_same_command_gives_the_same_bytes_and_a_rate_is_a_width(small, tmp_path, capsys):
    work = ["--calib", tmp_path / "text.txt", *QUICK]
    for out, size in (("a", ["--rate", 0.5]), ("b", ["--rate", 0.5]), ("c", ["--width", 8])):
        assert run(heapr, small, *size, *work, "--out", tmp_path / out) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert "hidden units of each expert: 16 -> 8, by heapr" in capsys.readouterr().out
    for score, options in (("camera", work), ("random", []), ("magnitude", [])):
        assert run(heapr, small, "--width", 8, "--score", score, *options, "--out", tmp_path / score) == 0
        settings_of = record(tmp_path / score)["settings"]
        assert settings_of["score"] == score and ("tokens" in settings_of) == (score == "camera")
        assert ("seed" in settings_of) == (score != "magnitude")


def test_after_hodgecover_and_before_the_refit(small, tmp_path, capsys):
    """hodgecover.py, then heapr.py, then refit.py to the original source: each command reads what the last one wrote,
    and the refit brings the narrower experts nearer to the source."""
    work = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(hodgecover, small, "--keep", 6, *work, "--out", tmp_path / "kept") == 0
    assert run(heapr, tmp_path / "kept", "--width", 10, *work, "--out", tmp_path / "narrow") == 0
    assert run(refit, small, tmp_path / "narrow", *work, "--out", tmp_path / "refitted") == 0
    history = json.loads((tmp_path / "refitted" / "hodgecover.json").read_text())["history"]
    assert [entry["command"] for entry in history] == ["hodgecover.py", "heapr.py", "refit.py"]
    output = Model(tmp_path / "refitted")
    assert (output.config.num_experts, output.config.expert_width) == (6, 10)
    assert all(layer["after"] < layer["before"] for layer in history[-1]["output_error"])
    assert output.logits(some_ids(2, 20)).isfinite().all()


def test_a_width_that_transformers_does_not_take_by_default_is_told(small, tmp_path, capsys):
    """Its grouped products want rows of 16 bytes: 4 numbers of float32."""
    for width, says in ((8, ""), (12, '"eager" or "batched_mm", or in float32; llama.cpp'), (
            11, '"eager" or "batched_mm"; llama.cpp leaves the down projections in F16')):
        assert run(heapr, small, "--width", width, "--score", "magnitude", "--out", tmp_path / str(width)) == 0
        said = capsys.readouterr().err
        assert said.count("\n") == bool(says) and says in said and (f"width {width}: no multiple of 8" in said) == bool(
            says)


@pytest.mark.parametrize("score", ["heapr", "camera"])
def test_on_another_device(small, tmp_path, score):
    for device in ("fake", "cpu"):
        with Accelerator(), torch.autograd.set_multithreading_enabled(False):  # the mode is this thread's
            assert run(heapr, small, "--width", 8, "--score", score, "--calib", tmp_path / "text.txt", *QUICK,
                       "--device", device, "--out", tmp_path / device) == 0
    assert contents(tmp_path / "fake") == contents(tmp_path / "cpu")


@pytest.mark.parametrize("score", ["heapr", "camera"])
def test_a_killed_run_leaves_no_output(small, tmp_path, monkeypatch, score):
    before = sorted(os.listdir(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(heapr, "export", interrupted)
    assert run(heapr, small, "--width", 8, "--score", score, "--calib", tmp_path / "text.txt", *QUICK, "--out",
               tmp_path / "out") == 130
    assert sorted(os.listdir(tmp_path)) == sorted(before + ["out-heapr"] * (score == "heapr"))


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen3-dense-first", "qwen3_5-vision-mtp"])
def test_a_killed_run_continues_below_the_layers_that_are_done(name, tmp_path, monkeypatch):
    """To the same bytes, killed again and again: each layer is run back once. Then the folder of the layers goes."""
    source = with_tokenizer(named(name), tmp_path / "source")
    (tmp_path / "text.txt").write_text(PROSE)
    count = Model(source).config.num_layers
    assert_survives_kills(monkeypatch, (heapr, "back_through"), count, heapr, source, "--width", 8, "--calib",
                          tmp_path / "text.txt", *QUICK, folder=tmp_path)
    assert not (tmp_path / "out-heapr").exists()


@pytest.mark.parametrize("rate, width, taken", [
    (0.5, 1024, 512), (0.66, 768, 256), (0.2, 1280, 1024), (0.6, 1024, 416), (0.66, 1024, 352), (0.25, 768, 576),
    (0.2656, 2816, 2048), (0.5, 1000, 496), (0.59, 100, 40), (0.25, 16, 12), (0.66, 32, 11), (0.995, 1024, 8),
    (0.004, 1020, 1016), (0.0, 1000, 1000), (0.0, 1020, 1020)])
def test_a_rate_is_a_multiple_of_256_or_32_or_8_if_that_moves_it_little(rate, width, taken):
    """Within a point of the first of them that is; never 0, never wider than it was; nothing goes by a rate of 0."""
    model = Model(named("qwen3-plain-tied"))
    model.layer_configs = [dataclasses.replace(config, expert_width=width) for config in model.layer_configs]
    assert heapr.choose_width(model, rate) == taken


@pytest.mark.parametrize("width", [16, 32])
def test_transposed_experts_do_not_become_square(width):
    """transformers tells the two layouts apart by the shape alone."""
    for name in ("qwen3_vl-published", "qwen3_vl-resaved"):
        model = Model(named(name))  # d is 32
        model.layer_configs = [dataclasses.replace(config, expert_width=64) for config in model.layer_configs]
        if model.transposed:
            with pytest.raises(InputError, match=f"^width {width}: transposed experts that are square"):
                heapr.choose_width(model, width=width)
        else:
            assert heapr.choose_width(model, width=width) == width


@pytest.mark.parametrize("options, says", [
    ([], "one of the arguments --rate --width is required"),
    (["--rate", 0.5, "--width", 8], "not allowed with"),
    (["--rate", 1.5], "--rate 1.5: must be from 0 to 1"), (["--rate", "nan"], "--rate nan: must be"),
    (["--rate", -0.1], "--rate -0.1: must be"), (["--rate", 0.98], "--rate 0.98: no hidden unit of 16 would stay"),
    (["--width", 0], "--width 0: must be from 1 to 16"), (["--width", 17], "--width 17: must be from 1 to 16"),
    (["--width", 8, "--score", "taylor"], "invalid choice"),
    (["--width", 8, "--score", "camera", "--memory", "2GB"], "--memory: --score camera does not use it"),
    (["--width", 8, "--score", "random", "--tokens", 64], "--tokens: --score random does not use it"),
    (["--width", 8, "--score", "magnitude", "--seed", 1], "--seed: --score magnitude does not use it"),
    (["--width", 8, "--score", "magnitude", "--calib", "x"], "--calib: --score magnitude does not use it"),
    (["--width", 8, "--score", "magnitude", "--seq-len", 9], "--seq-len: --score magnitude does not use it"),
    (["--width", 8, "--out", "SMALL/out"], "lies in the checkpoint"),
    (["--width", 8, "--tokens", 1], "--tokens 1: must be"), (["--width", 8, "--seed", -1], "--seed -1: must be"),
    (["--width", 8, "--score", "random", "--seed", 2**70], f"--seed {2**70}: must be"),
])
def test_bad_input_gets_one_line_before_the_work(small, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "layer", refuse)
    options = [str(option).replace("SMALL", str(small)) for option in options]
    assert_refused(capsys, run(heapr, small, "--out", tmp_path / "out", *options), says)
    assert not (tmp_path / "out").exists() and not (small / "out").exists()


def test_a_checkpoint_that_cannot_be_continued(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Model, "layer", refuse)
    (small / "hodgecover.json").write_text('{"layers": []}')
    assert_refused(capsys, run(heapr, small, "--width", 8, "--out", tmp_path / "out"), "not a record")


def test_a_dense_model_is_refused(tmp_path, capsys, monkeypatch):
    dense = with_tokenizer(DENSE[0], tmp_path / "dense")
    monkeypatch.setattr(Model, "layer", refuse)
    assert_refused(capsys, run(heapr, dense, "--width", 8, "--out", tmp_path / "out"), "it is dense")
    assert not (tmp_path / "out").exists()
