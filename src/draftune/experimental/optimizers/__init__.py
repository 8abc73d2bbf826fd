"""What the gradient is made of before a step, and the step: gradient filters and optimisers, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Evaluating
from draftune.experimental.optimizers.channels import channel_mean, channel_sobolev, channel_sobolev_mean
from draftune.experimental.optimizers.extrapolate import Extrapolate
from draftune.experimental.optimizers.meka import MEKA
from draftune.experimental.optimizers.step_tuned import StepTunedSGD
from draftune.registry.expression import Call, Value, with_defaults
from draftune.registry.factories import bind, build, find_factory, parse_call

__all__ = [
    "FILTERS",
    "MEKA",
    "OPTIMIZERS",
    "Evaluating",
    "Extrapolate",
    "StepTunedSGD",
    "channel_mean",
    "channel_sobolev",
    "channel_sobolev_mean",
    "make_filter",
    "make_optimizer",
]

Parameters = Iterable[nn.Parameter]
Filter = Callable[[Tensor], Tensor]


def adamw(
    params: Parameters, lr: float, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float = 0.1
) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), torch's own; its settings are --adam-beta1 and the like."""
    return AdamW(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


def sgd(
    params: Parameters, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent, torch's own, with Polyak's or Nesterov's momentum."""
    return SGD(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "step_tuned_sgd": StepTunedSGD,
    "extrapolate": Extrapolate,
}
FILTERS: dict[str, Callable[..., Tensor]] = {
    "channel_mean": channel_mean,
    "channel_sobolev": channel_sobolev,
    "channel_sobolev_mean": channel_sobolev_mean,
}


def make_optimizer(
    text: str, params: Parameters, lr: float, defaults: Mapping[str, Mapping[str, Value]] | None = None
) -> Optimizer:
    """Return an optimizer from an expression: "sgd(momentum=0.9)", "extrapolate(adamw, rate=0.1)", '"my.py:Mine"(k=2)'.

    Args:
        text: The expression.
        params: The parameters to optimize.
        lr: The learning rate.
        defaults: Settings by an optimizer's name, for those that the expression does not set.

    Raises:
        DraftuneError: for an unknown name or setting.
    """
    call = with_defaults(parse_call(text, "optimizer", "adamw"), defaults or {})
    assert isinstance(call, Call)
    return build(call, "optimizer", OPTIMIZERS, Optimizer, list(params), lr)


def make_filter(text: str) -> Filter:
    """Return a gradient filter from an expression: "channel_mean(weight=2)". Raises DraftuneError as above."""
    call = parse_call(text, "gradient filter", "channel_mean(weight=2)")
    if call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, not {str(call.inner)!r}")
    factory = find_factory(call.name, "gradient filter", FILTERS)
    settings = bind(call, "gradient filter", factory, 1)

    def filtered(gradient: Tensor) -> Tensor:
        return factory(gradient, **settings)

    filtered(torch.zeros(2, 1))  # reports settings out of range before training
    return filtered
