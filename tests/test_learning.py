# SPDX-License-Identifier: MIT
"""The scripts to learn from: the audit, the three-cycle lecture, and what the plots show."""
import argparse
import doctest
import itertools
import json
import re
import statistics

import audit
import baselines
import common
import hodgecover
import mathx
import plot_diagnostics
import pytest
import three_cycle
import torch
from conftest import QUICK, assert_refused, named, refuse, run
from hodgecover import Settings
from model_io import RECORD, InputError, Model
from safetensors.torch import load_file

PLAIN = named("olmoe-plain")
FEW = Settings(max_triangles=10)


@pytest.fixture(scope="module")
def audited():
    """A golden layer's signals, its router's rows and its audit with 5 orders and 4 survivors."""
    model = Model(PLAIN, torch.float64)
    ids = load_file(PLAIN / "golden.safetensors")["ids"]
    signals = next(hodgecover.measure_model(model, ids, FEW, [0]))[1]
    rows = model.checkpoint.load("model.layers.0.mlp.gate.weight")
    return signals, rows, audit.audit_layer(signals, rows, 4, 5, FEW)


# ------------------------------------------------------------------------------------------------------- the audit

def tuples(simplices: torch.Tensor) -> list[tuple]:
    """Simplices (M, 2 or 3) as tuples."""
    return [tuple(simplex) for simplex in simplices.tolist()]


def test_the_audit_compares_each_order_with_the_default(audited):
    """Against plans made one by one, their decompositions by least squares."""
    signals, _, found = audited
    orders = {"saliency": found.saliency, "index": found.index}
    for seed, facts in enumerate(found.random):
        orders[f"random:{seed}"] = facts
    default = hodgecover.plan_from_signals(signals, 4, FEW)
    assert found.plan.order == default.order and len(orders) == 7
    assert found.largest_barrier == signals.barriers.max()
    barriers = dict(zip(tuples(hodgecover.edges(8)), signals.barriers.tolist()))
    ratios = []
    for triangle, barrier in zip(tuples(signals.candidates), signals.triplets.tolist()):
        ratios.append(barrier / max(barriers[pair] for pair in itertools.combinations(triangle, 2)))
    assert found.triplet_ratio == pytest.approx(statistics.median_low(ratios))
    for order, facts in orders.items():
        settings = Settings(max_triangles=10, order=order)
        complex_ = hodgecover.decompose(signals, settings)
        d1, signs = complex_.d1, complex_.signs
        b = signs * signals.barriers
        gradient = d1.T @ torch.linalg.lstsq(d1.T, b).solution
        assert facts.gradient == pytest.approx((gradient.square().sum() / b.square().sum()).item())
        assert facts.gradient + facts.curl + facts.harmonic == pytest.approx(1)
        both = torch.cat([d1.T, complex_.d2], dim=1)
        rest = signs - both @ torch.linalg.lstsq(both, signs, driver="gelsd").solution
        assert facts.constant == pytest.approx((rest.square().sum() / 28).item())
        plan = hodgecover.plan_from_signals(signals, 4, settings)
        edges = tuples(plan.diagnostics.critical_edges)
        usual = tuples(default.diagnostics.critical_edges)
        assert facts.edges_shared == len({*edges} & {*usual}) / len(edges)
        assert facts.survivors_shared == len({*plan.survivors} & {*default.survivors}) / 4
        simplices = edges + tuples(plan.diagnostics.critical_triangles)
        covered = [picks for picks in range(9)
                   if all({*simplex} & {*plan.order[:picks]} for simplex in simplices)]
        assert facts.covered_at == covered[0]
    assert (found.index.edges_shared, found.index.survivors_shared) == (1, 1)
    assert found.saliency.edges_shared < 1
    assert len({facts.harmonic for facts in orders.values()}) > 3
    top = sorted(range(8), key=lambda e: -signals.saliency[e])[:4]
    assert found.top_by_saliency == len({*top} & {*default.survivors}) / 4


