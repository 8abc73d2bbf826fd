"""Few-step diffusion models, each with the sampler that it was published with: LCM, TCD, Euler and Euler ancestral."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_dit
import test_pixart
import test_sdxl
import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from test_flow import brighter
from test_gradients import batch_of, relative
from torch import Tensor

import draftune
from draftune import sample_guided
from draftune.errors import DraftuneError
from draftune.methods import Draft, DraftK
from draftune.models import load_model
from draftune.published import variant
from draftune.recommended import recommended
from helpers.errors import raises
from helpers.few_steps import BETAS, RANDOM, SAMPLERS, TURBO_STEPS, draw, with_bar_off, with_scheduler
from helpers.pipelines import build_pipeline


def compare(pipeline: Any, steps: int, scale: float = 0.0, **asked: Any) -> None:
    """Two images of one batch, each as diffusers' from a generator of its own."""
    model = load_model(pipeline)
    prompts, seeds = ["a cat", "a big dog"], [3, 8]
    ours = model.sample_tensors(prompts, seeds, model.schedule(steps), scale)
    for image, prompt, seed in zip(ours, prompts, seeds, strict=True):
        assert (draw(pipeline, prompt, seed, steps, scale, **asked)[0] - image).abs().max() <= 1e-3


BUILD: dict[str, Callable[[Path], Any]] = {
    "sd": lambda folder: build_pipeline(folder),
    "sdxl": lambda folder: test_sdxl.build_pipeline(folder),
    "pixart": lambda folder: DiffusionPipeline.from_pretrained(test_pixart.build(folder)),
}


@pytest.mark.parametrize("steps", TURBO_STEPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", BUILD)
def test_pictures_are_those_of_diffusers(family: str, sampler: str, steps: int, tmp_path: Path) -> None:
    pipeline = with_scheduler(BUILD[family](tmp_path), sampler)
    compare(pipeline, steps, **({"use_resolution_binning": False} if family == "pixart" else {}))
    noises = load_model(pipeline).schedule(steps).num_noises
    assert noises == (steps - 1 if sampler in RANDOM else 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance(sampler: str, tmp_path: Path) -> None:
    compare(with_scheduler(build_pipeline(tmp_path), sampler), 3, 2.5)


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler])
def test_other_configs(kind: Any, tmp_path: Path) -> None:
    """With so many steps and so small a scaling, the boundary condition is seen in the images."""
    pipeline = with_scheduler(build_pipeline(tmp_path), "lcm")
    options = {"timestep_scaling": 0.001} if kind is LCMScheduler else {}
    pipeline.scheduler = kind(**BETAS, original_inference_steps=100, prediction_type="v_prediction", **options)
    compare(pipeline, 6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gamma_is_a_key_of_the_config(eta: float, tmp_path: Path) -> None:
    pipeline = with_scheduler(build_pipeline(tmp_path), "tcd")
    pipeline.scheduler = TCDScheduler.from_config({**pipeline.scheduler.config, "eta": eta})
    pipeline.save_pretrained(tmp_path / "model")
    compare(with_bar_off(DiffusionPipeline.from_pretrained(tmp_path / "model")), 4)
    model = load_model(tmp_path / "model")
    assert model.pipeline.scheduler.config["eta"] == model.sampler_metadata["eta"] == eta
    assert model.schedule(4).num_noises == (3 if eta else 0)
    # Without noise of its own, DDPM's serves the policy gradients.
    assert model.schedule(4).steps[0].ancestral_std > 0


def test_spacing_is_the_schedulers_own_setting(tmp_path: Path) -> None:
    """`set_sampler_options` works as the scheduler's option does."""
    pipeline = with_scheduler(build_pipeline(tmp_path), "turbo")
    for spacing in ("linspace", "leading"):
        model = load_model(pipeline)
        model.set_sampler_options(spacing)
        ours = model.sample_tensors(["a cat"], [0], model.schedule(4), 0.0)
        other = EulerAncestralDiscreteScheduler(**{**BETAS, "timestep_spacing": spacing})
        pipeline.scheduler = other
        assert (draw(pipeline, "a cat", 0, 4) - ours).abs().max() <= 1e-3
        pipeline.scheduler = SAMPLERS["turbo"]


CONSISTENCY: dict[str, Callable[[Path], Any]] = {
    "lcm pipeline": lambda folder: LatentConsistencyModelPipeline(
        **build_pipeline(folder).components, requires_safety_checker=False
    ),
    "sd": BUILD["sd"],
    "sdxl": BUILD["sdxl"],
}


@pytest.mark.parametrize("kind", CONSISTENCY)
def test_unets_that_take_the_guidance_scale(kind: str, tmp_path: Path) -> None:
    pipeline = with_scheduler(CONSISTENCY[kind](tmp_path / "parts"), "lcm")
    torch.manual_seed(1)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=32)
    torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight, std=0.5)
    for steps in TURBO_STEPS:
        compare(pipeline, steps, 8.5)
    compare(pipeline, 2, 1.0)
    model = load_model(pipeline)
    one, other = (model.sample_tensors(["a cat"], [0], model.schedule(2), scale) for scale in (8.5, 2.0))
    assert (one - other).abs().max() > 1e-3
    with raises(DraftuneError, "--negative-prompt"):
        model.check_prompts(["a cat"], "a dog")
    pipeline.save_pretrained(tmp_path / "model")
    assert variant(str(tmp_path / "model")) == "latent-consistency" + ("-xl" if kind == "sdxl" else "")
    settings = recommended(str(tmp_path / "model"))
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["method"]) == (4, 8.5, "draft")


