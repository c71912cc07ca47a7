# SPDX-License-Identifier: MIT
"""examples/estimate.py and examples/bench.py: what they count against what is done. Nothing here reads a clock."""
import doctest
import itertools
from datetime import timedelta
from types import SimpleNamespace

import baselines
import bench
import estimate
import hodgecover
import mathx
import model_io
import pytest
import refit
import torch
from conftest import assert_refused, contents, refuse, run
from estimate import Shape
from hodgecover import Settings
from model_io import Model
from torch.utils.flop_counter import FlopCounterMode

SHAPE = Shape(n=6, k=2, d=5, f=3, vocab=11, outcomes=7)
TINY_LAYER = 4 * 96 * 96 + 64 * 96 + 4 * 96  # attention, router, norms
TINY_EXPERTS = 64 * 3 * 96 * 16


@pytest.fixture
def fixed_rates(monkeypatch):
    """A machine of 1e9 operations a second, on which nothing is run."""
    monkeypatch.setattr(estimate, "sweep_rate", lambda *_: 1e9)
    monkeypatch.setattr(estimate, "refit_rate", lambda *_: 1e9)
    monkeypatch.setattr(Model, "layer", refuse)


def a_second_each(monkeypatch) -> None:
    """Whatever estimate.py times takes a second."""
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


# -------------------------------------------------------------------------------------------------- operations

def test_simplices_are_counted_over_uniform_routing():
    n, k = SHAPE.n, SHAPE.k
    routes = list(itertools.combinations(range(n), k))
    for members in (2, 3):
        simplices = list(itertools.combinations(range(n), members))
        rows = sum(bool({*route} & {*s}) for route in routes for s in simplices) / len(routes)
        assert estimate.touched_simplices(SHAPE, members, len(simplices)) == pytest.approx(rows)


@pytest.mark.parametrize("outcomes", [0, 7])
@pytest.mark.parametrize("members", [2, 3])
def test_operations_are_those_that_torch_counts(members, outcomes):
    """On the routing at hand: the tables, the distribution, and two expectations for each touched simplex."""
    shape = SHAPE._replace(outcomes=outcomes or SHAPE.vocab)
    layer = bench.random_layer(shape, 9, 1.0, torch.float32)
    simplices = torch.combinations(torch.arange(shape.n), members)[::2]
    rows = bench.touched_pairs(layer, simplices)
    assert 0 < rows < 9 * len(simplices)
    steps = 9 * max(int(mathx.touching(simplices, layer.gates).sum(1).max()), 1)  # a step pads its tokens' rows
    with FlopCounterMode(display=False) as counter:
        estimate.sweep(layer, simplices, outcomes)
    counted = counter.get_total_flops()
    assert estimate.sweep_operations(shape, 9, rows) <= counted <= estimate.sweep_operations(shape, 9, steps)


def test_the_rate_is_that_of_the_operations_that_are_timed(monkeypatch, tiny):
    monkeypatch.setattr(estimate, "TIMED_OPERATIONS", 5e8)
    a_second_each(monkeypatch)
    model = Model(tiny)
    with FlopCounterMode(display=False) as counter:
        rate = estimate.sweep_rate(model, estimate.shape_of(model, 100))
    assert rate == pytest.approx(counter.get_total_flops() / 2)  # it is run twice


def test_the_rate_of_a_refit_is_that_of_the_operations_that_are_timed(monkeypatch, tiny):
    """But for the inverses, which torch does not count, and the application of the result, which is not timed."""
    a_second_each(monkeypatch)
    with FlopCounterMode(display=False) as counter:
        rate = estimate.refit_rate(Model(tiny), 200)
    d, f = 96, 16
    inverses, applied = 2 * f**3, 6 * 400 * d * f
    assert rate == refit.refit_operations(200, 2, 2, d, f)
    assert counter.get_total_flops() == pytest.approx(rate - inverses - applied)


# ------------------------------------------------------------------------------------------------- whole runs

