"""Prompts, seeds and rewards of an evaluation: those of a run unless the caller gives others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from draftune.errors import DraftuneError, gather
from draftune.evaluation.metrics import Evaluation, evaluate
from draftune.models import DiffusionModel
from draftune.prompts import load_prompts, run_prompts
from draftune.rewards import Reward, parse_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import require_trained
from draftune.rewards.precision import load_in_precision
from draftune.runs.load import LoRASource
from draftune.settings import Settings

T = TypeVar("T")
SHOWN = 8
"""Number of prompts whose images are in the image grids."""


@dataclass
class EvalSpec:
    """Specification of an evaluation.

    Attributes:
        prompts: The prompts.
        num_images: Number of images of each prompt, with the seeds 0, 1, ….
        reward: The reward of training.
        eval_rewards: Evaluation rewards, which were not trained on, or None.
        reward_precision: Precision of the rewards' weights, see `load_in_precision`.
    """

    prompts: list[str]
    num_images: int
    reward: Reward
    eval_rewards: Reward | None
    reward_precision: str | None = None

    @property
    def rewards(self) -> list[Reward]:
        """Return the reward and the evaluation rewards."""
        return [self.reward] if self.eval_rewards is None else [self.reward, self.eval_rewards]

    @property
    def shown(self) -> list[int]:
        """Return the indices of the prompts in the image grids, evenly spaced."""
        count = min(SHOWN, len(self.prompts))
        return [i * len(self.prompts) // count for i in range(count)]

    def show(self, evaluation: Evaluation) -> tuple[Tensor, list[str]]:
        """Return the first image of each prompt in the grids [N, 3, H, W], and its reward as a caption."""
        rewards = evaluation.values[self.reward.label][self.shown, 0].tolist()
        return evaluation.images[[i * self.num_images for i in self.shown]], [f"{reward:.3g}" for reward in rewards]

    def ready(self, device: torch.device | str = "cpu") -> EvalSpec:
        """Load the rewards on a device. Raises DraftuneError for prompts that a reward cannot score."""
        for reward in self.rewards:
            load_in_precision(reward, self.reward_precision).to(device)
            check_prompts(reward, self.prompts)
        return self

    def measure(self, model: DiffusionModel, settings: Settings) -> Evaluation:
        """Sample images as an evaluation during training does, `batch_size` at a time, and score them."""
        s, schedule = settings, model.schedule(settings.num_inference_steps)

        def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return model.sample_tensors(
                prompts, seeds, schedule, s.guidance_scale, s.negative_prompt, s.batch_size, progress=True
            )

        return evaluate(sample, self.reward, self.eval_rewards, self.prompts, self.num_images, model.device)


def resolve_eval_spec(
    loras: Sequence[LoRASource],
    prompts: str | list[str] | None = None,
    reward: Any = None,
    eval_rewards: Any = None,
    num_images: int = 2,
    reward_precision: str | None = None,
) -> EvalSpec:
    """Return the given specification, completed by the settings of the first LoRA that belongs to a run.

    No weights are loaded.

    Args:
        loras: The LoRAs to evaluate.
        prompts: A prompt set, a prompt file or a list of prompts.
        reward: An expression or a reward.
        eval_rewards: Evaluation rewards; '' for none.
        num_images: Number of images of each prompt.
        reward_precision: Precision of the rewards' weights, see `load_in_precision`.

    Raises:
        DraftuneError: one error that lists everything that is missing.
    """
    run = next((tuned.settings for tuned in loras if tuned.in_run), None)
    if run is None and not (prompts and reward):
        raise DraftuneError(f"the LoRA {loras[0].source!r} belongs to no run: give --prompts and --reward")
    evaluated_by = eval_rewards if eval_rewards is not None or run is None else run.eval_rewards
    parts: list[Callable[[], Any]] = [
        lambda: load_prompts(prompts) if prompts else of_run("prompts", lambda: prompts_of(run)),
        lambda: arg_or_run_setting("reward", reward, run and run.reward, find_taught),
        lambda: arg_or_run_setting("eval_rewards", eval_rewards, evaluated_by, find_taught) if evaluated_by else None,
    ]
    texts, trained, evaluation = gather(*parts)
    settings = run or loras[0].settings
    yardstick = EvalSpec(texts, num_images, trained, evaluation, reward_precision or settings.reward_precision)
    for scored in yardstick.rewards:
        scored.set_chunk_size(settings.reward_batch_size)
    return yardstick


def find_taught(reward: Any) -> Reward:
    """Parse a reward. Raises DraftuneError if it has to learn in training before it can score."""
    return require_trained(parse_reward(reward))


def prompts_of(run: Settings | None) -> list[str]:
    """Return the prompts on which a run is evaluated."""
    assert run is not None  # without a run, the caller requires prompts
    return run_prompts(run.prompts, run.eval_prompts, run.seed)


def arg_or_run_setting(name: str, given: Any, run_setting: Any, load: Callable[[Any], T]) -> T:
    """Load the given value, else the run's setting. Raises DraftuneError that names the flag if that fails."""
    return load(given) if given else of_run(name, lambda: load(run_setting))


def of_run(name: str, load: Callable[[], T]) -> T:
    """Load a setting of a run. Raises DraftuneError that names the flag if that fails."""
    try:
        return load()
    except DraftuneError as error:
        flag = "--" + name.replace("_", "-")
        raise DraftuneError(f"{name} of the run cannot be loaded (give {flag}): {error}") from error
