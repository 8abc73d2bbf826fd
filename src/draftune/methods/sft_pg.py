"""SFT-PG: a policy gradient with a value network, for few steps and for rewards that learn beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from draftune.errors import DraftuneError
from draftune.experimental.learner import Learner, missed
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import at_least
from draftune.sampling.ancestral import ancestral, log_probability, mean, wants_noise
from draftune.sampling.schedule import Schedule, Step


class Transition(NamedTuple):
    """A random step of a batch: where it began and ended, and how much better its pictures are than expected [B]."""

    batch: Batch
    step: Step
    x: Tensor
    following: Tensor
    advantages: Tensor


class Value(nn.Module):
    """What is expected of the latents of paths [B, S, C, H, W] at each of S steps [B, S], by one gated network."""

    def __init__(self, steps: int, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)])
        self.gates = nn.Parameter(torch.ones(2, steps, width, 1, 1))
        self.last = nn.Linear(width, 1)

    def forward(self, paths: Tensor) -> Tensor:
        count, x = paths.shape[:2], paths.flatten(0, 1)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = (leaky_relu(layer(x), 0.2).unflatten(0, count) * gate).flatten(0, 1)
        found: Tensor = self.last(x.mean((2, 3)))
        return found.view(count)


@register("sft_pg")
@dataclass
class SFTPG(Method):
    """SFT-PG (Fan and Lee, arXiv 2301.13362): makes steps more probable that end better than a value network expected.

    Pictures are drawn by the ancestral sampler (DDIM with eta = 1). A small network on the noisy latents learns from
    every batch what reward to expect at each random step, as does the reward itself where it is `examples(...)`, the
    paper's critic. Then the update's random steps, in a random order, serve `generator_steps` steps of the optimiser,
    each once: minus the mean of (reward - expected) * log p, without an importance ratio, log p being the mean over the
    latent's numbers. Rewards and what was expected are those of the moment when the batch was scored. The paper's 5
    critic steps for an update are --gradient-accumulation-steps 5, its clipping is --max-grad-norm 0.1. The value
    network is gated by the step as the paper's is, and of convolutions where that is an MLP; `value_width` is ours,
    `value_learning_rate` that of the paper's larger runs.
    """

    needs_gradient = False

    generator_steps: int = 10
    value_width: int = 64
    value_learning_rate: float = 1e-4
    seed: int = 0
    learner: Learner | None = field(default=None, init=False, repr=False, compare=False)
    """Of the value network, once latents have been seen."""

    def __post_init__(self) -> None:
        at_least("generator_steps", self.generator_steps, 1)
        at_least("value_width", self.value_width, 1)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise DraftuneError(f"seed must be less than 2^63, not {self.seed}")
        if not 0 < self.value_learning_rate < 1:
            raise DraftuneError(f"value_learning_rate must be between 0 and 1, not {self.value_learning_rate}")

    def check(self, schedule: Schedule) -> None:
        wants_noise(schedule)

    def spans_calls(self) -> bool:
        return False

    def optimizer_steps(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        drawn = [self.drawn(batch) for batch in batches]
        known = [transition for transitions in drawn for transition in transitions]
        order = torch.randperm(len(known), generator=known[0].batch.generator)
        for part in order.tensor_split(min(self.generator_steps, len(known))):
            # The trainer takes the losses of an update for means over its batches.
            yield (policy_loss(known[i]) * len(drawn) / len(part) for i in part.tolist())

    @torch.no_grad()
    def drawn(self, batch: Batch) -> list[Transition]:
        """What the present policy draws, scored; from it reward and value network learn."""
        path = [(step, x, following) for step, x, _, following in ancestral(batch)]
        random = [(step, x, following) for step, x, following in path if step.tau > 0]
        latents = torch.stack([x for _, x, _ in random], 1)
        if self.learner is None:
            self.learner = self.fresh(*latents.shape[1:3])
        value = self.learner.to(latents.device)
        expected = value(latents.float())
        reward = batch.reward(path[-1][2], expected)
        advantages = reward[:, None] - expected
        # Every process learns from the pictures of all, the same.
        seen, scores = batch.processes.gather(latents).float(), batch.processes.gather(reward).float()
        value.learn(lambda network: missed(network(seen), scores))
        return [Transition(batch, *known, advantages[:, i]) for i, known in enumerate(random)]

    def fresh(self, steps: int, channels: int) -> Learner:
        """A value network that knows nothing yet."""
        return Learner(lambda: Value(steps, channels, self.value_width), self.value_learning_rate, self.seed)

    def state_dict(self) -> dict[str, Any]:
        if self.learner is None:
            return {}
        tensors = self.learner.state_dict()
        gates = tensors["network.gates"]
        return {"shape": [gates.shape[1], tensors["network.layers.0.weight"].shape[1]], **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner = None
        if "shape" in state:
            self.learner = self.fresh(*state["shape"])
            self.learner.load_state_dict({key: value for key, value in state.items() if key != "shape"})


def policy_loss(transition: Transition) -> Tensor:
    """A loss whose gradient, on fresh pictures, is that of minus the mean reward, over the latent's numbers."""
    batch, step, x, following, advantages = transition
    return -(advantages * log_probability(following, mean(batch.denoise(x, step), step), step)).mean()
