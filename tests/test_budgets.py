# SPDX-License-Identifier: MIT
"""Budgets of layers: both searches by their definitions and against exhaustive ones, and what the command writes."""
import doctest
import hashlib
import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path

import baselines
import budgets
import common
import distil
import estimate
import evaluate
import export_plan
import heapr
import hodgecover
import model_io
import nested
import pytest
import rco
import refit
import torch
import wanda
from conftest import (KINDS, PROSE, QUICK, assert_refused, assert_survives_kills, contents, named, record, refuse, run,
                      with_tokenizer)
from fake_device import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from model_io import Model

SEEDS = st.integers(0, 10**6)


def some_ids(count: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(0))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reap_plans(model: Model, ids: torch.Tensor, keep: int) -> dict[str, hodgecover.Plan]:
    return dict(baselines.select_model(model, ids, "reap", keep))


# ------------------------------------------------------------------------------------------------------------- ESAP


@settings(max_examples=20)
@given(seed=SEEDS)
def test_overlap_is_one_less_total_variation(seed):
    p, q = normal(seed, 4, 9).softmax(-1), (3 * normal(seed + 1, 4, 9)).softmax(-1)
    torch.testing.assert_close(budgets.overlap(p, q), 1 - (p - q).abs().sum(-1) / 2)
    accepted = (q * torch.clamp(p / q, max=1)).sum(-1)  # drafted from q, accepted with min(1, p / q)
    torch.testing.assert_close(budgets.overlap(p, q), accepted)
    assert torch.equal(budgets.overlap(p, q), budgets.overlap(q, p))
    torch.testing.assert_close(budgets.overlap(p, p), torch.ones(4, dtype=torch.float64))
    assert not budgets.overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))


def test_esap_is_a_mean_over_tokens():
    head, source, other = normal(0, 9, 5), normal(1, 2, 3, 5), normal(2, 2, 3, 5)
    found = budgets.esap(source, [source, other], head)
    wanted = [torch.minimum((a @ head.T).softmax(-1), (b @ head.T).softmax(-1)).sum().item()
              for a, b in zip(source.flatten(0, 1), other.flatten(0, 1))]
    assert found == pytest.approx([1, sum(wanted) / 6])


# ------------------------------------------------------------------------------- uniform, harmonic (B.3, equation 32)


def test_equation_32_by_hand():
    """The paper's 33% of OLMoE: 337 of 1,024 experts, 21 of each of 16 layers and one more of the first. The rate is
    decimal: 0.29 of 100 is 29, though the float is below."""
    assert budgets.experts_to_go(0.33, [64] * 16) == 337
    assert budgets.uniform_budget([64] * 16, 1, 337) == (22, *[21] * 15)
    assert budgets.experts_to_go(0.29, [50, 50]) == 29
    assert budgets.experts_to_go(0.5, [8, 8]) == 8 and budgets.uniform_budget([8, 8], 1, 8) == (4, 4)
    assert budgets.uniform_budget([8, 16, 12], 1, 11) == (4, 4, 3)  # the same of layers of any size
    assert budgets.uniform_budget([8, 8, 8], 1, 2) == (1, 1, 0)


def test_what_a_layer_cannot_lose_the_others_do():
    """Of 12 experts 4 of each would go. The second keeps 3 of its 5, and the 2 that are left go to the first and the
    third, then to the fourth of a larger budget."""
    assert budgets.uniform_budget([9, 5, 9], 3, 12) == (5, 2, 5)
    assert budgets.uniform_budget([9, 5, 9, 9], 3, 19) == (6, 2, 6, 5)
    assert budgets.uniform_budget([4, 4, 9], 1, 14) == (3, 3, 8)  # all that can go


COUNTS = st.lists(st.integers(3, 9), min_size=1, max_size=5)


@given(COUNTS, st.integers(1, 3), st.data())
def test_uniform_and_harmonic_by_brute_force(counts, least, data):
    """Word by word, with exact fractions: the whole parts; one more to each layer in turn, from the first."""
    capacity = [n - least for n in counts]
    total = data.draw(st.integers(0, sum(capacity)))
    shares = data.draw(st.lists(st.floats(0, 1), min_size=len(counts), max_size=len(counts)))
    sigma = [max(1 - Fraction(rho), Fraction(1, 10**12)) for rho in shares]

    def by_hand(weights) -> tuple[int, ...]:
        gone = [min(int(total * weight / sum(weights)), most) for weight, most in zip(weights, capacity)]
        while sum(gone) < total:
            for layer, most in enumerate(capacity):
                if gone[layer] < most and sum(gone) < total:
                    gone[layer] += 1
        return tuple(gone)
    assert budgets.uniform_budget(counts, least, total) == by_hand([Fraction(1)] * len(counts))
    found = budgets.harmonic_budget(shares, counts, least, total)
    assert sum(found) == total and all(0 <= gone <= most for gone, most in zip(found, capacity))
    exact = [total * weight / sum(sigma) for weight in sigma]
    if all(abs(each - round(each)) > 1e-6 for each in exact):  # 1 - rho is rounded
        assert found == by_hand(sigma)


def test_harmonic_takes_more_of_a_layer_of_less_harmonic_mass():
    """Of 10: 0.75, 0.5 and 0.25 of 1.5 are 5, 3.33 and 1.67. A layer that is all harmonic loses what is left."""
    assert budgets.harmonic_budget([0.25, 0.5, 0.75], [8, 8, 8], 1, 10) == (6, 3, 1)
    assert budgets.harmonic_budget([0.5, 0.5], [8, 8], 1, 7) == (4, 3)
    assert budgets.harmonic_budget([0.0, 1.0], [8, 8], 1, 5) == (5, 0)
    assert budgets.harmonic_budget([0.0, 1.0], [8, 8], 1, 9) == (7, 2)
    assert budgets.harmonic_budget([1.0, 1.0], [8, 8], 1, 5) == (3, 2)


def counts_in_config(path: Path) -> dict[int, set]:
    """The numbers of experts that config.json has for single layers."""
    raw = json.loads((path / "config.json").read_text())
    own = (raw.get("text_config") or raw).get("per_layer_config", {})
    return {int(layer): {*of.values()} for layer, of in own.items()}


