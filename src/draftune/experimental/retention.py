"""Retention: a distillation loss that preserves the model on the prompts of an earlier training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, MethodWrapper


class Retention(MethodWrapper):
    """Any method with a distillation loss on retention prompts, against catastrophic forgetting.

        loss = loss of the method + weight * mean((F - F_base)^2)

    The second term is added once for each batch and optimizer step. F and F_base are the guided outputs of the
    fine-tuned and the base network at a random step of the base model's own trajectory, for the retention prompts
    (`Batch.retention_batch`). `Schedule.output_difference` computes their difference. The term needs no reward.

    It follows the distillation of a classifier's outputs in FOSTER (Wang et al., 2022, arXiv:2204.04662). The form for
    denoisers and the weight are this project's.

    Args:
        method: The method to wrap.
        weight: Weight of the distillation loss, 0 or more (`retain_weight`).
    """

    def __init__(self, method: Method, weight: float) -> None:
        if not weight >= 0:
            raise DraftuneError(f"retain_weight must be at least 0, got {weight}")
        super().__init__(method)
        self.weight = weight

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        seen: list[Batch] = []

        def recorded() -> Iterator[Batch]:
            for batch in batches:
                seen.append(batch)
                yield batch

        for losses in self.method.losses_per_step(recorded()):
            yield self.with_retention(losses, seen)

    def with_retention(self, losses: Iterator[Tensor], seen: list[Batch]) -> Iterator[Tensor]:
        """Yield the method's losses and, after the first loss of each batch, the retention loss of that batch."""
        done = 0
        for loss in losses:
            yield loss
            del loss  # frees its graph
            for batch in seen[done:]:
                yield self.weight * retention_loss(batch)
            done = len(seen)


def retention_loss(batch: Batch) -> Tensor:
    """Compute the mean squared difference from the base model at one random step of the base model's trajectory.

    The step is one of the fine-tuned model: at the others there is no difference.
    """
    kept = batch.retention_batch
    if kept is None:
        raise DraftuneError("the batch has no retention prompts; set --retain-prompts")
    tuned = [i for i, step in enumerate(kept.schedule.steps) if step.tuned]
    count = tuned[int(torch.randint(len(tuned), (1,), generator=batch.generator))]
    x = kept.prefix_cache.get(count, kept.base_denoise, kept.schedule.steps)
    step = kept.schedule.steps[count]
    with torch.no_grad():
        target = kept.base_denoise(x, step)
    return kept.schedule.output_difference(kept.denoise(x, step), target, step).square().mean()
