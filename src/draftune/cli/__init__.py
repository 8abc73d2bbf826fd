"""The commands, one file each. None imports torch before it runs."""

from draftune.cli import (
    distill,
    env,
    evaluate,
    export,
    knobs,
    mix,
    preflight,
    reno,
    report,
    sample,
    score,
    sweep,
    train,
    watch,
)
from draftune.cli import (
    list as listing,
)
from draftune.cli.common import Command

__all__ = ["COMMANDS", "Command"]

COMMANDS: tuple[Command, ...] = (
    train.COMMAND,
    preflight.COMMAND,
    watch.COMMAND,
    report.COMMAND,
    sample.COMMAND,
    evaluate.COMMAND,
    sweep.COMMAND,
    mix.COMMAND,
    knobs.COMMAND,
    distill.COMMAND,
    export.COMMAND,
    reno.COMMAND,
    score.COMMAND,
    listing.COMMAND,
    env.COMMAND,
)
