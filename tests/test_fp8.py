# SPDX-License-Identifier: MIT
"""FP8 checkpoints: their numbers, what the commands make of them, what is refused. The oracle is a bfloat16 checkpoint
that is dequantised here: a command must make the same of both. (test_model_io.py reads and writes them, too.)"""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import audit
import baselines
import budgets
import common
import distil
import dot_moe
import estimate
import evaluate
import export_plan
import heapr
import hodgecover
import model_io
import nested
import pytest
import refit
import torch
import wanda
from conftest import (FP8, FP8_DENSE, INCOMPLETE, PROSE, QUICK, assert_refused, contents, dropped, named, record, run,
                      some_ids, with_tokenizer)
from model_io import Checkpoint, InputError, Model
from safetensors.torch import load_file, save_file

OLMOE, ONE_SCALE = named("fp8-olmoe"), named("fp8-qwen3-one-scale")
SAYS = "weights: FP8 in the source, bfloat16 in the output: two bytes a weight, not one\n"


def change_files(folder: Path, change: Callable[[dict], dict]) -> None:
    """Change the tensors of each weight file; the index follows."""
    found = {file: change(load_file(file)) for file in folder.glob("model*.safetensors")}
    for file, tensors in found.items():
        save_file(tensors, file, metadata={"format": "pt"})
    if (folder / model_io.INDEX).exists():
        weight_map = {name: file.name for file, tensors in found.items() for name in tensors}
        (folder / model_io.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Change quantization_config, at the top or in text_config; None: it goes."""
    raw = json.loads((folder / "config.json").read_text())
    text = raw if "quantization_config" in raw else raw["text_config"]
    text["quantization_config"] = change(text["quantization_config"])
    if text["quantization_config"] is None:
        del text["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))


def dequantised(source: Path, folder: Path) -> Path:
    """The checkpoint in bfloat16, by the plain definition."""
    block = model_io.quantisation(Checkpoint(source).raw_config)["weight_block_size"]

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            scale, weight = tensors.pop(name).float(), tensors[name.removesuffix("_scale_inv")].float()
            rows, columns = map(torch.arange, weight.shape)
            each = scale[rows[:, None] // block[0], columns // block[1]] if block else scale
            tensors[name.removesuffix("_scale_inv")] = (weight * each).bfloat16()
        return tensors
    shutil.copytree(source, folder)
    change_files(folder, change)
    change_config(folder, lambda _: None)
    return folder


def stored_bytes(path: Path) -> dict[str, bytes]:
    """All weights and scales of a checkpoint."""
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for file in path.glob("model*.safetensors")
            for name, tensor in load_file(file).items()}


def assert_same(path: Path, other: Path) -> None:
    """Two checkpoints have the same weights in memory."""
    one, two = Model(path), Model(other)
    for index, name in enumerate(one.layer_names):
        found, expected = one.layer(index), two.layer(index)
        assert found.weights.keys() == expected.weights.keys()
        assert all(torch.equal(found.weights[key], expected.weights[key]) for key in found.weights), name
        assert (found.experts is None) == (expected.experts is None)
        assert found.experts is None or all(map(torch.equal, found.experts, expected.experts)), name
        assert found.router is None or torch.equal(found.router, expected.router)
    assert torch.equal(one.unembedding(), two.unembedding()) and len(one.layer_names) == len(two.layer_names)


def quantisation_of(path: Path) -> dict:
    """The quantization_config of a checkpoint whose projections are all FP8, {} of one without FP8 that has none."""
    checkpoint = Checkpoint(path)
    fp8 = {info.dtype == "F8_E4M3" for name, info in checkpoint.tensors.items() if name.endswith("_proj.weight")}
    found = [raw["quantization_config"] for raw in (checkpoint.raw_config, checkpoint.raw_config.get("text_config", {}))
             if "quantization_config" in raw]
    assert fp8 == {bool(found)}
    return found[0] if found else {}


def quantised(path: Path, block: list[int] | None) -> Path:
    """Put the projections of a checkpoint into FP8, with scales that differ from block to block, in its place."""
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith("_proj.weight") or name == "mtp.fc.weight"]:
            shape = [-(-size // side) for size, side in zip(tensors[name].shape, block)] if block else []
            scale = torch.linspace(0.5, 1, torch.Size(shape).numel()).view(shape)
            tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        return tensors
    change_files(path, change)
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(PROSE)
    return tmp_path / "text.txt"


@pytest.fixture(params=[*FP8, INCOMPLETE], ids=lambda path: path.name)
def source(request, tmp_path) -> Path:
    """An FP8 checkpoint with a tokenizer."""
    return with_tokenizer(request.param, tmp_path / "fp8")


# ------------------------------------------------------------------------------------------------- the numbers


def test_incomplete_blocks_have_the_logits_of_transformers():
    reference = load_file(INCOMPLETE / "golden.safetensors")
    torch.testing.assert_close(Model(INCOMPLETE).logits(reference["ids"]), reference["logits"], rtol=0, atol=1e-4)
    scales = {tuple(info.shape) for name, info in Checkpoint(INCOMPLETE).tensors.items() if "_scale_inv" in name}
    assert (2, 2) in scales and (1, 2) in scales and (2, 1) in scales


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("path", [OLMOE, ONE_SCALE], ids=lambda path: path.name)
def test_scales_of_any_dtype_multiply(tmp_path, path, dtype):
    shutil.copytree(path, tmp_path / "c")
    change_files(tmp_path / "c", lambda tensors: {
        name: (tensor * 2**6).to(dtype) if "_scale_inv" in name else tensor for name, tensor in tensors.items()})
    assert_same(tmp_path / "c", dequantised(tmp_path / "c", tmp_path / "plain"))
    assert Model(tmp_path / "c", torch.float64).layer(0).experts.up.dtype == torch.bfloat16


def test_the_configuration_may_stand_at_the_top_and_leave_the_block_size_out(tmp_path):
    shutil.copytree(INCOMPLETE, tmp_path / "c")
    change_config(tmp_path / "c", lambda quantised: {"quant_method": "fp8"})
    assert_same(tmp_path / "c", INCOMPLETE)
    shutil.copytree(named("fp8-qwen3_5"), tmp_path / "top")
    raw = json.loads((tmp_path / "top" / "config.json").read_text())
    raw["quantization_config"] = raw["text_config"].pop("quantization_config")
    (tmp_path / "top" / "config.json").write_text(json.dumps(raw))
    assert_same(tmp_path / "top", named("fp8-qwen3_5"))


def test_a_multi_token_head_in_fp8_is_read(tmp_path):
    path = quantised(Path(shutil.copytree(named("qwen3_5-vision-mtp"), tmp_path / "c")), [8, 8])
    plain, ids = Model(dequantised(path, tmp_path / "plain")), load_file(path / "golden.safetensors")["ids"]
    steps = list(zip(Model(path).stream(ids), plain.stream(ids), strict=True))
    assert steps[-1][0].name == "mtp.layers.0" and all(torch.equal(one.y, two.y) for one, two in steps)


# ------------------------------------------------------------------------------------------------ the commands


def of_both(source: Path, text: Path, command, *options: object) -> tuple[Path, Path]:
    """What a command makes of a checkpoint, and of the dequantised one; of three of their experts, if it takes a
    pair."""
    outputs = source.parent / "out", source.parent / "out-of-plain"
    for path, out in zip((source, dequantised(source, source.parent / "plain")), outputs):
        pair = [dropped(path, path.with_name(f"{path.name}-dropped"), [3, 0, 2])] if command in (refit, distil) else []
        assert run(command, path, *pair, *options, "--out", out, "--calib", text, *QUICK) == 0
    return outputs


@pytest.mark.parametrize("command, options", [
    (hodgecover, ["--keep", 3]), (baselines, ["--keep", 3, "--method", "reap"]),
    (budgets, ["rco", "--keep", 3, "--steps", 1])], ids=["hodgecover", "reap", "rco"])
def test_selectors_copy_bytes(source, text, capsys, command, options):
    """Weights, scales and quantization_config, of the experts that are found with the dequantised weights, too."""
    out, of_plain = of_both(source, text, command, *options)
    assert SAYS not in capsys.readouterr().out
    assert_same(out, of_plain)
    survivors = {layer["name"]: layer["survivors"] for layer in record(out)["layers"]}
    expected = {}
    for name, data in stored_bytes(source).items():
        layer, _, rest = name.partition(".mlp.experts.")
        if rest:
            e, _, rest = rest.partition(".")
            if int(e) in survivors[layer]:
                expected[f"{layer}.mlp.experts.{survivors[layer].index(int(e))}.{rest}"] = data
        elif name.endswith(".mlp.gate.weight"):
            size = len(data) // Model(source).config.num_experts
            kept = survivors[name.removesuffix(".mlp.gate.weight")]
            expected[name] = b"".join(data[e * size:][:size] for e in kept)
        else:
            expected[name] = data
    assert stored_bytes(out) == expected
    assert quantisation_of(out) == quantisation_of(source) != {}


@pytest.mark.parametrize("path", [OLMOE, INCOMPLETE, named("fp8-qwen3_5")], ids=lambda path: path.name)
@pytest.mark.parametrize("command, options", [
    (baselines, ["--keep", 3, "--method", "hc-smoe"]), (baselines, ["--keep", 3, "--method", "mc-smoe", "--all-slots"]),
    (heapr, ["--width", 4]), (wanda, ["--rate", 0.5]), (refit, []), (distil, ["--layerwise"]), (distil, [])],
    ids=["hc-smoe", "all-slots", "heapr", "wanda", "refit", "layerwise", "distil"])
def test_what_changes_weights_writes_bfloat16(tmp_path, path, text, capsys, command, options):
    """Byte for byte what it writes of the dequantised checkpoint, and a line that says so."""
    outputs = of_both(with_tokenizer(path, tmp_path / "fp8"), text, command, *options)
    assert capsys.readouterr().out.count(SAYS) == 1
    one, two = map(stored_bytes, outputs)
    assert one == two
    configs = [json.loads((out / "config.json").read_text()) for out in outputs]
    assert configs[0] == configs[1] and "quantization_config" not in json.dumps(configs)


def test_a_dense_checkpoint_becomes_a_sparse_one_in_bfloat16(tmp_path, text, capsys):
    outputs = of_both(with_tokenizer(FP8_DENSE, tmp_path / "fp8"), text, dot_moe, "--experts", 4, "--top-k", 2)
    assert capsys.readouterr().out.count(SAYS) == 1
    assert stored_bytes(outputs[0]) == stored_bytes(outputs[1]) and quantisation_of(outputs[0]) == {}
    assert Model(outputs[0]).config.num_experts == 4


def test_what_only_reads_says_the_same_of_both(tmp_path, text, capsys):
    """Diagnostics and a searched budget."""
    path, said = with_tokenizer(OLMOE, tmp_path / "fp8"), []
    for each in (path, dequantised(path, tmp_path / "plain")):
        out = ["--plan-only", "--out", f"{each}.json", "--calib", text, *QUICK]
        assert run(budgets, each, "evo", "--keep", 4, "--generations", 1, *out) == 0
        assert run(audit, each, "--keep", 3, "--orders", 2, "--calib", text, *QUICK) == 0
        said.append(capsys.readouterr().out.replace(each.name, "NAME"))
        assert run(estimate, each, "--keep", 3, "--refit", 512) == 0
        assert f"output: {estimate.in_units(estimate.output_bytes(Model(each), 3))}" in capsys.readouterr().out
    assert said[0] == said[1] != ""


def test_a_plan_is_exported_in_fp8(tmp_path, text):
    path = with_tokenizer(OLMOE, tmp_path / "fp8")
    options = ["--keep", 3, "--calib", text, *QUICK]
    assert run(hodgecover, path, *options, "--out", tmp_path / "out") == 0
    assert run(hodgecover, path, *options, "--plan-only", "--out", tmp_path / "plan.json") == 0
    assert run(export_plan, path, tmp_path / "plan.json", "--out", tmp_path / "exported") == 0
    assert contents(tmp_path / "exported") == contents(tmp_path / "out")


@pytest.mark.parametrize("block, stay, change", [
    ([4, 4], (8, 16), (6, 2)), ([4, 8], (8, 16), (4,)), ([6, 6], (6, 12, 16), (4, 14)), ([128, 128], (16,), (8,)),
    (None, (5, 16), ())], ids=str)
def test_nested_permutes_bytes(tmp_path, text, capsys, block, stay, change):
    """Experts, whole blocks of their 16 hidden units, and units in a block; so does a slice of whole blocks, while any
    other is bfloat16. Both are the first ones of the whole."""
    source, out = quantised(with_tokenizer(named("olmoe-plain"), tmp_path / "fp8"), block), tmp_path / "out"
    assert run(nested, source, "--out", out, "--calib", text, *QUICK) == 0
    before, after = map(stored_bytes, (source, out))
    assert quantisation_of(out) == quantisation_of(source) != {} and before != after and before.keys() == after.keys()
    for layer in record(out)["layers"]:
        for new, old in enumerate(layer["order"]):
            for part in ("gate_proj.weight", "down_proj.weight", "up_proj.weight_scale_inv"):
                one, two = (f"{layer['name']}.mlp.experts.{e}.{part}" for e in (old, new))
                assert sorted(before[one]) == sorted(after[two])
    whole, ids = Model(out, torch.float64), some_ids()
    torch.testing.assert_close(whole.logits(ids), Model(source, torch.float64).logits(ids))
    for width in stay + change:
        small = tmp_path / f"small-{width}"
        assert run(nested, out, "--slice", f"3,{width}", "--out", small) == 0
        assert quantisation_of(small) == (quantisation_of(source) if width in stay else {})
        for index in range(2):
            found, (gate, up, down) = Model(small).layer(index).experts, whole.layer(index).experts
            assert all(map(torch.equal, found, (gate[:3, :width], up[:3, :width], down[:3, :, :width])))
    assert capsys.readouterr().out.count(SAYS) == len(change)


@pytest.mark.parametrize("units, stays", [(range(16), True), ([8, 9, 10, 11, 3, 2, 0, 1], True),
                                          ([0, 1, 2, 4], False), ([0, 1], False)], ids=str)
def test_narrowing_keeps_bytes_of_whole_blocks(tmp_path, units, stays):
    """The units are those of the dequantised experts either way."""
    source = Model(quantised(with_tokenizer(named("olmoe-plain"), tmp_path / "fp8"), [4, 2]))
    units = torch.tensor([*units])
    heapr.export(source, dict.fromkeys(source.layer_names, units.expand(8, -1)), tmp_path / "out", {})
    assert quantisation_of(tmp_path / "out") == (quantisation_of(source.checkpoint.path) if stays else {})
    for found, whole in zip(Model(tmp_path / "out").layer(1).experts, source.layer(1).experts):
        assert torch.equal(found, whole[:, :, units] if found.shape[1] == 32 else whole[:, units])


def test_figures_leave_scales_out(source, text, capsys):
    """Parameters and memory are those of the dequantised checkpoint, files are as large as they are."""
    model, plain = Model(source), Model(dequantised(source, source.parent / "plain"))
    assert evaluate.count_parameters(model) == evaluate.count_parameters(plain)
    assert [common.layer_bytes(model, name) for name in model.layer_names] == [
        common.layer_bytes(plain, name) for name in plain.layer_names]
    assert estimate.estimate_refit(model, 3, 64)[2:] == estimate.estimate_refit(plain, 3, 64)[2:]
    assert distil.training_bytes(model, model.layer_names, []) == distil.training_bytes(plain, plain.layer_names, [])
    assert run(evaluate, plain.checkpoint.path, source, "--text", text, "--seq-len", 32, "--sample", 0) == 0
    said = capsys.readouterr().out.split()
    assert f"{model.checkpoint.nbytes() / 1e6:,.1f}" in said and said[said.index("output)") + 1] == "0.0000"
    out = dropped(source, source.parent / "out", [0, 1, 2])
    stored = sum(info.end - info.start for info in Checkpoint(out).tensors.values())
    assert estimate.output_bytes(model, 3) == stored


# --------------------------------------------------------------------------------------------- what is refused

UP = "model.layers.0.mlp.experts.3.up_proj.weight"
Change = Callable[[Path], None]


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Change:
    """Changes one tensor, or leaves it out."""
    def apply(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: change(tensors[name])} if change and name in tensors else {}
        return {key: value for key, value in tensors.items() if key != name} | found
    return lambda path: change_files(path, apply)


def more(name: str, **tensors: torch.Tensor) -> Change:
    """Another value of one tensor, in the file where it lies, and others beside it, by what is added to its name."""
    return lambda path: change_files(path, lambda found: found | (
        {name + end: value for end, value in tensors.items()} if name in found else {}))


def settings(**change: object) -> Change:
    return lambda path: change_config(path, lambda found: change if "quant_method" in change else found | change)


def fp8(name: str) -> Change:
    """Stores a tensor of another kind in FP8, too."""
    def apply(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if name not in tensors:
            return tensors
        shape = [-(-size // 16) for size in tensors[name].shape]
        return tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(shape)}
    return lambda path: change_files(path, apply)


REFUSED = {
    "gptq": (settings(quant_method="gptq", bits=4), "quantised weights (gptq); fp8 and plain ones are supported"),
    "awq": (settings(quant_method="awq"), "quantised weights (awq)"),
    "compressed-tensors": (settings(quant_method="compressed-tensors", format="nvfp4-pack-quantized"),
                           "quantised weights (compressed-tensors, nvfp4-pack-quantized)"),
    "nvfp4": (settings(quant_method="modelopt", quant_algo="NVFP4"), "quantised weights (modelopt, NVFP4)"),
    "fp8 of another kind": (settings(quant_method="fbgemm_fp8"), "quantised weights (fbgemm_fp8)"),
    "no method": (lambda path: change_config(path, lambda _: {"bits": 4}), "quantised weights ()"),
    "a method alone": (lambda path: change_config(path, lambda _: "awq"), "quantised weights (awq)"),
    "a block of nothing": (settings(weight_block_size=[0, 16]), "weight_block_size [0, 16]: must be 2 above 0"),
    "a block of one side": (settings(weight_block_size=[16]), "weight_block_size [16]: must be"),
    "a block that is text": (settings(weight_block_size="[16, 16]"), "weight_block_size '[16, 16]': must be"),
    "another block": (settings(weight_block_size=[16, 32]), "scales [1, 1]"),
    "no block": (settings(weight_block_size=None), "can be F8_E4M3: blocks None, scales [1, 1]"),
    "no configuration": (lambda path: change_config(path, lambda _: None), "scales [1, 1]"),
    "a missing scale": (tensor(f"{UP}_scale_inv", None), f"{UP}_scale_inv missing []; only a matrix"),
    "a misshapen scale": (tensor(f"{UP}_scale_inv", lambda t: t.T.contiguous()), "F32 [2, 1]; only a matrix"),
    "a scale of integers": (tensor(f"{UP}_scale_inv", lambda t: t.int()), f"{UP}_scale_inv I32 [1, 2]"),
    "a scale that is not finite": (tensor(f"{UP}_scale_inv", lambda t: t / 0), f"{UP}_scale_inv has NaN or infinity"),
    "a scale that is none": (tensor("model.layers.1.self_attn.q_proj.weight_scale_inv", lambda t: t * torch.nan),
                             "layers.1.self_attn.q_proj.weight_scale_inv has NaN or infinity in it"),
    "a weight that is none": (tensor(UP, lambda t: torch.full_like(t.float(), torch.nan).to(t)), "expert 3 of model.l"),
    "a scale of a plain weight": (tensor(UP, lambda t: t.bfloat16()), f"{UP} is BF16 [16, 32]"),
    "a scale without weight": (more(UP, **{".more_scale_inv": torch.ones(1, 1)}), f"{UP}.more is missing []"),
    "another 8 bits": (tensor(UP, lambda t: t.float().to(torch.float8_e5m2)), "is stored as F8_E5M2; supported"),
    "exponents as weights": (tensor(UP, lambda t: t.float().to(torch.float8_e8m0fnu)), "is stored as F8_E8M0"),
    "a router": (fp8("model.layers.0.mlp.gate.weight"), "mlp.gate.weight is F8_E4M3 [8, 32]"),
    "an embedding": (fp8("model.embed_tokens.weight"), "embed_tokens.weight is F8_E4M3 [96, 32]"),
    "a norm": (fp8("model.norm.weight"), "model.norm.weight is F8_E4M3 [32]"),
}


@pytest.mark.parametrize("change, says", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, text, capsys, change, says):
    path = with_tokenizer(OLMOE, tmp_path / "fp8")
    change(path)
    before = contents(tmp_path)
    status = run(hodgecover, path, "--keep", 3, "--out", tmp_path / "out", "--calib", text, *QUICK)
    if "layers.1" in says:  # layer 0 was done
        assert status == 2 and says in capsys.readouterr().err and not (tmp_path / "out").exists()
    else:
        assert_refused(capsys, status, says)
        assert contents(tmp_path) == before


def test_fused_experts_and_rows_in_fp8_are_refused(tmp_path):
    path = Path(shutil.copytree(named("qwen3_5-vision-mtp"), tmp_path / "c"))
    fp8("model.language_model.layers.0.mlp.experts.gate_up_proj")(path)
    with pytest.raises(InputError, match=r"experts.gate_up_proj is F8_E4M3 \[8, 32, 32\]"):
        Model(path)
    with pytest.raises(InputError, match="and a row from 0 unless F8_E4M3"):
        Checkpoint(OLMOE).load(UP, 0)
