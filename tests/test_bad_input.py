# SPDX-License-Identifier: MIT
"""Everything that a user can give wrongly to hodgecover.py: one line on stderr that names it, exit status 2, nothing
new on disk; and checkpoints that are degenerate but right."""
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import baselines
import estimate
import heapr
import hodgecover
import mathx
import model_io
import pytest
import torch
import wanda
from conftest import DENSE, QUICK, ROOT, assert_refused, contents, record, refuse, run
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

PLAIN = ROOT / "tests" / "golden" / "olmoe-plain"
LAYER = "model.layers.0."


def compress(path: Path, *options: object) -> int:
    """The command on a checkpoint beside text.txt; later options win."""
    keep = [] if "--layers" in options else ["--keep", 4, "--out", path.parent / "out"]
    return run(hodgecover, path, *keep, "--calib", path.parent / "text.txt", *QUICK, *options)


def check_refused(capsys, path: Path, says: str, *options: object, late: bool = False) -> None:
    """Assert status 2, one line on stderr that says this, nothing printed, and nothing on disk changed but, if the
    fault is found late, for layers that were done."""
    before = contents(path.parent)
    capsys.readouterr()
    status = compress(path, *options)
    if late:
        said = capsys.readouterr()
        assert status == 2 and said.err.count("\n") == 1 and says in said.err
    else:
        assert_refused(capsys, status, says)
    assert {name: data for name, data in contents(path.parent).items() if not late or "barriers" not in name} == before


def test_the_small_checkpoint_is_compressed(small, capsys):
    assert compress(small) == 0
    assert model_io.Model(small.parent / "out").config.num_experts == 4 and capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------- the checkpoint


def config(**change: object) -> Callable[[Path], None]:
    """Changes keys of config.json."""
    def apply(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(raw | change))
    return apply


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Changes the tensors."""
    return lambda path: save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")


def one(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes one tensor."""
    return weights(lambda tensors: tensors | {name: tensor(tensors[name])})


def raw(data: Callable[[bytes], bytes], file: str = "model.safetensors") -> Callable[[Path], None]:
    """Changes the bytes of a file."""
    return lambda path: (path / file).write_bytes(data((path / file).read_bytes()))


def header(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Changes the header of the safetensors file and leaves its data."""
    def data(old: bytes) -> bytes:
        length = struct.unpack("<Q", old[:8])[0]
        new = json.dumps(change(json.loads(old[8:8 + length]))).encode()
        return struct.pack("<Q", len(new)) + new + old[8 + length:]
    return raw(data)


def index(value: object) -> Callable[[Path], None]:
    """The weights in a shard, under an index that says this of them."""
    def apply(path: Path) -> None:
        (path / "model.safetensors").rename(path / "shard.safetensors")
        (path / "model.safetensors.index.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return apply


def gone(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([len(tensor) - 1]), torch.nan)


def two_shards(path: Path) -> None:
    """The same tensor in both shards of an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(tensors, path / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"] + 1}, path / "b.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        name: "a.safetensors" for name in tensors} | {"other": "b.safetensors"}}))


def fused_beside_single(path: Path) -> None:
    """One layer's experts stored one by one and fused."""
    weights(lambda t: t | {f"{LAYER}mlp.experts.gate_up_proj": torch.zeros(8, 32, 32),
                           f"{LAYER}mlp.experts.down_proj": torch.zeros(8, 32, 16)})(path)


