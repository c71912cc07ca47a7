# SPDX-License-Identifier: MIT
"""The cache of barriers, resuming, shared work, estimates, exports from a plan, memory and precision."""
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import hodgecover
import mathx
import model_io
import pytest
import torch
from hodgecover import Settings
from model_io import Model
from safetensors.torch import load_file, save_file

SCRIPT = Path(hodgecover.__file__)
QUICK = ["--tokens", "128", "--seq-len", "64", "--max-triangles", "20", "--dtype", "float32"]


def run(*argv: object) -> int:
    return hodgecover.main([str(a) for a in argv])


def command(*argv: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, argv)]


def layers_in(cache: Path) -> list[str]:
    """The layers that a cache holds, a name a file."""
    name = re.compile(r"model\.layers\.(\d)-[0-9a-f]{8}\.safetensors")
    return sorted(name.fullmatch(file.name)[1] for file in cache.iterdir())


def file_of(cache: Path, layer: int) -> Path:
    return next(cache.glob(f"model.layers.{layer}-*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> Path:
    """A folder with the `cache` and the output `out` of one undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(tiny, "--keep", 32, "--cache", folder / "cache", "--out", folder / "out", *QUICK) == 0
    return folder


@pytest.fixture
def cache(done, tmp_path) -> Path:
    return Path(shutil.copytree(done / "cache", tmp_path / "cache"))


def refuse(*_, **__):
    raise AssertionError("a barrier was measured")


# -------------------------------------------------------------------------------------------------- the cache


def test_the_cache_holds_a_file_a_layer_and_lies_beside_the_checkpoint(done, tiny, tmp_path, monkeypatch):
    assert layers_in(done / "cache") == ["0", "1", "2", "3"]
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    assert run(source, "--layers", 3, *QUICK) == 0
    assert layers_in(tmp_path / "source-barriers") == ["3"]


def test_other_choices_read_the_same_barriers(done, tiny, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hodgecover, "lens_barriers", refuse)
    monkeypatch.setattr(Model, "layer", refuse)
    for i, other in enumerate((["--keep", 16], ["--keep", 32, "--edge-percent", 20, "--triangle-percent", 1],
                               ["--keep", 32, "--lambda-edge", 3, "--lambda-triangle", 0, "--alpha", 0],
                               ["--keep", 32, "--router", "fold"], ["--keep", 32, "--order", "index"])):
        assert run(tiny, *other, "--cache", cache, "--out", tmp_path / str(i), *QUICK) == 0
    assert run(tiny, "--keep", 32, "--cache", cache, "--out", tmp_path / "same", *QUICK) == 0
    assert contents(tmp_path / "same") == contents(done / "out")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other, says", [
    (["--seed", 1], "calibration text, seed"), (["--tokens", 192], "calibration text"),
    (["--seq-len", 32], "calibration text"), (["--max-triangles", 10], "max triangles"),
    (["--dtype", "float64"], "dtype"), (["--vocab-sample", 64], "vocab sample"), (["--readout", "model"], "readout"),
])
def test_barriers_of_other_settings_are_not_used_and_not_lost(tiny, cache, monkeypatch, capsys, other, says):
    mine = file_of(cache, 3)
    assert run(tiny, "--layers", 3, "--cache", cache, *QUICK, *other) == 0
    assert f"{mine}: made with other {says}; measured anew" in capsys.readouterr().err
    assert layers_in(cache) == ["0", "1", "2", "3", "3"]
    monkeypatch.setattr(hodgecover, "measure_layer", refuse)
    for settings in (QUICK, [*QUICK, *other]):
        assert run(tiny, "--layers", 3, "--cache", cache, *settings) == 0
        assert "anew" not in capsys.readouterr().err


def test_barriers_of_other_weights_are_not_used(tiny, cache, tmp_path, capsys):
    source = Path(shutil.copytree(tiny, tmp_path / "source"))  # keeps the time of modification
    assert run(source, "--layers", 3, "--cache", cache, *QUICK) == 0 and capsys.readouterr().err == ""
    os.utime(source / "model.safetensors")
    assert run(source, "--layers", 3, "--cache", cache, *QUICK) == 0
    assert "made with other weights; measured anew" in capsys.readouterr().err
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"][0, 0] += 1
    modified = (source / "model.safetensors").stat()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    os.utime(source / "model.safetensors", ns=(modified.st_atime_ns, modified.st_mtime_ns))
    assert run(source, "--layers", 3, "--cache", cache, *QUICK) == 0
    assert "made with other weights; measured anew" in capsys.readouterr().err


def damaged(content: bytes) -> list[bytes]:
    """Cut off anywhere, no file at all, or a bit other in the header's length, the header, a tensor, the last byte."""
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1:] for at in (0, 20, 400, len(content) - 1)]
    return [b"", content[:7], content[:100], content[:-1], content + b"x", b"\0" * len(content), *flipped]


