"""The commands, one file each. None imports torch before it runs."""

from draftune.commands import listing, reno, reproduce, sample, score, train
from draftune.commands.base import Command

__all__ = ["COMMANDS", "Command"]

COMMANDS: tuple[Command, ...] = (
    train.COMMAND,
    sample.COMMAND,
    reno.COMMAND,
    score.COMMAND,
    reproduce.COMMAND,
    listing.COMMAND,
)
