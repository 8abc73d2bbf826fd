"""The page of `draftune rate` in a browser: clicks, keys, taking back, resuming, a phone, and forty comparisons."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor

from draftune.evaluation.rating import pairs
from draftune.report.rating import RatingServer, RatingSession
from draftune.rewards.comparisons import comparison
from helpers.browsers import Visit

pytestmark = pytest.mark.browser

HOSTILE = "</script><b>a cat</b> & 'dog'"


def patches(prompt: str, seeds: Sequence[int]) -> Tensor:
    """Images whose color tells the seed."""
    return torch.stack([torch.full((3, 16, 16), seed / 255) for seed in seeds])


@contextmanager
def rating(path: Path, count: int, sample: Callable[[str, Sequence[int]], Tensor] = patches) -> Iterator[Any]:
    """Ask for comparisons as the command does, and yield the page's address and the session."""
    asked = pairs([HOSTILE, "a dog"], count)
    session = RatingSession(path, asked, lambda p, choice: comparison(p.prompt, choice, "m", None, p.seeds, {}), sample)
    stopped = Event()
    with RatingServer(0, "later") as server:
        server.session = session
        thread = Thread(target=session.run, args=(stopped.is_set,))
        thread.start()
        try:
            yield server.address, session
        finally:
            stopped.set()
            thread.join()


def choices(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["choice"] for row in csv.DictReader(file)]


def at(visit: Visit, number: int, total: int) -> None:
    """Wait until the page asks about this pair, and accepts an answer."""
    visit.page.wait_for_function("title => document.title === title", arg=f"{number} of {total} – draftune")
    visit.page.wait_for_timeout(300)


def test_clicks_keys_and_taking_back(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "taste.csv"
    with rating(path, 6) as (address, _):
        visit.page.goto(address)
        at(visit, 1, 6)
        assert visit.page.locator("h1").inner_text() == HOSTILE  # the first of two, shuffled
        assert visit.page.locator("#undo").is_disabled()
        sources = [visit.page.locator(f"#{side} img").get_attribute("src") for side in ("left", "right")]
        assert len(set(sources)) == 2
        visit.page.locator("#right").click()
        at(visit, 2, 6)
        assert visit.page.locator("h1").inner_text() == "a dog"
        visit.page.keyboard.press("ArrowLeft")
        at(visit, 3, 6)
        visit.page.keyboard.press("ArrowDown")
        at(visit, 4, 6)
        assert choices(path) == ["right", "left", "skip"]
        visit.page.keyboard.press("Backspace")
        at(visit, 3, 6)
        visit.page.locator("#undo").click()
        at(visit, 2, 6)
        assert choices(path) == ["right"]
        # Of a double click, the second click does not answer the next pair; nor do keys of the browser.
        visit.page.locator("#left").dblclick()
        at(visit, 3, 6)
        visit.page.keyboard.press("Shift+ArrowLeft")
        visit.page.wait_for_timeout(300)
        assert choices(path) == ["right", "left"]
        visit.page.goto("about:blank")
    places = {urlsplit(url).netloc for url in visit.requests if url.startswith("http")}
    assert places == {urlsplit(address).netloc}


def test_it_goes_on_where_it_stopped_and_says_when_it_is_done(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "taste.csv"
    with rating(path, 3) as (address, _):
        visit.page.goto(address)
        at(visit, 1, 3)
        visit.page.keyboard.press("ArrowRight")
        at(visit, 2, 3)
        visit.page.goto("about:blank")
    with rating(path, 3) as (address, session):
        visit.page.goto(address)
        at(visit, 2, 3)
        assert visit.page.locator("h1").inner_text() == "a dog"
        visit.page.keyboard.press("ArrowRight")
        at(visit, 3, 3)
        visit.page.keyboard.press("ArrowLeft")
        visit.page.get_by_text("All 3 pairs have answers").wait_for()
        assert session.finished
        visit.page.goto("about:blank")
    assert choices(path) == ["right", "right", "left"]
    assert len(list((tmp_path / "taste-images").iterdir())) == 6


def test_the_next_images_are_there_before_the_answer(visit: Visit, tmp_path: Path) -> None:
    with rating(tmp_path / "taste.csv", 4) as (address, session):
        visit.page.goto(address)
        at(visit, 1, 4)
        coming = [f"images/{name}" for name in session.open_rows[1].images]
        visit.page.wait_for_timeout(800)
        assert all(any(url.endswith(name) for url in visit.requests) for name in coming)
        before = len(visit.requests)
        visit.page.keyboard.press("ArrowLeft")
        at(visit, 2, 4)
        assert not any(url.endswith(name) for url in visit.requests[before:] for name in coming)
        visit.page.goto("about:blank")


def test_it_waits_for_slow_images(visit: Visit, tmp_path: Path) -> None:
    go = Event()

    def slow(prompt: str, seeds: Sequence[int]) -> Tensor:
        go.wait(20)
        return patches(prompt, seeds)

    with rating(tmp_path / "taste.csv", 2, slow) as (address, _):
        visit.page.goto(address)
        visit.page.get_by_text("Sampling images").wait_for()
        visit.page.keyboard.press("ArrowLeft")
        go.set()
        at(visit, 1, 2)
        assert not (tmp_path / "taste.csv").exists()
        visit.page.goto("about:blank")


@pytest.mark.parametrize("size", [(360, 640), (640, 360), (1280, 800)])
def test_both_images_and_the_buttons_fit_a_window(visit: Visit, tmp_path: Path, size: tuple[int, int]) -> None:
    visit.page.set_viewport_size({"width": size[0], "height": size[1]})
    with rating(tmp_path / "taste.csv", 2) as (address, _):
        visit.page.goto(address)
        at(visit, 1, 2)
        assert visit.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        for name in ("#left img", "#right img", "#skip"):
            box = visit.page.locator(name).bounding_box()
            assert box["y"] + box["height"] <= size[1], name
            assert box["width"] > 40, name
        named = "buttons => buttons.map((button) => button.innerText.trim().length > 0)"
        assert all(visit.page.locator("button").evaluate_all(named))
        assert visit.page.locator("img:not([alt]), img[alt='']").count() == 0
        visit.page.goto("about:blank")


@pytest.mark.slow
def test_forty_comparisons_by_keys_alone(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "taste.csv"
    with rating(path, 40) as (address, _):
        visit.page.goto(address)
        for i in range(40):
            at(visit, i + 1, 40)
            visit.page.keyboard.press(("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowDown")[i % 4])
        visit.page.get_by_text("All 40 pairs have answers").wait_for()
        visit.page.goto("about:blank")
    assert Counter(choices(path)) == {"left": 10, "right": 20, "skip": 10}
