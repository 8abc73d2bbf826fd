"""The row of an update in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from draftune.errors import DraftuneError
from draftune.training.data import BatchRecord

if TYPE_CHECKING:
    from draftune.training.step import TrainStep


def update_row(train_step: TrainStep, step: int, rate: float, records: Sequence[BatchRecord]) -> dict[str, float]:
    """Return the update's row of metrics.jsonl. Raises DraftuneError if the method scored no image."""
    s, norms = train_step.context.settings, train_step.norms or [math.nan]
    # An optimizer with a closure scores the same batches several times: log the first evaluation.
    scored = [batch for batch in records[: s.gradient_accumulation_steps] if batch.reward is not None]
    if not scored:
        raise DraftuneError(f"the method {s.method!r} scored no image")
    reward = torch.cat([batch.reward for batch in scored if batch.reward is not None])
    parts = {label: torch.cat([batch.parts[label] for batch in scored]) for label in scored[0].parts}
    row = {
        "step": step,
        "reward": float(reward.mean()),
        "reward_std": float(reward.std(unbiased=False)),
        "reward_queries": train_step.scorer.queries,
        "grad_norm": norms[0],
        "grad_clip_fraction": clipped_share(norms, s.max_grad_norm),
        "learning_rate": rate,
        "train_seconds": round(train_step.seconds, 4),
        **train_step.context.method.metrics(),
    }
    if train_step.gradient_noise is not None:
        row["gradient_snr"] = train_step.gradient_noise.ratio
    if len(parts) > 1:
        row |= {f"reward/{label}": float(scores.mean()) for label, scores in parts.items()}
    if train_step.skipped:
        row["nonfinite_steps"] = train_step.skipped
    return row


def clipped_share(norms: Sequence[float], max_grad_norm: float) -> float:
    """Return the fraction of gradients that were scaled down to `max_grad_norm`; NaN if a norm is not finite."""
    if not all(map(math.isfinite, norms)):
        return math.nan
    return sum(norm > (max_grad_norm or math.inf) for norm in norms) / len(norms)
