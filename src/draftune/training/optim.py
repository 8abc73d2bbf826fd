"""The optimiser and the gradient filter that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from draftune.errors import DraftuneError
from draftune.experimental.optimizers import Evaluating, make_filter, make_optimizer
from draftune.methods import Method
from draftune.runs.checkpoint import load_random_state, random_state
from draftune.settings import Settings

UP = ".lora_B."
"""In the names of a LoRA's second matrices, whose rows are the layer's output channels."""


def optimizer_of(settings: Settings, parameters: Iterable[nn.Parameter]) -> Optimizer:
    s = settings
    adamw = {"beta1": s.adam_beta1, "beta2": s.adam_beta2, "weight_decay": s.weight_decay}
    return make_optimizer(s.optimizer, parameters, s.learning_rate, {"adamw": adamw})


def filter_of(settings: Settings, parameters: Mapping[str, nn.Parameter]) -> Callable[[], None]:
    """What puts the filtered gradients in the place of those of the LoRA's second matrices."""
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
    """Raises DraftuneError where they can't be made, or don't fit the method."""
    s = settings
    optimizer = optimizer_of(s, [nn.Parameter(torch.zeros(1))])
    if s.gradient_filter:
        make_filter(s.gradient_filter)
    if isinstance(optimizer, Evaluating):
        if s.mixed_precision == "fp16":
            raise DraftuneError(f"the optimiser {s.optimizer!r} does not work in fp16: use bf16 or no")
        if not method.needs_gradient:
            raise DraftuneError(
                f"the optimiser {s.optimizer!r} takes a batch's gradient itself, and the method {s.method!r} makes its "
                "own steps: use adamw or sgd"
            )
    if s.signal_to_noise and (s.gradient_accumulation_steps < 2 or not method.needs_gradient):
        raise DraftuneError(
            "signal_to_noise compares an update's batches: it wants --gradient-accumulation-steps of at least 2, and a "
            "method that uses the reward's gradient"
        )


class Replay:
    """Where all random generators stand now, to which `rewind` brings them back."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.own, self.others = generator, generator.get_state(), random_state()

    def rewind(self) -> None:
        self.generator.set_state(self.own)
        load_random_state(*self.others)
