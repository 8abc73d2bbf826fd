"""What LoRAs are measured by: prompts, seeds and rewards, those of a run unless others are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from draftune.errors import DraftuneError, gather
from draftune.evaluation.metrics import Evaluation, evaluate
from draftune.models import Model
from draftune.prompts import load_prompts
from draftune.rewards import Reward, find_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import taught
from draftune.runs.load import Tuned
from draftune.settings import Settings

T = TypeVar("T")
SHOWN = 8
"""Prompts whose pictures are shown."""


@dataclass
class Yardstick:
    """Prompts, how many pictures of each, the reward, and those that nothing was trained on, or None."""

    prompts: list[str]
    num_images: int
    reward: Reward
    held_out: Reward | None

    @property
    def rewards(self) -> list[Reward]:
        return [self.reward] if self.held_out is None else [self.reward, self.held_out]

    @property
    def shown(self) -> list[int]:
        """Which prompts' pictures are shown: a few, evenly."""
        count = min(SHOWN, len(self.prompts))
        return [i * len(self.prompts) // count for i in range(count)]

    def show(self, evaluation: Evaluation) -> tuple[Tensor, list[str]]:
        """Of each prompt that is shown the first picture [N, 3, H, W], and its reward."""
        rewards = evaluation.values[self.reward.label][self.shown, 0].tolist()
        return evaluation.images[[i * self.num_images for i in self.shown]], [f"{reward:.3g}" for reward in rewards]

    def ready(self, device: torch.device | str = "cpu") -> Yardstick:
        """With the rewards' weights read. Raises DraftuneError for prompts that they can't score."""
        for reward in self.rewards:
            reward.ready().to(device)
            check_prompts(reward, self.prompts)
        return self

    def measure(self, model: Model, settings: Settings) -> Evaluation:
        """The scores of what the model draws now, with the steps and the guidance of the settings."""
        schedule = model.schedule(settings.num_inference_steps)

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.generate(
                prompts, seeds, schedule, settings.guidance_scale, settings.negative_prompt, progress=True
            )

        return evaluate(draw, self.reward, self.held_out, self.prompts, self.num_images, model.device)


def find_yardstick(
    loras: Sequence[Tuned],
    prompts: str | list[str] | None = None,
    reward: Any = None,
    held_out: Any = None,
    num_images: int = 2,
) -> Yardstick:
    """What is asked for, and else what the first LoRA that lies in a run was evaluated by; '' for no held-out rewards.

    Raises one DraftuneError that says all that is missing, before any weights are read.
    """
    run = next((tuned.settings for tuned in loras if tuned.in_run), None)
    if run is None and not (prompts and reward):
        raise DraftuneError(f"the LoRA {loras[0].source!r} lies in no run's folder: say --prompts and --reward")
    judged = held_out if held_out is not None or run is None else run.held_out
    wanted: list[Callable[[], Any]] = [
        lambda: recalled("prompts", prompts, run and (run.eval_prompts or run.prompts), load_prompts),
        lambda: recalled("reward", reward, run and run.reward, find_taught),
        lambda: recalled("held-out", held_out, judged, find_taught) if judged else None,
    ]
    texts, score, judge = gather(*wanted)
    yardstick = Yardstick(texts, num_images, score, judge)
    for scored in yardstick.rewards:
        scored.set_chunk_size((run or loras[0].settings).reward_batch_size)
    return yardstick


def find_taught(reward: Any) -> Reward:
    return taught(find_reward(reward))


def recalled(flag: str, asked: Any, kept: Any, find: Callable[[Any], T]) -> T:
    """What was asked for, else what the run's settings say, which need not be there any more."""
    if asked:
        return find(asked)
    try:
        return find(kept)
    except DraftuneError as error:
        raise DraftuneError(f"the {flag} of the run can't be had again (give --{flag}): {error}") from error
