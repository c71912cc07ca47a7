# SPDX-License-Identifier: MIT
"""`hodgecover.py` from end to end: what it writes and says, its cache, interrupted and shared work, faults."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from conftest import PROSE, QUICK, ROOT, assert_refused, contents, record, refuse, run
from hodgecover import Settings
from model_io import Checkpoint, InputError, Model
from safetensors.torch import load_file, save_file

SCRIPT = Path(hodgecover.__file__)


def compress(path: Path, *options: object) -> int:
    """The command on a checkpoint beside text.txt; output and cache lie beside it; later options win."""
    chosen = [] if "--layers" in options else ["--keep", 4, "--out", path.parent / "out"]
    return run(hodgecover, path, *chosen, "--calib", path.parent / "text.txt", *QUICK, *options)


def process(path: Path, *options: object) -> subprocess.Popen:
    """The same in a process of its own."""
    chosen = [] if "--layers" in options else ["--keep", 4, "--out", path.parent / "out"]
    command = [sys.executable, SCRIPT, path, *chosen, "--calib", path.parent / "text.txt", *QUICK, *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def layers_in(cache: Path) -> list[str]:
    """The layers that a cache holds, a number a file."""
    name = re.compile(r"model\.layers\.(\d)-[0-9a-f]{16}\.safetensors")
    return sorted(name.fullmatch(file.name)[1] for file in cache.iterdir())


def text_ids(path: Path) -> torch.Tensor:
    return model_io.calibration_ids(Model(path), [path.parent / "text.txt"], 64, 32)


# -------------------------------------------------------------------------------------------------- what it writes


def test_the_record_says_what_was_done(small):
    assert compress(small) == 0
    out = small.parent / "out"
    raw, done = json.loads((out / "hodgecover.json").read_text()), record(out)
    assert raw["schema_version"] == 3 and len(raw["history"]) == 1 and done["command"] == "hodgecover.py"
    settings = done["settings"]
    assert (settings["keep"], settings["tokens"], settings["seq_len"], settings["dtype"]) == (4, 64, 32, "float32")
    assert settings["text"] == ["text.txt"] and settings["vocab_sample"] == 512 and settings["alpha"] == 3
    assert settings["text_sha256"] == hashlib.sha256(text_ids(small).numpy().tobytes()).hexdigest()
    assert done["source"] == {"name": "small", "model_type": "olmoe", "num_experts": 8, "top_k": 3,
                              "fingerprint": Checkpoint(small).fingerprint()}
    assert [(layer["layer"], layer["name"]) for layer in done["layers"]] == [(0, "model.layers.0"),
                                                                            (1, "model.layers.1")]
    for layer in done["layers"]:
        kept = layer["survivors"]
        assert kept == sorted(layer["order"][:4]) and sorted(layer["order"]) == list(range(8))
        assert sorted(map(int, layer["redirect"])) == sorted(set(range(8)) - set(kept))
        assert set(layer["redirect"].values()) <= set(kept)
        for shares in ("eta", "eta_constant"):
            assert sum(layer["diagnostics"][shares].values()) == pytest.approx(1)
    text = (out / "hodgecover.json").read_text()
    assert str(small.parent) not in text and not re.search(r"\d\d:\d\d", text)


def test_a_list_of_numbers_is_one_line(small):
    value = {"a": [1, 2.5], "b": [[1, 2], [3]], "c": {"x": 1, "y": None}, "d": ["a [1,  2]"], "e": [], "f": {}}
    text = model_io.record_bytes(Checkpoint(small), value).decode()
    assert json.loads(text)["history"] == [value]
    for line in ('"a": [1, 2.5],', '"b": [[1, 2], [3]],', '"e": [],'):
        assert line in [found.strip() for found in text.splitlines()]
    with pytest.raises(ValueError):
        model_io.record_bytes(Checkpoint(small), {"a": [float("nan")]})


def test_the_record_of_the_input_goes_on(small):
    """hodgecover.py on its own output; a file of that name that is no record is refused before the work."""
    assert compress(small) == 0
    out = small.parent / "out"
    assert compress(out, "--keep", 3, "--out", small.parent / "again") == 0
    outputs = out, small.parent / "again"
    histories = [json.loads((path / "hodgecover.json").read_text())["history"] for path in outputs]
    assert histories[1][:1] == histories[0] and histories[1][1]["settings"]["keep"] == 3
    assert histories[1][1]["source"]["fingerprint"] == Checkpoint(out).fingerprint()


def test_the_record_of_version_03_goes_on(small):
    """Its entries have other fields, which nothing reads."""
    old = {"command": "hodgecover.py", "layers": [{"retained": {"harmonic": {"some": 1.0, "all": 0.5}}}]}
    (small / "hodgecover.json").write_text(json.dumps({"schema_version": 2, "history": [old]}))
    assert compress(small) == 0
    raw = json.loads((small.parent / "out" / "hodgecover.json").read_text())
    assert raw["schema_version"] == 3 and raw["history"][0] == old and len(raw["history"]) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 1, "layers": []}',
                                     '{"schema_version": 2, "history": 1}'])
def test_a_strange_record_is_refused_before_the_work(small, capsys, monkeypatch, content):
    (small / "hodgecover.json").write_text(content)
    monkeypatch.setattr(mathx, "sweep", refuse)
    assert_refused(capsys, compress(small), "hodgecover.json: ")
    assert not (small.parent / "out").exists()


def test_the_output_holds_the_planned_survivors(family):
    assert compress(family) == 0
    out = family.parent / "out"
    before, after = Model(family), Model(out)
    assert after.config.num_experts == 4
    assert (out / "tokenizer.json").read_bytes() == (family / "tokenizer.json").read_bytes()
    routers = [name.removesuffix(".mlp.gate.weight") for name in before.checkpoint.tensors if ".mlp.gate." in name]
    assert sorted(layer["name"] for layer in record(out)["layers"]) == sorted(routers)
    for layer in record(out)["layers"]:
        index = before.layer_names.index(layer["name"])
        source, kept = before.layer(index), after.layer(index)
        assert torch.equal(kept.router, source.router[layer["survivors"]])
        assert all(torch.equal(a, b[layer["survivors"]]) for a, b in zip(kept.experts, source.experts))


def test_the_same_command_gives_the_same_bytes(small):
    for name in ("first", "second"):
        assert compress(small, "--out", small.parent / name, "--cache", small.parent / f"c-{name}") == 0
    assert contents(small.parent / "first") == contents(small.parent / "second")


def test_the_library_calls_are_the_command(small):
    assert compress(small) == 0
    model, ids = Model(small), text_ids(small)
    plans = dict(hodgecover.plan_model(model, ids, 4, cache=small.parent / "own"))
    entry = hodgecover.plan_entry(model, plans, 4, Settings(), ids, [small.parent / "text.txt"])
    hodgecover.export(model, plans, small.parent / "called", entry)
    assert layers_in(small.parent / "own") == ["0", "1"]
    assert contents(small.parent / "called") == contents(small.parent / "out")
    with pytest.raises(InputError, match="not an empty folder"):
        hodgecover.export(model, plans, small.parent / "called", entry)


def test_the_source_is_never_written_to(small):
    times = [file.stat().st_mtime_ns for file in sorted(small.iterdir())]
    before = contents(small)
    assert compress(small) == 0
    assert contents(small) == before and [file.stat().st_mtime_ns for file in sorted(small.iterdir())] == times


def test_all_experts_kept_are_the_source_bit_for_bit(small):
    assert compress(small, "--keep", 8) == 0
    before, after = (load_file(path / "model.safetensors") for path in (small, small.parent / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_plan_only_writes_a_file_and_leaves_the_output_free(small, capsys):
    """The plan that the output would hold, beside the checkpoint or at --out; then the real run goes through."""
    source = small.parent / "source"
    shutil.copytree(small, source)
    text = small.parent / "text.txt"
    assert run(hodgecover, source, "--keep", 4, "--calib", text, *QUICK, "--plan-only") == 0
    plan = small.parent / "source-keep4.json"
    assert f"plan: {plan}" in capsys.readouterr().out
    assert run(hodgecover, source, "--keep", 4, "--calib", text, *QUICK) == 0
    assert plan.read_bytes() == (small.parent / "source-keep4" / "hodgecover.json").read_bytes()
    assert compress(source, "--plan-only", "--out", small.parent / "mine.json") == 0
    assert (small.parent / "mine.json").read_bytes() == plan.read_bytes()
    capsys.readouterr()
    assert_refused(capsys, compress(source, "--plan-only", "--out", plan), "source-keep4.json: exists")


def test_lines_for_people(small, capsys):
    assert compress(small) == 0
    said, out = capsys.readouterr().out.splitlines(), small.parent / "out"
    assert said[0] == hodgecover.LAYER_HEAD and len(said) == 7
    for layer, line in zip(record(out)["layers"], said[1:3]):
        assert re.fullmatch(r" +\d  \d\.\d{3} \(\d\.\d{3}\) +\d, \d +4 of 8 +\d\d\.\d%", line)
        found = layer["diagnostics"]
        assert line.split() == [
            str(layer["layer"]), f"{found['eta']['harmonic']:.3f}", f"({found['eta_constant']['harmonic']:.3f})",
            f"{found['covered_at']['edges']},", str(found["covered_at"]["triangles"]), "4", "of", "8",
            f"{layer['routed_share']:.1%}"]
    assert re.fullmatch(r"calibration: \d+ tokens of .*text\.txt", said[3])
    assert re.fullmatch(r"weights: 0\.2 MB -> 0\.1 MB \(\d\d%\)", said[4]) and said[5] == f"output: {out}"
    assert said[6] == f"compare: python examples/evaluate.py {small} {out} --text FILE"


def test_a_sampled_run_says_and_records_its_audit(small, capsys):
    assert compress(small, "--vocab-sample", 20) == 0
    said = capsys.readouterr().out.splitlines()
    audits = [layer["diagnostics"]["audit"] for layer in record(small.parent / "out")["layers"]]
    for line, audit in zip((said[2], said[4]), audits, strict=True):
        assert line.strip() == (
            f"barriers by sample: {-audit['shortfall']:+.2%} +- {audit['standard_error']:.2%} from exact ones, one by "
            f"{audit['largest']:.1%}, rank correlation {audit['rank_correlation']:.4f}")
    assert audits[0] != audits[1] and all(audit["pairs"] == 128 for audit in audits)


def test_the_trained_checkpoint(tiny, tmp_path):
    """64 experts, four layers, the default text: nested prefixes, redirects that collapse, no NaN."""
    assert run(hodgecover, tiny, "--keep", 32, "--tokens", 64, "--seq-len", 64, "--max-triangles", 40, "--dtype",
               "float32", "--out", tmp_path / "out", "--cache", tmp_path / "cache") == 0
    layers = record(tmp_path / "out")["layers"]
    assert len(layers) == 4 and all(len(layer["survivors"]) == 32 for layer in layers)
    assert all(layer["diagnostics"]["redirect_largest"] >= 8 for layer in layers)
    assert record(tmp_path / "out")["settings"]["text"] == "python documentation"
    assert Model(tmp_path / "out").logits(torch.ones(1, 8, dtype=torch.int64)).isfinite().all()


def test_a_vendored_copy_works(small):
    package = small.parent / "mypkg" / "vendor"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    for name in ("hodgecover.py", "model_io.py", "mathx.py"):
        shutil.copy(ROOT / name, package)
    script = ("import sys; from mypkg.vendor import model_io; assert 'mypkg.vendor.mathx' not in sys.modules; "
              "from mypkg.vendor.hodgecover import main, mathx; "
              "assert mathx.__name__ == 'mypkg.vendor.mathx' and 'mathx' not in sys.modules; "
              "sys.exit(main(sys.argv[1:]))")
    command = [sys.executable, "-c", script, str(small), "--keep", "4", "--out", "out", "--calib", "text.txt", *QUICK]
    done = subprocess.run(command, cwd=small.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (small.parent / "out" / "hodgecover.json").is_file()


# -------------------------------------------------------------------------------------------------- the cache


def test_the_cache_holds_a_file_a_layer_and_lies_beside_the_checkpoint(small, capsys):
    assert compress(small, "--layers", 1) == 0
    cache = small.parent / "small-barriers"
    assert layers_in(cache) == ["1"] and capsys.readouterr().out == f"layer 1: barriers in {cache}\n"
    assert compress(small) == 0 and layers_in(cache) == ["0", "1"]


def test_other_choices_read_the_same_barriers(small, monkeypatch, capsys):
    assert compress(small) == 0
    monkeypatch.setattr(mathx, "sweep", refuse)
    monkeypatch.setattr(Model, "layer", refuse)
    for number, other in enumerate((["--keep", 5], ["--edge-percent", 5, "--triangle-percent", 1],
                                    ["--lambda-edge", 3, "--lambda-triangle", 0, "--alpha", 0],
                                    ["--order", "saliency"], ["--order", "random:3"],
                                    ["--thresholds", 9, "--margin", 0.1])):
        assert compress(small, *other, "--plan-only", "--out", small.parent / f"{number}.json") == 0
    assert capsys.readouterr().err == ""


def test_a_copied_checkpoint_shares_the_cache(small, monkeypatch, capsys):
    """The key depends on content alone: not on the folder, its name or times of modification."""
    assert compress(small) == 0
    copy = Path(shutil.copytree(small, small.parent / "elsewhere", copy_function=shutil.copyfile))
    os.utime(copy / "model.safetensors", (1, 1))
    monkeypatch.setattr(mathx, "sweep", refuse)
    assert compress(copy, "--cache", small.parent / "small-barriers", "--out", small.parent / "o") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", [
    ["--seed", 1], ["--tokens", 96], ["--seq-len", 16], ["--max-triangles", 10], ["--dtype", "float64"],
    ["--vocab-sample", 64]])
def test_barriers_of_other_settings_are_not_used_and_not_lost(small, monkeypatch, capsys, other):
    (small.parent / "text.txt").write_text(PROSE + "The quick brown fox jumps over the lazy dog. " * 40)
    assert compress(small, "--layers", 1) == 0
    assert compress(small, "--layers", 1, *other) == 0
    assert layers_in(small.parent / "small-barriers") == ["1", "1"]
    monkeypatch.setattr(hodgecover, "measure_layer", refuse)
    for options in ([], other):
        assert compress(small, "--layers", 1, *options) == 0
    assert capsys.readouterr().err == ""


def test_the_cache_tells_the_same_tokens_in_other_sequences(small):
    model, ids = Model(small), text_ids(small)
    assert hodgecover.cache_key(model, ids, Settings()) != hodgecover.cache_key(model, ids.view(4, 16), Settings())


def test_a_cache_of_version_03_is_not_used(small):
    """Its barriers are of merged parameters: the key has another format, so that another file is looked for. Even one
    of the name that is looked for is told by the key in it."""
    assert compress(small, "--layers", 1) == 0
    cache, key = small.parent / "small-barriers", hodgecover.cache_key(Model(small), text_ids(small), Settings())
    assert key["format"] not in ("1", "2", "3", "4") and "readout" not in key
    new, = cache.iterdir()
    stale = {name: torch.zeros_like(tensor) for name, tensor in load_file(new).items()}
    old_key = key | {"format": "4", "readout": "lens"}
    model_io.write_cached(cache, "model.layers.1", old_key, stale)
    assert layers_in(cache) == ["1", "1"]
    current = model_io.read_cached(cache, "model.layers.1", key)
    assert current["barriers"].any()
    save_file(stale, new, old_key | {"tensors": " ".join(sorted(stale))})
    assert model_io.read_cached(cache, "model.layers.1", key) is None


def test_a_cache_of_version_03_is_named(small, capsys):
    """And one of this version is not."""
    cache = small.with_name("cache")
    model_io.make_cache(cache)
    settings = ["--keep", 4, "--cache", cache, "--calib", small.with_name("text.txt"), *QUICK]
    assert run(hodgecover, small, *settings, "--out", small.with_name("one")) == 0
    assert "older version" not in capsys.readouterr().err
    model_io.write_cached(cache, "model.layers.0", {"format": "4"}, {"saliency": torch.ones(8)})
    assert run(hodgecover, small, *settings, "--out", small.with_name("two")) == 0
    assert f"cache {cache}: has barriers of an older version, which are not used" in capsys.readouterr().err


def test_the_cache_tells_each_choice_that_barriers_depend_on(small):
    """By itself: another seed samples another text, too, but not if the text is short."""
    model, ids = Model(small), text_ids(small)
    choices = [{}, {"vocab_sample": 9}, {"max_triangles": 9}, {"seed": 9}]
    assert len({str(hodgecover.cache_key(model, ids, Settings(**choice))) for choice in choices}) == len(choices)


def test_barriers_of_other_weights_are_not_used(small):
    """One byte in the middle of one expert, size and time unchanged."""
    assert compress(small, "--layers", 1) == 0
    file = small / "model.safetensors"
    modified, tensors = file.stat(), load_file(file)
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][7, 7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(modified.st_atime_ns, modified.st_mtime_ns))
    assert compress(small, "--layers", 1) == 0 and layers_in(small.parent / "small-barriers") == ["1", "1"]


def test_two_models_that_share_a_cache_have_their_own_entries(small, monkeypatch):
    """Of one shape and one name: each run gives the bytes of a run alone, and finds its own layers again."""
    other = Path(shutil.copytree(small, small.parent / "other" / "small"))
    tensors = load_file(small / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})

    def outputs(*caches: str) -> list[dict[str, bytes]]:
        found = []
        for path, cache in zip((small, other), caches):
            assert compress(path, "--calib", small.parent / "text.txt", "--cache", small.parent / cache, "--out",
                            small.parent / "out") == 0
            found.append(contents(small.parent / "out"))
            shutil.rmtree(small.parent / "out")
        return found
    alone = outputs("one", "another")
    assert alone == outputs("shared", "shared") and layers_in(small.parent / "shared") == ["0", "0", "1", "1"]
    monkeypatch.setattr(mathx, "sweep", refuse)
    assert alone == outputs("shared", "shared")


def damaged(content: bytes) -> list[bytes]:
    """Cut off anywhere, too long, all zeros, or a bit other in the header: its length, a key, a name, a type."""
    places = [0, *map(content.index, (b"weights", b"barriers", b"F64"))]
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1:] for at in places]
    return [b"", content[:7], content[:100], content[:-1], content + b"x", b"\0" * len(content), *flipped]


def test_a_damaged_file_is_measured_again(small, capsys):
    assert compress(small) == 0
    plan, cache = contents(small.parent / "out"), small.parent / "small-barriers"
    file = min(cache.iterdir())
    whole = file.read_bytes()
    (cache / f".{file.name}.1234").write_bytes(whole[:100])  # what a killed run leaves
    key = hodgecover.cache_key(Model(small), text_ids(small), Settings())
    before = model_io.read_cached(cache, "model.layers.0", key)
    assert model_io.read_cached(cache, "model.layers.0", key | {"seed": "1"}) is None
    for content in damaged(whole):
        file.write_bytes(content)
        assert model_io.read_cached(cache, "model.layers.0", key) is None
    shutil.rmtree(small.parent / "out")
    capsys.readouterr()
    assert compress(small) == 0 and capsys.readouterr().err == ""
    assert contents(small.parent / "out") == plan
    again = model_io.read_cached(cache, "model.layers.0", key)
    assert all(torch.equal(again[name], before[name]) for name in hodgecover.Signals._fields)


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(small, monkeypatch, capsys):
    monkeypatch.setattr(mathx, "sweep", refuse)
    (small.parent / "file").write_text("")
    for folder in (small.parent / "file", small.parent / "file" / "below"):
        assert_refused(capsys, compress(small, "--cache", folder), "--cache ")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != small.parent / "locked" and access(path, mode))
    another = shutil.copytree(small, small.parent / "another")
    for name in ("locked", "another"):
        assert_refused(capsys, compress(small, "--cache", small.parent / name), f"{name}: is a checkpoint, or cannot")
    assert contents(another) == contents(small)
    assert not (small.parent / "out").exists()


# ---------------------------------------------------------------------------------------- interrupted and shared work


def test_an_interrupted_run_goes_on_where_it_was(small, monkeypatch, capsys):
    """Interrupted in the second layer; the next run measures that alone and gives the undisturbed bytes."""
    assert compress(small, "--out", small.parent / "alone", "--cache", small.parent / "cache-alone") == 0
    real, calls = hodgecover.measure_layer, []

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(hodgecover, "measure_layer", measure)
    assert compress(small) == 130 and not (small.parent / "out").exists()
    assert re.fullmatch("hodgecover.py: interrupted: the output is absent; .*\n", capsys.readouterr().err)
    assert compress(small) == 0 and len(calls) == 3
    assert contents(small.parent / "out") == contents(small.parent / "alone")


def test_a_killed_run_leaves_no_output_and_goes_on(small):
    """kill -9 as soon as the first layer is in the cache."""
    wait = "import os, signal, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {root!r}); import hodgecover; " \
        "write = hodgecover.model_io.write_cached; hodgecover.model_io.write_cached = lambda *a: " \
        "(write(*a), os.kill(os.getpid(), signal.SIGKILL)); hodgecover.main()"
    arguments = ["hodgecover.py", small, "--keep", 4, "--out", small.parent / "out", "--calib",
                 small.parent / "text.txt", *QUICK]
    killed = subprocess.run([sys.executable, "-c", wait.format(root=str(ROOT)), *map(str, arguments)])
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in small.parent.iterdir()} == {"small", "text.txt", "small-barriers"}
    assert layers_in(small.parent / "small-barriers") == ["0"]
    assert compress(small) == 0 and layers_in(small.parent / "small-barriers") == ["0", "1"]


def test_processes_share_the_layers_of_one_cache(small, monkeypatch, capsys):
    """A process for one layer and one for both, at the same time; a last run only assembles."""
    processes = [process(small, "--layers", layers) for layers in ("1", "0-1")]
    said = [one.communicate() for one in processes]
    assert [one.returncode for one in processes] == [0, 0], said
    assert layers_in(small.parent / "small-barriers") == ["0", "1"]
    monkeypatch.setattr(mathx, "sweep", refuse)
    assert compress(small) == 0 and capsys.readouterr().err == ""


def test_a_layer_that_another_process_measured_meanwhile_is_read(small, monkeypatch):
    """The cache is looked into when a layer's turn comes, not only at the start."""
    assert compress(small) == 0
    late, cache = small.parent / "late", small.parent / "small-barriers"
    late.mkdir()
    first, second = sorted(cache.iterdir())
    shutil.copy(first, late)
    monkeypatch.setattr(mathx, "sweep", refuse)
    for index, _ in hodgecover.measure_model(Model(small), text_ids(small), Settings(), range(2), late):
        shutil.copy(second, late)
    assert index == 1