def test_a_uniform_budget(small, tmp_path, capsys):
    """5 of 16 experts go, 3 of the first layer, in REAP's order. The configuration says so; of 6 it has one number."""
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(budgets, small, "uniform", "--rate", 0.33, *text, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "experts kept in each layer: 5 6\n" in said and "trust_remote_code=True" in said
    entry = record(tmp_path / "out")
    assert [entry["settings"][name] for name in ("search", "rate", "keep")] == ["uniform", 0.33, 5]
    assert counts_in_config(tmp_path / "out") == {0: {5}, 1: {6}}
    assert [config.num_experts for config in Model(tmp_path / "out").layer_configs] == [5, 6]
    assert run(baselines, small, "--keep", 5, "--method", "reap", *text, "--out", tmp_path / "reap") == 0
    for layer, reap, count in zip(entry["layers"], record(tmp_path / "reap")["layers"], (5, 6)):
        assert layer["order"] == reap["order"] and layer["survivors"] == sorted(reap["order"][:count])
    assert run(budgets, small, "uniform", "--rate", 0.375, *text, "--out", tmp_path / "even") == 0
    assert "trust_remote_code" not in capsys.readouterr().out.split("output")[-1]
    assert not counts_in_config(tmp_path / "even") and not (tmp_path / "even" / "modeling_per_layer.py").exists()
    assert (tmp_path / "even" / "model.safetensors").read_bytes() == \
        (tmp_path / "reap" / "model.safetensors").read_bytes()

    assert run(baselines, small, "--keep", 5, "--method", "frequency", *text, "--out", tmp_path / "few") == 0
    plan = ["--plan", tmp_path / "few" / "hodgecover.json"]
    assert run(budgets, small, "uniform", "--rate", 0.33, *plan, "--out", tmp_path / "by-plan") == 0
    orders = [layer["order"] for layer in record(tmp_path / "few")["layers"]]
    for layer, order, count in zip(record(tmp_path / "by-plan")["layers"], orders, (5, 6)):
        assert layer["order"] == order and layer["survivors"] == sorted(order[:count])
    capsys.readouterr()
    status = run(budgets, small, "uniform", "--rate", 0.33, *plan, "--tokens", 64, "--out", tmp_path / "no")
    assert_refused(capsys, status, "--tokens: uniform of a --plan does not use it")


@pytest.mark.parametrize("name", ["qwen2-dense-between", "qwen3_5-vision-mtp"])
def test_a_rate_is_of_the_decoder_s_sparse_layers(name, tmp_path):
    """A dense layer has none, and a multi-token head keeps the whole part of the others' mean."""
    (tmp_path / "text.txt").write_text(PROSE)
    source = with_tokenizer(named(name), tmp_path / "source")
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(budgets, source, "uniform", "--rate", 0.2, *text, "--out", tmp_path / "out") == 0
    layers = record(tmp_path / "out")["layers"]
    decoder = [layer for layer in layers if not layer["name"].startswith("mtp.")]
    gone = [8 - len(layer["survivors"]) for layer in decoder]
    total = 16 * len(decoder) // 10  # 0.2 of 8 each
    assert gone == [total // len(decoder) + (each < total % len(decoder)) for each in range(len(decoder))]
    for layer in layers:
        if layer not in decoder:
            assert len(layer["survivors"]) == (8 * len(decoder) - total) // len(decoder)
    Model(tmp_path / "out")


def test_a_harmonic_budget(small, tmp_path, capsys):
    """Of a plan of hodgecover.py: its order, and its rho_harm, here made far apart; a plan without is refused."""
    text, plan = ["--calib", tmp_path / "text.txt", *QUICK], tmp_path / "plan.json"
    assert run(hodgecover, small, "--keep", 5, "--plan-only", *text, "--out", plan) == 0
    made = json.loads(plan.read_text())
    layers = made["history"][-1]["layers"]
    shares = [layer["diagnostics"]["eta"]["harmonic"] for layer in layers]
    for given, gone in ((shares, budgets.harmonic_budget(shares, [8, 8], 3, 6)), ([0.9, 0.2], (1, 5)),
                        ([0.2, 0.9], (5, 1))):
        for layer, share in zip(layers, given):
            layer["diagnostics"]["eta"]["harmonic"] = share
        plan.write_text(json.dumps(made))
        out = tmp_path / f"out{given[0]}"
        assert run(budgets, small, "harmonic", "--rate", 0.375, "--plan", plan, "--out", out) == 0
        for layer, ranked, count in zip(record(out)["layers"], layers, gone):
            assert layer["order"] == ranked["order"] and layer["survivors"] == sorted(layer["order"][:8 - count])
        if gone[0] != gone[1]:
            assert counts_in_config(out) == {0: {8 - gone[0]}, 1: {8 - gone[1]}}
    said = record(out)["settings"]
    assert said["plan_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert said["rate"] == 0.375 and not {"tokens", "text"} & said.keys()

    assert run(baselines, small, "--keep", 4, "--method", "reap", *text, "--out", tmp_path / "few") == 0
    damaged = tmp_path / "damaged.json"
    for value in ("abc", None, {}, {"eta": 0.3}, *({"eta": {"harmonic": each}} for each in (True, -3, 1.1, "1", None))):
        layers[1]["diagnostics"] = value
        damaged.write_text(json.dumps(made))
        for path in (damaged, tmp_path / "few" / "hodgecover.json"):
            capsys.readouterr()
            status = run(budgets, small, "harmonic", "--rate", 0.375, "--plan", path, "--out", tmp_path / "a")
            assert_refused(capsys, status, f"{path}: has no harmonic shares; give a plan of hodgecover.py")
            assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------------------- budgets


@settings(max_examples=40)
@given(layers=st.lists(st.tuples(st.floats(0.01, 9), st.integers(1, 9)), min_size=1, max_size=6), share=st.floats(0, 1))
def test_shares_are_whole_and_sum_to_the_total(layers, share):
    weights, capacity = zip(*layers)
    total = round(share * sum(capacity))
    shares = budgets.largest_remainder(weights, capacity, total)
    assert sum(shares) == total and all(0 <= each <= most for each, most in zip(shares, capacity))
    wanted = [total * weight / sum(weights) for weight in weights]
    if all(exact <= most - 1 for exact, most in zip(wanted, capacity)):  # none is in the way of another
        assert all(abs(each - exact) < 1 for each, exact in zip(shares, wanted))
        lower = [exact - each for each, exact in zip(shares, wanted)]
        assert max(lower) - min(lower) < 1 + 1e-9  # none with a smaller remainder was rounded up


def test_the_first_generation_has_the_twelve_shapes():
    weights = budgets.first_weights(8, random.Random(0))
    assert len(weights) == budgets.POPULATION == 32
    uniform, up, down, mid, edges, front, back, early, late, alternate, flat, *others = weights
    assert uniform == [1] * 8 and up == [*range(1, 9)] == down[::-1]
    assert mid == [1, 2, 3, 4, 4, 3, 2, 1] and edges == [4.5, 3.5, 2.5, 1.5, 1.5, 2.5, 3.5, 4.5]
    assert front == pytest.approx([0.7**i + 1e-4 for i in range(8)]) and back == pytest.approx(
        [1.3**i for i in range(8)])
    assert early == [2, 2, 1, 1, 1, 1, 1, 1] == late[::-1] and alternate == [2, 1] * 4
    assert flat == pytest.approx([0.5 + 0.5 * (1 - abs(2 * i / 7 - 1)) for i in range(8)])
    assert len({*map(tuple, others)}) == 21


@settings(max_examples=60)
@given(seed=SEEDS, capacity=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_every_mutant_keeps_the_sum_and_the_capacity(seed, capacity):
    rng = random.Random(seed)
    budget = tuple(rng.randint(0, most) for most in capacity)
    for _ in range(5):
        child = budgets.mutated(budget, capacity, rng)
        assert sum(child) == sum(budget) and all(0 <= gone <= most for gone, most in zip(child, capacity))
        moved = sum(abs(a - b) for a, b in zip(budget, child)) / 2
        assert moved <= budgets.MAX_MOVES * budgets.MAX_DELTA
        budget = child


def test_mutants_are_various():
    children = {budgets.mutated((8, 8, 8, 8), [16] * 4, random.Random(seed)) for seed in range(300)}
    moved = {sum(abs(gone - 8) for gone in child) // 2 for child in children}
    changed = {sum(gone != 8 for gone in child) for child in children}
    assert moved >= {1, 2, 3, 4, 5, 6, 7, 8} and changed - {0} == {2, 3, 4}


@settings(max_examples=10)
@given(seed=SEEDS)
def test_the_search_finds_the_best_of_all_small_budgets(seed):
    """Three layers that can lose 3 of 4 experts, 5 to go, of random worth; each budget is asked about once; the best
    never gets worse."""
    everything = [each for each in itertools.product(range(4), repeat=3) if sum(each) == 5]
    worth, asked = dict(zip(everything, normal(seed, len(everything)).tolist())), []

    def of(new):
        asked.extend(new)
        return [worth[budget] for budget in new]
    found = list(budgets.evolve(budgets.remembered(of), [3] * 3, 5, 12, seed))
    values = [value for _, value in found]
    assert found[-1] == max(worth.items(), key=lambda item: item[1]) and len(values) == 12
    assert values == sorted(values) and len(asked) == len({*asked})


def exported(model: Model, plans: dict[str, hodgecover.Plan], out: Path) -> Model:
    """The checkpoint of plans by layer name."""
    common.export(model, plans, out, {})
    return Model(out, model.dtype)


def test_the_search_finds_the_best_of_all_in_a_model(tmp_path):
    """Exhaustively over the budgets of three layers of 8 experts, top-3, of which 12 of 24 stay; and what a budget is
    worth is what its plan's model gives."""
    model, ids = Model(named("olmoe-sharded")), some_ids(2)
    orders = budgets.decoder_orders(model, reap_plans(model, ids, 4))
    of = budgets.remembered(budgets.esap_of(model, ids, orders))
    everything = [each for each in itertools.product(range(6), repeat=3) if sum(each) == 12]
    values = dict(zip(everything, of(everything)))
    *_, (best, value) = budgets.evolve(of, [5] * 3, 12, 12, 3)
    assert value == max(values.values()) == values[best] and len({*values.values()}) == len(values) == 10
    base = reap_plans(model, ids, 4)
    plans = budgets.planned(model, base, orders, best, 4)
    assert [len(plan.survivors) for plan in plans.values()] == [8 - gone for gone in best]
    logits = [each.logits(ids).softmax(-1) for each in (model, exported(model, plans, tmp_path / "out"))]
    assert value == pytest.approx(torch.minimum(*logits).sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
def test_streams_of_several_budgets_are_those_of_each_alone(path):
    """In every family, as masking the router's logits gives them."""
    model, ids = Model(path, torch.float64), some_ids()
    base = reap_plans(model, ids, 5)
    orders = budgets.decoder_orders(model, base)
    layers = len(orders)
    assert layers == sum(index < model.config.num_layers for index in hodgecover.sparse_layers(model))
    chosen = [(3,) * layers, (0,) * layers, (5, *[1] * (layers - 1)), (5, *[2] * (layers - 1))]
    for budget, found in zip(chosen, budgets.last_streams(model, ids, orders, chosen)):
        torch.testing.assert_close(found, masked_router(path, orders, budget).hidden(ids), rtol=1e-9, atol=1e-11)


def masked_router(path, orders, budget) -> Model:
    """The model whose router gives -infinity to the experts that go, by a huge bias that its rows do not have."""
    gone = {name: order[len(order) - count:] for (name, order), count in zip(orders.items(), budget)}

    class Masked(Model):
        def layer(self, index):
            layer = super().layer(index)
            layer.banned = gone.get(self.layer_names[index])
            return layer

        def run(self, index, layer, *given):
            real = model_io.route

            def route(x, layer, cfg):
                logits = x @ layer.router.T
                logits[:, layer.banned or []] = -torch.inf
                top, at = logits.softmax(-1).topk(cfg.top_k)
                top = top / top.sum(-1, keepdim=True) if cfg.norm_topk_prob else top
                return torch.zeros_like(logits).scatter(1, at, top)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(model_io, "route", route)
                found = super().run(index, layer, *given)
            assert model_io.route is real
            return found
    return Masked(path, torch.float64)


def test_a_layer_is_read_once_for_all_budgets_and_memory_splits_them(monkeypatch):
    model, ids = Model(named("olmoe-plain")), some_ids()
    orders = budgets.decoder_orders(model, reap_plans(model, ids, 4))
    chosen, read, real = [(1, 2), (1, 3), (2, 0), (0, 0)], [], Model.layer
    whole = budgets.esap_of(model, ids, orders)
    monkeypatch.setattr(Model, "layer", lambda self, index: read.append(index) or real(self, index))
    found = whole(chosen)
    assert read == [0, 1] and found[3] == pytest.approx(1)
    split = budgets.esap_of(model, ids, orders, memory=2 * 2 * ids.numel() * 32 * 4)
    read.clear()
    assert split(chosen) == found and read == [0, 1, 0, 1]


# -------------------------------------------------------------------------------------------------------------- RCO


@settings(max_examples=20)
@given(seed=SEEDS, groups=st.integers(1, 3))
def test_the_normal_is_the_gradient_and_a_projected_step_is_orthogonal(seed, groups):
    alpha = (3 * normal(seed, groups, 5, 2)).requires_grad_()
    for group in range(groups):
        gradient, = torch.autograd.grad(rco.expected_cost(alpha)[group], alpha)
        torch.testing.assert_close(rco.normal(alpha)[group], gradient[group])
    way = normal(seed + 1, groups, 5, 2)
    projected = rco.onto_tangent(way, alpha)
    torch.testing.assert_close((projected * rco.normal(alpha)).sum((1, 2)), torch.zeros(groups, dtype=torch.float64))
    torch.testing.assert_close(rco.onto_tangent(projected, alpha), projected)
    away = (way - projected) / rco.normal(alpha)
    assert torch.allclose(away, away[:, :1, :1].expand_as(away))  # what went is along the normal


@settings(max_examples=20)
@given(seed=SEEDS, size=st.sampled_from([0.1, 5.0, 60.0]), gone=st.integers(1, 6))
def test_the_retraction_is_on_the_surface_and_a_shift_of_prune_logits(seed, size, gone):
    alpha = size * normal(seed, 3, 7, 2)
    found = rco.retracted(alpha, gone)
    torch.testing.assert_close(rco.expected_cost(found), torch.full((3,), float(gone), dtype=torch.float64), rtol=0,
                               atol=1e-9)
    assert torch.equal(found[..., 0], alpha[..., 0])
    shift = found[..., 1] - alpha[..., 1]
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-9)
    costs = torch.stack([rco.expected_cost(alpha + step * rco.COSTS) for step in torch.linspace(-9, 9, 20)])
    assert (costs.diff(dim=0) >= 0).all()  # why there is one shift, and bisection finds it


def test_equal_logits_start_at_the_log_odds_of_the_budget():
    cfg = Model(named("olmoe-plain")).config
    alpha, limits = rco.start(cfg, 2, 5, ragged=True)
    assert (alpha.shape, limits) == ((1, 16, 2), (2, 6, 3))
    wanted = torch.tensor([0.0, math.log(6 / 10)], dtype=torch.float64).expand(1, 16, 2)
    torch.testing.assert_close(rco.retracted(alpha, limits.gone), wanted)
    alpha, limits = rco.start(cfg, 2, 5, ragged=False)
    assert (alpha.shape, limits) == ((2, 8, 2), (2, 3, 3))


@settings(max_examples=30)
@given(seed=SEEDS, ragged=st.booleans())
def test_a_mask_prunes_the_budget_s_worst_and_leaves_the_top_k(seed, ragged):
    limits = rco.Limits(3, 9 if ragged else 3, 3)
    alpha = normal(seed, *((1, 18, 2) if ragged else (3, 6, 2)))
    mask = rco.best_mask(alpha, limits)
    score = (alpha[..., 1] - alpha[..., 0]).view(3, 6)
    assert mask.sum() == 9 and (mask.sum(1) >= 3).all() and {*mask.unique().tolist()} == {0, 1}
    if not ragged:
        assert (mask.sum(1) == 3).all()
    for kept, own in zip(mask, score):  # in each layer the worst go
        assert (mask.sum() == 0) or not (kept == 0).any() or own[kept == 0].min() >= own[kept == 1].max()
    free = score.scatter(1, score.topk(3, largest=False).indices, -torch.inf)
    assert not ragged or free[mask == 0].min() >= free[mask == 1].max()  # and in all layers together
    orders, gone = rco.rank(alpha, ["a", "b", "c"], limits)
    for order, count, kept in zip(orders.values(), gone, mask):
        assert sorted(order[:6 - count]) == kept.nonzero().flatten().tolist()


def test_the_sampled_mask_is_hard_and_its_slope_soft():
    """With the noise by hand; and the share of samples in which an expert goes follows its logits."""
    limits, alpha = rco.Limits(1, 2, 1), normal(0, 1, 5, 2).requires_grad_()
    mask = rco.sampled_mask(alpha, 0.5, limits, torch.Generator().manual_seed(7))
    uniform = torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noisy = (alpha - (-uniform.log()).log()) / 0.5
    assert torch.equal(mask, rco.best_mask(noisy.detach(), limits)) and mask.sum() == 3
    weights = normal(1, 1, 5)
    found, wanted = (torch.autograd.grad((weights * each).sum(), alpha, retain_graph=True)[0]
                     for each in (mask, noisy.softmax(-1)[..., 0]))
    torch.testing.assert_close(found, wanted)
    alpha, generator = torch.zeros(1, 3, 2, dtype=torch.float64), torch.Generator().manual_seed(0)
    alpha[0, 0, 1] = 4.0
    often = sum(1 - rco.sampled_mask(alpha, 1.0, rco.Limits(1, 1, 1), generator)[0, 0].item() for _ in range(200))
    assert 150 < often < 200


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen2-renormalised", "qwen3_5-text"])
def test_a_masked_layer_by_its_definition(name):
    """Token by token; nothing masked is the layer; and the slope of each expert's mask, of those with mask 0 too, is
    that of finite differences."""
    model, ids = Model(named(name), torch.float64), some_ids(1, 10)
    step = next(step for step in model.stream(ids) if step.gates is not None)
    layer, cfg = model.layer(step.index), model.config
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    ones = rco.masked_layer(step.h, torch.ones(8, dtype=torch.float64), layer, cfg)
    torch.testing.assert_close(ones, step.y.view_as(step.h), rtol=1e-12, atol=1e-12)
    found = rco.masked_layer(step.h, mask, layer, cfg).flatten(0, 1)
    for t, gates in enumerate(step.gates):
        left = gates * mask
        scaled = left * gates.sum() / left.sum() if left.any() else left
        change = sum((scaled[e] - gates[e]) * layer.experts(e, step.x[t:t + 1])[0] for e in range(8))
        torch.testing.assert_close(found[t], step.y[t] + change)
    soft, way = mask * 0.5 + 0.3, normal(3, *step.h.shape)

    def value(mask: torch.Tensor) -> torch.Tensor:
        return (rco.masked_layer(step.h, mask, layer, cfg) * way).sum()
    for start in (soft, mask):
        gradient, = torch.autograd.grad(value(start.requires_grad_()), start)
        for e in range(8):
            move = torch.zeros(8, dtype=torch.float64).index_fill(0, torch.tensor(e), 1e-6)
            with torch.no_grad():
                slope = (value(start + move) - value(start - move)) / 2e-6
            assert gradient[e].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)
    assert gradient[mask == 0].any()


def test_a_token_that_keeps_no_expert_has_a_finite_slope():
    model, ids = Model(named("olmoe-plain"), torch.float64), some_ids(1, 6)
    step = next(model.stream(ids))
    mask = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    y = rco.masked_layer(step.h, mask, model.layer(0), model.config)
    gradient, = torch.autograd.grad(y.square().sum(), mask)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e3


def test_the_loss_is_of_the_source_s_most_likely_tokens(monkeypatch):
    """The source renormalised over them, the student over all tokens."""
    monkeypatch.setattr(rco, "TOP", 4)
    head, hidden, target = normal(0, 9, 5), normal(1, 1, 2, 5), normal(2, 1, 2, 5)
    wanted = own_loss = 0.0
    for own, of_source in zip(hidden[0], target[0]):
        p, q = (head @ of_source).softmax(0), (head @ own).softmax(0)
        top = sorted(range(9), key=lambda v: -p[v].item())[:4]
        own_loss -= p[top].sum().log().item() / 2
        p, q = p[top] / p[top].sum(), q[top]
        wanted += (p * (p / q).log()).sum().item() / 2
    assert rco.top_kl(hidden, target, head).item() == pytest.approx(wanted)
    assert rco.top_kl(target, target, head).item() == pytest.approx(own_loss)
    monkeypatch.setattr(rco, "TOP", 99)  # more than there are
    assert rco.top_kl(hidden, target, head).isfinite()
    assert rco.top_kl(target, target, head).item() == pytest.approx(0, abs=1e-12)


def test_the_loss_by_hand(monkeypatch):
    """The source's (4, 2, 1, 1) / 8 is (2/3, 1/3) over its top two, for which the student has 1/8 and 2/8: the loss is
    2/3 log(16/3) + 1/3 log(4/3). The student renormalised, too, would have 2/3 log 2 + 1/3 log 1/2 = 0.231049."""
    monkeypatch.setattr(rco, "TOP", 2)
    source, student = (torch.tensor([[each]], dtype=torch.float64).log() for each in ([4, 2, 1, 1], [1, 2, 1, 4]))
    loss = rco.top_kl(student, source, torch.eye(4, dtype=torch.float64))
    assert loss.item() == pytest.approx(1.211878, abs=1e-6)


@pytest.mark.parametrize("name", ["olmoe-sharded", "qwen2-dense-between"])
def test_the_slope_through_the_model_is_that_of_one_graph_whatever_is_in_memory(name, monkeypatch):
    """Layers read again on the way back, and all held: the loss and gradient of one graph through all layers."""
    model, ids, which = Model(named(name), torch.float64), some_ids(4), torch.tensor([2, 0])
    sparse = [index for index in hodgecover.sparse_layers(model) if index < model.config.num_layers]
    masks = (0.5 + 0.1 * normal(0, len(sparse), 8)).requires_grad_()
    h = model.embed(ids[which])
    for index in range(model.config.num_layers):
        layer = model.layer(index)
        if index in sparse:
            h = rco.masked_layer(h, masks[sparse.index(index)], layer, model.config)
        else:
            h = model_io.run_layer(h, layer, model.config)[2].view_as(h)
    wanted = rco.top_kl(model.norm("model.norm.weight")(h), model.hidden(ids)[which], model.unembedding())
    gradient, = torch.autograd.grad(wanted, masks)
    read, real = [], Model.layer
    monkeypatch.setattr(Model, "layer", lambda self, index: read.append(index) or real(self, index))
    for memory, reads in ((1, 3), (10**9, 2)):  # of the first sparse layer: for the source, forward, back
        loss_of = rco.masked_loss(model, ids, sparse, memory)
        loss, slope = loss_of(masks.detach(), which)
        assert loss == pytest.approx(wanted.item()) and read.count(sparse[0]) == reads
        torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-14)
        read.clear()
    target = model.hidden(ids)[[1]]
    least = rco.top_kl(target, target, model.unembedding()).item()  # of the source itself
    assert loss_of(torch.ones_like(masks), torch.tensor([1]))[0] == pytest.approx(least)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_descent_finds_planted_experts_and_stays_on_the_surface(ragged, monkeypatch):
    """A loss that wants some experts more than others."""
    limits = rco.Limits(3, 9 if ragged else 3, 2)
    value = normal(5, 3, 6)
    alpha = torch.zeros(1, 18, 2, dtype=torch.float64) if ragged else torch.zeros(3, 6, 2, dtype=torch.float64)
    seen = []

    def loss_of(masks, which):
        seen.append(which.tolist())
        return -(masks * value).sum().item(), -value
    for done, _ in rco.descend(loss_of, 9, alpha, limits, 20):
        cost = rco.expected_cost(alpha.detach())
        assert torch.allclose(cost, torch.full_like(cost, limits.gone), atol=1e-9)
    plain = torch.stack((value, torch.zeros(3, 6, dtype=torch.float64)), -1).view(alpha.shape)
    assert torch.equal(rco.best_mask(alpha.detach(), limits), rco.best_mask(plain, limits))
    assert done == 20 and len(seen) == 20 * rco.NOISES
    assert all(len({*which}) == rco.SEQUENCES and max(which) < 9 for which in seen)


def test_the_steps_are_adam_s_with_projection_retraction_and_transport():
    """Three steps by their formulas, from the gradients that the samples give."""
    alpha, limits, weights = normal(1, 2, 4, 2), rco.Limits(2, 2, 1), normal(2, 2, 4)
    generator = torch.Generator().manual_seed(4)
    plain, m, v = rco.retracted(alpha, 2), 0.0, 0.0
    for step in range(3):
        gradient, tau = 0.0, 0.05 ** (step / 2)
        for _ in range(rco.NOISES):
            torch.randperm(5, generator=generator)
            leaf = plain.clone().requires_grad_()
            mask = rco.sampled_mask(leaf, tau, limits, generator)
            gradient = gradient + torch.autograd.grad((mask * weights).sum(), leaf)[0] / rco.NOISES
        g = rco.onto_tangent(gradient, plain)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        way = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        plain = rco.retracted(plain - 0.1 * way, 2)
        m = rco.onto_tangent(m, plain)
    list(rco.descend(lambda masks, which: (0.0, weights), 5, alpha, limits, 3, seed=4))
    torch.testing.assert_close(alpha.detach(), plain, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def quick(monkeypatch):
    """Few candidates and noises."""
    monkeypatch.setattr(budgets, "POPULATION", 12)
    monkeypatch.setattr(rco, "NOISES", 1)


def work(small, tmp_path, *more: object, keep: int = 4) -> list:
    return [small, *more, "--keep", keep, "--calib", tmp_path / "text.txt", "--tokens", 64, "--seq-len", 16, "--dtype",
            "float32"]


EVO, RCO, RAGGED = ["evo", "--generations", 2], ["rco", "--steps", 3], ["rco", "--steps", 3, "--ragged"]


def test_every_family(family, tmp_path, quick, capsys):
    """rco writes a checkpoint of ordinary layout, whose plan can be exported again; evo a ragged one."""
    given_files, source = contents(family), Model(family)
    assert run(budgets, *work(family, tmp_path, "rco", "--steps", 1), "--out", tmp_path / "out") == 0
    assert f"output: {tmp_path / 'out'}" in capsys.readouterr().out
    layers = record(tmp_path / "out")["layers"]
    assert [layer["name"] for layer in layers] == [source.layer_names[i] for i in hodgecover.sparse_layers(source)]
    assert all(sorted(layer["order"][:4]) == layer["survivors"] and sorted(layer["order"]) == [*range(8)]
               for layer in layers)
    assert run(export_plan, family, tmp_path / "out" / "hodgecover.json", "--out", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    check_ragged(family, tmp_path, "evo", "--generations", 1)
    assert "export_plan.py writes its checkpoint" in capsys.readouterr().out
    assert contents(family) == given_files and not [*tmp_path.glob("*-budgets")]


def check_ragged(source, tmp_path, *search: object) -> None:
    """A search whose plan keeps 4 experts on average, the top-k at least, and 4 in a multi-token head."""
    assert run(budgets, *work(source, tmp_path, *search), "--plan-only", "--out", tmp_path / "plan.json") == 0
    entry = json.loads((tmp_path / "plan.json").read_text())["history"][-1]
    decoder = [layer for layer in entry["layers"] if not layer["name"].startswith("mtp.")]
    assert sum(len(layer["survivors"]) for layer in decoder) == 4 * len(decoder)
    assert all(len(layer["survivors"]) >= 3 for layer in decoder)
    assert all(len(layer["survivors"]) == 4 for layer in entry["layers"] if layer not in decoder)
    assert (entry["command"], entry["settings"]["search"]) == ("budgets.py", search[0])


@pytest.mark.parametrize("name", ["qwen2-dense-between", "qwen3_5-vision-mtp"])
def test_a_ragged_rco(name, tmp_path, quick):
    (tmp_path / "text.txt").write_text(PROSE)
    check_ragged(with_tokenizer(named(name), tmp_path / "source"), tmp_path, *RAGGED)


# ------------------------------------------------------------------------------------------------ ragged checkpoints

@pytest.fixture
def ragged(tmp_path, request) -> tuple[Path, Path]:
    """A golden checkpoint, and what the budget (5, 4, 3, ...) of its layers makes of it; 4 in a multi-token head."""
    source = with_tokenizer(request.param, tmp_path / "source")
    (tmp_path / "text.txt").write_text(PROSE)
    model = Model(source)
    plans = reap_plans(model, some_ids(), 4)
    for name, count in zip((name for name in plans if not name.startswith("mtp.")), (5, 4, 3, 6)):
        plans[name] = plans[name]._replace(survivors=sorted(plans[name].order[:count]))
    entry = hodgecover.plan_entry(model, plans, 4, hodgecover.Settings(), None)
    common.export(model, plans, tmp_path / "ragged", entry)
    return source, tmp_path / "ragged"


@pytest.mark.parametrize("ragged", KINDS, ids=lambda path: path.name, indirect=True)
def test_a_ragged_checkpoint(ragged):
    """Its configuration tells each layer's number; kept tensors are the source's, byte for byte, and it is the model
    whose router never takes the other experts."""
    source, output = map(Model, ragged)
    layers = [layer for layer in record(ragged[1])["layers"] if not layer["name"].startswith("mtp.")]
    raw = json.loads((ragged[1] / "config.json").read_text())
    own = (raw.get("text_config") or raw)["per_layer_config"]
    assert {int(i): {*of.values()} for i, of in own.items()} == {
        layer["layer"]: {len(layer["survivors"])} for layer in layers}
    assert raw["auto_map"] and (ragged[1] / "modeling_per_layer.py").is_file()
    assert [config.num_experts for config in output.layer_configs if config.sparse][:2] == [5, 4]
    for layer in layers:
        kept, whole = (model.layer(layer["layer"]) for model in (output, source))
        assert torch.equal(kept.router, whole.router[layer["survivors"]])
        assert all(torch.equal(a, b[layer["survivors"]]) for a, b in zip(kept.experts, whole.experts))
    wide, orders = Model(ragged[1], torch.float64), {layer["name"]: layer["order"] for layer in layers}
    budget = [len(layer["order"]) - len(layer["survivors"]) for layer in layers]
    torch.testing.assert_close(wide.hidden(some_ids()), masked_router(source.checkpoint.path, orders, budget).hidden(
        some_ids()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ragged", [named("qwen3_5-vision-mtp"), named("olmoe-sharded")], ids=str, indirect=True)
def test_every_command_takes_a_ragged_checkpoint(ragged, tmp_path, quick, capsys):
    """As its input and as its source. Those that keep all experts keep the layers' numbers, the others may end them."""
    source, output = ragged
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    layers = len(Model(output).layer_configs)

    def counts(name: str) -> list[int]:
        model = Model(tmp_path / name)
        assert ("auto_map" in model.checkpoint.raw_config) == (tmp_path / name / "modeling_per_layer.py").is_file()
        assert all(step.y.isfinite().all() for step in model.stream(some_ids()))
        return [config.num_experts for config in model.layer_configs]
    before = counts("ragged")
    assert run(export_plan, source, output / "hodgecover.json", "--out", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(output)
    for name, command, options in (
            ("wanda", wanda, [output, "--rate", 0.5, *text]), ("narrow", heapr, [output, "--width", 8, *text]),
            ("refit", refit, [source, output, *text]), ("nested", nested, [output, *text]),
            ("distil", distil, [source, output, *text]), ("layerwise", distil, [source, output, "--layerwise", *text]),
            ("of narrow", refit, [output, tmp_path / "narrow", *text])):
        assert run(command, *options, "--out", tmp_path / name) == 0
        assert counts(name) == before
    assert run(evaluate, source, output, "--text", tmp_path / "text.txt", "--seq-len", 32) == 0
    assert run(estimate, output, "--keep", 3, *QUICK) == 0
    for name, command, options in (("hodge", hodgecover, []), ("reap", baselines, ["--method", "reap"]),
                                 ("merge", baselines, ["--method", "hc-smoe"])):
        assert run(command, output, "--keep", 3, *options, *text, "--out", tmp_path / name) == 0
        assert counts(name) == [3] * layers
    assert run(nested, tmp_path / "nested", "--slice", "3,8", "--out", tmp_path / "slice") == 0
    assert counts("slice") == [3] * layers
    capsys.readouterr()
    assert_refused(capsys, run(hodgecover, output, "--keep", 4, *text, "--out", tmp_path / "no"), "--keep 4: must be")
    assert_refused(capsys, run(budgets, output, "rco", "--keep", 3, *text, "--out", tmp_path / "no"), "rco takes one")
    assert run(budgets, output, "evo", "--keep", 3, "--generations", 1, *text, "--out", tmp_path / "fewer") == 0


@given(st.lists(st.floats(0, 10), min_size=2, max_size=3), st.integers(2, 16))
def test_the_budget_of_barriers_is_near_the_best_for_its_loss(means, keep):
    """Among all budgets, of the sum of barriers over experts that stay: 16 experts a layer, 1 at least."""
    assert budgets.barrier_budget([1.0, 4.0], [30, 30], 2, 9) == (24, 18)
    def loss(kept) -> float:
        return sum(mean / count for mean, count in zip(means, kept))
    kept = [16 - gone for gone in budgets.barrier_budget(means, [16] * len(means), 1, keep)]
    assert sum(kept) == keep * len(means) and all(1 <= count <= 16 for count in kept)
    every = itertools.product(range(1, 17), repeat=len(means))
    assert loss(kept) <= 1.1 * min(loss(budget) for budget in every if sum(budget) == sum(kept)) + 1e-12


@given(st.lists(st.lists(st.floats(0.01, 9), min_size=5, max_size=8), min_size=1, max_size=4), st.integers(2, 4))
def test_the_budget_of_coverage_holds_one_share_of_the_mass(saliencies, keep):
    """By bisection for the share: the fewest experts that hold it, 2 at least, come to the same budget."""
    def fewest(each: list[float], share: float) -> int:
        mass = [0.0, *itertools.accumulate(each)]
        return max(2, next(count for count, held in enumerate(mass) if held >= share * mass[-1] - 1e-12))
    counts = [len(each) - gone for each, gone in zip(saliencies, budgets.coverage_budget(saliencies, 2, keep))]
    assert sum(counts) == keep * len(saliencies)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        enough = sum(fewest(each, share) for each in saliencies) >= sum(counts)
        low, high = (low, share) if enough else (share, high)
    for each, count in zip(saliencies, counts):
        assert fewest(each, low - 1e-9) <= count <= fewest(each, high + 1e-9)


def test_a_budget_by_coverage(small, tmp_path, capsys):
    """Of REAP's saliency, or of a plan's in its order."""
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(budgets, small, "coverage", "--keep", 4, *text, "--out", tmp_path / "out") == 0
    assert run(baselines, small, "--keep", 5, "--method", "frequency", *text, "--out", tmp_path / "few") == 0
    plan = ["--plan", tmp_path / "few" / "hodgecover.json"]
    assert run(budgets, small, "coverage", "--keep", 4, *plan, "--out", tmp_path / "by-plan") == 0
    for name in ("out", "by-plan"):
        layers = record(tmp_path / name)["layers"]
        ranked = [[layer["saliency"][e] for e in layer["order"]] for layer in layers]
        gone = budgets.coverage_budget(ranked, 3, 4)
        assert [len(layer["survivors"]) for layer in layers] == [8 - each for each in gone]
        assert all(layer["survivors"] == sorted(layer["order"][:len(layer["survivors"])]) for layer in layers)
    capsys.readouterr()
    status = run(budgets, small, "coverage", "--keep", 4, *plan, "--tokens", 64, "--out", tmp_path / "no")
    assert_refused(capsys, status, "--tokens: coverage of a --plan does not use it")


def test_a_budget_by_barriers(small, tmp_path, capsys):
    """Of a plan of hodgecover.py: its order, and as many experts as its mean barriers say."""
    text, plan, out = ["--calib", tmp_path / "text.txt", *QUICK], tmp_path / "plan.json", tmp_path / "ragged.json"
    assert run(hodgecover, small, "--keep", 5, "--plan-only", *text, "--out", plan) == 0
    assert run(budgets, small, "barriers", "--keep", 4, "--plan", plan, "--plan-only", "--out", out) == 0
    given, found = (json.loads(path.read_text())["history"][-1] for path in (plan, out))
    gone = budgets.barrier_budget([layer["diagnostics"]["mean_barrier"] for layer in given["layers"]], [8, 8], 3, 4)
    for layer, ranked, count in zip(found["layers"], given["layers"], gone):
        assert layer["order"] == ranked["order"] and layer["survivors"] == sorted(layer["order"][:8 - count])
    assert found["settings"]["plan_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert found["settings"]["search"] == "barriers" and not {"tokens", "text"} & found["settings"].keys()
    assert f"experts kept in each layer: {8 - gone[0]} {8 - gone[1]}\n" in capsys.readouterr().out

    assert run(baselines, small, "--keep", 4, "--method", "reap", *text, "--out", tmp_path / "few") == 0
    capsys.readouterr()
    whole, damaged = plan.read_text(), tmp_path / "damaged.json"
    for value in ([1], "abc", None, *({"mean_barrier": each} for each in (True, -3, 10**400, "1", None))):
        found = json.loads(whole)
        found["history"][-1]["layers"][1]["diagnostics"] = value
        damaged.write_text(json.dumps(found))
        for path in (damaged, tmp_path / "few" / "hodgecover.json"):
            status = run(budgets, small, "barriers", "--keep", 4, "--plan", path, "--out", tmp_path / "a")
            assert_refused(capsys, status, "has no mean barriers; give a plan of hodgecover.py")


def test_the_order_of_a_plan(small, tmp_path, quick, capsys):
    """The first experts of each layer's order stay."""
    text = ["--calib", tmp_path / "text.txt", *QUICK]
    assert run(baselines, small, "--keep", 6, "--method", "random", *text, "--out", tmp_path / "few") == 0
    orders = {layer["name"]: layer["order"] for layer in record(tmp_path / "few")["layers"]}
    assert run(budgets, *work(small, tmp_path, *EVO), "--plan", tmp_path / "few" / "hodgecover.json", "--plan-only",
               "--out", tmp_path / "plan.json") == 0
    for layer in json.loads((tmp_path / "plan.json").read_text())["history"][-1]["layers"]:
        assert layer["order"] == orders[layer["name"]]
        assert layer["survivors"] == sorted(layer["order"][:len(layer["survivors"])])


@pytest.mark.parametrize("search", [EVO, RCO, RAGGED], ids=["evo", "rco", "ragged"])
def test_a_killed_search_continues_to_the_same_bytes(search, tmp_path, quick, monkeypatch):
    """Killed in each generation or step in turn; none is measured twice. Then the folder goes."""
    (tmp_path / "text.txt").write_text(PROSE)
    source = with_tokenizer(named("olmoe-sharded"), tmp_path / "source")
    arguments = work(source, tmp_path, *search, keep=5)
    step, parts = ((budgets, "esap"), 2) if search == EVO else ((rco, "top_kl"), 3)
    assert_survives_kills(monkeypatch, step, parts, budgets, *arguments, folder=tmp_path)
    assert not (tmp_path / "out-budgets").exists()


def test_a_search_does_not_go_on_where_another_was_killed(small, tmp_path, quick, monkeypatch):
    assert run(budgets, *work(small, tmp_path, *RCO), "--out", tmp_path / "undisturbed") == 0
    with monkeypatch.context() as patch:
        patch.setattr(rco, "rank", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(budgets, *work(small, tmp_path, *RCO, keep=5), "--out", tmp_path / "out") == 130
    assert run(budgets, *work(small, tmp_path, *RCO), "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == \
        (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
    assert not (tmp_path / "out-budgets").exists()


def test_what_is_saved_of_another_search_is_not_taken():
    model, ids = Model(named("olmoe-plain")), some_ids()
    keys = [budgets.search_key(*given) for given in (
        (model, ids, "rco", 4), (Model(named("olmoe-sharded")), ids, "rco", 4), (model, ids + 1, "rco", 4),
        (model, ids.view(1, -1), "rco", 4), (Model(named("olmoe-plain"), torch.float64), ids, "rco", 4),
        (model, ids, "rco", 5), (model, ids, "evo", {"layer": [1, 0]}), (model, ids, "evo", {"layer": [0, 1]}))]
    assert len({json.dumps(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("search", [["evo", "--generations", 1], ["rco", "--steps", 1]], ids=["evo", "rco"])
def test_on_another_device(search, small, tmp_path, quick):
    for device in ("fake", "cpu"):
        with Accelerator(), torch.autograd.set_multithreading_enabled(False):  # the mode is this thread's
            assert run(budgets, *work(small, tmp_path, *search)[:-1], "float64", "--device", device, "--out",
                       tmp_path / device) == 0
    plans = [path / "hodgecover.json" if path.is_dir() else path for path in (tmp_path / "fake", tmp_path / "cpu")]
    fake, cpu = (json.loads(plan.read_text())["history"][-1]["layers"] for plan in plans)
    assert [layer["survivors"] for layer in fake] == [layer["survivors"] for layer in cpu]


@pytest.mark.parametrize("options, says", [
    (["evo", "--keep", 2], "--keep 2: must be from 3, the"), (["rco", "--keep", 9], "--keep 9: must be from 3, the"),
    (["rco", "--keep", 8], "--keep 8: must be from 3, the experts of a token, to 7"),
    (["both", "--keep", 4], "invalid choice"),
    (["evo"], "--keep: missing; evo needs it"), (["rco"], "--keep: missing; rco needs it"),
    (["uniform"], "--rate: missing; uniform needs it"),
    (["harmonic", "--plan", "x"], "--rate: missing; harmonic needs it"),
    (["harmonic", "--rate", 0.2], "--plan: missing; harmonic shares are read from a plan"),
    (["uniform", "--rate", 0.2, "--keep", 4], "--keep: uniform does not use it"),
    (["harmonic", "--rate", 0.2, "--keep", 4, "--plan", "x"], "--keep: harmonic does not use it"),
    *(([search, "--keep", 4, "--rate", 0.2], f"--rate: {search} does not use it")
      for search in ("evo", "rco", "barriers", "coverage")),
    (["uniform", "--rate", 0.2, "--memory", "20MB"], "--memory: uniform does not use it"),
    (["harmonic", "--rate", 0.2, "--plan", "x", "--seed", 1], "--seed: harmonic does not use it"),
    (["uniform", "--rate", "nan"], "--rate nan: must be from 0 to 1"),
    (["uniform", "--rate", 1.5], "--rate 1.5: must be from 0 to 1"),
    (["uniform", "--rate", -0.2], "--rate -0.2: must be from 0 to 1"),
    (["uniform", "--rate", "few"], "--rate: invalid float value"),
    (["uniform", "--rate", 0.05], "--rate 0.05: 0 of 16 experts would go; must be from 1 to 10"),
    (["uniform", "--rate", 0.7], "--rate 0.7: 11 of 16 experts would go; must be from 1 to 10"),
    (["uniform", "--rate", 0.2, "--plan", "nowhere"], "nowhere: cannot be read"),
    (["evo", "--keep", 4, "--steps", 9], "--steps: evo does not use it"),
    (["evo", "--keep", 4, "--ragged"], "--ragged: evo does not use it"),
    (["rco", "--keep", 4, "--generations", 9], "--generations: rco does not use it"),
    (["rco", "--keep", 4, "--plan", "x"], "--plan: rco does not use it"),
    (["evo", "--keep", 4, "--generations", 0], "--generations 0: must be"),
    (["rco", "--keep", 4, "--steps", 0], "--steps 0: must be"),
    (["rco", "--keep", 4, "--tokens", 1], "--tokens 1: must be"),
    (["barriers", "--keep", 4], "--plan: missing; barriers are read from a plan"),
    (["barriers", "--keep", 4, "--plan", "x", "--tokens", 64], "--tokens: barriers does not use it"),
    (["barriers", "--keep", 4, "--plan", "x", "--seq-len", 7], "--seq-len: barriers does not use it"),
    (["evo", "--keep", 4, "--plan", "nowhere"], "nowhere: cannot be read"),
    (["rco", "--keep", 4, "--out", "SMALL/out"], "lies in the checkpoint"),
    (["evo", "--keep", 4, "--out", "TEXT"], "exists and is not an empty folder"),
    (["evo", "--keep", 4, "--plan-only", "--out", "EMPTY"], "a plan is a file in a folder that is there"),
    (["rco", "--keep", 4, "--plan-only", "--out", "EMPTY/a/b"], "a plan is a file in a folder that is there"),
    (["rco", "--keep", 4, "--seed", -1], "--seed -1: must be")])
def test_bad_input_gets_one_line_before_the_work(small, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(Model, "layer", refuse)
    (tmp_path / "empty").mkdir()
    before, paths = contents(tmp_path), {"SMALL": small, "TEXT": tmp_path / "text.txt", "EMPTY": tmp_path / "empty"}
    options = [str(option) for option in options]
    for name, path in paths.items():
        options = [option.replace(name, str(path)) for option in options]
    assert_refused(capsys, run(budgets, small, "--out", tmp_path / "out", *options), says)
    assert contents(tmp_path) == before


def test_a_model_that_cannot_be_run_leaves_no_folder(small, tmp_path, capsys):
    norm, checkpoint = "model.norm.weight", Model(small).checkpoint
    common.overwrite(checkpoint, norm, checkpoint.load(norm) * torch.nan)
    before = contents(tmp_path)
    assert_refused(capsys, run(budgets, *work(small, tmp_path, *EVO), "--out", tmp_path / "plan.json"), "NaN")
    assert contents(tmp_path) == before and not (tmp_path / "plan.json-budgets").exists()


def test_the_docstrings_examples_hold():
    assert doctest.testmod(budgets).failed == 0
