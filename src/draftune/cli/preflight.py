"""`draftune preflight`: measure or count the memory of a run before it starts."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from draftune.cli import train
from draftune.cli.common import Command, filled, writing_to
from draftune.errors import DraftuneError
from draftune.utils.paths import check_writable, user_path
from draftune.utils.tables import duration, write_json

if TYPE_CHECKING:
    from draftune.training.memory_check import MemoryReport, MemoryTrial


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`, and the memory to fit into."""
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory to fit into in GiB (default: the device's free memory)"
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="count the memory from the configs of model and rewards, without downloading weights or measuring time",
    )
    parser.add_argument("--json", type=filled, metavar="FILE", help="write the answer also to a .json file")
    train.arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report. Return 0 if the run fits as requested, else 1."""
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise DraftuneError(f"--memory must be more than 0 and finite, not {args.memory}")
    output = user_path(args.json) if args.json else None
    if output is not None:
        if output.suffix.lower() != ".json":
            raise DraftuneError(f"--json must be a .json file, not {args.json!r}")
        check_writable(output)
    settings = train.train_settings(args)
    from draftune.training.memory_check import preflight

    result = preflight(settings, int(args.memory * 2**30) if args.memory else None, args.count)
    print(report(result))
    if output is not None:
        with writing_to(output):
            write_json(output, as_json(result))
    return 0 if result.fits and not result.changes else 1


def report(result: MemoryReport) -> str:
    """Return the trials as a table, the settings to change, and the duration of the run."""
    first, best = result.trials[0].settings, result.best
    lines = [
        f"{first.model}, {first.method}, {first.batch_size} x {first.gradient_accumulation_steps} images an update, "
        f"{f'on {result.device}' if best.run else 'counted from the configs'}",
        "",
        f"{'MiB':44}{'networks':>10}{'update':>10}{'together':>10}{'seconds':>10}",
    ]
    lines += [row(trial) for trial in result.trials]
    room = f"of {size(result.memory)} MiB, of which 90 % may be used"
    flags = " ".join(flag(name, value) for name, value in result.changes.items())
    if result.fits and not flags:
        lines += ["", f"It fits: {size(best.total)} MiB {room}."]
    elif result.fits:
        lines += ["", f"As requested it does not fit into {size(result.memory)} MiB; this does:", f"  {flags}"]
    else:
        tried = f"; the least is {size(best.total)} MiB, with {flags or 'nothing changed'}" if best.ran else ""
        advice = (
            "add --tiny-decoder, --offload, --quantization or --reward-precision bf16, or use smaller images "
            "(--height, --width)"
        )
        lines += ["", f"It does not fit into {size(result.memory)} MiB{tried}: {advice}."]
    if best.run:
        parts = ", ".join(f"{count} {name} {duration(taken)}" for name, (count, taken) in best.run.items())
        lines.append(f"The whole run: about {duration(best.seconds)} ({parts}).")
    return "\n".join(lines)


def as_json(result: MemoryReport) -> dict[str, Any]:
    """Return the report as JSON: sizes in bytes, times in seconds (None if they were not measured)."""
    best = result.best
    return {
        "fits": result.fits,
        "device": str(result.device),
        "memory": result.memory,
        "changes": result.changes,
        "seconds": best.seconds if best.run else None,
        "parts": [{"name": name, "count": count, "seconds": taken} for name, (count, taken) in best.run.items()],
        "trials": [
            {
                "change": trial.change,
                "ran": trial.ran,
                "networks": trial.held,
                "update": trial.peak,
                "total": trial.total,
                "seconds_per_update": trial.update if trial.run else None,
            }
            for trial in result.trials
        ],
    }


def row(trial: MemoryTrial) -> str:
    """Return a trial's line of the table."""
    name = " ".join(flag(name, value) for name, value in trial.change.items()) or "as requested"
    if not trial.ran:
        return f"{name:44}{'out of memory':>40}"
    numbers = "".join(f"{size(value):>10}" for value in (trial.held, trial.peak, trial.total))
    return f"{name:44}{numbers}{f'{trial.update:.2f}' if trial.run else '-':>10}"


def flag(name: str, value: object) -> str:
    """Return a setting as a flag."""
    return f"--{name.replace('_', '-')} {value}"


def size(bytes: int) -> str:
    """Return bytes in MiB."""
    return f"{bytes / 2**20:.0f}"


COMMAND = Command(
    "preflight",
    "measure or count the memory of a run before it starts",
    "Run real updates with the flags of 'train' and write nothing. Print the memory, the seconds, and the settings to "
    "change if the run does not fit. With --count, the memory is counted from the configs alone, before any weights "
    "are downloaded. The exit code is 1 if the run does not fit as requested.",
    "draftune preflight --model emoji --reward emoji_aesthetic --batch-size 16 --memory 0.5",
    arguments,
    run,
)
