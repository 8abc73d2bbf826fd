"""What goes wrong in a long run: it is said, and nothing is lost."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import lora, noisy_brightness, rows, train
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import check_reward
from draftune.rewards import load_reward
from draftune.runs import checkpoint
from draftune.runs.run_dir import RunFolder, next_free_dir
from draftune.settings import Settings
from helpers.errors import mentions, raises


def failing(at: Sequence[int], gradient: bool) -> Callable[..., Tensor]:
    """A reward that is not a number, or whose gradient is not, at some of its calls with a gradient."""
    calls: list[int] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        score = noisy_brightness(images, prompts)
        if images.requires_grad:
            calls.append(1)
            if len(calls) in at and gradient:
                images.register_hook(lambda slope: slope * torch.nan)
            elif len(calls) in at:
                return torch.where(torch.tensor([True, False]), torch.nan, score)
        return score

    return reward


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


KNOWN: dict[str, Any] = {"method": "draft_k(k=1)", "validation_steps": 0, "eval_prompts": ""}


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_ends_a_run_and_is_kept_to_look_at(
    pipeline_folder: Path, tmp_path: Path, gradient: bool
) -> None:
    """The first call tries the reward, the others are updates 1, 2, 3, …"""
    said = "gradient nan" if gradient else "reward [nan, 0."
    with raises(DraftuneError, said, "update 4 step-000004 step-000002 --nonfinite-action skip"):
        train(pipeline_folder, tmp_path / "run", failing([5], gradient), **KNOWN)
    before = train(pipeline_folder, tmp_path / "before", steps=3, **KNOWN)
    assert all(
        torch.equal(a, b) for a, b in zip(lora(before.folder).values(), lora(tmp_path / "run").values(), strict=True)
    )
    folder = tmp_path / "run" / "nonfinite" / "step-000004"
    tensors = load_file(folder / "0.safetensors")
    assert tensors["noise"].shape == (2, 4, 8, 8)
    assert tensors["images"].shape[:2] == (2, 3)
    assert tensors["reward"].isnan().tolist() == [not gradient, False]
    with safe_open(folder / "0.safetensors", "pt") as file:
        assert set(json.loads(file.metadata()["prompts"])) <= {"a cat", "a dog", "a bird"}
    assert sorted(path.name for path in folder.iterdir()) == ["0-0.png", "0-1.png", "0.safetensors"]


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_can_be_left_out(pipeline_folder: Path, tmp_path: Path, gradient: bool) -> None:
    reward = failing([3, 4], gradient)
    run = train(pipeline_folder, tmp_path / "run", reward, nonfinite_action="skip", **KNOWN)
    assert [row.get("nonfinite_steps") for row in run.metrics] == [None, 1, 2, 2, 2, 2]
    assert [row["grad_norm"] is None for row in run.metrics] == [False, True, True, False, False, False]
    assert [row["reward"] is None for row in run.metrics] == [not gradient and i in (1, 2) for i in range(6)]
    assert all(tensor.isfinite().all() for tensor in lora(run.folder).values())
    # As if these updates had had no say: Adam's averages are of four gradients.
    tensors = checkpoint.read_tensors(run.folder / "checkpoints" / "step-000006")
    assert {float(value) for name, value in tensors.items() if name.endswith("/step")} == {4.0}


def test_too_much_that_is_not_finite_ends_a_run(pipeline_folder: Path, tmp_path: Path) -> None:
    reward = failing(range(3, 100), False)
    with raises(DraftuneError, "update 22 20"):
        train(pipeline_folder, tmp_path / "run", reward, nonfinite_action="skip", steps=50, **KNOWN)


def test_one_process_in_a_folder(pipeline_folder: Path, tmp_path: Path) -> None:
    train(pipeline_folder, tmp_path / "run", steps=2)
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".draftune.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with raises(DraftuneError, "process", tmp_path / "run"):
            train(pipeline_folder, tmp_path / "run")
        other.kill()
    assert len(train(pipeline_folder, tmp_path / "run").metrics) == 6


def test_a_run_that_another_process_went_on_with_is_not_overwritten(pipeline_folder: Path, tmp_path: Path) -> None:
    def meanwhile(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not done:
            done.append(1)
            train(pipeline_folder, tmp_path / "run", steps=4)
        return noisy_brightness(images, prompts)

    train(pipeline_folder, tmp_path / "run", steps=2)
    done: list[int] = []
    with raises(DraftuneError, "process run"):
        train(pipeline_folder, tmp_path / "run", meanwhile)
    assert len(rows(tmp_path / "run", "metrics.jsonl")) == 4


def test_no_resume_begins_anew_beside_it(pipeline_folder: Path, tmp_path: Path) -> None:
    first = train(pipeline_folder, tmp_path / "run", steps=2)
    second = train(pipeline_folder, tmp_path / "run", steps=3, resume=False)
    assert (first.folder, second.folder) == (tmp_path / "run", tmp_path / "run-2")
    assert [len(rows(run.folder, "metrics.jsonl")) for run in (first, second)] == [2, 3]
    assert next_free_dir(tmp_path / "run") == tmp_path / "run-3"
    assert next_free_dir(tmp_path / "new") == tmp_path / "new"
    # Its own settings go on with it, and do not begin anew once more.
    assert "resume: true" in (second.folder / "config.yaml").read_text()
    assert f"output: {second.folder}" in (second.folder / "config.yaml").read_text()


def test_a_run_that_ended_before_its_first_checkpoint_begins(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".draftune.lock").touch()
    (tmp_path / "run" / "config.yaml").write_text("half of it")
    assert len(train(pipeline_folder, tmp_path / "run", steps=2).metrics) == 2


def test_a_disk_that_fills_up_loses_nothing(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(pipeline_folder, tmp_path / "whole")
    save, saved = checkpoint.save_tensors, []

    def full(path: Path, *args: Any) -> None:
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, *args)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with raises(DraftuneError, "No space left on device step-00000"):
        train(pipeline_folder, tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    run = train(pipeline_folder, tmp_path / "run")
    assert rows(whole.folder, "metrics.jsonl") == rows(run.folder, "metrics.jsonl")
    assert_equal(lora(whole.folder), lora(run.folder))


def test_a_disk_that_is_nearly_full_is_noticed_before(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with raises(DraftuneError, "0 MiB"):
        train(pipeline_folder, tmp_path / "run")


def test_the_share_of_pixels_without_a_gradient(caplog: pytest.LogCaptureFixture) -> None:
    def corner(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 3 * images[:, 0, :4, :4].sum((1, 2))

    images = torch.full((2, 3, 8, 8), 0.5)
    found = check_reward(load_reward(corner), images, ["a", "b"])
    assert found == {"corner": {"score": 24.0, "gradient_norm": 12.0, "pixels_without_gradient": 0.75}}
    assert mentions(caplog.text, "corner gradient 75% pixels")
    assert check_reward(load_reward(corner), images, ["a", "b"], gradient=False) == {"corner": {"score": 24.0}}


def test_pictures_that_do_not_move_are_noticed(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(pipeline_folder, tmp_path / "still", learning_rate=1e-12)
    assert mentions(caplog.text, "3 updates base model")
    caplog.clear()
    train(pipeline_folder, tmp_path / "moved")
    assert not mentions(caplog.text, "base model")


def test_the_folder_is_taken_until_it_is_closed(tmp_path: Path) -> None:
    folder = RunFolder(Settings(output=str(tmp_path / "run")), {})
    (tmp_path / "run").mkdir()
    folder.acquire()
    with raises(DraftuneError, "process", tmp_path / "run"):
        RunFolder(Settings(output=str(tmp_path / "run")), {})
    folder.close()
    RunFolder(Settings(output=str(tmp_path / "run")), {})


def test_tensorboard_that_fails_ends_nothing(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert len(train(pipeline_folder, tmp_path / "run", steps=2).metrics) == 2
    monkeypatch.undo()
    folder = RunFolder(Settings(output=str(tmp_path / "other")), {})
    (tmp_path / "other").mkdir()
    folder.acquire()
    folder.events = SummaryWriter(str(tmp_path / "events"))
    monkeypatch.setattr(SummaryWriter, "close", full)
    folder.close()
    assert not folder.lock.is_locked


def test_a_run_that_ended_in_its_last_look_has_only_that_left(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from draftune.training import Trainer

    whole = train(pipeline_folder, tmp_path / "whole", checkpointing_steps=0)
    look, looks = Trainer.evaluate, []

    def cut(trainer: Trainer) -> None:
        looks.append(trainer.global_step)
        if len(looks) == 2:
            raise KeyboardInterrupt
        look(trainer)

    monkeypatch.setattr(Trainer, "evaluate", cut)
    with pytest.raises(KeyboardInterrupt):
        train(pipeline_folder, tmp_path / "run", checkpointing_steps=0)
    monkeypatch.undo()
    assert looks == [3, 6]
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations.jsonl")] == [0, 3]
    train(pipeline_folder, tmp_path / "run", checkpointing_steps=0)
    assert_equal(lora(whole.folder), lora(tmp_path / "run"))
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert rows(whole.folder, name) == rows(tmp_path / "run", name)
    with raises(DraftuneError, "6 updates"):
        train(pipeline_folder, tmp_path / "run", checkpointing_steps=0)


def test_preflight_keeps_nothing_of_what_is_not_finite(pipeline_folder: Path, tmp_path: Path) -> None:
    from draftune.training.memory_check import preflight

    (tmp_path / "mine.py").write_text(
        "def nan_later(images, prompts, calls=[]):\n"
        "    calls.append(1)\n"
        "    return images.mean((1, 2, 3)) * (float('nan') if len(calls) > 1 else 1.0)\n"
    )
    (tmp_path / "prompts.txt").write_text("a cat\n")
    said = {"reward": f"{tmp_path}/mine.py:nan_later", "prompts": str(tmp_path / "prompts.txt"), "batch_size": 1}
    settings = Settings(model=str(pipeline_folder), num_inference_steps=2, output=str(tmp_path / "run"), **said)
    with raises(DraftuneError, "reward [nan] update 1"):
        preflight(settings)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["mine.py", "prompts.txt"]
    assert not (tmp_path / "run").exists()