CHECKPOINTS = {
    "gone": (shutil.rmtree, "small: not a folder"),
    "a file": (lambda path: (shutil.rmtree(path), path.write_text("x")), "small: not a folder"),
    "no config": (gone("config.json"), "config.json: cannot be read"),
    "broken config": (raw(lambda b: b[:-3], "config.json"), "config.json: cannot be read as JSON"),
    "config of other bytes": (raw(lambda b: b"\xff\xfe" + b, "config.json"), "config.json: cannot be read as JSON"),
    "config nested too deep": (raw(lambda b: b"[" * 10**5, "config.json"), "config.json: cannot be read as JSON"),
    "config of endless digits": (raw(lambda b: b'{"a": ' + b"9" * 10**5 + b"}", "config.json"), "config.json: cannot"),
    "config is a list": (raw(lambda b: b"[1]", "config.json"), "config.json: expected a JSON object"),
    "a key is missing": (config(hidden_size=None), "the key 'hidden_size' is missing"),
    "other experts": (config(num_experts=9), "by config.json it must be [9, 32]"),
    "fewer experts": (config(num_experts=7), "by config.json it must be [7, 32]"),
    "experts beyond any memory": (config(num_experts=2**31 - 1), "by config.json it must be [2147483647, 32]"),
    "other layers": (config(num_hidden_layers=3), "num_hidden_layers is 3; the weights have 2"),
    "other hidden size": (config(hidden_size=16), "by config.json it must be"),
    "other vocabulary": (config(vocab_size=95), "by config.json it must be [95, 32]"),
    "other heads": (config(num_attention_heads=2, num_key_value_heads=2, head_dim=8), "by config.json it must be"),
    "a number that is none": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan; it must be a positive number"),
    "a dense model": (config(model_type="olmo2"), "model_type 'olmo2' is not supported; supported: olmoe"),
    "quantised": (config(quantization_config={"quant_method": "awq"}), "quantised weights (awq)"),
    "no weights": (gone("model.safetensors"), "no weights; expected model.safetensors or"),
    "truncated": (raw(lambda b: b[:-100]), "model.safetensors: not a readable safetensors file"),
    "empty": (raw(lambda b: b""), "model.safetensors: not a readable safetensors file"),
    "garbage": (raw(lambda b: b"\x93NUMPY" * 100), "model.safetensors: not a readable safetensors file"),
    "a header of gigabytes": (raw(lambda b: struct.pack("<Q", 1 << 40) + b[8:]), "not a readable safetensors file"),
    "an index that is broken": (index("{"), "index.json: cannot be read as JSON"),
    "an index without a map": (index({"metadata": {}}), "index.json: no weight_map"),
    "an index with a list beside": (index({"weight_map": {"lm_head.weight": "shard.safetensors"}, "metadata": [1]}),
                                    "metadata that is no object"),
    "an index of a list": (index({"weight_map": ["shard.safetensors"]}), "index.json: no weight_map"),
    "a missing shard": (index({"weight_map": {"a": "absent.safetensors"}}), "absent.safetensors: not a readable"),
    "a shard outside": (index({"weight_map": {"a": "../shard.safetensors"}}), "is not the name of a safetensors file"),
    "an absolute shard": (index({"weight_map": {"a": "/shard.safetensors"}}), "is not the name of a safetensors file"),
    "a shard in a folder": (index({"weight_map": {"a": "x/shard.safetensors"}}), "is not the name of a safetensors"),
    "a shard that is no name": (index({"weight_map": {"a": {"b": 1}}}), "is not the name of a safetensors file"),
    "a missing tensor": (weights(lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}),
                         "no tensor 'model.norm.weight'"),
    "a missing expert": (weights(lambda t: {k: v for k, v in t.items() if "1.mlp.experts.7.up" not in k}),
                         "no tensor 'model.layers.1.mlp.experts.7.up_proj.weight'"),
    "a misshapen projection": (one(f"{LAYER}self_attn.o_proj.weight", lambda t: t[:, 1:].clone()),
                               "o_proj.weight has shape [32, 31]; by config.json it must be [32, 32]"),
    "a misshapen norm": (one(f"{LAYER}input_layernorm.weight", lambda t: t[:1].clone()), "has shape [1]"),
    "a misshapen expert": (one(f"{LAYER}mlp.experts.3.up_proj.weight", lambda t: t[1:].clone()),
                           "up_proj.weight has shape [15, 32]; by config.json it must be [16, 32]"),
    "a scalar": (one(f"{LAYER}mlp.experts.0.gate_proj.weight", lambda t: t[0, 0].clone()),
                 "gate_proj.weight has shape []"),
    "an integer tensor": (one(f"{LAYER}self_attn.q_proj.weight", lambda t: t.to(torch.int8)), "is stored as I8"),
    "an integer expert": (one(f"{LAYER}mlp.experts.3.up_proj.weight", lambda t: t.long()), "is stored as I64"),
    "the same tensor twice": (two_shards, "lm_head.weight is in a.safetensors and in b.safetensors"),
    "experts fused and single": (fused_beside_single, "is none of the tensors that config.json asks for"),
    "a router with a bias": (weights(lambda t: t | {f"{LAYER}mlp.gate.bias": torch.zeros(8)}),
                             "mlp.gate.bias is none of the tensors that config.json asks for"),
    "a tensor over another": (header(lambda h: h | {"lm_head.weight": h["model.norm.weight"]}), "not a readable"),
    "NaN in an expert": (one(f"{LAYER}mlp.experts.3.up_proj.weight", nan), "expert 3 of model.layers.0 has NaN"),
    "NaN in a router": (one(f"{LAYER}mlp.gate.weight", nan), "not finite"),
    "NaN in a norm": (one("model.norm.weight", nan), "model.norm.weight has NaN or infinity in it"),
    "NaN in the head": (one("lm_head.weight", nan), "lm_head.weight has NaN or infinity in it"),
    "NaN in all embeddings": (one("model.embed_tokens.weight", lambda t: t * torch.nan), "not finite"),
    "infinity in attention": (one(f"{LAYER}self_attn.v_proj.weight", lambda t: t * torch.inf), "not finite"),
    "no tokenizer": (gone("tokenizer.json"), "tokenizer.json: not a tokenizer that works"),
    "a broken tokenizer": (raw(lambda b: b[:50], "tokenizer.json"), "tokenizer.json: not a tokenizer that works"),
    "a tokenizer that fails on the text": (raw(lambda b: b'{"version": "1.0", "added_tokens": [], "model": {"type": '
                                               b'"WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}',
                                               "tokenizer.json"), "tokenizer.json: not a tokenizer that works"),
    "a line in a line": (config(quantization_config={"quant_method": "fp8\nhodgecover: all is well\x1b[31m"}),
                         "(fp8\\nhodgecover: all is well\\x1b[31m)"),
    "ids beyond the vocabulary": (raw(lambda b: b.replace(b": 94}", b": 96}").replace(b'"A": 33', b'"A": 99'),
                                      "tokenizer.json"), "beyond the vocabulary"),
}


