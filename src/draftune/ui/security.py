"""Protections of the page: this machine only, requests that change something from the page itself only."""

from __future__ import annotations

from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from draftune.report.loopback import HEADERS, is_loopback

MAX_BODY = 4 * 2**20
"""Bytes of the largest request: a file of prompts, and the form around it."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PROTECTED = HEADERS | {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    # With no-referrer, browsers would send a form's Origin as null.
    "Referrer-Policy": "same-origin",
}


class LoopbackOnly:
    """Middleware that refuses foreign requests, limits their size, and sets the security headers.

    The token of the forms is checked where a form is read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(PROTECTED)
            await send(message)

        problem = refusal(scope["method"], Headers(scope=scope))
        app = self.app if problem is None else PlainTextResponse(problem[1], problem[0])
        await app(scope, receive, protected)


def refusal(method: str, headers: Headers) -> tuple[HTTPStatus, str] | None:
    """Return why a request is refused, None if it is not."""
    host, length = headers.get("host", ""), headers.get("content-length", "")
    # Against DNS rebinding: a foreign host name that resolves to this machine is refused.
    if not is_loopback(host):
        return HTTPStatus.FORBIDDEN, "only browsers on this machine are served"
    if method in ("GET", "HEAD"):
        return None
    # Pages of other hosts can send requests to this one. Browsers name the page's host in the header Origin.
    if method != "POST" or headers.get("origin", "") != f"http://{host}":
        return HTTPStatus.FORBIDDEN, "only this server's own page may send something"
    if not length.isdecimal():
        return HTTPStatus.LENGTH_REQUIRED, "the request has no length"
    if int(length) > MAX_BODY:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request has more than {MAX_BODY // 2**20} MiB"
    return None
