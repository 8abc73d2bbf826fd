"""Likeness to a picture in one property: its pixels, outside of a mask, its greys, or its colours on the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import resize
from draftune.utils.images import open_image
from draftune.utils.paths import user_path

PROPERTIES = ("pixels", "grey", "colors")


class Matches(Reward):
    """Minus the mean squared difference of a property; the picture and the mask are resized to the scored ones."""

    picture: Tensor
    kept: Tensor

    def __init__(self, image: str, property: str = "pixels", mask: str = "") -> None:
        super().__init__()
        if property not in PROPERTIES:
            raise unknown("property of reward matches", property, PROPERTIES)
        self.property = property
        self.register_buffer("picture", open_image(user_path(image)), persistent=False)
        kept = 1 - open_image(user_path(mask)).mean(1, keepdim=True) if mask else torch.ones(1, 1, 1, 1)
        if kept.max() < 1 / 255:
            raise DraftuneError(f"the mask {mask!r} is white all over: nothing is left that has to match")
        self.register_buffer("kept", kept, persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        height, width = images.shape[-2:]
        kept = resize(self.kept, (height, width), "bilinear")
        if not kept.any():
            raise DraftuneError(f"nothing black is left of the mask at {width}x{height}: nothing has to match")
        kept = kept / kept.mean()
        difference = self.seen(images, kept) - self.seen(resize(self.picture, (height, width)), kept)
        return -(kept * difference.square()).mean((1, 2, 3))

    def seen(self, images: Tensor, kept: Tensor) -> Tensor:
        """The property of pictures [B, 3, H, W], for `kept` with a mean of 1."""
        if self.property == "pixels":
            return images
        if self.property == "grey":
            return images.mean(1, keepdim=True)
        mean = (kept * images).mean((2, 3), keepdim=True)
        variance = (kept * (images - mean).square()).mean((2, 3), keepdim=True)
        # A flat picture has no slope of its spread otherwise.
        return torch.cat([mean, (variance + 1e-8).sqrt()], 1)


@register("matches")
def matches(image: str, property: str = "pixels", mask: str = "") -> Reward:
    """Likeness to a picture in one property, at most 0: minus the mean squared difference.

    `image`: a picture file. `property`: pixels; grey, the mean of the channels, for colouring; colors, mean and spread
    of each channel. `mask`: a picture file, black where the property has to match and white where it is free,
    for filling in. No weights; any size. Made for guidance (`draftune sample --guidance-reward`). Over-optimised: every
    prompt gives the picture. Source: PGDiff (arXiv 2309.10810), which sums over the pixels in [-1, 1] instead.
    """
    return Matches(image, property, mask)
