"""The application behind the page: its addresses, and what each answers."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from draftune.errors import DraftuneError
from draftune.report.page import embedded
from draftune.settings import Settings
from draftune.ui.actions import ACTIONS, LICENSES, Action, FieldError, back, check, formats, start, text
from draftune.ui.choices import choices, reward_facts
from draftune.ui.context import Context
from draftune.ui.drafts import SET, SOURCES, Draft, prefilled, save
from draftune.ui.form import default_texts, form_fields
from draftune.ui.security import MAX_BODY, LoopbackOnly
from draftune.ui.state import check_state, run_state, settings_of, sweep_state
from draftune.ui.thumbnails import last_images, thumbnail
from draftune.ui.validation import to_download
from draftune.utils.hub import offline
from draftune.utils.tables import duration

STATIC = {
    **dict.fromkeys(("page.css", "dom.js", "chart.js", "images.js", "page.js"), "draftune.report"),
    **dict.fromkeys(("ui.css", "live.js", "form.js"), "draftune.ui.static"),
}
"""The files that are served, with the packages that they are in."""
TYPES = {"css": "text/css", "js": "text/javascript"}
TICK = 1.0
"""Seconds between two looks at the queue."""
MOST_FIELDS = 300


class App:
    """The answers of the page, one method for each address."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def runs(self, request: Request) -> Response:
        """Show the list of runs; with ?live, only the list."""
        c = self.context
        c.tick()
        states = [run_state(c.folder, c.jobs, name) for name in c.folder.names()]
        template = "_runs.html" if "live" in request.query_params else "runs.html"
        return c.html(template, runs=states, folder=str(c.folder.path))

    def form(self, request: Request) -> Response:
        """Show the form, with the settings of a preset or of an earlier run."""
        asked = request.query_params
        earlier = asked.get("edit") or asked.get("from", "")
        preset, name = asked.get("preset", ""), asked.get("name", "")
        return self.show(prefilled(self.context.folder, preset, earlier, "edit" in asked, name))

    def show(self, draft: Draft, status: int = HTTPStatus.OK) -> Response:
        """Show the form with a draft's values."""
        defaults = default_texts(draft.values)
        return self.context.html(
            "form.html",
            status,
            draft=draft,
            upload=self.context.keep(*draft.file),
            groups=form_fields(draft.values, draft.errors),
            choices=choices(),
            default_prompts=defaults["prompts"],
            facts=reward_facts(draft.values.get("reward") or defaults["reward"]),
        )

    async def create(self, request: Request) -> Response:
        """Check what was typed. Show the errors beside it, else write the run's files and start or check it."""
        form = await self.sent(request)
        upload = form.get("file")
        file = self.context.uploads.get(text(form, "upload"), ("", b""))
        if isinstance(upload, UploadFile) and upload.filename:
            file = upload.filename, await upload.read()
        draft = Draft(
            "-".join(text(form, "name").split()),
            {f.name: text(form, f.name) for f in fields(Settings) if f.name != "prompts"},
            source if (source := text(form, "source")) in SOURCES else SET,
            text(form, "prompts"),
            str(form.get("pasted", "")),
            file,
            text(form, "preset"),
        )
        if not self.has_token(form):
            draft.errors[""] = "the server was started again since this page was loaded: send the form once more"
            return await run_in_threadpool(self.show, draft, HTTPStatus.FORBIDDEN)
        return await run_in_threadpool(self.created, draft, form)

    def created(self, draft: Draft, form: FormData) -> Response:
        c = self.context
        settings = save(draft, c.folder, c.jobs)
        if settings is None:
            return self.show(draft, HTTPStatus.UNPROCESSABLE_ENTITY)
        what = text(form, "then")
        if what == "start":
            return start(c, draft.name, form)
        return check(c, draft.name, form) if what == "check" else back(draft.name)

    def run(self, request: Request) -> Response:
        """Show the page of a run."""
        return self.show_run(self.name(request))

    def show_run(
        self,
        name: str,
        status: int = HTTPStatus.OK,
        typed: FormData | None = None,
        problems: dict[str, str] | None = None,
    ) -> Response:
        """Show the page of a run; after an error with it and with what was typed."""
        live, _ = self.context.live(name)
        data = Markup(embedded(live.now(), live=True)) if live else ""
        return self.context.html("run.html", status, **self.status_of(name, typed, problems), data=data)

    def status(self, request: Request) -> Response:
        """Show the parts of a run's page that change."""
        self.context.tick()
        return self.context.html("_run.html", **self.status_of(self.name(request)))

    def status_of(
        self, name: str, typed: FormData | None = None, problems: dict[str, str] | None = None
    ) -> dict[str, Any]:
        c = self.context
        state, (live, unread) = run_state(c.folder, c.jobs, name), c.live(name)
        settings = settings_of(c.folder, name)
        return {
            "run": state,
            "warning": live.now()["warning"] if live else None,
            "unread": unread if state.has_data else "",
            "check": check_state(c.folder, c.jobs, name),
            "sweep": sweep_state(c.jobs, name),
            "log": c.jobs.lines(name, "train"),
            "downloads": to_download(settings) if settings and state.key in ("draft", "failed") else [],
            "offline": offline(),
            "formats": formats(c, name, settings),
            "licenses": LICENSES,
            "typed": typed or {},
            "problems": problems or {},
            "duration": duration,
        }

    def data(self, request: Request) -> Response:
        """Send the data of a run's page: without its images, or with ?whole as the page embeds them."""
        live, _ = self.context.live(self.name(request))
        if live is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        data = live.now()
        if "whole" in request.query_params:
            return Response(embedded(data, live=True), media_type="application/json")
        if request.headers.get("if-none-match") == data["stamp"]:
            return Response(status_code=HTTPStatus.NOT_MODIFIED)
        return Response(json.dumps(data | {"images": sorted(data["images"])}), media_type="application/json")

    def image(self, request: Request) -> Response:
        """Send an image of a run as a data URI."""
        live, _ = self.context.live(self.name(request))
        uri = live.images.uris.get(request.path_params["digest"]) if live else None
        if uri is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return PlainTextResponse(uri)

    def thumbnail(self, request: Request) -> Response:
        """Send the last sample images of a run, small."""
        name = self.name(request)
        folder = self.context.folder
        image = thumbnail(last_images(folder.run(name), folder.sampled(name)))
        if image is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(image, media_type="image/webp")

    async def act(self, request: Request) -> Response:
        """Do what a button of a run's page says."""
        form = await self.sent(request)
        if not self.has_token(form):
            raise HTTPException(HTTPStatus.FORBIDDEN, "this page is of an earlier server: load it again")
        action = ACTIONS.get(request.path_params["action"])
        if action is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return await run_in_threadpool(self.acted, action, self.name(request), form)

    def acted(self, action: Action, name: str, form: FormData) -> Response:
        try:
            return action(self.context, name, form)
        except FieldError as error:
            return self.show_run(name, HTTPStatus.BAD_REQUEST, form, {error.field: str(error)})

    def defaults(self, request: Request) -> Response:
        """Send the defaults with what was typed."""
        return JSONResponse(default_texts(request.query_params))

    def reward(self, request: Request) -> Response:
        """Send what is known of the rewards in an expression."""
        return JSONResponse(reward_facts(request.query_params.get("expression", "")))

    def static(self, request: Request) -> Response:
        """Send a script or a style sheet."""
        name = request.path_params["file"]
        if name not in STATIC:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        content = files(STATIC[name]).joinpath(name).read_bytes()
        return Response(content, media_type=TYPES[name.rpartition(".")[2]])

    def name(self, request: Request) -> str:
        """Return the name of the run that a request is about."""
        return self.context.known(request.path_params["name"])

    async def sent(self, request: Request) -> FormData:
        """Return the form of a request."""
        return await request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=MAX_BODY)

    def has_token(self, form: FormData) -> bool:
        """Return whether a form has the token of this server's pages."""
        return secrets.compare_digest(text(form, "token").encode(), self.context.token.encode())

    def problem(self, request: Request, error: Exception) -> Response:
        """Show an error as a page."""
        if isinstance(error, HTTPException):
            return self.context.html("error.html", error.status_code, message=error.detail)
        if isinstance(error, OSError):  # as on a full disk
            message = f"the folder of runs cannot be read or written: {error.strerror or error}"
            return self.context.html("error.html", HTTPStatus.INTERNAL_SERVER_ERROR, message=message)
        return self.context.html("error.html", HTTPStatus.BAD_REQUEST, message=str(error))


def make_app(folder: Path | str) -> Starlette:
    """Return the application for a folder of runs. Raises DraftuneError if the folder cannot be written."""
    context = Context(folder)
    app = App(context)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(repeated(lambda: run_in_threadpool(context.tick)))
        yield
        task.cancel()

    run = "/runs/{name}/"
    application = Starlette(
        routes=[
            Route("/", app.runs),
            Route("/new", app.form),
            Route("/new", app.create, methods=["POST"]),
            Route("/defaults", app.defaults),
            Route("/reward", app.reward),
            Route("/static/{file}", app.static),
            Route(run, app.run),
            Route(run + "status", app.status),
            Route(run + "data", app.data),
            Route(run + "images/{digest}", app.image),
            Route(run + "thumbnail", app.thumbnail),
            Route(run + "{action}", app.act, methods=["POST"]),
        ],
        middleware=[Middleware(LoopbackOnly)],
        exception_handlers={HTTPException: app.problem, DraftuneError: app.problem, OSError: app.problem},
        lifespan=lifespan,
    )
    application.state.context = context
    return application


async def repeated(action: Callable[[], Awaitable[None]]) -> None:
    """Repeat an action every TICK seconds."""
    while True:
        await action()
        await asyncio.sleep(TICK)
