"""DDPO and DPOK: policy gradients, which need no gradient of the reward."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import check_min
from draftune.sampling.ancestral import (
    ancestral_rollout,
    mean,
    require_stochastic_steps,
    step_log_prob,
    stochastic_steps,
)
from draftune.sampling.schedule import Schedule, Step


class Trajectory(NamedTuple):
    """A batch sampled by the ancestral sampler, with the advantages [B] of its images."""

    batch: Batch
    steps: list[tuple[Step, Tensor, Tensor, Tensor]]
    """For each random step of the fine-tuned model: (step, x_t, x_s, log p(x_s | x_t) [B])."""
    advantages: Tensor


@register("ddpo")
@dataclass
class DDPO(Method):
    """DDPO: policy gradient that raises the probability of images with a reward above their prompt's average.

        l = mean over elements of log N(x_s; mean(x_t), tau^2 I),   w = exp(l - l_old)
        loss = mean over batch and trained steps of  -min(A w, A clip(w, 1 - clip_range, 1 + clip_range))

    Black et al., 2023, arXiv:2305.13301 (DDPO-IS, with PPO's clipping). The means are those of the authors' code
    (kvablack/ddpo-pytorch, ddim_with_logprob.py line 190 and train.py lines 74-79 and 539-551). Images come from the
    ancestral sampler (DDIM with eta = 1). A last step that ends at sigma = 0 is deterministic and is not trained. For
    fresh images and A = r, the expected gradient is that of -E[r], divided by a latent's elements times the random
    steps.

    The advantage A is the reward standardized by the mean and standard deviation of its prompt's last rewards. T
    denoiser calls without gradient, then one with gradient for each trained step and inner epoch. The reward needs no
    gradient. Use it if the reward is not differentiable and queries are cheap.

    Attributes:
        inner_epochs: Optimizer steps on the same images, 1 or more. w differs from 1 from the second on. Default: 1.
        clip_range: Clipping range of the importance ratio w, above 0. Default: 1e-4.
        timestep_fraction: Fraction of the random steps in the loss, sampled for each image batch and epoch, above 0
            and at most 1. Default: 1.
        beta: Weight of the KL divergence to the base model at each trained step, as a mean over elements and steps,
            0 or more. Default: 0.
        buffer_size: Number of last rewards of a prompt in its statistics, at least `min_count`. Default: 32.
        min_count: Rewards that a prompt needs for its own statistics, 2 or more. With fewer, all rewards of the
            update are used. Default: 16.
        adv_clip_max: Bound of the advantage's magnitude, above 0. Default: 5.
    """

    needs_reward_gradient = False
    min_images_per_update = 2

    inner_epochs: int = 1
    clip_range: float = 1e-4
    timestep_fraction: float = 1.0
    beta: float = 0.0
    buffer_size: int = 32
    min_count: int = 16
    adv_clip_max: float = 5.0
    rewards: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)
    ratios: list[list[Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    """For each optimizer step of the update and each trained timestep, two flags for each image [N, 2].

    The first flag is 1 if the importance ratio was out of range, the second if the loss has no gradient.
    """
    no_advantage: str = field(default="", init=False, repr=False, compare=False)
    """Explanation if all advantages of the update are 0, else empty."""

    def __post_init__(self) -> None:
        check_min("inner_epochs", self.inner_epochs, 1)
        check_min("min_count", self.min_count, 2)
        check_min("buffer_size", self.buffer_size, self.min_count)
        if not self.clip_range > 0:
            raise DraftuneError(f"clip_range must be above 0, got {self.clip_range}")
        if not self.adv_clip_max > 0:
            raise DraftuneError(f"adv_clip_max must be above 0, got {self.adv_clip_max}")
        if not 0 < self.timestep_fraction <= 1:
            raise DraftuneError(f"timestep_fraction must be above 0 and at most 1, got {self.timestep_fraction}")
        if not self.beta >= 0:
            raise DraftuneError(f"beta must be at least 0, got {self.beta}")

    def check(self, schedule: Schedule) -> None:
        require_stochastic_steps(schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return stochastic_steps(schedule)

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

    @torch.no_grad()
    def rollouts(self, batches: Iterable[Batch]) -> list[Trajectory]:
        """Sample images with the current weights and compute their advantages from all images of the update."""
        rollouts = []
        for batch in batches:
            steps = []
            for step, x, policy, following in ancestral_rollout(
                batch.denoise, batch.schedule, batch.noise, batch.randn_like
            ):
                if step.tuned and step.ancestral_std > 0:
                    steps.append((step, x, following, step_log_prob(following, policy, step)))
            rollouts.append((batch, steps, batch.reward(following)))
        # Rewards of all processes, so that each of them has the same statistics of every prompt.
        prompts = [prompt for batch, *_ in rollouts for prompt in batch.all_prompts]
        rewards = torch.cat([batch.processes.gather(reward) for batch, _, reward in rollouts])
        advantages = self.advantages(prompts, rewards)
        self.no_advantage = why_no_advantage(rewards) if not advantages.any() else ""
        parts = advantages.split([len(batch.all_prompts) for batch, *_ in rollouts])
        return [
            Trajectory(batch, steps, batch.processes.shard(part))
            for (batch, steps, _), part in zip(rollouts, parts, strict=True)
        ]

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Standardize rewards [N] by the statistics of their prompts and clip them; update these statistics."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        scaled = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            known = self.rewards[prompt]
            seen = rewards.new_tensor(list(known)) if len(known) >= self.min_count else rewards
            # The mean of equal numbers may differ from them by rounding, and Adam would scale that difference up.
            equal = (seen == reward).all()
            scaled.append(torch.where(equal, 0, (reward - seen.mean()) / (seen.std(unbiased=False) + 1e-6)))
        return torch.stack(scaled).clamp(-self.adv_clip_max, self.adv_clip_max)

    def policy_losses(self, trajectory: Trajectory) -> Iterator[Tensor]:
        """Yield the loss of each trained step, divided by the number of trained steps."""
        batch, steps, advantages = trajectory
        count = max(1, round(self.timestep_fraction * len(steps)))
        for i in torch.randperm(len(steps), generator=batch.generator)[:count].sort().values.tolist():
            step, x, following, before = steps[i]
            policy = mean(batch.denoise(x, step), step)
            ratio = (step_log_prob(following, policy, step) - before).exp()
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            self.count_clipped(batch, ratio.detach(), clipped.detach(), advantages)
            loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
            if self.beta:
                with torch.no_grad():
                    base_mean = mean(batch.base_denoise(x, step), step)
                loss = loss + self.beta * ((policy - base_mean) / step.ancestral_std).square().mean() / 2
            yield loss / count

    def count_clipped(self, batch: Batch, ratio: Tensor, clipped: Tensor, advantages: Tensor) -> None:
        """Record which ratios [B] are out of range and which losses have no gradient."""
        outside = ratio != clipped
        constant = (advantages == 0) | (outside & (advantages * clipped < advantages * ratio))
        self.ratios[-1].append(batch.processes.gather(torch.stack([outside, constant], 1).float()))

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {prompt: deque(seen, self.buffer_size) for prompt, seen in state["rewards"].items()}


def why_no_advantage(rewards: Tensor) -> str:
    """Explain why the advantages of these rewards [N] are all 0, and suggest a remedy."""
    first = float(rewards[0])
    if bool((rewards == rewards[0]).all()):
        return (
            f"all {len(rewards)} rewards of the update are {first:g}: use a reward that distinguishes the images, or "
            "more images an update (`--batch-size`, `--gradient-accumulation-steps`)"
        )
    return "every advantage is 0, since each prompt's rewards are equal: use a reward that distinguishes its images"


@register("dpok")
@dataclass
class DPOK(DDPO):
    """DPOK: policy gradient with a KL divergence to the base model at every step, `ddpo` with `beta` above 0.

        loss = loss of ddpo + beta * mean over elements and steps of  |mean(x_t) - mean_base(x_t)|^2 / (2 tau^2)

    Fan et al., 2023, arXiv:2305.16381. As `ddpo`, with one base call without gradient for each trained step. Use it
    instead of `ddpo` if images lose diversity.

    The default of `beta`, 0.01, is `kl_weight` in the authors' code (google-research/dpok, train_online_pg.py and the
    README's run for one prompt; 0.1 for many prompts). The authors' code differs in four points. It multiplies the
    reward by `reward_weight` (10 and 1000) and does not standardize it. Its divergence is the mean squared difference
    of the predicted noises, without the step's factor. It clamps the ratio on both sides. Its baseline is a learned
    value function.

    Attributes:
        beta: Weight of the KL divergence, 0 or more. Default: 0.01. Other attributes as in `ddpo`.
    """

    beta: float = 0.01
