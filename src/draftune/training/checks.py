"""Checks that training can work at all, and that it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.prompts import copied, metadata
from draftune.rewards import Reward
from draftune.rewards.base import checked_score, explained, inside
from draftune.rewards.latent import has_latent_gradient
from draftune.utils.processes import tell

if TYPE_CHECKING:
    from draftune.models import Model

FEW_PIXELS = 0.5
"""The share of pixels without a gradient from which on a reward is said to see little of the pictures."""


def probe_reward(
    reward: Reward, images: Tensor, prompts: Sequence[str], gradient: bool = True
) -> dict[str, dict[str, float]]:
    """Tries the reward on pictures [B, 3, H, W] of the base model before anything is trained.

    What it found of each part, by label: the mean score and, where a gradient is wanted, the mean norm of a picture's
    gradient and the share of pixels that get none, from clamping, hinges or masks.

    Raises DraftuneError if any of its parts gives anything but B finite numbers and, where a `gradient` is wanted, a
    finite gradient that is not zero to every picture; the message names the pictures that got none.
    """
    found = {}
    for _, part in reward.terms:
        # One that is past the decoder has none by pictures; that something is learned from it is the audit's to see.
        wanted = gradient and not has_latent_gradient(part)
        found[part.label] = said = probe_part(part, images.detach().float(), prompts, wanted)
        if (blind := said.get("pixels_without_gradient", 0.0)) > FEW_PIXELS:
            tell(
                f"the reward {part.label!r} gives no gradient to {blind:.0%} of the pixels of the base model's pictures"
            )
    return found


def tell_truncated(
    prompts: Sequence[str], model: Model | None, rewards: Sequence[Reward | None] = (), negative_prompt: str = ""
) -> None:
    """Say once, for each text encoder of the model and of the rewards, how many of the prompts it cuts off."""
    different = list({(str(prompt), *sorted(metadata(prompt).items())): prompt for prompt in prompts}.values())
    found = list(model.truncated(different)) if model is not None else []
    for reward in filter(None, rewards):
        for part in inside(reward).values():
            with explained(part):
                found += part.truncated(copied(different))
    lines = [(f"{t.cut} of {len(different)} prompts are longer", t) for t in found if t.cut]
    if model is not None and negative_prompt:
        lines += [("the negative prompt is longer", t) for t in model.truncated([negative_prompt]) if t.cut]
    for line in dict.fromkeys(f"{what} than the {t.limit} tokens that {t.reader} reads" for what, t in lines):
        tell(f"{line}: the rest is cut off")


def probe_part(part: Reward, images: Tensor, prompts: Sequence[str], gradient: bool) -> dict[str, float]:
    name = f"the reward {part.label!r}"
    with torch.set_grad_enabled(gradient):
        score = checked_score(part, images.requires_grad_(gradient), prompts)
    if not score.isfinite().all():
        raise DraftuneError(f"{name} gives {score.tolist()} on pictures of the base model")
    found = {"score": float(score.detach().float().mean())}
    if gradient:
        with explained(part):
            slope = probe_gradient(name, score, images, prompts)
        found["gradient_norm"] = float(slope.flatten(1).norm(dim=1).mean())
        found["pixels_without_gradient"] = float((slope == 0).all(1).float().mean())
    return found


def probe_gradient(name: str, score: Tensor, images: Tensor, prompts: Sequence[str]) -> Tensor:
    count = len(images)
    if not score.is_floating_point():
        raise DraftuneError(
            f"{name} must return numbers with a fraction, not {score.dtype}: look for argmax or rounding"
        )
    if not score.requires_grad:
        raise DraftuneError(
            f"{name} has no gradient for any of the {count} pictures: look for no_grad, detach, .item(), NumPy, PIL or "
            "argmax on the way from the pictures to the score, or estimate one: zeroth_order(…)"
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
    return gradient


AUDITED = 3
"""Updates after which there is no excuse: a LoRA's A has no gradient at the very first, since its B is zero there."""


class GradientAudit:
    """Follows the first updates until every trainable tensor has had a gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], updates: int = AUDITED) -> None:
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
