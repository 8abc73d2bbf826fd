"""A run that is killed without a word, again and again, is the run that was never killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftune.runs.logs import read_rows

KILLS = int(os.environ.get("DRAFTUNE_KILLS", "20"))
IMPORTED = ("accelerate", "draftune.training.train", "peft", "torch.utils.tensorboard")
IMPORTED += ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip")
SETTINGS: dict[str, Any] = {
    "method": "draft_lv(n=1)",
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "batch_size": 1,
    "lora_rank": 4,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "checkpointing_steps": 1,
    "log_images_steps": 4,
    "num_log_prompts": 1,
    "validation_steps": 5,
    "num_validation_images": 1,
    "metric_for_best_model": "emoji_aesthetic",
    "eval_rewards": "",
    "device": "cpu",
}


def work(settings: dict[str, Any]) -> None:
    """What the process that is killed does."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    import draftune

    draftune.train("emoji", "emoji_aesthetic", **settings)


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that start with everything imported."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["test_kill", *IMPORTED])
    return found


def started(context: Any, settings: dict[str, Any]) -> ForkServerProcess:
    process = context.Process(target=work, args=(settings,))
    process.start()
    return process


def updates(folder: Path) -> list[int]:
    """The updates in the log, without a last line that is half written."""
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((folder / "checkpoints").glob(".step-*"))


def killed(process: ForkServerProcess, folder: Path, moment: str, delay: float) -> bool:
    """Kills the process at a moment: some seconds after its start, after it wrote two updates, or in a save.

    Whether it was in time.
    """
    before = len(updates(folder))
    if moment != "start":
        # The second update is written after the first one's checkpoint: each such process makes progress.
        while process.is_alive() and len(updates(folder)) < before + 2:
            time.sleep(0.002)
    end = time.monotonic() + delay
    while process.is_alive() and (not saving(folder) if moment == "save" else time.monotonic() < end):
        time.sleep(0.0002)
    alive = process.is_alive()
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def finished(context: Any, settings: dict[str, Any]) -> None:
    process = started(context, settings)
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kills"),
    [({}, KILLS), ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, KILLS // 2)],
    ids=["float32", "bf16 and accumulation"],
)
def test_killed_at_random_moments(context: Any, tmp_path: Path, values: dict[str, Any], kills: int) -> None:
    (tmp_path / "prompts.txt").write_text("cat face\npizza\n")
    settings = {**SETTINGS, **values, "prompts": str(tmp_path / "prompts.txt")}
    settings["eval_prompts"] = settings["prompts"]
    chance, cut = random.Random(0), {**settings, "output": str(tmp_path / "cut")}
    saves = 0
    for i in range(kills):
        moment = ("update", "start", "update", "save")[i % 4]
        delay = chance.uniform(0, 4 if moment == "start" else 0.4)
        # Asked for so many updates, it never ends by itself, however fast the machine.
        in_time = killed(started(context, {**cut, "steps": 100_000}), tmp_path / "cut", moment, delay)
        assert in_time, f"the run ended before kill {i + 1} of {kills}"
        saves += saving(tmp_path / "cut")
    steps = max(updates(tmp_path / "cut")) + 3
    finished(context, {**cut, "steps": steps})
    finished(context, {**settings, "steps": steps, "output": str(tmp_path / "whole")})
    assert saves >= kills // 8, "too few kills were in the middle of a save"
    whole, resumed = (
        load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("whole", "cut")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert updates(tmp_path / "whole") == updates(tmp_path / "cut") == list(range(1, steps + 1))
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        first, second = (
            [{**json.loads(line), "train_seconds": 0} for line in (tmp_path / run / name).read_text().splitlines()]
            for run in ("whole", "cut")
        )
        assert first == second