def test_a_pipeline_of_consistency_models_needs_that_input(tmp_path: Path) -> None:
    with raises(DraftuneError, "unet.time_cond_proj_dim None"):
        load_model(with_scheduler(CONSISTENCY["lcm pipeline"](tmp_path), "lcm"))


def by_hand(network: Callable[[Tensor, float], Tensor], x: Tensor, fresh: list[Tensor], sampler: str, k: int) -> Tensor:
    """The sampler in diffusers' own formulas, in float64; `x` is unit noise."""
    scheduler = SAMPLERS[sampler]
    scheduler.set_timesteps(len(fresh) + 1)
    times, bars, rest = scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double(), iter(fresh)
    if sampler == "turbo":
        sigmas = scheduler.sigmas.double()
        x = x * sigmas.max()
        for i, t in enumerate(times):
            x = x.detach() if i == len(times) - k else x
            here, there = sigmas[i], sigmas[i + 1]
            up = (there**2 * (here**2 - there**2) / here**2).sqrt()
            x = x + network(x / (here**2 + 1).sqrt(), t) * ((there**2 - up**2).sqrt() - here)
            x = x + up * next(rest) if up else x
        return x
    for i, t in enumerate(times):
        x = x.detach() if i == len(times) - k else x
        noise = network(x, t)
        clean = (x - (1 - bars[t]).sqrt() * noise) / bars[t].sqrt()
        last = i == len(times) - 1
        end = 0 if last else times[i + 1]
        if sampler == "lcm":
            clean = 0.25 / ((10 * t) ** 2 + 0.25) * x + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * clean
            x = clean if last else bars[end].sqrt() * clean + (1 - bars[end]).sqrt() * next(rest)
        else:
            near = bars[int(0.7 * end)]
            x = near.sqrt() * clean + (1 - near).sqrt() * noise
            x = x if last else (bars[end] / near).sqrt() * x + (1 - bars[end] / near).sqrt() * next(rest)
    return x


