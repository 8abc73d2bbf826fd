"""Sharpness-aware rewards: the score of the worst image nearby."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards.base import Reward, register
from draftune.rewards.latent import has_latent_gradient


@register("sharpness_aware")
class SharpnessAware(Reward):
    """Any reward r at the worst image nearby, r(x - rho * g / ||g||) with g = grad r(x): a guard against sharp maxima.

    Example: `sharpness_aware(clip + 0.1*aesthetic, rho=0.02)`. `rho`: the L2 norm of the change over all values of an
    image in [0, 1]. The perturbation is a constant in the backward pass. Cost: twice that of the wrapped reward. For
    images of 512 pixels, 0.01 is less than what rounding to 8 bits changes, and 0.1 or more has more effect.
    Over-optimized: as the wrapped reward, except at maxima narrower than rho.
    Source: RSA-FT (Kim and Sim, arXiv:2603.21175), whose rho of 0.01 is the default. Their code was not available, so
    the space of their rho is not known; here it is pixel space.
    """

    def __init__(self, reward: Reward, rho: float = 0.01) -> None:
        super().__init__()
        if not 0 < rho < math.inf:
            raise DraftuneError(f"rho of reward sharpness_aware must be above 0, not {rho}")
        if names := [part.label for _, part in reward.terms if has_latent_gradient(part)]:
            raise DraftuneError(
                f"sharpness_aware needs a gradient with respect to images, and {names[0]!r} has one with respect to "
                "latents: set space=image"
            )
        self.reward, self.rho = reward, rho
        self.label = f"sharpness_aware({reward.label})"

    def load(self) -> None:
        self.reward.load_weights()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.components(images, prompts)[0]

    def components(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and the parts of the wrapped reward at the perturbed images."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.reward(leaf, prompts).sum(), leaf)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        total, parts = self.reward.components(images - self.rho * gradient / norm, prompts)
        return total, {f"sharpness_aware_{label}": score for label, score in parts.items()}