def test_a_damaged_file_is_measured_anew(done, tiny, cache, capsys):
    file = file_of(cache, 3)
    whole = file.read_bytes()
    model = Model(tiny)
    key = hodgecover.cache_key(model, hodgecover.calibration_ids(model, [], 128, 64, 0), Settings(max_triangles=20))
    fields = hodgecover.Signals._fields
    signals = hodgecover.read_entry(cache, "model.layers.3", key, fields)
    for content in damaged(whole):
        file.write_bytes(content)
        assert hodgecover.read_entry(cache, "model.layers.3", key, fields) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "measured anew" in said and str(file) in said
    assert run(tiny, "--layers", 3, "--cache", cache, *QUICK) == 0
    assert "damaged" in capsys.readouterr().err
    again = hodgecover.read_entry(cache, "model.layers.3", key, fields)
    assert all(torch.equal(signals[field], again[field]) for field in fields)


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hodgecover, "lens_barriers", refuse)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(tiny, "--keep", 32, "--out", tmp_path / "out", "--cache", folder, *QUICK) == 2
        assert "name another folder with --cache" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    assert run(tiny, "--keep", 32, "--out", tmp_path / "out", "--cache", tmp_path / "locked", *QUICK) == 2
    assert "locked: cannot be written to" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- resumed and shared work


