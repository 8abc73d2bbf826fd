"""Batches of training: the order of prompts, and the noise and prefix that a batch starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from draftune.sampling.sampler import PrefixCache
from draftune.utils.processes import Processes


@dataclass
class BatchInput:
    """Prompts and noise of a batch, over all processes. With `prefix_reuse_steps`, several updates share one."""

    prompt_indices: list[int]
    """Indices of the prompts."""
    noise: Tensor
    """Initial noise [B, C, H, W]."""
    prefix_cache: PrefixCache
    """This process's share of the noise, and of the latents that the prefix has reached."""
    fresh_noise: list[Tensor] = field(default_factory=list)
    """This process's share of the noise that a stochastic sampler adds, [B, C, H, W] for each step that adds some."""
    retained: BatchInput | None = None
    """The batch of the retention loss, if there is one."""

    def renewed(self) -> BatchInput:
        """Return the same prompts and noise without the latents that the prefix has reached."""
        cache = PrefixCache(self.prefix_cache.latents[0], stride=self.prefix_cache.stride)
        return replace(self, prefix_cache=cache, retained=self.retained and self.retained.renewed())


@dataclass
class BatchRecord:
    """A batch as one update trained on it, over all processes."""

    prompts: list[str]
    noise: Tensor
    """Initial noise [B, C, H, W]."""
    images: Tensor | None = None
    """Images of this process's share, [B / processes, 3, H, W], once they are scored."""
    reward: Tensor | None = None
    """Total rewards [B]."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Rewards [B] of each term, by label, before their weights."""
    teaches: bool = True
    """Whether online rewards learn from the batch; not where its gradient is computed once more."""


class PromptSampler:
    """An endless stream of prompt indices: random permutations of all prompts, one after the other.

    Args:
        count: Number of prompts.
        generator: Random numbers for the permutations.
        repeats: How often each index follows itself in the stream: the images of a prompt that form a group.
    """

    def __init__(self, count: int, generator: torch.Generator, repeats: int = 1) -> None:
        self.count, self.generator, self.repeats = count, generator, repeats
        self.queue: list[int] = []

    def next(self, size: int) -> list[int]:
        """Return the next `size` indices."""
        while len(self.queue) < size:
            order = torch.randperm(self.count, generator=self.generator).tolist()
            self.queue += [index for index in order for _ in range(self.repeats)]
        indices, self.queue = self.queue[:size], self.queue[size:]
        return indices


def sampled_first(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return the first `count` prompts that a PromptSampler of this seed samples, each prompt at most once."""
    order = PromptSampler(len(prompts), torch.Generator().manual_seed(seed))
    return [prompts[i] for i in order.next(min(count, len(prompts)))]


def retained_of(pending: Sequence[BatchInput]) -> list[BatchInput]:
    """Return the retention batches of these inputs."""
    return [item.retained for item in pending if item.retained is not None]


def pending_state(pending: Sequence[BatchInput], processes: Processes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the inputs of all processes for a checkpoint: values for JSON, and tensors by name."""
    tensors, retained = {}, retained_of(pending)
    for name, items in (("pending", pending), ("retained", retained)):
        for i, item in enumerate(items):
            for count, own in item.prefix_cache.latents.items():
                tensors[f"{name}/{i}/{count}"] = processes.gather(own)
            for j, own in enumerate(item.fresh_noise):
                tensors[f"{name}/{i}/fresh{j}"] = processes.gather(own)
    state = {
        "pending": [item.prompt_indices for item in pending],
        "retained": [item.prompt_indices for item in retained],
    }
    return state, tensors


def read_pending(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor], processes: Processes, device: torch.device, stride: int
) -> list[BatchInput]:
    """Rebuild the inputs from what `pending_state` returned."""

    def read(name: str) -> Iterator[BatchInput]:
        for i, prompts in enumerate(state.get(name, ())):
            prefix = f"{name}/{i}/"
            saved = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}
            latents = {int(key): value for key, value in saved.items() if key.isdigit()}
            own = {count: processes.shard(value) for count, value in sorted(latents.items())}
            fresh = [processes.shard(saved[f"fresh{j}"]) for j in range(len(saved) - len(latents))]
            yield BatchInput(prompts, latents[0], PrefixCache(own.pop(0), own, stride), fresh)

    pending = list(read("pending"))
    for item, retained in zip(pending, read("retained"), strict=False):
        item.retained = retained
    return pending
