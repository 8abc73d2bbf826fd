"""Scores of latents: through the decoder, or with a gradient that a reward supplies for the latents themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import copied
from draftune.rewards.base import Reward, wrap_errors

Decode = Callable[[Tensor], Tensor]
"""Decodes clean latents [B, C, H, W] to images [B, 3, H, W] in [0, 1]."""


class LatentReward(Reward):
    """Base class of rewards that supply the gradient of their scores with respect to clean latents."""

    past_decoder: bool = True
    """Whether `slope` is this reward's only gradient; if False, it is a plain reward of images."""

    def slope(self, latents: Tensor, decode: Decode, prompts: Sequence[str]) -> Tensor:
        """Return the gradient of each score with respect to its clean latents, [B, C, H, W]."""
        raise NotImplementedError

    def scores(self, images: Tensor, prompts: Sequence[str], size: int) -> Tensor:
        return super().scores(images.detach() if self.past_decoder else images, prompts, size)


def has_latent_gradient(reward: Reward) -> bool:
    """Return whether a reward's gradient comes from `LatentReward.slope` and bypasses the decoder."""
    return isinstance(reward, LatentReward) and reward.past_decoder


def score_latents(
    reward: Reward, latents: Tensor, decode: Decode, prompts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Decode clean latents [B, C, H, W] and score the images, with the gradient with respect to the latents.

    Returns:
        The total scores [B]; the scores of each part by its name, [B], without gradient; and the images
        [B, 3, H, W], without gradient.

    Raises:
        DraftuneError: if a part's `slope` has another shape than the latents.
    """
    needs_reward_gradient = torch.is_grad_enabled() and latents.requires_grad
    in_images = needs_reward_gradient and not all(has_latent_gradient(part) for _, part in reward.terms)
    with torch.set_grad_enabled(in_images):
        images = decode(latents)
        total, parts = reward.components(images, prompts)
    for weight, part in reward.named_terms.values() if needs_reward_gradient else ():
        if isinstance(part, LatentReward) and part.past_decoder:
            with wrap_errors(part):
                gradient = part.slope(latents.detach().clone(), decode, copied(prompts)).detach().clone()
            if gradient.shape != latents.shape:
                raise DraftuneError(
                    f"the slope of reward {part.label!r} must have the latents' shape {tuple(latents.shape)}, not "
                    f"{tuple(gradient.shape)}"
                )
            # Adds 0 to the scores, and the gradient to the latents' gradient.
            total = total + weight * ((latents - latents.detach()) * gradient).flatten(1).sum(1)
    return total, parts, images.detach()
