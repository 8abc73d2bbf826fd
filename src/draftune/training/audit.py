"""Checks that training can work at all, and that it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.rewards import Reward


def probe_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> None:
    """Tries the reward, forward and backward, on pictures [B, 3, H, W] of the base model before anything is trained.

    Raises DraftuneError if it gives anything but B finite numbers with a finite, non-zero gradient to every picture.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        for _, part in reward.terms:
            score = part.score(images, prompts)
            if not isinstance(score, Tensor):
                raise DraftuneError(f"the reward {part.label!r} must return a tensor, not {type(score).__name__}")
            if score.shape != (len(images),):
                shape = tuple(score.shape)
                raise DraftuneError(
                    f"the reward {part.label!r} must return one number for each of {len(images)} pictures, shape "
                    f"({len(images)},), not {shape}"
                )
            if not score.isfinite().all():
                raise DraftuneError(f"the reward {part.label!r} gives {score.tolist()} on pictures of the base model")
            if not score.requires_grad:
                raise DraftuneError(
                    f"the reward {part.label!r} has no gradient: look for no_grad, detach, .item(), NumPy, PIL or "
                    "argmax on the way from the pictures to the score"
                )
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images, allow_unused=True)
    if gradient is None:
        raise DraftuneError(f"the reward {reward.label!r} does not depend on the pictures")
    if not gradient.isfinite().all():
        raise DraftuneError(f"the gradient of the reward {reward.label!r} is not finite on pictures of the base model")
    missing = [i for i, g in enumerate(gradient) if not g.any()]
    if missing:
        raise DraftuneError(f"the reward {reward.label!r} gives no gradient to the pictures {missing} of {len(images)}")


class GradientAudit:
    """Follows the first updates until every trainable tensor has had a gradient.

    A LoRA's A has none at the very first, since its B is zero there; after `updates` there is no excuse.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], updates: int = 3) -> None:
        self.waiting = dict(parameters)
        self.remaining = updates

    def check(self) -> None:
        """To be called after each backward pass. Raises DraftuneError that names the tensors left behind."""
        if not self.waiting:
            return
        self.waiting = {n: p for n, p in self.waiting.items() if p.grad is None or not p.grad.any()}
        self.remaining -= 1
        if self.waiting and self.remaining <= 0:
            names = ", ".join(list(self.waiting)[:3])
            raise DraftuneError(
                f"{len(self.waiting)} trainable tensors got no gradient in the first updates, such as {names}: they "
                "do not take part in the image, or the gradient is cut before them (see lora_targets)"
            )
