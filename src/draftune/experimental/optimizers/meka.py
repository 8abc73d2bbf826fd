"""MEKA (Chen, Choi, Balles, Duvenaud & Hennig, arXiv 2011.04803): Kalman filters of the gradient and the loss.

It needs every sample's gradient and second derivatives, so it is for small problems and not for sampling; what a run
can have of it is the measurement, signal to noise (`draftune.training.gradient_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Closure, Evaluating, evaluated

TINY = 1e-30


class Belief(NamedTuple):
    """A quantity as the filter sees it: its mean, and the variance of each of its numbers."""

    mean: Tensor
    variance: Tensor


def filtered(predicted: Belief, measured: Belief) -> Belief:
    """One of Kalman's updates: what was predicted and what was measured, each weighed by the other's variance."""
    gain = predicted.variance / (predicted.variance + measured.variance + TINY)
    mean = (1 - gain) * predicted.mean + gain * measured.mean
    return Belief(mean, (1 - gain) ** 2 * predicted.variance + gain**2 * measured.variance)


def step_size(slope: float, curve: float, loss: float, first: float, second: float, most: float = math.inf) -> float:
    """The most probable improvement: the alpha > 0 that makes the expected change least in its standard deviations.

    Minimises (alpha * slope + alpha^2 / 2 * curve) / sqrt(2 * loss + alpha^2 * first + alpha^4 / 4 * second), with
    slope = d.m < 0 and curve = d.Bd along the direction, and the variances of the loss, of d.m and of d.Bd. Where
    first and second are nothing beside the loss's, it is -slope / curve. At most `most`.
    """

    def derivative(alpha: float) -> float:
        # Of the quotient, times what is positive; it changes its sign once.
        return 2 * loss * (slope + curve * alpha) + curve * first * alpha**3 / 2 - slope * second * alpha**4 / 4

    low, high = 0.0, 1.0
    while derivative(high) < 0:
        if high >= most:
            return most
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return min(high, most)


class MEKA(Evaluating):
    """MEKA, and with `adaptive` AdaMEKA: filters the gradient by its measured variance and curvature, sets its step.

    The closure returns the losses [n] of n >= 2 samples with their graph, and does not call backward. Variances are
    means over the weights; they are averaged over the steps with `decay`, the size of the step with `step_decay`, both
    without the bias of their start. The paper averages the step with 0.999 too; so averaged it diverges on a noisy
    quadratic. A fixed step is `lr`; no step is longer than `most`, which is ours. In the authors' own words it matches
    well-tuned SGD and Adam on networks, and does not beat them.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        adaptive: bool = False,
        decay: float = 0.999,
        step_decay: float = 0.0,
        most: float = 1e3,
    ) -> None:
        if not (0 <= decay < 1 and 0 <= step_decay < 1 and most > 0):
            raise DraftuneError(f"MEKA: decays in [0, 1) and most > 0 are wanted, not {decay}, {step_decay} and {most}")
        super().__init__(params, {"lr": lr})
        self.lr, self.adaptive, self.decay, self.step_decay, self.most = lr, adaptive, decay, step_decay, most

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step; the mean loss before it."""
        parameters, shared = self.parameters(), self.shared
        losses: Tensor = evaluated(closure)
        if losses.dim() != 1 or len(losses) < 2:
            raise DraftuneError(f"MEKA wants the losses [n] of at least 2 samples, not {list(losses.shape)}")
        gradients = derivatives(losses, parameters)
        done, values = int(shared.get("step", 0)), torch.stack(gradients).detach()
        measured = Belief(values.mean(0), self.averaged("noise", noise(values), self.decay, done))
        spread = self.averaged("loss_noise", noise(losses.detach()[:, None]), self.decay, done)
        loss = Belief(losses.detach().mean(), spread)
        if done:
            old = Belief(self.whole("mean"), shared["variance"])
            moved = self.whole("moved")
            curve = curvature(gradients, moved, parameters)
            change, doubt = curve.mean(0), noise(curve)
            length = moved.square().sum()
            guess = shared["loss"] + old.mean @ moved + moved @ change / 2
            certain = shared["loss_variance"] + old.variance * length + doubt * length / 4
            surprise = ((loss.mean - guess).square() - certain - loss.variance).clamp(min=0)
            loss = filtered(Belief(guess, certain + surprise), loss)
            measured = filtered(Belief(old.mean + change, old.variance + doubt), measured)
        mean, variance = measured
        direction = -mean
        if self.adaptive:
            direction = -mean / ((mean.square() + variance).sqrt() + 1e-8)
        size = self.lr
        if size is None:
            curve, length = curvature(gradients, direction, parameters), direction.square().sum()
            slope, bend = float(direction @ mean), float(direction @ curve.mean(0))
            doubts = float(loss.variance) + TINY, float(variance * length), float(noise(curve) * length)
            best = self.number(step_size(slope, bend, *doubts, self.most))
            size = float(self.averaged("size", best, self.step_decay, done))
        step = size * direction
        self.keep("mean", mean)
        self.keep("moved", step)
        shared |= {"variance": variance, "loss": loss.mean, "loss_variance": loss.variance}
        shared["step"] = torch.tensor(done + 1)
        for parameter in parameters:
            parameter.add_(self.state[parameter]["moved"])
        return losses.detach().mean()

    def averaged(self, name: str, value: Tensor, decay: float, done: int) -> Tensor:
        """The running average of a number, without the bias of its start at 0."""
        average = self.shared.get(name, torch.zeros_like(value)).lerp(value, 1 - decay)
        self.shared[name] = average
        return average / (1 - decay ** (done + 1))

    def keep(self, name: str, values: Tensor) -> None:
        """What there is of each weight, in its state."""
        parameters = self.parameters()
        parts = values.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            self.state[parameter][name] = part.view_as(parameter).clone()

    def whole(self, name: str) -> Tensor:
        return torch.cat([self.state[parameter][name].flatten() for parameter in self.parameters()])


@torch.enable_grad()
def derivatives(values: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each of n values by all weights, [weights], with a graph; 0 where there is none."""
    rows = []
    for value in values:
        found: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        if value.requires_grad:
            found = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return rows


def curvature(gradients: Sequence[Tensor], direction: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Each sample's second derivative along a direction, [n, weights]."""
    with torch.enable_grad():
        # One by one: stacked, each would lead through the graphs of all.
        slopes = [gradient @ direction for gradient in gradients]
    return torch.stack(derivatives(slopes, parameters)).detach()


def noise(values: Tensor) -> Tensor:
    """The variance of the mean of n samples [n, numbers], the mean over its numbers."""
    return values.var(0).mean() / len(values)
