"""The LoRA that training starts from, and the reward and prompts that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import RETAINED_PREFIX
from draftune.lora import base_model, lora_file, saved_grid, saved_steps
from draftune.prompts import load_prompts, run_prompts
from draftune.rewards import Reward, parse_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import require_trained
from draftune.rewards.precision import load_in_precision
from draftune.runs.checkpoint import checksum
from draftune.runs.fingerprint import same_source
from draftune.runs.run_dir import run_settings
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.utils.logging import logger


@dataclass
class ContinuedRun:
    """The LoRA of `init_lora` and, if a run wrote it, that run's reward and evaluation prompts."""

    lora: Path
    checksum: str
    """SHA-256 of the LoRA's file."""
    kept: Sequence[str]
    """Prompts of the retention loss (`retain_prompts`)."""
    reward: Reward | None = None
    """The earlier run's reward, which evaluations measure; None if it is unknown."""
    prompts: Sequence[str] = ()
    """Prompts on which it is measured."""

    @property
    def columns(self) -> list[str]:
        """Return the columns of evaluations.jsonl with the earlier run's reward and its terms."""
        if self.reward is None:
            return []
        return [f"{RETAINED_PREFIX}{label}" for label in dict.fromkeys([self.reward.label, *self.reward.named_terms])]

    def compare(self, grid: Mapping[str, Any]) -> None:
        """Warn if the LoRA was trained with other sampling timesteps than those of this run."""
        if (known := saved_grid(self.lora)) and known != grid:
            logger.warning("%r was trained on the timesteps %s, but this run uses %s", str(self.lora), known, grid)

    def ready(self, device: torch.device, precision: str | None) -> Reward | None:
        """Load the reward's weights. If that fails, log a warning and drop the reward: it is only measured."""
        try:
            if self.reward is not None:
                check_prompts(load_in_precision(self.reward, precision).to(device), self.prompts)
        except DraftuneError as error:
            logger.warning("the reward of the earlier training is not measured: %s", error)
            self.reward = None
        return self.reward


def resolve_continued_run(settings: Settings) -> ContinuedRun | None:
    """Find the LoRA that the run starts from, without reading its weights.

    Returns:
        The LoRA, None without `init_lora`.

    Raises:
        DraftuneError: there is no such LoRA, or it belongs to another model or to other sampling steps.
    """
    s = settings
    if not s.init_lora:
        if s.retain_prompts:
            raise DraftuneError("retain_prompts needs the LoRA to stay close to: give its run (--init-lora)")
        return None
    lora = lora_file(s.init_lora)
    if (base := base_model(lora)) is not None and not same_source(base, s.model):
        raise DraftuneError(
            f"the LoRA {s.init_lora!r} was trained for {base!r}, not for {s.model!r} (--model); if these are the "
            f"same model, 'draftune merge {s.init_lora} --model {s.model}' writes the LoRA for this name"
        )
    if (frozen := saved_steps(lora)) != (steps := StepRange.parse(s.lora_steps)):
        merged = ", or train on a pipeline with that LoRA merged into it ('draftune export --format merged')"
        raise DraftuneError(
            f"the LoRA {s.init_lora!r} is active on the steps {frozen}, but lora_steps is {steps}: both are saved as "
            f"one LoRA with one range; use --lora-steps {frozen}{merged if frozen.is_all else ''}"
        )
    past = ContinuedRun(lora, checksum(lora), load_prompts(s.retain_prompts) if s.retain_prompts else ())
    earlier = run_settings(lora)
    if earlier is not None and s.eval_prompts:
        try:
            reward, prompts = require_trained(parse_reward(earlier.reward)), past.kept
            if earlier.eval_prompts:
                prompts = run_prompts(earlier.prompts, earlier.eval_prompts, earlier.seed)
            if prompts:
                past.reward, past.prompts = reward, prompts
        except DraftuneError as error:
            # The reward may have been a Python object, or a file that was moved since.
            logger.warning("the reward of %r is not measured: %s", s.init_lora, error)
    return past
