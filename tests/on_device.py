# SPDX-License-Identifier: MIT
"""Whether a device computes what the CPU does, and how fast: a table, a line at a time; exit status 0 if all holds.

    python tests/on_device.py cuda                 8 minutes at most; wants 20 GB of disk, 30 GB of device memory
    python tests/on_device.py cpu --minutes 1      reduced shapes
    python tests/on_device.py fake --minutes 1     the pretend device of fake_device.py, likewise

No network; nothing beyond requirements.txt. First what must hold, then what is only measured, the slow parts last: a
part that the time left does not suffice for is left out, which its line says. What raises an error fails, and the next
part begins. Launches and waits are counted as fake_device.py does, in runs of their own, which are not timed.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

THREADS = torch.get_num_threads()
from conftest import PROSE, QUICK, ROOT, named, with_tokenizer  # noqa: E402  (sets the path, and one thread)
from fake_device import Accelerator, Counter  # noqa: E402
from peak import peak_memory  # noqa: E402
from strategies import converted, fast_barriers, plain_barriers  # noqa: E402
torch.set_num_threads(THREADS)

import baselines  # noqa: E402
import bench  # noqa: E402
import distil  # noqa: E402
import estimate  # noqa: E402
import evaluate  # noqa: E402
import heapr  # noqa: E402
import hodgecover  # noqa: E402
import mathx  # noqa: E402
import model_io  # noqa: E402
import random_checkpoint  # noqa: E402
import refit  # noqa: E402
import wanda  # noqa: E402
from estimate import Shape  # noqa: E402
from hodgecover import MoELayer, Settings  # noqa: E402
from model_io import PASS_TOKENS, Experts, Layer, Model, run_layer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

OLMOE = Shape(n=64, k=8, d=2048, f=1024, vocab=50304, outcomes=50304)
REDUCED = Shape(n=16, k=4, d=256, f=128, vocab=4096, outcomes=4096)
REDUCED_MODEL = dict(vocab_size=2048, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=4, head_dim=16, num_experts=16, num_experts_per_tok=4)
PASS_LENGTH = 512  # of the sequences of a pass
SAMPLES = {"sampled": 512, "exact": 0}  # outcomes of the vocabulary
MAKING, PLANNING = 60, 30  # seconds that 13.8 GB take to make, and that are left to plan them at least


class Device:
    """A device, the time that is left on it, and the table of what it did. Raises InputError if torch cannot use it."""

    def __init__(self, name: str, minutes: float):
        self.dtype = model_io.choose_dtype("auto", name)
        self.name, self.kind = name, torch.device(name).type
        self.real = self.kind not in ("cpu", "fake")
        self.module = torch.get_device_module(self.kind) if self.real else None
        self.end, self.failed = time.monotonic() + 60 * minutes, 0
        self.memory = 8 * 10**9 if self.real else 10**8

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def line(self, what: str, found: str, bound: str = "", holds: bool = True) -> None:
        """Print a line of the table."""
        self.failed += not holds
        print(f"| {what:<38} | {found:<60} | {bound:<8} | {'' if holds else 'FAILS'} |", flush=True)

    def synchronise(self) -> None:
        """Wait for all that was launched."""
        if self.real:
            self.module.synchronize()

    def seconds(self, function: Callable) -> float:
        """Wall time of one call."""
        self.synchronise()
        started = time.perf_counter()
        function()
        self.synchronise()
        return time.perf_counter() - started

    def peak(self, function: Callable) -> float:
        """Largest memory during a call, GB: of the device beyond what it held; elsewhere the process's so far."""
        if not self.real:
            function()
            return peak_memory() / 1e9
        self.module.reset_peak_memory_stats()
        held = self.module.memory_allocated()
        function()
        return (self.module.max_memory_allocated() - held) / 1e9

    def counted(self, function: Callable) -> Counter:
        """What one call does on the device."""
        with Accelerator() if self.kind == "fake" else Counter(self.kind) as counter:
            function()
        return counter


# ---------------------------------------------------------------------------------------------- what must hold

