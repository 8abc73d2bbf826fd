"""The scripts of the page of `draftune ui`: what is kept when the page refreshes, and what the form's helpers do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_browser_ui import served
from test_report import written_run

from draftune.recommended import EMOJI
from helpers.browsers import Visit
from helpers.ui import stand_in

pytestmark = pytest.mark.browser


def saved(run: Path, part: str) -> None:
    """Write a LoRA as a run does."""
    (run / part).mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, run / part / "pytorch_lora_weights.safetensors")


def test_a_refresh_keeps_what_was_chosen_and_nothing_else(visit: Visit, tmp_path: Path) -> None:
    page, run = visit.page, written_run(tmp_path / "runs" / "old")
    row = {"step": 8, "reward_queries": 0, "train_seconds": 0.0, "clip": 0.5, "stderr": {}, "best": True}
    (run / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    saved(run, "best")
    with served(tmp_path / "runs") as address:
        page.goto(f"{address}runs/old/")
        assert page.locator("#which").input_value() == "best"
        page.locator("#scale").fill("0.5")
        saved(run, "lora")  # as when a run is stopped
        page.locator("#which option[value=last]").wait_for(state="attached")
        assert page.locator("#which").input_value() == "last"
        assert page.locator("#scale").input_value() == "0.5"
        # An error stays, with what was typed, and the page goes on.
        page.locator("#scales").fill("0, 0,5, 1")
        page.locator("#do-sweep").click()
        page.locator("#scales-error").wait_for()
        for _ in range(2):
            with page.expect_response("**/status"):
                pass
        assert page.locator("#scales-error").is_visible()
        assert page.locator("#scales").input_value() == "0, 0,5, 1"
        assert page.evaluate("document.activeElement.id") == "scales"
    # The server has ended.
    page.locator(".away").wait_for()
    page.goto("about:blank")
    visit.complaints.clear()  # the status 400, and the refused connections


def test_the_picker_describes_before_it_is_used(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    with served(tmp_path / "runs") as address:
        page.goto(f"{address}new")
        assert page.locator("#pick").input_value() == ""
        assert page.locator("#use").is_disabled()
        page.locator("#pick").select_option("brightness")
        page.locator("#picked b", has_text="brightness").wait_for()
        assert page.locator("#reward").input_value() == ""
        for _ in range(2):
            page.locator("#add").click()
        assert page.locator("#reward").input_value() == f"{EMOJI['reward']} + brightness"
        # A preset keeps the name, and its method's defaults are shown.
        page.locator("#name").fill("mine")
        page.locator("#preset").select_option("sdxl-12gb")
        page.get_by_role("button", name="Fill in").click()
        page.wait_for_url("**preset=sdxl-12gb*")
        assert page.locator("#name").input_value() == "mine"
        assert page.locator("#preset").input_value() == "sdxl-12gb"
        assert "stable-diffusion-xl" in page.locator("#model").input_value()
        page.locator("#model").fill("")
        page.locator("#model").press("Tab")
        page.locator("#model[placeholder=emoji]").wait_for()
        page.goto("about:blank")


def test_a_double_click_on_start_does_not_stop(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, draft = visit.page, tmp_path / "runs" / ".ui" / "drafted"
    draft.mkdir(parents=True)
    (draft / "settings.yaml").write_text("model: emoji\n")
    stand_in(monkeypatch, seconds=30)
    with served(tmp_path / "runs") as address:
        page.goto(f"{address}runs/drafted/")
        page.clock.set_fixed_time(1000)  # both clicks come at once, also on a busy machine
        page.locator("#do-start").click()
        page.locator("#do-stop").click()
        page.wait_for_timeout(200)
        assert page.locator("#state .state").inner_text() == "Starting"
        page.clock.set_fixed_time(2000)
        page.locator("#do-stop").click()
        page.locator(".state.stopped").wait_for()
        page.goto("about:blank")


def test_a_button_says_what_it_did(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The focus is on what changed, and is announced; a download leaves it where it is."""
    page, run = visit.page, written_run(tmp_path / "runs" / "old")
    saved(run, "lora")
    stand_in(monkeypatch, seconds=30)
    monkeypatch.setattr("draftune.ui.actions.export_lora", lambda run, target, *_: target.write_bytes(b"") or target)

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id"))

    with served(tmp_path / "runs") as address:
        page.goto(f"{address}runs/old/")
        page.locator("#format").select_option("comfyui")
        with page.expect_download() as download:
            page.locator("#do-export").press("Enter")
        assert download.value.suggested_filename == "old-comfyui.safetensors"
        assert (focused(), page.locator("#announce").inner_text()) == ("do-export", "The download is being prepared.")
        parts = {"#do-sweep": "take", "#do-stop-sweep": "take", "#do-start": "state", "#do-stop": "state"}
        for i, (button, part) in enumerate(parts.items()):
            page.clock.set_fixed_time(1000 * (i + 1))  # not the second half of a double click
            with page.expect_navigation():
                page.locator(button).press("Enter")
            assert focused() == part, button
        # The focus stays there when the part changes, and on a run of the list when the list does.
        page.locator("#state .stopped").wait_for()
        assert focused() == "state"
        assert "Stopped" in page.locator("#announce").inner_text()
        page.goto(address)
        page.locator("#run-old").focus()
        page.wait_for_function("() => document.querySelector('.runs img')?.naturalWidth > 0")
        page.evaluate("document.querySelector('.runs img').kept = true")
        written_run(tmp_path / "runs" / "newer")
        page.locator("#run-newer").wait_for()
        assert focused() == "run-old"
        assert page.evaluate("[...document.querySelectorAll('.runs img')].map((image) => image.kept)") == [None, True]
        page.goto("about:blank")


def test_a_draft_is_deleted_after_yes(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    draft = tmp_path / "runs" / ".ui" / "drafted"
    draft.mkdir(parents=True)
    (draft / "settings.yaml").write_text("model: emoji\n")
    answers = [False, True]
    page.on("dialog", lambda dialog: dialog.accept() if answers.pop(0) else dialog.dismiss())
    with served(tmp_path / "runs") as address:
        page.goto(f"{address}runs/drafted/")
        page.locator("#do-delete").click()
        assert draft.exists()
        page.locator("#do-delete").click()
        page.wait_for_url(address)
        assert not draft.exists()
        page.goto("about:blank")
    assert len(visit.complaints) == 2  # a fixture counts dialogs
    assert all("drafted" in text for text in visit.complaints)
    visit.complaints.clear()


@pytest.mark.parametrize("scale", [0, 1])
def test_no_scale_is_recommended_if_none_is_better_than_the_base_model(
    visit: Visit, tmp_path: Path, scale: int
) -> None:
    page, run = visit.page, written_run(tmp_path / "runs" / "old")
    path = run / "sweep" / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recommended": scale}))
    with served(tmp_path / "runs") as address:
        page.goto(f"{address}runs/old/")
        page.locator("#sweep .note").first.wait_for()
        said = page.locator("#sweep").inner_text().lower()
        assert ("recommended" in said) == (scale == 1)
        assert ("no scale is measurably better" in said) == (scale == 0)
        page.goto("about:blank")
