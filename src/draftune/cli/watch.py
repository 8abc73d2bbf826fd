"""The page of a run while it goes on."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, filled
from draftune.errors import DraftuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=filled, metavar="RUN", help="a run's folder, while it is trained or after")
    parser.add_argument("--port", type=int, default=8642, metavar="N", help="of 127.0.0.1; 0: any (default: 8642)")


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.port < 65536:
        raise DraftuneError(f"--port must be from 0 to 65535, not {args.port}")
    from draftune.report.serve import Server

    with Server(args.run_folder, args.port) as server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


COMMAND = Command(
    "watch",
    "follow a run in the browser",
    "Serves the page of 'draftune report' to this machine's own browser; it follows the run while that goes on.",
    "draftune watch runs/first",
    arguments,
    run,
)
