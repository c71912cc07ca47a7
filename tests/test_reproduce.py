# SPDX-License-Identifier: MIT
"""The studies: a cell is what the commands give, the statistics are right, and every table can be filled."""
import ast
import json
import re
from functools import partial

import audit
import baselines
import budgets
import budgets_study
import common
import distil
import distil_study
import evaluate
import frontier
import heapr
import hodgecover
import model_io
import nested
import pytest
import rco
import refit
import refit_study
import reproduce
import torch
import wanda
from conftest import GOLDEN, PROSE, assert_refused, run
from model_io import Model

CELL = r"[\d.]+ ± [\d.]+ \(KL -?[\d.]+ ± [\d.]+\)"
DIFFERENCE = r"\*?\*?[+-][\d.]+ ± [\d.]+\*?\*?"
TEXT = PROSE[:640]
TEXTS = {"calibration": TEXT, "held-out": TEXT[::-1], "train": TEXT.upper()}


def documents(part: str) -> tuple[str]:
    """The one document of a part."""
    return (TEXTS[part],)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Samples of 64 tokens in sequences of 32, and texts of a page."""
    monkeypatch.setattr(reproduce, "CALIBRATION", 64)
    monkeypatch.setattr(reproduce, "SEQ_LEN", 32)
    monkeypatch.setattr(model_io, "python_documentation", documents)  # hodgecover.py's default text
    monkeypatch.setitem(common.TEXTS, "documentation", documents)
    monkeypatch.setitem(refit_study.OTHER, "source code", lambda _: ["x = 1\n" * 20])
    monkeypatch.setitem(refit_study.OTHER, "licences", lambda _: ["As it is. " * 20])


@pytest.fixture
def sample(small, tmp_path) -> reproduce.Sample:
    """The sample of seed 1 of the small model."""
    source = Model(small)
    return reproduce.Sample(source, hodgecover.calibration_ids(source, [], 64, 32, 1), 1, tmp_path / "cache",
                            documents)


def shown(capsys, command, model, *arguments) -> list[list[str]]:
    """The lines of the tables that a study prints on two samples, cell by cell."""
    assert run(command, "--model", model, "--samples", 2, "--tokens", 64, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


# --------------------------------------------------------------------------------------------- a cell is what users get


USERS = ["--tokens", 64, "--seq-len", 32, "--seed", 1, "--dtype", "float32"]


@pytest.mark.parametrize("label, method", [("reap", ["reap"]), ("random", ["random"]), ("hc-smoe", ["hc-smoe"]),
                                           ("greedy-barrier", ["greedy-barrier"]),
                                           ("ream, in all slots", ["ream", "--all-slots"])])
def test_cell_of_a_method_is_what_its_command_gives(label, method, sample, tmp_path):
    source, out = sample.source, tmp_path / "out"
    assert run(baselines, source.checkpoint.path, "--keep", 4, "--out", out, "--method", *method, *USERS) == 0
    text = reproduce.held_out(sample, 64)
    found = reproduce.score(sample, text, reproduce.method_tables()[0].lines[label], 0.5)
    expected = common.compare(source, Model(out), text)
    assert found[:2] == (expected.output_perplexity, expected.kl)


def test_cell_of_hodgecover_is_what_its_command_gives(sample, tmp_path):
    source, out = sample.source, tmp_path / "out"
    assert run(hodgecover, source.checkpoint.path, "--keep", 4, "--out", out, *USERS) == 0
    text = reproduce.held_out(sample, 64)
    found = reproduce.score(sample, text, reproduce.method_tables()[0].lines["hodgecover"], 0.5)
    expected = common.compare(source, Model(out), text)
    assert found[:2] == (expected.output_perplexity, expected.kl) and found.gone == 0.5


def test_cell_of_a_refitted_hybrid_is_what_three_commands_give(sample, tmp_path):
    source, text = sample.source, reproduce.held_out(sample, 64)
    path, few, sparse, recovered = (source.checkpoint.path, *(tmp_path / name for name in ("few", "sparse", "out")))
    assert run(baselines, path, "--keep", 6, "--method", "reap", "--out", few, *USERS) == 0
    assert run(wanda, few, "--total-rate", 0.5, "--source", path, "--out", sparse, *USERS) == 0
    assert run(refit, path, sparse, "--out", recovered, *USERS) == 0

    lines = reproduce.hybrid_lines(["reap"], reproduce.method_lines())
    for make, folder in ((lines["reap, with Wanda"], sparse),
                         (partial(refit_study.refitted, make=lines["reap, with Wanda"], tokens=64), recovered)):
        expected = common.compare(source, Model(folder), text)
        found = reproduce.score(sample, text, make, (0.5, 0.25))
        assert found[:2] == (expected.output_perplexity, expected.kl)
        assert 0.45 < found.gone <= 0.5  # of the source's parameters; each row is floored


def test_wanda_alone_drops_no_expert(sample, tmp_path):
    output = reproduce.hybrid_lines([], {})["Wanda alone"](sample, (0.5, 0.25), tmp_path / "out")
    assert output.config.num_experts == 8
    zeros = [(model_io.Checkpoint(tmp_path / "out").load(name) == 0).double().mean().item()
             for name in common.expert_matrices(output.checkpoint)]
    assert zeros == pytest.approx([0.5] * len(zeros))


# ------------------------------------------------------------------------------------------------------- the statistics


def test_students_t_holds_95_percent():
    """Of the density (1 + t^2 / m)^(-(m + 1) / 2) with m degrees of freedom, by the substitution t = sqrt(m) tan u."""
    for m, t in enumerate(reproduce.STUDENT_T, 1):
        u = torch.linspace(-torch.pi / 2, torch.pi / 2, 200_001, dtype=torch.float64)
        density = u.cos().clamp(min=0) ** (m - 1)
        inside = density[(m**0.5 * u.tan()).abs() <= t].sum() / density.sum()
        assert inside == pytest.approx(0.95, abs=2e-4)


def test_half_interval_of_two_values_in_closed_form():
    half = torch.tan(torch.tensor(0.475 * torch.pi, dtype=torch.float64)).item()  # Cauchy's quantile
    assert reproduce.half_interval([1.0, 3.0]) == pytest.approx(half, rel=1e-4)  # times |3 - 1| / 2


def test_differences_are_taken_sample_by_sample(capsys):
    def scores(*kls: float) -> list[list[reproduce.Score]]:
        return [[reproduce.Score(9.0, kl, 0.5, None) for kl in kls]]
    reproduce.show_differences({"a": scores(0.1, 0.9), "level": scores(0.2, 0.8), "worse": scores(0.301, 1.099),
                                "better": scores(0.0, 0.8)}, ["50%"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| KL minus that of a | 50% |", "|---|---|", "| level | +0.000 ± 1.271 |", "| worse | **+0.200 ± 0.013** |",
        "| better | **-0.100 ± 0.000** |"]


@pytest.mark.parametrize("found", [{"a": [[reproduce.Score(9.0, 0.1, 0.5, None)] * 2]},
                                   {name: [[reproduce.Score(9.0, 0.1, 0.5, None)]] for name in "ab"}])
def test_no_differences_of_one_line_or_one_sample(found, capsys):
    reproduce.show_differences(found, ["50%"])
    assert capsys.readouterr().out == ""


def test_text_is_evenly_spaced_from_the_first_to_the_last():
    text = torch.arange(22).view(11, 2)
    assert reproduce.evenly(text, 6)[:, 0].tolist() == [0, 10, 20] and len(reproduce.evenly(text, 999)) == 11


# ----------------------------------------------------------------------------------------- fewer and narrower experts


def test_cell_of_the_frontier_is_what_three_commands_give(sample, tmp_path, monkeypatch):
    """Experts dropped, the rest made narrower, refitted."""
    monkeypatch.setattr(frontier, "TOKENS", 64)
    source, text = sample.source, reproduce.held_out(sample, 64)
    path, few, thin, recovered = (source.checkpoint.path, *(tmp_path / name for name in ("few", "thin", "out")))
    assert run(baselines, path, "--keep", 6, "--method", "reap", "--out", few, *USERS) == 0
    assert run(heapr, few, "--width", 11, "--out", thin, *USERS) == 0
    assert run(refit, path, thin, "--out", recovered, *USERS) == 0
    ways = frontier.lines()
    for make, folder in ((ways["both, heapr"], thin),
                         (partial(refit_study.refitted, make=ways["both, heapr"], tokens=64), recovered)):
        expected = common.compare(source, Model(folder), text)
        found = reproduce.score(sample, text, make, 0.5)
        assert found[:2] == (expected.output_perplexity, expected.kl)
        assert found.gone == 1 - 6 * 11 / (8 * 16) and found.parameters == evaluate.count_parameters(Model(folder))


@pytest.mark.parametrize("label, command, arguments", [
    ("drop, hope", baselines, ["--keep", 4, "--method", "hope"]), ("drop, hodgecover", hodgecover, ["--keep", 4]),
    ("narrow, camera", heapr, ["--width", 8, "--score", "camera"]),
    ("narrow, random", heapr, ["--width", 8, "--score", "random"])])
def test_way_of_the_frontier_is_what_one_command_gives(label, command, arguments, sample, tmp_path):
    users = USERS if label != "narrow, random" else ["--seed", 1]
    assert run(command, sample.source.checkpoint.path, *arguments, "--out", tmp_path / "out", *users) == 0
    made = frontier.lines()[label](sample, 0.5, tmp_path / "made")
    weights = [folder.joinpath("model.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "made")]
    assert weights[0] == weights[1] and made.config == Model(tmp_path / "out").config


def test_a_way_on_more_tokens_sees_them(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "TOKENS", 128)
    made = frontier.lines()["narrow, heapr, 128 tokens"](sample, 0.5, tmp_path / "made")
    assert frontier.larger(sample).ids.numel() == 128 and made.config.expert_width == 8
    found = heapr.score_units(sample.source, "heapr", frontier.larger(sample).ids)
    plain = frontier.write_narrow(sample.source, found, 8, tmp_path / "plain")
    assert torch.equal(made.logits(sample.ids), plain.logits(sample.ids))


def test_frontier_table_is_filled(small, capsys):
    table = shown(capsys, frontier, small, "--columns", "50%", "--only", "drop, reap", "narrow, magnitude")
    heads = ["expert parameters gone", "KL minus that of drop, reap (50.0%)", "expert parameters gone, refitted on "
             "16,384 tokens", "KL minus that of drop, reap (50.0%)", "parameters, of the source's (active for a token)"]
    assert [line[0] for line in table if line[1] == "50%"] == heads
    assert all(re.fullmatch(f"{CELL}|{DIFFERENCE}|[\\d.]+% \\([\\d.]+%\\)", line[1]) for line in table
               if line[1] != "50%") and len(table) == 13


class Figure:
    """A plotting library that notes what is drawn."""

    def __init__(self):
        self.curves, self.rows = {}, []

    def subplots(self, *_, **__):
        return self, (self, self)

    def errorbar(self, x, y, spread, label, **_):
        self.curves.setdefault(label, []).append((x, y, spread))

    def axhline(self, perplexity, **_):
        self.rows.append(perplexity)

    def __getattr__(self, name):
        return lambda *_, **__: self

    yaxis = property(lambda self: self)


def test_the_frontier_draws_parameters_against_perplexity(sample):
    size = evaluate.count_parameters(sample.source)
    half = evaluate.Parameters(size.total // 2, size.active // 4)

    def scores(*values: float) -> list[list[reproduce.Score]]:
        return [[reproduce.Score(value, 0.1, 0.5, half) for value in values]]
    found = {"drop, reap": scores(3.0, 5.0), "drop, hope": scores(9.0, 9.0), "narrow, camera": scores(2.0, 2.0)}
    figure = frontier.draw(Figure(), found, {"narrow, camera": scores(1.5)}, sample.source, 1.25)
    (x, y, spread), (active, *_) = figure.curves["drop"]
    assert (x, active) == (pytest.approx([50], rel=1e-3), pytest.approx([25], rel=1e-3))
    assert (y, spread, figure.curves["narrow"][0][1], figure.rows) == ([4.0], [2**0.5], [2.0], [1.25, 1.25])
    assert figure.curves["narrow, refitted"][0][1:] == ([1.5], [0])


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
        model = reproduce.folded(sample, 0.5, tmp_path, rule)
        plan = reproduce.plans(sample, "hodgecover", reproduce.uniform(source, 0.5))[source.layer_names[0]]
        targets = model.targets[source.layer_names[0]].tolist()
        assert {e for e in range(8) if targets[e] == e} == {*plan["survivors"]} == {*targets}
        assert rule != paper or {e: targets[e] for e in plan["redirect"]} == plan["redirect"]
        step, plain = (next(each.stream(sample.ids)) for each in (model, source))
        for x, gates, y, before, own in list(zip(step.x, step.gates, step.y, plain.y, plain.gates))[:8]:
            p, kept = (step.layer.router @ x).softmax(0), dict.fromkeys(plan["survivors"], 0.0)
            for e, share in enumerate(p.tolist()):
                kept[targets[e]] += share
            expected = torch.zeros(8)
            for e in sorted(kept, key=kept.get)[-source.config.top_k:]:
                expected[e] = kept[e]
            torch.testing.assert_close(gates, expected)
            outputs = torch.cat([step.layer.experts(e, x[None]) for e in range(8)])
            torch.testing.assert_close(y, before + (expected - own) @ outputs)
    every = reproduce.folded(sample, 0.0, tmp_path, paper)
    torch.testing.assert_close(every.logits(sample.ids), source.logits(sample.ids))


def test_a_fold_renormalises_as_its_model_does():
    source = next(model for model in map(Model, GOLDEN) if model.config.norm_topk_prob)
    cfg = source.config
    plans = {source.layer_names[index]: {"redirect": {}, "order": [*range(cfg.num_experts)]}
             for index in hodgecover.sparse_layers(source)}
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(reproduce.Folded(source.checkpoint.path, plans).logits(ids), source.logits(ids))


# ---------------------------------------------------------------------------------------------------------- the tables


def test_every_line_of_methods_and_hybrids(small, capsys):
    table = shown(capsys, reproduce, small, "--columns", "50%")
    methods, hybrids = reproduce.method_tables()
    names = [re.sub(r" \([\d.]+%\)$", "", line[0]) for line in table]
    assert names == ["experts dropped", *methods.lines, "KL minus that of hodgecover", *[*methods.lines][1:],
                     "parameters of the experts gone", *hybrids.lines,
                     "KL minus that of hodgecover, with Wanda", *[*hybrids.lines][1:]]
    assert {*baselines.METHODS} < {*methods.lines}
    cells = [line[1] for line in table if line[1] != "50%"]
    assert all(re.fullmatch(f"{CELL}|{DIFFERENCE}", cell) for cell in cells)
    assert "Wanda alone (50.0%)" in [line[0] for line in table]


def test_columns_keep_the_named_share(small, capsys):
    """Of 8 experts stay 6, 5, 4 and 3."""
    assert [reproduce.survivors(Model(small), dropped) for dropped in reproduce.DROPPED.values()] == [6, 5, 4, 3]
    head, line = shown(capsys, reproduce, small, "--only", "reap", "--columns", "66%", "25%")
    assert head == ["experts dropped", "25%", "66%"] and all(re.fullmatch(CELL, cell) for cell in line[1:])


def test_barriers_are_measured_once(small, capsys, monkeypatch):
    shown(capsys, reproduce, small, "--only", "hodgecover", "--columns", "50%")
    monkeypatch.setattr(hodgecover, "measure_layer", None)
    assert shown(capsys, reproduce, small, "--only", "hodgecover", "--columns", "50%")


def test_refitted_methods_and_hybrids(small, capsys):
    table = shown(capsys, refit_study, small, "--columns", "50%", "--only", "hodgecover", "stun", "random, with Wanda")
    assert [re.sub(r" \(.*", "", line[0]) for line in table] == [
        "experts dropped, refitted on 16,384 tokens", "hodgecover", "stun", "KL minus that of hodgecover", "stun",
        "parameters of the experts gone, refitted on 16,384 tokens", "random, with Wanda"]


def test_curves(small, capsys):
    table = shown(capsys, refit_study, small, "--curves", "--columns", "50%", "--only", "not refitted", "0 sweeps",
                  "3 sweeps", "licences")
    assert [line[0] for line in table] == ["tokens", "not refitted", "sweeps", "0 sweeps", "3 sweeps",
                                           "KL minus that of 0 sweeps", "3 sweeps", "text", "licences"]


def test_curves_do_what_their_lines_say():
    by_tokens, by_ridge, by_sweeps, by_text = (table.lines for table in refit_study.curve_tables())
    by_tokens.pop("not refitted")
    for label, make in (by_tokens | by_ridge).items():
        assert make.keywords["tokens"] == int(re.search(r"([\d,]+) tokens", label)[1].replace(",", ""))
        assert ("training" in make.keywords.get("text", "")) == ("training" in label)
    assert all(f"ridge {make.keywords['ridge']}," in label for label, make in by_ridge.items())
    assert all(f"{make.keywords['sweeps']} sweeps" == label for label, make in by_sweeps.items())
    assert all(make.keywords["text"] == label for label, make in by_text.items()) and len(by_tokens | by_ridge) == 17


def test_each_fit_and_text_is_one_of_its_own(sample, tmp_path):
    by_tokens, _, by_sweeps, by_text = (table.lines for table in refit_study.curve_tables())
    lines = {"not refitted": by_tokens["not refitted"]} | by_sweeps | by_text
    made = {label: make(sample, 0.5, tmp_path / str(at)).checkpoint.fingerprint()
            for at, (label, make) in enumerate(lines.items())}
    assert made.pop("calibration text") == made["3 sweeps"]
    assert len({*made.values()}) == len(made) == 8


def test_source_code_has_no_docstrings(monkeypatch, tmp_path):
    documented = '"""Doc."""\nclass A:\n    """Doc."""\ndef f():\n    "Doc."\n    return 1  # why\n'
    (tmp_path / "module.py").write_text(documented)
    (tmp_path / "broken.py").write_text("(")
    monkeypatch.setattr(refit_study.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    alone = ast.unparse(ast.parse("class A: pass\ndef f(): return 1"))
    assert sorted(refit_study.source_code("all")) == ["", alone]
    assert sum((common.python_code.__wrapped__(part) for part in ("train", "calibration", "held-out")), ()) == (alone,)


# ------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("label, options", [("layerwise, 16,384 tokens", ["--layerwise", "--tokens", 16384]),
                                            ("16,384 tokens, 8 passes", ["--epochs", 8, "--tokens", 16384])])
def test_cell_of_a_training_is_what_two_commands_give(label, options, sample, tmp_path):
    path, few, trained = sample.source.checkpoint.path, tmp_path / "few", tmp_path / "out"
    assert run(baselines, path, "--keep", 4, "--method", "reap", "--out", few, *USERS) == 0
    users = ["--tokens", distil_study.TOKENS, "--seq-len", 32, "--seed", 1, "--dtype", "float32"]
    assert run(distil, path, few, "--out", trained, *users, *options) == 0
    make = next(table.lines[label] for table in distil_study.variant_tables() if label in table.lines)
    make(sample, 0.5, tmp_path / "made")
    weights = [folder.joinpath("model.safetensors").read_bytes() for folder in (trained, tmp_path / "made")]
    assert weights[0] == weights[1]


def test_distillation_tables_are_filled(small, capsys):
    table = shown(capsys, distil_study, small, "--only", "slimqwen", "narrow")
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == ["slimqwen", "narrow"] * 2
    table = shown(capsys, distil_study, small, "--variants", "--only", "16,384 tokens", "narrow, 65,536 tokens")
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == ["16,384 tokens", "narrow, 65,536 tokens"]


# -------------------------------------------------------------------------------------------------- budgets of layers


def test_cell_of_rco_is_what_its_command_gives(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(budgets_study, "TOKENS", 64)
    monkeypatch.setattr(budgets_study, "RCO_LENGTH", 16)
    path = sample.source.checkpoint.path
    assert run(budgets, path, "rco", "--keep", 4, "--steps", 2, "--out", tmp_path / "out", "--tokens", 64, "--seq-len",
               16, "--seed", 1, "--dtype", "float32") == 0
    lines = budgets_study.budget_tables(2, 2)[0].lines
    lines["rco"](sample, 0.5, tmp_path / "made")
    weights = [folder.joinpath("model.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "made")]
    assert weights[0] == weights[1]
    ragged = lines["rco, ragged"](sample, 0.5, tmp_path / "ragged")
    orders, gone = budgets_study.rco_found(sample, 4, 2, True)
    for index, (order, count) in enumerate(zip(orders.values(), gone)):
        rows = sample.source.layer(index).router
        assert torch.equal(ragged.layer(index).router, rows[sorted(order[:8 - count])])


def check_survivors(found: Model, source: Model, wanted: dict[str, list[int]]) -> None:
    """The layers of a checkpoint have these experts of the source's."""
    for index, name in enumerate(source.layer_names):
        assert torch.equal(found.layer(index).router, source.layer(index).router[wanted[name]])


