# SPDX-License-Identifier: MIT
"""The studies: a cell is what the commands give, the statistics are right, and every table can be filled."""
import ast
import json
import re
from dataclasses import replace
from functools import partial
from statistics import mean

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
import mathx
import model_io
import nested
import pytest
import rco
import refit
import refit_study
import reproduce
import torch
import wanda
from conftest import PROSE, ROOT, assert_refused, run
from model_io import InputError, Model

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
    monkeypatch.setitem(refit_study.OTHER, "source code", lambda: ["x = 1\n" * 20])
    monkeypatch.setitem(refit_study.OTHER, "licences", lambda: ["As it is. " * 20])


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


@pytest.mark.parametrize("label, method", [("reap", ["--method", "reap"]), ("random", ["--method", "random"]),
                                           ("greedy-barrier", ["--method", "greedy-barrier"]),
                                           ("hc-smoe", ["--method", "hc-smoe"]),
                                           ("ream, in all slots", ["--method", "ream", "--all-slots"])])
def test_cell_of_a_method_is_what_its_command_gives(label, method, sample, tmp_path):
    source, out = sample.source, tmp_path / "out"
    assert run(baselines, source.checkpoint.path, "--keep", 4, "--out", out, *method, *USERS) == 0
    text = reproduce.held_out(sample, 64)
    found = reproduce.score(sample, text, reproduce.method_tables()[0].lines[label], 0.5)
    expected = model_io.compare(source, Model(out), text)
    assert found[:2] == (expected.output_perplexity, expected.kl)


@pytest.mark.parametrize("label, router", [("hodgecover", "drop"), ("hodgecover, fold", "fold")])
def test_cell_of_hodgecover_is_what_its_command_gives(label, router, sample, tmp_path):
    source, out = sample.source, tmp_path / "out"
    assert run(hodgecover, source.checkpoint.path, "--keep", 4, "--out", out, "--router", router, *USERS) == 0
    text = reproduce.held_out(sample, 64)
    found = reproduce.score(sample, text, reproduce.method_tables()[0].lines[label], 0.5)
    output = hodgecover.folded_model(out) if router == "fold" else Model(out)
    expected = model_io.compare(source, output, text)
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
        expected = model_io.compare(source, Model(folder), text)
        found = reproduce.score(sample, text, make, (0.5, 0.25))
        assert found[:2] == (expected.output_perplexity, expected.kl)
        assert 0.45 < found.gone <= 0.5  # of the source's parameters; each row is floored


def test_wanda_alone_drops_no_expert(sample, tmp_path):
    output = reproduce.hybrid_lines([], {})["Wanda alone"](sample, (0.5, 0.25), tmp_path / "out")
    assert output.config.num_experts == 8
    zeros = [(model_io.Checkpoint(tmp_path / "out").load(name) == 0).double().mean().item()
             for name in wanda.expert_matrices(output.checkpoint)]
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


def test_settings_are_compared_on_text_that_no_sample_has(sample):
    text = reproduce.outside([sample], 10**6)
    everything = model_io.sequences(sample.source.encode([TEXT]), 32).tolist()
    ours = sample.ids.tolist()
    assert text.tolist() == [sequence for sequence in everything if sequence not in ours] and len(text)


def test_no_text_is_left_for_settings(sample):
    everything = model_io.sequences(sample.source.encode([TEXT]), 32)
    with pytest.raises(InputError, match="^samples: "):
        reproduce.outside([replace(sample, ids=everything)], 64)


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
        expected = model_io.compare(source, Model(folder), text)
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
    i, j = mathx.edges(6).unbind(1)
    barriers = phi[i] + phi[j] - 0.5 * ((i == 1) & (j == 5)).double()
    signals = hodgecover.Signals(torch.ones(6), torch.arange(6).double(), barriers, torch.empty(0, 3).long(),
                                 torch.empty(0, dtype=torch.float64))
    found = hodgecover.decompose(signals, hodgecover.Settings(order="index"))
    papers = mathx.redirect([0, 1, 2], barriers, found.parts.harmonic, alpha=1)
    selection = hodgecover.select(found, 3)._replace(redirect=papers)
    assert {*audit.REDIRECTS["the paper's rule"](found, selection, [0, 1, 2], None).values()} == {0}
    assert audit.REDIRECTS["least barrier without its additive part"](found, selection, [0, 1, 2], None)[5] == 1