def logits(device: Device) -> None:
    """Of every golden checkpoint: float32 against transformers', bfloat16 against float32. The latter moves a few
    tokens to other experts; the median token's error does not see those."""
    elsewhere, single, half = 0, 0.0, 0.0
    paths = sorted(path for path in named("").iterdir() if path.is_dir())
    for path in paths:
        reference = load_file(path / "golden.safetensors")
        expected = reference["logits"].double()
        for dtype in (torch.float32, torch.bfloat16):
            made, counter = counted_logits(device, path, dtype, reference["ids"])
            elsewhere += counter.elsewhere + (made.device.type != device.kind)
            error = made.cpu().double() - expected
            if dtype == torch.float32:
                single = max(single, error.abs().max().item())
            else:
                of_tokens = error.norm(dim=-1) / expected.norm(dim=-1)
                half = max(half, of_tokens.median().item())
    device.line(f"logits of {len(paths)} checkpoints, float32", f"largest error {single:.1e}", "<= 1e-4",
                single <= 1e-4)
    device.line("the same in bfloat16", f"largest median error {half:.1%} of the logits", "<= 10%", half <= 0.1)
    device.line("products and logits on another device", str(elsewhere), "0", elsewhere == 0)


def counted_logits(device: Device, path: Path, dtype: torch.dtype, ids: torch.Tensor) -> tuple[torch.Tensor, Counter]:
    """A checkpoint's logits, and what their computation does on the device."""
    made = []
    counter = device.counted(lambda: made.append(Model(path, dtype, device.name).logits(ids)))
    return made[0], counter


def barriers(device: Device) -> None:
    """Of some pairs and triangles of a trained layer, by the sweep, against their definition, on the device."""
    model = Model(ROOT / "examples" / "tiny-olmoe", torch.float32, device.name)
    step = next(model.stream(model_io.calibration_ids(model, (), 128, 64)))
    layer = MoELayer(step.layer.experts, step.x, step.gates, step.y, step.norm, model.unembedding())
    for size, name in ((2, "pairs"), (3, "triangles")):
        simplices = torch.combinations(torch.arange(12), size)[::8**(size - 1)]
        plain = plain_barriers(layer, simplices).cpu()
        error = ((fast_barriers(layer, simplices) - plain).abs() / plain).max().item()
        device.line(f"barriers of {len(plain)} {name}", f"largest relative error {error:.1e}", "<= 1e-3", error <= 1e-3)


def plans(device: Device) -> None:
    """Of both trained checkpoints, exact: a sample of the vocabulary changes where rounding moves a draw."""
    for name in ("tiny-olmoe", "tiny-qwen3-moe"):
        there, here = (exact_plans(name, place, device.memory) for place in (device.name, "cpu"))
        same = 0
        for layer, plan in here.items():
            other = there[layer]
            same += (other.survivors, other.order, other.redirect) == (plan.survivors, plan.order, plan.redirect)
        device.line(f"plan of {name}", f"survivors, order, redirect the CPU's in {same} of {len(here)} layers", "all",
                    same == len(here))


