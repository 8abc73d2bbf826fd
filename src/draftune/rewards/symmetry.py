"""Symmetry: how much a picture correlates with its mirrored or rotated copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from draftune.errors import DraftuneError, unknown
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import center

AXES = {"vertical": (-1,), "horizontal": (-2,)}


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the pixels of each pair of pictures less each channel's mean [B]; 0 for an even picture."""
    a, b = ((x - x.mean((2, 3), keepdim=True)).flatten(1) for x in (a, b))
    return cosine_similarity(a, b, dim=1, eps=1e-6)


class Symmetry(Reward):
    """Correlation with the picture mirrored at an axis through its centre."""

    def __init__(self, axis: str) -> None:
        super().__init__()
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
        self.axis = axis

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return correlation(images, images.flip(AXES[self.axis]))


class Rotation(Reward):
    """Correlation with the picture turned about its centre; of an oblong picture, the centre square is looked at."""

    def __init__(self, angle: int) -> None:
        super().__init__()
        if angle not in (90, 180, 270):
            raise DraftuneError(f"angle of reward rotation must be 90, 180 or 270 degrees, not {angle}")
        self.angle = angle

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        side = min(images.shape[-2:])
        rows, columns = center((images.shape[-2], images.shape[-1]), (side, side))
        square = images[..., rows, columns]
        return correlation(square, torch.rot90(square, self.angle // 90, (-2, -1)))


@register("symmetry")
def symmetry(axis: str = "vertical") -> Reward:
    """Correlation of the picture with its mirror image, -1 to 1; `-1*symmetry` asks for the opposite.

    `axis`: "vertical" makes left and right alike, "horizontal" top and bottom. No weights; any size. Source: DRTune,
    arXiv 2405.00760, which finds that DRaFT-1 can hardly raise it; on the embedded model it does, by blurring.
    Over-optimised it draws fronts of faces and patterns, and then one large blot.
    """
    return Symmetry(axis)


@register("rotation")
def rotation(angle: int = 180) -> Reward:
    """Correlation of the picture with its rotated copy, -1 to 1; `-1*rotation` asks for anti-correlation.

    `angle`: 90, 180 or 270 degrees. No weights; any size, of an oblong picture the centre square. Source: Clark et al.,
    arXiv 2309.17400 (the angle that they used is not known).
    Over-optimised it draws wheels and pinwheels; anti-correlated, a bright and a dark half.
    """
    return Rotation(angle)
