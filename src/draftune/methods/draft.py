"""DRaFT, DRaFT-K, DRaFT-LV (Clark et al., 2023, arXiv:2309.17400, Algorithm 1), ReFL and AlignProp.

All of them maximize E[r(x_0, prompt)] by backpropagation through the end of the sampling trajectory. They differ in
the truncation, the step before which the gradient is stopped. With T sampling steps and sampled from x_T to x_0:

    method      calls with gradient    truncation
    draft       T                      none
    draft_k     k                      before the last k steps
    draft_lv    1 + n                  before the last step, and at n re-noised copies of the image
    refl        1                      before one of the last m steps, at random; then a jump to x_0
    alignprop   K <= m                 before the last k steps, k at random

The steps before the truncation are the prefix. They run without gradient (`Batch.no_grad_latents`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.methods.base import BackpropMethod, Batch, register
from draftune.sampling.sampler import ddim_step, rollout
from draftune.sampling.schedule import Schedule


def check_max(name: str, value: int, schedule: Schedule) -> None:
    """Raise DraftuneError if a setting that counts sampling steps is above T."""
    if value > len(schedule):
        raise DraftuneError(
            f"{name} must be at most num_inference_steps={len(schedule)}, got {name}={value}: lower {name}, or set "
            f"num_inference_steps to {value} or more"
        )


def check_min(name: str, value: int, bound: int) -> None:
    """Raise DraftuneError if a setting is not an integer of at least `bound`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise DraftuneError(f"{name} must be a whole number of at least {bound}, got {value!r}")


def last_steps(count: int, schedule: Schedule) -> range:
    """Return the indices of the last `count` steps."""
    return range(len(schedule) - count, len(schedule))


@register("draft")
@dataclass(frozen=True)
class Draft(BackpropMethod):
    """DRaFT: the gradient flows through all T sampling steps.

        grad = d r(x_0) / d theta,  x_0 = sample(x_T, prompt; theta)

    Clark et al., 2023, arXiv:2309.17400, Algorithm 1 with K = T. T denoiser calls, all with gradient. Use it as a
    reference for DRaFT-K. The term of an early step is a product of many Jacobians, so its norm can grow fast.
    """

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        yield rollout(batch.denoise, batch.schedule.steps, batch.noise)


