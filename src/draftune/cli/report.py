"""The command `draftune report`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, filled


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_folder", type=filled, metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--output", type=filled, metavar="FILE", help="the .html file (default: RUN/report.html)")


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from draftune.report import write_report

    print(write_report(args.run_folder, args.output))


COMMAND = Command(
    "report",
    "write an HTML page of a run",
    "Write one HTML file with a run's images, curves and settings. It loads nothing from elsewhere.",
    "draftune report runs/first",
    arguments,
    run,
)