def test_the_audit_shows_where_redirects_go(audited):
    """By the paper's rule, by the residual of the additive model, and by the router's rows, word by word."""
    signals, rows, _ = audited
    found = audit.audit_layer(signals, rows, 3, 1, FEW)
    plan, pairs = found.plan, hodgecover.edges(8)
    kept = plan.survivors
    ends = torch.zeros(28, 8, dtype=torch.float64).scatter(1, pairs, 1.0)
    residual = signals.barriers - ends @ torch.linalg.lstsq(ends, signals.barriers).solution
    left = dict(zip(tuples(pairs), residual.tolist()))
    cosine = torch.nn.functional.cosine_similarity(rows[:, None].double(), rows[None].double(), dim=2)
    dropped = [e for e in range(8) if e not in kept]
    by_rule = {"the paper's rule": [plan.redirect[e] for e in dropped],
               "least barrier without its additive part": [
                   min(kept, key=lambda j: left[min(e, j), max(e, j)]) for e in dropped],
               "nearest router row": [max(kept, key=lambda j: cosine[e, j]) for e in dropped]}
    expected = {}
    for rule, targets in by_rule.items():
        expected[rule] = len({*targets}), max(map(targets.count, targets))
    assert found.redirects == expected
    assert len({*expected.values()}) == 3
    report = plan.diagnostics
    assert expected["the paper's rule"] == (report.redirect_targets, report.redirect_largest)


def test_redirects_of_nothing():
    assert audit.spread({}) == (0, 0)


def test_the_range_over_random_orders_is_smallest_median_largest(audited):
    _, _, found = audited
    low, middle, high = audit.random_range(found)
    for name in audit.OrderFacts._fields:
        values = sorted(getattr(facts, name) for facts in found.random)
        assert (getattr(low, name), getattr(middle, name), getattr(high, name)) == (values[0], values[2], values[4])


def table_rows(said: str) -> list[list[str]]:
    """The cells of all Markdown tables in what was printed."""
    rows = []
    for line in said.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture
def printed(small, tmp_path, monkeypatch, capsys) -> tuple[str, dict[int, audit.LayerAudit]]:
    """What audit.py prints, from hodgecover.py's barriers, none measured twice; and the audits."""
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(hodgecover, small, "--keep", 4, "--plan-only", *text) == 0
    capsys.readouterr()
    monkeypatch.setattr(mathx, "sweep", refuse)
    assert run(audit, small, "--keep", 4, "--orders", 3, *text) == 0
    said = capsys.readouterr().out
    model = Model(small)
    ids = hodgecover.calibration_ids(model, [tmp_path / "text.txt"], 64, 32)
    cache = small.with_name("small-barriers")
    audits = {}
    for index, signals in hodgecover.measure_model(model, ids, Settings(), [0, 1], cache):
        rows = model.checkpoint.load(f"model.layers.{index}.mlp.gate.weight")
        audits[index] = audit.audit_layer(signals, rows, 4, 3)
    return said, audits


def test_the_printed_tables_are_the_audit_s(printed):
    said, audits = printed
    rows = table_rows(said)
    for index, found in audits.items():
        harmonic = [facts.harmonic for facts in found.random]
        report = found.plan.diagnostics
        eta = [f"{report.eta[part]:.3f} ({report.eta_constant[part]:.3f})" for part in plot_diagnostics.PARTS]
        assert [str(index), *eta, str(report.betti_1), f"{report.tau:.3g} ({found.largest_barrier:.3g})",
                f"{report.triangles} of {report.candidates}",
                f"{report.discordance:.1%} ({found.triplet_ratio:.2f})",
                str(report.covered_at["edges"]), str(report.covered_at["triangles"]),
                f"{found.plan.routed_share:.1%}"] in rows
        summary = next(row for row in rows[::-1] if row[0] == str(index) and len(row) == 10)
        assert summary[:4] == [str(index), f"{found.index.harmonic:.2f}", f"{found.index.constant:.2f}",
                               f"{min(harmonic):.2f} to {max(harmonic):.2f}"]
        additive = report.additive
        assert summary[6:8] == [f"{1 - additive['energy']:.1%}", f"{1 - additive['variance']:.1%}"]
        assert summary[8:] == [f"{found.index.covered_at} (4)", f"{found.top_by_saliency:.0%}"]
        assert [str(index), *(f"{of.targets} ({of.busiest})" for of in found.redirects.values())] in rows
        layer = said.split(f"Layer {index}\n")[1]
        for name, facts in {"index": found.index, "saliency": found.saliency}.items():
            shown = re.search(rf"\| {name} \| (.+) \|", layer)[1].split(" | ")
            assert shown == [*(f"{share:.2f}" for share in facts[:-1]), str(facts.covered_at)]


