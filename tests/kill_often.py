# SPDX-License-Identifier: MIT
"""Kills the command at random moments, again and again, until it gets through; many times over, and counts.

    python tests/kill_often.py              20 runs on examples/tiny-olmoe, some minutes
    python tests/kill_often.py --runs 5

Each run has a cache and an output folder of its own. Its processes get kill -9 after a random time, at first short and
then growing, so that in the end one finishes. The output must be, byte for byte, that of a run that was left alone, and
absent until it is; the source checkpoint must be as it was.
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
OPTIONS = ["--keep", "32", "--tokens", "256", "--seq-len", "128", "--max-triangles", "50", "--dtype", "float32",
           "--refit", "4096"]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def start(source: Path, work: Path) -> subprocess.Popen:
    """The command, with its cache and output in `work`."""
    places = ["--cache", work / "cache", "--out", work / "out"]
    command = [sys.executable, ROOT / "hodgecover.py", source, *OPTIONS, *places]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    kills = [0, 0, 0, 0]  # with no layer's barriers done, with some, with all, with refitted layers
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(ROOT / "examples" / "tiny-olmoe", Path(folder) / "source"))
        before, started = contents(source), time.perf_counter()
        assert start(source, Path(folder) / "alone").wait() == 0
        whole, expected = time.perf_counter() - started, contents(Path(folder) / "alone" / "out")
        for run in range(args.runs):
            work, patience = Path(folder) / str(run), 0.5
            while True:
                process = start(source, work)
                try:
                    assert process.wait(random.uniform(0, patience) * whole) == 0
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                done, refitted = (len(list((work / "cache").glob(f"{kind}model.*"))) for kind in ("", "refit-"))
                kills[3 if refitted else 2 if done == 4 else 1 if done else 0] += 1
                patience *= 1.1
                if (work / "out").exists():  # it was finished as the signal came
                    break
            assert contents(work / "out") == expected, f"run {run}: another output"
            assert contents(source) == before, f"run {run}: the source has changed"
            print(f"run {run}: the same output; so far {sum(kills)} kills", flush=True)
    print(f"{args.runs} runs, {sum(kills)} kills: {kills[0]} before the first layer's barriers were done, {kills[1]} "
          f"between layers, {kills[2]} after the last, {kills[3]} among refitted layers or later; every output the "
          "same as undisturbed")


if __name__ == "__main__":
    main()
