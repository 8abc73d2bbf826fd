"""ReNO: optimize the initial noise of one image on a reward (Eyring et al., 2024, arXiv:2406.04312)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import check_reward
from draftune.models import DiffusionModel
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.latent import score_latents
from draftune.rewards.online import extra_queries, require_trained
from draftune.sampling.sampler import rollout


@dataclass(frozen=True)
class NoiseSearch:
    """Result of `optimize_noise`, on the CPU."""

    first: Tensor
    """Image of the initial noise [1, 3, H, W] in [0, 1]."""
    best: Tensor
    """Image with the highest reward [1, 3, H, W] in [0, 1]."""
    noise: Tensor
    """Noise of the best image [1, C, H, W]."""
    rewards: list[float]
    """Rewards of the first image and of the image after each step."""
    queries: int
    """Number of scored images, with those that a zeroth-order reward scored for its gradient."""

    @property
    def best_step(self) -> int:
        """Number of steps before the best image; 0 if the first image is the best."""
        return self.rewards.index(max(self.rewards))


def log_likelihood(noise: Tensor) -> Tensor:
    """Compute the log-likelihood of the noise's norm under N(0, I), up to a constant.

        K(e) = (d - 1) log |e| - |e|^2 / 2

    d is the number of elements. |e| has the chi distribution with d degrees of freedom, whose mode is sqrt(d - 1).
    """
    norm = torch.linalg.vector_norm(noise)
    return (noise.numel() - 1) * norm.log() - norm.square() / 2


def optimize_noise(
    model: DiffusionModel,
    reward: str | Reward | Callable[..., Any],
    prompt: str,
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    steps: int = 50,
    learning_rate: float = 5.0,
    momentum: float = 0.9,
    max_grad_norm: float = 0.1,
    regularization: float = 0.01,
    progress: bool = False,
) -> NoiseSearch:
    """Maximize the reward of one image over its initial noise by gradient ascent, without training (ReNO).

        maximize over e:  r(sample(e, c), c) + regularization * K(e)

    The optimizer is SGD with Nesterov momentum and gradient clipping. The gradient flows through every sampling step
    to the noise; the weights get none. Eyring et al., 2024, arXiv:2406.04312.

    The defaults of the last five settings are those of the authors' code for one-step generators (ExplainableML/ReNO:
    arguments.py lines 23-24, 34-37 and 93, training/optim.py line 10). Here `steps` counts the updates, and `steps` + 1
    images are scored. Their `n_iters` counts the scored images: 50 images and 49 updates (training/trainer.py lines 64
    and 126).

    Args:
        model: The model, with or without a LoRA.
        reward: A differentiable reward.
        seed: Seed of the initial noise.
        num_inference_steps: Sampling steps. Default: the model's recommendation.
        guidance_scale: Scale of classifier-free guidance. Default: the model's recommendation.
        max_grad_norm: Maximum norm of the gradient; 0 disables clipping.

    Raises:
        DraftuneError: The reward has no gradient, or the reward or its gradient is not finite.
    """
    if model.autocast_dtype is torch.float16:
        raise DraftuneError("the gradient of the noise underflows in fp16: use bf16 or no for mixed_precision")
    defaults = model.recommended
    schedule = model.schedule(num_inference_steps or defaults["num_inference_steps"])
    guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    score = require_trained(load_reward(reward)).to(model.device)
    check_prompts(score, [prompt])
    denoise = model.denoiser_for([prompt], schedule, guidance, negative_prompt)
    generator = torch.Generator().manual_seed(seed)
    noise = model.noise(generator, 1).requires_grad_()
    # A stochastic sampler adds the same noise in every iteration.
    schedule = schedule.with_noise([model.noise(generator, 1) for _ in range(schedule.num_noises)])
    optimizer = torch.optim.SGD([noise], learning_rate, momentum, nesterov=momentum > 0, maximize=True)

    rewards: list[float] = []
    bar = tqdm(range(steps + 1), desc="noise", unit="image", disable=not progress)
    for step in bar:
        # The last image needs no gradient.
        with torch.set_grad_enabled(step < steps):
            clean = rollout(denoise, schedule.steps, schedule.initial_scale * noise)
            if step == 0:
                check_reward(score, model.decode(clean.detach()), [prompt])
                before = extra_queries(score)
            scores, _, decoded = score_latents(score, clean, model.decode, [prompt])
            image = model.decode(clean.detach()) if decoded is None else decoded
            value = scores.sum()
        rewards.append(float(value.detach()))
        bar.set_postfix(reward=f"{rewards[-1]:.3f}")
        if not math.isfinite(rewards[-1]):
            raise DraftuneError(f"the reward became {rewards[-1]} at step {step} of {steps}")
        if step == 0:
            first = image.cpu().float()
        if rewards[-1] > max(rewards[:-1], default=-math.inf):
            best, best_noise = image.cpu().float(), noise.detach().cpu().clone()
        if step < steps:
            # With respect to the noise only: a trainable LoRA must not accumulate gradients.
            (noise.grad,) = torch.autograd.grad(value + regularization * log_likelihood(noise), noise)
            norm = float(torch.nn.utils.clip_grad_norm_([noise], max_grad_norm or math.inf))
            if not math.isfinite(norm):
                raise DraftuneError(f"the gradient's norm became {norm} at step {step} of {steps}")
            optimizer.step()
    return NoiseSearch(first, best, best_noise, rewards, len(rewards) + extra_queries(score) - before)
