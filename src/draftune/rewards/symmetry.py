"""Symmetry: the correlation of an image with its mirrored or rotated copy."""

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
    """Return Pearson's correlation [B] of images [B, 3, H, W] after subtracting each channel's mean; 0 if uniform."""
    a, b = ((x - x.mean((2, 3), keepdim=True)).flatten(1) for x in (a, b))
    return cosine_similarity(a, b, dim=1, eps=1e-6)


@register("symmetry")
class Symmetry(Reward):
    """Correlation of the image with its mirror image, -1 to 1; `-1*symmetry` rewards asymmetry.

    `axis`: "vertical" makes left and right equal, "horizontal" top and bottom. No weights; any size. Source: DRTune
    (Wu et al., 2024, arXiv:2405.00760), which reports that DRaFT-1 hardly increases it; on the embedded model DRaFT-1
    does, by blurring. Over-optimized: front views of faces and patterns, then one large blot.
    """

    def __init__(self, axis: str = "vertical") -> None:
        super().__init__()
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
        self.axis = axis

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return correlation(images, images.flip(AXES[self.axis]))


@register("rotation")
class Rotation(Reward):
    """Correlation of the image with its rotated copy, -1 to 1; `-1*rotation` rewards anti-correlation.

    `angle`: 90, 180 or 270 degrees. No weights; any size, of which the center square is used. Source: Clark et al.,
    2023, arXiv:2309.17400; their angle is not known.
    Over-optimized: wheels and pinwheels; anti-correlated, a bright and a dark half.
    """

    def __init__(self, angle: int = 180) -> None:
        super().__init__()
        if angle not in (90, 180, 270):
            raise DraftuneError(f"angle of reward rotation must be 90, 180 or 270 degrees, not {angle}")
        self.angle = angle

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        side = min(images.shape[-2:])
        rows, columns = center((images.shape[-2], images.shape[-1]), (side, side))
        square = images[..., rows, columns]
        return correlation(square, torch.rot90(square, self.angle // 90, (-2, -1)))
