"""Devices without float64, as MPS is: nothing is computed in it before it is on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftune.evaluation.kid import kid
from draftune.training.gradient_noise import GradientNoise


class OnDevice(Tensor):
    """A tensor that behaves as on a device without float64; what `cpu()` and `item()` give is an ordinary one."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            return found.as_subclass(Tensor)
        if isinstance(found, Tensor) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return found


def on_device(*shape: int) -> OnDevice:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).as_subclass(OnDevice)


def test_the_fake_refuses_float64() -> None:
    for wide in (lambda x: x.double(), lambda x: x.to(torch.float64), lambda x: torch.add(x, 1.0).double()):
        with pytest.raises(TypeError, match="float64"):
            wide(on_device(3))
    assert type(on_device(3).cpu().double()) is Tensor


def test_gradient_noise() -> None:
    parameter = nn.Parameter(torch.zeros(4, 3))
    noise = GradientNoise({"a": parameter})
    for i in range(1, 3):
        parameter.grad = (on_device(4, 3) * i).as_subclass(OnDevice)
        noise.add()
    noise.measure()
    first = on_device(4, 3).as_subclass(Tensor).double()
    # Gradients g and g of two batches, whose sum is 2 g: no noise at all.
    assert float(first.square().sum()) * 2 == pytest.approx(noise.squares, rel=1e-6)
    assert noise.ratio > 1e6


def test_distances_of_sets() -> None:
    a, b = on_device(6, 3), on_device(5, 3) + 1
    assert kid(a, b) == pytest.approx(kid(a.as_subclass(Tensor), b.as_subclass(Tensor)))
