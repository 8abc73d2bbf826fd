"""What the batches of an update are drawn from, and what was drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftune.sampling.sampler import Latents
from draftune.utils.processes import Processes


@dataclass
class Start:
    """What the pictures of a batch start from, of all processes; several updates may share it."""

    prompts: list[int]
    """Their numbers."""
    noise: Tensor
    latents: Latents
    """This process's part."""
    kept: Start | None = None
    """That of a batch of kept prompts, where there are any."""


@dataclass
class Drawn:
    """A batch of an update, of all processes: its noise, its pictures' rewards and, by label, those of the parts."""

    prompts: list[str]
    noise: Tensor
    pictures: Tensor | None = None
    """Those that this process drew."""
    reward: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class PromptOrder:
    """Prompts without end: every one once in a random order, then again in another."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.queue: list[int] = []

    def draw(self, size: int) -> list[int]:
        while len(self.queue) < size:
            self.queue += torch.randperm(self.count, generator=self.generator).tolist()
        drawn, self.queue = self.queue[:size], self.queue[size:]
        return drawn


def kept_of(starts: Sequence[Start]) -> list[Start]:
    return [start.kept for start in starts if start.kept is not None]


def starts_state(starts: Sequence[Start], processes: Processes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that is known of starts, of all processes: what JSON can hold, and tensors by name."""
    tensors = {}
    for name, some in (("start", starts), ("kept", kept_of(starts))):
        for i, start in enumerate(some):
            for count, own in start.latents.known.items():
                tensors[f"{name}/{i}/{count}"] = processes.gather(own)
    state = {"starts": [start.prompts for start in starts], "kept_starts": [start.prompts for start in kept_of(starts)]}
    return state, tensors


def read_starts(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor], processes: Processes, device: torch.device, stride: int
) -> list[Start]:
    """What `starts_state` gave."""

    def read(name: str, prompts: Sequence[list[int]]) -> Iterator[Start]:
        for i, chosen in enumerate(prompts):
            prefix = f"{name}/{i}/"
            found = {int(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}
            known = {count: latents.to(device) for count, latents in sorted(found.items())}
            own = {count: processes.share(latents) for count, latents in known.items()}
            yield Start(chosen, known[0], Latents(own.pop(0), own, stride))

    starts = list(read("start", state["starts"]))
    for start, kept in zip(starts, read("kept", state.get("kept_starts", ())), strict=False):
        start.kept = kept
    return starts
