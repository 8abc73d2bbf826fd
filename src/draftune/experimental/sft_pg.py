"""SFT-PG: policy gradient with a learned value function, for few sampling steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from draftune.errors import DraftuneError
from draftune.experimental.learner import OnlineModule, value_loss
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


class Transition(NamedTuple):
    """A random sampling step of a batch, from x to `following`, with the advantages [B] of the images."""

    batch: Batch
    step: Step
    x: Tensor
    following: Tensor
    advantages: Tensor


class Value(nn.Module):
    """Value network: predict the final reward from the latent at each of S steps.

    Two convolutions whose channels are multiplied by a learned gate for each step, then a linear layer on the mean
    over pixels. The paper uses a gated MLP.
    """

    def __init__(self, steps: int, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)])
        self.gates = nn.Parameter(torch.ones(2, steps, width, 1, 1))
        self.last = nn.Linear(width, 1)

    def forward(self, paths: Tensor) -> Tensor:
        """Predict rewards [B, S] from the latents of B trajectories [B, S, C, H, W]."""
        count, x = paths.shape[:2], paths.flatten(0, 1)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = (leaky_relu(layer(x), 0.2).unflatten(0, count) * gate).flatten(0, 1)
        values: Tensor = self.last(x.mean((2, 3)))
        return values.view(count)


@register("sft_pg")
@dataclass
class SFTPG(Method):
    """SFT-PG: policy gradient with a value network that predicts the reward at every sampling step.

        A = r - v(x_t, t),   loss = -mean over transitions of  A log p(x_s | x_t)
        v minimizes  sum over t of mean((v(x_t, t) - r)^2),  one Adam step for each batch

    Fan and Lee, 2023, arXiv:2301.13362. Images come from the ancestral sampler (DDIM with eta = 1). log p is a mean
    over the latent's elements, and A uses the reward and value at the time of scoring. The random steps of an update
    are split at random into `generator_steps` optimizer steps, without an importance ratio. With the reward
    `discriminator(...)`, a critic that learns online, this is the paper's method.

    T denoiser calls without gradient and T' with gradient, T' being the number of random steps. The reward needs no
    gradient. Use it for few sampling steps and many prompts, where `ddpo` lacks statistics of each prompt. The paper's
    5 critic steps are `--gradient-accumulation-steps 5`, its gradient clipping is `--max-grad-norm 0.1`.

    Attributes:
        generator_steps: Optimizer steps of one update, 1 or more. Default: 10.
        value_width: Channels of the value network, 1 or more. Default: 64, this project's choice.
        value_learning_rate: Learning rate of the value network's Adam, between 0 and 1. Default: 1e-4, as in the
            paper's larger runs.
        seed: Seed of the value network's initial weights. Default: 0.
    """

    needs_reward_gradient = False

    generator_steps: int = 10
    value_width: int = 64
    value_learning_rate: float = 1e-4
    seed: int = 0
    learner: OnlineModule | None = field(default=None, init=False, repr=False, compare=False)
    """The value network and its optimizer; None before the first batch, which defines its shape."""

    def __post_init__(self) -> None:
        check_min("generator_steps", self.generator_steps, 1)
        check_min("value_width", self.value_width, 1)
        check_min("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise DraftuneError(f"seed must be below 2^63, got {self.seed}")
        if not 0 < self.value_learning_rate < 1:
            raise DraftuneError(f"value_learning_rate must be between 0 and 1, got {self.value_learning_rate}")

    def check(self, schedule: Schedule) -> None:
        require_stochastic_steps(schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return stochastic_steps(schedule)

    def backprops_multiple_calls(self) -> bool:
        return False

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        rollouts = [self.rollout(batch) for batch in batches]
        transitions = [transition for rollout in rollouts for transition in rollout]
        order = torch.randperm(len(transitions), generator=transitions[0].batch.generator)
        for part in order.tensor_split(min(self.generator_steps, len(transitions))):
            # The trainer divides by the number of batches; the loss is the mean over the transitions of this step.
            yield (policy_loss(transitions[i]) * len(rollouts) / len(part) for i in part.tolist())

    @torch.no_grad()
    def rollout(self, batch: Batch) -> list[Transition]:
        """Sample and score a batch with the current weights, and train the value network (and an online reward)."""
        path = [
            (step, x, following)
            for step, x, _, following in ancestral_rollout(batch.denoise, batch.schedule, batch.noise, batch.randn_like)
        ]
        random = [path[i] for i in self.trained_steps(batch.schedule)]
        latents = torch.stack([x for _, x, _ in random], 1)
        if self.learner is None:
            self.learner = self.fresh(*latents.shape[1:3])
        value = self.learner.to(latents.device)
        expected = value(latents.float())
        reward = batch.reward(path[-1][2], expected)
        advantages = reward[:, None] - expected
        # Every process learns from the images of all, so that the value networks stay equal.
        inputs, targets = batch.processes.gather(latents).float(), batch.processes.gather(reward).float()
        value.learn(lambda network: value_loss(network(inputs), targets))
        return [Transition(batch, *transition, advantages[:, i]) for i, transition in enumerate(random)]

    def fresh(self, steps: int, channels: int) -> OnlineModule:
        """Return an untrained value network for this number of random steps and latent channels."""
        return OnlineModule(lambda: Value(steps, channels, self.value_width), self.value_learning_rate, self.seed)

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
    """Compute -mean(A log p), whose gradient on fresh images is that of -E[r] divided by a latent's elements."""
    batch, step, x, following, advantages = transition
    return -(advantages * step_log_prob(following, mean(batch.denoise(x, step), step), step)).mean()
