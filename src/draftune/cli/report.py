"""One page that shows what a run did."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, filled


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=filled, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--output", type=filled, metavar="FILE", help="of the page (default: RUN/report.html)")


def run(args: argparse.Namespace) -> None:
    from draftune.report import write_report

    print(write_report(args.run_folder, args.output))


COMMAND = Command(
    "report",
    "write a page that shows what a run did",
    "Writes one HTML file with a run's pictures, curves and settings, which asks for nothing else.",
    "draftune report runs/first",
    arguments,
    run,
)
