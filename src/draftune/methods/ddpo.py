"""DDPO and DPOK: policy gradients, for which a reward needs no gradient."""

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
from draftune.methods.draft import at_least
from draftune.sampling.ancestral import ancestral, log_probability, mean, wants_noise
from draftune.sampling.schedule import Schedule, Step


class Trajectory(NamedTuple):
    """A batch as the ancestral sampler drew it: where each step began and ended, and what came of it."""

    batch: Batch
    steps: list[tuple[Step, Tensor, Tensor, Tensor]]
    """(step, x before it, x after it, log-probability of that [B]), for the steps that are random."""
    advantages: Tensor


@register("ddpo")
@dataclass
class DDPO(Method):
    """DDPO (Black et al., arXiv 2305.13301): makes what scored above its prompt's average more probable.

    Images are sampled by the ancestral sampler (DDIM with eta = 1). Each random step is a Gaussian policy. Its loss is
    -min(A w, A clip(w, 1 +- clip_range)): A is the advantage, w = exp(l - l_old) the importance ratio, and l the mean
    log-probability over the latent's elements. The loss is averaged over the batch and the trained steps, as in the
    authors' code (kvablack/ddpo-pytorch, ddim_with_logprob.py line 190 and train.py lines 74-79 and 539-551). On fresh
    images its gradient is that of -E[reward], divided by the number of a latent's elements times random steps.

    The advantage is the reward less its prompt's mean, divided by its prompt's standard deviation, over the last
    `buffer_size` rewards of the prompt; while the prompt has fewer than `min_count`, over all rewards of the update. It
    is clipped to +-`adv_clip_max`. The same images serve `inner_epochs` optimizer steps: w differs from 1 from the
    second on. `timestep_fraction` of the random steps, drawn anew, is trained. A last step that ends at the clean
    latent is not random. `beta` > 0 adds beta times the KL divergence to the base model at each step, as a mean over
    the same elements and steps: beta is the weight of the divergence against the advantage.
    """

    needs_gradient = False
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
    """For each optimizer step of the update and each trained timestep, a row [2] for each image.

    The first number is 1 where the importance ratio is out of its range, the second where the loss has no gradient.
    """
    no_advantage: str = field(default="", init=False, repr=False, compare=False)
    """Why all advantages of the update are 0, if they are."""

    def __post_init__(self) -> None:
        at_least("inner_epochs", self.inner_epochs, 1)
        at_least("min_count", self.min_count, 2)
        at_least("buffer_size", self.buffer_size, self.min_count)
        if not self.clip_range > 0:
            raise DraftuneError(f"clip_range must be more than 0, not {self.clip_range}")
        if not self.adv_clip_max > 0:
            raise DraftuneError(f"adv_clip_max must be more than 0, not {self.adv_clip_max}")
        if not 0 < self.timestep_fraction <= 1:
            raise DraftuneError(f"timestep_fraction must be more than 0 and at most 1, not {self.timestep_fraction}")
        if not self.beta >= 0:
            raise DraftuneError(f"beta must be at least 0, not {self.beta}")

    def check(self, schedule: Schedule) -> None:
        wants_noise(schedule)

    def spans_calls(self) -> bool:
        return False

    def optimizer_steps(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        self.ratios = []
        trajectories = self.drawn(batches)
        for _ in range(self.inner_epochs):
            self.ratios.append([])
            yield (loss for trajectory in trajectories for loss in self.policy_losses(trajectory))

    def report(self) -> dict[str, float]:
        seen = [row for step in self.ratios for row in step]
        return {"clip_fraction": float(torch.cat(seen)[:, 0].mean()) if seen else math.nan}

    def constant_losses(self) -> str:
        if self.no_advantage:
            return self.no_advantage
        if self.ratios and self.ratios[-1] and bool(torch.cat(self.ratios[-1])[:, 1].all()):
            return (
                f"every importance ratio was clipped (clip_range={self.clip_range:g}): lower `--learning-rate` or "
                "inner_epochs, or raise clip_range"
            )
        return ""

    @torch.no_grad()
    def drawn(self, batches: Iterable[Batch]) -> list[Trajectory]:
        """Sample with the present policy, and compute the advantages from all images of the update."""
        rollouts = []
        for batch in batches:
            steps = []
            for step, x, policy, following in ancestral(batch.denoise, batch.schedule, batch.noise, batch.fresh_noise):
                if step.tau > 0:
                    steps.append((step, x, following, log_probability(following, policy, step)))
            rollouts.append((batch, steps, batch.reward(following)))
        # Of the pictures of all processes: what is remembered of a prompt is the same in each of them.
        prompts = [prompt for batch, *_ in rollouts for prompt in batch.all_prompts]
        rewards = torch.cat([batch.processes.gather(reward) for batch, _, reward in rollouts])
        advantages = self.advantages(prompts, rewards)
        self.no_advantage = why_no_advantage(rewards) if not advantages.any() else ""
        parts = advantages.split([len(batch.all_prompts) for batch, *_ in rollouts])
        return [
            Trajectory(batch, steps, batch.processes.share(part))
            for (batch, steps, _), part in zip(rollouts, parts, strict=True)
        ]

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Return how much better than its prompt's average each reward is, in standard deviations [N]."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        scaled = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            known = self.rewards[prompt]
            seen = rewards.new_tensor(list(known)) if len(known) >= self.min_count else rewards
            # The mean of equal numbers is not exactly that number, and Adam would train on the rounding.
            even = (seen == reward).all()
            scaled.append(torch.where(even, 0, (reward - seen.mean()) / (seen.std(unbiased=False) + 1e-6)))
        return torch.stack(scaled).clamp(-self.adv_clip_max, self.adv_clip_max)

    def policy_losses(self, trajectory: Trajectory) -> Iterator[Tensor]:
        """Yield the loss of each trained step, divided by their number."""
        batch, steps, advantages = trajectory
        count = max(1, round(self.timestep_fraction * len(steps)))
        for i in torch.randperm(len(steps), generator=batch.generator)[:count].sort().values.tolist():
            step, x, following, before = steps[i]
            policy = mean(batch.denoise(x, step), step)
            ratio = (log_probability(following, policy, step) - before).exp()
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            self.count_clipped(batch, ratio.detach(), clipped.detach(), advantages)
            loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
            if self.beta:
                with torch.no_grad():
                    start = mean(batch.base(x, step), step)
                loss = loss + self.beta * ((policy - start) / step.tau).square().mean() / 2
            yield loss / count

    def count_clipped(self, batch: Batch, ratio: Tensor, clipped: Tensor, advantages: Tensor) -> None:
        """Note which ratios [B] are out of their range, and which losses have no gradient."""
        outside = ratio != clipped
        constant = (advantages == 0) | (outside & (advantages * clipped < advantages * ratio))
        self.ratios[-1].append(batch.processes.gather(torch.stack([outside, constant], 1).float()))

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {prompt: deque(seen, self.buffer_size) for prompt, seen in state["rewards"].items()}


def why_no_advantage(rewards: Tensor) -> str:
    """Return why the advantages of these rewards [N], all 0, are 0."""
    first = float(rewards[0])
    if bool((rewards == rewards[0]).all()):
        return (
            f"all {len(rewards)} rewards of the update are {first:g}: use a reward that tells the images apart, or "
            "more images an update (`--batch-size`, `--gradient-accumulation-steps`)"
        )
    return "every advantage is 0, since each prompt's rewards are equal: use a reward that tells its images apart"


@register("dpok")
@dataclass
class DPOK(DDPO):
    """DPOK (Fan et al., arXiv 2305.16381): the policy gradient with a KL divergence to the base model at every step.

    `ddpo` with `beta`. The default 0.01 is `kl_weight` of the authors' code (google-research/dpok, train_online_pg.py
    and the README's run for one prompt; with many prompts 0.1). There it stands beside a reward that is multiplied by
    `reward_weight` (10 and 1000) and not standardized, the divergence is the mean squared difference of the predicted
    noises without the step's factor, the ratio is clamped on both sides, and the baseline is a learned value function.
    """

    beta: float = 0.01
