"""FOSTER: any method, while what an earlier training taught is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Around, Batch, Method


class Keep(Around):
    """Any method, while on the batch's kept prompts the denoiser is held to what it was before (arXiv 2204.04662).

    Adds weight * mean((F - F_base)^2) at a random step of the base's own path, once for each batch and each of the
    optimiser's steps. F is the guided output of the network, as in `Schedule.prediction_error`. It asks for no reward.
    FOSTER's distillation of a classifier's outputs, with its weight of 1, is this one's model; what it means for
    denoisers, and the weight, are ours.
    """

    def __init__(self, method: Method, weight: float) -> None:
        if not weight >= 0:
            raise DraftuneError(f"keep_weight must be at least 0, not {weight}")
        super().__init__(method)
        self.weight = weight

    def optimizer_steps(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        seen: list[Batch] = []

        def noted() -> Iterator[Batch]:
            for batch in batches:
                seen.append(batch)
                yield batch

        for losses in self.method.optimizer_steps(noted()):
            yield self.with_kept(losses, seen)

    def with_kept(self, losses: Iterator[Tensor], seen: list[Batch]) -> Iterator[Tensor]:
        """The method's losses and, after the first of each batch, what is kept with it."""
        done = 0
        for loss in losses:
            yield loss
            del loss  # and its graph
            for batch in seen[done:]:
                yield self.weight * kept_difference(batch)
            done = len(seen)


def kept_difference(batch: Batch) -> Tensor:
    """The mean squared difference from the base on the batch's kept prompts, at one random step of the base's path."""
    kept = batch.kept
    if kept is None:
        raise DraftuneError("nothing says which prompts are to be kept: give --retain-prompts")
    made = int(torch.randint(len(kept.schedule), (1,), generator=batch.generator))
    x = kept.latents.after(made, kept.base, kept.schedule.steps)
    step = kept.schedule.steps[made]
    with torch.no_grad():
        wanted = kept.base(x, step)
    return kept.schedule.prediction_error(kept.denoise(x, step), wanted, step).square().mean()