def test_an_estimate_counts_layers_output_and_memory(tiny, fixed_rates, capsys):
    cost = estimate.estimate(Model(tiny), Settings(vocab_sample=0), 2048, memory=12345)
    shape = Shape(64, 8, 96, 16, 2048, 2048)
    touched = sum(estimate.touched_simplices(shape, members, count) for members, count in ((2, 2016), (3, 500)))
    sweeps = 2 * estimate.table_operations(shape) + 4 * 2048 * touched  # no table fits 12,345 bytes
    active = 4 * (TINY_LAYER + TINY_EXPERTS / 8)
    assert cost.operations == pytest.approx(2048 * (4 * sweeps + 2 * active), rel=1e-4)
    assert cost.seconds * 1e9 == pytest.approx(cost.operations)
    room = estimate.estimate(Model(tiny), Settings(vocab_sample=0), 2048, memory=10**11)
    saved = cost.operations - room.operations
    assert saved == pytest.approx(2048 * 4 * estimate.table_operations(shape), rel=1e-4)
    in_bytes = 2 * TINY_EXPERTS + 4 * (TINY_LAYER + 2048 * 96 + 16 * 2048 * 96)  # bfloat16 experts stay so
    assert cost.memory == estimate.PROCESS_BYTES + in_bytes + 12345
    sampled = estimate.estimate(Model(tiny), Settings(vocab_sample=64), 2048)
    assert sampled.operations < cost.operations / 2
    assert sampled.memory == cost.memory - 12345 + hodgecover.MEMORY + 2048 * 64 * 12  # the outcomes, their weights

    before = contents(tiny.parent)
    assert run(estimate, tiny, "--keep", 32, "--dtype", "float32", "--tokens", 2500, "--vocab-sample", 0) == 0
    said = capsys.readouterr().out
    cost = estimate.estimate(Model(tiny), Settings(vocab_sample=0), 2048)
    assert f"barriers of 4 layers, float32: {cost.operations:.1e} operations" in said  # of whole sequences
    assert str(timedelta(seconds=round(cost.seconds))) in said and "refit" not in said
    assert "hodgecover.py --keep 51 (r1 = 0.20 of 64 experts)" in said
    weights = (tiny / "model.safetensors").stat().st_size
    kept = 2 * (1746528 - 4 * (32 * 96 + TINY_EXPERTS // 2))
    assert f"reading: {weights / 1e6:.1f} MB" in said and f"output: {kept / 1e6:.1f} MB" in said
    assert contents(tiny.parent) == before


def test_the_cost_of_a_refit_counts_its_parts(tiny, fixed_rates, capsys):
    cost = estimate.estimate_refit(Model(tiny), 32, 4096, memory=10**9)
    active = 4 * (TINY_LAYER + TINY_EXPERTS / 8)
    assert cost.operations == 4 * refit.refit_operations(4096, 32, 8, 96, 16) + 4 * 4096 * active
    held = 4 * TINY_LAYER + 2 * TINY_EXPERTS
    streams = refit.activation_bytes(Model(tiny), 4096)
    weights = 3 * 4 * 32 * 96 * 16
    hidden, inverses = 4096 * 8 * (16 * 4 + 8), 8 * 32 * 16 * 16
    assert cost.memory == estimate.PROCESS_BYTES + 1.5 * held + weights + inverses + hidden + streams
    assert cost.disk == 4 * 32 * 96 * 16 * 2  # half of the down projections, bfloat16
    assert estimate.estimate_refit(Model(tiny), 32, 4096, memory=1000).memory == cost.memory - streams - hidden + 1000

    assert run(estimate, tiny, "--keep", 32, "--refit", 4096, "--dtype", "float32") == 0
    assert f"refit of 4 layers, float32: {cost.operations:.1e} operations" in capsys.readouterr().out


def test_tables_are_kept_for_the_triangles_in_half_of_the_memory(small, monkeypatch):
    """As many as `mathx.Tables` keeps; the buffers of the sweep have the other half."""
    model, shape = Model(small), estimate.shape_of(Model(small), 20)
    of_token = 4 * 9 * (20 + 9)
    assert estimate.kept_share(model, shape, 10, 2 * 5 * of_token) == 0.5
    assert estimate.kept_share(model, shape, 10, 10**9) == 1


def test_a_sequence_is_as_long_as_the_model_takes(tiny, fixed_rates, capsys):
    """At most the tokens, as of hodgecover.py; tokens beyond whole sequences are not counted."""
    most = Model(tiny).config.max_positions
    for tokens in (100, 2 * most + 100):
        assert run(estimate, tiny, "--tokens", tokens, "--dtype", "float32") == 0
        whole = tokens // min(most, tokens) * min(most, tokens)
        cost = estimate.estimate(Model(tiny), Settings(), whole)
        assert f"{cost.operations:.1e} operations" in capsys.readouterr().out


@pytest.mark.parametrize("vocab_sample", [0, 20])
def test_the_disk_is_that_of_the_cache(small, tmp_path, monkeypatch, vocab_sample):
    """But for the header of each file."""
    monkeypatch.setattr(estimate, "sweep_rate", lambda *_: 1e9)
    settings = Settings(vocab_sample=vocab_sample, max_triangles=3)
    model, ids = Model(small), torch.arange(160).view(5, 32) % 96
    assert len(list(hodgecover.measure_model(model, ids, settings, [0, 1], tmp_path / "cache"))) == 2
    files = [file.read_bytes() for file in (tmp_path / "cache").iterdir()]
    data = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)
    assert len(files) == 2 and estimate.estimate(model, settings, 160).disk == data


def test_every_family_has_a_cost(family, fixed_rates, capsys):
    model = Model(family)
    sparse, depth = len(hodgecover.sparse_layers(model)), len(model.layer_names)
    assert run(estimate, family, "--keep", model.config.top_k, "--refit", 512) == 0
    said = capsys.readouterr().out
    assert f"barriers of {sparse} layers" in said and f"refit of {sparse} layers" in said
    held, active = estimate.layer_sizes(model)
    shapes = [info.shape for name, info in model.checkpoint.tensors.items() if name.startswith(tuple(
        f"{layer}." for layer in model.layer_names))]
    assert len(held) == depth and sum(held) <= 4 * sum(torch.Size(shape).numel() for shape in shapes)
    assert 0 < active < sum(torch.Size(shape).numel() for shape in shapes)
    rest = 4 * model.config.hidden_size * (model.config.vocab_size + 16 * 64)  # the head, streams of 64 tokens
    cost = estimate.estimate(model, Settings(), 64, memory=0)
    assert cost.memory == estimate.PROCESS_BYTES + max(held) + rest  # of the largest layer, wherever it lies


@pytest.mark.parametrize("options, says", [
    (["--keep", 65], "--keep 65: must be from 8 to 64"),
    (["--seq-len", 0], "--seq-len 0: must be from 2 to tokens"),
    (["--tokens", 100, "--seq-len", 512], "--seq-len 512: must be from 2 to tokens (100)"),
    (["--tokens", 1], "--tokens 1: must be from 2"),
    (["--refit", 4096], "--refit: needs --keep"),
    (["--refit", 100, "--keep", 32, "--seq-len", 512], "from 2 to refit (100)"),
    (["--readout", "model"], "examples/audit.py --end-to-end"),
    (["--max-triangles", -1], "--max-triangles -1: must be"), (["--seed", 1], "unrecognized arguments"),
    (["--calib", "x"], "unrecognized arguments"), (["--out", "x"], "unrecognized arguments"),
])
def test_wrong_choices_get_one_line(tiny, capsys, fixed_rates, options, says):
    assert_refused(capsys, run(estimate, tiny, *options), says)


# ----------------------------------------------------------------------------------------------------------- bench

SMALL = ["--experts", 6, "--top-k", 2, "--hidden", 8, "--width", 4, "--dtype", "float32"]


def table_rows(text: str) -> list[list[str]]:
    """Cells of the lines of Markdown tables that are no head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not row[0].endswith("sampled") and row[0] not in ("", "varied")]


def test_the_bench_compares_the_sweep_with_the_plain_way(capsys):
    assert run(bench, *SMALL, "--experts", 10, "--tokens", 8, "--vocab", 3000) == 0
    pairs, triangles, sampled, *others = table_rows(capsys.readouterr().out)
    layer = bench.random_layer(Shape(10, 2, 8, 4, 3000, 3000), 8, 4.0, torch.float32)
    routed = [{*gates.nonzero().flatten().tolist()} for gates in layer.gates]
    for cells, members in ((pairs, 2), (triangles, 3)):
        simplices = list(itertools.combinations(range(10), members))
        touched = sum(bool(route & {*s}) for route in routed for s in simplices)
        assert cells[1:3] == [str(len(simplices)), str(touched)]
        tables = 8 * 2 * 8 * (3 * 10 * 4 + 11 * 3000 + 11 * 11 + 3000)
        assert float(cells[3]) == pytest.approx(tables + 4 * touched * 3000, rel=0.01)
        assert float(cells[-1]) < 1e-4  # of float32
    exact, estimated = (estimate.sweep(layer, hodgecover.edges(10), outcomes) for outcomes in (0, 256))
    assert [row[:2] for row in (sampled, *others)] == [[size, of] for of in ("pairs", "triangles")
                                                       for size in ("256", "512", "1024")]
    assert float(sampled[9]) == pytest.approx(mathx.spearman(estimated, exact), abs=1e-5)
    ranks = mathx.spearman(bench.harmonic(estimated, 10), bench.harmonic(exact, 10))
    assert float(sampled[10]) == pytest.approx(ranks, abs=1e-5) and ranks < 0.999
    assert sampled[7] == f"{(estimated[exact > 0] / exact[exact > 0] - 1).mean():+.2%}" and (exact > 0).sum() > 5


@pytest.mark.parametrize("experts", [3, 4])
def test_experts_that_always_go_together_are_no_sample(capsys, experts):
    """Merges of them cost nothing: there is no error to speak of."""
    status = run(bench, *SMALL, "--top-k", experts, "--experts", experts, "--tokens", 8, "--vocab", 300)
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (2, 1) and "no pairs of experts that are not always used together" in said


def test_the_merges_that_are_sampled_cost_something():
    layer = bench.random_layer(Shape(5, 2, 8, 4, 300, 300), 3, 1.0, torch.float64)
    gates = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).double() / 2
    layer = layer._replace(gates=gates)
    for members in (2, 3):
        simplices = torch.combinations(torch.arange(5), members)
        costs = estimate.sweep(layer, simplices) > 1e-12
        assert costs.any() and torch.equal(bench.costly_merges(layer, simplices), simplices[costs])


def test_the_floor_is_the_operations_at_the_rate_of_the_product(monkeypatch, capsys):
    """A product of 800 operations a second, and sweeps of twice the floor."""
    shape = Shape(10, 2, 8, 4, 3000, 3000)

    def timed(layer, simplices, rows, outcomes):
        touched, reads = bench.touched_pairs(layer, simplices), outcomes or 3000
        count = estimate.sweep_operations(shape._replace(outcomes=reads), 8, touched)
        return 2 * count / 800, 800
    monkeypatch.setattr(bench, "timed_sweep", timed)
    assert run(bench, *SMALL, "--experts", 10, "--tokens", 8, "--vocab", 3000) == 0
    exact, sampled = (part.splitlines() for part in capsys.readouterr().out.split("\n\n")[1:])
    for table in (exact, sampled):
        column = [cell.strip() for cell in table[0].split("|")].index("share of the product's rate")
        assert [line.split("|")[column].strip() for line in table[2:]] == ["50%"] * (len(table) - 2)
    assert len(exact) == 4 and len(sampled) == 8


def test_the_bench_fits_exponents(monkeypatch, capsys):
    def seconds(function, layer, simplices):
        return len(layer.gates[0]) ** 1.5 * len(layer.x) ** 0.5 * len(layer.unembedding) ** 0.25
    monkeypatch.setattr(bench, "SCALED", dict(hidden=8, width=4))
    monkeypatch.setattr(bench, "SCALED_SIZES", {"n": (8, 16, 32), "T": (2, 4), "V": (20, 40)})
    monkeypatch.setattr(bench, "seconds", seconds)
    assert run(bench, "--scaling", "--top-k", 2, "--tokens", 4, "--dtype", "float32") == 0
    said = capsys.readouterr().out
    touched = [float(cells[4]) for cells in table_rows(said)]
    assert touched[:3] == [4 * (n * (n - 1) - (n - 2) * (n - 3)) // 2 for n in (8, 16, 32)]
    slope = bench.slope((8, 16, 32), touched[:3])
    assert f"pairs: exponent in n of the touched pairs {slope:.2f}, of the time 1.50" in said and 1 < slope < 1.2
    for size, rows, time in (("T", "1.00", "0.50"), ("V", "0.00", "0.25")):
        assert f"\npairs: exponent in {size} of the touched pairs {rows}, of the time {time}" in said
    assert said.count("\n500 triangles: exponent in ") == 3


def test_the_bench_times_a_refit(capsys):
    assert run(bench, *SMALL, "--refit", 64) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 experts of 6, 64 tokens")
    assert f"{refit.refit_operations(64, 3, 2, 8, 4):.2e} operations" in said
    assert 0 < float(said.split("residual ")[1].split()[0]) < 1


def test_the_bench_times_gradients(monkeypatch, capsys):
    """Of all tokens: a pass forward, one back, and the steps of one training."""
    spent, seen, real = [2.0, 6.0, 8.0], [], model_io.run_layer

    def seconds(work):
        work()
        return spent.pop(0)

    def watched(h, *given):
        seen.append(h.shape[0] * h.shape[1])
        return real(h, *given)
    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(bench, "SEQ_LEN", 4)
    for module in (bench, model_io):
        monkeypatch.setattr(module, "run_layer", watched)
    assert run(bench, *SMALL, "--gradients", 40) == 0
    rows = table_rows(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [["forward pass", "2.0", "1.0 x"], ["pass back of heapr.py", "6.0", "3.0 x"],
                                         ["steps of distil.py: 2", "8.0", "4.0 x"]]
    assert sum(seen) == 4 * 40  # the first one warms up


def test_the_bench_times_every_method(monkeypatch, capsys):
    """By a clock that only what is watched moves on, each measurement once, though many methods share it."""
    clock, calls = [0.0], []

    def watch(module, name, cost):
        def watched(*given, real=getattr(module, name), **named):
            calls.append(name)
            clock[0] += cost
            return real(*given, **named)
        monkeypatch.setattr(module, name, watched)
    for module, costs in ((bench, {"mix_experts": 2}), (hodgecover, {"measure_layer": 200, "plan_from_signals": 6}),
                          (baselines, {"measure_routing": 4, "output_norms": 10, "flatness": 50, "layer_facts": 20,
                                       "choose": 1, "merged_layer": 8})):
        for name, cost in costs.items():
            watch(module, name, cost)
    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=lambda: clock[0]))
    monkeypatch.setattr(model_io, "TOKENS", 16)
    assert run(bench, *SMALL, "--vocab", 600, "--selectors") == 0
    said = capsys.readouterr().out
    assert "K = 3, " in said and "T = 16, " in said
    rows = {name: cells for name, *cells in table_rows(said)}
    measured = {"forward pass": 2, "routing": 4, "norms": 14, "weights": 54, "facts": 24, "barriers": 200}
    assert {name: rows.pop(name) for name in measured} == {
        name: [f"{cost:.3f}", f"{cost / 2:.2f} x"] for name, cost in measured.items()}
    own = {"hodgecover": 6} | dict.fromkeys(baselines.ON_BARRIERS, 7) | dict.fromkeys(baselines.MERGING, 8)
    start = dict.fromkeys(("random", "frequency", "reap"), "routing") | {"aimer": "weights"} | dict.fromkeys(
        ("hodgecover", *baselines.ON_BARRIERS, *baselines.MERGING_ON_BARRIERS), "barriers") | dict.fromkeys(
        baselines.MERGING_ON_FACTS, "facts")
    assert {*rows} == {"hodgecover", *baselines.METHODS}
    for method, cells in rows.items():
        shared = measured[start.get(method, "norms")]
        alone = own.get(method, 1) + 2 * (method == "ream")
        assert cells == [start.get(method, "norms"), f"{shared:.3f}", f"{alone:.3f}", f"{shared + alone:.3f}",
                         f"{(shared + alone) / 2:.2f} x"]
    assert [calls.count(name) for name in ("measure_layer", "layer_facts", "measure_routing")] == [1, 1, 4]


@pytest.mark.parametrize("options, says", [
    (["--scaling", "--refit", 64], "not allowed with argument"), (["--gradients", 0], "--gradients 0: must be from 1"),
    (["--gradients", 64, "--vocab", 99], "--vocab: --gradients does not use it"),
    (["--scaling", "--vocab", 99], "--vocab: --scaling does not use it"),
    (["--refit", 64, "--tokens", 99], "--tokens: --refit does not use it"),
    (["--refit", 0], "--refit 0: must be from 1"), (["--tokens", 0, "--selectors"], "--tokens 0: must be from 1"),
    (["--selectors", "--sample", 2], "--sample: --selectors does not use it"),
    (["--experts", 4], "--top-k 8: must be at most 4"),
    (["--experts", 12, "--refit", 9], "--top-k 8: must be at most 6"),
    (["--experts", 12, "--selectors"], "--top-k 8: must be at most 6"),
    (["--experts", 2], "--experts 2: must be from 3"), (["--hidden", 0], "--hidden 0: must be from 1"),
    (["--peak", -1], "--peak -1.0: must be"),
])
def test_the_bench_refuses_with_one_line(capsys, monkeypatch, options, says):
    monkeypatch.setattr(bench, "random_layer", refuse)
    assert_refused(capsys, run(bench, *options), says)


def test_the_bench_needs_tokens_for_the_experts_of_a_merge(capsys):
    assert run(bench, *SMALL, "--tokens", 1, "--vocab", 30, "--top-k", 1) == 2
    assert "--tokens 1: no pairs of experts that are not always used together" in capsys.readouterr().err


@pytest.mark.parametrize("module", [bench, estimate])
def test_the_documentation(module):
    assert doctest.testmod(module).failed == 0