@pytest.mark.parametrize("change, says", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints(small, capsys, change, says):
    change(small)
    check_refused(capsys, small, says, late="finit" in says)


def test_links_to_shards_are_fine(small):
    """As in a hub's cache."""
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        (small / file).rename(small.parent / file)
        (small / file).symlink_to(small.parent / file)
    assert compress(small) == 0 and not (small.parent / "out" / "model.safetensors").is_symlink()


# --------------------------------------------------------------------------------------------------- the text

TEXTS = {
    "gone": (None, "cannot be read"),
    "a folder": ("folder", "cannot be read"),
    "empty": (b"", "no text in it"),
    "blank": (b" \n\t\n", "no text in it"),
    "not UTF-8": (b"caf\xe9" * 100, "cannot be read as UTF-8"),
    "too short": (b"short", "the text has 6 tokens, too few for one sequence of seq_len 32"),
}


@pytest.mark.parametrize("data, says", TEXTS.values(), ids=TEXTS)
def test_texts(small, capsys, data, says):
    text = small.parent / "given.txt"
    if data == "folder":
        text.mkdir()
    elif data is not None:
        text.write_bytes(data)
    check_refused(capsys, small, says, "--calib", text)


def test_a_byte_order_mark_and_capitals_are_fine(small):
    (small.parent / "text.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "%s"}' % (b"All work and no play. " * 40))
    assert compress(small, "--calib", small.parent / "text.JSONL") == 0


OPTIONS = {
    "no number of experts": (["--keep", "many"], "--keep"),
    "too many experts": (["--keep", 9], "--keep 9: must be from 3 to 8: the model has 8 experts"),
    "fewer experts than a token is routed to": (["--keep", 2], "--keep 2: must be from 3 to 8: the model has"),
    "layers and an output": (["--layers", "0", "--out", "x"], "--out: does not go with --layers"),
    "layers and a choice": (["--layers", "0", "--alpha", 2], "--alpha: does not go with --layers"),
    "layers and an order": (["--layers", "0", "--order", "saliency"], "--order: does not go with --layers"),
    "layers and a plan": (["--layers", "0", "--plan-only"], "--plan-only: does not go with --layers"),
    "layers backwards": (["--layers", "2-1"], "range of layers such as 0-7"),
    "layers that are not there": (["--layers", "1-2"], "--layers 1-2: the model has experts in layers [0, 1]"),
    "memory of no size": (["--memory", "much"], "--memory: much: must be 10MB or more, such as 1GB"),
    "memory of a byte": (["--memory", "1"], "--memory: 1: must be 10MB or more"),
    "endless memory": (["--memory", "9" * 400], "must be 10MB or more, such as 1GB"),
    "a negative sample": (["--vocab-sample", "-1"], "--vocab-sample -1"),
    "tokens of no sequence": (["--tokens", "10"], "--seq-len 32: must be from 2 to 10"),
    "endless tokens": (["--tokens", "9" * 40], "--tokens 9"),
    "a sequence of one token": (["--seq-len", "1"], "--seq-len 1"),
    "no sequence at all": (["--seq-len", "0"], "--seq-len 0"),
    "more than all edges": (["--edge-percent", "101"], "--edge-percent 101.0: must be from 0 to 100"),
    "an infinite weight": (["--alpha", "inf"], "--alpha inf: must be a finite number, at least 0"),
    "a weight that is none": (["--lambda-edge", "nan"], "--lambda-edge nan"),
    "a negative seed": (["--seed", "-1"], "--seed -1"),
    "an order as --help spells it": (["--order", "random:SEED"], "--order random:SEED: must be index, saliency or"),
    "an order of no name": (["--order", "best"], "--order best"),
    "barriers at the end of the model": (["--readout", "model"], "examples/audit.py --end-to-end"),
    "the readout of version 0.3": (["--readout", "lens"], "barriers are at the layer"),
    "a seed of another type": (["--seed", "1.5"], "--seed: invalid int value: '1.5'"),
    "a seed beyond 64 bits": (["--seed", 2**63], "--seed 9223372036854775808: must be from 0 to"),
    "a weight in words": (["--alpha", "three"], "--alpha: invalid float value: 'three'"),
    "a device of no name": (["--device", "gpu9"], "gpu9: this torch cannot use it"),
    "a device without numbers": (["--device", "meta"], "meta: this torch cannot use it"),
    "no calibration text": (["--calib", "absent.txt"], "absent.txt: cannot be read"),
    "a threshold": (["--thresholds", "1"], "--thresholds 1: must be a finite number, at least 2"),
    "a negative margin": (["--margin", "-0.1"], "--margin -0.1: must be a finite number, at least 0"),
    "another program's option": (["--refit", "1024"], "unrecognized arguments: --refit 1024"),
    "an output of two lines": (["--out", "a\nb"], "a\\nb: a name that is too long or not printable"),
    "an output that is no text": (["--out", "\udcff"], "too long or not printable"),
    "an output too long a name": (["--out", "x" * 250], "too long or not printable"),
    "an output around the cache": (["--out", "here", "--cache", "here/cache"], "here: would hold the cache"),
    "an output that is the cache": (["--out", "here", "--cache", "here"], "here: would hold the cache"),
    "an output in the checkpoint": (["--out", "small/out"], "lies in the checkpoint"),
    "a cache in the checkpoint": (["--cache", "small/barriers"], "--cache small/barriers: lies in the checkpoint"),
    "an output that is there": (["--out", ".", "--cache", "../elsewhere"], "exists and is not an empty folder"),
    "an output that is a file": (["--out", "text.txt"], "exists and is not an empty folder"),
    "an output below a file": (["--out", "text.txt/out"], "cannot be made"),
    "a plan that is there": (["--plan-only", "--out", "text.txt"], "text.txt: exists"),
    "a plan in no folder": (["--plan-only", "--out", "a/b.json"], "a plan is a file in a folder that is there"),
}


@pytest.mark.parametrize("options, says", OPTIONS.values(), ids=OPTIONS)
def test_options(small, capsys, monkeypatch, options, says):
    """All found before the work."""
    monkeypatch.chdir(small.parent)
    monkeypatch.setattr(mathx, "sweep", refuse)
    check_refused(capsys, small, says, *options)


def test_something_must_be_asked_for(small, capsys):
    assert_refused(capsys, run(hodgecover, small), "--keep --layers is required")


def test_a_dense_checkpoint_is_refused(tmp_path, capsys):
    path = Path(shutil.copytree(PLAIN.parent / "qwen3-dense-first", tmp_path / "dense"))
    config(num_hidden_layers=1)(path)
    weights(lambda tensors: {name: t for name, t in tensors.items() if ".layers.1." not in name})(path)
    assert_refused(capsys, run(hodgecover, path, "--keep", 3), "no layer has a router over two")


@pytest.mark.parametrize("path", DENSE, ids=lambda path: path.name)
@pytest.mark.parametrize("command, options", [
    (hodgecover, ["--keep", 3]), (baselines, ["--keep", 3, "--method", "reap", "--out", "out"]),
    (heapr, ["--width", 8, "--out", "out"]), (wanda, ["--rate", 0.5, "--out", "out"]), (estimate, ["--keep", 3])])
def test_a_dense_family_has_no_experts(tmp_path, monkeypatch, capsys, path, command, options):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, run(command, path, *options), f"{path}: no layer has a router over two")
    assert not list(tmp_path.iterdir())


def test_a_nested_text_config_is_rewritten_where_it_was_read(tmp_path):
    """One level deep, whatever lies below."""
    inner = {"num_experts": 8, "text_config": {"num_experts": 9}}
    assert model_io.with_keys({"text_config": inner}, {"num_experts": 4}) == {"text_config": inner | {"num_experts": 4}}


def test_logits_beyond_all_measure_give_an_infinite_perplexity(small):
    one("lm_head.weight", lambda t: t * 1e5)(small)
    assert compress(small) == 0
    assert model_io.Model(small.parent / "out").perplexity(torch.arange(64).view(2, 32)) == float("inf")


def test_a_text_with_too_few_tokens_is_used_whole(small, capsys):
    (small.parent / "text.txt").write_text("x" * 40)
    assert compress(small) == 0
    assert "has only 32 tokens in whole sequences, all used; 64 were asked" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- degenerate but right


def test_one_expert_of_a_top_1_model(small):
    """Its gate is 1 at every token."""
    config(num_experts_per_tok=1)(small)
    assert compress(small, "--keep", 1) == 0
    model = model_io.Model(small.parent / "out")
    assert model.config.num_experts == 1
    assert all((step.gates == 1).all() for step in model.stream(torch.ones(1, 9, dtype=torch.int64)))


def test_one_layer(small):
    weights(lambda t: {name: tensor for name, tensor in t.items() if ".layers.1." not in name})(small)
    config(num_hidden_layers=1)(small)
    assert compress(small) == 0 and len(record(small.parent / "out")["layers"]) == 1


def test_a_router_that_ties(small):
    """Rows of zero route every token to the same experts, twice the same."""
    one(f"{LAYER}mlp.gate.weight", torch.zeros_like)(small)
    for name in ("first", "second"):
        assert compress(small, "--out", small.parent / name) == 0
        assert sorted(record(small.parent / name)["layers"][0]["frequency"]) == [0] * 5 + [64] * 3  # top-k is 3
    assert contents(small.parent / "first") == contents(small.parent / "second")


# ----------------------------------------------------------------------------------------------------- fuzzed

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
    [0, 1, 2, 4, 8, 16, 32, 2**31, 2**63, -1, "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "silu", "default"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
FUZZ = hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def runs_or_is_refused(small: Path, capsys) -> bool:
    """Whether there is a whole output and status 0, or none, one line and status 2; and nothing else."""
    shutil.rmtree(small.parent / "out", ignore_errors=True)
    shutil.rmtree(small.parent / "small-barriers", ignore_errors=True)
    capsys.readouterr()
    status, made = compress(small), (small.parent / "out").is_dir()
    whole = status == 0 and made or status == 2 and not made and capsys.readouterr().err.count("\n") == 1
    return whole and {p.name for p in small.parent.iterdir()} <= {"small", "text.txt", "out", "small-barriers"}


@FUZZ
@given(data=st.data())
def test_fuzzed_configurations(small, capsys, data):
    good = json.loads((PLAIN / "config.json").read_text())
    change = data.draw(st.dictionaries(st.sampled_from(sorted(good)) | st.text(max_size=5), values, max_size=3))
    (small / "config.json").write_text(json.dumps(good | change))
    assert runs_or_is_refused(small, capsys)


@FUZZ
@given(value=values | st.builds(lambda inner: {"weight_map": inner}, values) | st.builds(
    lambda file: {"weight_map": {"a": file}}, st.text() | st.sampled_from(["shard.safetensors", "config.json", "."])))
def test_fuzzed_indexes(small, capsys, value):
    if (small / "model.safetensors").exists():
        (small / "model.safetensors").rename(small / "shard.safetensors")
    (small / "model.safetensors.index.json").write_text(json.dumps(value))
    assert runs_or_is_refused(small, capsys)


@FUZZ
@given(data=st.data())
def test_fuzzed_headers(small, capsys, data):
    """Another value in place of a tensor's entry, or of one of its fields."""
    good = (PLAIN / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(good)

    def change(old: dict) -> dict:
        name = data.draw(st.sampled_from(sorted(old)) | st.text(max_size=5))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", ""]))
        value = data.draw(values | st.sampled_from(["F64", "BF16", "I8", "F8_E4M3", "BOOL"]) | st.lists(
            st.integers(0, 2**40), max_size=4))
        entry = old.get(name)
        return old | {name: entry | {field: value} if field and isinstance(entry, dict) else value}
    header(change)(small)
    assert runs_or_is_refused(small, capsys)


@FUZZ
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
       within=st.sampled_from([16, 2000, None]), cut=st.none() | st.floats(0, 1))
def test_fuzzed_bytes(small, capsys, edits, within, cut):
    """Bytes changed at the start, in the header or anywhere, and the file cut off."""
    good = bytearray((PLAIN / "model.safetensors").read_bytes())
    for at, byte in edits:
        good[int(at * (within or len(good)))] = byte
    (small / "model.safetensors").write_bytes(good if cut is None else good[:int(cut * len(good))])
    assert runs_or_is_refused(small, capsys)
