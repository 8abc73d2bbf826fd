"""A run that was cut off and started again is the run that was never cut off."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.rewards import Reward
from draftune.runs.checkpoint import checkpoints, read_state, read_tensors, save_checkpoint
from draftune.training import Callback, Run
from helpers.errors import mentions, raises

PROMPTS = ["a cat", "a dog", "a bird"]


def noisy_brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """It draws from torch's own generator, so that this must be where it was too."""
    return images.mean((1, 2, 3)) * (1 + 0.1 * torch.rand(len(images)))


def train(model: Path, output: Path, reward: Callable[..., Tensor] = noisy_brightness, **values: Any) -> Run:
    if not isinstance(reward, Reward):
        reward.__name__ = "brightness"
    (output.parent / "prompts.txt").write_text("a fish\na tree\n")
    settings = {
        "steps": 6,
        "checkpointing_steps": 2,
        "validation_steps": 3,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "log_images_steps": 0,
        "num_log_prompts": 1,
        "batch_size": 2,
        "reward_batch_size": 2,
        "prompts": PROMPTS,
        "eval_prompts": str(output.parent / "prompts.txt"),
        "num_validation_images": 1,
        "learning_rate": 0.01,
    }
    return draftune.train(str(model), reward, output=str(output), **(settings | values))


def cut_off_after(calls: int) -> Callable[..., Tensor]:
    """The reward of a process that is killed in the middle of an update."""
    made: list[int] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return noisy_brightness(images, prompts)

    return reward


