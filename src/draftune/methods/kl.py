"""DRaFT+: any method, held near the model that it started from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Around, Batch, Method, register
from draftune.sampling import Denoiser
from draftune.schedule import Prediction, Step


@register("kl")
class KL(Around):
    """Any method with a penalty for leaving the base model: kl(draft-k(k=5), beta=0.1) is DRaFT+.

    Adds beta * sum_t mean((eps - eps_base)^2) over the calls of the denoiser that carry gradient, both with guidance,
    on the same noisy latents: the KL divergence between the two samplers' steps up to a factor for each t; for a flow
    the velocities take the place of eps. One call of the base model for each of these, with a graph where the latent
    carries one. beta is 0.1 to 1 in the literature.
    """

    def __init__(self, method: Method, beta: float = 0.1) -> None:
        if not beta >= 0:
            raise DraftuneError(f"beta must be at least 0, not {beta}")
        super().__init__(method)
        self.beta = beta
        self.penalties: list[Tensor] = []

    def watched(self, batch: Batch) -> Denoiser:
        """The denoiser, which notes how far it is from the base wherever it is called with a graph."""

        def call(x: Tensor, step: Step) -> Prediction:
            prediction = batch.denoise(x, step)
            if torch.is_grad_enabled():
                self.penalties.append(batch.schedule.difference(prediction, batch.base(x, step)).square().mean())
            return prediction

        return call

    def penalized(self, losses: Iterable[Tensor]) -> Iterator[Tensor]:
        for loss in losses:
            penalty, self.penalties = sum(self.penalties), []
            yield loss + self.beta * penalty

    def optimizer_steps(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        self.penalties = []  # of an update that went wrong
        watched = (replace(batch, denoise=self.watched(batch)) for batch in batches)
        for losses in self.method.optimizer_steps(watched):
            yield self.penalized(losses)
