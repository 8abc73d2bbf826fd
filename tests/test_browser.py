"""The page of a run in a browser: what moves, what is read aloud, and that nothing is asked of anyone else."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_report import HOSTILE, show, written_run

from draftune.report import write_report
from draftune.report.serve import Server
from helpers.browsers import CONTRAST, Visit
from helpers.errors import mentions

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(written_run(tmp_path_factory.mktemp("runs") / "first")).as_uri()


def test_the_slider_swaps_the_pictures(visit: Visit, report: str) -> None:
    visit.page.goto(report)
    slider, image = visit.page.locator("#at-update"), visit.page.locator("#samples img").first
    last = image.get_attribute("src")
    slider.focus()
    slider.press("ArrowLeft")
    middle = image.get_attribute("src")
    slider.press("Home")
    first = image.get_attribute("src")
    assert len({first, middle, last}) == 3
    assert slider.get_attribute("aria-valuetext") == "base model"
    assert visit.page.locator("#samples output").inner_text() == "base model"
    assert image.get_attribute("alt") == f"{HOSTILE[0]}, base model"
    captions = visit.page.locator("#samples figcaption").all_inner_texts()
    assert [text.splitlines()[-1] for text in captions] == ["0", "1", "2"]
    slider.press("ArrowRight")
    assert image.get_attribute("src") == middle
    assert visit.page.locator("#samples output").inner_text() == "update 20, best"
    before = visit.page.locator("#sweep img").first.get_attribute("src")
    visit.page.locator("#at-scale").press("ArrowLeft")
    assert visit.page.locator("#sweep img").first.get_attribute("src") != before


def test_the_page_in_the_docs(visit: Visit) -> None:
    """The run of docs/tutorials/offline-demo.md."""
    page = Path(__file__).parents[1] / "docs" / "report.html"
    visit.page.goto(page.as_uri())
    assert mentions(visit.page.locator("main").inner_text(), 0.6699)
    slider, images = visit.page.locator("#at-update"), visit.page.locator("#samples img")
    assert images.count() == 8
    seen = {images.first.get_attribute("src")}
    slider.focus()
    for _ in range(4):
        slider.press("ArrowLeft")
        seen.add(images.first.get_attribute("src"))
    assert len(seen) == 5
    assert visit.page.locator("#samples output").inner_text() == "base model"
    assert {urlsplit(url).scheme for url in visit.requests} <= {"file", "data"}


def test_the_wipe_moves_its_edge(visit: Visit, report: str) -> None:
    visit.page.goto(report)
    shown = "element => [getComputedStyle(element).clipPath, element.src]"
    after, base = visit.page.locator(".wipe .after").first, visit.page.locator(".wipe img").first
    clip, source = after.evaluate(shown)
    assert "50%" in clip
    assert source != base.get_attribute("src")
    wipe = visit.page.locator("#wipe-0")
    wipe.focus()
    wipe.press("ArrowLeft")
    assert "49%" in after.evaluate(shown)[0]
    assert wipe.get_attribute("aria-valuetext") == "49 % before, 51 % after"
    box = wipe.bounding_box()
    visit.page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 10)
    assert float(wipe.input_value()) == pytest.approx(80, abs=2)
    # The other pairs stay where they were.
    assert visit.page.locator("#wipe-1").input_value() == "50"


def test_the_curves_answer_to_axis_pointer_and_keys(visit: Visit, report: str) -> None:
    visit.page.goto(report)
    charts = visit.page.locator("#curves figure")
    assert charts.count() == 7
    judge = charts.nth(2)
    line, unit = judge.locator("path.line"), judge.locator("svg text").filter(has_text="updates")
    assert unit.count() == 1
    drawn = line.get_attribute("d")
    numbers = [float(word) for word in drawn.replace("M", " ").replace("L", " ").split()]
    xs, ys = numbers[::2], numbers[1::2]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.2)
    # 0.5, 0.7, 0.9, 0.8, 0.6, upwards.
    height = ys[0] - ys[2]
    assert [(ys[0] - y) / height for y in ys] == pytest.approx([0, 0.5, 1, 0.75, 0.25], abs=0.01)
    assert judge.locator(".band").count() == judge.locator(".mark").count() == 1
    assert float(judge.locator(".mark").get_attribute("x1")) == pytest.approx(xs[2], abs=0.1)

    visit.page.get_by_role("radio", name="time").check()
    assert judge.locator("svg text").filter(has_text="minutes").count() == 1
    assert "50" in judge.locator("svg text").all_text_contents()
    visit.page.get_by_role("radio", name="scored images").check()
    assert "200" in judge.locator("svg text").all_text_contents()

    keys = visit.page.locator("#curve-2")
    keys.focus()
    keys.press("Home")
    assert judge.locator(".readout").inner_text() == "update 0: 0.5 ± 0.02"
    keys.press("ArrowRight")
    assert keys.get_attribute("aria-valuetext") == "update 10: 0.7 ± 0.02"
    # The others show the same update.
    assert charts.nth(0).locator(".readout").inner_text() == "update 10: 5 ± 0.5"
    visit.page.mouse.move(5, 5)
    judge.locator("svg").hover(position={"x": xs[4], "y": 60})
    assert judge.locator(".readout").inner_text() == "update 40: 0.6 ± 0.02"
    visit.page.mouse.move(5, 5)
    assert judge.locator(".readout").inner_text() == "update 10: 0.7 ± 0.02"
    keys.blur()
    assert judge.locator(".readout").inner_text() == "update 40: 0.6 ± 0.02"
    judge.scroll_into_view_if_needed()
    box = judge.locator("svg").bounding_box()
    visit.page.mouse.move(box["x"] + xs[3] + 2, box["y"] + 60)
    assert judge.locator(".readout").inner_text() == "update 30: 0.8 ± 0.02"
    assert judge.locator("g:has(.cursor)").get_attribute("visibility") == "visible"


def test_the_gradient_norm_is_drawn_by_its_logarithm(visit: Visit, report: str) -> None:
    visit.page.goto(report)
    norm = visit.page.locator("#curves figure").nth(6)
    raw = norm.locator("path.raw").get_attribute("d").replace("M", " ").replace("L", " ").split()
    ys = [float(word) for word in raw[1::2]]
    # 10 ** (step / 20): a straight line.
    assert ys == pytest.approx([ys[0] + (ys[-1] - ys[0]) * i / 39 for i in range(40)], abs=0.1)
    assert {"2", "10", "100"} <= {*norm.locator("svg text").all_text_contents()}


def test_text_of_the_run_stays_text(visit: Visit, report: str) -> None:
    visit.page.goto(report)
    visit.page.wait_for_timeout(100)
    assert visit.page.locator("#samples figcaption b").all_text_contents() == HOSTILE
    assert visit.page.locator("script").count() == 2
    assert visit.page.locator("[onerror], [onclick]").count() == 0
    assert visit.requests
    assert {urlsplit(url).scheme for url in visit.requests} <= {"file", "data"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_says_what_is_what(browser: Any, report: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    page.goto(report)
    page.locator("summary").first.click()
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    tops = [page.locator(f"#{part}").bounding_box()["y"] for part in ("summary", "pairs", "samples", "curves", "sweep")]
    assert tops == sorted(tops)  # images before curves, in the order in which they are read aloud
    assert page.title() == "first – draftune"
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").all_inner_texts() == ["first"]
    assert page.locator("main").count() == page.locator("nav[aria-label]").count() == 1
    named = "inputs => inputs.map((input) => input.labels.length + Boolean(input.getAttribute('aria-label')))"
    assert set(page.locator("input").evaluate_all(named)) == {1}
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    ids = page.locator("[id]").evaluate_all("elements => elements.map((element) => element.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate(CONTRAST) >= 4.5
    context.close()


def test_the_live_page_keeps_the_readers_place(visit: Visit, tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    with Server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            visit.page.goto(server.address)
            slider = visit.page.locator("#at-update")
            slider.focus()
            slider.press("ArrowLeft")
            assert visit.page.locator("#samples output").inner_text() == "update 20, best"
            show(run, [0, 10, 20, 40, 60], 32)
            visit.page.locator("#at-update[max='4']").wait_for(timeout=10_000)
            assert visit.page.locator("#samples output").inner_text() == "update 20, best"
            assert slider.input_value() == "2"
            assert visit.page.evaluate("document.activeElement.id") == "at-update"
            slider.press("End")
            assert visit.page.locator("#samples output").inner_text() == "update 60"
            assert visit.page.locator("#samples img").first.evaluate("image => image.naturalWidth") == 32
            assert visit.page.locator("#live").inner_text() == "· live"
        finally:
            server.shutdown()
            thread.join()
        places = {(url.scheme, url.netloc) for url in map(urlsplit, visit.requests) if url.scheme != "data"}
        assert places == {("http", f"127.0.0.1:{server.server_port}")}
        visit.page.goto("about:blank")
