"""Pauses of a training run for comparisons (`--rate-every`): what is asked, learned, saved and resumed."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_taste import brightness, rated
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.evaluation.rating import shuffled
from draftune.report import rating
from draftune.report.rating import RatingSession
from draftune.rewards.bradley_terry import Accuracy
from draftune.rewards.comparisons import image_path, read_comparisons
from draftune.settings import Settings
from draftune.training.rating import asked_prompts
from draftune.training.trainer import Trainer
from draftune.utils.images import from_pil
from helpers.errors import mentions, raises


def clicked(monkeypatch: pytest.MonkeyPatch, prefers: Callable[[Tensor], float], most: int = 10**6) -> list[int]:
    """Let a thread answer all pairs of `run`, and set `stop` after `most` answers; return the updates asked at."""
    updates: list[int] = []
    original = RatingSession.run

    def run(session: RatingSession, stop: Callable[[], bool] = lambda: False) -> None:
        updates.append(int(session.open_rows[0].update))
        session.finished_seen.set()

        def answer() -> None:
            while not session.finished and not stop():
                if (names := session.state()["images"]) is None:
                    time.sleep(0.01)
                    continue
                images = [stored_tensor(session.images[name]) for name in names]
                session.answer(names, "left" if prefers(images[0]) > prefers(images[1]) else "right")

        thread = Thread(target=answer)
        thread.start()
        original(session, stop)
        thread.join()

    monkeypatch.setattr(RatingSession, "run", run)
    monkeypatch.setattr(rating, "PORT", 0)
    return updates


def stored_tensor(data: bytes) -> Tensor:
    return from_pil(Image.open(io.BytesIO(data)))


def train(ratings: Path, output: Path, **values: Any) -> Any:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 1, "num_inference_steps": 2, "prefix_reuse_steps": 1}
    settings |= {"log_images_steps": 0, "num_log_prompts": 1, "eval_prompts": "", "checkpointing_steps": 1}
    settings |= {"rate_every": 2, "rate_comparisons": 3, "output": str(output)} | values
    reward = f"taste(ratings='{ratings}', model=emoji_clip)"
    return Trainer("emoji", reward, ["pizza", "sun"], **settings)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated(tmp_path_factory.mktemp("rated"), 40, brightness, size=64)


def test_a_run_asks_on_its_own_images_and_learns_and_resumes(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    updates = clicked(monkeypatch, brightness)
    trainer = train(ratings, tmp_path / "whole")
    whole = trainer.train()
    assert updates == [2]  # not before the first update, and not after the last
    rows = read_comparisons(tmp_path / "whole" / "taste.csv")
    assert [row.update for row in rows] == [""] * 40 + ["2"] * 3
    assert {row.prompt for row in rows[40:]} == {"pizza", "sun"}
    assert all(image_path(tmp_path / "whole" / "taste.csv", name).is_file() for row in rows for name in row.images)
    assert mentions(caplog.text, "update 2: compare 3 pairs")
    # The weight is that of all comparisons.
    both = draftune.load_reward(f"taste(ratings='{tmp_path / 'whole' / 'taste.csv'}', model=emoji_clip)")
    base = draftune.load_reward(f"taste(ratings='{ratings}', model=emoji_clip)")
    assert torch.equal(trainer.reward.weight, both.weight)
    assert not torch.equal(trainer.reward.weight, base.weight)

    # Cut off after update 3: the weight is in the checkpoint, and nothing is asked again.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut" / "whole")
    cut = tmp_path / "cut" / "whole"
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    assert (cut / "checkpoints" / "step-000003").is_dir()
    updates.clear()
    resumed = train(ratings, cut)
    resumed.train()
    assert updates == []
    lora = "lora/pytorch_lora_weights.safetensors"
    assert_same(whole.folder / lora, cut / lora)
    assert torch.equal(resumed.reward.weight, both.weight)


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_stop_while_the_page_is_open_is_saved_and_asked_again(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = clicked(monkeypatch, brightness)
    whole = train(ratings, tmp_path / "a" / "run").train()
    interrupted = train(ratings, tmp_path / "b" / "run")
    ask = RatingSession.run

    def stopped(session: RatingSession, stop: Callable[[], bool] = lambda: False) -> None:
        stop.__self__._flag = True  # type: ignore[attr-defined]

    monkeypatch.setattr(RatingSession, "run", stopped)
    with pytest.raises(KeyboardInterrupt, match="update 2"):
        interrupted.train()
    monkeypatch.setattr(RatingSession, "run", ask)
    updates.clear()
    train(ratings, tmp_path / "b" / "run").train()
    assert updates == [2]
    lora = "lora/pytorch_lora_weights.safetensors"
    assert_same(whole.folder / lora, tmp_path / "b" / "run" / lora)


@pytest.mark.slow
def test_a_taste_that_is_no_longer_predicted_ends_the_run(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clicked(monkeypatch, brightness)
    trainer = train(ratings, tmp_path / "run")
    before = trainer.reward.weight.clone()
    monkeypatch.setattr("draftune.rewards.taste.cross_validate", lambda *_: Accuracy(25, 43))
    run = trainer.train()
    assert len(run.metrics) == 2
    assert mentions(caplog.text, "update 2: 25 of 43 chance training ends")
    assert torch.equal(trainer.reward.weight, before)
    assert (run.folder / "lora").is_dir()


def test_answers_of_an_earlier_run_of_this_name_are_not_its_own(
    ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder is used again, with the comparisons of the run that was there."""
    updates = clicked(monkeypatch, brightness)
    train(ratings, tmp_path / "run", steps=3).train()
    (tmp_path / "run").rename(tmp_path / "kept")
    updates.clear()
    train(tmp_path / "kept" / "taste.csv", tmp_path / "run", steps=3).train()
    assert updates == [2]
    rows = read_comparisons(tmp_path / "run" / "taste.csv")
    assert [row.model for row in rows[40:]] == ["run (earlier)"] * 3 + ["run"] * 3


def test_what_does_not_fit_is_refused(ratings: Path, tmp_path: Path) -> None:
    for reward in (
        "emoji_aesthetic",
        f"taste(ratings='{ratings}', model=emoji_clip) + taste(ratings='{ratings}', model=emoji_clip)",
    ):
        with raises(DraftuneError, "rate_every taste"):
            Trainer("emoji", reward, ["pizza"], rate_every=2, output=str(tmp_path / "run"))
    settings = Settings(rate_every=2, rate_comparisons=2, steps=6)
    names = ["a", "b", "c", "d", "e"]
    assert asked_prompts(names, settings) == shuffled(names, 0)[:4]
    assert asked_prompts(["a"], replace(settings, rate_every=0)) == []
