"""The clipped policy gradient that DDPO and Flow-GRPO share: sampling, importance ratios, losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method
from draftune.methods.draft import check_min
from draftune.methods.groups import gathered, own_parts, why_no_advantage
from draftune.sampling.ancestral import (
    ancestral_rollout,
    mean,
    require_stochastic_steps,
    step_log_prob,
    stochastic_steps,
)
from draftune.sampling.schedule import Prediction, Schedule, Step


class Trajectory(NamedTuple):
    """A batch sampled by the policy, with the advantages [B] of its images."""

    batch: Batch
    steps: list[tuple[Step, Tensor, Tensor, Tensor]]
    """For each trained step: (step, x_t, x_s, log p(x_s | x_t) [B])."""
    advantages: Tensor


@dataclass
class PolicyGradient(Method, ABC):
    """Base class of policy gradients with a clipped importance ratio.

        l = mean over elements of log N(x_s; mean(x_t), tau^2 I),   w = exp(l - l_old)
        loss = mean over batch and trained steps of  -min(A w, A clip(w, 1 - clip_range, 1 + clip_range))

    A subclass defines the advantages A, and may override the random steps (`policy`) and their mean (`mean`).
    """

    needs_reward_gradient = False
    min_images_per_update = 2

    inner_epochs: int = 1
    clip_range: float = 1e-4
    timestep_fraction: float = 1.0
    beta: float = 0.0
    ratios: list[list[Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    """For each optimizer step of the update and each trained timestep, two flags for each image [N, 2].

    The first flag is 1 if the importance ratio was out of range, the second if the loss has no gradient.
    """
    no_advantage: str = field(default="", init=False, repr=False, compare=False)
    """Explanation if all advantages of the update are 0, else empty."""

    def __post_init__(self) -> None:
        check_min("inner_epochs", self.inner_epochs, 1)
        check_fraction(self.timestep_fraction)
        if not self.clip_range > 0:
            raise DraftuneError(f"clip_range must be above 0, got {self.clip_range}")
        if not self.beta >= 0:
            raise DraftuneError(f"beta must be at least 0, got {self.beta}")

    @abstractmethod
    def update_advantages(self, batches: Sequence[Batch], rewards: Tensor) -> Tensor:
        """Return the advantages [N] of the images of an update, of all processes, from their rewards [N]."""

    def policy(self, schedule: Schedule, trained: Sequence[int] | None = None) -> Schedule:
        """Return the schedule that the images are sampled by: its steps with `ancestral_std` > 0 are random.

        Args:
            schedule: The sampler's schedule.
            trained: Indices of the steps that this update trains; None for those that any update may train.
        """
        return schedule

    def mean(self, prediction: Prediction, step: Step, schedule: Schedule) -> Tensor:
        """Return the mean of a step of the policy: p(x_s | x_t) = N(mean, tau^2 * I).

        Args:
            prediction: The predicted x_0 and noise.
            step: A step of `policy(schedule)`.
            schedule: The sampler's schedule.
        """
        return mean(prediction, step)

    def check(self, schedule: Schedule) -> None:
        require_stochastic_steps(self.policy(schedule))

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return stochastic_steps(self.policy(schedule))

    def backprops_multiple_calls(self) -> bool:
        return False

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        self.ratios = []
        trajectories = self.rollouts(batches)
        for _ in range(self.inner_epochs):
            self.ratios.append([])
            yield (loss for trajectory in trajectories for loss in self.policy_losses(trajectory))

    def metrics(self) -> dict[str, float]:
        seen = [row for step in self.ratios for row in step]
        return {"clip_fraction": float(torch.cat(seen)[:, 0].mean()) if seen else math.nan}

    def explain_zero_gradient(self) -> str:
        if self.no_advantage:
            return self.no_advantage
        if self.ratios and self.ratios[-1] and bool(torch.cat(self.ratios[-1])[:, 1].all()):
            return (
                f"every importance ratio was clipped (clip_range={self.clip_range:g}): lower `--learning-rate` or "
                "inner_epochs, or raise clip_range"
            )
        return ""

    def trained_now(self, batch: Batch) -> Sequence[int]:
        """Return the indices of the steps that this update trains. Default: all random ones of the model."""
        return self.trained_steps(batch.schedule)

    @torch.no_grad()
    def rollouts(self, batches: Iterable[Batch]) -> list[Trajectory]:
        """Sample images with the current weights and compute their advantages from all images of the update."""
        known, paths, rewards = [], [], []
        for batch in batches:
            trained: Sequence[int] = self.trained_now(batch)
            steps: list[tuple[Step, Tensor, Tensor, Tensor]] = []
            schedule, mean_of = self.policy(batch.schedule, trained), partial(self.mean, schedule=batch.schedule)
            path = ancestral_rollout(batch.denoise, schedule, batch.noise, batch.randn_like, mean_of)
            for i, (step, x, center, following) in enumerate(path):
                if i in trained:
                    steps.append((step, x, following, step_log_prob(following, center, step)))
            known.append(batch)
            paths.append(steps)
            rewards.append(batch.reward(following))
        # Rewards of all processes, so that each of them has the same statistics of every prompt.
        scores = gathered(known, rewards)
        advantages = self.update_advantages(known, scores)
        self.no_advantage = why_no_advantage(scores) if not advantages.any() else ""
        return [Trajectory(*parts) for parts in zip(known, paths, own_parts(known, advantages), strict=True)]

    def policy_losses(self, trajectory: Trajectory) -> Iterator[Tensor]:
        """Yield the loss of each trained step, divided by the number of trained steps."""
        batch, steps, advantages = trajectory
        chosen = random_share(len(steps), self.timestep_fraction, batch.generator)
        for i in chosen:
            step, x, following, before = steps[i]
            center = self.mean(batch.denoise(x, step), step, batch.schedule)
            ratio = (step_log_prob(following, center, step) - before).exp()
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            self.count_clipped(batch, ratio.detach(), clipped.detach(), advantages)
            loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
            if self.beta:
                with torch.no_grad():
                    base_mean = self.mean(batch.base_denoise(x, step), step, batch.schedule)
                loss = loss + self.beta * ((center - base_mean) / step.ancestral_std).square().mean() / 2
            yield loss / len(chosen)

    def count_clipped(self, batch: Batch, ratio: Tensor, clipped: Tensor, advantages: Tensor) -> None:
        """Record which ratios [B] are out of range and which losses have no gradient."""
        outside = ratio != clipped
        constant = (advantages == 0) | (outside & (advantages * clipped < advantages * ratio))
        self.ratios[-1].append(batch.processes.gather(torch.stack([outside, constant], 1).float()))


def check_fraction(timestep_fraction: float) -> None:
    """Raise DraftuneError unless the fraction is above 0 and at most 1."""
    if not 0 < timestep_fraction <= 1:
        raise DraftuneError(f"timestep_fraction must be above 0 and at most 1, got {timestep_fraction}")


def random_share(count: int, fraction: float, generator: torch.Generator) -> list[int]:
    """Sample a fraction of the indices 0 to count - 1, at least one of them, in ascending order."""
    size = max(1, round(fraction * count))
    return torch.randperm(count, generator=generator)[:size].sort().values.tolist()
