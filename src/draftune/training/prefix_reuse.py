"""How many updates use one prefix: a fixed number, or a rule that measures how far the gradient has turned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftune.training.data import BatchInput
from draftune.training.optim import RNGReplay
from draftune.training.reward_step import NonFiniteError

if TYPE_CHECKING:
    from draftune.training.step import TrainStep

CHECK_INTERVAL = 20
"""Minimum number of updates between two measurements, unless the first one doubled the number of updates."""
MAX_REUSE_STEPS = 32
"""Largest number of updates that the rule chooses: more would train on very few distinct images."""


class PrefixReuse:
    """Count the updates that used a prefix, and choose how many may.

    Without a `threshold` the number is fixed. With one, the cosine of two gradients is measured when a prefix was used
    `steps` times: that of its latents, and that of latents sampled anew from the same noise. The angle of the gradients
    grows about linearly with the age of the prefix. So the number halves above the threshold's angle, and doubles up to
    half of it.

    Attributes:
        steps: Number of updates that use one prefix.
        used: Number of updates that used the present prefix.
        wait: Minimum number of updates until the next measurement.
    """

    def __init__(self, steps: int, threshold: float) -> None:
        self.steps, self.threshold = steps, threshold
        self.used = self.wait = 0

    @property
    def finished(self) -> bool:
        """Return whether the prefix was used as often as it may."""
        return self.used >= self.steps

    @property
    def due(self) -> bool:
        """Return whether the cosine must be measured before the prefix is replaced."""
        return self.finished and self.threshold > 0 and not self.wait

    def count(self) -> None:
        """Count an update."""
        self.used += 1
        self.wait = max(0, self.wait - 1)

    def adapt(self, cosine: float) -> None:
        """Choose the number of updates for the next prefixes; an undefined cosine (NaN) changes nothing."""
        angle, limit = (math.acos(min(1.0, max(-1.0, value))) for value in (cosine, self.threshold))
        self.wait = CHECK_INTERVAL
        if math.isnan(cosine):
            return
        if angle > limit:
            self.steps = max(1, self.steps // 2)
        elif 2 * angle <= limit and 2 * self.steps <= MAX_REUSE_STEPS:
            self.steps, self.wait = 2 * self.steps, 0

    def state_dict(self) -> dict[str, int]:
        """Return the state for a checkpoint."""
        return {"steps": self.steps, "used": self.used, "wait": self.wait}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.steps, self.used, self.wait = state["steps"], state["used"], state["wait"]


def adapt_reuse(train_step: TrainStep, step: int) -> dict[str, float]:
    """Measure the cosine if that is due, choose the number of updates by it, and return both for metrics.jsonl."""
    reuse, measured = train_step.reuse, {}
    if not reuse.threshold:
        return {}
    if reuse.due:
        measured["prefix_reuse_cosine"] = gradient_cosine(train_step, step)
        reuse.adapt(measured["prefix_reuse_cosine"])
        train_step.replace_pending()
    return {"prefix_reuse_steps": reuse.steps} | measured


def gradient_cosine(train_step: TrainStep, step: int) -> float:
    """Return the cosine between the gradients from the cached prefix and from a new one, for the first pending batch.

    Costs one prefix and two gradients of one batch. Random numbers and weights stay as they are; online rewards do not
    learn. Every process must call it, and all get the same number.

    Returns:
        The cosine; NaN if a gradient is 0, or a reward or gradient is not finite.
    """
    item = train_step.pending[0]
    replay = RNGReplay(train_step.generator)
    try:
        old, new = (gradient_of(train_step, step, inputs, replay) for inputs in (item, item.renewed()))
    except NonFiniteError:
        return math.nan
    finally:
        replay.rewind()
        train_step.optimizer.zero_grad()
    norms = float(old.norm() * new.norm())
    return float(old @ new) / norms if norms else math.nan


def gradient_of(train_step: TrainStep, step: int, item: BatchInput, replay: RNGReplay) -> Tensor:
    """Return the gradient of one batch over all processes, as one vector in float64 on the CPU."""
    context, parameters = train_step.context, train_step.parameters
    replay.rewind()
    train_step.optimizer.zero_grad()
    record = train_step.record(item)
    record.teaches = False
    for loss in next(context.method.losses_per_step([train_step.batch(step, item, record)])):
        context.accelerator.backward(loss)
    context.processes.mean_(parameters.values())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    return torch.cat([gradient.flatten() for gradient in gradients]).cpu().double()
