"""The page of `draftune ui` in a browser: from the form to a LoRA, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import load
from test_report import written_run

from draftune.cli.main import main
from draftune.ui.server import page_server
from helpers.browsers import CONTRAST, Visit

pytestmark = pytest.mark.browser

START = 60_000
"""Milliseconds until a process has imported everything and has made an update, on a busy machine."""


WATCHER = """
import sys
def hear(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        with open({!r}, "a") as file:
            file.write(f"{{event}} {{arguments}}\\n")
sys.addaudithook(hear)
with open({!r}, "a") as file:
    file.write("listening\\n")
"""
"""A sitecustomize.py: it writes down what the processes of Python connect to."""


@contextmanager
def command(folder: Path) -> Iterator[str]:
    """Serve the page as the command does, and yield its address. What it and its runs connect to is in `heard`."""
    (folder / "watcher").mkdir(exist_ok=True)
    (folder / "watcher" / "sitecustomize.py").write_text(WATCHER.format(*2 * [str(folder / "heard")]))
    paths = [str(folder / "watcher"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # With HF_HUB_OFFLINE, a request to the hub would not be noticed.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    words = [sys.executable, "-m", "draftune", "ui", "--folder", "runs", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the page from a thread, and yield its address."""
    with page_server(folder, 0) as (address, server, listener):
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join()


def tab_to(page: Any, selector: str) -> None:
    """Press the tabulator until a control has the focus, which must be visible."""
    for _ in range(60):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached by keyboard")


def type_into(page: Any, selector: str, text: str) -> None:
    tab_to(page, selector)
    page.keyboard.press("Control+A")
    page.keyboard.type(text)


@pytest.mark.slow
def test_from_the_form_to_a_lora_by_keyboard(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    with command(tmp_path) as address:
        page.goto(address)
        tab_to(page, ".top .button")
        page.keyboard.press("Enter")
        page.wait_for_url("**/new")
        type_into(page, "#name", "first")
        tab_to(page, "[name=source]:checked")
        page.keyboard.press("ArrowDown")
        type_into(page, "#pasted", "a cat\na dog")
        type_into(page, "#steps", "500")
        type_into(page, "#batch_size", "2")
        type_into(page, "#eval_rewards", "none")
        type_into(page, "#eval_prompts", "none")
        tab_to(page, "details:has(#num_inference_steps) summary")
        page.keyboard.press("Enter")
        type_into(page, "#num_inference_steps", "3")
        tab_to(page, "button[value=start]")
        page.keyboard.press("Enter")
        page.locator("#curves figure").first.wait_for(timeout=START)
        page.locator("#samples img").nth(1).wait_for(timeout=START)  # the base model's images follow the first update
        assert "Training" in page.locator("#announce").inner_text()
        page.goto("about:blank")
    # The server has ended, and the run goes on: another server shows it.
    with command(tmp_path) as again:
        page.goto(f"{again}runs/first/")
        page.locator(".state.training").wait_for(timeout=START)
        tab_to(page, "#do-stop")
        page.keyboard.press("Enter")
        page.locator(".state.stopped").wait_for(timeout=START)
        with page.expect_download() as download:
            page.locator("#do-export").click()
        content = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
        weights = load(content.read("first/pytorch_lora_weights.safetensors"))
        assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "up" in name.split("."))
        done = int(page.locator("#state progress").get_attribute("value"))
        assert done > 0
        page.locator("#do-start").click()
        page.wait_for_function("done => document.querySelector('progress')?.value > done", arg=done, timeout=START)
        page.locator("#do-stop").click()
        page.locator(".state.stopped").wait_for(timeout=START)
        page.goto("about:blank")
    places = {urlsplit(url).netloc for url in visit.requests if url.startswith("http")}
    assert places == {urlsplit(one).netloc for one in (address, again)}
    # Neither the servers nor the run connected to anything.
    heard = (tmp_path / "heard").read_text().splitlines()
    assert set(heard) == {"listening"}
    assert len(heard) >= 4


def test_errors_are_announced_and_lead_to_their_fields(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    with served(tmp_path / "runs") as address:
        page.goto(f"{address}new")
        page.locator("#reward").fill("pikscore")
        page.locator("#reward").press("Tab")
        page.locator("#facts .problem").wait_for()
        page.locator("#picker select").select_option("brightness")
        page.get_by_role("button", name="Use it").click()
        page.locator("#facts b", has_text="brightness").wait_for()
        assert page.locator("#reward").input_value() == "brightness"
        page.locator("#model").fill("CompVis/stable-diffusion-v1-4")
        page.locator("#model").press("Tab")
        page.locator("#steps[placeholder='2000']").wait_for()
        page.locator("#model").fill("")
        page.locator("#pasted").fill("a cat")
        assert page.locator("#source-pasted").is_checked()
        page.locator("#seed").evaluate("input => (input.value = '-1')")  # in a folded group
        page.get_by_role("button", name="Check", exact=True).click()
        page.locator("#errors:focus").wait_for()
        assert page.title().startswith("Not valid")
        page.locator("#errors a").click()
        assert page.locator("#seed").is_visible()
        assert page.locator("#seed").get_attribute("aria-invalid") == "true"
        assert page.locator("#pasted").input_value() == "a cat"
        page.goto("about:blank")
    # Chromium reports the status of the answer, 422.
    assert [text for text in visit.complaints if "422" not in text] == []
    visit.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_fit_a_phone_and_are_legible(browser: Any, tmp_path: Path, scheme: str) -> None:
    run = written_run(tmp_path / "runs" / ("a-long-name-" * 5)[:60])
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    with served(tmp_path / "runs") as address:
        for path in ("", "new", f"runs/{run.name}/", "runs/none/"):
            page.goto(address + path)
            if path == "new":
                page.locator("#name").fill("x/y")
                page.get_by_role("button", name="Check", exact=True).click()
                page.locator("#errors").wait_for()
                for group in page.locator("details").all():
                    group.evaluate("element => (element.open = true)")
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), path
            assert page.evaluate(CONTRAST) >= 4.5, path
            assert page.locator("h1").count() == 1
            named = "inputs => inputs.map((input) => input.labels.length + Boolean(input.getAttribute('aria-label')))"
            inputs = page.locator("input:not([type=hidden]), select, textarea")
            assert set(inputs.evaluate_all(named)) <= {1}, path
            ids = page.locator("[id]").evaluate_all("elements => elements.map((element) => element.id)")
            assert len(ids) == len(set(ids)), path
        page.goto("about:blank")
    context.close()


def test_a_second_server_of_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path / "runs") as address:
        port = str(urlsplit(address).port)
        for words, named in {("runs", "0"): "another 'draftune ui'", ("other", port): f"port {port}"}.items():
            assert main(["ui", "--folder", str(tmp_path / words[0]), "--port", words[1]]) == 2
            assert named in capsys.readouterr().err
