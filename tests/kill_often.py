# SPDX-License-Identifier: MIT
"""Kill the commands that continue at random moments, again and again, until they get through; many times over.

    python tests/kill_often.py              20 runs on examples/tiny-olmoe, some minutes
    python tests/kill_often.py --runs 5

Each run has caches and outputs of its own. A process gets kill -9 after a random time, at first short and then growing,
so that in the end one finishes. Each output must be, byte for byte, that of a run that was left alone, and absent until
it is; the source checkpoint must be as it was.
"""
import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--seq-len", "128", "--dtype", "float32"]


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of the files in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def commands(source: Path, work: Path) -> dict[Path, list[str]]:
    """The commands by their outputs, which lie in `work` with their caches."""
    kept, examples = work / "kept", ROOT / "examples"
    found = {
        "kept": [ROOT / "hodgecover.py", source, "--keep", "32", "--cache", work / "barriers", "--tokens", "256",
                 "--max-triangles", "50"],
        "refitted": [examples / "refit.py", source, kept, "--cache", work / "layers", "--tokens", "4096"],
        "narrow": [examples / "heapr.py", kept, "--width", "8", "--tokens", "4096"],
        "distilled": [examples / "distil.py", source, kept, "--layerwise", "--tokens", "8192"]}
    return {work / name: [sys.executable, *map(str, command), "--out", str(work / name), *QUICK]
            for name, command in found.items()}


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_until_done(command: list[str], out: Path, whole: float) -> int:
    """Run a command that takes `whole` seconds until it gets through; return how often it was killed."""
    kills, patience = 0, 0.5
    while not out.exists():
        process = start(command)
        try:
            assert process.wait(random.uniform(0, patience) * whole) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        patience *= 1.1
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    kills: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(ROOT / "examples" / "tiny-olmoe", Path(folder) / "source"))
        before, expected, seconds = hashes(source), {}, {}
        for out, command in commands(source, Path(folder) / "alone").items():
            started = time.perf_counter()
            assert start(command).wait() == 0
            seconds[out.name] = time.perf_counter() - started
            expected[out.name] = hashes(out)
        for run in range(args.runs):
            for out, command in commands(source, Path(folder) / str(run)).items():
                times = kill_until_done(command, out, seconds[out.name])
                kills[out.name] = kills.get(out.name, 0) + times
                assert hashes(out) == expected[out.name], f"run {run}: another output of {command[1]}"
            assert hashes(source) == before, f"run {run}: the source has changed"
            print(f"run {run}: the same outputs; kills so far: {kills}", flush=True)


if __name__ == "__main__":
    main()
