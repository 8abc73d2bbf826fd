"""Decode and score the clean latents of an update."""

from __future__ import annotations

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards.chunked import chunked_scores
from draftune.rewards.latent import score_latents
from draftune.rewards.online import extra_queries, learn_all, online_rewards
from draftune.training.context import TrainContext
from draftune.training.data import BatchRecord


class NonFiniteError(DraftuneError):
    """A reward or a gradient is infinite or NaN."""


class Scorer:
    """Decode and score latents in chunks of `reward_batch_size`, with the gradient, and count the scored images."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.queries = 0
        """Images scored so far, over all processes."""

    def __call__(self, batch: BatchRecord, step: int, clean: Tensor, expected: Tensor | None = None) -> Tensor:
        """Score clean latents. The first call of a batch stores images and rewards in it, and online rewards learn.

        Args:
            batch: The batch that the latents belong to.
            step: Number of the update.
            clean: This process's clean latents [B, C, H, W].
            expected: Scores that the method expected of each image at each of S steps [B, S], for online rewards.

        Returns:
            The rewards [B] of this process's images, with a graph to the latents.

        Raises:
            NonFiniteError: a reward is not finite.
        """
        s, model, processes = self.context.settings, self.context.model, self.context.processes
        reward, scaler = self.context.reward, self.context.accelerator.scaler
        prompts = processes.shard(batch.prompts)
        image_chunks: list[Tensor] = []
        totals: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        before, first = extra_queries(reward), batch.reward is None

        def scored(latents: Tensor, some: slice) -> Tensor:
            score, terms, images = score_latents(reward, latents, model.decode, prompts[some])
            if images is not None:  # rewards of latents need none
                image_chunks.append(images)
            totals.append(score.detach())
            for label, values in terms.items():
                parts.setdefault(label, []).append(values)
            return score

        with processes.raise_on_all_ranks():
            # fp16 gradients are scaled here too: chunked_scores takes them before the trainer's backward pass.
            own = chunked_scores(scored, clean, s.reward_batch_size, scaler.get_scale() if scaler else 1.0)
        total = processes.gather(torch.cat(totals))
        more = processes.gather(torch.tensor([extra_queries(reward) - before])).sum()
        self.queries += len(batch.prompts) + int(more)
        finite = bool(total.isfinite().all())
        if first or not finite:
            batch.images, batch.reward = torch.cat(image_chunks) if image_chunks else None, total
            batch.parts = {label: processes.gather(torch.cat(scores)) for label, scores in parts.items()}
        if not finite:
            raise NonFiniteError(f"the reward became {total.tolist()} at update {step}")
        if first and batch.teaches and online_rewards(reward):
            # Every process trains the reward on all images, so that its copies stay equal.
            images = processes.gather(torch.cat(image_chunks))
            learn_all(reward, images, batch.prompts, None if expected is None else processes.gather(expected))
        return own
