"""Rewards of plain arithmetic on pixels, and likeness to a reference picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor
from torch.nn.functional import pad

from draftune.errors import DraftuneError
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.preprocess import resize
from draftune.rewards.weights import find_network
from draftune.utils.images import open_image
from draftune.utils.paths import user_path

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's "L"


def luma(images: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 1, H, W]."""
    return torch.einsum("c,bchw->bhw", torch.tensor(LUMA, device=images.device), images)[:, None]


class Brightness(Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return luma(images).mean((1, 2, 3))


class Saturation(Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.amax(1) - images.amin(1)).mean((1, 2))


class Sharpness(Reward):
    """The mean square of the Laplacian; beyond the edge the picture goes on as at the edge."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        x = pad(luma(images), (1, 1, 1, 1), mode="replicate")
        across, along = x[..., 1:-1, :-2] + x[..., 1:-1, 2:], x[..., :-2, 1:-1] + x[..., 2:, 1:-1]
        return (across + along - 4 * x[..., 1:-1, 1:-1]).square().mean((1, 2, 3))


class Color(Reward):
    """Minus the mean squared distance of the pixels to a colour."""

    target: Tensor

    def __init__(self, target: str) -> None:
        super().__init__()
        try:
            red_green_blue = ImageColor.getrgb(target)[:3]
        except ValueError as error:
            raise DraftuneError(
                f"unknown colour {target!r}: a name such as orange or a code such as '#ff8800'"
            ) from error
        self.register_buffer("target", torch.tensor(red_green_blue)[:, None, None] / 255, persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(images - self.target).square().mean((1, 2, 3))


class PixelReference(Reward):
    """Minus the mean squared distance to a picture, which is resized to the size of the scored ones."""

    picture: Tensor

    def __init__(self, image: str) -> None:
        super().__init__()
        self.register_buffer("picture", open_image(user_path(image)), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        height, width = images.shape[-2:]
        return -(images - resize(self.picture, (height, width))).square().mean((1, 2, 3))


class ClipReference(Reward):
    """Cosine of the CLIP embeddings of a picture and the scored ones."""

    def __init__(self, image: str, model: str) -> None:
        super().__init__()
        self.picture = open_image(user_path(image))
        self.folder = find_network(model, "the reward's model=")

    def load(self) -> None:
        self.clip = ClipEncoder.from_folder(self.folder)
        with torch.no_grad():
            self.register_buffer("embedding", self.clip.embed_images(self.picture), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        embedding: Tensor = self.embedding  # type: ignore[assignment]
        return (self.clip.embed_images(images) * embedding).sum(-1)


@register("brightness")
def brightness() -> Reward:
    """Mean luma, 0 (black) to 1 (white). No weights; any size. Over-optimised: a white picture."""
    return Brightness()


@register("saturation")
def saturation() -> Reward:
    """Mean difference of the strongest and the weakest channel, 0 (grey) to 1 (pure colours).

    No weights; any size. A grey pixel has no gradient. Over-optimised: poster colours.
    """
    return Saturation()


@register("sharpness")
def sharpness() -> Reward:
    """Mean squared Laplacian of the luma: 0 for a smooth picture, about 0.001 to 0.05 for photographs.

    No weights; any size. Over-optimised: noise and a checkerboard.
    """
    return Sharpness()


@register("color")
def color(target: str) -> Reward:
    """Minus the mean squared distance of the pixels to a colour, at most 0.

    `target`: a CSS name (orange) or a code in quotes ('#ff8800'). No weights; any size. Over-optimised: a wall of it.
    """
    return Color(target)


@register("reference")
def reference(image: str, model: str = "") -> Reward:
    """Likeness to a reference picture: minus the mean squared distance of pixels, or perceptually by a CLIP model.

    `image`: a picture file; `model`: a CLIP or SigLIP folder, hub id or emoji-clip, for the cosine of the two
    embeddings (-1 to 1) instead of the pixels (at most 0). Weights and input size are those of `model`.
    Over-optimised: every prompt gives the reference.
    """
    return ClipReference(image, model) if model else PixelReference(image)
