"""What the batches of an update are drawn from, and what was drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftune.sampling import Latents


@dataclass
class Start:
    """What the pictures of a batch start from, of all processes; several updates may share it."""

    prompts: list[int]
    """Their numbers."""
    noise: Tensor
    latents: Latents
    """This process's part."""


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
