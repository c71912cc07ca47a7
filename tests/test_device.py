# SPDX-License-Identifier: MIT
"""Everything that computes, on a pretend accelerator (fake_device.py): no operation mixes devices, and the numbers are
the CPU's. It tells nothing of a real GPU's kernels, speed or memory."""
import contextlib
import json

import hodgecover
import mathx
import model_io
import on_device
import pytest
import torch
from conftest import GOLDEN, QUICK, contents, named, run
from fake_device import Accelerator, MixedDevices, Wrapped
from safetensors.torch import load_file
from strategies import converted, fast_barriers, plain_barriers, random_layer
from test_mathx import WIDE_SHAPES, LiveBytes


def test_the_pretend_device_tells_mixed_operations():
    with Accelerator() as accelerator:
        there = torch.arange(6.0).view(2, 3).to("fake")
        assert isinstance(there, Wrapped) and there.device.type == "fake" and there.cpu().device.type == "cpu"
        assert (there @ there.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
        there[torch.tensor([0])] += 1  # an index may stay on the CPU
        assert there.tolist() == [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]
        for mixed in (lambda: there + torch.ones(3), lambda: torch.ones(2, 2) @ there,
                      lambda: there.index_add_(0, torch.tensor([0]), there[:1]),
                      lambda: torch.cat((there, torch.ones(1, 3)))):
            with pytest.raises(MixedDevices):
                mixed()
        assert accelerator.operations["aten.mm.default"] == 1


@pytest.mark.parametrize("wait", [
    Wrapped.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.unique, torch.Tensor.nonzero, bool,
    lambda there: there[there > 1], lambda there: torch.zeros(1).copy_(there), lambda there: there[torch.tensor([0])],
    lambda there: there.copy_(torch.zeros(1)), lambda there: torch.zeros(1).to(there)])
def test_the_pretend_device_tells_when_the_host_waits(wait):
    with Accelerator() as accelerator:
        there = torch.ones(1).to("fake", non_blocking=True)
        there.view(1, 1)[0].add(there[there.long() - 1])
        assert (accelerator.launches, accelerator.waits) == (5, 0)
        wait(there)
        assert accelerator.waits == 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("vocab_sample, memory, launches", [
    (0, 8 * 10**9, 2.5), (1024, 8 * 10**9, 3), (0, 10**8, 16), (1024, 2 * 10**7, 9)])
def test_the_sweep_is_few_launches_a_token_and_waits_once_a_chunk(vocab_sample, memory, launches, size):
    """A step takes many tokens: with 8 GB 2 to 3 launches a token, with little memory 7 to 15."""
    layer, told = random_layer(n=16, tokens=80, vocab=12576), []
    simplices = torch.combinations(torch.arange(16), size)[::4**(size - 1)]
    here = fast_barriers(layer, simplices, mathx.sample_vocabulary(layer, vocab_sample))
    weights = hodgecover.merge_weights(simplices, (layer.gates > 0).sum(0))
    with Accelerator() as accelerator:
        there = converted(layer, "fake")
        accelerator.launches = accelerator.waits = 0
        sample = mathx.sample_vocabulary(there, vocab_sample)
        barriers = mathx.sweep(there, simplices, weights, sample, memory, told.append)
        assert accelerator.waits == 1 + len(told) and accelerator.launches <= launches * 80
        assert (len(told) == 1) == (memory > 10**9)
        plain = plain_barriers(there, simplices[:3]).tolist()
    torch.testing.assert_close(barriers, here)
    if vocab_sample == 0:
        assert barriers[:3].tolist() == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
@pytest.mark.parametrize("vocab_sample, size", [(0, 3), (50, 2)])
def test_the_sweep_takes_the_memory_that_it_may_and_no_more(vocab_sample, size, shape):
    """Steps of many tokens, too."""
    memory = 12 * 10**6
    layer = converted(random_layer(**dict(n=8, tokens=400, vocab=500) | shape), torch.float32)
    simplices = torch.combinations(torch.arange(len(layer.experts.gate)), size)
    simplices = simplices[::1 + len(simplices) // 780]
    with Accelerator():
        there = converted(layer, "fake")
    with LiveBytes(there) as count, Accelerator():
        sample = mathx.sample_vocabulary(there, vocab_sample, memory=memory)
        fast_barriers(there, simplices, sample, memory=memory)
    assert memory / 4 < count.peak < memory


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_logits_of_every_family(path):
    reference = load_file(path / "golden.safetensors")
    with Accelerator():
        logits = model_io.Model(path, device="fake").logits(reference["ids"])
        assert isinstance(logits, Wrapped)
    torch.testing.assert_close(logits.held, reference["logits"], rtol=0, atol=1e-4)


def near(there: object, here: object) -> bool:
    """The same, but for the last digits of numbers: attention may take another kernel."""
    if isinstance(there, torch.Tensor):
        return near(there.tolist(), here.tolist())
    if isinstance(there, dict):
        return there.keys() == here.keys() and all(near(there[name], here[name]) for name in there)
    if isinstance(there, (list, tuple)):
        return len(there) == len(here) and all(map(near, there, here))
    if isinstance(there, float):
        return there == pytest.approx(here, rel=1e-3, abs=1e-6)
    return there == here


def test_hodgecover(small):
    for device, mode in (("fake", Accelerator()), ("cpu", contextlib.nullcontext())):
        with mode:
            assert run(hodgecover, small, "--keep", 4, "--calib", small.parent / "text.txt", *QUICK, "--tokens", 32,
                       "--max-triangles", 8, "--vocab-sample", 20, "--device", device, "--out", small.parent / device,
                       "--cache", small.parent / f"cache-{device}") == 0
        assert device == "cpu" or mode.operations
    there, here = contents(small.parent / "fake"), contents(small.parent / "cpu")
    assert near(*(json.loads(of.pop("hodgecover.json"))["history"][0]["layers"] for of in (there, here)))
    assert there == here


@pytest.mark.parametrize("name", ["qwen2-renormalised", "qwen3_5-vision-mtp"])
def test_a_plan_of_the_other_families(name):
    """Shared and fused experts, Gated DeltaNet, a multi-token head."""
    path = named(name)
    ids = load_file(path / "golden.safetensors")["ids"][:1, :24]
    with Accelerator():
        there = dict(hodgecover.plan_model(model_io.Model(path, device="fake"), ids, 4))
    assert near(there, dict(hodgecover.plan_model(model_io.Model(path), ids, 4)))


def test_the_table_of_a_device_tells_what_fails_and_what_is_left_out(monkeypatch, capsys):
    def holds(device):
        device.line("logits", "1e-5", "<= 1e-4")

    def fails(device):
        device.line("logits", "1e-3", "<= 1e-4", False)

    def breaks(device):
        raise RuntimeError("no kernel")
    for checks, status, says in (({holds: 1, fails: 100}, 0, "left out: takes 100 s"),
                                 ({fails: 1, holds: 1}, 1, "FAILS"),
                                 ({breaks: 1, holds: 1}, 1, "RuntimeError: no kernel")):
        monkeypatch.setattr(on_device, "CHECKS", checks)
        assert on_device.main(["cpu", "--minutes", "1"]) == status
        said = capsys.readouterr().out
        assert says in said and "1e-5" in said and f"{status} failed" in said
