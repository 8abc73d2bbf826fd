"""A real browser for tests of pages: the installed Chromium or Chrome, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]
CONTRAST = """() => {
    const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" && element !== document.body ? paper(element.parentElement) : light(color);
    };
    const text = "p, dt, dd, h1, h2, h3, figcaption, output, a, summary, td, th, label, legend, button, .state";
    return Math.min(...[...document.querySelectorAll(text)].map((element) => {
        const pair = [light(getComputedStyle(element).color), paper(element)].sort((a, b) => a - b);
        return (pair[1] + 0.05) / (pair[0] + 0.05);
    }));
}"""
"""How many times as light, or as dark, as the paper behind it the palest text of a page is."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        problem = f"no browser on PATH: none of {', '.join(NAMES)}"
        if os.environ.get("DRAFTUNE_BROWSER") == "required":
            pytest.fail(problem)
        pytest.skip(problem)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, what it asked for and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        wanted = ("error", "warning")
        self.page.on("console", lambda said: said.type in wanted and self.complaints.append(said.text))


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    visit = Visit(context.new_page())
    yield visit
    context.close()
    assert visit.complaints == []
