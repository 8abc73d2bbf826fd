"""The command `draftune env`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(args: argparse.Namespace) -> None:
    """Print one `name: value` line for each property."""
    from draftune.runs.environment import environment
    from draftune.utils.devices import default_device

    for name, value in environment(default_device()).items():
        print(f"{name}: {value}")


COMMAND = Command(
    "env",
    "print versions and hardware for a bug report",
    "Print the versions of the software and the properties of the machine, without paths, user name or host name.",
    "draftune env",
    arguments,
    run,
)
