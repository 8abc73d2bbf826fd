"""The interface of a method and the table of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from draftune.sampling.sampler import Denoiser, Latents
from draftune.sampling.schedule import Schedule
from draftune.utils.processes import ALONE, Processes


@dataclass
class Batch:
    """Prompts with the noise their pictures start from, and what a method may ask about them.

    Where several processes train, it is this one's part of a batch; each draws random numbers for all of it and takes
    its own, so that a run does not depend on how many they are.
    """

    prompts: Sequence[str]
    latents: Latents
    """From their noise on; several updates may share them."""
    schedule: Schedule
    denoise: Denoiser
    """The guided network with the weights that are trained."""
    base: Denoiser
    """The guided network as it was before training."""
    reward: Callable[..., Tensor]
    """Clean latents [B, C, H, W] to B rewards. Every call is counted; what is logged is the batch's first.

    A second argument [B, S], what the method expected of each at each of S steps, is for a reward that learns.
    """
    generator: torch.Generator
    """On the CPU, so that a seed means the same on every device; in the same state in every process."""
    processes: Processes = ALONE
    all_prompts: Sequence[str] = ()
    """Those of the other processes too."""
    kept: Batch | None = None
    """As many of the prompts on which the model is to stay as it was, where there are any."""

    def __post_init__(self) -> None:
        self.all_prompts = self.all_prompts or self.prompts

    @property
    def noise(self) -> Tensor:
        """[B, C, H, W], N(0, I)."""
        return self.latents.known[0]

    def without_graph(self, count: int) -> Tensor:
        """The latent after the first `count` steps, as a leaf: these steps keep nothing for the backward pass."""
        return self.latents.after(count, self.denoise, self.schedule.steps)

    def fresh_noise(self, like: Tensor) -> Tensor:
        """N(0, I) in the shape of `like`, [B, …]."""
        shape = (len(like) * self.processes.count, *like.shape[1:])
        noise = torch.randn(shape, generator=self.generator, dtype=like.dtype)
        return self.processes.share(noise).to(like.device)


class Method:
    """Says what is to be made smaller, in losses whose gradients the trainer adds up; it knows no model or reward.

    A subclass writes `losses`, or `optimizer_steps` where the same pictures serve more than one step.
    """

    needs_gradient: bool = True
    """Whether the reward's gradient is used."""
    half_precision: bool = True
    """Whether it works in fp16, where gradients that the trainer's scaler does not see vanish."""
    min_images_per_update: int = 1
    """Least number of images of one update: 2 for a method that compares the rewards of an update with each other."""

    def check(self, schedule: Schedule) -> None:
        """Raises DraftuneError where the method's settings do not fit the schedule."""

    def has_prefix(self) -> bool:
        """Whether it begins with `Batch.without_graph`, whose steps `prefix_stride` can make larger."""
        return False

    def shares_prefix(self) -> bool:
        """Return whether that prefix ends at the same step in every update, so that updates can share its latents.

        Where the step is drawn at random, a later update would continue latents that older weights made.
        """
        return False

    def spans_calls(self) -> bool:
        """Whether one loss's graph holds several calls of the denoiser, which are then recomputed one at a time."""
        return True

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Scalar losses of fresh batches, which are drawn as they are asked for; each is the mean over one batch.

        The caller is done with one loss's graph before it asks for the next, so that one graph lives at a time.
        """
        raise NotImplementedError

    def optimizer_steps(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        """For each of the optimiser's steps that one update makes, its losses."""
        yield self.losses(batches)

    def report(self) -> dict[str, float]:
        """Return numbers about the last update by name, for its row of metrics.jsonl; called in every process."""
        return {}

    def constant_losses(self) -> str:
        """Return why the losses of the last optimizer step do not depend on the weights, and what helps.

        Empty where they do. Called in every process after the losses were consumed, where the gradient is exactly 0.
        """
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from one update to the next: what JSON can hold, and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class RewardGradient(Method, ABC):
    """Draws differentiable clean latents; the reward's gradient flows back through them to the weights."""

    @abstractmethod
    def samples(self, batch: Batch) -> Iterator[Tensor]:
        """Clean latents [B, C, H, W] with a graph, the first of them the sample drawn from the batch's noise."""

    def losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            for clean in self.samples(batch):
                yield -batch.reward(clean).mean()


class Around(Method):
    """A method that adds to another one's losses, and is in all else what that one is."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.needs_gradient, self.half_precision = method.needs_gradient, method.half_precision
        self.min_images_per_update = method.min_images_per_update

    def check(self, schedule: Schedule) -> None:
        self.method.check(schedule)

    def has_prefix(self) -> bool:
        return self.method.has_prefix()

    def shares_prefix(self) -> bool:
        return self.method.shares_prefix()

    def spans_calls(self) -> bool:
        return self.method.spans_calls()

    def report(self) -> dict[str, float]:
        return self.method.report()

    def constant_losses(self) -> str:
        return self.method.constant_losses()

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Makes a Method known by name to the command line and to `load_method`. Its docstring is its description."""

    def add(cls: M) -> M:
        METHODS[name] = cls
        return cls

    return add
