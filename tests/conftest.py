# SPDX-License-Identifier: MIT
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "examples/studies"), str(ROOT / "tests")]
settings.register_profile("default", max_examples=60, deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")
torch.set_num_threads(1)  # the tensors here are small: more threads cost time, most of all on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"

import hodgecover  # noqa: E402  (the path is set above)
import model_io  # noqa: E402
from model_io import Model  # noqa: E402


def named(name: str) -> Path:
    """A golden checkpoint: a small random one that transformers made."""
    return ROOT / "tests" / "golden" / name


DENSE = [named("dense-qwen3"), named("dense-qwen3-tied")]  # no layer has experts
FP8 = [named(f"fp8-{name}") for name in ("olmoe", "qwen2", "qwen3-one-scale", "qwen3_5")]  # blocks of other sizes
FP8_DENSE, INCOMPLETE = named("fp8-dense-qwen3"), named("fp8-qwen3-incomplete")  # the latter: some of 128 x 128, short
GOLDEN = sorted({path for path in named("").iterdir() if path.is_dir()} - {*DENSE, *FP8, FP8_DENSE, INCOMPLETE})
KINDS = [named("olmoe-sharded"), named("olmoe-gqa-clip"), named("qwen2-dense-between"),  # shared expert
         named("qwen3-plain-tied"), named("qwen3_5-vision-mtp"),  # the last: fused experts, Gated DeltaNet
         named("qwen3_next-tied-mtp"), named("qwen3_vl-published")]  # the last: transposed experts
PROSE = "All work and no play makes an expert dull. " * 40
QUICK = ["--tokens", "64", "--seq-len", "32", "--dtype", "float32"]  # a small calibration, the same on any machine


def run(command, *argv: object) -> int:
    """The exit status of a command, a module with a `main`, on these arguments."""
    return command.main([str(argument) for argument in argv])


def refuse(*_, **__):
    """To patch in for work that must not be done."""
    raise AssertionError("done again")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it; a file by itself."""
    found = sorted(folder.rglob("*")) or [folder]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def record(folder: Path) -> dict:
    """The last entry of an output's history."""
    return json.loads((folder / "hodgecover.json").read_text())["history"][-1]


def assert_refused(capsys, status: int, says: str) -> None:
    """A command ended with status 2, one line on stderr that says this, and nothing on stdout."""
    said = capsys.readouterr()
    assert (status, said.err.count("\n"), said.out) == (2, 1, ""), said
    assert says in said.err, said.err


def assert_survives_kills(monkeypatch, step: tuple[object, str], steps: int, command, *arguments: object, folder: Path
                          ) -> None:
    """A command killed at each of its steps in turn, calls of the function `step` (module, name), goes on where it was,
    does no step twice, and ends in the bytes of an undisturbed run."""
    assert run(command, *arguments, "--out", folder / "undisturbed") == 0
    real, done = getattr(*step), []

    def killed_after_one(*given):
        done.append(given)
        if len(done) % 2 == 0:
            raise KeyboardInterrupt
        return real(*given)
    monkeypatch.setattr(*step, killed_after_one)
    for _ in range(steps - 1):
        assert run(command, *arguments, "--out", folder / "out") == 130 and not (folder / "out").exists()
    assert run(command, *arguments, "--out", folder / "out") == 0 and len(done) == 2 * steps - 1
    assert contents(folder / "out") == contents(folder / "undisturbed")


def assert_disk_changes_nothing(monkeypatch, command, *arguments: object, folder: Path) -> None:
    """Streams beyond --memory lie on the disk of the output; that changes no byte of it."""
    import common  # the path is set above
    made, real = [], common.scratch
    monkeypatch.setattr(common, "scratch", lambda staging: made.append(staging) or real(staging))
    assert run(command, *arguments, "--out", folder / "all") == 0 and not made
    monkeypatch.setattr(common, "activation_bytes", lambda *_: 10**12)
    assert run(command, *arguments, "--out", folder / "none") == 0
    assert [staging.parent for staging in made] == [folder]
    assert contents(folder / "none") == contents(folder / "all")


def with_tokenizer(source: Path, folder: Path) -> Path:
    """A copy of a golden checkpoint with a tokenizer of the 95 printable characters, a token each."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("golden.safetensors"))
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {chr(32 + i): i for i in range(95)}, "unk_token": " "}}))
    return folder


def some_ids(count: int = 3, length: int = 12) -> torch.Tensor:
    """Random token ids of a golden checkpoint, (count, length)."""
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(0))


def sparse_names(model: Model) -> list[str]:
    """The names of the layers that have experts."""
    return [model.layer_names[index] for index in hodgecover.sparse_layers(model)]


def dropped(source: Path, out: Path, keep: Sequence[int] = (0, 2, 3, 5)) -> Path:
    """A checkpoint of some of the experts, without a record: what any tool could have made."""
    model = Model(source)
    model_io.write_checkpoint(model.checkpoint, out, dict.fromkeys(sparse_names(model), [*keep]), {})
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A copy of the trained checkpoint that the repository carries; caches of its barriers lie beside the copy."""
    return Path(shutil.copytree(ROOT / "examples" / "tiny-olmoe", tmp_path_factory.mktemp("source") / "tiny-olmoe"))


@pytest.fixture
def small(tmp_path) -> Path:
    """A random OLMoE of 2 layers of 8 experts, top-3, d 32, f 16, V 96, with `text.txt` beside it to calibrate on."""
    (tmp_path / "text.txt").write_text(PROSE)
    return with_tokenizer(named("olmoe-plain"), tmp_path / "small")


@pytest.fixture(params=KINDS, ids=lambda path: path.name)
def family(request, tmp_path) -> Path:
    """A golden checkpoint of each kind in turn, as `small` is."""
    (tmp_path / "text.txt").write_text(PROSE)
    return with_tokenizer(request.param, tmp_path / request.param.name)
