"""What clean latents of an update score. It knows no reward by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models import Model
from draftune.rewards import Reward
from draftune.rewards.chunked import at_once
from draftune.rewards.latent import parts_of
from draftune.rewards.online import extra_queries, learn_all, learners
from draftune.settings import Settings
from draftune.training.data import Drawn
from draftune.utils.processes import ALONE, Processes

if TYPE_CHECKING:
    from torch.amp import GradScaler


class NonFiniteError(DraftuneError):
    """A reward or a gradient is infinite or undefined."""


class Scorer:
    """Decodes and scores latents, a few at a time, with their gradient, and counts the pictures."""

    def __init__(
        self, settings: Settings, model: Model, reward: Reward, scaler: GradScaler | None, processes: Processes = ALONE
    ) -> None:
        self.settings, self.model, self.reward = settings, model, reward
        self.scaler, self.processes = scaler, processes
        self.queries = 0

    def __call__(self, batch: Drawn, step: int, clean: Tensor, expected: Tensor | None = None) -> Tensor:
        """The rewards of clean latents; of a batch's first, which are what it drew, it keeps pictures and rewards.

        From these a reward may learn, and from what was expected of each [B, S], once they are scored.
        """
        s, prompts = self.settings, self.processes.share(batch.prompts)
        pictures: list[Tensor] = []
        totals: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        before, first = extra_queries(self.reward), batch.reward is None

        def scored(latents: Tensor, some: slice) -> Tensor:
            score, found, shown = parts_of(self.reward, latents, self.model.decode, prompts[some])
            pictures.append(shown)
            totals.append(score.detach())
            for label, values in found.items():
                parts.setdefault(label, []).append(values)
            return score

        with self.processes.together():
            scale = self.scaler.get_scale() if self.scaler else 1.0
            own = at_once(scored, clean, s.reward_batch_size, scale)
        total = self.processes.gather(torch.cat(totals))
        more = self.processes.gather(torch.tensor([extra_queries(self.reward) - before])).sum()
        self.queries += len(batch.prompts) + int(more)
        if first or not total.isfinite().all():
            batch.pictures, batch.reward = torch.cat(pictures), total
            batch.parts = {label: self.processes.gather(torch.cat(scores)) for label, scores in parts.items()}
        if not total.isfinite().all():
            raise NonFiniteError(f"the reward became {total.tolist()} at update {step}")
        if first:
            self.learn(batch, torch.cat(pictures), expected)
        return own

    def learn(self, batch: Drawn, pictures: Tensor, expected: Tensor | None) -> None:
        """Tells the rewards that learn of what all processes drew, so that each learns the same."""
        if learners(self.reward):
            images = self.processes.gather(pictures)
            learn_all(self.reward, images, batch.prompts, None if expected is None else self.processes.gather(expected))
