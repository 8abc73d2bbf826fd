"""Training a denoiser on clean latents: denoising score matching. No model is known here."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Schedule

LEVELS = 4
"""Random steps of the schedule at which one step of training sees every latent: of one alone it would be noisy."""


class Fit:
    """Moves weights towards the denoiser of clean latents, by a step of Adam at each call.

    The betas, (0.9, 0.99), are those of Gradient Guidance's toy. `generator` draws the levels and the noise.
    """

    def __init__(
        self, parameters: Iterable[Tensor], schedule: Schedule, learning_rate: float, generator: torch.Generator
    ) -> None:
        self.schedule, self.generator = schedule, generator
        self.optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99))

    def __call__(self, denoise: Denoiser, clean: Tensor) -> float:
        """Take one step of Adam on the clean latents [B, …].

        Returns:
            The mean squared `Schedule.prediction_error` against the noise that was added.

        Raises:
            DraftuneError: the loss is not finite.
        """
        self.optimizer.zero_grad()
        total = 0.0
        for i in torch.randint(len(self.schedule), (LEVELS,), generator=self.generator).tolist():
            step = self.schedule.steps[i]
            noise = torch.randn(clean.shape, generator=self.generator, dtype=clean.dtype).to(clean.device)
            with torch.enable_grad():
                prediction = denoise(step.alpha * clean + step.sigma * noise, step)
                error = self.schedule.prediction_error(prediction, Prediction(clean, noise), step)
                loss = error.square().mean() / LEVELS
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DraftuneError(f"the denoiser's loss became {total} while guiding: a lower learning_rate may help")
        self.optimizer.step()
        return total