def test_of_two_runs_to_one_output_one_wins(small, monkeypatch, capsys):
    """The other comes first as this one is about to rename."""
    real = model_io.copy_small_files

    def slow(source: Path, staging: Path) -> None:
        monkeypatch.setattr(model_io, "copy_small_files", real)
        assert compress(small) == 0
        capsys.readouterr()
        real(source, staging)
    monkeypatch.setattr(model_io, "copy_small_files", slow)
    assert compress(small) == 2
    assert "name another" in capsys.readouterr().err and Model(small.parent / "out").config.num_experts == 4
    assert {path.name for path in small.parent.iterdir()} == {"small", "text.txt", "small-barriers", "out"}


# ------------------------------------------------------------------------------------------------------- faults


def test_an_interrupt_while_packages_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "safetensors.py").write_text("import time; print('imported', flush=True); time.sleep(60)")
    started = subprocess.Popen([sys.executable, SCRIPT, "x", "--keep", "32"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert started.stdout.readline() == b"imported\n"
    started.send_signal(signal.SIGINT)
    assert started.communicate()[1] == b"" and started.returncode == -signal.SIGINT


@pytest.mark.parametrize("size, layers", [(1000, []), (50_000, ["0", "1"])])
def test_a_full_disk_is_one_line_and_the_cache_goes_on(small, size, layers, capsys):
    """A limit on the size of files, as a disk that fills: within the cache, then within the weights of the output."""
    import resource

    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        status = compress(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert re.search(r"File too large( \(os error 27\))?; the output is whole or absent$", said)
    assert layers_in(small.parent / "small-barriers") == layers
    assert {path.name for path in small.parent.iterdir()} == {"small", "text.txt", "small-barriers"}


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line(small, monkeypatch, capsys, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(mathx, "kl_of_merges", fail)
    assert_refused(capsys, compress(small), "--memory 200MB")
    assert not (small.parent / "out").exists()


def test_other_errors_are_not_swallowed(small, monkeypatch):
    monkeypatch.setattr(mathx, "kl_of_merges", refuse)
    with pytest.raises(AssertionError, match="done again"):
        compress(small)


def test_progress_tells_the_time_left(monkeypatch, capsys):
    now = iter((0.0, 10.0, 40.0))
    monkeypatch.setattr(model_io.time, "monotonic", lambda: next(now))
    bar = model_io.progress_bar()
    bar(0.1)
    bar(0.25)
    assert capsys.readouterr().err == " 25% done, 0:02:30 left\n"  # 0.15 in 30 s


def test_sizes_of_memory_are_decimal():
    sizes = [hodgecover.byte_count(text) for text in ("200MB", "1.5GB", "20000000")]
    assert sizes == [200_000_000, 1_500_000_000, 20_000_000]


def test_auto_is_bfloat16_only_if_the_device_multiplies_it(monkeypatch):
    for able, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
                           ({"bf16": True}, torch.bfloat16), ({"avx2": True, "avx512_bf16": False}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert model_io.choose_dtype("auto", "cpu") == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    one = torch.ones(1)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: one)  # any device can be used
    assert model_io.choose_dtype("auto", "cuda:1") == torch.bfloat16
    assert model_io.choose_dtype("auto", "mps") == torch.float32
    assert model_io.choose_dtype("float64", "cuda") == torch.float64


def test_calibration_is_sampled_by_seed_and_a_short_text_is_said(tiny, tmp_path, capsys):
    model = Model(tiny)
    first, other = (model_io.calibration_ids(model, [], 256, 128, seed) for seed in (0, 1))
    assert first.shape == other.shape == (2, 128) and not torch.equal(first, other)
    assert model_io.calibration_ids(model, [], 383, 128).shape == (2, 128)  # at most 383
    assert not capsys.readouterr().err
    (tmp_path / "short.txt").write_text("A short text. " * 100)
    assert len(model_io.calibration_ids(model, [tmp_path / "short.txt"], 2048, 128, 0)) < 16
    assert "all used; 2048 were asked" in capsys.readouterr().err


def test_a_sequence_is_by_default_as_long_as_the_models(tiny):
    """A.11: documents are concatenated to the training context length; at most what is asked for."""
    model = Model(tiny)
    most = model.config.max_positions
    assert model_io.calibration_ids(model, [], 2 * most).shape == (2, most)
    assert model_io.calibration_ids(model, [], most // 2).shape == (1, most // 2)


def test_each_file_gives_as_much_of_the_sample(tiny, tmp_path, capsys):
    """Whatever its length; of one file it is what a file alone gives. A file shorter than its share is refused."""
    model = Model(tiny)
    files = [tmp_path / name for name in ("long.txt", "short.txt", "other.txt")]
    for file, times in zip(files, (300, 40, 80)):
        file.write_text(f"{file.name} is a text of its own, the {file.stem} one. " * times)
    ids = model_io.calibration_ids(model, files, 7 * 32, 32, 1)
    parts = [model_io.calibration_ids(model, [file], count * 32, 32, 1) for file, count in zip(files, (3, 2, 2))]
    assert torch.equal(ids, torch.cat(parts))
    entry = model_io.record_entry("", {}, ids, files, source=model)
    assert entry["settings"]["text"] == ["long.txt", "short.txt", "other.txt"]
    assert entry["settings"]["tokens_of_each"] == [96, 64, 64]
    with pytest.raises(InputError, match="^tokens 92: too few for a sequence of 32 from each of 3 files$"):
        model_io.calibration_ids(model, files, 92, 32)
    with pytest.raises(InputError, match=r"short\.txt: has \d+ tokens, its share of tokens 3200; give more"):
        model_io.calibration_ids(model, files, 9600, 32)
    assert not capsys.readouterr().err


def test_a_sequence_longer_than_the_model_s_is_warned_of(tiny, tmp_path, capsys):
    model = Model(tiny)
    most = model.config.max_positions
    assert most == json.loads((tiny / "config.json").read_text())["max_position_embeddings"]
    for length in (most, most + 1):
        model_io.calibration_ids(model, [], 2 * length, length)
        assert ("max_position_embeddings" in capsys.readouterr().err) == (length > most)
