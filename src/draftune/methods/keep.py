"""FOSTER: any method, while what an earlier training taught is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method
from draftune.sampling import Denoiser
from draftune.schedule import Schedule, Step


class Keep(Method):
    """Any method, while on the batch's kept prompts the denoiser is held to what it was before (arXiv 2204.04662).

    Adds weight * mean((eps - eps_base)^2), both with guidance, at a random step of the base's own path, once for each
    batch and each of the optimiser's steps; for a flow the velocities take the place of eps. It asks for no reward.
    FOSTER's distillation of a classifier's outputs, with its weight of 1, is this one's model; what it means for
    denoisers, and the weight, are ours.
    """

    def __init__(self, method: Method, weight: float) -> None:
        if not weight >= 0:
            raise DraftuneError(f"keep_weight must be at least 0, not {weight}")
        self.method, self.weight = method, weight
        self.needs_gradient, self.half_precision = method.needs_gradient, method.half_precision

    def check(self, schedule: Schedule) -> None:
        self.method.check(schedule)

    def has_prefix(self) -> bool:
        return self.method.has_prefix()

    def spans_calls(self) -> bool:
        return self.method.spans_calls()

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

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)


def kept_difference(batch: Batch) -> Tensor:
    """How far the denoiser is from the base on the batch's kept prompts, at one random step of the base's path."""
    kept = batch.kept
    if kept is None:
        raise DraftuneError("nothing says which prompts are to be kept: give --keep")
    made = int(torch.randint(len(kept.schedule), (1,), generator=batch.generator))
    x = kept.latents.after(made, kept.base, kept.schedule.steps)
    return difference(kept.schedule, kept.denoise, kept.base, x, kept.schedule.steps[made]).mean()


def difference(schedule: Schedule, student: Denoiser, teacher: Denoiser, x: Tensor, step: Step) -> Tensor:
    """The mean squared difference of two denoisers' noise at noisy latents [B], with a graph by the student's weights.

    For a flow it is that of the velocities.
    """
    with torch.no_grad():
        wanted = teacher(x, step)
    return schedule.difference(student(x, step), wanted).square().flatten(1).mean(1)
