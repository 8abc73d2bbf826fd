"""Differentiable rewards of pictures, by name and in sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from draftune.errors import DraftuneError, gather, unknown
from draftune.registry.custom import is_custom
from draftune.registry.expression import QUOTES, Call, Sum, parse, wraps_another
from draftune.rewards import (  # noqa: F401 - each registers its rewards
    aesthetic,
    black_box,
    classify,
    clip,
    detection,
    discriminator,
    emoji,
    hpsv2,
    imagereward,
    jpeg,
    properties,
    robust,
    simple,
    symmetry,
    threshold,
)
from draftune.rewards.base import REWARDS, FunctionReward, Reward, WeightedSum, register
from draftune.rewards.custom import load_custom

__all__ = ["REWARDS", "FunctionReward", "Reward", "WeightedSum", "find_reward", "load_reward", "register"]


def load_reward(reward: str | Reward | Callable[..., Any]) -> Reward:
    """A reward from an expression ("clip + 0.1*jpeg-compressibility(quality=80)"), a Reward or a plain function.

    A function gets images [B, 3, H, W] in [0, 1] and the B prompts, and returns B numbers. Raises DraftuneError
    for a name, a setting or weights that are not there, before any weights are read.
    """
    return find_reward(reward).ready()


def find_reward(reward: str | Reward | Callable[..., Any]) -> Reward:
    """The reward with all its weights found and none of them read; `ready` reads them."""
    if isinstance(reward, Reward):
        return reward
    if not isinstance(reward, str):
        return FunctionReward(reward)
    tree = parse(reward)
    try:
        check(tree)
    except DraftuneError as error:
        if ".py:" not in reward:
            raise
        raise DraftuneError(f"{error}; {QUOTES}") from error  # a plus sign in a path makes a sum of it
    return build(tree)


def check(tree: Call | Sum) -> None:
    """Raises DraftuneError for a name that is not known, or that takes no reward inside it, or wants one."""
    if isinstance(tree, Sum):
        for _, call in tree.terms:
            check(call)
        return
    custom = is_custom(tree.name)
    if tree.name.endswith(".py"):
        raise DraftuneError(f"which function or class of {tree.name}? {tree.name}:NAME is wanted")
    if tree.name not in REWARDS and not custom:
        raise unknown("reward", tree.name, REWARDS)
    wraps = not custom and wraps_another(REWARDS[tree.name], Reward)
    if wraps and tree.inner is None:
        raise DraftuneError(f"{tree.name} wants a reward inside it: {tree.name}(clip + 0.1*aesthetic)")
    if tree.inner is not None:
        if not wraps:
            raise DraftuneError(f"{tree.name} takes settings such as key=value, not {str(tree.inner)!r}")
        check(tree.inner)


def build(tree: Call | Sum) -> Reward:
    if isinstance(tree, Sum):
        weights = [weight for weight, _ in tree.terms]
        parts = gather(*(functools.partial(build, call) for _, call in tree.terms))
        return WeightedSum(list(zip(weights, parts, strict=True)))
    if is_custom(tree.name):
        reward = load_custom(tree)
    else:
        inner = [] if tree.inner is None else [build(tree.inner)]
        reward = tree.apply(REWARDS[tree.name], "reward", *inner)
        if not inner:
            reward.label = tree.name
    reward.expression = str(tree)
    return reward
