"""Groups of images of one prompt: their advantages, over all batches and processes of an update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.methods.base import Batch

SPREADS = ("update", "group")
"""Images whose standard deviation divides an advantage: all of the update, or those of the group."""


def check_advantages(spread: str, adv_clip_max: float, method: str) -> None:
    """Raise DraftuneError unless `spread` is in SPREADS and `adv_clip_max` is above 0 and finite."""
    if spread not in SPREADS:
        raise unknown(f"spread of {method}", str(spread), SPREADS)
    if not 0 < adv_clip_max < math.inf:
        raise DraftuneError(f"adv_clip_max must be above 0 and finite, got {adv_clip_max}")


def gathered(batches: Sequence[Batch], rewards: Sequence[Tensor]) -> Tensor:
    """Return the rewards [N] of an update from each batch's own [B], over all processes."""
    return torch.cat([batch.processes.gather(reward) for batch, reward in zip(batches, rewards, strict=True)])


def own_parts(batches: Sequence[Batch], values: Tensor) -> list[Tensor]:
    """Return this process's share [B] of each batch of values [N] of an update."""
    parts = values.split([len(batch.all_prompts) for batch in batches])
    return [batch.processes.shard(part) for batch, part in zip(batches, parts, strict=True)]


def group_advantages(rewards: Tensor, size: int, spread: str, bound: float) -> Tensor:
    """Standardize rewards within groups of `size` neighbors, and clip them.

    A = clip((r - mean of the group) / (std + 1e-4), -bound, bound); 0 in a group of equal rewards.

    Args:
        rewards: The rewards [N] of an update, with N a multiple of `size`.
        size: Images of a group.
        spread: The images whose population standard deviation divides: "update" or "group".
        bound: The bound of the absolute value.

    Returns:
        The advantages [N].
    """
    groups = rewards.view(-1, size)
    std = groups.std(1, keepdim=True, unbiased=False) if spread == "group" else rewards.std(unbiased=False)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).clamp(-bound, bound)
    # The mean of equal numbers may differ from them by rounding, and Adam would scale that difference up.
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0, advantages).flatten()


def why_no_advantage(rewards: Tensor) -> str:
    """Explain why the advantages of these rewards [N] are all 0, and suggest a remedy."""
    first = float(rewards[0])
    if bool((rewards == rewards[0]).all()):
        return (
            f"all {len(rewards)} rewards of the update are {first:g}: use a reward that distinguishes the images, or "
            "more images an update (`--batch-size`, `--gradient-accumulation-steps`)"
        )
    return "every advantage is 0, since each prompt's rewards are equal: use a reward that distinguishes its images"
