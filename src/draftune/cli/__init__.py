"""The commands of the command line, one file each. Importing them does not import torch."""

from draftune.cli import (
    distill,
    env,
    evaluate,
    export,
    knobs,
    merge,
    preflight,
    reno,
    report,
    reproduce,
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
    merge.COMMAND,
    knobs.COMMAND,
    distill.COMMAND,
    export.COMMAND,
    reno.COMMAND,
    score.COMMAND,
    reproduce.COMMAND,
    listing.COMMAND,
    env.COMMAND,
)
