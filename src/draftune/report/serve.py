"""Serve the page of a run to browsers on this machine while the run is training."""

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
from draftune.report.images import ImageStore
from draftune.report.page import page
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
    """The data of a run's page, read again only if a file has changed.

    If the run disappears or a file is half written, the last data are served.

    Raises:
        DraftuneError: there is no run.
    """

    def __init__(self, run: Path | str) -> None:
        self.folder, self.images, self.lock = user_path(run), ImageStore(), Lock()
        self.stamp, self.data = self.stamped(), collect(run, self.images)

    def stamped(self) -> str:
        """Return a digest of the inodes, times and sizes of the files that the page reads."""
        stats = [path.stat() for name in FILES if (path := self.folder / name).is_file()]
        return hashlib.sha256(repr([(s.st_ino, s.st_mtime_ns, s.st_size) for s in stats]).encode()).hexdigest()[:16]

    def now(self) -> dict[str, Any]:
        """Return the current data and their stamp."""
        with self.lock:
            try:
                stamp = self.stamped()
                if stamp != self.stamp:
                    self.data, self.stamp = collect(self.folder, self.images), stamp
            except (DraftuneError, OSError):
                pass  # a file that is being written is complete at the next request
            return {**self.data, "stamp": self.stamp}


class Handler(BaseHTTPRequestHandler):
    """Serve the page at /, its data without images at /data, and each image at /images/DIGEST."""

    server: Server

    def do_GET(self) -> None:
        # Against DNS rebinding: a foreign host name that resolves to this machine is refused.
        if not is_loopback(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "only browsers on this machine are served")
            return
        path, data = urlsplit(self.path).path, self.server.live.now()
        if path == "/":
            self.answer(page(data, live=True), "text/html")
        elif path == "/data" and self.headers.get("If-None-Match") == data["stamp"]:
            self.answer("", "application/json", HTTPStatus.NOT_MODIFIED)
        elif path == "/data":
            self.answer(json.dumps(data | {"images": sorted(data["images"])}), "application/json")
        elif uri := self.server.live.images.uris.get(path.removeprefix("/images/")):
            self.answer(uri, "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def answer(self, text: str, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Send a response with the security headers."""
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
        """Log nothing: the terminal shows the address only."""


class Server(ThreadingHTTPServer):
    """Server of a run's page on 127.0.0.1.

    Args:
        run: The run's folder.
        port: The port, 0 for any free one.

    Raises:
        DraftuneError: there is no run, or the port cannot be used.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # Windows would let two servers share a port

    def __init__(self, run: Path | str, port: int) -> None:
        self.live = Live(run)
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            problem = "is in use" if taken else f"cannot be used ({getattr(error, 'strerror', error)})"
            raise DraftuneError(f"port {port} {problem}: give another (--port)") from error

    @property
    def address(self) -> str:
        """Return the page's URL."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser may close the connection during a response.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Return whether a Host header names this machine, with any port, as through a tunnel."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False
