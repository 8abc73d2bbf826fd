"""ReNO: one picture made better by its initial noise; nothing is trained (Eyring et al., arXiv 2406.04312)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.models import Model
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.latent import parts_of
from draftune.rewards.online import extra_queries, taught
from draftune.sampling.sampler import rollout
from draftune.training.checks import probe_reward


@dataclass(frozen=True)
class NoiseSearch:
    """What `optimize_noise` found: pictures [1, 3, H, W] in [0, 1] and the noise [1, C, H, W], on the CPU."""

    first: Tensor
    """The picture that the seed gives as it is."""
    best: Tensor
    """The picture of the highest reward on the way, the first and the last among them."""
    noise: Tensor
    """What the best picture is drawn from."""
    rewards: list[float]
    """Of the first picture and of the one after each step."""
    queries: int
    """Scored pictures: these, and what the reward asked about beyond them."""

    @property
    def best_step(self) -> int:
        """The steps that led to the best picture; 0 where none did better than the first."""
        return self.rewards.index(max(self.rewards))


def log_likelihood(noise: Tensor) -> Tensor:
    """Of the noise's norm under N(0, I), up to a constant: K(e) = (d - 1) log |e| - |e|^2 / 2, e with d numbers.

    |e| has the chi distribution with d degrees of freedom, whose mode is sqrt(d - 1).
    """
    norm = torch.linalg.vector_norm(noise)
    return (noise.numel() - 1) * norm.log() - norm.square() / 2


def optimize_noise(
    model: Model,
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
    """Climbs r(sample(e, c), c) + regularization * K(e) by the noise e alone, from that of the seed.

    Nesterov's SGD on a gradient clipped to `max_grad_norm` (0 clips nothing); the gradient flows through every
    sampling step and the weights get none. Sampling steps and guidance default to what is recommended for the model.
    Raises DraftuneError for a reward without a gradient, and where reward or gradient stop being finite.

    ReNO (Eyring et al., arXiv 2406.04312). The defaults of `steps`, `learning_rate`, `momentum`, `max_grad_norm` and
    `regularization` are those of the authors' code for one-step generators (ExplainableML/ReNO: arguments.py lines
    23-24, 34-37 and 93, training/optim.py line 10). Here the noise is moved `steps` times and `steps` + 1 images are
    scored. Their `n_iters` counts the scored images: 50 images and 49 moves (training/trainer.py lines 64 and 126).
    """
    if model.autocast_dtype is torch.float16:
        raise DraftuneError("the gradient by the noise vanishes in fp16: use bf16 or no")
    defaults = model.recommended
    schedule = model.schedule(num_inference_steps or defaults["num_inference_steps"])
    guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    score = taught(load_reward(reward)).to(model.device)
    check_prompts(score, [prompt])
    denoise = model.denoise([prompt], schedule, guidance, negative_prompt)
    noise = model.noise(torch.Generator().manual_seed(seed), 1).requires_grad_()
    optimizer = torch.optim.SGD([noise], learning_rate, momentum, nesterov=momentum > 0, maximize=True)

    rewards: list[float] = []
    bar = tqdm(range(steps + 1), desc="noise", unit="picture", disable=not progress)
    for step in bar:
        # Nothing is asked of the last picture but its reward.
        with torch.set_grad_enabled(step < steps):
            clean = rollout(denoise, schedule.steps, noise)
            if step == 0:
                probe_reward(score, model.decode(clean.detach()), [prompt])
                before = extra_queries(score)
            scores, _, picture = parts_of(score, clean, model.decode, [prompt])
            value = scores.sum()
        rewards.append(float(value.detach()))
        bar.set_postfix(reward=f"{rewards[-1]:.3f}")
        if not math.isfinite(rewards[-1]):
            raise DraftuneError(f"the reward became {rewards[-1]} at step {step} of the noise's {steps}")
        if step == 0:
            first = picture.cpu().float()
        if rewards[-1] > max(rewards[:-1], default=-math.inf):
            best, found = picture.cpu().float(), noise.detach().cpu().clone()
        if step < steps:
            # By the noise alone: a LoRA that is still trainable must not gather gradients.
            (noise.grad,) = torch.autograd.grad(value + regularization * log_likelihood(noise), noise)
            norm = float(torch.nn.utils.clip_grad_norm_([noise], max_grad_norm or math.inf))
            if not math.isfinite(norm):
                raise DraftuneError(f"the gradient's norm became {norm} at step {step} of the noise's {steps}")
            optimizer.step()
    return NoiseSearch(first, best, found, rewards, len(rewards) + extra_queries(score) - before)
