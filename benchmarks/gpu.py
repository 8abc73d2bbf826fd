"""Measure draftune on this machine's GPU: one command without a network, with random weights of the published sizes.

    python benchmarks/gpu.py --minutes 8 --output gpu-results
    python benchmarks/gpu.py --only tests sd14 --output gpu-results    # parts again, into the same results
    python benchmarks/gpu.py --device cpu --tiny --output rehearsal    # all parts at tiny sizes

Each part runs in a process of its own, for a limited time: running out of memory, a crash or the limit ends that part
only. The parts with the highest value come first. The folder holds rows.jsonl, with a line for each row as soon as it
is measured, gpu.json and gpu.md, which are written after each row, and gpu.log, with what the parts printed. Memory is
counted from the configs (`draftune preflight --count`) beside the parts, on the CPU. docs/how-to/measure-on-a-gpu.md
describes the results.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "tests": ("`pytest -m gpu`: gradients, resuming, quantized weights, offloading, compilation", 180),
    "sd14": ("updates of Stable Diffusion 1.4 at 512x512 with a ViT-H reward, and its presets", 110),
    "sdxl": ("updates of SDXL at 1024x1024 with a ViT-H reward, and its presets", 100),
    "transformers": ("updates of FLUX.1-dev and Z-Image at 1024x1024, in bf16 and in few bits", 100),
    "levers": ("a prefix shared by updates and a compiled denoiser against plain, and variants of a call", 120),
    "graphs": ("a call of the denoiser in a CUDA graph against plain", 40),
    "alignprop": ("TRL's AlignPropTrainer at equal settings, in turn", 120),
}
"""What each part measures and its limit in seconds, in the order of their value."""
COUNTS = "counts"
"""The part that counts the memory of the rows of other parts. It needs no GPU and runs beside them."""
FIRST, FIRST_LIMIT = "environment", 180
"""The part that names the machine and fails where it has no such device, and its limit in seconds."""
STATUS = "status"
COLUMNS = "outcome seconds by_plain peak_bytes counted_peak_bytes peak_by_counted networks_bytes counted_networks_bytes"
"""The first columns of a table; the others follow in the order of their appearance."""
Rows = dict[tuple[str, str], dict[str, Any]]


def missing() -> list[str]:
    """Return the requirements in pyproject.toml, pytest included, that are not installed."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # Python reads this list as TOML does. Python 3.10 has no tomllib.
    required = ast.literal_eval(re.search(r"^dependencies = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
    return [requirement for requirement in [*required, "pytest"] if not installed(requirement)]


def installed(requirement: str) -> bool:
    """Return whether a requirement such as "peft>=0.17" is installed."""
    name, _, least = requirement.partition(">=")
    try:
        found = version(name)
    except PackageNotFoundError:
        return False
    return numbers(found) >= numbers(least)


def numbers(text: str) -> list[int]:
    """Return the numbers at the start of a version."""
    return [int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number]  # type: ignore[index]


def read(folder: Path) -> Rows:
    """Return the rows by part and name. A later line adds to an earlier one of the same row, or replaces its values."""
    rows: Rows = {}
    path = folder / "rows.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut off when its part was stopped
        row = rows.setdefault((values.pop("part"), values.pop("row")), {})
        if "failed" not in values and "seconds" in values:
            row.pop("failed", None)
        row |= values
        if row.get("counted_peak_bytes") and "peak_bytes" in row:
            row["peak_by_counted"] = row["peak_bytes"] / row["counted_peak_bytes"]
    return rows


def add(folder: Path, part: str, row: str, **values: Any) -> None:
    """Append values of a row to rows.jsonl."""
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, "row": row, **values}) + "\n")


