"""Rewards that are arithmetic on pixels, and similarity to a given image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor
from torch.nn.functional import pad

from draftune.errors import DraftuneError, unknown
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.preprocess import resize
from draftune.rewards.weights import find_network
from draftune.utils.images import open_image
from draftune.utils.paths import user_path

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's mode "L"
PROPERTIES = ("pixels", "gray", "colors")


def luma(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of images [B, 3, H, W]."""
    return torch.einsum("c,bchw->bhw", torch.tensor(LUMA, device=images.device), images)[:, None]


@register("brightness")
class Brightness(Reward):
    """Mean luma, 0 (black) to 1 (white). No weights; any size. Over-optimized: a white image."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return luma(images).mean((1, 2, 3))


@register("saturation")
class Saturation(Reward):
    """Mean difference of the largest and the smallest channel, 0 (gray) to 1 (pure colors).

    No weights; any size. A gray pixel has no gradient. Over-optimized: poster colors.
    """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.amax(1) - images.amin(1)).mean((1, 2))


@register("sharpness")
class Sharpness(Reward):
    """Mean squared Laplacian of the luma: 0 for a uniform image, about 0.001 to 0.05 for photographs.

    Edge pixels are replicated beyond the border. No weights; any size. Over-optimized: noise and a checkerboard.
    """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        x = pad(luma(images), (1, 1, 1, 1), mode="replicate")
        across, along = x[..., 1:-1, :-2] + x[..., 1:-1, 2:], x[..., :-2, 1:-1] + x[..., 2:, 1:-1]
        return (across + along - 4 * x[..., 1:-1, 1:-1]).square().mean((1, 2, 3))


@register("color")
class Color(Reward):
    """Minus the mean squared distance of the pixels to a color, at most 0.

    `target`: a CSS name (orange) or a hex code in quotes ("#ff8800"). No weights; any size. Over-optimized: an image of
    that one color.
    """

    target: Tensor

    def __init__(self, target: str) -> None:
        super().__init__()
        try:
            red_green_blue = ImageColor.getrgb(target)[:3]
        except ValueError as error:
            raise DraftuneError(f"unknown color {target!r}: a name (orange) or a code ('#ff8800')") from error
        self.register_buffer("target", torch.tensor(red_green_blue)[:, None, None] / 255, persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(images - self.target).square().mean((1, 2, 3))


class PixelSimilarity(Reward):
    """Minus the mean squared distance to an image, resized to the size of the scored images."""

    image: Tensor

    def __init__(self, image: str) -> None:
        super().__init__()
        self.register_buffer("image", open_image(user_path(image)), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        height, width = images.shape[-2:]
        return -(images - resize(self.image, (height, width))).square().mean((1, 2, 3))


class ClipSimilarity(Reward):
    """Cosine similarity of the CLIP embeddings of an image and the scored images."""

    def __init__(self, image: str, model: str) -> None:
        super().__init__()
        self.image = open_image(user_path(image))
        self.folder = find_network(model, "the reward's model=")

    def load(self) -> None:
        self.clip = ClipEncoder.from_folder(self.folder)
        with torch.no_grad():
            self.register_buffer("embedding", self.clip.embed_images(self.image), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        embedding: Tensor = self.embedding  # type: ignore[assignment]
        return (self.clip.embed_images(images) * embedding).sum(-1)


@register("image_similarity")
def image_similarity(image: str, model: str = "") -> Reward:
    """Similarity to an image: minus the mean squared distance of the pixels, or the cosine of CLIP embeddings.

    `image`: an image file. `model`: a CLIP or SigLIP folder, a hub id or emoji_clip, for the cosine (-1 to 1) instead
    of the pixels' distance (at most 0). Weights and input size are those of `model`.
    Over-optimized: the same image for every prompt.
    """
    return ClipSimilarity(image, model) if model else PixelSimilarity(image)


@register("image_match")
class ImageMatch(Reward):
    """Similarity to an image in one property, at most 0: minus the mean squared difference.

    `image`: an image file. `property`: pixels; gray, the mean of the channels, for colorization; colors, the mean and
    standard deviation of each channel. `mask`: an image file, black where the property must match and white elsewhere,
    for inpainting. Image and mask are resized to the scored images. No weights; any size. Made for guidance
    (`draftune sample --guidance-reward`). Over-optimized: the same image for every prompt.
    Source: PGDiff (Yang et al., 2023, arXiv:2309.10810), which sums over pixels in [-1, 1] instead.
    """

    image: Tensor
    mask: Tensor

    def __init__(self, image: str, property: str = "pixels", mask: str = "") -> None:
        super().__init__()
        if property not in PROPERTIES:
            raise unknown("property of reward image_match", property, PROPERTIES)
        self.property = property
        self.register_buffer("image", open_image(user_path(image)), persistent=False)
        weights = 1 - open_image(user_path(mask)).mean(1, keepdim=True) if mask else torch.ones(1, 1, 1, 1)
        if weights.max() < 1 / 255:
            raise DraftuneError(f"the mask {mask!r} is white everywhere: make the part black that must match")
        self.register_buffer("mask", weights, persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        height, width = images.shape[-2:]
        mask = resize(self.mask, (height, width), "bilinear")
        if not mask.any():
            raise DraftuneError(f"the mask is white everywhere at {width}x{height}: make its black part larger")
        mask = mask / mask.mean()
        difference = self.features(images, mask) - self.features(resize(self.image, (height, width)), mask)
        return -(mask * difference.square()).mean((1, 2, 3))

    def features(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the property of images [B, 3, H, W], weighted by a mask [1, 1, H, W] of mean 1."""
        if self.property == "pixels":
            return images
        if self.property == "gray":
            return images.mean(1, keepdim=True)
        mean = (mask * images).mean((2, 3), keepdim=True)
        variance = (mask * (images - mean).square()).mean((2, 3), keepdim=True)
        # The square root has no finite gradient at 0, the variance of a uniform image.
        return torch.cat([mean, (variance + 1e-8).sqrt()], 1)