@register("draft_k")
@dataclass(frozen=True)
class DraftK(BackpropMethod):
    """DRaFT-K: the gradient flows through the last k sampling steps.

        grad = d r(x_0) / d theta,  with stop_grad(x_k) before the last k steps

    Clark et al., 2023, arXiv:2309.17400, Algorithm 1. T - k denoiser calls without gradient and k with gradient.
    k = 1 is the cheapest and the most stable, k = T is full DRaFT. Use a larger k for rewards of layout.

    Attributes:
        k: Number of last steps with gradient, 1 to T. Default: 1.
    """

    starts_without_grad = True

    k: int = 1

    def __post_init__(self) -> None:
        check_min("k", self.k, 1)

    def check(self, schedule: Schedule) -> None:
        check_max("k", self.k, schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return last_steps(self.k, schedule)

    def prefix_is_reusable(self) -> bool:
        return True

    def backprops_multiple_calls(self) -> bool:
        return self.k > 1

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        prefix = len(batch.schedule) - self.k
        yield rollout(batch.denoise, batch.schedule.steps[prefix:], batch.no_grad_latents(prefix))


@register("draft_lv")
@dataclass(frozen=True)
class DraftLV(BackpropMethod):
    """DRaFT-LV: DRaFT-1 with n more terms from re-noised copies of the image, for a gradient of lower variance.

        x_1  = alpha_1 stop_grad(x_0) + sigma_1 eps,  eps ~ N(0, I)
        x_0' = (x_1 - sigma_1 eps_theta(x_1)) / alpha_1
        grad = d r(x_0) / d theta + sum over n copies of d r(x_0') / d theta

    Clark et al., 2023, arXiv:2309.17400, Algorithm 1 ("LV"). T - 1 denoiser calls without gradient and 1 + n with
    gradient, each in a graph of its own; 1 + n reward queries an image. Use it if T is much larger than n and the
    reward is cheap. The gradients are added: with AdamW, a mean would only differ in gradient clipping and eps.

    Attributes:
        n: Number of re-noised copies of each image, 0 or more. Default: 2, as in the paper. 0 is DRaFT-1.
    """

    starts_without_grad = True

    n: int = 2

    def __post_init__(self) -> None:
        check_min("n", self.n, 0)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return last_steps(1, schedule)

    def prefix_is_reusable(self) -> bool:
        return True

    def backprops_multiple_calls(self) -> bool:
        return False

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        last = batch.schedule.steps[-1]
        clean = rollout(batch.denoise, [last], batch.no_grad_latents(len(batch.schedule) - 1))
        yield clean
        clean = clean.detach()
        for _ in range(self.n):
            x = last.alpha * clean + last.sigma * batch.randn_like(clean)
            yield batch.denoise(x, last).clean


@register("refl")
@dataclass(frozen=True)
class ReFL(BackpropMethod):
    """ReFL: sampling stops at one of the last m steps, and the reward scores the x_0 predicted there.

        t ~ uniform{1, ..., m},  grad = d r(x_0_theta(stop_grad(x_t))) / d theta

    Xu et al., 2023, arXiv:2304.05977; here as in Clark et al., 2023, arXiv:2309.17400, Algorithm 1. One t is sampled
    for the whole batch. T - t denoiser calls without gradient and 1 with gradient. Use it to train earlier steps at
    the cost of DRaFT-1. With a large m the reward sees a blurred prediction. With m = 1, and a schedule that ends at
    sigma = 0, it is DRaFT-1. With `lora_steps`, t is uniform over the last m steps that are in the range.

    Attributes:
        m: Number of last steps at which sampling may stop, 1 to T. Default: 20, as in Clark et al.
    """

    starts_without_grad = True

    m: int = 20

    def __post_init__(self) -> None:
        check_min("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        check_max("m", self.m, schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return last_steps(self.m, schedule)

    def prefix_is_reusable(self) -> bool:
        return self.m == 1

    def backprops_multiple_calls(self) -> bool:
        return False

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        stops = self.trained_steps(batch.schedule)
        prefix = stops[-int(torch.randint(1, len(stops) + 1, (1,), generator=batch.generator))]
        yield batch.denoise(batch.no_grad_latents(prefix), batch.schedule.steps[prefix]).clean


CUTS = ("normal", "uniform")
"""Distributions of the number of steps with gradient in AlignProp."""


@register("alignprop")
@dataclass(frozen=True)
class AlignProp(BackpropMethod):
    """AlignProp: DRaFT-K with a random k (randomized truncated backpropagation).

        cut=normal:   k = T - int(N(0.84 T, 0.1 T)), sampled again until 1 <= k <= m, one for the batch
        cut=uniform:  k ~ uniform{1, ..., m}, one for each image

    Prabhudesai et al., 2023, arXiv:2310.03739. With K the largest k of the batch, T - K denoiser calls run without
    gradient and K with gradient. Use it to train several depths without choosing k. With `lora_steps`, a smaller k than
    the one that reaches the range is raised to it.

    `normal` is the default of the authors' code, N(42, 5) for T = 50 (mihirp1998/AlignProp,
    config/alignprop_config.py lines 111-112, sd_pipeline.py lines 124-132 and 224). `uniform` follows the paper; the
    authors' code samples one k for the batch there too.

    Attributes:
        cut: Distribution of k, `normal` or `uniform`. Default: `normal`.
        m: Largest k, 1 to T. Default: T - 1.
    """

    starts_without_grad = True

    cut: str = "normal"
    m: int | None = None

    def __post_init__(self) -> None:
        if self.cut not in CUTS:
            raise unknown("cut of alignprop", str(self.cut), CUTS)
        if self.m is not None:
            check_min("m", self.m, 1)

    def check(self, schedule: Schedule) -> None:
        if self.m is not None:
            check_max("m", self.m, schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return last_steps(self.largest(len(schedule)), schedule)

    def prefix_is_reusable(self) -> bool:
        return self.m == 1

    def backprops_multiple_calls(self) -> bool:
        return self.m != 1

    def largest(self, steps: int) -> int:
        """Return the largest k of T = `steps`."""
        return self.m or max(1, steps - 1)

    def draw(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """Sample the number of last steps with gradient, 1 to m of T = `steps`, for `count` images [count]."""
        largest = self.largest(steps)
        if self.cut == "uniform":
            return torch.randint(1, largest + 1, (count,), generator=generator)
        while True:
            k = steps - int((0.84 + 0.1 * float(torch.randn((), generator=generator))) * steps)
            if 1 <= k <= largest:
                return torch.full((count,), k)

    def samples(self, batch: Batch) -> Iterator[Tensor]:
        shortest = len(batch.schedule) - self.trained_steps(batch.schedule)[-1]
        lengths = self.draw(len(batch.all_prompts), len(batch.schedule), batch.generator).clamp(min=shortest)
        # The largest k of all processes: sharded weights need the same number of denoiser calls in each of them.
        prefix = len(batch.schedule) - int(lengths.max())
        own = batch.processes.shard(lengths).to(batch.noise.device)
        x = batch.no_grad_latents(prefix)
        # In the paper only the network's output is detached before the truncation. Nothing else in x depends on the
        # weights there, so detaching x gives the same gradient.
        for i, step in enumerate(batch.schedule.steps[prefix:], prefix):
            truncated_here = (own == len(batch.schedule) - i)[:, None, None, None]
            x = torch.where(truncated_here, x.detach(), x)
            x = ddim_step(batch.denoise(x, step), step)
        yield x
