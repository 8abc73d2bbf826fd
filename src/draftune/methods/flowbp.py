"""FlowBP-Sparse and FlowBP-Bridge (Wang et al., 2026, arXiv:2606.11075): gradient through a few sampled steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import BackpropMethod, Batch, register
from draftune.methods.draft import check_min
from draftune.methods.drtune import linear_path, require_no_dynamic_thresholding
from draftune.registry.factories import check_range
from draftune.sampling.sampler import ddim_step
from draftune.sampling.schedule import Prediction, Schedule

MAX_BIAS = 100.0
"""Largest `late_bias`; above it only the last steps have a probability that float64 can represent."""


class FlowBP(BackpropMethod):
    """Base class: x_0 is the sampler's, and its gradient goes through the k active steps.

    The network's input is detached at the active steps, or its gradient is multiplied by a discount. The sampler's
    linear path of x is not.
    """

    k: int
    late_bias: float
    grad_rescale: float

    starts_without_grad = True

    def __post_init__(self) -> None:
        check_range(
            "FlowBP", late_bias=(self.late_bias, 0, MAX_BIAS), grad_rescale=(self.grad_rescale, 0, float("inf"))
        )

    def check(self, schedule: Schedule) -> None:
        if (tuned := len(self.trained_steps(schedule))) < self.k:
            raise DraftuneError(
                f"FlowBP trains k={self.k} steps, but {tuned} of the {len(schedule)} steps (num_inference_steps) are "
                "fine-tuned: lower k, or extend lora_steps"
            )
        require_no_dynamic_thresholding(schedule)

    def backprops_multiple_calls(self) -> bool:
        return self.k > 1

    def active_steps(self, trained: list[int], generator: torch.Generator) -> dict[int, float]:
        """Sample the indices of the active steps, each with the discount of its input's gradient."""
        raise NotImplementedError

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        schedule, trained = batch.schedule, self.trained_steps(batch.schedule)
        active = self.active_steps(trained, batch.generator)
        weights = output_weights(schedule).abs()
        share = float(weights[trained].sum() / weights[sorted(active)].sum())
        factor = 1 + self.grad_rescale * (share - 1)
        first = min(active)
        x = batch.no_grad_latents(first)
        for i, step in enumerate(schedule.steps[first:], first):
            discount = active.get(i, 0.0)
            discounted = discount * x + (1 - discount) * x.detach() if discount else x.detach()
            with torch.set_grad_enabled(i in active):
                prediction = batch.denoise(discounted, step)
            if i in active:
                prediction = Prediction(*(scale_gradient(part, factor) for part in prediction))
            # The prediction has the linear path of `discounted`, times the factor. This adds what is missing of x's.
            x = ddim_step(linear_path(prediction, x - factor * discounted, step, schedule), step)
        yield x


@register("flowbp_sparse")
@dataclass(frozen=True)
class FlowBPSparse(FlowBP):
    """FlowBP-Sparse: k random steps, late ones more often, carry gradient to the weights but not to their input.

        P(i) ~ (i + 1)^late_bias, i = 0 the noisiest step;  k distinct steps
        d x_0 / d theta = f * sum over active i of  w_i d v_theta(stop_grad(x_i)) / d theta
        f = 1 + grad_rescale (sum_all |w| / sum_active |w| - 1)

    Wang et al., 2026, arXiv:2606.11075. v is the network's output, and w_i is its weight in x_0 along the sampler's
    linear path: sigma_s - sigma_t for flow models. The image is that of all T steps. As in DRTune, no product of
    Jacobians occurs.

    T - k denoiser calls without gradient and k with gradient. Use it to train all steps at a fixed cost. With
    `lora_steps`, the active steps are in the range.

    The defaults are those of the authors' code (RuoyuWang-2077/FlowBP, flowbp/trainers/flux1/flowbp_sparse.py). Their
    experiments use k of 3 and 4, a late_bias of 1 and 2, and a grad_rescale of 0, 0.5 and 1.

    Attributes:
        k: Number of steps with gradient, 1 to T. Default: 3.
        late_bias: Exponent of the probabilities, 0 or more; 0 is uniform. Default: 2.
        grad_rescale: How far the gradient is scaled towards that of all steps, 0 or more; 1: their sum of weights.
            Default: 0, no scaling.
    """

    k: int = 3
    late_bias: float = 2.0
    grad_rescale: float = 0.0

    def __post_init__(self) -> None:
        check_min("k", self.k, 1)
        super().__post_init__()

    def active_steps(self, trained: list[int], generator: torch.Generator) -> dict[int, float]:
        chances = (torch.tensor(trained, dtype=torch.float64) + 1) ** self.late_bias
        return dict.fromkeys((trained[i] for i in choose(chances, self.k, generator)), 0.0)


