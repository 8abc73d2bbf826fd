"""Scores of latents: through the decoder, or with a gradient that a reward supplies for the latents themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import copied
from draftune.rewards.base import Reward, WeightedSum, wrap_errors
from draftune.rewards.chunked import chunked_scores
from draftune.utils.weightless import fake_mode

Decode = Callable[[Tensor], Tensor]
"""Decodes clean latents [B, C, H, W] to images [B, 3, H, W] in [0, 1]."""

SAME = 0.5
"""Largest relative squared error of a latent that was decoded and encoded by one autoencoder."""


class LatentReward(Reward):
    """Base class of rewards that supply the gradient of their scores with respect to clean latents."""

    past_decoder: bool = True
    """Whether `slope` is this reward's only gradient; if False, it is a plain reward of images."""

    def slope(self, latents: Tensor, decode: Decode, prompts: Sequence[str]) -> Tensor:
        """Return the gradient of each score with respect to its clean latents, [B, C, H, W]."""
        raise NotImplementedError

    def scores(self, images: Tensor, prompts: Sequence[str], size: int) -> Tensor:
        return super().scores(images.detach() if self.past_decoder else images, prompts, size)


class LatentScore(Reward):
    """Base class of rewards that read clean latents, so that no decoder is in their graph.

    A subclass implements `score_latents`, for the latents of one autoencoder, and `encode`, that autoencoder's encoder.
    Where a method hands over latents, they are scored. Where there are only images, as in evaluations, the images are
    encoded and their latents are scored.
    """

    checked: bool = False
    """Whether latents were compared with those of `encode`."""

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B] of clean latents [B, C, H, W]. Each score depends on its own latent and prompt only."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] into the latents that `score_latents` reads, with their gradient."""
        raise NotImplementedError

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_latents(self.encode(images), prompts)


def has_latent_gradient(reward: Reward) -> bool:
    """Return whether a reward's gradient comes from `LatentReward.slope` and bypasses the decoder."""
    return isinstance(reward, LatentReward) and reward.past_decoder


def score_latents(
    reward: Reward, latents: Tensor, decode: Decode, prompts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Score clean latents [B, C, H, W], with the gradient with respect to the latents.

    Parts that are a `LatentScore` read the latents. If there are others, the latents are decoded for them.

    Returns:
        The total scores [B]; the scores of each part by its name, [B], without gradient; and the images
        [B, 3, H, W], without gradient, or None if nothing was decoded.

    Raises:
        DraftuneError: if a part's `slope` has another shape than the latents, or a part reads the latents of another
            autoencoder.
    """
    needs_reward_gradient = torch.is_grad_enabled() and latents.requires_grad
    named = reward.named_terms
    direct = {label: (weight, part) for label, (weight, part) in named.items() if isinstance(part, LatentScore)}
    rest = WeightedSum([named[label] for label in named if label not in direct]) if direct else reward
    total, images = torch.zeros(len(latents), device=latents.device), None
    parts: dict[str, Tensor] = {}
    if rest.terms:
        in_images = needs_reward_gradient and not all(has_latent_gradient(part) for _, part in rest.terms)
        with torch.set_grad_enabled(in_images):
            images = decode(latents)
            total, parts = rest.components(images, prompts)
        if direct:  # without the other parts, labels may be numbered otherwise
            parts = dict(zip([label for label in named if label not in direct], parts.values(), strict=True))
    for label, (weight, reader) in direct.items():
        check_autoencoder(reader, latents, decode)
        scores = direct_scores(reader, latents, prompts)
        total, parts[label] = total + weight * scores, scores.detach()
    for weight, part in rest.named_terms.values() if needs_reward_gradient else ():
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
    return total, parts, None if images is None else images.detach()


def direct_scores(part: LatentScore, latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the scores [B] of latents, in float32 under any autocast, `chunk_size` at a time, with their gradient."""

    def score(some: Tensor, rows: slice) -> Tensor:
        scores = part.score_latents(some.clone(), copied(prompts[rows]))
        if scores.shape != (len(some),):
            raise DraftuneError(
                f"score_latents of reward {part.label!r} must return shape ({len(some)},), not {tuple(scores.shape)}"
            )
        return scores

    with wrap_errors(part), torch.autocast(latents.device.type, enabled=False):
        return chunked_scores(score, latents.float(), part.chunk_size)


@torch.no_grad()
def check_autoencoder(part: LatentScore, latents: Tensor, decode: Decode) -> None:
    """Compare one latent with that of its decoded image, once for each reward.

    Raises:
        DraftuneError: if they differ, so that the model has another autoencoder than the reward.
    """
    if part.checked or fake_mode() is not None:
        return
    with wrap_errors(part), torch.autocast(latents.device.type, enabled=False):
        latent = latents[:1].detach().float()
        encoded = part.encode(decode(latents[:1].detach()).float())
    if encoded.shape != latent.shape or (encoded - latent).square().mean() > SAME * latent.square().mean():
        raise DraftuneError(
            f"the reward {part.label!r} reads the latents of another autoencoder than this model's: its own have "
            f"shape {tuple(encoded.shape[1:])}, this model's {tuple(latent.shape[1:])}"
        )
    part.checked = True
