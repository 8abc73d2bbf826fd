"""What a run that goes on from another one's LoRA knows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import KEPT_COLUMN
from draftune.lora import base_model, lora_file, saved_grid
from draftune.prompts import load_prompts
from draftune.rewards import Reward, find_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.online import taught
from draftune.runs.checkpoint import checksum
from draftune.runs.fingerprint import same_source
from draftune.runs.run_dir import run_settings
from draftune.settings import Settings
from draftune.utils.processes import tell


@dataclass
class Past:
    """The LoRA that a run goes on from and, where it is known, what its training asked for."""

    lora: Path
    checksum: str
    kept: Sequence[str]
    """Prompts on which the model is to stay as it was."""
    reward: Reward | None = None
    prompts: Sequence[str] = ()
    """Those on which that reward is measured."""

    @property
    def columns(self) -> list[str]:
        if self.reward is None:
            return []
        return [f"{KEPT_COLUMN}{label}" for label in dict.fromkeys([self.reward.label, *self.reward.columns])]

    def compare(self, grid: Mapping[str, Any]) -> None:
        """Says so where the LoRA was trained on another grid of the sampler, and so draws otherwise than it did."""
        if (known := saved_grid(self.lora)) and known != grid:
            tell(f"{str(self.lora)!r} was trained on the grid {known}, and this run draws on {dict(grid)}")

    def ready(self, device: torch.device) -> Reward | None:
        """The reward with its weights read, if it can be had: it is only looked at, and ends no run."""
        try:
            if self.reward is not None:
                check_prompts(self.reward.ready().to(device), self.prompts)
        except DraftuneError as error:
            tell(f"the reward of the training before is not measured: {error}")
            self.reward = None
        return self.reward


def find_past(settings: Settings) -> Past | None:
    """The past of a run, if it has one; no weights are read. Raises DraftuneError for what does not fit."""
    s = settings
    if not s.continue_from:
        if s.keep:
            raise DraftuneError("keep holds on to what an earlier training taught: give its run (--continue-from)")
        return None
    lora = lora_file(s.continue_from)
    if (base := base_model(lora)) is not None and not same_source(base, s.model):
        raise DraftuneError(
            f"the LoRA {s.continue_from!r} is one of {base!r}, and this run trains {s.model!r} (--model); if these "
            f"are one model, 'draftune mix {s.continue_from} --model {s.model}' writes it under this name"
        )
    past = Past(lora, checksum(lora), load_prompts(s.keep) if s.keep else ())
    earlier = run_settings(lora)
    if earlier is not None and s.eval_prompts:
        try:
            reward, prompts = taught(find_reward(earlier.reward)), past.kept
            if earlier.eval_prompts:
                prompts = load_prompts(earlier.eval_prompts)
            if prompts:
                past.reward, past.prompts = reward, prompts
        except DraftuneError as error:
            # It is only looked at, and may have been a Python object in that run, or a file that has moved.
            tell(f"what {s.continue_from!r} was trained on is not measured: {error}")
    return past
