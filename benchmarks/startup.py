"""Measure the seconds until a command has answered, and until training has made its first update.

    python benchmarks/startup.py [--rounds 5]

`draftune train` trains the embedded model with its defaults; the time ends with the first line of metrics.jsonl. The
table shows the median, the minimum and the maximum of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

DRAFTUNE = [sys.executable, "-m", "draftune"]


def answer(command: str) -> Callable[[], float]:
    """Return a function that returns the seconds of a command."""

    def measure() -> float:
        start = time.perf_counter()
        subprocess.run([*DRAFTUNE, command], check=True, capture_output=True)
        return time.perf_counter() - start

    return measure


def first_update() -> float:
    """Return the seconds from the start of `draftune train` to its first update."""
    with TemporaryDirectory() as folder:
        metrics, start = Path(folder) / "run" / "metrics.jsonl", time.perf_counter()
        command = [*DRAFTUNE, "train", "--output", str(metrics.parent)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            process.kill()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| | seconds | from | to |\n|---|---|---|---|")
    measured = {"draftune --help": answer("--help"), "draftune list": answer("list")}
    measured["draftune train, first update"] = first_update
    for name, measure in measured.items():
        times = [measure() for _ in range(args.rounds)]
        print(f"| `{name}` | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} |", flush=True)


if __name__ == "__main__":
    main()