def exact_plans(name: str, place: str, memory: int) -> dict[str, hodgecover.Plan]:
    """Plans of a trained checkpoint's layers for half of its experts, on a device."""
    model = Model(ROOT / "examples" / name, torch.float32, place)
    ids = model_io.calibration_ids(model, (), 64, 32)
    settings = Settings(vocab_sample=0, max_triangles=200)
    return dict(hodgecover.plan_model(model, ids, model.config.num_experts // 2, settings, memory=memory))


def commands(device: Device) -> None:
    """One run each, against the same on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        source = with_tokenizer(named("olmoe-plain"), Path(folder) / "source")
        text = source.with_name("text.txt")
        text.write_text(PROSE * 4)
        few, more = (["--calib", text, *QUICK, "--tokens", tokens] for tokens in (128, 1024))
        run_command(baselines, "cpu", source, "--keep", 4, "--method", "reap", *few, "--out", source.with_name("kept"))
        pair = source, source.with_name("kept")
        for name, command, *arguments in (
                ("baselines.py, reap", baselines, source, "--keep", 4, "--method", "reap", *few),
                ("baselines.py, hc-smoe", baselines, source, "--keep", 4, "--method", "hc-smoe", *few),
                ("wanda.py", wanda, source, "--rate", 0.5, *few), ("heapr.py", heapr, source, "--width", 8, *few),
                ("refit.py", refit, *pair, *few), ("distil.py", distil, *pair, *more),
                ("distil.py, layer by layer", distil, *pair, *more, "--layerwise")):
            outs = [source.with_name(f"{command.__name__}-{len(name)}-{place}") for place in ("there", "here")]
            for place, out in zip((device.name, "cpu"), outs):
                run_command(command, place, *arguments, "--out", out)
            error = distance(*map(model_io.Checkpoint, outs))
            device.line(name, f"weights {error:.1e} of their norm from the CPU's", "<= 1e-4", error <= 1e-4)
        said = [run_command(evaluate, place, *pair, "--text", text, "--max-tokens", 256, "--sample", 0, *QUICK[2:])
                for place in (device.name, "cpu")]
        there, here = ([float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", each)]
                       for each in said)
        error = max(abs(a - b) / max(abs(b), 1) for a, b in zip(there, here, strict=True))
        device.line("evaluate.py", f"numbers {error:.1e} from the CPU's", "<= 1e-3", error <= 1e-3)


def run_command(command, place: str, *arguments: object) -> str:
    """What a command prints; raises RuntimeError if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = command.main([*map(str, arguments), "--device", place])
    if status:
        raise RuntimeError(said.getvalue())
    return said.getvalue()


def distance(there: model_io.Checkpoint, here: model_io.Checkpoint) -> float:
    """Norm of the difference of all weights, as a share of their norm."""
    if there.weights.keys() != here.weights.keys():
        raise RuntimeError("other tensors than the CPU's")
    pairs = [(there.load(name).double(), here.load(name).double()) for name in here.weights]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


# ------------------------------------------------------------------------------------------------ what is measured

def sweeps(device: Device) -> None:
    """Of a random layer: shares of the rate of the bare product, launches and waits, memory."""
    shape, tokens = (OLMOE, 1024) if device.real else (REDUCED, 16)
    layer = converted(bench.random_layer(shape, tokens, 4.0, device.dtype), device.name)
    rows = torch.randn(8192 if device.real else 512, shape.d, device=device.name).to(device.dtype)
    spent = min(device.seconds(lambda: rows @ layer.unembedding.T) for _ in range(5))
    rate = 2 * len(rows) * shape.d * shape.vocab / spent
    device.line(f"a product, {device.dtype}", f"{rate / 1e12:.2f} TFLOP/s")
    for name, simplices in {"pairs": hodgecover.edges(shape.n), "triangles": bench.random_triangles(shape.n)}.items():
        weights = hodgecover.merge_weights(simplices, (layer.gates > 0).sum(0).cpu())
        touched = bench.touched_pairs(layer, simplices)
        for kind, outcomes in SAMPLES.items():
            sample = mathx.sample_vocabulary(layer, outcomes, memory=device.memory)
            sweep = partial(mathx.sweep, layer, simplices, weights, sample, device.memory)
            counter = device.counted(sweep)
            spent = min(device.seconds(sweep) for _ in range(2))
            peak = device.peak(sweep)
            count = estimate.sweep_operations(shape._replace(outcomes=outcomes or shape.vocab), tokens, touched)
            device.line(f"{kind} sweep, {name}", f"{spent:.3f} s, {count / spent / rate:.0%} of the product's rate")
            if device.kind != "cpu":
                device.line("", f"{counter.launches / tokens:.1f} launches, {counter.waits / tokens:.3f} waits a token")
            if device.real:
                limit = device.memory / 1e9
                device.line("", f"{peak:.2f} GB", f"<= {limit:g} GB", peak <= limit)


def passes(device: Device) -> None:
    """Forward through a random layer, and back."""
    shape, count = (OLMOE, PASS_TOKENS) if device.real else (REDUCED, 256)
    length = min(PASS_LENGTH, count)
    sizes = argparse.Namespace(experts=shape.n, top_k=shape.k, hidden=shape.d, width=shape.f)
    config, layer = bench.random_decoder_layer(sizes, device.dtype)
    layer = Layer(Experts(*(part.to(device.name) for part in layer.experts)), layer.router.to(device.name),
                  {name: weight.to(device.name) for name, weight in layer.weights.items()})
    h, slope = torch.randn(2, count // length, length, shape.d, device=device.name).to(device.dtype)
    for name, work in {"forward": torch.no_grad()(lambda: run_layer(h, layer, config)),
                       "back": lambda: heapr.back_through(layer, config, h, slope.clone())}.items():
        work()
        spent, peak = min(device.seconds(work) for _ in range(2)), device.peak(work)
        device.line(f"{name} through a layer, {count} tokens", f"{spent:.3f} s, {peak:.2f} GB")


def whole(device: Device) -> None:
    """A random checkpoint, OLMoE-1B-7B's shape on a real device, made and planned, by layer."""
    config = random_checkpoint.SHAPES["olmoe-1b-7b"] | ({} if device.real else REDUCED_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        if device.real and (free := shutil.disk_usage(folder).free) < 15e9:
            return device.line("a random OLMoE-1B-7B", f"left out: {folder} has {free / 1e9:.1f} GB, 15 are needed")
        path, made = Path(folder) / "random", time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()):
            parameters = random_checkpoint.write(config, path, device=device.name if device.real else "cpu")
        device.line(f"a random checkpoint, {parameters * 2 / 1e9:.1f} GB", f"made in {time.monotonic() - made:.0f} s")
        spent = device.seconds(model_io.Checkpoint(path).fingerprint)
        device.line("its fingerprint", f"{spent:.1f} s")
        for kind, outcomes in SAMPLES.items():
            plan_whole(device, path, kind, Settings(vocab_sample=outcomes))


def plan_whole(device: Device, path: Path, kind: str, settings: Settings) -> None:
    """Print where the time of a plan goes, by layer; stop when the next layer would not end in time."""
    model = Model(path, device.dtype, device.name)
    ids = model_io.calibration_ids(model, (), *((2048, 512) if device.real else (64, 32)))
    started = last = time.perf_counter()
    layers = model.config.num_layers
    with clocked(device, model_io.Model, "layer", "unembedding", "embed") as reading, \
            clocked(device, mathx, "sample_vocabulary", "sweep", "audit_sample") as sweep:
        plan = hodgecover.plan_model(model, ids, model.config.num_experts // 2, settings, memory=device.memory)
        for number in range(layers):
            if device.left() < 1.5 * (last - started) / max(number, 1) or device.left() < 0:
                return device.line(f"{kind} plan", f"left out: layers {number} to {layers - 1}, out of time")
            next(plan)
            before, last = last, time.perf_counter()
            rest = last - before - sum(reading) - sum(sweep)
            device.line(f"{kind} plan, layer {number}",
                        f"reading {sum(reading):.2f} s, sweep {sum(sweep):.2f} s, rest {rest:.2f} s")
            reading.clear()
            sweep.clear()
    device.line(f"{kind} plan, {layers} layers", f"{last - started:.1f} s")


@contextlib.contextmanager
def clocked(device: Device, owner: object, *names: str) -> Iterator[list[float]]:
    """Context manager: the seconds of each call of some functions, of which none calls another."""
    spent, real = [], {name: getattr(owner, name) for name in names}

    def timed(function: Callable) -> Callable:
        def call(*args, **kwargs):
            found = []
            spent.append(device.seconds(lambda: found.append(function(*args, **kwargs))))
            return found[0]
        return call
    try:
        for name, function in real.items():
            setattr(owner, name, timed(function))
        yield spent
    finally:
        for name, function in real.items():
            setattr(owner, name, function)


# ------------------------------------------------------------------------------------------------- the command line

CHECKS = {logits: 5, barriers: 5, plans: 10, commands: 5, sweeps: 5, passes: 5, whole: 5}  # seconds that it takes


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: whether something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", metavar="DEVICE", help="a device of torch, such as cuda; or fake")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun [8]")
    args = parser.parse_args(argv)
    with Accelerator() if args.device == "fake" else contextlib.nullcontext():
        try:
            device = Device(args.device, args.minutes)
        except model_io.InputError as err:
            parser.error(str(err))
        name = device.module.get_device_name() if device.real else f"{torch.get_num_threads()} threads"
        print(f"{args.device} ({name}), torch {torch.__version__}, Python {sys.version.split()[0]}\n")
        device.line("what", "found", "must be")
        print("|---" * 4 + "|")
        for check, least in CHECKS.items():
            least = MAKING + PLANNING if check is whole and device.real else least
            if device.left() < least:
                device.line(check.__name__, f"left out: takes {least} s, {max(device.left(), 0):.0f} s are left")
                continue
            try:
                check(device)
            except Exception as err:  # the other parts tell more
                says = " ".join(str(err).split())[:300]
                device.line(check.__name__, f"{type(err).__name__}: {says}", "no error", False)
    print(f"\n{device.failed} failed, {60 * args.minutes - device.left():.0f} s")
    return int(device.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
