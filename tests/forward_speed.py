# SPDX-License-Identifier: MIT
"""Time the forward pass with loss beside transformers', on one thread in float32, and print both sides.

    pip install transformers && python tests/forward_speed.py                  some minutes, 5 GB of memory
    python tests/forward_speed.py --batch 4 --rounds 5

On the two tiny checkpoints, and on a random one of one layer of OLMoE's shape, stored in bfloat16. Processor seconds,
the best of several rounds in which the sides take turns. Ours reads the weights in every pass: with that, and without.
Theirs are in memory, as float32; of its implementations of the experts the default one and the faster of two. A ratio
is their faster time over ours: above 1 we are faster.
"""
import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

try:
    import transformers
except ImportError:
    sys.exit("forward_speed.py needs transformers: pip install transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import model_io  # noqa: E402  (the path is set above)
import random_checkpoint  # noqa: E402

EXPERTS = "grouped_mm", "eager"  # the default first


class Reading(model_io.Model):
    """A model that counts the processor seconds in which it reads weights."""
    seconds = 0.0


def counted(read: Callable) -> Callable:
    """A method of Reading that adds its processor seconds."""
    def timed(self, *given):
        started = time.process_time()
        result = read(self, *given)
        self.seconds += time.process_time() - started
        return result
    return timed


for name in ("layer", "unembedding", "embed"):
    setattr(Reading, name, counted(getattr(model_io.Model, name)))


def ours(path: Path, ids: torch.Tensor) -> tuple[float, float, float]:
    """(perplexity, processor seconds, those of reading among them)."""
    model = Reading(path)
    started = time.process_time()
    perplexity = model.perplexity(ids)
    return perplexity, time.process_time() - started, model.seconds


def theirs(model: torch.nn.Module, experts: str, ids: torch.Tensor) -> tuple[float, float]:
    """(perplexity, processor seconds) with one of transformers' implementations of the experts."""
    model.set_experts_implementation(experts)
    started = time.process_time()
    with torch.no_grad():
        loss = model(ids, labels=ids, use_cache=False).loss
    return loss.double().exp().item(), time.process_time() - started


def compare(path: Path, batch: int, length: int, rounds: int) -> None:
    """Print a line on a checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = model_io.Model(path)
    ids = model_io.sequences(found.encode(model_io.python_documentation("held-out")), length, batch)
    turns = [(ours(path, ids), *(theirs(model, experts, ids) for experts in EXPERTS)) for _ in range(rounds)]
    (perplexity, *_), *others = turns[0]
    whole, without, default, eager = (min(times) for times in zip(*(
        (own[1], own[1] - own[2], *(other[1] for other in rest)) for own, *rest in turns)))
    best = min(default, eager)
    print(f"{path.name:17}{whole:9.3f}{without:9.3f}{default:9.3f}{eager:9.3f}{best / whole:9.2f}{best / without:9.2f}"
          f"   {perplexity:.7g} {' '.join(f'{other[0]:.7g}' for other in others)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences [8]")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each [512]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{'':17}{'ours':>9}{'unread':>9}{EXPERTS[0]:>11}{EXPERTS[1]:>9}{'ratio':>9}{'unread':>9}   perplexities")
    with tempfile.TemporaryDirectory() as folder:
        layer = Path(folder) / "olmoe-layer"
        random_checkpoint.write(random_checkpoint.SHAPES["olmoe-1b-7b"] | {"num_hidden_layers": 1}, layer)
        for path in (ROOT / "examples" / "tiny-olmoe", ROOT / "examples" / "tiny-qwen3-moe", layer):
            compare(path, args.batch, args.seq_len, args.rounds)


if __name__ == "__main__":
    main()