def lora(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train_seconds"} for row in read]


@pytest.mark.parametrize(
    ("values", "cuts"),
    [
        ({"method": "draft_lv(n=1)", "gradient_accumulation_steps": 2}, (8, 18)),
        ({"method": "draft_k(k=2)", "prefix_reuse_steps": 3}, (3, 6)),
        ({"method": "draft_k(k=2)", "prefix_reuse_steps": 1, "prefix_reuse_cosine": 0.9}, (3, 9)),
        ({"method": "leapalign"}, (3, 6)),
        ({"method": "flowbp_bridge(k=3)"}, (3, 6)),
        ({"method": "direct_align", "prefix_reuse_steps": 3}, (4, 9)),
        ({"method": "ddpo(min_count=2, inner_epochs=2)"}, (3, 7)),
        ({"method": "diffusion_nft(decay_rate=0.3)", "num_images_per_prompt": 2}, (3, 7)),
        (
            {"method": "online_dpo(reference_updates=3)", "num_images_per_prompt": 2, "gradient_accumulation_steps": 2},
            (4, 11),
        ),
        ({"method": "kl(alignprop(m=3), beta=0.01)", "mixed_precision": "bf16"}, (3, 7)),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_a_run_goes_on_bit_for_bit(
    pipeline_folder: Path, tmp_path: Path, values: dict[str, Any], cuts: tuple[int, int]
) -> None:
    """Cut off in the second update, when nothing but the start was saved, and again in the fourth."""
    whole = train(pipeline_folder, tmp_path / "whole", **values)
    for calls, left in zip(cuts, ([1], [1, 2, 3]), strict=True):
        with pytest.raises(KeyboardInterrupt):
            train(pipeline_folder, tmp_path / "cut", cut_off_after(calls), **values)
        assert [row["step"] for row in rows(tmp_path / "cut", "metrics.jsonl")] == left
    resumed = train(pipeline_folder, tmp_path / "cut", **values)
    first, second = lora(whole.folder), lora(resumed.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(whole.folder, name) == rows(resumed.folder, name)
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in resumed.evaluations] == [0, 3, 6]
    assert whole.comparison is not None
    assert resumed.comparison is not None
    assert resumed.comparison.scores == whole.comparison.scores
    assert torch.equal(resumed.comparison.base.images, whole.comparison.base.images)


def test_a_signal_in_the_last_update_ends_a_run_before_its_last_evaluation(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    class Signal(Callback):
        def on_step_end(self, step: int, logs: Mapping[str, Any]) -> None:
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    values: dict[str, Any] = {"method": "draft_k(k=1)", "callbacks": [Signal()]}
    with raises(KeyboardInterrupt, "update 6"):
        train(pipeline_folder, tmp_path / "run", **values)
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations.jsonl")] == [0, 3]
    resumed = train(pipeline_folder, tmp_path / "run", method="draft_k(k=1)")
    assert [row["step"] for row in resumed.evaluations] == [0, 3, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_update(
    pipeline_folder: Path, tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(1)
        if len(calls) == 6:  # in the third update, after which the run is evaluated
            os.kill(os.getpid(), number)
        return noisy_brightness(images, prompts)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with raises(KeyboardInterrupt, "update 3"):
        train(pipeline_folder, tmp_path / "run", reward, method="draft_k(k=1)", checkpointing_steps=0)
    assert mentions(caplog.text, "update")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000000",
        "step-000003",
    ]
    train(pipeline_folder, tmp_path / "run", method="draft_k(k=1)", checkpointing_steps=0)
    whole = train(pipeline_folder, tmp_path / "whole", method="draft_k(k=1)", checkpointing_steps=0)
    assert rows(whole.folder, "evaluations.jsonl") == rows(tmp_path / "run", "evaluations.jsonl")
    first, second = lora(whole.folder), lora(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_can_be_made_longer(pipeline_folder: Path, tmp_path: Path) -> None:
    whole = train(pipeline_folder, tmp_path / "whole")
    train(pipeline_folder, tmp_path / "grown", steps=3)
    with raises(DraftuneError, "3 updates"):
        train(pipeline_folder, tmp_path / "grown", steps=3)
    grown = train(pipeline_folder, tmp_path / "grown")
    assert all(torch.equal(a, b) for a, b in zip(lora(whole.folder).values(), lora(grown.folder).values(), strict=True))
    kept = sorted(path.name for path in (grown.folder / "checkpoints").iterdir())
    # The newest two, and the best.
    best = next(row["step"] for row in reversed(grown.evaluations) if row["best"])
    assert kept == sorted({f"step-{step:06d}" for step in (best, 4, 6)})


def test_a_schedule_that_has_ended_is_not_made_longer(pipeline_folder: Path, tmp_path: Path) -> None:
    train(pipeline_folder, tmp_path / "run", steps=2, lr_scheduler="cosine")
    with raises(DraftuneError, "2 updates rate end cosine folder --output"):
        train(pipeline_folder, tmp_path / "run", steps=2, lr_scheduler="cosine")


def test_a_gradient_that_vanished_is_no_reason_to_end_a_resumed_run(pipeline_folder: Path, tmp_path: Path) -> None:
    """As of images that have all passed a threshold. In the first updates it would be an error."""

    class Reached(Reward):
        step_number = 0

        def on_step(self, step: int) -> None:
            self.step_number = step

        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3)) * (0 if self.step_number > 4 else 1)

    whole = train(pipeline_folder, tmp_path / "whole", Reached(), steps=10)
    train(pipeline_folder, tmp_path / "cut", Reached(), steps=5)
    cut = train(pipeline_folder, tmp_path / "cut", Reached(), steps=10)
    assert len(cut.metrics) == 10
    assert all(torch.equal(a, b) for a, b in zip(lora(whole.folder).values(), lora(cut.folder).values(), strict=True))


def test_a_normalized_reward_has_the_weights_of_its_checkpoint(pipeline_folder: Path, tmp_path: Path) -> None:
    """Another device may normalize a little differently."""

    def scaled(factor: float) -> Callable[..., Tensor]:
        return lambda images, prompts: factor * images.mean((1, 2, 3))

    values = {"reward_normalization_samples": 4, "validation_steps": 1}
    train(pipeline_folder, tmp_path / "run", scaled(1.0), steps=2, **values)
    resumed = train(pipeline_folder, tmp_path / "run", scaled(1.1), steps=3, **values)
    columns = {name for row in resumed.evaluations for name in row if "brightness" in name}
    (written,) = columns - {"brightness"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["reward"] == written


def test_another_run_is_not_taken_up(pipeline_folder: Path, tmp_path: Path) -> None:
    train(pipeline_folder, tmp_path / "run", steps=2)
    with raises(DraftuneError, "learning_rate 0.01 0.02"):
        train(pipeline_folder, tmp_path / "run", learning_rate=0.02)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "note.txt").write_text("mine")
    with raises(DraftuneError, "run prompts"):
        train(pipeline_folder, tmp_path / "run", prompts=["a cat", "a dog", "a bear"], steps=3)
    with raises(DraftuneError, tmp_path / "files"):
        train(pipeline_folder, tmp_path / "files")
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["note.txt"]


def test_what_was_left_half_written_is_passed_over(pipeline_folder: Path, tmp_path: Path) -> None:
    whole = train(pipeline_folder, tmp_path / "whole", steps=4)
    run = train(pipeline_folder, tmp_path / "run", steps=2)
    half = run.folder / "checkpoints" / ".step-000003"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    resumed = train(pipeline_folder, tmp_path / "run", steps=4)
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4]
    first, second = lora(whole.folder), lora(resumed.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_former_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step}, {"a": torch.zeros(2)})
    save_checkpoint(tmp_path, 2, {"step": 2, "finished": True}, {"a": torch.ones(2)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"]
    (tmp_path / "step-000002").rename(tmp_path / ".step-000002-replaced")  # as between the two renames
    newest = checkpoints(tmp_path)[-1]
    assert read_state(newest)["finished"]
    assert read_tensors(newest)["a"].all()
    save_checkpoint(tmp_path, 2, {"step": 2}, {"a": torch.zeros(2)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"]


def test_a_damaged_checkpoint_is_refused_by_name(pipeline_folder: Path, tmp_path: Path) -> None:
    train(pipeline_folder, tmp_path / "run", steps=4)
    newest = tmp_path / "run" / "checkpoints" / "step-000004"
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    message = "step-000004 delete step-00000"
    assert set(files) == {"state.json", "tensors.safetensors", "checksums.json"}
    for name, whole in files.items():
        flipped = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
        for damaged in (flipped, whole[: len(whole) // 2], b"", None):
            path = newest / name
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with raises(DraftuneError, message):
                train(pipeline_folder, tmp_path / "run", steps=6)
            path.write_bytes(whole)
    (newest / "tensors.safetensors").unlink()
    newest.rename(newest.with_name("broken"))
    train(pipeline_folder, tmp_path / "run", steps=5)
    assert [row["step"] for row in rows(tmp_path / "run", "metrics.jsonl")] == [1, 2, 3, 4, 5]
