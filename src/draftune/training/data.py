"""Batches of training: the order of prompts, and the noise and prefix that a batch starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftune.sampling.sampler import PrefixCache
from draftune.utils.processes import Processes


@dataclass
class BatchInput:
    """Prompts and noise of a batch, over all processes. With `prefix_reuse_steps`, several updates share one."""

    prompts: list[int]
    """Indices of the prompts."""
    noise: Tensor
    """Initial noise [B, C, H, W]."""
    latents: PrefixCache
    """This process's share of the noise, and of the latents that the prefix has reached."""
    kept: BatchInput | None = None
    """The batch of the retention loss, if there is one."""


@dataclass
class BatchRecord:
    """A batch as one update trained on it, over all processes."""

    prompts: list[str]
    noise: Tensor
    """Initial noise [B, C, H, W]."""
    pictures: Tensor | None = None
    """Images of this process's share, [B / processes, 3, H, W], once they are scored."""
    reward: Tensor | None = None
    """Total rewards [B]."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Rewards [B] of each term, by label, before their weights."""


class PromptSampler:
    """An endless stream of prompt indices: random permutations of all prompts, one after the other."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.queue: list[int] = []

    def draw(self, size: int) -> list[int]:
        """Return the next `size` indices."""
        while len(self.queue) < size:
            self.queue += torch.randperm(self.count, generator=self.generator).tolist()
        indices, self.queue = self.queue[:size], self.queue[size:]
        return indices


def kept_of(starts: Sequence[BatchInput]) -> list[BatchInput]:
    """Return the retention batches of these starts."""
    return [start.kept for start in starts if start.kept is not None]


def starts_state(starts: Sequence[BatchInput], processes: Processes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the starts of all processes for a checkpoint: values for JSON, and tensors by name."""
    tensors = {}
    for name, some in (("start", starts), ("kept", kept_of(starts))):
        for i, start in enumerate(some):
            for count, own in start.latents.latents.items():
                tensors[f"{name}/{i}/{count}"] = processes.gather(own)
    state = {"starts": [start.prompts for start in starts], "kept_starts": [start.prompts for start in kept_of(starts)]}
    return state, tensors


def read_starts(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor], processes: Processes, device: torch.device, stride: int
) -> list[BatchInput]:
    """Rebuild the starts from what `starts_state` returned."""

    def read(name: str, prompts: Sequence[list[int]]) -> Iterator[BatchInput]:
        for i, chosen in enumerate(prompts):
            prefix = f"{name}/{i}/"
            saved = {int(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}
            known = {count: latents.to(device) for count, latents in sorted(saved.items())}
            own = {count: processes.shard(latents) for count, latents in known.items()}
            yield BatchInput(chosen, known[0], PrefixCache(own.pop(0), own, stride))

    starts = list(read("start", state["starts"]))
    for start, kept in zip(starts, read("kept", state.get("kept_starts", ())), strict=False):
        start.kept = kept
    return starts
