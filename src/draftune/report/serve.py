"""Serve the page of a run to browsers on this machine while the run is training."""

from __future__ import annotations

import hashlib
import json
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import Any

from draftune.errors import DraftuneError
from draftune.report.collect import FILES, collect
from draftune.report.images import ImageStore
from draftune.report.loopback import LocalHandler, LocalServer
from draftune.report.page import page
from draftune.utils.paths import user_path


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


class Handler(LocalHandler):
    """Serve the page at /, its data without images at /data, and each image at /images/DIGEST."""

    server: Server

    def get(self, path: str) -> None:
        data = self.server.live.now()
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


class Server(LocalServer):
    """Server of a run's page on 127.0.0.1.

    Args:
        run: The run's folder.
        port: The port, 0 for any free one.

    Raises:
        DraftuneError: there is no run, or the port cannot be used.
    """

    def __init__(self, run: Path | str, port: int) -> None:
        self.live = Live(run)
        super().__init__(Handler, port)