def test_a_killed_run_goes_on_where_it_was(done, tiny, tmp_path, capsys):
    """kill -9 as soon as the first layer is there; the next run does not measure it again and gives the same bytes."""
    work = [tiny, "--keep", 32, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *QUICK]
    process = subprocess.Popen(command(*work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("cache/model.layers.0-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    first = file_of(tmp_path / "cache", 0)
    stamp = first.stat().st_mtime_ns
    assert run(*work) == 0
    assert first.stat().st_mtime_ns == stamp and capsys.readouterr().err == ""
    assert contents(tmp_path / "out") == contents(done / "out")


def test_one_and_two_threads_choose_the_same_survivors(tiny, tmp_path):
    plans = []
    for threads in "12":
        out = ["--cache", tmp_path / f"cache{threads}", "--out", tmp_path / threads, "--plan-only"]
        subprocess.run(command(tiny, "--keep", 32, *out, *QUICK), check=True, capture_output=True,
                       env=os.environ | {"OMP_NUM_THREADS": threads})
        plans.append(json.loads((tmp_path / threads / "hodgecover.json").read_text()))
    for one, two in zip(*(plan["layers"] for plan in plans)):
        assert one["order"] == two["order"] and one["redirect"] == two["redirect"]
        assert one["mean_barrier"] == pytest.approx(two["mean_barrier"], rel=1e-5)


def test_processes_share_the_layers_of_one_cache(done, tiny, tmp_path, monkeypatch, capsys):
    """Two halves and, at the same time, one process that does them all; a last run only assembles."""
    shared = ["--cache", tmp_path / "cache", *QUICK]
    ranges = "0-1", "2-3", "0-3"
    processes = [subprocess.Popen(command(tiny, "--layers", r, *shared), stdout=subprocess.PIPE, text=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}) for r in ranges]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert re.findall(r"layer (\d): barriers in", said[1]) == ["2", "3"]
    assert sorted(contents(tmp_path / "cache")) == sorted(contents(done / "cache"))
    monkeypatch.setattr(hodgecover, "lens_barriers", refuse)
    assert run(tiny, "--keep", 32, "--out", tmp_path / "out", *shared) == 0 and capsys.readouterr().err == ""


def test_a_layer_that_another_process_measured_meanwhile_is_read(tiny, cache, tmp_path, monkeypatch):
    """The cache is looked into when a layer's turn comes, not only at the start."""
    late = tmp_path / "late"
    late.mkdir()
    shutil.copy(file_of(cache, 0), late)
    model = Model(tiny)
    ids = hodgecover.calibration_ids(model, [], 128, 64, 0)
    monkeypatch.setattr(hodgecover, "lens_barriers", refuse)
    for index, _ in hodgecover.measure_model(model, ids, Settings(max_triangles=20), range(4), late):
        if index < 3:
            shutil.copy(file_of(cache, index + 1), late)
    assert index == 3


# ------------------------------------------------------------------------------------------- export from a plan


def test_a_plan_exports_to_the_same_bytes(done, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Model, "stream", refuse)
    monkeypatch.setattr(hodgecover, "calibration_ids", refuse)
    assert run(tiny, "--plan", done / "out" / "hodgecover.json", "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(done / "out")
    assert f"output: {tmp_path / 'out'}" in capsys.readouterr().out


def edited(plan: dict, layer: int, **values) -> dict:
    layers = [entry | (values if i == layer else {}) for i, entry in enumerate(plan["layers"])]
    return plan | {"layers": layers}


def test_a_plan_edited_by_hand_is_exported(done, tiny, tmp_path):
    plan = json.loads((done / "out" / "hodgecover.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(edited(plan, 2, survivors=list(range(32)))))
    assert run(tiny, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out") == 0
    before, after = (load_file(path / "model.safetensors") for path in (tiny, tmp_path / "out"))
    name = "model.layers.2.mlp.gate.weight"
    assert torch.equal(after[name], before[name][:32])
    assert json.loads((tmp_path / "out" / "hodgecover.json").read_text())["layers"][2]["survivors"] == list(range(32))


@pytest.mark.parametrize("change, says", [
    (lambda plan: [], "expected a JSON object"),
    (lambda plan: {}, "not a plan that hodgecover.py wrote"),
    (lambda plan: plan | {"layers": None}, "not a plan that hodgecover.py wrote"),
    (lambda plan: plan | {"source": plan["source"] | {"fingerprint": "0"}}, "made for tiny-olmoe, of other weights"),
    (lambda plan: plan | {"layers": plan["layers"][:3]}, "its layers must be model.layers.0"),
    (lambda plan: plan | {"layers": [layer | {"survivors": [1, 2]} for layer in plan["layers"]]}, "from 8 to 64"),
    (lambda plan: edited(plan, 1, survivors=list(range(31))), "model.layers.1 must be 32 ascending numbers below 64"),
    (lambda plan: edited(plan, 1, survivors=list(range(31)) + [64]), "32 ascending numbers below 64"),
    (lambda plan: edited(plan, 1, survivors=[0] * 32), "32 ascending numbers below 64"),
    (lambda plan: edited(plan, 1, survivors=list(range(31, -1, -1))), "32 ascending numbers below 64"),
    (lambda plan: edited(plan, 1, survivors=[str(e) for e in range(32)]), "32 ascending numbers below 64"),
    (lambda plan: edited(plan, 1, survivors=[e + 0.0 for e in range(32)]), "32 ascending numbers below 64"),
    (lambda plan: edited(plan | {"settings": {"router": "fold"}}, 1, redirect={"1": 2}), "must send each dropped"),
    (lambda plan: plan | {"settings": {"router": "melt"}}, "router must be drop or fold"),
])
def test_a_wrong_plan_is_refused(done, tiny, tmp_path, capsys, change, says):
    plan = json.loads((done / "out" / "hodgecover.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(change(plan)))
    assert run(tiny, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert says in said and "plan.json" in said and said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


# ---------------------------------------------------------------------------------------------------- the cost


def test_operations_are_counted_over_uniform_routing():
    """Rows are those of all top-k choices, on average; a row is a readout and a down projection a member."""
    n, k, d, f, vocab = 6, 2, 5, 3, 11
    routes = list(itertools.combinations(range(n), k))
    for members in (2, 3):
        simplices = list(itertools.combinations(range(n), members))
        rows = sum(bool({*route} & {*s}) for route in routes for s in simplices) / len(routes)
        by_hand = rows * (2 * d * 7 + members * 2 * d * f) + 2 * d * vocab + 2 * (2 * n * f * d)
        assert hodgecover.sweep_operations(n, k, d, f, vocab, 7, members, len(simplices)) == pytest.approx(by_hand)


def test_an_estimate_counts_layers_output_and_memory(tiny, monkeypatch, capsys):
    monkeypatch.setattr(hodgecover, "sweep_rate", lambda *_: 1e9)
    monkeypatch.setattr(Model, "layer", refuse)
    cost = hodgecover.estimate(Model(tiny), Settings(), 2048, memory=0)
    sweep = sum(hodgecover.sweep_operations(64, 8, 96, 16, 2048, 2048, members, count)
                for members, count in ((2, 2016), (3, 500)))
    other, experts = 4 * 96 * 96 + 64 * 96 + 4 * 96, 64 * 3 * 96 * 16
    active = 4 * (other + experts / 8)
    assert cost.operations == pytest.approx(2048 * (4 * sweep + 2 * active)) and cost.seconds * 1e9 == cost.operations
    in_bytes = 2 * experts + 4 * (other + 2048 * 96 + 16 * 2048 * 96)  # bfloat16 experts stay so
    assert cost.memory == hodgecover.BASE_MEMORY + in_bytes
    sampled = hodgecover.estimate(Model(tiny), Settings(vocab_sample=64), 2048)
    assert sampled.operations < cost.operations / 2
    assert run(tiny, "--keep", 32, "--estimate", "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert f"{cost.operations:.1e} operations" in said and str(timedelta(seconds=round(cost.seconds))) in said
    assert "output: 0.0 GB" in said and not tiny.with_name("tiny-olmoe-keep32").exists()


def test_an_estimate_is_near_what_happens(tiny, tmp_path):
    """Within a factor of 4 here, where a layer takes a second beside other tests; within 2 on real shapes (README)."""
    model = Model(tiny)
    ids = hodgecover.calibration_ids(model, [], 256, 256, 0)
    cost = hodgecover.estimate(model, Settings(), ids.numel())
    started = time.perf_counter()
    assert len(list(hodgecover.measure_model(model, ids, Settings(), range(4), tmp_path))) == 4
    assert 1 / 4 < cost.seconds / (time.perf_counter() - started) < 4
    assert sum(map(len, contents(tmp_path).values())) == pytest.approx(cost.disk, rel=0.1)


def test_an_interrupt_while_packages_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "safetensors.py").write_text("import time; print('imported', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, hodgecover.__file__, "x", "--keep", "32"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"imported\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT


def test_a_folder_that_fails_leaves_no_parents_behind(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError), model_io.new_folder(tmp_path / "there" / "a" / "b" / "out"):
        raise OSError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


# --------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_stay_as_stored_and_are_multiplied_in_the_dtype(tiny, dtype):
    """To the last bit what the widened weights give, at half of the memory or less."""
    model = Model(tiny, dtype)
    ids = hodgecover.calibration_ids(model, [], 128, 64, 0)
    step = next(model.stream(ids))
    assert {part.dtype for part in step.layer.experts} == {torch.bfloat16} and step.x.dtype == dtype
    readout = partial(hodgecover.lens_barriers, norm=step.norm, unembedding=model.unembedding())
    wide = model_io.Experts(*(part.to(dtype) for part in step.layer.experts))
    held, plain = (hodgecover.measure_layer(experts, step.x, step.gates, step.y, readout, Settings(max_triangles=20))
                   for experts in (step.layer.experts, wide))
    assert all(map(torch.equal, held, plain))


def test_auto_is_bfloat16_only_where_the_processor_multiplies_it(monkeypatch):
    for able, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
                           ({"bf16": True}, torch.bfloat16), ({"avx2": True, "avx512_bf16": False}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert hodgecover.choose_dtype("auto", "lens", "cpu") == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert hodgecover.choose_dtype("auto", "model", "cpu") == torch.float32
    assert hodgecover.choose_dtype("float64", "lens", "cpu") == torch.float64


@pytest.fixture(scope="module")
def exact(tiny) -> list[hodgecover.Signals]:
    return signals_of(tiny, torch.float64)


def signals_of(tiny: Path, dtype: torch.dtype, vocab_sample: int = 0) -> list[hodgecover.Signals]:
    model, settings = Model(tiny, dtype), Settings(vocab_sample=vocab_sample, max_triangles=50)
    ids = hodgecover.calibration_ids(model, [], 256, 256, 0)
    return [signals for _, signals in hodgecover.measure_model(model, ids, settings, [0, 3])]


def test_bfloat16_ranks_edges_as_float64_does(tiny, exact):
    for low, reference in zip(signals_of(tiny, torch.bfloat16), exact):
        assert mathx.spearman(low.barriers, reference.barriers) > 0.999


def test_samples_of_256_outcomes_rank_edges_as_the_whole_vocabulary_does(tiny, exact):
    """And |b_harm| of the same complex; the audit says what the barriers fall short by."""
    for sampled, reference in zip(signals_of(tiny, torch.float32, vocab_sample=256), exact):
        d1, d2 = mathx.boundary_matrices(64, reference.candidates)
        harmonic = [mathx.hodge_decompose(s.barriers, d1, d2).harmonic.abs() for s in (sampled, reference)]
        assert mathx.spearman(sampled.barriers, reference.barriers) > 0.999 and mathx.spearman(*harmonic) > 0.998
        audit = mathx.shortfall(*sampled.audit.unbind(1))
        truth = 1 - (sampled.barriers.sum() / reference.barriers.sum()).item()
        assert audit["pairs"] == 256 and abs(audit["shortfall"] - truth) < 4 * audit["standard_error"] < 0.05
        assert audit["rank_correlation"] > 0.99


def test_a_sampled_run_says_and_records_its_audit(tiny, tmp_path, capsys):
    assert run(tiny, "--keep", 32, "--vocab-sample", 100, "--cache", tmp_path, "--out", tmp_path / "out", *QUICK) == 0
    said = capsys.readouterr().out
    layers = json.loads((tmp_path / "out" / "hodgecover.json").read_text())["layers"]
    pairs = sum(layer["audit"]["pairs"] for layer in layers)
    assert f"samples of 100 outcomes, audited on {pairs} (token, simplex) pairs: barriers fall short by " in said
    mean = sum(layer["audit"]["shortfall"] for layer in layers) / 4
    assert f"{mean:.2%} on average" in said
    assert all(math.isfinite(value) for layer in layers for value in layer["audit"].values())


# ------------------------------------------------------------------------------------------------------- faults


def test_a_full_disk_is_one_line_and_the_cache_goes_on(done, tiny, tmp_path):
    """A limit on the size of files, as a disk that fills: within the cache, then within the weights of the output."""
    work = [tiny, "--keep", 32, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *QUICK]
    script = ("import resource, signal, sys; sys.path.insert(0, {root!r}); import hodgecover; "
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
              "resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); sys.exit(hodgecover.main(sys.argv[1:]))")
    for size, layers in ((1000, []), (300_000, ["0", "1", "2", "3"])):
        limited = [sys.executable, "-c", script.format(root=str(SCRIPT.parent), size=size), *map(str, work)]
        ended = subprocess.run(limited, capture_output=True, text=True)
        lines = [line for line in ended.stderr.splitlines() if "% done" not in line]
        assert ended.returncode == 2 and len(lines) == 1 and "File too large; the output is whole" in lines[0], lines
        assert layers_in(tmp_path / "cache") == layers
        assert {file.name for file in tmp_path.iterdir()} == {"cache"}
    assert run(*work) == 0 and contents(tmp_path / "out") == contents(done / "out")


def test_out_of_memory_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(hodgecover, "lens_kl", lambda *_: refuse_with(error))
        assert run(tiny, "--keep", 32, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *QUICK) == 2
        said = capsys.readouterr().err
        assert "out of memory" in said and "--memory" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def refuse_with(error: Exception) -> None:
    raise error


def test_of_two_runs_to_one_output_one_wins(done, tiny, tmp_path):
    shutil.copytree(done / "cache", tmp_path / "cache")
    work = command(tiny, "--keep", 32, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *QUICK)
    processes = [subprocess.Popen(work, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2], said
    assert all(text.count("\n") == (process.returncode == 2) for process, text in zip(processes, said))
    assert contents(tmp_path / "out") == contents(done / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "out"}


def test_the_source_is_never_written_to(tiny, tmp_path):
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    before = contents(source), [file.stat().st_mtime_ns for file in sorted(source.iterdir())]
    assert run(source, "--keep", 32, "--router", "fold", "--total-rate", 0.6, *QUICK) == 0
    assert before == (contents(source), [file.stat().st_mtime_ns for file in sorted(source.iterdir())])
