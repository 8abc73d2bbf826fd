"""Checks that training can work at all, and that it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.rewards import Reward
from draftune.rewards.base import checked_score


def probe_reward(reward: Reward, images: Tensor, prompts: Sequence[str], gradient: bool = True) -> None:
    """Tries the reward on pictures [B, 3, H, W] of the base model before anything is trained.

    Raises DraftuneError if any of its parts gives anything but B finite numbers and, where a `gradient` is wanted, a
    finite gradient that is not zero to every picture; the message names the pictures that got none.
    """
    for _, part in reward.terms:
        probe_part(part, images.detach().float(), prompts, gradient)


def probe_part(part: Reward, images: Tensor, prompts: Sequence[str], gradient: bool) -> None:
    name = f"the reward {part.label!r}"
    with torch.set_grad_enabled(gradient):
        score = checked_score(part, images.requires_grad_(gradient), prompts)
    if not score.isfinite().all():
        raise DraftuneError(f"{name} gives {score.tolist()} on pictures of the base model")
    if gradient:
        probe_gradient(name, score, images, prompts)


def probe_gradient(name: str, score: Tensor, images: Tensor, prompts: Sequence[str]) -> None:
    count = len(images)
    if not score.is_floating_point():
        raise DraftuneError(
            f"{name} must return numbers with a fraction, not {score.dtype}: look for argmax or rounding"
        )
    if not score.requires_grad:
        raise DraftuneError(
            f"{name} has no gradient for any of the {count} pictures: look for no_grad, detach, .item(), NumPy, PIL or "
            "argmax on the way from the pictures to the score"
        )
    (gradient,) = torch.autograd.grad(score.sum(), images, allow_unused=True)
    if gradient is None:
        raise DraftuneError(f"{name} does not depend on the pictures: none of the {count} got a gradient")
    for problem, wrong in (("a gradient that is not finite", ~gradient.isfinite()), ("no gradient", gradient == 0)):
        bad = [i for i, w in enumerate(wrong) if (w.all() if problem == "no gradient" else w.any())]
        if bad:
            which = ", ".join(f"{i + 1} ({prompts[i]})" for i in bad)
            hint = "; look for rounding, thresholds and clamps" if problem == "no gradient" else ""
            raise DraftuneError(f"{name} gives {problem} to {len(bad)} of {count} pictures: picture {which}{hint}")


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