def test_redirect_by_router_rows_is_by_expert(sample):
    """The plan is by expert, the decomposition by vertex: compare with the rule on the experts themselves."""
    plans = reproduce.hodgecover_plans(sample, 0.5, sample.settings(), "nearest router row")
    for name, plan in plans.items():
        rows = sample.source.checkpoint.load(f"{name}.mlp.gate.weight")
        assert plan.redirect == baselines.nearest_rows(rows, plan.survivors)


def test_redirects(small, capsys):
    table = shown(capsys, reproduce, small, "--redirects", "--columns", "50%")
    label, folded = "drop", [f"fold, {rule}" for rule in audit.REDIRECTS]
    assert [line[0] for line in table] == ["experts dropped", label, *folded, f"KL minus that of {label}", *folded,
                                           "targets of the redirect (experts that the busiest one takes)",
                                           *audit.REDIRECTS]
    source = Model(small)
    samples = [reproduce.Sample(source, hodgecover.calibration_ids(source, [], 64, 32, seed), seed,
                                small.with_name("small-samples") / str(seed), documents) for seed in range(2)]
    plans = [plan for one in samples for plan in reproduce.hodgecover_plans(one, 0.5, one.settings()).values()]
    targets = [[*plan.redirect.values()] for plan in plans]
    busiest = mean(max(map(of.count, of)) for of in targets)
    assert table[-3][1] == f"{mean(len({*of}) for of in targets):.1f} of 4 ({busiest:.1f})"


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


def test_settings_table(small, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "VARIANTS", dict([*reproduce.VARIANTS.items()][::5]))
    table = shown(capsys, reproduce, small, "--settings", "--columns", "50%")
    assert [line[0] for line in table] == ["setting", *reproduce.VARIANTS, "KL minus that of 5% critical edges and "
                                           "triangles", *[*reproduce.VARIANTS][1:]]


def test_a_setting_reaches_the_plan(sample):
    for values in reproduce.VARIANTS.values():
        assert sample.settings(**values) == hodgecover.Settings(seed=1, **values)


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
    table = shown(capsys, refit_study, small, "--curves", "--columns", "50%", "--only", "not refitted", "1 sweeps",
                  "3 sweeps", "factors")
    assert [line[0] for line in table] == ["tokens", "not refitted", "sweeps", "1 sweeps", "3 sweeps",
                                           "KL minus that of 1 sweeps", "3 sweeps", "fit", "factors"]


def test_curves_do_what_their_lines_say():
    by_tokens, by_ridge, by_sweeps, by_text, _ = (table.lines for table in refit_study.curve_tables())
    for label, make in (by_tokens | by_ridge).items():
        said = re.search(r"([\d,]+) tokens", label)
        assert not said or make.keywords["tokens"] == int(said[1].replace(",", ""))
        assert said is None or ("training" in make.keywords["text"]) == ("training" in label)
    assert all(f"ridge {make.keywords['fit'].keywords['ridge']}," in label for label, make in by_ridge.items())
    assert all(f"{make.keywords['fit'].keywords['sweeps']} sweeps" == label for label, make in by_sweeps.items())
    assert all(make.keywords["text"] == label for label, make in by_text.items()) and len(by_tokens | by_ridge) == 18


def test_each_fit_and_text_is_one_of_its_own(sample, tmp_path):
    tables = refit_study.curve_tables()
    lines = {"not refitted": tables[0].lines["not refitted"]} | tables[3].lines | tables[4].lines
    made = {label: make(sample, 0.5, tmp_path / str(at)).checkpoint.fingerprint()
            for at, (label, make) in enumerate(lines.items())}
    assert made.pop("calibration text") == made["factors and down projections (refit.py)"]
    assert len({*made.values()}) == len(made) == 11


