"""Rewards with thresholds whose gradient is that of a sigmoid, annealed during training.

Diagonalisation SGD (Wagner, Khajwal and Ong, 2024, arXiv:2402.11752) replaces each branch on `guard >= 0` by a sigmoid
of guard / temperature, and lowers the temperature while it trains. At a temperature of 0 the threshold is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.registry.factories import check_range
from draftune.rewards.base import Reward, register, sub_rewards

IDENTITY_TEMPERATURE = 1.0
"""Temperature at and above which smoothed rounding is the identity, to 1e-7."""
REACH = 18
"""Temperatures from a threshold beyond which a sigmoid is 0 or 1 in float32."""


def smooth_where(guard: Tensor, yes: Tensor | float, no: Tensor | float, temperature: float) -> Tensor:
    """Return sigmoid(guard / temperature) * yes + (1 - sigmoid(guard / temperature)) * no; shapes broadcast.

    At temperature 0: `yes` where the guard is 0 or more, else `no`. Both branches are computed and must be finite.
    """
    weight = smooth_step(guard, temperature)
    return weight * yes + (1 - weight) * no


def smooth_step(x: Tensor, temperature: float) -> Tensor:
    """Return sigmoid(x / temperature); at temperature 0, 1 where x is 0 or more, else 0."""
    return torch.sigmoid(x / temperature) if temperature else (x >= 0).to(x.dtype)


def smooth_round(x: Tensor, temperature: float) -> Tensor:
    """Return x rounded, halves up, with a smooth step at each half; from temperature 1 on, x itself."""
    if temperature == 0:
        return (x + 0.5).floor()
    if temperature >= IDENTITY_TEMPERATURE:
        return x
    reach = math.ceil(REACH * temperature)
    below = x.detach().floor()
    steps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) + 0.5
    # Steps further below x count as 1, and steps further above as 0.
    return below - reach + smooth_step((x - below)[..., None] - steps, temperature).sum(-1)


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """Return `value`, to the bit, with the gradient of another tensor."""
    return value.detach() + (gradient_of - gradient_of.detach())


class AnnealedReward(Reward):
    """Base class of rewards with thresholds: exact scores, whose gradient is that of smoothed scores.

    A subclass implements `score_at`. The temperature is `temperature` * step^-`decay` at update `step` of training, and
    `temperature` outside of training. With a learning rate that falls as 1 / step, the ascent ends at a stationary
    point of the exact expectation if `decay` is below 1 / l, where l is how deeply guards are nested.
    """

    def __init__(self, temperature: float, decay: float) -> None:
        super().__init__()
        check_range(f"reward {self.label}", temperature=(temperature, 0, math.inf), decay=(decay, 0, math.inf))
        self.temperature, self.decay, self.step = temperature, decay, 1
        self.outermost = True

    def on_step(self, step: int) -> None:
        self.step = step

    def current_temperature(self) -> float:
        return self.temperature * self.step**-self.decay

    def score_at(self, images: Tensor, prompts: Sequence[str], temperature: float) -> Tensor:
        """Return the scores [B], smoothed at a temperature, exact at 0."""
        raise NotImplementedError

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return exact scores with the gradient of smoothed ones (a straight-through estimator).

        Inside another annealed reward, the scores themselves are smoothed wherever a gradient is needed.
        """
        if not (torch.is_grad_enabled() and images.requires_grad and self.temperature):
            return self.score_at(images, prompts, 0.0)
        smooth = self.score_at(images, prompts, self.current_temperature())
        if not self.outermost:
            return smooth
        with torch.no_grad():
            exact = self.score_at(images, prompts, 0.0)
        return straight_through(exact, smooth)


@register("threshold")
class Threshold(AnnealedReward):
    """1 where a reward is `at` or more, else 0: `threshold(emoji_aesthetic, at=6, temperature=0.9)`.

    `temperature`: the gradient is that of sigmoid((reward - at) / temperature), in units of the wrapped reward; 0: no
    gradient. A good start is 0.2 to 0.6 times the spread of the reward over images. `decay`: at update n the
    temperature is divided by n^decay. If the wrapped reward has a gradient, training on that reward itself is simpler;
    a threshold gives nothing for scores far above `at`. Weights and sizes are those of the wrapped reward, and it is
    over-optimized like that, up to the threshold.
    """

    def __init__(self, reward: Reward, at: float, temperature: float = 0.0, decay: float = 0.5) -> None:
        self.label = "threshold"
        super().__init__(temperature, decay)
        self.reward, self.at = reward, at
        self.label = f"threshold({reward.label})"
        self.nested = [part for part in sub_rewards(reward).values() if isinstance(part, AnnealedReward)]
        for part in self.nested:
            part.outermost = False

    def load(self) -> None:
        self.reward.load_weights()

    def score_at(self, images: Tensor, prompts: Sequence[str], temperature: float) -> Tensor:
        return smooth_step(self.reward(images, prompts) - self.at, temperature)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.nested:
            return super().score(images, prompts)
        # As in the base class, but the wrapped reward scores once.
        guard = self.reward(images, prompts) - self.at
        exact = smooth_step(guard.detach(), 0.0)
        temperature = self.current_temperature() if guard.requires_grad else 0.0
        if not temperature:
            return exact
        smooth = smooth_step(guard, temperature)
        return straight_through(exact, smooth) if self.outermost else smooth
