"""Online Diffusion-DPO: a preference loss on pairs of sampled images that the reward ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, register
from draftune.methods.draft import check_min
from draftune.methods.groups import gathered, why_no_advantage
from draftune.methods.lora_copy import LoRACopy
from draftune.methods.policy_gradient import check_fraction, random_share
from draftune.sampling.schedule import Prediction


class Pairs(NamedTuple):
    """Pairs of images of a batch, of all processes: indices [P] of the better and the worse image of each."""

    better: Tensor
    worse: Tensor


@register("online_dpo")
@dataclass
class OnlineDPO(Method):
    """Online DPO: make the better of two sampled images more likely than the worse one, relative to a reference.

        e(x_0) = mean((F_theta(x_t) - F_true)^2) - mean((F_reference(x_t) - F_true)^2),   x_t = alpha x_0 + sigma eps
        loss = -mean over pairs and trained steps of  log sigmoid(-beta / 2 * (e(better) - e(worse)))

    Wallace et al., 2023, arXiv:2311.12908 (Diffusion-DPO), here on images that the fine-tuned model samples, as in the
    `dpo` of yifan123/flow_grpo (train_sd3_dpo.py). F is the network's output, and both images of a pair get the same
    noise eps. A group is the `num_images_per_prompt` images of a prompt; its best image is paired with its worst, the
    second best with the second worst and so on. A pair of equal rewards has no loss. The reference is a copy of the
    LoRA, at first the base model, which is replaced by the trained LoRA after every `reference_updates` updates.

    T denoiser calls without gradient; then for each trained step and inner epoch one with gradient and one of the
    reference. The reward needs no gradient, and only its order matters. The authors sample the noise level of each pair
    from the training levels with a logit-normal distribution; here it is one of the sampling steps for the batch.

    Attributes:
        beta: Strength of the pull to the reference, above 0: a low one allows larger changes. Default: 100, as in the
            authors' code for Stable Diffusion 3.5.
        pairs: Number of pairs of a group, 1 to half of `num_images_per_prompt`. Default: 1.
        reference_updates: Updates between two replacements of the reference; 0 keeps the base model. Default: 40, their
            value for online DPO.
        inner_epochs: Optimizer steps on the same images, 1 or more. Default: 1.
        timestep_fraction: Fraction of the sampling steps in the loss, sampled for each image batch and epoch, above 0
            and at most 1. Default: 1.
    """

    starts_without_grad = True
    needs_reward_gradient = False
    state_is_of_lora = True
    min_images_per_update = 2
    min_images_per_prompt = 2
    whole_groups_per_batch = True

    beta: float = 100.0
    pairs: int = 1
    reference_updates: int = 40
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    reference: LoRACopy = field(default_factory=LoRACopy, init=False, repr=False, compare=False)
    updates: int = field(default=0, init=False, repr=False, compare=False)
    no_pair: str = field(default="", init=False, repr=False, compare=False)
    """Explanation if no pair of the update has different rewards, else empty."""
    correct: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    """For each loss, whether the trained LoRA prefers the better image of each pair more than the reference [P]."""

    def __post_init__(self) -> None:
        check_min("pairs", self.pairs, 1)
        self.min_images_per_prompt = 2 * self.pairs
        check_min("reference_updates", self.reference_updates, 0)
        check_min("inner_epochs", self.inner_epochs, 1)
        check_fraction(self.timestep_fraction)
        if not 0 < self.beta < math.inf:
            raise DraftuneError(f"beta must be above 0 and finite, got {self.beta}")

    def backprops_multiple_calls(self) -> bool:
        return False

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        self.correct = []
        known, images, rewards = [], [], []
        for batch in batches:
            self.reference.start(batch.parameters)
            images.append(batch.no_grad_latents(len(batch.schedule)))
            with torch.no_grad():
                rewards.append(batch.reward(images[-1]))
            known.append(batch)
        scores = gathered(known, rewards)
        parts = scores.split([len(batch.all_prompts) for batch in known])
        pairs = [self.ranked(part, batch.images_per_prompt) for part, batch in zip(parts, known, strict=True)]
        self.no_pair = "" if any(len(part.better) for part in pairs) else why_no_advantage(scores)
        for _ in range(self.inner_epochs):
            yield (
                loss
                for batch, clean, part in zip(known, images, pairs, strict=True)
                for loss in self.batch_losses(batch, clean, part)
            )
        self.updates += 1
        if self.reference_updates and self.updates % self.reference_updates == 0:
            self.reference.move(known[0].parameters, 0.0)

    def ranked(self, rewards: Tensor, size: int) -> Pairs:
        """Pair the images of each group of `size` neighbors by their rewards [B], without pairs of equal rewards."""
        order = rewards.view(-1, size).argsort(dim=1, descending=True, stable=True)
        order = order + size * torch.arange(len(order), device=order.device)[:, None]
        better, worse = order[:, : self.pairs].flatten(), order.flip(1)[:, : self.pairs].flatten()
        differ = rewards[better] > rewards[worse]
        return Pairs(better[differ], worse[differ])

    def batch_losses(self, batch: Batch, clean: Tensor, pairs: Pairs) -> Iterator[Tensor]:
        """Yield for each trained step a scalar with the gradient of its loss, divided by the number of these steps.

        A pair's images may be in different processes. Its loss is a function of the two errors, so that the gradient is
        the sum of the errors' gradients, each times the derivative of the loss by it.
        """
        steps = self.trained_steps(batch.schedule)
        chosen = random_share(len(steps), self.timestep_fraction, batch.generator)
        groups = len(batch.all_prompts) // batch.images_per_prompt
        for i in chosen:
            step = batch.schedule.steps[steps[i]]
            eps = torch.randn((groups, *clean.shape[1:]), generator=batch.generator, dtype=clean.dtype)
            noise = batch.processes.shard(eps.repeat_interleave(batch.images_per_prompt, 0)).to(clean.device)
            x, truth = step.alpha * clean + step.sigma * noise, Prediction(clean, noise)
            with self.reference.in_use(batch.parameters):
                before = batch.schedule.output_difference(batch.denoise(x, step), truth, step)
            after = batch.schedule.output_difference(batch.denoise(x, step), truth, step)
            error = after.square().flatten(1).mean(1) - before.square().flatten(1).mean(1)
            errors = batch.processes.gather(error.detach()).requires_grad_()
            with torch.enable_grad():
                margin = -self.beta / 2 * (errors[pairs.better] - errors[pairs.worse])
                loss = -torch.nn.functional.logsigmoid(margin).sum() / (groups * self.pairs)
            (slopes,) = torch.autograd.grad(loss, errors)
            self.correct.append(margin.detach() > 0)
            # The gradients of the processes are averaged.
            yield (batch.processes.shard(slopes) * error).sum() * batch.processes.count / len(chosen)

    def metrics(self) -> dict[str, float]:
        seen = torch.cat([torch.zeros(0), *(part.float().cpu() for part in self.correct)])
        return {"preference_accuracy": float(seen.mean())}

    def explain_zero_gradient(self) -> str:
        return self.no_pair

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, **self.reference.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.reference.load_state_dict(state)
