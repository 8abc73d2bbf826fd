"""What all answers of the page share: the folder of runs, the processes, the token, and the data of run pages."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from draftune.errors import DraftuneError
from draftune.report.page import part
from draftune.report.serve import Live
from draftune.ui.folder import RunsFolder
from draftune.ui.form import label, worded
from draftune.ui.processes import Jobs

MOST_LIVE = 8
"""Runs whose data are in memory."""
MOST_UPLOADS = 8
"""Uploaded files that are in memory until their form is valid."""


def date(seconds: float) -> str:
    """Return a local time for readers."""
    return time.strftime("%-d %b %Y, %H:%M" if os.name != "nt" else "%d %b %Y, %H:%M", time.localtime(seconds))


class Context:
    """The state of the server. What must outlive it is in files.

    Args:
        folder: The folder of runs.

    Raises:
        DraftuneError: the folder cannot be written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = RunsFolder(folder)
        self.jobs = Jobs(self.folder)
        self.token = secrets.token_urlsafe(32)
        self.lives: dict[str, Live] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.lock = Lock()
        self.templates = Environment(
            loader=PackageLoader("draftune.ui"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self.templates.filters["mib"] = lambda size: f"{size / 2**20:,.0f}"
        self.templates.filters |= {"label": label, "worded": worded, "date": date}
        self.templates.globals |= {"token": self.token, "sections": Markup(part("sections.html"))}

    def html(self, template: str, status: int = HTTPStatus.OK, **values: Any) -> HTMLResponse:
        """Return a page."""
        return HTMLResponse(self.templates.get_template(template).render(**values), status)

    def keep(self, name: str, content: bytes) -> str:
        """Keep an uploaded file for the next try of its form. Return its key; an empty one without a file."""
        if not name:
            return ""
        key = secrets.token_urlsafe(16)
        with self.lock:
            self.uploads = dict([*self.uploads.items()][1 - MOST_UPLOADS :]) | {key: (name, content)}
        return key

    def tick(self) -> None:
        """Start the next job. If that fails, as on a full disk, the pages are shown, and the next tick tries again."""
        with suppress(OSError):
            self.jobs.tick()

    def known(self, name: str) -> str:
        """Return the name of a run. Raises HTTPException for a name that no run or draft has."""
        if not self.folder.exists(name):
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such run")
        return name

    def live(self, name: str) -> tuple[Live | None, str]:
        """Return the data of a run's page, which are read again when they change; without any, None and the reason."""
        with self.lock:
            if name not in self.lives:
                try:
                    live = Live(self.folder.run(name))
                except DraftuneError as error:
                    return None, str(error)
                self.lives = dict([*self.lives.items()][1 - MOST_LIVE :]) | {name: live}
            return self.lives[name], ""
