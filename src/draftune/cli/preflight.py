"""What a run will take, by making an update of it."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from draftune.cli import train
from draftune.cli.common import Command
from draftune.errors import DraftuneError

if TYPE_CHECKING:
    from draftune.training.memory_check import Preflight, Trial


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=float, metavar="GIB", help="to fit into; what the device has free unless set")
    train.arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise DraftuneError(f"--memory must be more than 0 and finite, not {args.memory}")
    settings = train.train_settings(args)
    from draftune.training.memory_check import preflight

    found = preflight(settings, int(args.memory * 2**30) if args.memory else None)
    print(told(found))
    return 0 if found.fits and not found.changes else 1


def told(found: Preflight) -> str:
    """The trials as a table, what to change, and how long the run will take."""
    first, best = found.trials[0].settings, found.best
    lines = [
        f"{first.model}, {first.method}, {first.batch_size} x {first.gradient_accumulation_steps} pictures an update, "
        f"on {found.device}",
        "",
        f"{'MiB':44}{'networks':>10}{'update':>10}{'together':>10}{'seconds':>10}",
    ]
    lines += [row(trial) for trial in found.trials]
    room = f"of {size(found.memory)} MiB, of which nine tenths may be used"
    flags = " ".join(flag(name, value) for name, value in found.changes.items())
    if found.fits and not flags:
        lines += ["", f"It fits: {size(best.total)} MiB {room}."]
    elif found.fits:
        lines += ["", f"As asked it does not fit into {size(found.memory)} MiB; this does:", f"  {flags}"]
    else:
        tried = f"; the least is {size(best.total)} MiB, with {flags or 'nothing changed'}" if best.ran else ""
        advice = "smaller pictures (--height, --width), a smaller reward, or a larger device are what is left"
        lines += ["", f"It does not fit into {size(found.memory)} MiB{tried}: {advice}."]
    if best.ran:
        parts = ", ".join(f"{count} {name} {duration(taken)}" for name, (count, taken) in best.run.items())
        lines.append(f"The whole run: about {duration(best.seconds)} ({parts}).")
    return "\n".join(lines)


def row(trial: Trial) -> str:
    name = " ".join(flag(name, value) for name, value in trial.change.items()) or "as asked"
    if not trial.ran:
        return f"{name:44}{'out of memory':>40}"
    numbers = "".join(f"{size(value):>10}" for value in (trial.held, trial.peak, trial.total))
    return f"{name:44}{numbers}{trial.update:>10.2f}"


def flag(name: str, value: object) -> str:
    return f"--{name.replace('_', '-')} {value}"


def size(bytes: int) -> str:
    return f"{bytes / 2**20:.0f}"


def duration(seconds: float) -> str:
    """3 h 20 min, 5 min 10 s, 12 s."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


COMMAND = Command(
    "preflight",
    "measure what a run will take before it starts",
    "Makes real updates with the flags of 'train' and writes nothing: memory, seconds, and what to change where it "
    "does not fit. Exit code 1: not as asked.",
    "draftune preflight --model emoji --reward emoji_aesthetic --batch-size 16 --memory 0.5",
    arguments,
    run,
)
