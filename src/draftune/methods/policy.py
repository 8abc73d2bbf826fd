"""DDPO and DPOK: policy gradients, for which a reward needs no gradient."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.ancestral import ancestral, log_probability, mean, wants_noise
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import at_least
from draftune.schedule import Schedule, Step


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

    Pictures are drawn by the ancestral sampler (DDIM with eta = 1). Each random step is a Gaussian policy; its
    log-probability's gradient is weighted by the advantage, the reward less its prompt's mean and divided by its
    prompt's standard deviation, over the last `buffer_size` rewards of the prompt; while it has fewer than `min_count`,
    over all rewards of the update. The same pictures serve `inner_epochs` steps of the optimiser, from the second on
    with importance ratios clipped to 1 +- `clip_range`; as in the authors' code a ratio is that of the mean over the
    latent's numbers. `timestep_fraction` of the random steps, drawn anew, is trained on. `beta` > 0 adds DPOK's KL
    divergence to the base model, summed over the steps. A last step that ends at the clean latent is not random.
    """

    needs_gradient = False

    inner_epochs: int = 1
    clip_range: float = 1e-4
    timestep_fraction: float = 1.0
    beta: float = 0.0
    buffer_size: int = 32
    min_count: int = 16
    rewards: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        at_least("inner_epochs", self.inner_epochs, 1)
        at_least("min_count", self.min_count, 2)
        at_least("buffer_size", self.buffer_size, self.min_count)
        if not self.clip_range > 0:
            raise DraftuneError(f"clip_range must be more than 0, not {self.clip_range}")
        if not 0 < self.timestep_fraction <= 1:
            raise DraftuneError(f"timestep_fraction must be more than 0 and at most 1, not {self.timestep_fraction}")
        if not self.beta >= 0:
            raise DraftuneError(f"beta must be at least 0, not {self.beta}")

    def check(self, schedule: Schedule) -> None:
        wants_noise(schedule)

    def spans_calls(self) -> bool:
        return False

    def optimizer_steps(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        trajectories = self.drawn(batches)
        for _ in range(self.inner_epochs):
            yield (loss for trajectory in trajectories for loss in self.policy_losses(trajectory))

    @torch.no_grad()
    def drawn(self, batches: Iterable[Batch]) -> list[Trajectory]:
        """What the present policy draws, with the advantages that all of it together gives."""
        rollouts = []
        for batch in batches:
            steps = []
            for step, x, policy, following in ancestral(batch):
                if step.tau > 0:
                    steps.append((step, x, following, log_probability(following, policy, step)))
            rollouts.append((batch, steps, batch.reward(following)))
        # Of the pictures of all processes: what is remembered of a prompt is the same in each of them.
        prompts = [prompt for batch, *_ in rollouts for prompt in batch.all_prompts]
        rewards = torch.cat([batch.processes.gather(reward) for batch, _, reward in rollouts])
        parts = self.advantages(prompts, rewards).split([len(batch.all_prompts) for batch, *_ in rollouts])
        return [
            Trajectory(batch, steps, batch.processes.share(part))
            for (batch, steps, _), part in zip(rollouts, parts, strict=True)
        ]

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """How much better than its prompt's average each reward is, in standard deviations [N]."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        scaled = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            known = self.rewards[prompt]
            seen = rewards.new_tensor(list(known)) if len(known) >= self.min_count else rewards
            scaled.append((reward - seen.mean()) / (seen.std(unbiased=False) + 1e-6))
        return torch.stack(scaled)

    def policy_losses(self, trajectory: Trajectory) -> Iterator[Tensor]:
        """For each step that is trained on the loss whose gradient, on fresh pictures, is that of -E[reward]."""
        batch, steps, advantages = trajectory
        count = max(1, round(self.timestep_fraction * len(steps)))
        for i in torch.randperm(len(steps), generator=batch.generator)[:count].sort().values.tolist():
            step, x, following, before = steps[i]
            policy = mean(batch.denoise(x, step), step)
            ratio = (log_probability(following, policy, step) - before).exp()
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            # The log-probabilities are means over the latent's numbers: times their count, the gradient is the sum's.
            loss = -x[0].numel() * torch.minimum(advantages * ratio, advantages * clipped).mean()
            if self.beta:
                with torch.no_grad():
                    start = mean(batch.base(x, step), step)
                loss = loss + self.beta * ((policy - start) / step.tau).square().flatten(1).sum(1).mean() / 2
            yield loss * len(steps) / count

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {prompt: deque(seen, self.buffer_size) for prompt, seen in state["rewards"].items()}


@register("dpok")
@dataclass
class DPOK(DDPO):
    """DPOK (Fan et al., arXiv 2305.16381): the policy gradient with a KL divergence to the base model at every step.

    `ddpo` with `beta`, whose value in the paper is not confirmed; its learned value function is not part of this.
    """

    beta: float = 0.01
