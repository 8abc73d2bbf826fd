"""Flow-GRPO and MixGRPO: the clipped policy gradient with groups of images and a sampler made stochastic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.methods.base import Batch, register
from draftune.methods.draft import check_min
from draftune.methods.groups import check_advantages, group_advantages
from draftune.methods.policy_gradient import PolicyGradient
from draftune.sampling.ancestral import mean as ancestral_mean
from draftune.sampling.schedule import Prediction, Schedule, Step

ORDERS = ("progressive", "random")
"""Orders of the positions of the window of steps."""


def sde_std(step: Step, noise_level: float, prediction_type: str) -> float:
    """Return the standard deviation tau of the noise that the policy adds in a step.

    For flow models tau = a * sqrt(sigma_t / (1 - sigma_t)) * sqrt(sigma_t - sigma_s), with the noise level a, the
    diffusion coefficient of Flow-GRPO (Liu et al., 2025, arXiv:2505.05470, Eq. 9); where sigma_t = 1, the denominator
    is that of sigma_s. For other models tau = a * `Step.ancestral_std`, DDIM with eta = a. A step that ends at the
    clean latent gets no noise.
    """
    if step.sigma_next == 0:
        return 0.0
    if prediction_type != "flow":
        return noise_level * step.ancestral_std
    return noise_level * math.sqrt(step.sigma / (step.alpha or step.alpha_next) * (step.sigma - step.sigma_next))


def sde_mean(prediction: Prediction, step: Step) -> Tensor:
    """Return the mean of an Euler-Maruyama step of the SDE with the flow's marginals, `[B, C, H, W]`.

    mean = alpha_s * x_0 + (sigma_s - tau^2 / (2 sigma_t)) * noise

    This is Flow-GRPO's x_t + (v + s^2 / (2 sigma_t) * (x_t + (1 - sigma_t) v)) (sigma_s - sigma_t), with the velocity
    v = noise - x_0 and tau^2 = s^2 (sigma_t - sigma_s), since x_t + (1 - sigma_t) v is the noise.
    """
    tau = step.ancestral_std
    return step.alpha_next * prediction.clean + (step.sigma_next - tau**2 / (2 * step.sigma)) * prediction.noise


@register("flow_grpo")
@dataclass
class FlowGRPO(PolicyGradient):
    """Flow-GRPO: policy gradient that compares the images of a group, sampled by an SDE with the flow's marginals.

        A = clip((r - mean of the group) / (std + 1e-4), -adv_clip_max, adv_clip_max)
        loss = mean over batch and trained steps of  -min(A w, A clip(w, 1 +- clip_range)) + beta KL(p || p_base)

    Liu et al., 2025, arXiv:2505.05470. w is the importance ratio of `ddpo`, and KL the divergence of the step's two
    Gaussians as a mean over elements. A group is the `num_images_per_prompt` images of a prompt. For flow models the
    steps and their noise are those of the authors' code (yifan123/flow_grpo, sd3_sde_with_logprob.py). For others they
    are DDIM with eta = noise_level. The step that ends at the clean latent has no noise and is not trained; the
    authors' sampler adds noise there too. A sampler that is stochastic itself keeps its own noise.

    T denoiser calls without gradient, then one with gradient for each trained step and inner epoch, and with `beta`
    one of the base model. The reward needs no gradient. With `window`, only a window of neighboring steps is random and
    trained, and the others are the deterministic sampler's, as in `mix_grpo`.

    Attributes:
        inner_epochs: Optimizer steps on the same images, 1 or more. Default: 1.
        clip_range: Clipping range of the importance ratio w, above 0. Default: 1e-4.
        timestep_fraction: Fraction of the random steps in the loss, sampled for each image batch and epoch, above 0
            and at most 1. Default: 1.
        beta: Weight of the KL divergence, 0 or more. Default: 0.004. The authors' 0.04 weighs the divergence times the
            step's size, which is 0.1 on average at their 10 steps.
        noise_level: Noise level a, above 0; at most 1 for models that are no flows. Default: 0.7.
        spread: Images whose standard deviation divides the advantage: `update` for all, `group`. Default: `update`.
        adv_clip_max: Bound of the advantage's magnitude, above 0. Default: 5.
        window: Number of neighboring steps that are random and trained, 1 or more. Default: all steps.
        window_updates: Updates for which the window stays, 1 or more. Default: 25.
        window_stride: Steps by which it moves, 1 or more. Default: 1.
        window_order: `progressive` moves it from the noise to the image and then starts again; `random` samples a
            position for each batch. Default: `progressive`.
    """

    min_images_per_prompt = 2

    beta: float = 0.004
    noise_level: float = 0.7
    spread: str = "update"
    adv_clip_max: float = 5.0
    window: int | None = None
    window_updates: int = 25
    window_stride: int = 1
    window_order: str = "progressive"
    updates: int = field(default=0, init=False, repr=False, compare=False)
    """Updates so far."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_advantages(self.spread, self.adv_clip_max, "flow_grpo")
        if self.window is not None:
            check_min("window", self.window, 1)
        check_min("window_updates", self.window_updates, 1)
        check_min("window_stride", self.window_stride, 1)
        if self.window_order not in ORDERS:
            raise unknown("window_order", str(self.window_order), ORDERS)
        if not 0 < self.noise_level < math.inf:
            raise DraftuneError(f"noise_level must be above 0 and finite, got {self.noise_level}")

    def check(self, schedule: Schedule) -> None:
        if schedule.prediction_type != "flow" and not self.noise_level <= 1:
            raise DraftuneError(
                f"noise_level must be at most 1 for a model that is no flow, where it is DDIM's eta, got "
                f"{self.noise_level}"
            )
        super().check(schedule)
        if (trainable := len(self.trained_steps(schedule))) < (self.window or 0):
            raise DraftuneError(
                f"window must be at most {trainable}, the steps that can be trained, got {self.window}: lower it, or "
                "raise num_inference_steps"
            )

    def policy(self, schedule: Schedule, trained: Sequence[int] | None = None) -> Schedule:
        if schedule.num_noises:
            return schedule
        kind, random = schedule.prediction_type, None if self.window is None else trained
        steps = (
            step._replace(noise_std=sde_std(step, self.noise_level, kind) if random is None or i in random else 0.0)
            for i, step in enumerate(schedule.steps)
        )
        return replace(schedule, steps=tuple(steps))

    def mean(self, prediction: Prediction, step: Step, schedule: Schedule) -> Tensor:
        if schedule.prediction_type == "flow" and not schedule.num_noises:
            return sde_mean(prediction, step)
        return ancestral_mean(prediction, step)

    def trained_now(self, batch: Batch) -> Sequence[int]:
        steps = self.trained_steps(batch.schedule)
        if self.window is None:
            return steps
        positions = len(steps) - self.window + 1
        start = self.updates // self.window_updates * self.window_stride % positions
        if self.window_order == "random":
            start = int(torch.randint(positions, (1,), generator=batch.generator))
        return steps[start : start + self.window]

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        yield from super().losses_per_step(batches)
        self.updates += 1

    def update_advantages(self, batches: Sequence[Batch], rewards: Tensor) -> Tensor:
        return group_advantages(rewards, batches[0].images_per_prompt, self.spread, self.adv_clip_max)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


@register("mix_grpo")
@dataclass
class MixGRPO(FlowGRPO):
    """MixGRPO: Flow-GRPO in a window of 4 steps that moves along the trajectory, `flow_grpo` with `window`.

    Li et al., 2025, arXiv:2507.21802. The steps outside of the window are those of the deterministic sampler, so that
    an image's advantage is due to the window's steps. Its calls with gradient are a fraction window / T of those of
    `flow_grpo`. The defaults are those of the authors' code (Tencent-Hunyuan/MixGRPO,
    finetune_flux_grpo_MixGRPO.sh and grpo_states.py): 25 updates at each position, a stride of 1, noise level 0.7, no
    KL divergence, the standard deviation of the group.

    The authors' window shrinks at the end of the trajectory and is empty for 25 updates before it starts again; here it
    is always full. Their images of a group share the initial noise, here each image has its own.

    Attributes:
        beta: Weight of the KL divergence, 0 or more. Default: 0.
        spread: Images whose standard deviation divides the advantage: `update` or `group`. Default: `group`.
        window: Number of neighboring steps that are random and trained, 1 or more. Default: 4. Other attributes as in
            `flow_grpo`.
    """

    beta: float = 0.0
    spread: str = "group"
    window: int | None = 4