@pytest.mark.parametrize("sampler", RANDOM)
@pytest.mark.parametrize("method", [Draft(), DraftK(2)])
def test_gradient_through_the_noise_is_that_of_plain_autograd(sampler: str, method: Any, tmp_path: Path) -> None:
    pipeline = with_scheduler(build_pipeline(tmp_path), sampler)
    model = load_model(pipeline)
    unet = pipeline.unet.double()
    model.dtype = torch.float64
    x, schedule = model.start(torch.Generator().manual_seed(0), 2, model.schedule(4))
    fresh = [step.fresh_noise for step in schedule.steps if step.fresh_noise is not None]
    unet.requires_grad_(True)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def reward(latents: Tensor) -> Tensor:
        return (latents * weights).mean((1, 2, 3))

    denoise = model.denoiser_for(["a cat", "a dog"], schedule, 0.0)
    for loss in method.losses([batch_of(denoise, schedule, noise=x, reward=reward)]):
        (-loss).backward()
    ours = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
    unet.zero_grad()
    text = model.encode(["a cat", "a dog"], "", False)
    unit = model.noise(torch.Generator().manual_seed(0), 2)
    clean = by_hand(lambda x, t: unet(x, t, text).sample, unit, fresh, sampler, getattr(method, "k", 4))
    reward(clean).mean().backward()
    theirs = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
    assert ours.norm() > 0
    assert relative(ours, theirs) < (1e-6 if sampler == "turbo" else 1e-10)  # Euler's levels are float32


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_of_strength_0_samples_the_same_images(sampler: str, tmp_path: Path) -> None:
    model = load_model(with_scheduler(build_pipeline(tmp_path), sampler))
    plain = model.sample_tensors(["cat", "dog"], [0, 1], model.schedule(3), 1.0)
    eta = int(sampler in RANDOM)
    methods = {f"pgdiff_dynamic(strength=0, eta={eta})": 0.0}
    if sampler in RANDOM:
        methods["classifier_style(strength=0)"] = 0.0
    else:  # by rounds, which are deterministic without the sampler's noise
        methods["gradient_guidance(target_increase=0, rounds=1, eta=0)"] = 1e-4
    for method, error in methods.items():
        guided = sample_guided(model, "brightness", ["cat", "dog"], method, num_inference_steps=3, guidance_scale=1.0)
        assert (guided.images - plain).abs().max() <= error


def test_an_image_depends_on_its_own_seed_alone(tmp_path: Path) -> None:
    model = load_model(with_scheduler(build_pipeline(tmp_path), "lcm"))
    prompts, seeds, schedule = ["a cat", "a dog", "a bird"], [5, 6, 7], model.schedule(4)
    together = model.sample_tensors(prompts, seeds, schedule, 0.0, batch_size=3)
    apart = model.sample_tensors(prompts, seeds, schedule, 0.0, batch_size=1)
    assert (together - apart).abs().max() <= 1e-5
    assert (model.sample_tensors(["a cat"], [6], schedule, 0.0) - together[:1]).abs().max() > 1e-2


def test_other_pipelines_keep_ddim(tmp_path: Path) -> None:
    """Those that give their scheduler no generator, and schedulers of models of many steps."""
    pipeline = DiffusionPipeline.from_pretrained(test_dit.build(tmp_path / "dit"))
    pipeline.scheduler = SAMPLERS["lcm"]
    other = build_pipeline(tmp_path / "sd")
    other.scheduler = EulerAncestralDiscreteScheduler(**BETAS)
    for each in (pipeline, other):
        model = load_model(each)
        assert model.schedule(4).num_noises == 0
        assert type(model.sampler()).__name__ == "DDIMScheduler"


def test_what_does_not_fit_is_refused_in_a_line(tmp_path: Path) -> None:
    model = load_model(with_scheduler(build_pipeline(tmp_path), "lcm"))
    with raises(DraftuneError, "num_inference_steps 50 60"):
        model.schedule(60)
    with raises(DraftuneError, "prefix_stride 2"):
        draftune.train(
            model, brighter, method="draft_k(k=1)", prompts=["a cat"], prefix_stride=2, output=str(tmp_path / "run")
        )
