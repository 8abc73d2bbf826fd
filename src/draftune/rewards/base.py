"""What a reward is, and the algebra of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError


class Reward(nn.Module):
    """Scores pictures: images [B, 3, H, W] float32 in [0, 1] and B prompts to B numbers, higher is better.

    A subclass writes `score`. Its weights are frozen, it runs in float32 whatever the autocast around it, and
    gradient flows to the images. Rewards add up: `clip + 0.1 * aesthetic - jpeg`.
    """

    label: str = "reward"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        """The weighted parts that this reward is the sum of; a plain reward is its own single part."""
        return [(1.0, self)]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.parts(images, prompts)[0]

    def parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total [B], and by label what each part gave before its weight [B]."""
        with torch.autocast(images.device.type, enabled=False):
            scores = [(weight, part, part.score(images.float(), prompts)) for weight, part in self.terms]
        total = sum((weight * score for weight, _, score in scores), torch.zeros((), device=images.device))
        named: dict[str, tuple[Reward, Tensor]] = {}
        for _, part, score in scores:
            label, count = part.label, 2
            while label in named and named[label][0] is not part:
                # Two parts of one kind are logged apart.
                label, count = f"{part.label}-{count}", count + 1
            named[label] = part, score.detach()
        return total, {label: score for label, (_, score) in named.items()}

    def __add__(self, other: Reward) -> Reward:
        return WeightedSum([*self.terms, *other.terms])

    def __sub__(self, other: Reward) -> Reward:
        return self + -1.0 * other

    def __mul__(self, weight: float) -> Reward:
        return WeightedSum([(weight * w, part) for w, part in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> Reward:
        return -1.0 * self

    def freeze(self) -> Reward:
        """This reward, in evaluation mode and with every weight frozen."""
        return self.eval().requires_grad_(False)


class WeightedSum(Reward):
    """A sum of rewards with a weight each."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights = [float(weight) for weight, _ in terms]
        self.rewards = nn.ModuleList(part for _, part in terms)
        self.label = " + ".join(f"{weight:g}*{part.label}" for weight, part in terms)

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        return [(w, part) for w, part in zip(self.weights, self.rewards, strict=True)]  # type: ignore[misc]


class FunctionReward(Reward):
    """A plain function of (images, prompts) as a reward."""

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.label = getattr(function, "__name__", "reward")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


REWARDS: dict[str, Callable[..., Reward]] = {}
R = TypeVar("R", bound=Callable[..., Reward])


def register(name: str) -> Callable[[R], R]:
    """Makes a reward known by name to the command line and to `load_reward`. Its docstring is its description."""

    def add(factory: R) -> R:
        if name in REWARDS:
            raise DraftuneError(f"there is a reward {name!r} already")
        REWARDS[name] = factory
        return factory

    return add
