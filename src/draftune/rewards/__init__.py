"""Rewards: differentiable scores of images, by name, in weighted sums, and from a user's own code."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from draftune.errors import DraftuneError, gather
from draftune.registry.expression import Call, Sum, parse, underscore_hint
from draftune.registry.factories import bind, find_factory, make, wraps_another
from draftune.rewards import base
from draftune.rewards.base import FunctionReward, Reward, WeightedSum, register

if TYPE_CHECKING:
    from draftune.rewards.base import REWARDS

__all__ = ["REWARDS", "FunctionReward", "Reward", "WeightedSum", "parse_reward", "load_reward", "register"]

MODULES = (
    "draftune.rewards.aesthetic",
    "draftune.rewards.classify",
    "draftune.rewards.clip",
    "draftune.rewards.detection",
    "draftune.rewards.dreamsim",
    "draftune.rewards.emoji",
    "draftune.rewards.emoji_latent",
    "draftune.rewards.face",
    "draftune.rewards.hpsv2",
    "draftune.rewards.hpsv3",
    "draftune.rewards.imagereward",
    "draftune.rewards.iqa",
    "draftune.rewards.jpeg",
    "draftune.rewards.likeness",
    "draftune.rewards.ocr",
    "draftune.rewards.pixel",
    "draftune.rewards.relative",
    "draftune.rewards.sharpness_aware",
    "draftune.rewards.symmetry",
    "draftune.rewards.taste",
    "draftune.rewards.unifiedreward",
    "draftune.rewards.vqa",
    "draftune.experimental.discriminator",
    "draftune.experimental.threshold",
    "draftune.experimental.black_box",
)
"""The modules that register rewards. They are imported when a reward is first looked up by name."""


def __getattr__(name: str) -> Any:
    """Return REWARDS with the rewards of all modules; `from draftune.rewards import REWARDS` calls this."""
    if name != "REWARDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in MODULES:
        importlib.import_module(module)
    return base.REWARDS


def load_reward(reward: str | Reward | Callable[..., Any], precision: str | None = None) -> Reward:
    """Return a reward with its weights loaded and frozen.

    Args:
        reward: An expression such as "clip + 0.1*jpeg_compressibility(quality=80)", a `Reward`, or a function of
            images [B, 3, H, W] in [0, 1] and B prompts that returns scores [B].
        precision: Precision of the weights, see `load_in_precision`.

    Raises:
        DraftuneError: for an unknown name or setting, or missing weights, before any weights are read.
    """
    from draftune.rewards.precision import load_in_precision

    return load_in_precision(parse_reward(reward), precision)


def parse_reward(reward: str | Reward | Callable[..., Any]) -> Reward:
    """Return a reward whose weights are located but not read; `Reward.load_weights` reads them. See `load_reward`."""
    if isinstance(reward, Reward):
        return reward
    if not isinstance(reward, str):
        return FunctionReward(reward)
    tree = parse(reward)
    try:
        check_names(tree)
    except DraftuneError as error:
        raise DraftuneError(f"{error}{underscore_hint(reward)}") from error
    return build(tree)


def check_names(tree: Call | Sum) -> None:
    """Raise DraftuneError for an unknown name, and for a wrapped reward that is missing or not expected.

    Building a reward may download its weights, so all names are checked first.
    """
    if isinstance(tree, Sum):
        for _, call in tree.terms:
            check_names(call)
        return
    factory = find_factory(tree.name, "reward", __getattr__("REWARDS"))
    wraps = is_factory(factory) and wraps_another(factory, Reward)
    if wraps and tree.inner is None:
        raise DraftuneError(f"{tree.name} needs a reward inside it: {tree.name}(clip + 0.1*aesthetic)")
    if tree.inner is not None:
        if not wraps:
            raise DraftuneError(f"{tree.name} takes settings such as key=value, not {str(tree.inner)!r}")
        check_names(tree.inner)


def is_factory(value: Any) -> bool:
    """Return whether a value makes a reward when it is called; otherwise it scores images."""
    return isinstance(value, type) or value in base.REWARDS.values()


def build(tree: Call | Sum) -> Reward:
    """Build the reward of an expression whose names are checked.

    A class or registered factory gets the settings when it makes the reward; a plain function gets them, after images
    and prompts, whenever it scores.
    """
    if isinstance(tree, Sum):
        parts = gather(*(functools.partial(build, call) for _, call in tree.terms))
        return WeightedSum([(weight, part) for (weight, _), part in zip(tree.terms, parts, strict=True)])
    factory = find_factory(tree.name, "reward", base.REWARDS)
    inner = [] if tree.inner is None else [build(tree.inner)]
    if is_factory(factory):
        made: Any = make(tree, "reward", factory, object, *inner)
    else:
        settings = {} if isinstance(factory, nn.Module) else bind(tree, "reward", factory, 2)
        made = functools.partial(factory, **settings) if settings else factory
    reward = made if isinstance(made, Reward) else FunctionReward(made)
    if not inner:
        reward.label = tree.name.rpartition(":")[2]
    reward.expression = str(tree)
    return reward
