"""Sampling guided by the gradient of a reward, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.guidance.methods import load_guide
from draftune.models import DiffusionModel
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import check_prompts
from draftune.rewards.chunked import chunked_scores
from draftune.rewards.latent import score_latents
from draftune.rewards.online import extra_queries, require_trained


@dataclass(frozen=True)
class GuidedSamples:
    """Result of `sample_guided` for B prompts."""

    images: Tensor
    """Images [B, 3, H, W] in [0, 1], on the CPU."""
    rewards: Tensor
    """Rewards [R, B] of each of the R samplings; the last row is that of `images`.

    The first row of `gradient_guidance` is without guidance.
    """
    queries: int
    """Number of scored images, with or without gradient."""


class RewardGradientFn:
    """Gradient of a reward with respect to clean latents, through the decoder. Counts the reward queries."""

    def __init__(self, model: DiffusionModel, reward: Reward, prompts: Sequence[str]) -> None:
        self.model, self.reward, self.prompts, self.queries = model, reward, prompts, 0

    def score(self, latents: Tensor) -> Tensor:
        """Compute the rewards [B] of clean latents. Raise DraftuneError if one is not finite."""

        def scored(chunk: Tensor, part: slice) -> Tensor:
            return score_latents(self.reward, chunk, self.model.decode, self.prompts[part])[0]

        before = extra_queries(self.reward)
        rewards = chunked_scores(scored, latents, self.reward.chunk_size)
        self.queries += len(latents) + extra_queries(self.reward) - before
        if not rewards.isfinite().all():
            raise DraftuneError(f"the reward became {rewards.tolist()} during guidance: try a lower strength")
        return rewards

    def __call__(self, latents: Tensor) -> Tensor:
        """Compute the gradients [B, C, H, W] of the rewards.

        Raises:
            DraftuneError: A gradient is not finite, or all gradients of the first call are 0.
        """
        first = self.queries == 0
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.score(leaf).sum(), leaf)
        if not gradient.isfinite().all():
            raise DraftuneError(f"the gradient of the reward {self.reward.label!r} became infinite during guidance")
        if first and not gradient.any():
            raise DraftuneError(
                f"the reward {self.reward.label!r} has no gradient for guidance: use a differentiable reward"
            )
        return gradient


def sample_guided(
    model: DiffusionModel,
    reward: str | Reward | Callable[..., Any],
    prompts: str | Sequence[str],
    method: str = "pgdiff_dynamic",
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int = 8,
    progress: bool = False,
) -> GuidedSamples:
    """Sample one image for each prompt, guided by a reward and without training.

    An image depends only on its own seed. With `finetune_from_round`, it also depends on the images sampled before and
    beside it, and the LoRA stays on the model: save it with `save_lora`.

    Args:
        model: The model, with or without a LoRA.
        reward: A differentiable reward.
        prompts: B prompts.
        method: `pgdiff_dynamic`, `classifier_style` or `gradient_guidance`, with settings in parentheses.
        seeds: B seeds. Default: 0, 1, ...
        num_inference_steps: Sampling steps. Default: the model's recommendation.
        guidance_scale: Scale of classifier-free guidance. Default: the model's recommendation.

    Raises:
        DraftuneError: The method or reward is unknown, the reward has no gradient, a number is not finite, or the
            model to fine-tune already has a LoRA.
    """
    guide = load_guide(method)
    if model.autocast_dtype is torch.float16:
        raise DraftuneError("the gradient for guidance underflows in fp16: use bf16 or no for mixed_precision")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts)) if seeds is None else seeds
    score = require_trained(load_reward(reward)).to(model.device)
    model.check_prompts(prompts, negative_prompt)
    check_prompts(score, prompts)
    defaults = model.recommended
    schedule = model.schedule(num_inference_steps or defaults["num_inference_steps"])
    scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    model.cache_prompts(prompts, negative_prompt, scale)

    fit = None
    if guide.finetune_from_round:
        from draftune.experimental.denoising_loss import fresh_lora

        # Before the first denoiser is made, since a denoiser reads the model's LoRAs when it is created.
        fit = fresh_lora(model, schedule, guide.learning_rate)
    images, rewards, queries = [], [], 0
    total = guide.num_samplings * len(prompts)
    bar = tqdm(total=total, desc="guidance", unit="image", leave=False, disable=not progress)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        noise_fn = partial(model.noise, generators, len(batch))
        denoise = model.denoiser_for(batch, schedule, scale, negative_prompt)
        slope = RewardGradientFn(model, score, batch)
        scores = []
        for i, latents in enumerate(guide.latents(denoise, schedule, slope, noise_fn)):
            scores.append(slope.score(latents).cpu())
            if fit is not None and i >= guide.finetune_from_round:
                fit(model.denoiser_for(batch, schedule, guidance_scale=1), latents)
            bar.update(len(batch))
        images.append(model.decode(latents).cpu().float())
        rewards.append(torch.stack(scores))
        queries += slope.queries
    bar.close()
    return GuidedSamples(torch.cat(images), torch.cat(rewards, 1), queries)
