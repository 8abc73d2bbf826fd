"""An HTTP server for browsers on this machine only."""

from __future__ import annotations

import errno
import os
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from draftune.errors import DraftuneError

ADDRESS = "127.0.0.1"
LOOPBACK = (ADDRESS, "localhost", "::1")
MAX_BODY = 1000
"""Bytes of the largest request."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LocalHandler(BaseHTTPRequestHandler):
    """Base class of handlers: subclasses implement `get`."""

    def do_GET(self) -> None:
        # Against DNS rebinding: a foreign host name that resolves to this machine is refused.
        if is_loopback(self.headers.get("Host", "")):
            self.get(path_of(self.path))
        else:
            self.send_error(HTTPStatus.FORBIDDEN, "only browsers on this machine are served")

    def sent(self) -> bytes | None:
        """Return the body of a POST request from this server's own page; answer others with an error, and return None.

        Pages of other hosts can send requests to this one. Browsers name the page's host in the header Origin.
        """
        host, length = self.headers.get("Host", ""), self.headers.get("Content-Length", "")
        if not is_loopback(host) or self.headers.get("Origin", "") != f"http://{host}":
            self.send_error(HTTPStatus.FORBIDDEN, "only this server's own page may send something")
        elif not length.isdecimal() or int(length) > MAX_BODY:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            return self.rfile.read(int(length))
        return None

    def get(self, path: str) -> None:
        """Answer a GET request for a path."""
        raise NotImplementedError

    def answer(self, body: str | bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Send a response with the security headers: text in UTF-8, or bytes."""
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if isinstance(body, str) else kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "draftune"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows the address only."""


class LocalServer(ThreadingHTTPServer):
    """Server of a page on 127.0.0.1.

    Args:
        handler: Answers the requests.
        port: The port, 0 for any free one.

    Raises:
        DraftuneError: the port cannot be used.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # Windows would let two servers share a port

    def __init__(self, handler: type[LocalHandler], port: int) -> None:
        try:
            super().__init__((ADDRESS, port), handler)
        except (OSError, OverflowError) as error:
            raise port_error(port, error) from error

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask the name server for this machine's name
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def address(self) -> str:
        """Return the page's URL."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser may close the connection during a response.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def port_error(port: int, error: OSError | OverflowError) -> DraftuneError:
    """Return the error for a port that cannot be used."""
    taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    problem = "is in use" if taken else f"cannot be used ({getattr(error, 'strerror', error)})"
    return DraftuneError(f"port {port} {problem}: give another (--port)")


def path_of(target: str) -> str:
    """Return the path of a request's target, without what follows it."""
    return target.partition("#")[0].partition("?")[0]


def is_loopback(host: str) -> bool:
    """Return whether a Host header names this machine, with any port, as through a tunnel."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False
