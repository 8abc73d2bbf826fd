"""What the model families share: classifier-free guidance, size checks, VAE decoding and clamping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError


class Condition(NamedTuple):
    """The prompt embeddings of models with a pooled text embedding. With guidance, negative prompts come first.

    Attributes:
        text: One embedding per token, `[B, tokens, width]`.
        pooled: One embedding per prompt, `[B, width]`.
    """

    text: Tensor
    pooled: Tensor


def apply_cfg(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    batch_size: int,
    guidance_scale: float,
    norm_axis: int | None = None,
) -> Tensor:
    """Call the network with classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598).

    output = negative + guidance_scale * (positive - negative)

    Both outputs are computed in one call on a doubled batch. With `norm_axis` the output is rescaled:

    output * |positive| / |output|

    Args:
        network: Maps noisy latents to outputs. Its condition has `batch_size` rows; with guidance, the negative
            (unconditional) ones come first.
        x: Noisy latents, `[B, C, H, W]`, or their tokens, `[B, tokens, width]`.
        batch_size: 2 * B for guidance; B for one plain call.
        guidance_scale: The weight of the positive (conditional) output; unused without guidance.
        norm_axis: The axis of the norms of models whose guided output is rescaled; None for all others.

    Returns:
        The network's output, of the shape of `x`.
    """
    if batch_size == len(x):
        return network(x)
    negative, positive = network(torch.cat([x, x])).chunk(2)
    output = negative + guidance_scale * (positive - negative)
    if norm_axis is None:
        return output
    norms = [torch.norm(tensor, dim=norm_axis, keepdim=True) for tensor in (positive, output)]
    return output * (norms[0] / norms[1])


def check_size(height: int | None, width: int | None, multiple: int, largest: int | None = None) -> None:
    """Raise DraftuneError unless both sizes, in pixels, are positive multiples of `multiple` up to `largest`.

    None stands for the model's default size and is allowed.
    """
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < multiple or value % multiple):
            raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
        if value is not None and largest is not None and value > largest:
            raise DraftuneError(f"{name} must be at most {largest} for this model, not {value}")


def decode_vae(vae: Any, latents: Tensor, std: Tensor | float = 1.0, mean: Tensor | float = 0.0) -> Tensor:
    """Decode normalized latents with a diffusers autoencoder.

    image = vae.decode(latents / scaling_factor * std + mean) / 2 + 0.5

    Args:
        vae: An autoencoder with a `scaling_factor` in its config.
        latents: Clean latents, `[B, C, H, W]`.
        std: The standard deviation of the unnormalized latents, for autoencoders that state one.
        mean: Their mean; `shift_factor` in the configs of flow models.

    Returns:
        Images, `[B, 3, H, W]`, nominally in [0, 1] but not clamped.
    """
    latents = latents / vae.config.scaling_factor * std + mean
    images: Tensor = vae.decode(latents.to(vae.dtype)).sample / 2 + 0.5
    return images


def clamp_unit(images: Tensor, gradient: str = "straight_through") -> Tensor:
    """Clamp images to [0, 1].

    Decoders produce values outside [0, 1] on white and black. The true gradient of a clamp is 0 there, so that a reward
    could not move such a pixel. The straight-through estimator (Bengio et al., 2013, arXiv:1308.3432) uses a gradient
    of 1 instead.

    Args:
        images: Of any shape.
        gradient: "straight_through" passes the gradient of every pixel. "hard" passes it only inside [0, 1].

    Returns:
        The clamped images. Their values do not depend on `gradient`.
    """
    clamped = images.clamp(0, 1)
    # The difference is exactly 0, so that the values equal those of the clamp to the last bit.
    return clamped if gradient == "hard" else clamped.detach() + (images - images.detach())
