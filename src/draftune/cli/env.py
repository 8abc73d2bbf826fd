"""The software and the machine, for a bug report."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no flags."""


def run(args: argparse.Namespace) -> None:
    """Print one `name: value` line for each property."""
    from draftune.models.base import default_device
    from draftune.runs.environment import environment

    for name, value in environment(default_device()).items():
        print(f"{name}: {value}")


COMMAND = Command(
    "env",
    "versions and machine, for a bug report",
    "Prints the versions of the software and the properties of the machine. The lines hold no path, no user name "
    "and no host name, so that they can be pasted into a bug report.",
    "draftune env",
    arguments,
    run,
)
