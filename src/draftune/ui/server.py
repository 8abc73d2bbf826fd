"""Serve the page on 127.0.0.1."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from filelock import FileLock, Timeout

from draftune.errors import DraftuneError
from draftune.report.loopback import ADDRESS, port_error
from draftune.ui.app import make_app
from draftune.ui.folder import RECORDS


@contextmanager
def page_server(folder: Path | str, port: int) -> Iterator[tuple[str, uvicorn.Server, socket.socket]]:
    """Yield the page's URL, its server and its socket, for `server.run(sockets=[socket])`.

    Args:
        folder: The folder of runs.
        port: The port, 0 for any free one.

    Raises:
        DraftuneError: the port or the folder cannot be used, or another server has the folder.
    """
    app = make_app(folder)
    lock = FileLock(Path(app.state.context.folder.path) / RECORDS / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DraftuneError(f"another 'draftune ui' serves the folder {str(folder)!r}: use its page") from error
    except NotImplementedError:
        pass  # the file system has no locks
    try:
        with socket.socket() as listener:
            try:
                if os.name != "nt":  # Windows would let two servers share a port
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((ADDRESS, port))
                listener.listen()  # who opens the address at once waits until the server has started
            except (OSError, OverflowError) as error:
                raise port_error(port, error) from error
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=1
            )
            yield f"http://{ADDRESS}:{listener.getsockname()[1]}/", uvicorn.Server(config), listener
    finally:
        lock.release()
