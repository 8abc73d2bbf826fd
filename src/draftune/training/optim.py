"""Optimizers, gradient filters and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from draftune.errors import DraftuneError, require
from draftune.methods import Method
from draftune.registry.expression import Call, Value, with_defaults
from draftune.registry.factories import bind, build, find_factory, parse_call
from draftune.runs.checkpoint import load_random_state, random_state
from draftune.settings import Settings

Parameters = Iterable[nn.Parameter]
Filter = Callable[[Tensor], Tensor]
UP = ".lora_B."
"""Part of the names of a LoRA's up projections, whose rows are the layer's output channels."""


def adamw(
    params: Parameters, lr: float, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float = 0.1
) -> Optimizer:
    """torch's AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101); its defaults are --adam-beta1 and the like."""
    return AdamW(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


def adamw_8bit(
    params: Parameters, lr: float, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float = 0.1
) -> Optimizer:
    """bitsandbytes' AdamW with 8-bit moments (Dettmers et al., 2021, arXiv:2110.02861); defaults as for adamw."""
    bitsandbytes: Any = require("bitsandbytes", "optimizer=adamw_8bit", "bitsandbytes")
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
    return optimizer


def sgd(
    params: Parameters, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """torch's stochastic gradient descent, with optional Polyak or Nesterov momentum."""
    return SGD(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "adamw_8bit": adamw_8bit, "sgd": sgd}


def optimizers() -> dict[str, Callable[..., Optimizer]]:
    """Return the factories of all optimizers by name. The experimental ones are imported here, on first use."""
    from draftune.experimental import optimizers

    return OPTIMIZERS | optimizers.OPTIMIZERS


def gradient_filters() -> Mapping[str, Callable[..., Tensor]]:
    """Return the gradient filters by name; all of them are experimental."""
    from draftune.experimental.optimizers import FILTERS

    return FILTERS


def make_optimizer(
    text: str, params: Parameters, lr: float, defaults: Mapping[str, Mapping[str, Value]] | None = None
) -> Optimizer:
    """Build an optimizer from an expression: "sgd(momentum=0.9)", "extrapolate(adamw, rate=0.1)" or "my.py:Mine(k=2)".

    Args:
        text: The expression.
        params: The trainable parameters.
        lr: The learning rate.
        defaults: Settings by an optimizer's name, for what the expression does not set.

    Raises:
        DraftuneError: the name or a setting is unknown, or the factory fails.
    """
    call = with_defaults(parse_call(text, "optimizer", "adamw"), defaults or {})
    assert isinstance(call, Call)
    return build(call, "optimizer", optimizers(), Optimizer, list(params), lr)


def make_filter(text: str) -> Filter:
    """Build a gradient filter from an expression such as "channel_mean(weight=2)".

    Raises:
        DraftuneError: the name or a setting is unknown.
    """
    call = parse_call(text, "gradient filter", "channel_mean(weight=2)")
    if call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, not {str(call.inner)!r}")
    factory = find_factory(call.name, "gradient filter", gradient_filters())
    settings = bind(call, "gradient filter", factory, 1)

    def filtered(gradient: Tensor) -> Tensor:
        return factory(gradient, **settings)

    filtered(torch.zeros(2, 1))  # reports invalid settings before training
    return filtered


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether `optimizer.step` must be called with a closure that computes the gradient."""
    return bool(getattr(optimizer, "needs_closure", False))


def optimizer_of(settings: Settings, parameters: Parameters) -> Optimizer:
    """Build the optimizer that the settings name."""
    s = settings
    adam = {"beta1": s.adam_beta1, "beta2": s.adam_beta2, "weight_decay": s.weight_decay}
    return make_optimizer(s.optimizer, parameters, s.learning_rate, {"adamw": adam, "adamw_8bit": adam})


def learning_rates(settings: Settings) -> Callable[[int], float]:
    """Return the learning rate as a function of the update's number, from 1 to `steps`.

    It is computed from diffusers' schedule of that name, shifted by one update: the first update of a warmup and the
    last one of a decay have a learning rate above 0. It depends on the number only, so a resumed run needs no state.

    Raises:
        DraftuneError: diffusers refuses the settings.
    """
    from diffusers.optimization import get_scheduler

    s = settings
    # The schedule reads the optimizer's learning rate only.
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=s.learning_rate)
    try:
        scheduler = get_scheduler(
            s.lr_scheduler,
            optimizer,
            num_warmup_steps=s.lr_warmup_steps,
            num_training_steps=s.steps + 1,
            num_cycles=s.lr_num_cycles,
            power=s.lr_power,
        )
    except ValueError as error:
        raise DraftuneError(f"lr_scheduler={s.lr_scheduler}: {error}") from error
    factor: Any = scheduler.lr_lambdas[0]
    return lambda step: s.learning_rate * factor(step)


def filter_of(settings: Settings, parameters: Mapping[str, nn.Parameter]) -> Callable[[], None]:
    """Return a function that applies the gradient filter to the gradients of the LoRA's up projections."""
    if not settings.gradient_filter:
        return lambda: None
    chosen = make_filter(settings.gradient_filter)
    ups = [parameter for name, parameter in parameters.items() if UP in name]

    def apply() -> None:
        for parameter in ups:
            if parameter.grad is not None:
                parameter.grad = chosen(parameter.grad)

    return apply


def check_optimizer(settings: Settings, method: Method) -> None:
    """Raise DraftuneError if optimizer, filter or schedule are invalid, or do not fit the method."""
    s = settings
    optimizer = optimizer_of(s, [nn.Parameter(torch.zeros(1))])
    learning_rates(s)
    if s.gradient_filter:
        make_filter(s.gradient_filter)
    if needs_closure(optimizer):
        if s.mixed_precision == "fp16":
            raise DraftuneError(f"the optimizer {s.optimizer!r} does not work in fp16: use bf16 or no")
        if not method.needs_reward_gradient:
            raise DraftuneError(
                f"the optimizer {s.optimizer!r} computes the gradient of a batch several times, but the method "
                f"{s.method!r} takes its own optimizer steps: use adamw or sgd"
            )
    if s.log_gradient_snr and (s.gradient_accumulation_steps < 2 or not method.needs_reward_gradient):
        raise DraftuneError(
            "log_gradient_snr compares the gradients of an update's batches: it needs --gradient-accumulation-steps of "
            "at least 2 and a method that uses the reward's gradient"
        )


class RNGReplay:
    """The state of all random generators at construction, which `rewind` restores."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.own, self.others = generator, generator.get_state(), random_state()

    def rewind(self) -> None:
        self.generator.set_state(self.own)
        load_random_state(*self.others)