def test_where(small, capsys):
    assert run(refit_study, "--model", small, "--where", "--samples", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(re.search(r"\| [+-]\d\.\d\d ± \d\.\d\d \|$", line) for line in lines[3:])


# -------------------------------------------------------------------------------------------------------- refit_study


def pass_and_residual(sample, out):
    """The first layer of a compressed checkpoint, and what its stream lacks."""
    output = reproduce.method_lines()["reap"](sample, 0.5, out)
    target, step = (next(model.stream(sample.ids)) for model in (sample.source, output))
    return step, target.y - step.y


def test_all_directions_are_the_refit(sample, tmp_path):
    step, residual = pass_and_residual(sample, tmp_path / "out")
    width = step.layer.experts.down.shape[2]
    expected = refit.refit_layer(step, residual.clone())
    found = refit_study.fit_directions(step, residual.clone(), width)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(refit_study.fit_directions(step, residual.clone(), 2), expected, atol=1e-4)


def test_directions_are_those_of_largest_energy(sample, tmp_path):
    step, residual = pass_and_residual(sample, tmp_path / "out")
    factor = refit.fit_scale(step, residual).to(residual)[:, None, None]
    change = refit_study.fit_directions(step, residual.clone(), 2) - step.layer.experts.down * factor
    for e, of_expert in enumerate(change):
        hidden = torch.cat([x for _, x in refit.gated_hidden(step, e)])
        if len(hidden) > 2:
            others = torch.linalg.svd(hidden).Vh[2:]
            assert (of_expert @ others.T).norm() < 1e-2 * of_expert.norm()


def test_unscaled_fit_lowers_the_residual(sample, tmp_path):
    step, residual = pass_and_residual(sample, tmp_path / "out")
    before, down = residual.norm(), refit_study.fit_unscaled(step, residual)
    lacking = next(sample.source.stream(sample.ids)).y - step.y
    refit.add_outputs(lacking, step, step.layer.experts.down - down)
    assert torch.allclose(lacking, residual, atol=1e-5) and residual.norm() < 0.9 * before
    assert not torch.allclose(down, refit.refit_layer(step, lacking), atol=1e-4)


def test_router_fit_follows_the_slope_of_the_gates(sample, tmp_path, monkeypatch):
    """What a change of the router does to the output, by autograd through the softmax, is found again without a ridge;
    each token counts for the experts it is routed to."""
    monkeypatch.setattr(refit, "RIDGE", 1e-9)
    monkeypatch.setattr(refit, "SWEEPS", 60)
    step = next(reproduce.whole(sample, 0, tmp_path / "out").stream(sample.ids))
    experts, router, routed = step.layer.experts, step.layer.router, step.gates > 0
    change = 1e-3 * torch.randn(router.shape, generator=torch.Generator().manual_seed(0))
    outputs = torch.stack([experts(e, step.x) for e in range(len(router))], 1)

    def output(logits: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tn,tnd->td", logits.softmax(-1) * routed, outputs)
    logits = step.x @ router.T
    mix, wanted = torch.autograd.functional.jvp(output, logits, (step.x @ change.T) * routed)
    assert torch.allclose(mix, model_io.mix_experts(experts, step.x, step.gates), atol=1e-5)
    residual = wanted.double()
    refit_study.fitted_router(step, mix, residual)
    assert residual.norm() < 0.02 * wanted.norm()


def test_router_fit_writes_what_it_found(sample, tmp_path):
    output = reproduce.method_lines()["reap"](sample, 0.5, tmp_path / "out")
    unfitted = model_io.compare(sample.source, output, sample.ids).kl
    refit_study.fit_routers(sample.source, output, sample.ids)
    assert model_io.compare(sample.source, Model(tmp_path / "out"), sample.ids).kl < unfitted


def test_router_fit_refuses_normalised_gates(sample):
    normalised = next(path for path in (ROOT / "tests" / "golden").iterdir()
                      if path.is_dir() and Model(path).config.norm_topk_prob)
    with pytest.raises(InputError, match="normalises its gates"):
        refit_study.fit_routers(sample.source, Model(normalised), sample.ids)


def test_what_foretells_a_change_by_brute_force(sample):
    found = reproduce.decompositions(sample, sample.settings())
    for name, plan in reproduce.hodgecover_plans(sample, 0.5, sample.settings()).items():
        signals, rank = sample.signals(sample.settings())[name], found[name].expert_of.tolist()
        pair = {tuple(edge): at for at, edge in enumerate(mathx.edges(8).tolist())}
        said = refit_study.foretold(found[name], plan)
        for slot, e in enumerate(plan.survivors):
            tokens = sum(plan.frequency[d] for d, target in plan.redirect.items() if target == e)
            barriers = sum(signals.barriers[pair[min(d, e), max(d, e)]] for d in plan.redirect)
            ranked = [tuple(sorted((rank.index(d), rank.index(e)))) for d in plan.redirect]
            harmonic = sum(found[name].parts.harmonic[pair[edge]].abs() for edge in ranked)
            assert [values[slot].item() for values in said.values()] == pytest.approx(
                [tokens, plan.frequency[e], plan.saliency[e], float(barriers), float(harmonic)])


def test_source_code_has_no_docstrings(monkeypatch, tmp_path):
    documented = '"""Doc."""\nclass A:\n    """Doc."""\ndef f():\n    "Doc."\n    return 1  # why\n'
    (tmp_path / "module.py").write_text(documented)
    (tmp_path / "broken.py").write_text("(")
    monkeypatch.setattr(refit_study.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    alone = ast.unparse(ast.parse("class A: pass\ndef f(): return 1"))
    assert sorted(refit_study.source_code()) == ["", alone]
    assert sum((common.python_code.__wrapped__(part) for part in ("train", "calibration", "held-out")), ()) == (alone,)


# ------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("label, options", [("3/4 KL, 1/4 next token", ["--kl-weight", 0.75]),
                                            ("router", ["--train", "router"]), ("learning rate 0.04", ["--lr", 0.04]),
                                            ("layerwise, 16,384 tokens", ["--layerwise", "--tokens", 16384]),
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


def test_two_steps_train_on_two_halves(sample, tmp_path, monkeypatch):
    seen, real = [], distil_study.train

    def watched(sample, output, ids, **options):
        seen.append((output.config.num_experts, ids))
        return real(sample, output, ids, **options)
    monkeypatch.setattr(distil_study, "train", watched)
    made = distil_study.in_two_steps(sample, 0.5, tmp_path / "made")
    assert [count for count, _ in seen] == [6, 4] and made.config.num_experts == 4
    together = torch.cat([ids for _, ids in seen])
    all_of_it = distil_study.training_ids(sample, "with training text", distil_study.TOKENS)
    assert torch.equal(together, all_of_it) and len(seen[0][1]) > 1


def test_distillation_tables_are_filled(small, capsys):
    table = shown(capsys, distil_study, small, "--only", "slimqwen", "narrow")
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == ["slimqwen", "narrow"] * 2
    table = shown(capsys, distil_study, small, "--variants", "--only", "source code", "64 - 48 - 32")
    assert [line[0] for line in table if re.fullmatch(CELL, line[1])] == ["64 - 48 - 32", "source code"]


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
    uniform = lines["rco ragged, its order"](sample, 0.5, tmp_path / "uniform")
    orders, gone = budgets_study.rco_found(sample, 4, 2, True)
    for index, (order, count) in enumerate(zip(orders.values(), gone)):
        rows = sample.source.layer(index).router
        assert torch.equal(ragged.layer(index).router, rows[sorted(order[:8 - count])])
        assert torch.equal(uniform.layer(index).router, rows[sorted(order[:4])])


def test_cell_of_evo_is_the_plan_that_its_command_finds(sample, tmp_path, monkeypatch):
    path = sample.source.checkpoint.path
    assert run(budgets, path, "evo", "--keep", 4, "--generations", 2, "--out", tmp_path / "plan.json", *USERS) == 0
    found = budgets_study.budget_tables(2, 2)[0].lines["evo, ragged"](sample, 0.5, tmp_path / "made")
    layers = json.loads((tmp_path / "plan.json").read_text())["history"][-1]["layers"]
    assert found.survivors == {layer["name"]: layer["survivors"] for layer in layers}
    budgets_study.evo_budget.cache_clear()
    monkeypatch.setattr(budgets, "esap_of", lambda *_: None)  # what was found lies beside the barriers
    again = budgets_study.evo_budget(sample, 4, 2)
    assert [8 - gone for gone in again] == [len(layer["survivors"]) for layer in layers]


def test_cell_of_a_budget_by_barriers_is_the_plan_that_two_commands_give(sample, tmp_path):
    path, plan = sample.source.checkpoint.path, tmp_path / "plan.json"
    assert run(hodgecover, path, "--keep", 4, "--plan-only", "--out", plan, *USERS) == 0
    assert run(budgets, path, "barriers", "--keep", 4, "--plan", plan, "--out", tmp_path / "ragged.json") == 0
    found = budgets_study.budget_tables(2, 2)[0].lines["hodgecover, barriers, ragged"](sample, 0.5, tmp_path / "made")
    layers = json.loads((tmp_path / "ragged.json").read_text())["history"][-1]["layers"]
    assert found.survivors == {layer["name"]: layer["survivors"] for layer in layers}


def test_methods_that_spare_the_first_layer(sample, tmp_path):
    source, (first, second) = sample.source, sample.source.layer_names
    lines = budgets_study.first_tables()[0].lines
    for method in ("reap", "hodgecover", "hope"):
        found = lines[f"drop, {method}"](sample, 0.25, tmp_path / method)
        chosen = reproduce.plans(sample, method, dict.fromkeys(source.layer_names, 4))
        assert found.survivors == {first: [*range(8)], second: chosen[second].survivors}
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
    labels = ["reap", "barriers, ragged", "evo, ragged", "rco, ragged", "rco ragged, its order"]
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
    (reproduce, ["--redirects", "--only", "hc-smoe"], "--only hc-smoe: must be one of drop; fold"),
    (reproduce, ["--columns", "51%"], "--columns 51%: must be one of 25%"),
    (reproduce, ["--samples", "11"], "--samples 11: must be from 1 to 10"),
    (reproduce, ["--samples", "0"], "--samples 0: must be from 1 to 10"),
    (reproduce, ["--tokens", "31"], "--tokens 31: must be from 32"),
    (reproduce, ["--settings", "--redirects"], "not allowed with argument"),
    (reproduce, ["--model", "nowhere"], "nowhere"),
    (frontier, ["--only", "drop"], "--only drop: must be one of drop, reap; drop, hope"),
    (distil_study, ["--variants", "--only", "reap"], "--only reap: must be one of 16,384 tokens"),
    (budgets_study, ["--steps", "0"], "--steps 0: must be from 1"),
    (budgets_study, ["--nested", "--generations", "3"], "--generations: --nested does not use it"),
    (budgets_study, ["--nested", "--steps", "3"], "--steps: --nested does not use it"),
    (budgets_study, ["--nested", "--only", "rco"], "--only rco: must be one of together"),
    (budgets_study, ["--first"], "--columns: if the first layer keeps all its experts, the others would lose 8 of the"),
    (frontier, ["--columns", "33%"], "--columns 33%: must be one of 25%; 50%; 66%"),
    (refit_study, ["--where", "--columns", "50%"], "--columns: --where does not use it"),
    (refit_study, ["--where", "--curves"], "not allowed with argument"),
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