def test_the_papers_figures_stand_beside_ours(printed):
    said, audits = printed
    rows = table_rows(said)
    first, second = (found.plan.diagnostics for found in audits.values())
    at = rows.index(["the paper's OLMoE", "0.289 to 0.491 (mean 0.352)", "0.025 to 0.049", "0.596 to 1",
                     "1,453 to 1,455"])
    name, harmonic, *_, betti = rows[at + 3]
    low, high = sorted((first.eta["harmonic"], second.eta["harmonic"]))
    assert (name, harmonic) == ("this model", f"{low:.3f} to {high:.3f} (mean {(low + high) / 2:.3f})")
    assert betti == audit.span([first.betti_1, second.betti_1], ",")
    paper, ours = (row for row in rows if "of the experts gone" in row[0])
    assert paper == ["the paper's OLMoE, 66% of the experts gone (table 5)", "0.693", "0.613", "0.378", "0.491"]
    means = [(first.retained[part] + second.retained[part]) / 2
             for part in ("harmonic", "gradient", "curl", "triplet")]
    assert ours == ["this model, 50% of the experts gone", *(f"{mean:.3f}" for mean in means)]


# ---------------------------------------------------------------------------------- the barrier at the end of the model

def barrier_by_hand(model: Model, ids: torch.Tensor, index: int, simplex: tuple) -> torch.Tensor:
    """Run the model twice, once with the experts of a simplex merged in a layer, and compare its predictions."""
    outputs = []
    for merges in (False, True):
        h = model.embed(ids)
        norm = model.norm("model.norm.weight")
        for at in range(model.config.num_layers):
            step = model.run(at, model.layer(at), h, norm)
            y = step.y.clone()
            if merges and at == index:
                experts = {e: step.layer.experts(e, step.x) for e in simplex}
                counts = (step.gates > 0).double().sum(0)
                total = sum(counts[e] for e in simplex)
                mean = sum(counts[e] / total * experts[e] for e in simplex)
                for e in simplex:
                    y += step.gates[:, e, None] * (mean - experts[e])
            h = y.view_as(h)
        outputs.append((norm(h) @ model.unembedding().T).log_softmax(-1))
    log_p, log_q = outputs
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("path", [PLAIN, named("qwen2-dense-between"), named("qwen3_next-tied-mtp")],
                         ids=lambda path: path.name)
def test_barriers_at_the_end_of_the_model_by_hand(path):
    model = Model(path, torch.float64)
    ids = load_file(path / "golden.safetensors")["ids"][:2, :7]
    measured = dict(audit.signals_at_end(model, ids, Settings(max_triangles=2)))
    assert [*measured] == hodgecover.sparse_layers(model)
    for index, signals in measured.items():
        if index >= model.config.num_layers:  # a multi-token head: no later layers
            continue
        pairs = hodgecover.edges(len(signals.frequency))
        for simplices, barriers in ((pairs[::9], signals.barriers[::9]), (signals.candidates, signals.triplets)):
            for simplex, barrier in zip(tuples(simplices), barriers):
                expected = barrier_by_hand(model, ids, index, simplex)
                torch.testing.assert_close(barrier, expected, rtol=1e-8, atol=1e-13)


def test_barriers_at_the_end_are_kept_apart_from_the_layer_s(small, tmp_path, monkeypatch):
    model, settings = Model(small), Settings(max_triangles=2)
    ids = torch.arange(16).view(2, 8)
    first = dict(audit.signals_at_end(model, ids, settings, tmp_path / "cache"))
    at_layer = dict(hodgecover.measure_model(model, ids, settings, [0, 1], tmp_path / "cache"))
    assert not torch.allclose(first[0].barriers, at_layer[0].barriers)
    monkeypatch.setattr(hodgecover, "plain_barrier", refuse)
    again = dict(audit.signals_at_end(model, ids, settings, tmp_path / "cache"))
    for index, signals in first.items():
        for field, value in signals._asdict().items():
            assert torch.equal(getattr(again[index], field), value)


