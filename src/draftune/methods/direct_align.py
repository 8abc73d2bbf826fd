"""Direct-Align, the method of SRPO (Shen et al., 2025, arXiv:2509.06942): train any step of a re-noised image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, register
from draftune.registry.factories import check_range
from draftune.sampling.sampler import ddim_step
from draftune.sampling.schedule import Schedule, Step


@register("direct_align")
@dataclass(frozen=True)
class DirectAlign(Method):
    """Direct-Align: noise the image by a known noise, take one step, and subtract the rest of that noise exactly.

        x_t  = alpha_t stop_grad(x_0) + sigma_t eps,   eps the initial noise of x_0
        x_s  = alpha_s x_0_theta(x_t) + sigma_s eps_theta(x_t),   x_0' = (x_s - sigma_s eps) / alpha_s
        loss = -r(x_0' of the step to less noise) + r(x_0' of the step to more noise)

    Shen et al., 2025, arXiv:2509.06942. t is one random step of the range, sampled for the batch. s is the next noise
    level below t in the first loss, and the one above t in the second. For flow models x_0' is x_0 plus
    (sigma_s - sigma_t) / alpha_s times the error of the velocity. So the reward scores a sharp image at any noise
    level. The second loss is the paper's inversion branch: a change of the output that raises r on the way to less
    noise lowers it on the way to more noise.

    T denoiser calls without gradient and 2 with gradient, each in a graph of its own; 2 reward queries an image. Use
    it to train early steps at a fixed cost. SRPO is this method with the reward `relative(REWARD, good=…, bad=…)`. In
    the authors' code the inversion branch exchanges the good and the bad words; here the reward is negated, which is
    equal for a strength of 0. Their loss ends at a reward of 0.7; this one does not end.

    The defaults are those of the authors' code (Tencent-Hunyuan/SRPO, fastvideo/SRPO.py): noise levels 5 to 25 of 50,
    and a step of 0.1 of that range. Here it is one sampling step, which is 0.1 of the range for T = 25.

    Attributes:
        first: Start of the range, as a fraction of the sampling steps, 0 to 1. Default: 0.1.
        last: End of the range, above `first`, at most 1. Default: 0.5.
        inversion: Whether the second loss is used. Default: True.
    """

    starts_without_grad = True

    first: float = 0.1
    last: float = 0.5
    inversion: bool = True

    def __post_init__(self) -> None:
        check_range("direct_align", first=(self.first, 0, 1), last=(self.last, 0, 1))
        if not self.first < self.last:
            raise DraftuneError(f"first must be below last, got first={self.first} and last={self.last}")

    def check(self, schedule: Schedule) -> None:
        if not self.trained_steps(schedule):
            raise DraftuneError(
                f"direct_align trains no step: none of the {len(schedule)} steps (num_inference_steps) is between "
                f"first={self.first} and last={self.last}, in lora_steps, and below a level with a signal: raise "
                "num_inference_steps or last, or extend lora_steps"
            )

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        count, levels = len(schedule), [step.alpha for step in schedule.steps]
        steps = range(round(self.first * count), round(self.last * count))
        # The step to more noise ends at the level before, where x_0' needs a signal.
        return [i for i in steps if not self.inversion or (i > 0 and levels[i - 1] > 0)]

    def prefix_is_reusable(self) -> bool:
        return True

    def backprops_multiple_calls(self) -> bool:
        return False

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            steps, trained = batch.schedule.steps, self.trained_steps(batch.schedule)
            clean = batch.no_grad_latents(len(steps))
            i = trained[int(torch.randint(0, len(trained), (), generator=batch.generator))]
            yield -batch.reward(recovered(batch, clean, steps[i], steps[i].alpha_next, steps[i].sigma_next)).mean()
            if self.inversion:
                yield batch.reward(recovered(batch, clean, steps[i], steps[i - 1].alpha, steps[i - 1].sigma)).mean()


def recovered(batch: Batch, clean: Tensor, step: Step, alpha: float, sigma: float) -> Tensor:
    """Noise the latents x_0 to `step`, step to the level (alpha, sigma), and subtract the noise that is left.

    Args:
        clean: The latents x_0 [B, C, H, W], without graph.
    """
    noise = batch.noise / batch.schedule.initial_scale
    x = step.alpha * clean + step.sigma * noise
    moved = ddim_step(batch.denoise(x, step), step._replace(alpha_next=alpha, sigma_next=sigma), tau=0.0)
    return (moved - sigma * noise) / alpha
