"""What the gradient is made of before a step, and the step: gradient filters and optimisers, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Evaluating
from draftune.experimental.optimizers.channels import channel_mean, channel_sobolev, channel_sobolev_mean
from draftune.experimental.optimizers.extrapolate import Extrapolate
from draftune.experimental.optimizers.meka import MEKA
from draftune.experimental.optimizers.step_tuned import StepTunedSGD
from draftune.registry.expression import Call, Value, parse
from draftune.registry.factories import found, inner_call, made

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
    "step-tuned-sgd": StepTunedSGD,
    "extrapolate": Extrapolate,
}
FILTERS: dict[str, Callable[..., Tensor]] = {
    "channel-mean": channel_mean,
    "channel-sobolev": channel_sobolev,
    "channel-sobolev-mean": channel_sobolev_mean,
}


def make_optimizer(
    text: str, params: Parameters, lr: float, defaults: Mapping[str, Mapping[str, Value]] | None = None
) -> Optimizer:
    """An optimiser from its name and settings: "sgd(momentum=0.9)", "extrapolate(adamw, rate=0.1)", "my.py:Mine(k=2)".

    `defaults`: settings by an optimiser's name, where the expression does not say. Raises DraftuneError for a name or a
    setting that is not there.
    """
    return build(one(text, "optimiser"), list(params), lr, defaults or {})


def build(call: Call, params: list[nn.Parameter], lr: float, defaults: Mapping[str, Mapping[str, Value]]) -> Optimizer:
    factory = found(call.name, "optimiser", OPTIMIZERS)
    call = Call(call.name, {**defaults.get(call.name, {}), **call.settings}, call.inner)
    inner = inner_call(call, factory, Optimizer, "optimiser", "adamw")
    given: tuple[Any, ...] = (build(inner, params, lr, defaults),) if inner else (params, lr)
    return made(call, factory, Optimizer, "optimiser", "torch.optim.Optimizer", *given)


def make_filter(text: str) -> Filter:
    """A gradient filter from its name and settings: "channel-mean(weight=2)". Raises DraftuneError as above."""
    call = one(text, "gradient filter")
    factory = found(call.name, "gradient filter", FILTERS)
    if call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, not {str(call.inner)!r}")

    def filtered(gradient: Tensor) -> Tensor:
        return call.apply(factory, "gradient filter", gradient)

    filtered(torch.zeros(2, 1))  # what is wrong with its settings is said at once
    return filtered


def one(text: str, kind: str) -> Call:
    tree = parse(text)
    if not isinstance(tree, Call):
        raise DraftuneError(f"{kind}: one name with its settings is wanted, not {text!r}")
    return tree
