"""MEKA (Chen, Choi, Balles, Duvenaud and Hennig, 2020, arXiv:2011.04803): Kalman filters of gradient and loss.

It needs the gradient and second derivatives of every sample, so it only suits small problems and is not available in
training runs. `draftune.training.gradient_noise` measures the signal-to-noise ratio of the gradient in a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.experimental.optimizers.base import Closure, ClosureOptimizer, call_closure

TINY = 1e-30


class GaussianEstimate(NamedTuple):
    """Gaussian estimate of a quantity: its mean, and the variance of each element."""

    mean: Tensor
    variance: Tensor


def filtered(predicted: GaussianEstimate, measured: GaussianEstimate) -> GaussianEstimate:
    """Combine a prediction and a measurement by a Kalman update, each weighted by the other's variance."""
    gain = predicted.variance / (predicted.variance + measured.variance + TINY)
    mean = (1 - gain) * predicted.mean + gain * measured.mean
    return GaussianEstimate(mean, (1 - gain) ** 2 * predicted.variance + gain**2 * measured.variance)


def step_size(slope: float, curve: float, loss: float, first: float, second: float, most: float = math.inf) -> float:
    """Compute the step size with the highest probability of improvement.

        minimize over alpha > 0:
        (alpha slope + alpha^2 / 2 curve) / sqrt(2 loss + alpha^2 first + alpha^4 / 4 second)

    If `first` and `second` are negligible beside `loss`, this is -slope / curve.

    Args:
        slope: d.m, the slope of the loss along the direction d, below 0.
        curve: d.Bd, the curvature along d.
        loss: Variance of the loss.
        first: Variance of d.m.
        second: Variance of d.Bd.
        most: Upper bound of the result.
    """

    def derivative(alpha: float) -> float:
        # Derivative of the quotient times a positive factor; it changes its sign once.
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


class MEKA(ClosureOptimizer):
    """MEKA: SGD on a Kalman-filtered gradient with an automatic step size; AdaMEKA with `adaptive`.

    Chen, Choi, Balles, Duvenaud and Hennig, 2020, arXiv:2011.04803. The filter predicts the gradient from the last
    step's curvature and corrects it by the measured gradient, each weighted by its variance. The closure must return
    the losses [n] of n >= 2 samples with their graphs, and must not call backward. According to the authors, MEKA
    matches well-tuned SGD and Adam on networks but does not beat them.

    Args:
        lr: Fixed step size. Default: None, the most probable improvement (`step_size`).
        adaptive: Divide the direction by the root of the gradient's second moment, as Adam does. Default: False.
        decay: Decay of the running averages of the variances (bias-corrected means over the weights). Default: 0.999.
        step_decay: Decay of the running average of the step size. Default: 0; the paper's 0.999 diverges on a noisy
            quadratic.
        most: Upper bound of the step size, this project's addition. Default: 1000.
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
            raise DraftuneError(f"MEKA needs decays in [0, 1) and most > 0, got {decay}, {step_decay} and {most}")
        super().__init__(params, {"lr": lr})
        self.lr, self.adaptive, self.decay, self.step_decay, self.most = lr, adaptive, decay, step_decay, most

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step and return the mean loss before it."""
        parameters, shared = self.parameters(), self.shared
        losses: Tensor = call_closure(closure)
        if losses.dim() != 1 or len(losses) < 2:
            raise DraftuneError(f"MEKA needs the losses [n] of at least 2 samples, got the shape {list(losses.shape)}")
        gradients = derivatives(losses, parameters)
        done, values = int(shared.get("step", 0)), torch.stack(gradients).detach()
        measured = GaussianEstimate(values.mean(0), self.averaged("noise", noise(values), self.decay, done))
        spread = self.averaged("loss_noise", noise(losses.detach()[:, None]), self.decay, done)
        loss = GaussianEstimate(losses.detach().mean(), spread)
        if done:
            old = GaussianEstimate(self.whole("mean"), shared["variance"])
            moved = self.whole("moved")
            curve = curvature(gradients, moved, parameters)
            change, doubt = curve.mean(0), noise(curve)
            length = moved.square().sum()
            guess = shared["loss"] + old.mean @ moved + moved @ change / 2
            certain = shared["loss_variance"] + old.variance * length + doubt * length / 4
            surprise = ((loss.mean - guess).square() - certain - loss.variance).clamp(min=0)
            loss = filtered(GaussianEstimate(guess, certain + surprise), loss)
            measured = filtered(GaussianEstimate(old.mean + change, old.variance + doubt), measured)
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
        """Update a bias-corrected running average and return it."""
        average = self.shared.get(name, torch.zeros_like(value)).lerp(value, 1 - decay)
        self.shared[name] = average
        return average / (1 - decay ** (done + 1))

    def keep(self, name: str, values: Tensor) -> None:
        """Store a vector over all weights in the states of their parameters."""
        parameters = self.parameters()
        parts = values.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            self.state[parameter][name] = part.view_as(parameter).clone()

    def whole(self, name: str) -> Tensor:
        """Return a vector over all weights stored by `retain_prompts`."""
        return torch.cat([self.state[parameter][name].flatten() for parameter in self.parameters()])


@torch.enable_grad()
def derivatives(values: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Compute the gradients [weights] of n values with respect to all weights, with a graph; 0 without dependence."""
    rows = []
    for value in values:
        gradients: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        if value.requires_grad:
            gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return rows


def curvature(gradients: Sequence[Tensor], direction: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Compute the Hessian-vector product [n, weights] of each sample with a direction [weights]."""
    with torch.enable_grad():
        # One by one: in a stacked tensor, each backward pass would run through the graphs of all samples.
        slopes = [gradient @ direction for gradient in gradients]
    return torch.stack(derivatives(slopes, parameters)).detach()


def noise(values: Tensor) -> Tensor:
    """Compute the variance of the mean of n samples [n, elements], averaged over the elements."""
    return values.var(0).mean() / len(values)
