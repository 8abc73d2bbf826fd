"""Experimental optimizers and gradient filters, by name. `training/optim.py` imports them when a name is looked up."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from draftune.experimental.optimizers.base import ClosureOptimizer
from draftune.experimental.optimizers.channels import channel_mean, channel_sobolev, channel_sobolev_mean
from draftune.experimental.optimizers.extrapolate import Extrapolate
from draftune.experimental.optimizers.meka import MEKA
from draftune.experimental.optimizers.step_tuned import StepTunedSGD

__all__ = [
    "FILTERS",
    "MEKA",
    "OPTIMIZERS",
    "ClosureOptimizer",
    "Extrapolate",
    "StepTunedSGD",
    "channel_mean",
    "channel_sobolev",
    "channel_sobolev_mean",
]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"step_tuned_sgd": StepTunedSGD, "extrapolate": Extrapolate}
FILTERS: dict[str, Callable[..., Tensor]] = {
    "channel_mean": channel_mean,
    "channel_sobolev": channel_sobolev,
    "channel_sobolev_mean": channel_sobolev_mean,
}
