"""The grid's numbers, and the sampler against diffusers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from draftune.errors import DraftuneError
from draftune.models import StableDiffusion
from draftune.sampling.clip import ClipSample
from draftune.sampling.sampler import ddim_step, rollout
from draftune.sampling.schedule import Schedule, Step, ddim_schedule, flow_schedule
from helpers.errors import raises
from helpers.pipelines import SD14_SCHEDULER, build_pipeline


def leverage(step: Step) -> float:
    """d x_next / d epsilon of one DDIM step, the network's input held fixed."""
    return step.sigma_next - step.alpha_next * step.sigma / step.alpha


def test_leverage_of_the_last_steps_on_the_grids_of_stable_diffusion() -> None:
    leading = ddim_schedule(SD14_SCHEDULER, 50).steps
    assert [step.timestep for step in leading[-2:]] == [21, 1]
    assert leverage(leading[-1]) == pytest.approx(-0.012, abs=5e-4)
    # The step before acts on x_0 through the last one.
    assert leverage(leading[-2]) == pytest.approx(-0.100, abs=5e-3)
    trailing = ddim_schedule(SD14_SCHEDULER | {"timestep_spacing": "trailing", "set_alpha_to_one": True}, 50).steps
    assert [step.timestep for step in trailing[-2:]] == [39, 19]
    assert trailing[-1][3:5] == (1.0, 0.0)
    assert leverage(trailing[-1]) == pytest.approx(-0.138, abs=5e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "to_one"), [(10, False), (7, True)])