def write(folder: Path) -> None:
    """Write gpu.json and gpu.md from rows.jsonl."""
    rows = read(folder)
    parts: dict[str, dict[str, Any]] = {}
    for (part, row), values in rows.items():
        parts.setdefault(part, {})[row] = values
    (folder / "gpu.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text("\n".join(markdown(parts)) + "\n", encoding="utf-8")


def markdown(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of gpu.md: the machine, then each part with its status and a table of its rows."""
    yield "# Measured by benchmarks/gpu.py\n"
    for name, value in parts.get(FIRST, {}).get("machine", {}).items():
        yield f"- {name}: {value}"
    for part, (title, _) in PARTS.items():
        yield f"\n## {part}: {title}\n"
        yield parts.get(STATUS, {}).get(part, {}).get("text", "Not reached.")
        if part in parts:
            yield ""
            yield from table(parts[part])
    uncounted = [name for part in PARTS for name, row in parts.get(part, {}).items() if is_uncounted(row)]
    if uncounted:
        yield f"\nNot counted yet: {len(uncounted)} rows. `--only {COUNTS}` counts them, on any machine."


def is_uncounted(row: dict[str, Any]) -> bool:
    """Return whether a row has a measured peak, of settings that can be counted, and no counted one."""
    return "settings" in row and "peak_bytes" in row and "counted_peak_bytes" not in row


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table with a column for each value that is no list or mapping; bytes are shown in GB."""
    known = {key: None for row in rows.values() for key, value in row.items() if shown(value)}
    names = [*filter(known.__contains__, COLUMNS.split()), *(key for key in known if key not in COLUMNS.split())]
    yield f"| row | {' | '.join(heading(name) for name in names)} |"
    yield "|---" * (1 + len(names)) + "|"
    for row, values in rows.items():
        yield f"| {row} | {' | '.join(cell(name, values.get(name, '')) for name in names)} |"


def shown(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def heading(name: str) -> str:
    """Return the heading of a column: "peak GB" for `peak_bytes`."""
    return name.replace("_bytes", "_GB").replace("_", " ")


def cell(name: str, value: Any) -> str:
    """Return a value as text of a table."""
    if name.endswith("_bytes") and value != "":
        return f"{value / 1e9:.3f}"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split()).replace("|", "\\|")


def start(part: str, args: argparse.Namespace, **environment: str) -> subprocess.Popen[bytes]:
    """Start the process of a part."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part, "--output", str(args.output)]
    command += ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "DRAFTUNE_PROMPT_CACHE": "off"}
    with (args.output / "gpu.log").open("ab") as log:
        return subprocess.Popen(
            command, env=os.environ | values | environment, stdout=log, stderr=log, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def follow(process: subprocess.Popen[bytes], limit: float, folder: Path) -> str:
    """Wait for a part, for `limit` seconds at most, and write the results while it runs. Return how it ended."""
    began, size = time.monotonic(), -1
    try:
        while (code := process.poll()) is None and time.monotonic() - began < limit:
            if (now := rows_size(folder)) != size:
                write(folder)
                size = now
            time.sleep(0.2)
    finally:
        stop(process)
    taken = f"{time.monotonic() - began:.0f} s"
    if code is None:
        return f"Stopped at its limit, after {taken}: the rows that are missing were not reached."
    return f"Complete, in {taken}." if code == 0 else f"Ended with exit code {code} after {taken}: see gpu.log."


def rows_size(folder: Path) -> int:
    path = folder / "rows.jsonl"
    return path.stat().st_size if path.exists() else 0


def run(args: argparse.Namespace) -> None:
    """Run the parts in turn until the minutes are over, and the counts beside them."""
    end = time.monotonic() + 60 * args.minutes
    counts = start(COUNTS, args, CUDA_VISIBLE_DEVICES="") if COUNTS in args.only else None
    try:
        for part in filter(PARTS.__contains__, args.only):
            if (left := end - time.monotonic()) < 1:
                text = "Not reached."
            else:
                # A rehearsal is not about seconds, and may share its machine.
                limit = left if args.tiny else min(left, PARTS[part][1])
                text = follow(start(part, args), limit, args.output)
            print(f"{part}: {text}", flush=True)
            add(args.output, STATUS, part, text=text)
            write(args.output)
        if counts is not None:
            print(f"{COUNTS}: {follow(counts, max(0.0, end - time.monotonic()), args.output)}", flush=True)
    finally:
        if counts is not None:
            stop(counts)
        write(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything; the default is 8")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, COUNTS), metavar="PART", help=", ".join((*PARTS, COUNTS)))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; the default is cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to rehearse the command")
    args = parser.parse_args(argv)
    if lacking := missing():
        print(f"missing here: {', '.join(lacking)} (docs/how-to/measure-on-a-gpu.md: carry wheels)", file=sys.stderr)
        return 2
    if args.only is None and rows_size(args.output):
        print(
            f"{args.output} holds results: choose another --output, or the parts to repeat by --only", file=sys.stderr
        )
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    began, fresh, args.only = time.monotonic(), args.only is None, args.only or [*PARTS, COUNTS]
    if fresh and "Complete" not in (text := follow(start(FIRST, args), FIRST_LIMIT, args.output)):
        last = (args.output / "gpu.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        print("".join(last) or f"{FIRST}: {text}", file=sys.stderr)
        return 2
    args.minutes -= (time.monotonic() - began) / 60
    run(args)
    print(f"{args.output / 'gpu.md'} has the tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
