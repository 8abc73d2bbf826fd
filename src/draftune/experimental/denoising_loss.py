"""Fine-tuning of a denoiser on clean latents by denoising score matching."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters
from draftune.models import DiffusionModel
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Schedule
from draftune.utils.devices import fork_rng

LEVELS = 4
"""Random sampling steps at which one optimizer step evaluates the loss; more levels lower its variance."""


class DenoisingTrainer:
    """Denoising score matching with Adam: each call takes one optimizer step.

        loss = mean over LEVELS random steps of mean((F_theta(alpha x_0 + sigma eps) - F_true)^2)

    F is the network's output in its own prediction type (`Schedule.output_difference`).

    Args:
        parameters: The parameters to train.
        learning_rate: Adam's learning rate. Its betas are (0.9, 0.99), as in the toy problem of Gradient Guidance.
        generator: Random numbers for the steps and the noise.
    """

    def __init__(
        self, parameters: Iterable[Tensor], schedule: Schedule, learning_rate: float, generator: torch.Generator
    ) -> None:
        self.schedule, self.generator = schedule, generator
        self.optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99))

    def __call__(self, denoise: Denoiser, clean: Tensor) -> float:
        """Take one step of Adam on the clean latents [B, ...].

        Returns:
            The loss before the step.

        Raises:
            DraftuneError: The loss is not finite.
        """
        self.optimizer.zero_grad()
        total = 0.0
        for i in torch.randint(len(self.schedule), (LEVELS,), generator=self.generator).tolist():
            step = self.schedule.steps[i]
            noise = torch.randn(clean.shape, generator=self.generator, dtype=clean.dtype).to(clean.device)
            with torch.enable_grad():
                prediction = denoise(step.alpha * clean + step.sigma * noise, step)
                error = self.schedule.output_difference(prediction, Prediction(clean, noise), step)
                loss = error.square().mean() / LEVELS
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise DraftuneError(f"the denoiser's loss became {total} while guiding: a lower learning_rate may help")
        self.optimizer.step()
        return total


def fresh_lora(model: DiffusionModel, schedule: Schedule, learning_rate: float) -> DenoisingTrainer:
    """Add a LoRA of rank 8 to the model, initialized with seed 0, and return its optimizer.

    Raises:
        DraftuneError: The model already has a LoRA.
    """
    with fork_rng():
        torch.manual_seed(0)
        add_lora(model, rank=8)
    return DenoisingTrainer(lora_parameters(model).values(), schedule, learning_rate, torch.Generator().manual_seed(0))
