"""The page of a run while it goes on, for the browser of this machine alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from draftune.errors import DraftuneError
from draftune.report.collect import FILES, collect
from draftune.report.page import page
from draftune.report.pictures import Pictures
from draftune.utils.paths import user_path

ADDRESS = "127.0.0.1"
LOOPBACK = (ADDRESS, "localhost", "::1")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Live:
    """What the page shows of a run, collected anew only when one of its files has changed.

    Raises DraftuneError where there is no run; one that vanishes or is half written later stays as it was last seen.
    """

    def __init__(self, run: Path | str) -> None:
        self.folder, self.pictures, self.lock = user_path(run), Pictures(), Lock()
        self.stamp, self.data = self.stamped(), collect(run, self.pictures)

    def stamped(self) -> str:
        """Another text whenever a file that is read has changed."""
        stats = [path.stat() for name in FILES if (path := self.folder / name).is_file()]
        return hashlib.sha256(repr([(s.st_ino, s.st_mtime_ns, s.st_size) for s in stats]).encode()).hexdigest()[:16]

    def now(self) -> dict[str, Any]:
        """The data as of now, with its stamp."""
        with self.lock:
            try:
                stamp = self.stamped()
                if stamp != self.stamp:
                    self.data, self.stamp = collect(self.folder, self.pictures), stamp
            except (DraftuneError, OSError):
                pass  # what is being written at this moment is whole the next time
            return {**self.data, "stamp": self.stamp}


class Handler(BaseHTTPRequestHandler):
    """The page at /, its data without the pictures at /data, one picture by its digest at /pictures/DIGEST."""

    server: Server

    def do_GET(self) -> None:
        # A name that someone else's DNS points here is no way in, whatever the browser believes.
        if not is_loopback(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "this address is for this machine's own browser")
            return
        path, data = urlsplit(self.path).path, self.server.live.now()
        if path == "/":
            self.answer(page(data, live=True), "text/html")
        elif path == "/data" and self.headers.get("If-None-Match") == data["stamp"]:
            self.answer("", "application/json", HTTPStatus.NOT_MODIFIED)
        elif path == "/data":
            self.answer(json.dumps(data | {"pictures": sorted(data["pictures"])}), "application/json")
        elif uri := self.server.live.pictures.uris.get(path.removeprefix("/pictures/")):
            self.answer(uri, "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def answer(self, text: str, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "draftune"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal has the address and no more."""


class Server(ThreadingHTTPServer):
    """A run's page on a port of 127.0.0.1, 0 for any that is free. Raises DraftuneError for one that can't be had."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # where it would let two servers have the same port

    def __init__(self, run: Path | str, port: int) -> None:
        self.live = Live(run)
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            problem = "is taken" if taken else f"can't be had ({getattr(error, 'strerror', error)})"
            raise DraftuneError(f"port {port} {problem}: give another (--port)") from error

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes away in the middle of an answer is no error.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine; the port may be another, as through a tunnel."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False
