# SPDX-License-Identifier: MIT
"""The studies: a cell is what the commands give, the statistics are right, every line can be made; and RESULTS.md has
the figures of results.csv.

The pictures carry a hash of what they draw, so that the suite needs no matplotlib.
"""
import ast
import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import audit
import baselines
import budgets
import common
import distil
import dot_moe
import heapr
import hodgecover
import model_io
import nested
import pytest
import rco
import refit
import report
import study
import torch
import wanda
import ways
from conftest import DENSE, GOLDEN, PROSE, assert_refused, refuse, run, with_tokenizer
from model_io import Model

TABLES = study.tables()
LINES = TABLES["plain"].lines
TEXT = PROSE[:640]
TEXTS = {"calibration": TEXT, "held-out": TEXT[::-1], "train": TEXT.upper()}


def documents(part: str) -> tuple[str]:
    """The one document of a part."""
    return (TEXTS[part],)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Samples of 64 tokens in sequences of 32, and texts of a page."""
    monkeypatch.setattr(ways, "CALIBRATION", 64)
    for module in (ways, study):
        monkeypatch.setattr(module, "SEQ_LEN", 32)
    monkeypatch.setattr(model_io, "python_documentation", documents)  # hodgecover.py's default text
    monkeypatch.setitem(common.TEXTS, "documentation", documents)


@pytest.fixture
def sample(small, tmp_path) -> ways.Sample:
    """The sample of seed 1 of the small model."""
    return ways.Sample(Model(small), tmp_path / "cache", documents, hodgecover.Settings(vocab_sample=0, seed=1))


def held_out(sample: ways.Sample) -> torch.Tensor:
    """Its held-out text, (2, 32)."""
    return study.evenly(model_io.sequences(ways.encoded(sample.source, documents, "held-out"), 32), 64)


def assert_cell(sample: ways.Sample, way: ways.Way, folder: Path, gone: float | None = None) -> None:
    """A cell at 50% holds the figures of the checkpoint in a folder."""
    found = study.measure(sample, held_out(sample), way, 0.5)
    expected = common.compare(sample.source, Model(folder), held_out(sample))
    assert (found["perplexity"], found["kl"]) == (f"{expected.output_perplexity:.6g}", f"{expected.kl:.6g}")
    assert gone is None or found["gone"] == f"{gone:.4f}"


def assert_same_weights(*folders: Path) -> None:
    """Checkpoints have the same bytes."""
    one, two = (folder.joinpath("model.safetensors").read_bytes() for folder in folders)
    assert one == two


# --------------------------------------------------------------------------------------------- a cell is what users get


USERS = ["--tokens", 64, "--seq-len", 32, "--seed", 1, "--dtype", "float32"]


@pytest.mark.parametrize("label, method", [("reap", ["reap"]), ("random", ["random"]), ("hc-smoe", ["hc-smoe"]),
                                           ("greedy-barrier", ["greedy-barrier"]),
                                           ("ream, in all slots", ["ream", "--all-slots"])])
def test_cell_of_a_method_is_what_its_command_gives(label, method, sample, tmp_path):
    out = tmp_path / "out"
    assert run(baselines, sample.source.checkpoint.path, "--keep", 4, "--out", out, "--method", *method, *USERS) == 0
    assert_cell(sample, LINES[label], out)


def test_cell_of_hodgecover_is_what_its_command_gives(sample, tmp_path):
    assert run(hodgecover, sample.source.checkpoint.path, "--keep", 4, "--out", tmp_path / "out", *USERS) == 0
    assert_cell(sample, LINES["hodgecover"], tmp_path / "out", 0.5)


def test_cell_at_the_end_of_the_model_is_the_plan_of_its_barriers(sample, tmp_path, monkeypatch):
    """Which are measured once for all rates; those of the layer are not looked at."""
    monkeypatch.setattr(hodgecover, "measure_model", refuse)
    source, few = sample.source, sample.of(32)
    wanted = {}
    for index, signals in audit.signals_at_end(source, few.ids, few.settings):
        plan = hodgecover.plan_from_signals(signals, 4, few.settings)
        wanted[source.layer_names[index]] = plan.survivors
    way = partial(LINES[f"hodgecover, readout model, {study.END_TOKENS:,} tokens"], tokens=32)
    check_survivors(way(sample, 0.5, tmp_path / "made"), source, wanted)
    monkeypatch.setattr(hodgecover, "plain_barrier", refuse)
    assert way(sample, 0.25, tmp_path / "larger").config.num_experts == 6


@pytest.mark.parametrize("label, options", [("10% critical", ["--edge-percent", 10, "--triangle-percent", 10]),
                                            ("both lambdas 0.04", ["--lambda-edge", 0.04, "--lambda-triangle", 0.04]),
                                            ("lambda of edges 0", ["--lambda-edge", 0]),
                                            ("order by saliency", ["--order", "saliency"])])
def test_cell_of_another_setting_is_what_the_command_gives(label, options, sample, tmp_path):
    path = sample.source.checkpoint.path
    assert run(hodgecover, path, "--keep", 4, "--out", tmp_path / "out", *USERS, "--vocab-sample", 0, *options) == 0
    assert_cell(sample, TABLES["settings"].lines[label], tmp_path / "out")


def test_cell_of_a_refitted_hybrid_is_what_three_commands_give(sample, tmp_path):
    path, few, sparse, recovered = (sample.source.checkpoint.path, *(tmp_path / name for name in "abc"))
    assert run(baselines, path, "--keep", 6, "--method", "reap", "--out", few, *USERS) == 0
    assert run(wanda, few, "--total-rate", 0.5, "--source", path, "--out", sparse, *USERS) == 0
    assert run(refit, path, sparse, "--out", recovered, *USERS) == 0
    assert_cell(sample, LINES["reap, wanda"], sparse)
    assert_cell(sample, partial(TABLES["refitted"].lines["reap, wanda"], tokens=64), recovered)


def test_wanda_alone_drops_no_expert(sample, tmp_path):
    output = LINES["wanda"](sample, 0.5, tmp_path / "out")
    assert output.config.num_experts == 8
    zeros = [(output.checkpoint.load(name) == 0).double().mean().item()
             for name in common.expert_matrices(output.checkpoint)]
    assert zeros == pytest.approx([0.5] * len(zeros))


# ------------------------------------------------------------------------------------------------------- the statistics


def test_students_t_holds_95_percent():
    """Of the density (1 + t^2 / m)^(-(m + 1) / 2) with m degrees of freedom, by the substitution t = sqrt(m) tan u."""
    for m, t in enumerate(report.STUDENT_T, 1):
        u = torch.linspace(-torch.pi / 2, torch.pi / 2, 200_001, dtype=torch.float64)
        density = u.cos().clamp(min=0) ** (m - 1)
        inside = density[(m**0.5 * u.tan()).abs() <= t].sum() / density.sum()
        assert inside == pytest.approx(0.95, abs=2e-4)


def test_half_interval_of_two_values_in_closed_form():
    half = torch.tan(torch.tensor(0.475 * torch.pi, dtype=torch.float64)).item()  # Cauchy's quantile
    assert report.half_interval([1.0, 3.0]) == pytest.approx(half, rel=1e-4)  # times |3 - 1| / 2


def rows(model: str, table: str, line: str, column: str, *kls: float) -> dict:
    """A cell of results with the seeds 0, 1, ..."""
    cell = model, table, line, column
    return {cell: [report.Row(*cell, seed, 9.0, kl, 0.5, 1.0, "0", 1, 0.0, 0.0) for seed, kl in enumerate(kls)]}


def test_differences_are_taken_sample_by_sample():
    found = {}
    for line, kls in {"a": (0.1, 0.9), "level": (0.2, 0.8), "worse": (0.301, 1.099),
                      "better": (0.0, 0.8, 7.0), "short": (0.1,)}.items():
        found |= rows("m", "plain", line, "50%", *kls)
    assert report.gaps(found, "plain", ["a", "level", "worse", "better", "short"], ["50%"], "m").splitlines() == [
        "| KL minus that of a | `m` 50% |", "| --- | --- |", "| level | +0.000 ± 1.271 |",
        "| worse | **+0.200 ± 0.013** |", "| better | **-0.100 ± 0.000** |", "| short |  |"]


def test_levels_put_the_models_side_by_side():
    found = rows("m", "plain", "a", "50%", 0.1, 0.9) | rows("n", "refitted", "a", "50%", 0.25)
    assert report.levels(found, ["plain", "refitted"], ["a", "b"], ["50%"], ["m", "n"]).splitlines() == [
        "| perplexity (KL) | `m` 50% | `n` 50% |", "| --- | --- | --- |", "| a | 9.0 (0.500 ± 0.566, n = 2) |  |",
        "| a, refitted |  | 9.0 (0.250, n = 1) |"]


def test_a_forest_draws_differences_of_its_own_tables():
    model, lines = report.MODELS[0], report.FORESTS["settings"].lines
    found = rows(model, "settings", lines[0], "66%", 0.3, 0.5) | rows(model, "plain", "hodgecover", "66%", 0.1, 0.2)
    (*cell, value, half), = report.forest(found, "settings")
    assert cell == [model, "settings", lines[0], "66%"]
    assert (value, half) == (pytest.approx(0.25), pytest.approx(report.half_interval([0.2, 0.3])))


def test_text_is_evenly_spaced_from_the_first_to_the_last():
    text = torch.arange(22).view(11, 2)
    assert study.evenly(text, 6)[:, 0].tolist() == [0, 10, 20] and len(study.evenly(text, 999)) == 11


# -------------------------------------------------------------------------------------- RESULTS.md is the CSV's picture


def test_the_document_has_the_figures_of_the_csv():
    document = report.DOCUMENT.read_text("utf-8")
    assert report.filled(document, report.read(report.RESULTS)) == document
    assert {*re.findall(r"<!-- table ([\w-]+) -->", document)} == {*report.TABLES}


@pytest.mark.parametrize("table, line", [
    ("plain", "hodgecover"), ("plain", "reap"), ("plain", "hodgecover, by barriers"), ("plain", "reap, by barriers"),
    ("plain", "narrow, camera"), ("plain", "wanda"), ("refitted-distilled", "narrow, camera, 16,384 tokens"),
    ("refitted-distilled", "reap, by barriers")])
def test_the_readme_has_the_means_of_the_csv(table, line):
    results, readme = report.read(report.RESULTS), (common.HERE.parent / "README.md").read_text("utf-8")
    rows = [results[model, table, line, "50%"] for model in report.MODELS]
    assert [len(own) for own in rows] == [5, 5]
    assert " and ".join(f"{sum(row.kl for row in own) / 5:.3f}" for own in rows) in readme


def test_every_picture_of_a_document_is_of_the_csv():
    shown = "".join(path.read_text("utf-8") for path in (report.DOCUMENT, common.HERE.parent / "README.md"))
    drawn = report.pictures(report.read(report.RESULTS))
    assert {*re.findall(r"studies/([\w-]+)\.png", shown)} == {*report.FORESTS, "frontier"} == {*drawn}
    for name, points in drawn.items():
        png = (report.HERE / f"{name}.png").read_bytes()
        assert re.search(rb"tEXtSource\0(\w{64})", png)[1].decode() == report.digest(points)


RETIRED = {"settings": {"order by index"}}  # lines of version 0.3 that no study measures any more


def lines_of(table: str) -> set[str]:
    """The lines of a table, retired ones too."""
    return {*TABLES[table].lines} | RETIRED.get(table, set())


def test_every_line_of_the_documents_is_a_line_of_its_study():
    for lines, reference, panels in report.FORESTS.values():
        assert all({*lines} & lines_of(table) and reference in lines_of(base) for table, base in panels)
        assert {*lines} <= set().union(*(lines_of(table) for table, _ in panels))
    for names, lines, *_ in report.TABLES.values():
        assert {*lines} <= set().union(*map(lines_of, names))
    assert {*report.FRONTIER} <= {*LINES}


def test_the_csv_has_each_sample_once_and_only_what_studies_measure():
    with report.RESULTS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [(*row.values(),)[:5] + (row["version"],) for row in rows]
    assert len({*cells}) == len(cells) > 1000
    for _, table, line, column, _, version in cells:
        assert line in lines_of(table) and column in TABLES[table].columns
        assert version in (*report.VERSIONS_SHOWN, hodgecover.__version__)


def test_versions_are_never_mixed(small, tmp_path, capsys):
    """A cell of 0.3 is measured anew by this version, and its row stays; a report has one or the other."""
    results = tmp_path / "results.csv"
    arguments = ["--only", "random", "--columns", "50%", "--samples", 1]
    (new,) = studied("plain", small, results, *arguments)
    old = new | dict(version="0.3.0", kl="7.5")
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, old)
        writer.writeheader()
        writer.writerow(old)
    capsys.readouterr()
    kept, added = studied("plain", small, results, *arguments)
    assert kept == old and added == new | {"cost": added["cost"]} and "7.5" not in capsys.readouterr().out
    cell = small.name, "plain", "random", "50%"
    assert [row.version for row in report.read(results)[cell]] == ["0.3.0"]
    assert [row.kl for row in report.read(results, [hodgecover.__version__])[cell]] == [float(new["kl"])]
    assert hodgecover.__version__ not in report.VERSIONS_SHOWN


def test_no_cell_that_is_shown_is_of_two_versions():
    for cell, rows in report.read(report.RESULTS).items():
        assert len({(row.version, row.samples) for row in rows}) == 1, cell


# ----------------------------------------------------------------------------------------- fewer and narrower experts


def test_cell_of_fewer_and_narrower_experts_is_what_three_commands_give(sample, tmp_path):
    path, few, thin, recovered = (sample.source.checkpoint.path, *(tmp_path / name for name in "abc"))
    assert run(baselines, path, "--keep", 6, "--method", "reap", "--out", few, *USERS) == 0
    assert run(heapr, few, "--width", 11, "--out", thin, *USERS) == 0
    assert run(refit, path, thin, "--out", recovered, *USERS) == 0
    assert_cell(sample, LINES["both, heapr"], thin, 1 - 6 * 11 / (8 * 16))
    assert_cell(sample, partial(ways.refitted, way=LINES["both, heapr"], tokens=64), recovered)


@pytest.mark.parametrize("label, command, arguments", [
    ("hope", baselines, ["--keep", 4, "--method", "hope"]), ("aimer", baselines, ["--keep", 4, "--method", "aimer"]),
    ("narrow, camera", heapr, ["--width", 8, "--score", "camera"]),
    ("narrow, random", heapr, ["--width", 8, "--score", "random"])])
def test_way_is_what_one_command_gives(label, command, arguments, sample, tmp_path):
    users = ["--seed", 1] if label == "narrow, random" else USERS
    assert run(command, sample.source.checkpoint.path, *arguments, "--out", tmp_path / "out", *users) == 0
    made = LINES[label](sample, 0.5, tmp_path / "made")
    assert_same_weights(tmp_path / "out", tmp_path / "made")
    assert made.config == Model(tmp_path / "out").config


def test_a_way_on_more_tokens_sees_them(sample, tmp_path):
    made = partial(LINES["narrow, heapr, 16,384 tokens"], tokens=128)(sample, 0.5, tmp_path / "made")
    assert sample.of(128).ids.numel() == 128 and made.config.expert_width == 8
    found = heapr.score_units(sample.source, "heapr", sample.of(128).ids)
    plain = ways.write_narrow(sample.source, found, 8, tmp_path / "plain")
    assert torch.equal(made.logits(sample.ids), plain.logits(sample.ids))


# ----------------------------------------------------------------------------------------------------------- redirects


def test_additive_redirect_finds_what_the_additive_part_hides():
    """Expert 0 is cheapest to merge with everything; without phi_i + phi_j, the planted pair of 5 is 1."""
    phi = torch.tensor([0.0, 5.0, 6.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    i, j = hodgecover.edges(6).unbind(1)
    barriers = phi[i] + phi[j] - 0.5 * ((i == 1) & (j == 5)).double()
    signals = hodgecover.Signals(torch.ones(6), torch.arange(6).double(), barriers, torch.empty(0, 3).long(),
                                 torch.empty(0, dtype=torch.float64))
    found = hodgecover.decompose(signals, hodgecover.Settings(order="index"))
    assert {*audit.REDIRECTS["the paper's rule"](signals, found, [0, 1, 2], None).values()} == {0}
    assert audit.REDIRECTS["least barrier without its additive part"](signals, found, [0, 1, 2], None)[5] == 1


def test_a_fold_moves_probability_to_the_targets(sample, tmp_path):
    """By hand, token by token; nothing moves if nothing is dropped."""
    source, (paper, *others) = sample.source, audit.REDIRECTS
    for rule in (paper, *others):
        model = ways.fold(sample, 0.5, tmp_path, rule)
        plan = ways.plans(sample, "hodgecover", ways.uniform(source, 0.5))[source.layer_names[0]]
        targets = model.targets[source.layer_names[0]].tolist()
        assert {e for e in range(8) if targets[e] == e} == {*plan.survivors} == {*targets}
        assert rule != paper or {e: targets[e] for e in plan.redirect} == plan.redirect
        step, plain = (next(each.stream(sample.ids)) for each in (model, source))
        for x, gates, y, before, own in list(zip(step.x, step.gates, step.y, plain.y, plain.gates))[:8]:
            p, kept = (step.layer.router @ x).softmax(0), dict.fromkeys(plan.survivors, 0.0)
            for e, share in enumerate(p.tolist()):
                kept[targets[e]] += share
            expected = torch.zeros(8)
            for e in sorted(kept, key=kept.get)[-source.config.top_k:]:
                expected[e] = kept[e]
            torch.testing.assert_close(gates, expected)
            outputs = torch.cat([step.layer.experts(e, x[None]) for e in range(8)])
            torch.testing.assert_close(y, before + (expected - own) @ outputs)
    every = ways.fold(sample, 0.0, tmp_path, paper)
    torch.testing.assert_close(every.logits(sample.ids), source.logits(sample.ids))


def test_a_fold_renormalises_as_its_model_does():
    source = next(model for model in map(Model, GOLDEN) if model.config.norm_topk_prob)
    cfg = source.config
    frequency = torch.ones(cfg.num_experts)
    plan = hodgecover.plan_of([*range(cfg.num_experts)], {}, cfg.num_experts, frequency, frequency)
    plans = {source.layer_names[index]: plan for index in hodgecover.sparse_layers(source)}
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(ways.Folded(source.checkpoint.path, plans).logits(ids), source.logits(ids))


# ------------------------------------------------------------------------------------------------ refits and trainings


def steps(way: ways.Way) -> list[tuple]:
    """What a way does, the last step first: (function's name, its other options)."""
    if not isinstance(way, partial):
        return [(way.__name__, {})]
    options = {**way.keywords}
    inner = options.pop("way", None)
    return [(way.func.__name__, options), *(steps(inner) if inner else [])]


def said(label: str) -> list[tuple]:
    """The steps that a label of `plain` names."""
    *start, last = label.split(", ")
    if last in ("wanda", f"{ways.MORE:,} tokens", f"{study.END_TOKENS:,} tokens", "000 tokens"):
        tokens = last != "wanda" and dict(tokens=int(last.removesuffix(" tokens").replace(",", "")))
        return [("with_tokens", tokens) if tokens else ("then_wanda", {}),
                *(said(", ".join(start)) if start else [("whole", {})])]
    budgets_of = {"first layer whole": ways.first_whole, "by barriers": ways.by_barriers,
                  "by coverage": ways.by_coverage, "by evo": ways.by_evo}
    if last in budgets_of:
        return [("share_out", dict(method=start[0], budget=budgets_of[last]))]
    if label == "hodgecover, readout model":
        return [("select_at_end", {})]
    if start and start[0] in ("narrow", "both"):
        return [(start[0], dict(score=last))]
    if label in ("rco", "rco, ragged"):
        return [("search", dict(ragged=last == "ragged"))]
    if "fold" in (label.split(", ")):
        return [("fold", dict(rule="the paper's rule" if last == "fold" else last))]
    if last == "in all slots":
        return [("merge", dict(method=start[0], all_slots=True))]
    return [("merge" if label in baselines.MERGING else "select", dict(method=label))]


def test_every_line_does_what_its_label_says():
    for label, way in LINES.items():
        assert steps(way) == said(label)
    for table, before in {"refitted": [("refitted", {})], "distilled": [("distilled", {})],
                          "refitted-distilled": [("distilled", {}), ("refitted", {})]}.items():
        for label, way in TABLES[table].lines.items():
            assert steps(way) == [*before, *said(label)]
    for label, way in TABLES["training"].lines.items():
        (trained, options), *base = steps(way)
        count = re.search(r"([\d,]+) tokens", label)
        assert options.pop("tokens", None) == (int(count[1].replace(",", "")) if count else None)
        expected = {"layerwise": dict(layerwise=True), "8 passes": dict(epochs=8), "next token": dict(kl_weight=0.0),
                    "router": dict(parts=["router"]), "experts": dict(parts=["experts"])}
        assert (trained, options) == ("distilled", next((value for key, value in expected.items() if key in label), {}))
        assert base == said("narrow, camera" if "narrow" in label else "reap")
    for table in ("dense", "dense-half"):
        for label, way in TABLES[table].lines.items():
            *after, (made, options) = steps(way)
            name = label.removesuffix(", distilled")
            assert after == [("distilled", {})] * (name != label)
            assert (made, options) == ("deal_half", dict(method=name)) if table == "dense-half" else (
                "deal", dict(split=name.split(",")[0]) | dict(layerwise=True) if "layer" in name else dict(split=name))
    (first, second, third, last) = map(steps, TABLES["nested"].lines.values())
    assert first == [("together", {})] and last == said("reap")
    assert [second, third] == [[("distilled", dict(tokens=tokens)), *said("reap")] for tokens in (65_536, 21_504)]


def test_refits_do_what_their_lines_say():
    for label, way in TABLES["refit"].lines.items():
        (refitted, options), *base = steps(way)
        count = re.search(r"([\d,]+) tokens", label)
        assert refitted == "refitted" and base == said("hodgecover")
        assert options.get("tokens", ways.MORE) == (int(count[1].replace(",", "")) if count else ways.MORE)
        assert ("train" in options.get("parts", ())) == ("training" in label)
        assert ("ridge" in label) == (f"ridge {options.get('ridge')}," in label)
        assert ("sweeps" in label) == (label == f"sweeps: {options.get('sweeps')}")
        assert ("source code" in label) == (options.get("documents") == ways.source_code)


def test_each_fit_and_text_is_one_of_its_own(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(ways.common, "code_alone", lambda _: "x = 1\n" * 20)
    lines = study.refit_lines()
    few = {label: partial(lines[label], tokens=64) for label in lines if label.startswith(("sweeps", "text", "2,048"))}
    made = {make(sample, 0.5, tmp_path / str(at)).checkpoint.fingerprint() for at, make in enumerate(few.values())}
    assert len(made) == len(few) == 6


def test_source_code_has_no_docstrings(monkeypatch, tmp_path):
    documented = '"""Doc."""\nclass A:\n    """Doc."""\ndef f():\n    "Doc."\n    return 1  # why\n'
    (tmp_path / "module.py").write_text(documented)
    (tmp_path / "broken.py").write_text("(")
    monkeypatch.setattr(ways.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    alone = ast.unparse(ast.parse("class A: pass\ndef f(): return 1"))
    assert sorted(ways.source_code("all")) == ["", alone]
    assert sum((common.python_code.__wrapped__(part) for part in ("train", "calibration", "held-out")), ()) == (alone,)


@pytest.mark.parametrize("label, options", [("layerwise, 16,384 tokens", ["--layerwise", "--tokens", 16384]),
                                            ("16,384 tokens, 8 passes", ["--epochs", 8, "--tokens", 16384]),
                                            ("next token alone", ["--kl-weight", 0]),
                                            ("router alone", ["--train", "router"])])
def test_cell_of_a_training_is_what_two_commands_give(label, options, sample, tmp_path):
    path, few, trained = sample.source.checkpoint.path, tmp_path / "few", tmp_path / "out"
    assert run(baselines, path, "--keep", 4, "--method", "reap", "--out", few, *USERS) == 0
    users = ["--tokens", ways.TRAINED, "--seq-len", 32, "--seed", 1, "--dtype", "float32"]
    assert run(distil, path, few, "--out", trained, *users, *options) == 0
    study.training_lines()[label](sample, 0.5, tmp_path / "made")
    assert_same_weights(trained, tmp_path / "made")


@pytest.mark.parametrize("split, top_k", [("dot", 2), ("coactivation", 4)])
def test_a_dense_model_is_dealt_to_as_many_experts_as_the_column_says(split, top_k, sample, tmp_path, monkeypatch):
    for name, value in dict(TRAINED=128, SEARCH_LENGTH=16, SPLIT=8).items():
        monkeypatch.setattr(ways, name, value)
    monkeypatch.setattr(dot_moe, "ROUNDS", 5)
    dense = replace(sample, source=Model(with_tokenizer(DENSE[0], tmp_path / "dense")))
    way, half = (TABLES[table].lines[label] for table, label in (("dense", split), ("dense-half", "reap")))
    made, few = way(dense, top_k / 8, tmp_path / "made"), half(dense, top_k / 8, tmp_path / "half")
    assert (made.config.num_experts, few.config.num_experts, few.config.top_k) == (8, 4, top_k)
    assert made.config.top_k == top_k and made.config.expert_width == dense.source.config.dense_width // 8
    assert study.measure(dense, held_out(dense), half, top_k / 8)["gone"] == "nan"
    with pytest.raises(model_io.InputError, match="must be a dense one"):
        way(sample, 0.25, tmp_path / "sparse")


# -------------------------------------------------------------------------------------------------- budgets of layers


def test_cell_of_rco_is_what_its_command_gives(sample, tmp_path, monkeypatch):
    for name, value in dict(MORE=64, SEARCH_LENGTH=16, STEPS=2).items():
        monkeypatch.setattr(ways, name, value)
    path = sample.source.checkpoint.path
    assert run(budgets, path, "rco", "--keep", 4, "--steps", 2, "--out", tmp_path / "out", "--tokens", 64, "--seq-len",
               16, "--seed", 1, "--dtype", "float32") == 0
    LINES["rco"](sample, 0.5, tmp_path / "made")
    assert_same_weights(tmp_path / "out", tmp_path / "made")
    ragged = LINES["rco, ragged"](sample, 0.5, tmp_path / "ragged")
    orders, gone = ways.rco_found(sample, 4, True)
    check_survivors(ragged, sample.source, {name: sorted(order[:8 - count])
                                            for (name, order), count in zip(orders.items(), gone)})


def check_survivors(found: Model, source: Model, wanted: dict[str, list[int]]) -> None:
    """The layers of a checkpoint have these experts of the source's."""
    for index, name in enumerate(source.layer_names):
        assert torch.equal(found.layer(index).router, source.layer(index).router[wanted[name]])


def planned(path: Path) -> dict[str, list[int]]:
    """The survivors of a plan, by layer name."""
    return {layer["name"]: layer["survivors"] for layer in json.loads(path.read_text())["history"][-1]["layers"]}


def test_cell_of_evo_is_the_plan_that_its_command_finds(sample, tmp_path, monkeypatch):
    path, plan = sample.source.checkpoint.path, tmp_path / "plan.json"
    assert run(budgets, path, "evo", "--keep", 4, "--generations", ways.GENERATIONS, "--plan-only", "--out", plan,
               *USERS) == 0
    check_survivors(LINES["reap, by evo"](sample, 0.5, tmp_path / "made"), sample.source, planned(plan))
    ways.by_evo.cache_clear()
    monkeypatch.setattr(budgets, "esap_of", lambda *_: None)  # what was found lies beside the barriers
    assert [8 - gone for gone in ways.by_evo(sample, 4)] == [len(kept) for kept in planned(plan).values()]


def test_cells_of_budgets_are_the_plans_that_the_commands_give(sample, tmp_path):
    path, plan = sample.source.checkpoint.path, tmp_path / "plan.json"
    assert run(hodgecover, path, "--keep", 4, "--plan-only", "--out", plan, *USERS) == 0
    for label, arguments in {"hodgecover, by barriers": ["barriers", "--plan", plan],
                             "reap, by coverage": ["coverage", *USERS]}.items():
        assert run(budgets, path, *arguments, "--keep", 4, "--plan-only", "--out", tmp_path / f"{label}.json") == 0
        found = LINES[label](sample, 0.5, tmp_path / label)
        check_survivors(found, sample.source, planned(tmp_path / f"{label}.json"))


def test_methods_that_spare_the_first_layer(sample, tmp_path):
    source, (first, second) = sample.source, sample.source.layer_names
    for method in ("reap", "hodgecover", "hope"):
        found = LINES[f"{method}, first layer whole"](sample, 0.25, tmp_path / method)
        chosen = ways.plans(sample, method, dict.fromkeys(source.layer_names, 4))
        check_survivors(found, source, {first: [*range(8)], second: chosen[second].survivors})


def test_cell_of_a_joint_training_is_a_slice_of_what_the_commands_give(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(ways, "NESTED_TRAINED", 256)
    path, ordered, trained = sample.source.checkpoint.path, tmp_path / "nested", tmp_path / "trained"
    assert run(nested, path, "--out", ordered, *USERS) == 0
    users = ["--tokens", 256, "--seq-len", 32, "--seed", 1, "--dtype", "float32"]
    assert run(distil, path, ordered, "--prefixes", 6, 4, 3, "--out", trained, *users) == 0
    assert run(nested, trained, "--slice", 4, "--out", tmp_path / "cut") == 0
    ways.together(sample, 0.5, tmp_path / "made")
    assert_same_weights(tmp_path / "cut", tmp_path / "made")


# ---------------------------------------------------------------------------------------------------------- the runner


def studied(table: str, model: Path, results: Path, *arguments: object) -> list[dict[str, str]]:
    """The rows that a study on 64 tokens leaves in a file."""
    assert run(study, table, "--model", model, "--tokens", 64, "--results", results, *arguments) == 0
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_line_of_plain_can_be_made(small, tmp_path, monkeypatch):
    for name, value in dict(MORE=64, SEARCH_LENGTH=16, STEPS=1, GENERATIONS=1).items():
        monkeypatch.setattr(ways, name, value)
    monkeypatch.setattr(rco, "NOISES", 1)
    monkeypatch.setattr(study, "MORE", 64)
    monkeypatch.setattr(study, "END_TOKENS", 32)
    found = studied("plain", small, tmp_path / "results.csv", "--columns", "25%", "--samples", 1)
    assert [row["line"] for row in found] == [*study.tables()["plain"].lines]
    assert {*baselines.METHODS, *heapr.SCORES} < {part for row in found for part in (row["line"], row["line"][8:])}
    assert all(float(row["kl"]) > 0 <= float(row["cost"]) and row["model"] == small.name for row in found)


def test_a_model_is_measured_on_the_text_that_it_learned(small, tmp_path, monkeypatch):
    seen = []
    for name in common.TEXTS:
        monkeypatch.setitem(common.TEXTS, name, lambda part, name=name: seen.append(name) or documents(part))
    shutil.copytree(small, tmp_path / "tiny-qwen3-moe")
    studied("plain", tmp_path / "tiny-qwen3-moe", tmp_path / "results.csv", "--only", "reap", "--samples", 1)
    assert {*seen} == {"code"}


def test_what_is_there_is_not_measured_again(small, tmp_path, monkeypatch, capsys):
    """A second run adds the samples that are missing; barriers come from the cache."""
    results = tmp_path / "results.csv"
    first = studied("plain", small, results, "--only", "hodgecover", "reap", "--columns", "50%", "--samples", 1)
    monkeypatch.setattr(hodgecover, "measure_layer", None)
    assert studied("plain", small, results, "--only", "hodgecover", "--columns", "50%", "--samples", 1) == first
    capsys.readouterr()
    added = studied("plain", small, results, "--only", "reap", "random", "--columns", "50%", "--samples", 2)
    assert added[:2] == first and [(row["line"], row["seed"]) for row in added[2:]] == [
        ("reap", "1"), ("random", "0"), ("random", "1")]
    head, rule, reap, rand, *_, other = capsys.readouterr().out.splitlines()
    assert reap.startswith("| reap | ") and other.startswith("| random | ") and "±" in other


def test_columns_keep_the_named_share(small):
    """Of 8 experts stay 6, 4 and 3."""
    assert [ways.survivors(Model(small), dropped) for dropped in ways.RATES.values()] == [6, 4, 3]


@pytest.mark.parametrize("arguments, says", [
    (["plain", "--only", "nobody"], "--only nobody: must be one of hodgecover; random"),
    (["plain", "--columns", "51%"], "--columns 51%: must be one of 25%; 50%; 66%"),
    (["refitted", "--only", "hodgecover, fold"], "--only hodgecover, fold: must be one of hodgecover; random"),
    (["everything"], "invalid choice: 'everything'"),
    (["plain", "--samples", "11"], "--samples 11: must be from 1 to 10"),
    (["plain", "--samples", "0"], "--samples 0: must be from 1 to 10"),
    (["plain", "--tokens", "31", "--results", "x.csv"], "--tokens 31: must be from 32"),
    (["plain", "--tokens", "0", "--results", "x.csv"], "--tokens 0: must be from 32"),
    (["plain"], "--results: results.csv is of the models in examples/ on their whole text"),
    (["plain", "--model", str(common.HERE / "tiny-olmoe"), "--tokens", "64"], "--results: results.csv is of"),
    (["plain", "--results", "nowhere/x.csv"], "nowhere"),
    (["plain", "--model", "nowhere"], "nowhere")])
def test_bad_input_is_refused_before_the_work(arguments, says, small, capsys, monkeypatch):
    monkeypatch.setattr(model_io.Model, "stream", None)
    model = [] if "--model" in arguments else ["--model", small]
    assert_refused(capsys, run(study, *arguments, *model), says)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "model,table\nx,y\n"])
def test_another_file_of_results_is_refused(text, small, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(model_io.Model, "stream", None)
    (tmp_path / "results.csv").write_text(text)
    status = run(study, "plain", "--model", small, "--tokens", 64, "--results", tmp_path / "results.csv")
    assert_refused(capsys, status, "results.csv: must be a table of study.py with model, table, line")


def test_a_model_that_needs_more_experts_is_refused(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(ways.RATES, "90%", 0.9)
    status = run(study, "plain", "--model", small, "--only", "reap", "--columns", "90%", "--tokens", 64, "--results",
                 tmp_path / "results.csv")
    assert_refused(capsys, status, "keep 1")
