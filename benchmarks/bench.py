"""Run short versions of the benchmarks for a CPU, and print each figure beside the published one.

    python benchmarks/bench.py [--only overhead growth] [--publish DATE]

The scripts print Markdown tables, or lines of JSON. Each runs in a process of its own, for a limited time; rows that it
does not reach are missing. The published figures are in results/benchmarks.csv, which --publish writes. A figure gets
a `≠` if its range over the rounds (columns `from` and `to`) does not meet the published range; a figure without rounds
has a range of 5 % to both sides. Seconds depend on the machine and get no mark. The exit code is 0 unless a script
fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
PUBLISHED = FOLDER.parent / "results" / "benchmarks.csv"
TOLERANCE = 0.05
BENCHMARKS = {
    "startup": ("startup.py --rounds 3", 50),
    "overhead": ("overhead.py --rounds 3", 120),
    "families": ("overhead.py --rounds 3 --families sd sdxl sd3 dev pixart sana", 90),
    "growth": ("growth.py --rounds 1 --short", 120),
    "levers": ("levers.py --rounds 3 --batches 2 --tables calls reuse signal", 70),
    "latent_reward": ("latent_reward.py --rounds 3 --steps 0", 30),
    "memory": ("full_size.py count sd14 mixed_precision=bf16", 40),
    "processes": ("processes.py", 50),
    "reward_precision": ("reward_precision.py emoji_clip", 30),
}
"""Each script with its arguments, and its limit in seconds."""


class Figure(NamedTuple):
    """A number of a table, with its range over the rounds; without rounds, the range is the number."""

    benchmark: str
    row: str
    column: str
    value: float
    low: float
    high: float

    @property
    def range(self) -> tuple[float, float]:
        """Return the range over the rounds; without one, 5 % around the number."""
        margin = TOLERANCE * abs(self.value) if self.low == self.high else 0
        return self.low - margin, self.high + margin

    def differs(self, published: Figure) -> bool:
        """Return whether the figure differs from the published one by more than noise; never for seconds."""
        (low, high), (known_low, known_high) = self.range, published.range
        return "second" not in self.column and (low > known_high or high < known_low)


def number(cell: str) -> float | None:
    """Return the number in a cell, None for text."""
    try:
        return float(cell.strip(" `*%").replace(",", "").removesuffix(" s").removesuffix(" MiB"))
    except ValueError:
        return None


def figures(benchmark: str, output: str) -> Iterator[Figure]:
    """Yield the numbers in the Markdown tables, and in the lines of JSON, that a script has printed."""
    header: list[str] | None = None
    for line in output.splitlines():
        if line.startswith("{"):
            values = json.loads(line)
            text = ", ".join(str(value) for value in values.values() if isinstance(value, str))
            numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
            yield from (Figure(benchmark, text, key, value, value, value) for key, value in numbers.items())
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if header is None:
            header = cells
        elif set(line) - set("|-"):
            yield from row_figures(benchmark, header, cells)


def row_figures(benchmark: str, header: Sequence[str], cells: Sequence[str]) -> Iterator[Figure]:
    """Yield the numbers of one row; its name is the first cell and all that are text."""
    read = [None if i == 0 else number(cell) for i, cell in enumerate(cells)]
    name = ", ".join(cell.strip("` ") for cell, value in zip(cells, read, strict=True) if value is None and cell)
    for i, value in enumerate(read):
        if value is None or header[i] in ("from", "to"):
            continue
        ends = read[i + 1 : i + 3] if header[i + 1 : i + 3] == ["from", "to"] else [value, value]
        low, high = (value if end is None else end for end in ends)
        column = header[i] if header.count(header[i]) == 1 else f"{header[i - 1]}, {header[i]}"
        yield Figure(benchmark, name, column, value, low, high)


def run(benchmark: str) -> tuple[list[Figure], str]:
    """Run a benchmark. Return its figures, and what was wrong with it: empty for nothing."""
    command, limit = BENCHMARKS[benchmark]
    environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    try:
        ended = subprocess.run(
            [sys.executable, *shlex.split(command)],
            cwd=FOLDER,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        return list(figures(benchmark, output)), f"stopped after {limit} seconds"
    wrong = f"failed with code {ended.returncode}: {ended.stderr[-500:]}" if ended.returncode else ""
    return list(figures(benchmark, ended.stdout)), wrong


def read_published() -> dict[tuple[str, str, str], Figure]:
    """Return the published figures by benchmark, row and column."""
    if not PUBLISHED.exists():
        return {}
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [Figure(a, b, c, float(x), float(y), float(z)) for a, b, c, x, y, z, *_ in list(csv.reader(file))[1:]]
    return {figure[:3]: figure for figure in rows}


def publish(measured: Sequence[Figure], date: str) -> None:
    """Replace the published figures of the benchmarks that were run."""
    names = {figure.benchmark for figure in measured}
    kept: list[list[object]] = []
    if PUBLISHED.exists():
        with PUBLISHED.open(encoding="utf-8", newline="") as file:
            kept = [list(row) for row in list(csv.reader(file))[1:] if row[0] not in names]
    added = [[*figure, BENCHMARKS[figure.benchmark][0], date] for figure in measured]
    with PUBLISHED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([[*Figure._fields, "command", "date"], *kept, *added])


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--publish", metavar="DATE", help="write the figures to results/benchmarks.csv")
    args = parser.parse_args(argv)
    published, measured, failed = read_published(), [], False
    for name in args.only:
        start = time.perf_counter()
        found, wrong = run(name)
        failed |= wrong.startswith("failed")
        print(f"\n{name}: {BENCHMARKS[name][0]}, {time.perf_counter() - start:.0f} s {wrong}".rstrip())
        print("| | | now | published | |\n|---|---|---|---|---|")
        for figure in found:
            known = published.get(figure[:3])
            mark = "≠" if known is not None and figure.differs(known) else ""
            before = "" if known is None else shown(known.value)
            print(f"| {figure.row} | {figure.column} | {shown(figure.value)} | {before} | {mark} |", flush=True)
        measured += found
    if args.publish:
        publish(measured, args.publish)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