def test_the_end_of_the_model_on_request(small, tmp_path, capsys):
    options = ["--orders", 1, "--end-to-end", 16, "--calib", tmp_path / "text.txt", *QUICK]
    assert run(audit, small, "--keep", 4, *options) == 0
    said = capsys.readouterr().out
    assert "on 16 tokens" in said and "| 1 | 1.000 |" in said  # no layer comes after the last
    model = Model(small)
    ids = hodgecover.calibration_ids(model, [tmp_path / "text.txt"], 64, 32)[:, :8]
    settings = Settings(vocab_sample=0, max_triangles=0)
    _, lens = next(hodgecover.measure_model(model, ids, settings, [0]))
    _, end = next(audit.signals_at_end(model, ids, settings))
    assert f"| 0 | {mathx.spearman(lens.barriers, end.barriers):.3f} |" in said


@pytest.mark.parametrize("options, says", [
    (["--keep", 2], "--keep 2: must be from 3 to 8"), (["--keep", 4, "--orders", 0], "--orders 0: must be"),
    (["--keep", 4, "--end-to-end", -1], "--end-to-end -1: must be"), (["--keep", 4, "--out", "x"], "--out"),
    (["--keep", 4, "--tokens", 1], "--tokens 1: must be"), (["--keep", 4, "--vocab-sample", -1], "--vocab-sample -1"),
    (["--keep", 4, "--end-to-end", 8, "--dtype", "bfloat16"], "bfloat16"), ([], "--keep"),
])
def test_the_audit_refuses_wrong_choices_before_the_work(small, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.setattr(mathx, "sweep", refuse)
    text = ["--calib", tmp_path / "text.txt", "--tokens", 64, "--seq-len", 32]
    assert_refused(capsys, run(audit, small, *text, *options), says)


def test_barriers_lie_beside_a_checkpoint_named_by_dots(small):
    (small / "folder").mkdir()
    found = common.barrier_cache(Model(small / "folder" / ".."), argparse.Namespace(cache=None))
    assert found == small.with_name("small-barriers")


# -------------------------------------------------------------------------------------------------- the three-cycle

@pytest.fixture(scope="module")
def toy():
    layer = three_cycle.toy_layer(three_cycle.TOY)
    return layer, hodgecover.measure_layer(three_cycle.moe_layer(layer), three_cycle.SETTINGS)


def plain_damage(toy: dict, kept: list[int]) -> float:
    """Token by token, expert by expert, in plain loops."""
    def stream(some: list[int]) -> list[torch.Tensor]:
        streams = []
        gate, up, down = toy["experts"]
        for x, logits, residual in zip(toy["x"], toy["logits"], toy["residual"]):
            y = residual.clone()
            two = sorted(some, key=lambda e: -logits[e])[:2]
            mass = sum(logits[e].exp() for e in two)
            for e in two:
                units = torch.nn.functional.silu(gate[e] @ x) * (up[e] @ x)
                y += logits[e].exp() / mass * (down[e] @ units)
            streams.append(y / (y.square().mean() + 1e-6).sqrt())
        return streams
    total = 0.0
    for y, z in zip(stream([*range(6)]), stream(kept)):
        p, q = (toy["head"] @ y).softmax(0), (toy["head"] @ z).softmax(0)
        total += (p * (p / q).log()).sum().item()
    return total / len(toy["x"])


def test_the_lecture_s_damages_are_those_of_plain_loops(toy):
    layer, signals = toy
    for method in three_cycle.METHODS:
        kept = three_cycle.survivors(layer, signals, method)
        assert three_cycle.damage(layer, kept) == pytest.approx(plain_damage(layer, kept))
    assert three_cycle.damage(layer, [*range(6)]) == pytest.approx(0, abs=1e-15)


def test_the_lecture_s_claims(toy):
    """Pairs and triples of 0, 1, 2 are cheap, and the trio is discordant; saliency drops the critical triangle whole,
    keeps two of the trio, and does more damage; no filled cycle is harmonic."""
    layer, signals = toy
    pairs = three_cycle.barrier_of(signals)
    trio = hodgecover.plain_barrier(three_cycle.moe_layer(layer), [0, 1, 2]).item()
    inside = [pairs[pair] for pair in itertools.combinations(range(3), 2)]
    assert trio > 1.2 * max(inside) and trio < 0.03 * min({*pairs.values()} - {*inside})
    report = hodgecover.plan_from_signals(signals, 3, three_cycle.SETTINGS).diagnostics
    assert tuples(report.critical_triangles) == [(0, 3, 5)]
    complex_ = hodgecover.decompose(signals, three_cycle.SETTINGS)
    taus = torch.linspace(0, 1.1 * max(pairs.values()), 80, dtype=torch.float64)
    largest = taus[complex_.betti_curve == complex_.betti_curve.max()]
    assert len(largest) > 1 and complex_.tau == largest[-1]
    kept = {method: three_cycle.survivors(layer, signals, method) for method in three_cycle.METHODS}
    assert kept == {"reap": [1, 2, 4], "hodge-no-triangle": [1, 2, 4], "hodgecover": [1, 3, 4]}
    assert three_cycle.damage(layer, kept["hodgecover"]) < three_cycle.damage(layer, kept["reap"])
    assert three_cycle.cycle_energy([[0, 1, 2]]) == pytest.approx((0, 1, 0), abs=1e-12)
    assert three_cycle.cycle_energy([]) == pytest.approx((0, 0, 1), abs=1e-12)


def test_a_triple_of_independent_experts_costs_twice_its_pairs():
    """As the lecture says: constant outputs, independent but for a common one, at equal rates, one expert a token."""
    n, d, tokens = 3, 8, 30
    x = torch.ones(tokens, d, dtype=torch.float64)
    first = torch.zeros(n, 1, d, dtype=torch.float64)
    first[:, 0, 0] = 1.0
    down = 1e-3 * torch.eye(d, dtype=torch.float64)[:n, :, None]  # |f_e(x) - common| = |f_h(x) - common|
    gates = torch.eye(n, dtype=torch.float64)[torch.arange(tokens) % n]
    norm = three_cycle.RMSNorm(torch.ones(d, dtype=torch.float64), 1e-6)
    experts = three_cycle.Experts(first, first, down)
    layer = hodgecover.MoELayer(experts, x, gates, x, norm, torch.eye(d, dtype=torch.float64))
    pairs = [hodgecover.plain_barrier(layer, pair).item() for pair in ([0, 1], [0, 2], [1, 2])]
    assert hodgecover.plain_barrier(layer, [0, 1, 2]).item() / max(pairs) == pytest.approx(2, rel=1e-2)


def test_the_lecture_says_how_often_the_toy_holds(toy, monkeypatch, capsys):
    """Its numbers: of 20 toys counted one by one; the KLs printed are the damages."""
    layer, signals = toy
    monkeypatch.setattr(three_cycle, "TOYS", 20)
    assert run(three_cycle) == 0
    said = " ".join(capsys.readouterr().out.split())
    better = worse = 0
    for seed in range(1, 21):
        other = three_cycle.toy_layer(seed)
        measured = hodgecover.measure_layer(three_cycle.moe_layer(other), three_cycle.SETTINGS)
        plan = hodgecover.plan_from_signals(measured, 3, three_cycle.SETTINGS)
        top = sorted(range(6), key=lambda e: -measured.saliency[e])[:3]
        difference = plain_damage(other, plan.survivors) - plain_damage(other, sorted(top))
        better += difference < -1e-9
        worse += difference > 1e-9
    assert f"in {better}, more in {worse}, the same in {20 - better - worse}." in said and better and worse
    for method, text in three_cycle.METHODS.items():
        kept = three_cycle.survivors(layer, signals, method)
        assert f"{text} {kept} {plain_damage(layer, kept):.4f}" in said
    best = min(plain_damage(layer, list(kept)) for kept in itertools.combinations(range(6), 3))
    assert re.search(rf"best of all 20 choices \[.*?\] {best:.4f}", said)
    betti = re.search(r"has (\d+) eigenvalues 0, which is beta_1 = (\d+)", said)
    assert betti[1] == betti[2]


# ------------------------------------------------------------------------------------------------------- the plots

@pytest.fixture
def planned(small, tmp_path):
    """small with the records of two outputs: additive-residual and reap, and the barriers beside it."""
    for method in ("additive-residual", "reap"):
        assert run(baselines, small, "--keep", 4, "--method", method, "--calib", tmp_path / "text.txt", *QUICK, "--out",
                   tmp_path / method) == 0
    return small


def test_plots_take_reap_s_retained_mass_from_the_barriers(planned, tmp_path):
    """As sums over edges that meet its survivors say; a plan that has diagnostics is left as it is."""
    entries = [plot_diagnostics.read_entry(tmp_path / method / RECORD) for method in ("additive-residual", "reap")]
    folder = planned.with_name("small-barriers")
    own, found = plot_diagnostics.drawable(entries, folder)
    assert own == entries[0] and plot_diagnostics.label(found) == "reap, K = 4"
    shares = []
    for layer, drawn in zip(entries[1]["layers"], found["layers"]):
        signals = plot_diagnostics.cached(folder, entries[0], layer)
        harmonic = hodgecover.decompose(signals).parts.harmonic.abs().tolist()
        met = [bool({*edge} & {*layer["survivors"]}) for edge in tuples(hodgecover.edges(8))]
        shares.append(sum(itertools.compress(harmonic, met)) / sum(harmonic))
        assert drawn["survivors"] == layer["survivors"]
        json.dumps(drawn)  # as a record that was read
    assert plot_diagnostics.mean_retained(found, "harmonic") == pytest.approx(sum(shares) / 2)


def test_retained_masses_are_drawn_beside_each_other(planned, tmp_path):
    entry = plot_diagnostics.read_entry(tmp_path / "additive-residual" / RECORD)
    axes = Axes()
    plot_diagnostics.draw_retained(axes, [entry, entry])
    (first, masses), (second, again) = (given for name, given, _ in axes.calls if name == "bar")
    assert masses == again == [plot_diagnostics.mean_retained(entry, name)
                               for name in ("gradient", "curl", "harmonic", "triplet")]
    assert [round(right - left, 9) for left, right in zip(first, second)] == [0.4] * 4


def test_plots_want_the_barriers_of_the_plan(planned, tmp_path):
    entries = [plot_diagnostics.read_entry(tmp_path / method / RECORD) for method in ("additive-residual", "reap")]
    with pytest.raises(InputError, match="barriers: needed for reap, K = 4"):
        plot_diagnostics.drawable(entries, None)
    folder = planned.with_name("small-barriers")
    for change in ({"text_sha256": "0"}, {"max_triangles": 7}, {"seed": 1}):
        other = entries[0] | {"settings": entries[0]["settings"] | change}
        with pytest.raises(InputError, match="has none of model.layers.0"):
            plot_diagnostics.cached(folder, other, other["layers"][0])
    other = entries[0] | {"source": {"fingerprint": "0"}}
    with pytest.raises(InputError, match="has none of model.layers.0"):
        plot_diagnostics.cached(folder, other, other["layers"][0])


def test_the_matrix_of_barriers_has_the_survivors_first(planned, tmp_path):
    entry = plot_diagnostics.read_entry(tmp_path / "additive-residual" / RECORD)
    layer = entry["layers"][1]
    order = plot_diagnostics.survivors_first(layer)
    assert sorted(order[:4]) == layer["survivors"] and sorted(order) == list(range(8))
    assert all(layer["saliency"][a] >= layer["saliency"][b] for part in (order[:4], order[4:])
               for a, b in itertools.pairwise(part))
    barriers = plot_diagnostics.cached(planned.with_name("small-barriers"), entry, layer).barriers
    matrix = plot_diagnostics.barrier_matrix(barriers, order)
    for value, (i, j) in zip(barriers.tolist(), hodgecover.edges(8).tolist()):
        assert matrix[order.index(i), order.index(j)] == matrix[order.index(j), order.index(i)] == value
    assert matrix.diagonal().isnan().all()


class Axes:
    """Remembers what is drawn on it."""

    def __init__(self):
        self.calls = []
        self.figure = self

    def __getattr__(self, name):
        return lambda *given, **named: self.calls.append((name, given, named))


def test_the_bars_of_eta_stack_up_to_1(planned, tmp_path):
    layers = plot_diagnostics.read_entry(tmp_path / "additive-residual" / RECORD)["layers"]
    axes = Axes()
    plot_diagnostics.draw_eta(axes, layers)
    bars = [(given[1], named["bottom"]) for name, given, named in axes.calls if name == "bar"]
    assert [round(base + share, 9) for share, base in zip(*map(list, bars[2]))] == [1, 1]
    marks = next(given[1] for name, given, _ in axes.calls if name == "scatter")
    assert marks == [1 - layer["diagnostics"]["eta_constant"]["harmonic"] for layer in layers]


def test_critical_edges_are_marked_at_their_places(planned, tmp_path):
    layer = plot_diagnostics.read_entry(tmp_path / "additive-residual" / RECORD)["layers"][0]
    axes = Axes()
    plot_diagnostics.draw_barriers(axes, layer, torch.rand(28))
    order = plot_diagnostics.survivors_first(layer)
    marked = {tuple(point) for name, given, _ in axes.calls if name == "scatter" for point in zip(*given)}
    critical = set()
    for i, j in layer["diagnostics"]["critical_edges"]:
        critical.add((order.index(i), order.index(j)))
    assert marked == critical | {pair[::-1] for pair in critical} and critical


def test_a_plan_is_named_after_what_made_it():
    said = [{"search": "rco", "keep": 4}, {"method": "reap", "keep": 5}, {"keep": 6}]
    assert [plot_diagnostics.label({"settings": each}) for each in said] == ["rco, K = 4", "reap, K = 5",
                                                                            "hodgecover, K = 6"]


def test_plots_without_matplotlib_get_one_line(planned, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    capsys.readouterr()
    status = run(plot_diagnostics, tmp_path / "reap" / RECORD, "--out", tmp_path / "a.png")
    assert_refused(capsys, status, "matplotlib is missing; pip install matplotlib")


@pytest.mark.parametrize("name", ["small", "nowhere/a.png"])
def test_a_picture_that_cannot_be_made_is_refused_before_the_work(small, name):
    with pytest.raises(InputError, match="must name a file in an existing folder"):
        common.import_pyplot(small.parent / name)


class Pyplot:
    """A plotting library that draws nothing, and may fail as it saves."""

    def __init__(self, fails: bool):
        self.fails = fails

    def subplots(self, rows: int, columns: int, **_):
        axes = {(row, column): Axes() for row in range(rows) for column in range(columns)}
        return self, axes

    def savefig(self, file, **named):
        file.write(b"picture")
        if self.fails:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", [False, True])
def test_the_picture_is_whole_or_absent(planned, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr(common, "import_pyplot", lambda path: Pyplot(fails))
    capsys.readouterr()
    folder = tmp_path / "pictures"
    folder.mkdir()
    status = run(plot_diagnostics, tmp_path / "additive-residual" / RECORD, tmp_path / "reap" / RECORD, "--barriers",
                 planned.with_name("small-barriers"), "--out", folder / "a.png")
    if fails:
        assert_refused(capsys, status, "No space left on device")
    assert [file.read_bytes() for file in folder.iterdir()] == ([] if fails else [b"picture"]) and status == 2 * fails


@pytest.mark.parametrize("options, says", [
    (["--layer", 0], "--layer: goes with --barriers"),
    (["--layer", 5, "--barriers", "FOLDER"], "--layer 5: the plan has"),
    (["--barriers", "nowhere"], "--barriers nowhere: has none of"),
])
def test_plots_refuse_wrong_choices(planned, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.setattr(common, "import_pyplot", lambda path: Pyplot(False))
    capsys.readouterr()
    options = [planned.with_name("small-barriers") if option == "FOLDER" else option for option in options]
    plan = tmp_path / "additive-residual" / RECORD
    assert_refused(capsys, run(plot_diagnostics, plan, *options, "--out", tmp_path / "a.png"), says)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("record, says", [
    ({"schema_version": 1, "history": []}, "not a record of schema_version"), ({}, "its last step is no plan"),
    ({"layers": [{"survivors": [0], "diagnostics": {"retained": {"harmonic": {"some": 1, "all": 0}}}}],
      "settings": {"keep": 1}}, "a plan of version 0.3"),
    ({"layers": [{"groups": [[0]]}], "settings": {"keep": 1}}, "its last step is no plan"),
    ({"layers": [{"survivors": [0]}], "settings": {"keep": 1}}, "did not write (KeyError"),
])
def test_plots_of_something_else(tmp_path, monkeypatch, capsys, record, says):
    monkeypatch.setattr(common, "import_pyplot", lambda path: Pyplot(False))
    whole = {"schema_version": 2, "history": [record]} | record
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert_refused(capsys, run(plot_diagnostics, tmp_path / "a.json", "--out", tmp_path / "a.png"), says)


def test_the_docstrings_examples_hold():
    assert sum(doctest.testmod(module).failed for module in (audit, plot_diagnostics, three_cycle)) == 0
