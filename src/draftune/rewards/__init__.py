"""Differentiable rewards of pictures, by name and in sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draftune.errors import unknown
from draftune.expression import Call, Sum, parse
from draftune.rewards import aesthetic, clip, jpeg, judge  # noqa: F401 - registers them
from draftune.rewards.base import REWARDS, FunctionReward, Reward, WeightedSum, register

__all__ = ["REWARDS", "FunctionReward", "Reward", "WeightedSum", "load_reward", "register"]


def load_reward(reward: str | Reward | Callable[..., Any]) -> Reward:
    """A reward from an expression ("clip + 0.1*jpeg-compressibility(quality=80)"), a Reward or a plain function.

    A function gets images [B, 3, H, W] in [0, 1] and the B prompts, and returns B numbers. Raises DraftuneError
    for a name, a setting or weights that are not there.
    """
    if isinstance(reward, Reward):
        return reward.freeze()
    if not isinstance(reward, str):
        return FunctionReward(reward).freeze()
    tree = parse(reward)
    if isinstance(tree, Sum):
        for _, call in tree.terms:
            check(call)
        return WeightedSum([(weight, build(call)) for weight, call in tree.terms]).freeze()
    return build(tree).freeze()


def check(call: Call) -> None:
    if call.name not in REWARDS:
        raise unknown("reward", call.name, REWARDS)


def build(call: Call) -> Reward:
    check(call)
    reward = call.apply(REWARDS[call.name], "reward")
    reward.label = call.name
    return reward
