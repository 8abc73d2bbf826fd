"""Checks of a reward and of prompts before they are used: scores, gradients, truncated prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import copied, metadata
from draftune.rewards import Reward
from draftune.rewards.base import checked_score, sub_rewards, wrap_errors
from draftune.rewards.latent import has_latent_gradient
from draftune.utils.logging import logger

if TYPE_CHECKING:
    from draftune.models import DiffusionModel

FEW_PIXELS = 0.5
"""Share of pixels without gradient from which on a warning is logged."""


def check_reward(
    reward: Reward, images: Tensor, prompts: Sequence[str], gradient: bool = True
) -> dict[str, dict[str, float]]:
    """Compute each term of a reward, and its gradient, on images of the base model before anything is trained.

    Args:
        reward: The reward.
        images: Images [B, 3, H, W] in [0, 1].
        prompts: Their prompts.
        gradient: Whether the training method uses the reward's gradient.

    Returns:
        By name of each term (`Reward.named_terms`): the mean score and, with `gradient`, the mean norm of an image's
        gradient and the share of pixels without gradient, as clamps, hinges and masks cause.

    Raises:
        DraftuneError: a term does not return B finite numbers or, with `gradient`, a finite gradient that is not 0 for
            every image; the message names the images without one.
    """
    report = {}
    for name, (_, part) in reward.named_terms.items():
        # A latent reward has no gradient with respect to the image; GradientCheck checks that the LoRA gets one.
        report[name] = row = probe_part(
            name, part, images.detach().float(), prompts, gradient and not has_latent_gradient(part)
        )
        if (blind := row.get("pixels_without_gradient", 0.0)) > FEW_PIXELS:
            logger.warning(
                f"the reward {name!r} gives no gradient to {blind:.0%} of the pixels of the base model's images"
            )
    return report


def tell_truncated(
    prompts: Sequence[str],
    model: DiffusionModel | None,
    rewards: Sequence[Reward | None] = (),
    negative_prompt: str = "",
) -> None:
    """Warn about prompts that a text encoder of the model or of a reward truncates, once for each encoder."""
    different = list({(str(prompt), *sorted(metadata(prompt).items())): prompt for prompt in prompts}.values())
    truncations = list(model.truncated(different)) if model is not None else []
    for reward in filter(None, rewards):
        for part in sub_rewards(reward).values():
            with wrap_errors(part):
                truncations += part.truncated(copied(different))
    lines = [(f"{t.cut} of {len(different)} prompts are longer", t) for t in truncations if t.cut]
    if model is not None and negative_prompt:
        lines += [("the negative prompt is longer", t) for t in model.truncated([negative_prompt]) if t.cut]
    for line in dict.fromkeys(f"{what} than the {t.limit} tokens that {t.reader} reads" for what, t in lines):
        logger.warning(f"{line}: the rest is cut off")


def probe_part(name: str, part: Reward, images: Tensor, prompts: Sequence[str], gradient: bool) -> dict[str, float]:
    """Return the row of `check_reward` for one term."""
    name = f"the reward {name!r}"
    with torch.set_grad_enabled(gradient):
        score = checked_score(part, images.requires_grad_(gradient), prompts)
    if not score.isfinite().all():
        raise DraftuneError(f"{name} gives {score.tolist()} on images of the base model")
    row = {"score": float(score.detach().float().mean())}
    if gradient:
        with wrap_errors(part):
            slope = probe_gradient(name, score, images, prompts)
        row["gradient_norm"] = float(slope.flatten(1).norm(dim=1).mean())
        row["pixels_without_gradient"] = float((slope == 0).all(1).float().mean())
    return row


def probe_gradient(name: str, score: Tensor, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the gradient of the scores [B] with respect to the images, [B, 3, H, W].

    Raises:
        DraftuneError: there is none, or that of an image is 0 or not finite.
    """
    count = len(images)
    if not score.is_floating_point():
        raise DraftuneError(
            f"{name} must return floating-point numbers, not {score.dtype}: look for argmax or rounding"
        )
    if not score.requires_grad:
        raise DraftuneError(
            f"{name} has no gradient for any of the {count} images: look for no_grad, detach, .item(), NumPy, PIL or "
            "argmax between the images and the score, or estimate a gradient: zeroth_order(…)"
        )
    (gradient,) = torch.autograd.grad(score.sum(), images, allow_unused=True)
    if gradient is None:
        raise DraftuneError(f"{name} does not depend on the images: none of the {count} got a gradient")
    infinite = [i for i, wrong in enumerate(~gradient.isfinite()) if wrong.any()]
    zero = [i for i, wrong in enumerate(gradient == 0) if wrong.all()]
    hint = "; look for rounding, thresholds and clamps"
    for problem, bad, advice in (("a gradient that is not finite", infinite, ""), ("no gradient", zero, hint)):
        if bad:
            which = ", ".join(f"{i + 1} ({prompts[i]})" for i in bad)
            raise DraftuneError(f"{name} gives {problem} to {len(bad)} of {count} images: image {which}{advice}")
    return gradient
