"""DRaFT+: any method, held near the model that it started from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Around, Batch, Method, register
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Step


@register("kl")
class KL(Around):
    """Any method with a penalty for leaving the base model: kl(draft_k(k=5), beta=0.1) is DRaFT+.

    Adds beta * sum_t mean((F - F_base)^2) over the calls of the denoiser that carry gradient. F is the guided output of
    the network, as in `Schedule.prediction_error`, and F_base that of the base model at the same noisy latent. The KL
    divergence of the two ancestral samplers is the same sum with a weight for each step; here every step weighs the
    same. Each of these calls takes one call of the base model, with a graph where the latent carries one. beta is 0.1
    to 1 in the literature.
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
                error = batch.schedule.prediction_error(prediction, batch.base(x, step), step)
                self.penalties.append(error.square().mean())
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
