"""The command `draftune ui`."""

from __future__ import annotations

import argparse

from draftune.cli.common import Command, add_number, filled
from draftune.errors import DraftuneError, require

MODULES = ("jinja2", "psutil", "python_multipart", "starlette", "uvicorn")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--folder", type=filled, default="runs", metavar="DIR", help="folder of the runs (default: runs)"
    )
    add_number(parser, "--port", 8644, "N", "port of 127.0.0.1, 0 for any")


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C. Runs that it started go on."""
    if not 0 <= args.port < 65536:
        raise DraftuneError(f"--port must be from 0 to 65535, not {args.port}")
    for module in MODULES:
        require(module, "the page", "ui")
    from draftune.ui.server import page_server

    with page_server(args.folder, args.port) as (address, server, listener):
        print(f"Open {address} in a browser (Ctrl-C ends the page, and runs go on)", flush=True)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            print()


COMMAND = Command(
    "ui",
    "start, follow and stop runs in the browser",
    "Serve a page to browsers on this machine: a form that starts runs, the page of each run while it is training, "
    "the comparison of LoRA scales, and the download of LoRAs.",
    "draftune ui --folder runs",
    arguments,
    run,
)
