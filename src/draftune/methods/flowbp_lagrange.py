"""FlowBP-Lagrange (Wang et al., 2026, arXiv:2606.11075): two leaps by Lagrange quadrature of cached velocities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import BackpropMethod, Batch, register
from draftune.methods.draft import check_min
from draftune.methods.flowbp import scale_gradient
from draftune.methods.leapalign import straight_through
from draftune.registry.factories import check_range
from draftune.sampling.sampler import ddim_step
from draftune.sampling.schedule import Schedule

MOST_RESCALED = 100.0
"""Highest ratio of all weights to the active ones by which a gradient is scaled."""


@register("flowbp_lagrange")
@dataclass(frozen=True)
class FlowBPLagrange(BackpropMethod):
    """FlowBP-Lagrange: LeapAlign's two leaps x_k -> x_j -> x_0, with the weights of a quadrature of higher order.

        leap(x_a -> b) = x_a + sum over supports i of  w_i v_theta(x_i),  w_i = integral from sigma_a to sigma_b of L_i
        d leap = d x_a + f * sum over active i of  w_i c_i d v_theta(x_i),  c_a = 1 and c_i = support_scale otherwise
        f = 1 + grad_rescale (min(sum_all |w| / sum_active |w|, 100) - 1)

    Wang et al., 2026, arXiv:2606.11075. v is the velocity of a flow model. The supports are `order` evenly spaced steps
    from a on, and L_i is the Lagrange polynomial that is 1 at sigma_i and 0 at the other supports. The first `active`
    supports carry gradient to the weights. The input of the second leap has the gradient discount * d x_j, all other
    inputs are detached. The image is that of all T steps. `order=1` is LeapAlign.

    T - 2 * active denoiser calls without gradient and at most 2 * active with gradient. Use it as `leapalign`, where
    leaps are long. With `lora_steps`, k and j are in the range. The image's weight by the error of the leaps, and the
    choice of k and j by a Dirichlet distribution, are not implemented: k and j are two random steps.

    The defaults are those of the authors' code (RuoyuWang-2077/FlowBP, flowbp/trainers/flux1/flowbp_lagrange.py), and
    discount is that of its experiments. These use an order of 3, 2 active supports, a support_scale of 0.25 and, with
    FLUX.1, a grad_rescale of 0.5.

    Attributes:
        order: Number of supports of each leap, 1 or more. Default: 4.
        active: Number of supports with gradient, 1 to order. Default: 1.
        support_scale: Factor of the gradient at active supports but the first one, 0 to 1. Default: 1.
        grad_rescale: How far the gradient is scaled towards that of all supports, 0 or more. Default: 0, no scaling.
        discount: Factor of the gradient through the second leap's network input, 0 to 1. Default: 0.1.
    """

    starts_without_grad = True

    order: int = 4
    active: int = 1
    support_scale: float = 1.0
    grad_rescale: float = 0.0
    discount: float = 0.1

    def __post_init__(self) -> None:
        check_min("order", self.order, 1)
        check_range(
            "FlowBP",
            active=(self.active, 1, self.order),
            support_scale=(self.support_scale, 0, 1),
            grad_rescale=(self.grad_rescale, 0, math.inf),
            discount=(self.discount, 0, 1),
        )

    def check(self, schedule: Schedule) -> None:
        if schedule.prediction_type != "flow" or schedule.num_noises:
            raise DraftuneError(
                "flowbp_lagrange is for flow models whose sampler adds no noise: use leapalign or flowbp_sparse"
            )
        if (tuned := len(self.trained_steps(schedule))) < 2:
            raise DraftuneError(
                f"flowbp_lagrange trains 2 steps or more, but {tuned} of the {len(schedule)} steps "
                "(num_inference_steps) are fine-tuned: sample more steps, or extend lora_steps"
            )

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        steps, tuned = batch.schedule.steps, self.trained_steps(batch.schedule)
        k, j = (tuned[i] for i in torch.randperm(len(tuned), generator=batch.generator)[:2].sort().values.tolist())
        x = batch.no_grad_latents(k)
        for start, end in ((k, j), (j, len(steps))):
            points = supports(start, end, self.order)
            sigmas = [steps[i].sigma for i in points]
            weights = dict(
                zip(points, lagrange_weights(sigmas, steps[start].sigma, steps[end - 1].sigma_next), strict=True)
            )
            active = [i for i in points[: self.active] if i in tuned]
            every, used = (sum(abs(weights[i]) for i in chosen) for chosen in (points, active))
            # Of two or four evenly spaced levels, the first one has the weight 0.
            factor = 1 + self.grad_rescale * (every / max(used, every / MOST_RESCALED) - 1)
            path, value = x, x.detach()
            for i in range(start, end):
                seen = scale_gradient(x, self.discount) if i == start else value
                with torch.set_grad_enabled(i in active):
                    prediction = batch.denoise(seen, steps[i])
                if i in active:
                    scale = factor if i == start else factor * self.support_scale
                    path = path + scale * weights[i] * (prediction.noise - prediction.clean)
                value = ddim_step(prediction, steps[i]).detach()
            x = straight_through(path, value)
        yield x


def supports(start: int, end: int, order: int) -> list[int]:
    """Return at most `order` evenly spaced steps from `start` to `end` - 1, the first one included."""
    if end - start <= order:
        return list(range(start, end))
    return [start + int(i) for i in torch.linspace(0, end - start - 1, order).round()]


def lagrange_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """Return the integral from start to end of each Lagrange polynomial of the points."""
    weights = []
    for i, point in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        polynomial = math.prod((Polynomial([-other, 1]) / (point - other) for other in others), start=Polynomial([1]))
        integral = polynomial.integ()
        weights.append(float(integral(end) - integral(start)))
    return weights
