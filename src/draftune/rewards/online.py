"""Rewards whose state changes during training: a discriminator's weights, an estimator's running means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import copied
from draftune.rewards.base import Reward, sub_rewards, wrap_errors


class OnlineReward(Reward):
    """Base class of rewards that have state to save in checkpoints, and may learn from training's images."""

    learns: bool = True
    """Whether `learn` is called during training."""
    untaught: bool = False
    """Whether the reward must learn before its scores mean anything."""
    extra_queries: int = 0
    """Images that this reward has scored beyond those it was called with, as for finite differences."""

    def learn(self, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
        """Learn from a batch of training, after it is scored. It is the batch of all processes.

        Args:
            images: Generated images [B, 3, H, W] in [0, 1].
            prompts: The B prompts of the images.
            expected: What the method expected of each image's score at each of S sampling steps, [B, S], if it did.
        """
        raise NotImplementedError

    def carried(self) -> dict[str, Tensor]:
        """Return the tensors to save in a checkpoint by name; a resumed run restores them in place."""
        raise NotImplementedError


def online_parts(reward: Reward) -> dict[str, OnlineReward]:
    return {name: part for name, part in sub_rewards(reward).items() if isinstance(part, OnlineReward)}


def carried(reward: Reward) -> dict[str, Tensor]:
    """Return the tensors of a reward, and of all rewards inside it, that a checkpoint saves."""
    states = ((name, part.carried()) for name, part in online_parts(reward).items())
    return {f"reward/{name}/{key}": tensor for name, state in states for key, tensor in state.items()}


def extra_queries(reward: Reward) -> int:
    """Return how many images a reward, and all rewards inside it, have scored beyond those it was called with."""
    return sum(part.extra_queries for part in online_parts(reward).values())


def online_rewards(reward: Reward) -> list[OnlineReward]:
    """Return the rewards that learn from training's images: the reward itself or parts inside it."""
    return [part for part in online_parts(reward).values() if part.learns]


def learn_all(reward: Reward, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
    """Call `learn` of each reward that learns, with its own copies of the arguments.

    `expected` [B, S] is about the scores of `reward`; parts inside it get None.
    """
    for part in online_rewards(reward):
        own_expected = expected.clone() if expected is not None and part is reward else None
        with wrap_errors(part):
            part.learn(images.clone(), copied(prompts), own_expected)


def require_trained(reward: Reward) -> Reward:
    """Return the reward. Raises DraftuneError if a part of it must learn first."""
    for part in online_rewards(reward):
        if part.untaught:
            raise DraftuneError(
                f"the reward {part.label!r} has not learned yet: load what a run learned by {part.label}(…, critic=RUN)"
            )
    return reward
