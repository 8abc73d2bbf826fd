"""No user of `Schedule.output_difference` is blind at a noise level, zero terminal SNR included."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_gradients import Network, batch_of
from test_schedule import SCHEDULES, ZERO_SNR
from torch import Tensor

from draftune.evaluation.metrics import denoiser_mse_from_base
from draftune.experimental.denoising_loss import DenoisingTrainer
from draftune.experimental.distill import Distiller, TeacherTrajectory
from draftune.experimental.retention import Retention
from draftune.lora import adapted_by
from draftune.methods import KL, Draft
from draftune.models import StableDiffusion
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Schedule, Step
from helpers.pipelines import add_random_lora, build_pipeline

NOISE = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Measure = Callable[[Denoiser, Denoiser, Schedule], Tensor]
"""The loss that one user computes of a denoiser and its base, on a schedule of one step."""


def penalty(denoise: Denoiser, base: Denoiser, schedule: Schedule) -> Tensor:
    """DRaFT+'s, beside a reward that is 0."""
    batch = batch_of(denoise, schedule, base, NOISE, lambda x: 0 * x.sum((1, 2, 3)))
    ((loss,),) = KL(Draft(), 1.0).losses_per_step([batch])
    return loss


def retention(denoise: Denoiser, base: Denoiser, schedule: Schedule) -> Tensor:
    batch = batch_of(denoise, schedule, base, NOISE, lambda x: 0 * x.sum((1, 2, 3)))
    batch.retention_batch = batch_of(denoise, schedule, base, NOISE)
    ((_, loss),) = Retention(Draft(), 1.0).losses_per_step(iter([batch]))
    return loss


def distillation(denoise: Denoiser, base: Denoiser, schedule: Schedule) -> Tensor:
    (step,) = schedule.steps
    lesson = SimpleNamespace(schedule=schedule)
    taught = TeacherTrajectory(denoise, [(step, NOISE, base(NOISE, step))])
    return Distiller.difference(lesson, taught, 0).mean()  # type: ignore[arg-type]


def evaluation(denoise: Denoiser, base: Denoiser, schedule: Schedule) -> Tensor:
    model = SimpleNamespace(denoisers_for=lambda *_: (denoise, base), start=lambda *_: (NOISE, schedule))
    return torch.tensor(denoiser_mse_from_base(model, ["a", "b"], schedule, 1.0))  # type: ignore[arg-type]


MEASURES: list[Measure] = [penalty, retention, distillation, evaluation]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_change_of_the_output_weighs_the_same_at_every_step(name: str, measure: Measure) -> None:
    """The output is that of the base plus delta: the mean of delta^2, at the noisiest, a middle and the last step."""
    schedule, network = SCHEDULES[name], Network()
    delta = 0.3 * torch.randn(NOISE.shape, dtype=NOISE.dtype, generator=torch.Generator().manual_seed(1))

    def through(change: Tensor | float) -> Denoiser:
        return lambda x, step: schedule.to_prediction(network(x, step.timestep) + change, x, step)

    for step in (schedule.steps[0], schedule.steps[len(schedule) // 2], schedule.steps[-1]):
        alone = Schedule((step,), schedule.prediction_type)
        found = float(measure(through(delta), through(0.0), alone).detach())
        assert found == pytest.approx(float(delta.square().mean()), rel=1e-6), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_matching_learns_at_every_step(name: str) -> None:
    """The loss of an output is its squared error from the true one, in the network's own terms."""
    schedule = SCHEDULES[name]
    for step in (schedule.steps[0], schedule.steps[-1]):
        offset = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def denoise(x: Tensor, step: Step) -> Prediction:
            # The clean latent is 1 everywhere, so that the noise is known from x.
            noise = (x - step.alpha) / step.sigma
            wanted = {
                "epsilon": noise,
                "sample": torch.ones_like(x),
                "v_prediction": step.alpha * noise - step.sigma,
                "flow": noise - 1,
            }[schedule.prediction_type]
            return schedule.to_prediction(wanted + 0.5 + offset, x, step)  # noqa: B023

        fit = DenoisingTrainer(
            [offset], Schedule((step,), schedule.prediction_type), 0.01, torch.Generator().manual_seed(0)
        )
        assert fit(denoise, torch.ones_like(NOISE)) == pytest.approx(0.25, rel=1e-6)
        assert float(offset.grad) == pytest.approx(1.0, rel=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_lora_is_seen_at_zero_terminal_snr(tmp_path: object, kind: str) -> None:
    """Through a pipeline whose one step is the level without any signal."""
    config = {key: value for key, value in ZERO_SNR.items() if key != "skip_prk_steps"}
    model = StableDiffusion(build_pipeline(tmp_path, "DDIM", **config | {"prediction_type": kind}), "tiny")  # type: ignore[arg-type]
    add_random_lora(model)
    schedule = model.schedule(1)
    assert schedule.steps[0].alpha == 0
    x = torch.cat([model.noise(torch.Generator().manual_seed(seed), 1) for seed in (0, 1)])
    condition = model.encode(["a", "b"], "", True)
    with torch.no_grad():
        timestep = schedule.steps[0].timestep
        moved = model.predict(x, timestep, condition, 3.0)
        with adapted_by(model.denoiser, ""):
            moved = moved - model.predict(x, timestep, condition, 3.0)
    expected = float(moved.square().mean())
    assert expected > 1e-6
    assert denoiser_mse_from_base(model, ["a", "b"], schedule, 3.0) == pytest.approx(expected, rel=1e-4)
