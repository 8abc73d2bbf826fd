"""Optimizers and gradient preconditioners (filters) by name."""

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
    """AdamW (Loshchilov and Hutter, 2017, arXiv:1711.05101): `torch.optim.AdamW`.

    In a run its defaults are the settings `--adam-beta1`, `--adam-beta2` and `--weight-decay`.
    """
    return AdamW(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


def sgd(
    params: Parameters, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent with optional (Nesterov) momentum: `torch.optim.SGD`."""
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
    """Create an optimizer from an expression.

    Args:
        text: A name with settings, such as "sgd(momentum=0.9)" or "extrapolate(adamw, rate=0.1)", or a class of your
            own file, such as "my.py:Mine(k=2)".
        params: Parameters to train.
        lr: Learning rate.
        defaults: Settings by optimizer name, used where the expression does not set them.

    Raises:
        DraftuneError: The optimizer or one of its settings is unknown, or a value is not allowed.
    """
    return build(one(text, "optimizer"), list(params), lr, defaults or {})


def build(call: Call, params: list[nn.Parameter], lr: float, defaults: Mapping[str, Mapping[str, Value]]) -> Optimizer:
    """Create the optimizer that a parsed call names, with the optimizer inside it if it wraps one."""
    factory = found(call.name, "optimizer", OPTIMIZERS)
    call = Call(call.name, {**defaults.get(call.name, {}), **call.settings}, call.inner)
    inner = inner_call(call, factory, Optimizer, "optimizer", "adamw")
    given: tuple[Any, ...] = (build(inner, params, lr, defaults),) if inner else (params, lr)
    return made(call, factory, Optimizer, "optimizer", "torch.optim.Optimizer", *given)


def make_filter(text: str) -> Filter:
    """Create a gradient preconditioner from its name and settings, such as "channel-mean(weight=2)".

    Raises:
        DraftuneError: The filter or one of its settings is unknown, or a value is not allowed.
    """
    call = one(text, "gradient filter")
    factory = found(call.name, "gradient filter", FILTERS)
    if call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, got {str(call.inner)!r}")

    def filtered(gradient: Tensor) -> Tensor:
        return call.apply(factory, "gradient filter", gradient)

    filtered(torch.zeros(2, 1))  # raises now if a setting is wrong
    return filtered


def one(text: str, kind: str) -> Call:
    """Parse an expression that must be one name with its settings."""
    tree = parse(text)
    if not isinstance(tree, Call):
        raise DraftuneError(f"the {kind} must be one name with its settings, got {text!r}")
    return tree