def test_rollout_equals_ddim_scheduler(spacing: str, prediction_type: str, steps: int, to_one: bool) -> None:
    config = SD14_SCHEDULER | {
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "set_alpha_to_one": to_one,
        "clip_sample": False,
    }
    config.pop("skip_prk_steps")
    schedule = ddim_schedule(config, steps)
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, timestep: int) -> torch.Tensor:
        return torch.tanh(x * (1 + timestep / 1000))

    ours = rollout(lambda x, step: schedule.to_prediction(network(x, step.timestep), x, step), schedule.steps, x)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, int(t)), t, theirs).prev_sample
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ancestral_step_equals_ddim_scheduler_with_eta() -> None:
    config = {k: v for k, v in SD14_SCHEDULER.items() if k != "skip_prk_steps"} | {"clip_sample": False}
    schedule, scheduler = ddim_schedule(config, 10), DDIMScheduler(**config)
    scheduler.set_timesteps(10)
    step = schedule.steps[4]
    x, output, z = torch.randn(3, 1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    variance = scheduler._get_variance(step.timestep, step.timestep - 100)
    assert step.ancestral_std == pytest.approx(float(variance.sqrt()), abs=1e-7)
    ours = ddim_step(schedule.to_prediction(output, x, step), step, step.ancestral_std) + step.ancestral_std * z
    theirs = scheduler.step(output, step.timestep, x, eta=1.0, variance_noise=z).prev_sample
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_pictures_equal_those_of_the_pipeline(
    tmp_path: Path, spacing: str, prediction_type: str, guidance_scale: float
) -> None:
    pipeline = build_pipeline(tmp_path, "DDIM", timestep_spacing=spacing, prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    model = StableDiffusion(pipeline, "tiny")
    prompts, seeds = ["a cat", "two dogs"], [3, 4]
    ours = model.sample_tensors(prompts, seeds, model.schedule(10), guidance_scale, "blurry")
    theirs = pipeline(
        prompts,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        negative_prompt=["blurry"] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    assert ours.std() > 1e-3
    assert (ours - theirs).abs().max() < 1e-4


def test_a_picture_does_not_depend_on_its_batch(pipeline: object) -> None:
    model = StableDiffusion(pipeline, "tiny")  # type: ignore[arg-type]
    schedule = model.schedule(4)
    state = torch.random.get_rng_state()
    together = model.sample_tensors(["a", "b", "c"], [5, 6, 7], schedule, 3.0, batch_size=2)
    alone = model.sample_tensors(["b"], [6], schedule, 3.0)
    assert torch.allclose(together[1], alone[0], atol=1e-6)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_cannot_be_sampled_is_refused() -> None:
    with raises(DraftuneError, "1 1000 1001"):
        ddim_schedule(SD14_SCHEDULER, 1001)
    with raises(DraftuneError, "prediction_type score"):
        Schedule((), "score")
    with raises(DraftuneError, "signal-to-noise"):
        ddim_schedule(SD14_SCHEDULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10)


@pytest.mark.parametrize(
    ("config", "sigmas", "mu"),
    [
        ({"shift": 3.0}, None, None),  # Stable Diffusion 3
        ({"shift": 3.0, "use_dynamic_shifting": True}, None, 0.7),  # Stable Diffusion 3.5 with a shift of its own
        ({"shift": 3.0, "use_dynamic_shifting": True}, [1.0, 0.75, 0.5, 0.25], 1.1),  # FLUX.1-dev
        ({"shift": 1.0}, [1.0, 0.75, 0.5, 0.25], None),  # FLUX.1-schnell
    ],
)
def test_rollout_equals_the_flow_scheduler(
    config: dict[str, object], sigmas: list[float] | None, mu: float | None
) -> None:
    schedule = flow_schedule(config, 4, sigmas, mu)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(None if sigmas else 4, sigmas=sigmas, mu=mu)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return torch.tanh(x * (1 + timestep / 1000))

    ours = rollout(lambda x, step: schedule.to_prediction(network(x, step.timestep), x, step), schedule.steps, x)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, float(t)), t, theirs).prev_sample
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert schedule.steps[0].sigma == pytest.approx(1.0)
    assert schedule.steps[-1][3:5] == (1.0, 0.0)
    assert [step.timestep for step in schedule.steps] == pytest.approx([1000 * step.sigma for step in schedule.steps])


def test_flow_reads_the_velocity() -> None:
    """x = (1 - s) x_0 + s e, and the network says e - x_0."""
    clean, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = flow_schedule({"shift": 3.0}, 5).steps[2]
    x = step.alpha * clean + step.sigma * noise
    prediction = Schedule((step,), "flow").to_prediction(noise - clean, x, step)
    assert torch.allclose(prediction.clean, clean, atol=1e-12)
    assert torch.allclose(prediction.noise, noise, atol=1e-12)
    # The ancestral step of a flow is memoryless: its noise is that of adjoint matching's sigma(t)^2 = 2 s / (1 - s).
    close = Step(500.0, 0.5, 0.5, 0.5001, 0.4999)
    assert close.ancestral_std**2 / 1e-4 == pytest.approx(2 * 0.5 / 0.5, rel=1e-2)


# In float64: the levels of the embedded model's kind (zero terminal SNR), of Stable Diffusion, and of a flow.
ZERO_SNR = SD14_SCHEDULER | {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
SCHEDULES = {
    "epsilon": ddim_schedule(SD14_SCHEDULER, 20),
    "v": ddim_schedule(SD14_SCHEDULER | {"prediction_type": "v_prediction"}, 20),
    "v, zero SNR": ddim_schedule(ZERO_SNR | {"prediction_type": "v_prediction"}, 20),
    "sample": ddim_schedule(SD14_SCHEDULER | {"prediction_type": "sample"}, 20),
    "sample, zero SNR": ddim_schedule(ZERO_SNR | {"prediction_type": "sample"}, 20),
    # The smallest level of training, whose sigma is 0.03.
    "sample, all levels": ddim_schedule(SD14_SCHEDULER | {"prediction_type": "sample"}, 1000),
    "flow": flow_schedule({"shift": 3.0}, 20),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_weighs_an_error_of_the_output_alike(name: str) -> None:
    """|delta|^2 where one output is the other plus delta, and with its sign, at every noise level."""
    schedule = SCHEDULES[name]
    x, output, delta = torch.randn(3, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if "zero SNR" in name:
        assert schedule.steps[0].alpha == 0
    for step in schedule.steps:
        moved, plain = (schedule.to_prediction(value, x, step) for value in (output + delta, output))
        error = schedule.output_difference(moved, plain, step)
        assert torch.allclose(error, delta, rtol=0, atol=1e-9), step
        assert float(error.square().mean()) == pytest.approx(float(delta.square().mean()), rel=1e-9)


@pytest.mark.parametrize("name", ["v, zero SNR", "sample, zero SNR"])
def test_the_error_of_clipped_predictions_is_what_the_sampler_sees(name: str) -> None:
    """It is 0 only where both x_0 are clipped alike and the noise is the same too, which is so at zero SNR."""
    schedule = replace(SCHEDULES[name], clip=ClipSample(1.0))
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step in schedule.steps:
        beyond = -3.0 / step.sigma if schedule.prediction_type == "v_prediction" else 3.0
        outputs = torch.full_like(x, beyond), torch.full_like(x, 1.5 * beyond)
        a, b = (schedule.to_prediction(output, x, step) for output in outputs)
        assert float(a.clean) == float(b.clean) == 1.0
        error = float(schedule.output_difference(a, b, step))
        assert math.isfinite(error)
        assert (error == 0) == (float(a.noise) == float(b.noise)) == (step.alpha == 0)
