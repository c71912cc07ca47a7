# SPDX-License-Identifier: MIT
"""Plans that were made before, and plans that were edited by hand."""
import json
import shutil
from pathlib import Path

import baselines
import common
import export_plan
import hodgecover
import pytest
import torch
from conftest import PROSE, QUICK, assert_refused, contents, named, record, refuse, run, with_tokenizer
from model_io import RECORD
from model_io import Model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, `small`, and a plan of 4 of its 8 experts, small-keep4.json."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(PROSE)
    small = with_tokenizer(named("olmoe-plain"), folder / "small")
    assert run(hodgecover, small, "--keep", 4, "--plan-only", "--calib", folder / "text.txt", *QUICK) == 0
    return folder


@pytest.fixture
def planned(made, tmp_path) -> Path:
    """The model in a copy of that folder."""
    return Path(shutil.copytree(made, tmp_path / "made")) / "small"


def export(small, out, plan=None) -> int:
    return run(export_plan, small, plan or small.with_name("small-keep4.json"), "--out", out)


def edit(small, change) -> None:
    """Change the plan's record in place."""
    path = small.with_name("small-keep4.json")
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def layers_of(found: dict) -> list[dict]:
    return found["history"][-1]["layers"]


@pytest.mark.parametrize("command, options", [
    (hodgecover, ["--vocab-sample", 0]), (hodgecover, ["--vocab-sample", 40]),
    (baselines, ["--method", "reap"]), (baselines, ["--method", "hodge-no-triangle"])])
def test_an_unedited_plan_gives_the_same_bytes(small, tmp_path, monkeypatch, command, options):
    """From the record of an output, without a forward pass."""
    assert run(command, small, "--keep", 4, *options, "--calib", tmp_path / "text.txt", *QUICK, "--out",
               tmp_path / "one") == 0
    monkeypatch.setattr(Model, "stream", refuse)
    before = contents(small)
    assert export(small, tmp_path / "two", tmp_path / "one" / RECORD) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and contents(small) == before


def test_a_plan_of_a_compressed_checkpoint_goes_on_with_its_history(small, tmp_path):
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(baselines, small, "--keep", 6, "--method", "stun", *text, "--out", tmp_path / "six") == 0
    assert run(hodgecover, tmp_path / "six", "--keep", 4, *text, "--out", tmp_path / "four") == 0
    assert export(tmp_path / "six", tmp_path / "again", tmp_path / "four" / RECORD) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "four")
    assert len(json.loads((tmp_path / "again" / RECORD).read_text())["history"]) == 2


def test_an_edited_plan_is_obeyed(planned, tmp_path, capsys):
    def change(found):
        for layer in layers_of(found):
            layer["survivors"] = [0, 1, 2, 6, 7]
    edit(planned, change)
    capsys.readouterr()
    assert export(planned, tmp_path / "out") == 0
    assert f"output: {tmp_path / 'out'}\n" in capsys.readouterr().out
    model, output = Model(planned), Model(tmp_path / "out")
    assert output.config.num_experts == 5
    for index in (0, 1):
        for before, after in zip(model.layer(index).experts, output.layer(index).experts):
            assert torch.equal(after, before[[0, 1, 2, 6, 7]])
    entry = record(tmp_path / "out")
    assert (entry["command"], entry["settings"]["keep"]) == ("hodgecover.py", 5)
    assert export(planned, tmp_path / "again", tmp_path / "out" / RECORD) == 0  # its record is a plan like any other
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def set_layer(key, value):
    """An edit of the last layer."""
    return lambda found: layers_of(found)[-1].update({key: value})


def set_entry(*keys_and_value):
    """An edit of the last entry, at a path of keys."""
    *keys, last, value = keys_and_value

    def change(found):
        at = found["history"][-1]
        for key in keys:
            at = at[key]
        at[last] = value
    return change


@pytest.mark.parametrize("change, says", [
    (set_layer("survivors", [0, 1]), "small-keep4.json: survivors of model.layers.1 must be 3 or more: a token"),
    (set_layer("survivors", [0, 1, 2, 8]), "survivors of model.layers.1 must be ascending numbers from 0 to 7"),
    (set_layer("survivors", [0, 1, 2, 2]), "must be ascending"),
    (set_layer("survivors", [3, 1, 2, 4]), "must be ascending"),
    (set_layer("survivors", [0, 1, 2, 3.0]), "must be ascending"),
    (set_layer("survivors", [0, 1, 2, True]), "must be ascending"),
    (set_layer("survivors", "0123"), "must be ascending"),
    (set_layer("name", "model.layers.7"), "its layers must be model.layers.0, model.layers.1"),
    (lambda found: layers_of(found).pop(), "its layers must be"),
    (lambda found: layers_of(found).append(layers_of(found)[-1]), "its layers must be"),
    (set_layer("redirect", {"x": 1}), "not a plan that hodgecover.py wrote (ValueError"),
    (set_entry("source", "fingerprint", "0"), "of other weights or another config.json than"),
    (lambda found: found.update(schema_version=1), "not a record of schema_version 3"),
    (lambda found: found.update(history=[]), "not a plan that hodgecover.py wrote (IndexError"),
    (lambda found: layers_of(found)[0].pop("order"), "not a plan that hodgecover.py wrote (KeyError: 'order')"),
    (set_entry("command", "refit.py"), "its last step is refit.py, which a plan cannot repeat; give the record of"),
    (set_entry("layers", 0, "routed_share", float("nan")), "not a plan"),
    (set_entry("version", "0.3.0"), "a plan of version 0.3.0, whose constants were not the paper's; make it again"),
])
def test_a_plan_that_cannot_be_exported_gets_one_line(planned, tmp_path, capsys, change, says):
    edit(planned, change)
    capsys.readouterr()
    assert_refused(capsys, export(planned, tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


def test_layers_may_keep_different_numbers(planned, tmp_path):
    edit(planned, set_layer("survivors", [0, 1, 2]))
    assert export(planned, tmp_path / "out") == 0
    assert [config.num_experts for config in Model(tmp_path / "out").layer_configs] == [4, 3]


def test_a_merge_cannot_be_repeated(small, tmp_path, capsys):
    assert run(baselines, small, "--keep", 4, "--method", "ream", "--calib", tmp_path / "text.txt", *QUICK, "--out",
               tmp_path / "merged") == 0
    capsys.readouterr()
    assert_refused(capsys, export(small, tmp_path / "out", tmp_path / "merged" / RECORD),
                   "its last step is baselines.py ream, which a plan cannot repeat")


def test_other_weights_of_the_same_shape(planned, tmp_path, capsys):
    checkpoint, name = Model(planned).checkpoint, "model.layers.0.mlp.experts.0.up_proj.weight"
    common.overwrite(checkpoint, name, checkpoint.load(name) + 1)
    capsys.readouterr()
    assert_refused(capsys, export(planned, tmp_path / "out"), "made for small, of other weights")


def test_missing_files_and_wrong_outputs(planned, tmp_path, capsys):
    capsys.readouterr()
    assert_refused(capsys, export(planned, tmp_path / "out", tmp_path / "none.json"), "none.json")
    assert_refused(capsys, export(planned, planned / "out"), "--out")
    assert_refused(capsys, export(planned, tmp_path), "exists and is not an empty folder")
    assert_refused(capsys, run(export_plan, planned, "plan", "--out", "x", "--seed", 1), "--seed")
