"""The robust wrapper: the reward of the locally worst picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards.base import Reward, register


class Robust(Reward):
    """r(x - rho * g / ||g||), where g is the gradient of r by the picture x and ||.|| the norm over all its pixels.

    The way to the worse picture is held fixed: the gradient is that of r there. Source: RSA-FT (reward
    sharpness-aware fine-tuning, Kim and Sim, arXiv 2603.21175), whose rho is 1e-2. No code of its authors was found, so
    that the space of their rho is not known; here it is that of pixels in [0, 1].
    """

    def __init__(self, reward: Reward, rho: float = 0.01) -> None:
        super().__init__()
        if not rho > 0:
            raise DraftuneError(f"rho of reward robust must be above 0, not {rho}")
        if past := [part.label for _, part in reward.terms if part.past_decoder]:
            raise DraftuneError(f"robust wants a gradient by pictures, and {past[0]!r} has one by latents: space=image")
        self.reward, self.rho = reward, rho
        self.label = f"robust({reward.label})"

    def load(self) -> None:
        self.reward.ready()

    def check(self, prompts: Sequence[str]) -> None:
        self.reward.check(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.parts(images, prompts)[0]

    def parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and the parts of the wrapped reward, at the worse picture."""
        with torch.enable_grad():
            here = images.detach().requires_grad_()
            (uphill,) = torch.autograd.grad(self.reward(here, prompts).sum(), here)
        length = uphill.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        total, parts = self.reward.parts(images - self.rho * uphill / length, prompts)
        return total, {f"robust-{label}": score for label, score in parts.items()}


@register("robust")
def robust(reward: Reward, rho: float = 0.01) -> Reward:
    """Any reward at the locally worst picture, as in `robust(clip + 0.1*aesthetic, rho=0.02)`.

    r(x - rho * grad r / |grad r|). `rho`: how far away, as the norm of the change over all the picture's values in
    [0, 1]. Twice the cost of the wrapped reward; its range and weights. Against over-optimisation by peaks that are
    sharp. Source: RSA-FT, whose 0.01 is the default; for pictures of 512 pixels that is less than what rounding to 8
    bits changes, and 0.1 or more does more.
    """
    return Robust(reward, rho)
