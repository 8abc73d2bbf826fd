"""The interface of a fine-tuning method. To add a method, follow docs/how-to/add-a-method.md.

A method decides which denoiser calls carry gradient. The trainer does the rest of an update:

    for losses in method.losses_per_step(batches):  # one pass, unless the same images serve several optimizer steps
        optimizer.zero_grad()
        for loss in losses:
            (loss / gradient_accumulation_steps).backward()  # gradients of the LoRA add up
        clip_gradients()
        optimizer.step()

A subclass overrides the first of these functions that fits:

- `BackpropMethod.samples`: yield differentiable clean latents. The loss is minus their mean reward (DRaFT, ReFL).
- `Method.losses`: yield any scalar losses of fresh batches (Adjoint Matching).
- `Method.losses_per_step`: take several optimizer steps on the same images (DDPO).

Rule: at most one graph is alive. The trainer runs the backward pass of a loss before it requests the next one, so
build each graph just before its `yield`. Run denoiser calls that need no gradient under `torch.no_grad()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from draftune.registry.factories import add_factory
from draftune.sampling.sampler import Denoiser, PrefixCache
from draftune.sampling.schedule import Schedule
from draftune.utils.processes import SINGLE_PROCESS, Processes


@dataclass
class Batch:
    """What a method gets for B prompts: initial noise, denoisers, and the reward of clean latents.

    With several processes, each holds its share of the batch, and B is the size of the share. Random numbers are
    sampled for the whole batch in every process, so that a run does not depend on the number of processes.
    """

    prompts: Sequence[str]
    """B prompts."""
    prefix_cache: PrefixCache
    """Cache of the latents computed without gradient, beginning with the initial noise.

    Updates share the cache where `prefix_reuse_steps` is above 1.
    """
    schedule: Schedule
    """The T sampling steps from noise to image, and the denoiser's prediction type."""
    denoise: Denoiser
    """Denoiser with the LoRA and classifier-free guidance: (x [B, C, H, W], step) to (x_0, noise), of x's shape.

    At steps that are not `tuned` it has no LoRA, and no weight gets a gradient there.
    """
    base_denoise: Denoiser
    """Denoiser of the base model, as `denoise` without the LoRA that is trained."""
    reward: Callable[..., Tensor]
    """Compute the rewards [B] of clean latents [B, C, H, W], with a graph if the latents have one.

    Every call counts as B reward queries. The log shows the rewards of the first call of a batch. An optional second
    argument [B, S] passes the rewards that the method predicted at S steps; only online rewards read it.
    """
    generator: torch.Generator
    """Random numbers of the run, on the CPU and in the same state in every process.

    Use it for every random choice. Then a seed means the same on each device, and an interrupted run resumes exactly.
    """
    processes: Processes = SINGLE_PROCESS
    """Collective operations among the processes that train together."""
    all_prompts: Sequence[str] = ()
    """Prompts of the whole batch, of all processes. Default: `prompts`."""
    retention_batch: Batch | None = None
    """B retention prompts, on which the model should not change; None if the run has none."""
    images_per_prompt: int = 1
    """Images of a group: each prompt of the update occurs this many times in a row, maybe across batches."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """The trained tensors of the LoRA by name. `LoRACopy` samples with others in their place."""
    prefix_mode: Callable[[Denoiser, Schedule], AbstractContextManager[Denoiser]] = lambda exact, _: nullcontext(exact)
    """Context in which the prefix is sampled; its value replaces the denoiser (see `PrefixMode`)."""
    sample_prefix: Callable[[int], None] | None = None
    """Cache the latents after a number of steps, of this batch and others together; None samples this one alone."""

    def __post_init__(self) -> None:
        self.all_prompts = self.all_prompts or self.prompts

    @property
    def noise(self) -> Tensor:
        """Initial noise x_T [B, C, H, W], sampled from N(0, I)."""
        return self.prefix_cache.latents[0]

    def no_grad_latents(self, count: int) -> Tensor:
        """Run the first `count` sampling steps without gradient and return the latent after them [B, C, H, W].

        These steps are the prefix. The result is cached, so that a second call with the same `count` is free.
        """
        if count in self.prefix_cache.latents:
            return self.prefix_cache.latents[count]
        if self.sample_prefix is not None:
            self.sample_prefix(count)
            return self.prefix_cache.latents[count]
        with torch.no_grad(), self.prefix_mode(self.denoise, self.schedule) as denoise:
            return self.prefix_cache.get(count, denoise, self.schedule.steps)

    def randn_like(self, like: Tensor) -> Tensor:
        """Sample N(0, I) in the shape [B, ...], dtype and device of `like`."""
        shape = (len(like) * self.processes.count, *like.shape[1:])
        noise = torch.randn(shape, generator=self.generator, dtype=like.dtype)
        return self.processes.shard(noise).to(like.device)


class Method:
    """Base class of fine-tuning methods, independent of the model family and of the reward.

    A method yields scalar losses; the trainer accumulates their gradients. The attributes and the remaining functions
    describe the method to the trainer.
    """

    needs_reward_gradient: bool = True
    """Whether the method differentiates the reward.

    If False, the trainer accepts rewards without a gradient and refuses settings that only act on the gradient.
    """
    state_is_of_lora: bool = False
    """Whether the method's state is a copy of the LoRA, which stays valid if the reward or the image size changes."""
    supports_fp16: bool = True
    """Whether the method works in fp16; if False, the trainer refuses `mixed_precision="fp16"`.

    Set it to False for a method that calls `torch.autograd.grad` itself. The trainer's gradient scaler cannot scale
    such gradients, and small ones become 0 in fp16.
    """
    starts_without_grad: bool = False
    """Whether sampling starts with `Batch.no_grad_latents`, which `prefix_stride` and other settings make cheaper."""
    min_images_per_update: int = 1
    """Minimum of `batch_size` times `gradient_accumulation_steps`: 2 if rewards of an update are compared."""
    min_images_per_prompt: int = 1
    """Minimum of `num_images_per_prompt`: 2 if the images of a prompt are compared."""
    whole_groups_per_batch: bool = False
    """Whether all images of a prompt must be in one batch (`Batch.images_per_prompt`)."""

    def check(self, schedule: Schedule) -> None:
        """Raise DraftuneError if the method's settings do not fit the schedule, such as k > T."""

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        """Return the indices of the steps whose call can carry gradient to the weights, in any update. Default: all.

        The trainer refuses `lora_steps` that holds none of them.
        """
        return range(len(schedule))

    def trained_steps(self, schedule: Schedule) -> list[int]:
        """Return those indices of `steps_with_gradient` that are steps of the fine-tuned model (`Step.tuned`)."""
        return [i for i in self.steps_with_gradient(schedule) if schedule.steps[i].tuned]

    def prefix_is_reusable(self) -> bool:
        """Return whether the prefix ends at the same step in every update; allows `prefix_reuse_steps` above 1.

        Return False if that step is random: a later update would continue latents that older weights made.
        """
        return False

    def backprops_multiple_calls(self) -> bool:
        """Return whether the graph of one loss holds several denoiser calls.

        If True, gradient checkpointing also recomputes whole calls by default, so that the memory of one call suffices.
        """
        return True

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Yield scalar losses, each a mean over the images of one batch.

        The trainer runs the backward pass of a loss before it requests the next, so that one graph is in memory.

        Args:
            batches: The fresh batches of one optimizer step, `gradient_accumulation_steps` of them, made on request.
        """
        raise NotImplementedError

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        """Yield the losses of each optimizer step of one update. Default: one step on `losses(batches)`.

        What follows a `yield` runs after that optimizer step.
        """
        yield self.losses(batches)

    def metrics(self) -> dict[str, float]:
        """Return named numbers of the last update for metrics.jsonl. The trainer calls this in every process."""
        return {}

    def explain_zero_gradient(self) -> str:
        """Explain why the losses do not depend on the weights, and suggest a remedy; empty if they do.

        The trainer calls this in every process if a gradient is exactly 0. It prints the explanation once and
        continues. With an empty string it ends the run if a tensor still had no gradient after the first updates.
        """
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next update needs, as tensors and values that JSON can represent."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""


class BackpropMethod(Method, ABC):
    """Method that backpropagates the reward through sampled latents to the weights.

    loss = -mean_b r(x_0[b], prompt[b])
    """

    @abstractmethod
    def samples(self, batch: Batch) -> Iterator[Tensor]:
        """Yield clean latents [B, C, H, W] with a graph. The first must be sampled from `batch.noise`: it is logged."""

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            for clean in self.samples(batch):
                yield -batch.reward(clean).mean()


class MethodWrapper(Method):
    """Base class of methods that wrap another method and add a loss. All other behavior is that of the wrapped one."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.needs_reward_gradient, self.supports_fp16 = method.needs_reward_gradient, method.supports_fp16
        self.min_images_per_update = method.min_images_per_update
        self.min_images_per_prompt = method.min_images_per_prompt
        self.whole_groups_per_batch = method.whole_groups_per_batch
        self.state_is_of_lora = method.state_is_of_lora
        self.starts_without_grad = method.starts_without_grad

    def check(self, schedule: Schedule) -> None:
        self.method.check(schedule)

    def steps_with_gradient(self, schedule: Schedule) -> Sequence[int]:
        return self.method.steps_with_gradient(schedule)

    def prefix_is_reusable(self) -> bool:
        return self.method.prefix_is_reusable()

    def backprops_multiple_calls(self) -> bool:
        return self.method.backprops_multiple_calls()

    def metrics(self) -> dict[str, float]:
        return self.method.metrics()

    def explain_zero_gradient(self) -> str:
        return self.method.explain_zero_gradient()

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)


METHODS: dict[str, type[Method]] = {}
"""Registered methods by name. `draftune.methods.all_methods` adds the experimental ones."""
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Register a Method by name for `--method` and `load_method`. `draftune list methods` shows its docstring.

    Raises:
        DraftuneError: the name is no Python identifier, or that of another method.
    """

    def add(cls: M) -> M:
        add_factory(METHODS, name, cls, "method")
        return cls

    return add