@register("flowbp_bridge")
@dataclass(frozen=True)
class FlowBPBridge(FlowBP):
    """FlowBP-Bridge: FlowBP-Sparse around a random step j, whose input carries a discounted gradient.

        d x_0 / d theta = f * sum over active i of  w_i d v_theta(x_i) / d theta
        the input x_j has the gradient  discount * d x_j / d theta;  all other inputs are detached

    Wang et al., 2026, arXiv:2606.11075. j is the later of two random steps. The k active steps are j, and others before
    and after it, in proportion to the number of steps there and at least one before it. Late steps are more frequent on
    either side: the probability of the i-th step there, i = 1, 2, ..., is proportional to i^late_bias. At most one
    Jacobian is in the gradient. w_i and f are those of `flowbp_sparse`.

    T - k denoiser calls without gradient and k with gradient. Use it as `flowbp_sparse`, where an early step should
    also learn what the network makes of its change. With `lora_steps`, all active steps are in the range.

    The defaults are those of the authors' code (RuoyuWang-2077/FlowBP, flowbp/trainers/flux1/flowbp_bridge.py), and
    discount is that of its FLUX.1 experiment. Their experiments use k of 3 and 5, a late_bias of 2 and 4, a
    grad_rescale of 0, 0.5 and 1, and a discount of 0.1, 0.5 and 1.

    Attributes:
        k: Number of steps with gradient, 2 to T. Default: 4.
        late_bias: Exponent of the probabilities, 0 or more; 0 is uniform. Default: 2.
        grad_rescale: How far the gradient is scaled towards that of all steps, 0 or more. Default: 0, no scaling.
        discount: Factor of the gradient through the network's input at j, 0 to 1; alpha in the paper. Default: 0.1.
    """

    k: int = 4
    late_bias: float = 2.0
    grad_rescale: float = 0.0
    discount: float = 0.1

    def __post_init__(self) -> None:
        check_min("k", self.k, 2)
        check_range("FlowBP", discount=(self.discount, 0, 1))
        super().__post_init__()

    def active_steps(self, trained: list[int], generator: torch.Generator) -> dict[int, float]:
        j = int(torch.randperm(len(trained), generator=generator)[:2].max())
        before, after = trained[:j], trained[j + 1 :]
        number_before = min(max(round(self.k * j / len(trained)), 1, self.k - 1 - len(after)), j, self.k - 1)
        chosen = [before[i] for i in self.late(len(before), number_before, generator)]
        chosen += [after[i] for i in self.late(len(after), self.k - 1 - number_before, generator)]
        return {**dict.fromkeys(chosen, 0.0), trained[j]: self.discount}

    def late(self, length: int, count: int, generator: torch.Generator) -> list[int]:
        """Sample `count` of `length` positions."""
        return choose(torch.arange(1, length + 1, dtype=torch.float64) ** self.late_bias, count, generator)


def choose(chances: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Sample `count` distinct positions in proportion to their chances [N]; all of them need no random number."""
    if count in (0, len(chances)):
        return list(range(count))
    return torch.multinomial(chances / chances.sum(), count, generator=generator).tolist()


def output_weights(schedule: Schedule) -> Tensor:
    """Return the weight of each step's network output in x_0 along the sampler's linear path [T]."""
    unclipped = replace(schedule, clip=None)
    x = torch.zeros(len(schedule), dtype=torch.float64)
    for i, step in enumerate(schedule.steps):
        output = torch.zeros_like(x)
        output[i] = 1
        x = ddim_step(unclipped.to_prediction(output, x, step), step, tau=step.noise_std or 0.0)
    return x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x with its gradient multiplied by a factor."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())