def test_cell_of_evo_is_the_plan_that_its_command_finds(sample, tmp_path, monkeypatch):
    path = sample.source.checkpoint.path
    assert run(budgets, path, "evo", "--keep", 4, "--generations", 2, "--plan-only", "--out", tmp_path / "plan.json",
               *USERS) == 0
    found = budgets_study.budget_tables(2, 2)[0].lines["evo, ragged"](sample, 0.5, tmp_path / "made")
    layers = json.loads((tmp_path / "plan.json").read_text())["history"][-1]["layers"]
    check_survivors(found, sample.source, {layer["name"]: layer["survivors"] for layer in layers})
    budgets_study.evo_budget.cache_clear()
    monkeypatch.setattr(budgets, "esap_of", lambda *_: None)  # what was found lies beside the barriers
    again = budgets_study.evo_budget(sample, 4, 2)
    assert [8 - gone for gone in again] == [len(layer["survivors"]) for layer in layers]


def test_cell_of_a_budget_by_barriers_is_the_plan_that_two_commands_give(sample, tmp_path):
    path, plan = sample.source.checkpoint.path, tmp_path / "plan.json"
    assert run(hodgecover, path, "--keep", 4, "--plan-only", "--out", plan, *USERS) == 0
    assert run(budgets, path, "barriers", "--keep", 4, "--plan", plan, "--plan-only", "--out",
               tmp_path / "ragged.json") == 0
    found = budgets_study.budget_tables(2, 2)[0].lines["hodgecover, barriers, ragged"](sample, 0.5, tmp_path / "made")
    layers = json.loads((tmp_path / "ragged.json").read_text())["history"][-1]["layers"]
    check_survivors(found, sample.source, {layer["name"]: layer["survivors"] for layer in layers})


