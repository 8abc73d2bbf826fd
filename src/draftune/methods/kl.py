"""DRaFT+: a penalty on the distance from the base model, added to any method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods.base import Batch, Method, MethodWrapper, register
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Step


@register("kl")
class KL(MethodWrapper):
    """DRaFT+: any method with a penalty on the distance from the base model, such as kl(draft_k(k=5), beta=0.1).

        loss = loss of the method + beta * sum over calls with gradient of mean((F - F_base)^2)

    Around `draft_k` this is DRaFT+ of NVIDIA NeMo-Aligner. F and F_base are the guided outputs of the fine-tuned and
    the base network at the same x_t; `Schedule.output_difference` computes their difference. The KL divergence between
    the two ancestral samplers is the same sum with a weight for each step. Here all weights are 1.

    One base call for each denoiser call with gradient. The base call carries gradient where x_t does. Use it when
    the training reward rises while an evaluation reward or the diversity falls.

    Args:
        method: The method to wrap.
        beta: Weight of the penalty, 0 or more. Default: 0.1; 0.1 to 1 in the literature.
    """

    def __init__(self, method: Method, beta: float = 0.1) -> None:
        if not beta >= 0:
            raise DraftuneError(f"beta must be at least 0, got {beta}")
        super().__init__(method)
        self.beta = beta
        self.penalties: list[Tensor] = []

    def watched(self, batch: Batch) -> Denoiser:
        """Return the batch's denoiser, wrapped to record the penalty of each call with gradient."""

        def call(x: Tensor, step: Step) -> Prediction:
            prediction = batch.denoise(x, step)
            if torch.is_grad_enabled() and step.tuned:  # elsewhere the base model is called
                error = batch.schedule.output_difference(prediction, batch.base_denoise(x, step), step)
                self.penalties.append(error.square().mean())
            return prediction

        return call

    def add_penalty(self, losses: Iterable[Tensor]) -> Iterator[Tensor]:
        """Add to each loss the penalties of the calls in its graph."""
        for loss in losses:
            penalty, self.penalties = sum(self.penalties), []
            yield loss + self.beta * penalty

    def losses_per_step(self, batches: Iterable[Batch]) -> Iterator[Iterator[Tensor]]:
        self.penalties = []  # an update that failed may have left some
        watched = (replace(batch, denoise=self.watched(batch)) for batch in batches)
        for losses in self.method.losses_per_step(watched):
            yield self.add_penalty(losses)
