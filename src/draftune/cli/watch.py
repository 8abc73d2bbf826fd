"""The command `draftune watch`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, filled
from draftune.errors import DraftuneError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_folder", type=filled, metavar="RUN", help="run folder, during training or after")
    parser.add_argument(
        "--port",
        type=int,
        default=8642,
        metavar="N",
        help="port of 127.0.0.1, 0 for any (default: 8642)",
    )


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    if not 0 <= args.port < 65536:
        raise DraftuneError(f"--port must be from 0 to 65535, not {args.port}")
    from draftune.report.serve import Server

    with Server(args.run_folder, args.port) as server:
        print(f"{server.address}  (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


COMMAND = Command(
    "watch",
    "follow a run in the browser",
    "Serve the page of 'draftune report' to browsers on this machine. It is updated while the run is training.",
    "draftune watch runs/first",
    arguments,
    run,
)
