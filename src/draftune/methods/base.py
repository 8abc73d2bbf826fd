"""The interface of a gradient method and the table of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.expression import Call, parse
from draftune.sampling import Denoiser
from draftune.schedule import Schedule


class Method(ABC):
    """Draws differentiable clean latents from noise; the trainer adds the gradient of the reward of each.

    A method decides which calls of the denoiser carry gradient and what the reward gets to see. It knows neither
    the model nor the reward.
    """

    def check(self, schedule: Schedule) -> None:  # noqa: B027 - most methods fit every schedule
        """Raises DraftuneError where the method's settings do not fit the schedule."""

    @abstractmethod
    def samples(
        self, denoise: Denoiser, schedule: Schedule, noise: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yields clean latents [B, C, H, W], the first of them the sample drawn from `noise`.

        The caller is done with one latent's graph before it asks for the next, so that one graph lives at a time.
        `generator` is on the CPU, so that a seed means the same on every device.
        """


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str):  # type: ignore[no-untyped-def]
    """Makes a Method known by name to the command line and to `load_method`."""

    def add(cls: M) -> M:
        METHODS[name] = cls
        return cls

    return add


def load_method(text: str) -> Method:
    """A method from its name and settings: "draft", "draft-k(k=10)", "draft-lv(n=4)", "refl(m=20)"."""
    call = parse(text)
    if not isinstance(call, Call):
        raise DraftuneError(f"a method is one name with its settings, such as draft-k(k=10), not {text!r}")
    if call.name not in METHODS:
        raise unknown("method", call.name, METHODS)
    return call.apply(METHODS[call.name], "method")


def fresh_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) in the shape of `like`."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
