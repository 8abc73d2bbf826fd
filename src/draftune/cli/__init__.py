"""The commands of the command line, one file each. Importing them does not import torch."""

from draftune.cli import (
    card,
    distill,
    env,
    evaluate,
    export,
    merge,
    optimize_noise,
    preflight,
    rate,
    report,
    sample,
    score,
    sweep,
    train,
    tune_weights,
    ui,
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
    ui.COMMAND,
    watch.COMMAND,
    report.COMMAND,
    sample.COMMAND,
    evaluate.COMMAND,
    sweep.COMMAND,
    merge.COMMAND,
    export.COMMAND,
    card.CARD,
    card.PUSH,
    optimize_noise.COMMAND,
    rate.COMMAND,
    score.COMMAND,
    listing.COMMAND,
    env.COMMAND,
    tune_weights.COMMAND,
    distill.COMMAND,
)
