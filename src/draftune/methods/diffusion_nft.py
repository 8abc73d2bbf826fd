"""DiffusionNFT: policy improvement on the forward process, which needs clean images and their rewards only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import check_min
from draftune.methods.groups import check_advantages, gathered, group_advantages, own_parts, why_no_advantage
from draftune.methods.lora_copy import LoRACopy
from draftune.methods.policy_gradient import check_fraction, random_share


@register("diffusion_nft")
@dataclass
class DiffusionNFT(Method):
    """DiffusionNFT: move the prediction towards images above their group's average and away from those below it.

        A = clip((r - mean of the group) / (std + 1e-4), -adv_clip_max, adv_clip_max),   R = 1/2 + A / (2 adv_clip_max)
        x_+ = (1 - beta) x_old + beta x_theta,   x_- = (1 + beta) x_old - beta x_theta
        loss = adv_clip_max / beta * mean of  R d(x_+) + (1 - R) d(x_-),   d(x) = |x - x_0|^2 / mean_i |x_i - x_0,i|
               + kl_weight * mean((F_theta - F_base)^2)

    Zheng et al., 2025, arXiv:2509.16117. x_0 is a sampled image; x_theta and x_old predict it from a noised copy x_t.
    Squares and divisor of d are means over elements; the divisor has no gradient and is at least 1e-5. F is the
    network's output. The formula is that of the authors' code (NVlabs/DiffusionNFT, train_nft_sd3.py lines 862-970).
    It is linear in the velocity; in x_0 as here it holds for every prediction type.

    Images are sampled with an old LoRA, by any sampler and without guidance in the authors' runs. After each update
    old <- e old + (1 - e) theta, with e = min(decay_rate (n - decay_start), decay_max) after n optimizer steps and 0
    before. A group is the `num_images_per_prompt` images of a prompt. T denoiser calls without gradient; then for each
    trained step and inner epoch one with gradient, one of the old LoRA and with `kl_weight` one of the base model. The
    reward needs no gradient.

    Attributes:
        beta: Strength of the implicit policies, above 0. Default: 1. The authors' 0.1 for OCR and mixed rewards.
        kl_weight: Weight of the difference from the base model, 0 or more. Default: 1e-4.
        inner_epochs: Optimizer steps on the same images, 1 or more. Default: 1.
        timestep_fraction: Fraction of the sampling steps in the loss, sampled for each image batch and epoch, above 0
            and at most 1. Default: 1.
        spread: Images whose standard deviation divides the advantage: `update` for all, `group`. Default: `update`.
        adv_clip_max: Bound of the advantage's magnitude, above 0. Default: 5.
        decay_start: Optimizer steps for which the old LoRA is the trained one, 0 or more. Default: 0.
        decay_rate: Growth of the decay e with each optimizer step, 0 or more. Default: 0.001.
        decay_max: Largest decay, from 0 to below 1. Default: 0.5. The authors' values for OCR are 75, 0.0075, 0.999.
    """

    starts_without_grad = True
    needs_reward_gradient = False
    state_is_of_lora = True
    min_images_per_update = 2
    min_images_per_prompt = 2

    beta: float = 1.0
    kl_weight: float = 1e-4
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    spread: str = "update"
    adv_clip_max: float = 5.0
    decay_start: int = 0
    decay_rate: float = 0.001
    decay_max: float = 0.5
    old: LoRACopy = field(default_factory=LoRACopy, init=False, repr=False, compare=False)
    optimizer_steps: int = field(default=0, init=False, repr=False, compare=False)
    no_advantage: str = field(default="", init=False, repr=False, compare=False)
    """Explanation if all advantages of the update are 0, else empty."""

    def __post_init__(self) -> None:
        check_min("inner_epochs", self.inner_epochs, 1)
        check_min("decay_start", self.decay_start, 0)
        check_fraction(self.timestep_fraction)
        check_advantages(self.spread, self.adv_clip_max, "diffusion_nft")
        if not 0 < self.beta < math.inf:
            raise DraftuneError(f"beta must be above 0 and finite, got {self.beta}")
        for name in ("kl_weight", "decay_rate"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise DraftuneError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 <= self.decay_max < 1:
            raise DraftuneError(f"decay_max must be from 0 to below 1, got {self.decay_max}")

    def backprops_multiple_calls(self) -> bool:
        return False

    @property
    def decay(self) -> float:
        """Return the decay e of the old LoRA after the optimizer steps so far."""
        return min(self.decay_rate * max(0, self.optimizer_steps - self.decay_start), self.decay_max)

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        known, images, rewards = [], [], []
        for batch in batches:
            self.old.start(batch.parameters)
            with self.old.in_use(batch.parameters):
                images.append(batch.no_grad_latents(len(batch.schedule)))
                rewards.append(batch.reward(images[-1]))
            known.append(batch)
        scores = gathered(known, rewards)
        advantages = group_advantages(scores, known[0].images_per_prompt, self.spread, self.adv_clip_max)
        self.no_advantage = why_no_advantage(scores) if not advantages.any() else ""
        shares = own_parts(known, advantages / (2 * self.adv_clip_max) + 0.5)
        for _ in range(self.inner_epochs):
            yield (
                loss
                for batch, clean, share in zip(known, images, shares, strict=True)
                for loss in self.batch_losses(batch, clean, share)
            )
            self.optimizer_steps += 1
        self.old.move(known[0].parameters, self.decay)

    def batch_losses(self, batch: Batch, clean: Tensor, share: Tensor) -> Iterator[Tensor]:
        """Yield the loss of each trained step, divided by the number of trained steps.

        Args:
            batch: The batch.
            clean: Its sampled images x_0 [B, C, H, W].
            share: The weights R [B] of the positive policy.
        """
        steps = self.trained_steps(batch.schedule)
        chosen = random_share(len(steps), self.timestep_fraction, batch.generator)
        for i in chosen:
            step = batch.schedule.steps[steps[i]]
            x = step.alpha * clean + step.sigma * batch.randn_like(clean)
            with self.old.in_use(batch.parameters):
                old = batch.denoise(x, step).clean
            prediction = batch.denoise(x, step)
            positive = (1 - self.beta) * old + self.beta * prediction.clean
            negative = (1 + self.beta) * old - self.beta * prediction.clean
            losses = share * normalized_error(positive, clean) + (1 - share) * normalized_error(negative, clean)
            loss = losses.mean() * self.adv_clip_max / self.beta
            if self.kl_weight:
                with torch.no_grad():
                    base = batch.base_denoise(x, step)
                error = batch.schedule.output_difference(prediction, base, step)
                loss = loss + self.kl_weight * error.square().mean()
            yield loss / len(chosen)

    def explain_zero_gradient(self) -> str:
        return self.no_advantage

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer_steps": self.optimizer_steps, **self.old.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer_steps = state["optimizer_steps"]
        self.old.load_state_dict(state)


def normalized_error(prediction: Tensor, clean: Tensor) -> Tensor:
    """Compute mean((x - x_0)^2) / mean(|x - x_0|) [B] over the elements of each image; the divisor has no gradient."""
    error = (prediction - clean).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)