def test_methods_that_spare_the_first_layer(sample, tmp_path):
    source, (first, second) = sample.source, sample.source.layer_names
    lines = budgets_study.first_tables()[0].lines
    for method in ("reap", "hodgecover", "hope"):
        found = lines[f"drop, {method}"](sample, 0.25, tmp_path / method)
        chosen = reproduce.plans(sample, method, dict.fromkeys(source.layer_names, 4))
        check_survivors(found, source, {first: [*range(8)], second: chosen[second]["survivors"]})
    made = lines["narrow, camera"](sample, 0.25, tmp_path / "wide")
    narrow = frontier.narrow(sample, 0.5, tmp_path / "narrow", "camera")
    for theirs, ours in zip(source.layer(0).experts, made.layer(0).experts):
        assert torch.equal(theirs, ours)
    x = torch.randn(5, 32)
    for e in range(8):
        torch.testing.assert_close(made.layer(1).experts(e, x), narrow.layer(1).experts(e, x))
    found = reproduce.score(sample, reproduce.held_out(sample, 64), lines["narrow, camera"], 0.25)
    assert found.gone == 0.25


def test_cell_of_a_joint_training_is_a_slice_of_what_the_commands_give(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(budgets_study, "TRAINED", 256)
    path, ordered, trained = sample.source.checkpoint.path, tmp_path / "nested", tmp_path / "trained"
    assert run(nested, path, "--out", ordered, *USERS) == 0
    users = ["--tokens", 256, "--seq-len", 32, "--seed", 1, "--dtype", "float32"]
    assert run(distil, path, ordered, "--prefixes", 6, 4, 3, "--out", trained, *users) == 0
    assert run(nested, trained, "--slice", 4, "--out", tmp_path / "cut") == 0
    budgets_study.together(sample, 0.5, tmp_path / "made")
    weights = [folder.joinpath("model.safetensors").read_bytes() for folder in (tmp_path / "cut", tmp_path / "made")]
    assert weights[0] == weights[1]


def test_budget_tables_are_filled(small, capsys, monkeypatch):
    monkeypatch.setattr(rco, "NOISES", 1)
    monkeypatch.setattr(budgets_study, "RCO_LENGTH", 16)
    labels = ["reap", "barriers, ragged", "evo, ragged", "rco, ragged"]
    table = shown(capsys, budgets_study, small, "--columns", "50%", "--only", *labels, "--generations", 1, "--steps", 1)
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == labels * 2
    kept = {line[0]: line[1] for line in table[-3:]}
    assert kept.keys() == {"barriers, ragged", "evo, ragged", "rco, ragged"}
    for cell in kept.values():
        assert all(sum(map(int, one.split())) == 8 for one in cell.split("; "))
    table = shown(capsys, budgets_study, small, "--columns", "25%", "--first", "--only", "drop, reap", "drop, hope")
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == ["drop, reap", "drop, hope"] * 2
    monkeypatch.setattr(budgets_study, "TRAINED", 96)
    table = shown(capsys, budgets_study, small, "--nested", "--only", "not trained", "each alone, 32 tokens")
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == ["each alone, 32 tokens", "not trained"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("command, arguments, says", [
    (reproduce, ["--only", "nobody"], "--only nobody: must be one of hodgecover; random"),
    (reproduce, ["--columns", "51%"], "--columns 51%: must be one of 25%"),
    (reproduce, ["--samples", "11"], "--samples 11: must be from 1 to 10"),
    (reproduce, ["--samples", "0"], "--samples 0: must be from 1 to 10"),
    (reproduce, ["--tokens", "31"], "--tokens 31: must be from 32"),
    (reproduce, ["--model", "nowhere"], "nowhere"),
    (frontier, ["--only", "drop"], "--only drop: must be one of drop, reap; drop, hope"),
    (distil_study, ["--variants", "--only", "reap"], "--only reap: must be one of 16,384 tokens"),
    (budgets_study, ["--steps", "0"], "--steps 0: must be from 1"),
    (budgets_study, ["--nested", "--generations", "3"], "--generations: --nested does not use it"),
    (budgets_study, ["--nested", "--steps", "3"], "--steps: --nested does not use it"),
    (budgets_study, ["--nested", "--only", "rco"], "--only rco: must be one of together"),
    (budgets_study, ["--first"], "--columns: if the first layer keeps all its experts, the others would lose 8 of the"),
    (budgets_study, ["--first", "--steps", "3"], "--steps: --first does not use it"),
    (frontier, ["--columns", "33%"], "--columns 33%: must be one of 25%; 50%; 66%"),
    (budgets_study, ["--first", "--nested"], "not allowed with argument"),
    (refit_study, ["--curves", "--columns", "25%"], "--columns 25%: must be one of 50%; 66%")])
def test_bad_input_is_refused_before_the_work(command, arguments, says, small, capsys, monkeypatch):
    monkeypatch.setattr(model_io.Model, "stream", None)
    model = [] if "--model" in arguments else ["--model", small]
    assert_refused(capsys, run(command, *model, *arguments), says)


def test_a_cache_in_the_model_is_refused(small, capsys):
    assert_refused(capsys, run(reproduce, "--model", small, "--cache", small / "cache"), "--cache ")


def test_a_model_that_needs_more_experts_is_refused(small, capsys, monkeypatch):
    monkeypatch.setitem(reproduce.DROPPED, "90%", 0.9)
    assert_refused(capsys, run(reproduce, "--model", small, "--only", "reap"), "keep 1")
