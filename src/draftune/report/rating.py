"""Ask a person to compare pairs of images in the browser, and write the answers to a file of comparisons."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from string import Template
from threading import Condition, Event, Thread
from typing import Any

from PIL import Image
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.evaluation.rating import Pair, Sampler, stored
from draftune.report.loopback import LocalHandler, LocalServer, path_of
from draftune.report.page import part, policy
from draftune.rewards.comparisons import (
    CHOICES,
    SKIP,
    Comparison,
    changed_comparisons,
    image_path,
    placed,
    read_comparisons,
)
from draftune.utils.images import to_pil

PORT = 8643
AHEAD = 3
"""Pairs whose images are sampled before the person sees them."""
WAIT = 2.0
"""Seconds to wait until the browser has the last answer."""


class RatingSession:
    """Pairs to compare, the answers so far, and the images of the pairs that come next.

    Pairs that the file has answers to are not asked again. Several processes may add answers to one file.

    Args:
        path: The file of comparisons; answers are added to those in it.
        pairs: The pairs in their order.
        describe: Returns the row of a pair with a choice.
        sample: Samples the images of a pair.
        title: What the page shows beside its progress.

    Raises:
        DraftuneError: the file is not one of comparisons.
    """

    def __init__(
        self,
        path: Path,
        pairs: Sequence[Pair],
        describe: Callable[[Pair, str], Comparison],
        sample: Sampler,
        title: str = "",
    ) -> None:
        self.path, self.sample, self.title = path, sample, title
        self.rows = read_comparisons(path) if path.is_file() else []
        self.pairs = {(row := placed(describe(pair, SKIP), path)).pair: (pair, row) for pair in pairs}
        self.own = [row for row in self.rows if row.pair in self.pairs]
        """The answers that `undo` takes back: those given here, and before them those that the file had."""
        self.images: dict[str, bytes] = {}
        self.changed, self.finished_seen = Condition(), Event()
        self.failure: BaseException | None = None

    @property
    def open_rows(self) -> list[Comparison]:
        """Return the rows of the pairs that have no answer yet."""
        answered = {row.pair for row in self.rows}
        return [row for key, (_, row) in self.pairs.items() if key not in answered]

    @property
    def done(self) -> int:
        """Return the number of pairs that have answers."""
        return len(self.pairs) - len(self.open_rows)

    @property
    def finished(self) -> bool:
        """Return whether all pairs have answers."""
        return not self.open_rows

    def state(self) -> dict[str, Any]:
        """Return what the page shows: the present pair once it has images, and the files of the one after it."""
        with self.changed:
            coming = [row for row in self.open_rows[:2] if all(name in self.images for name in row.images)]
            ready = coming and coming[0] == self.open_rows[0]
            return {
                "title": self.title,
                "file": str(self.path),
                "done": self.done,
                "total": len(self.pairs),
                "finished": self.finished,
                "prompt": coming[0].prompt if ready else None,
                "images": coming[0].images if ready else None,
                "next": coming[1].images if ready and len(coming) == 2 else [],
            }

    def answer(self, images: Sequence[str], choice: str) -> None:
        """Write the answer to the present pair. An answer to another pair, as from a second tab, is ignored."""
        with self.changed:
            rows = self.open_rows
            if not rows or list(rows[0].images) != list(images) or not all(name in self.images for name in images):
                return
            if choice != SKIP:
                for name in images:
                    stored(Image.open(io.BytesIO(self.images[name])), image_path(self.path, name))
            answer = replace(rows[0], choice=choice)
            with changed_comparisons(self.path) as written:
                written.append(answer)
            self.rows = written
            self.own.append(answer)
            self.changed.notify_all()

    def undo(self) -> None:
        """Remove the last answer of this session's pairs, and ask about its pair again."""
        with self.changed:
            if self.own and not self.finished:
                with changed_comparisons(self.path) as written:
                    if self.own[-1] in written:
                        written.remove(self.own[-1])
                self.rows = written
                self.own.pop()
                self.changed.notify_all()

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Sample images ahead of the answers until all pairs have answers, or until `stop` returns True.

        Raises:
            DraftuneError: the answers could not be written.
        """
        if self.finished:
            return
        while not (self.finished or stop()):
            with self.changed:
                if self.failure is not None:
                    raise DraftuneError(f"cannot write to {str(self.path)!r}: {self.failure}") from self.failure
                ahead = self.open_rows[:AHEAD]
                kept = {name for row in [*self.own[-AHEAD:], *ahead] for name in row.images}
                self.images = {name: image for name, image in self.images.items() if name in kept}
                new = next((row for row in ahead if not all(name in self.images for name in row.images)), None)
                if new is None:
                    self.changed.wait(0.2)
                    continue
            pair, _ = self.pairs[new.pair]
            images = self.sample(pair.prompt, pair.seeds)
            with self.changed:
                self.images |= dict(zip((new.left_image, new.right_image), map(png, images), strict=True))
        if self.finished:
            self.finished_seen.wait(WAIT)


def png(image: Tensor) -> bytes:
    """Encode an image [3, H, W] in [0, 1] as PNG."""
    data = io.BytesIO()
    to_pil(image[None])[0].save(data, format="PNG")
    return data.getvalue()


class RatingHandler(LocalHandler):
    """Serve the page at /, its state at /state and images at /images/NAME; take answers at /answer and /undo."""

    server: RatingServer

    def get(self, path: str) -> None:
        session = self.server.session
        if path == "/":
            self.answer(rating_page(), "text/html")
        elif path == "/state":
            self.tell()
        elif session is not None and (image := session.images.get(path.removeprefix("/images/"))):
            self.answer(image, "image/png")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:  # noqa: N802 - http.server calls it by this name
        if (body := self.sent()) is None:
            return
        path = path_of(self.path)
        try:
            request = json.loads(body)
            images, choice = list(request["images"]), request["choice"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        session = self.server.session
        try:
            if session is not None and path == "/undo":
                session.undo()
            elif session is not None and path == "/answer" and choice in CHOICES:
                session.answer(images, choice)
        except (OSError, DraftuneError) as error:
            assert session is not None
            session.failure = error
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "the answer could not be written")
            return
        self.tell()

    def tell(self) -> None:
        """Send the state of the session; without one, what the page is to say."""
        session = self.server.session
        state = session.state() if session is not None else {"idle": self.server.waiting}
        self.answer(json.dumps(state), "application/json")
        if session is not None and state["finished"]:
            session.finished_seen.set()


class RatingServer(LocalServer):
    """Server of the page on which a person compares images, on 127.0.0.1. It runs in a thread until it is closed.

    Args:
        port: The port, 0 for any free one.
        waiting: What the page says while there is nothing to compare.

    Raises:
        DraftuneError: the port cannot be used.
    """

    def __init__(self, port: int, waiting: str) -> None:
        super().__init__(RatingHandler, port)
        self.waiting = waiting
        self.session: RatingSession | None = None
        self.thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def server_close(self) -> None:
        if hasattr(self, "thread"):  # not if the port is in use
            self.shutdown()
        super().server_close()


def rating_page() -> str:
    """Return the HTML page, one file that loads nothing but the images of its own server."""
    style, script = part("page.css") + part("rate.css"), part("dom.js") + part("rate.js")
    return Template(part("rate.html")).substitute(
        policy=policy(style, script, live=True, images="'self' data:"), style=style, script=script
    )
