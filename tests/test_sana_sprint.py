"""SANA-Sprint: an angle as time, embedded guidance, fresh noise in each step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, SanaSprintPipeline, SCMScheduler
from test_flow import brighter
from test_gradients import batch_of, relative
from test_sana import save_sana
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.methods import DraftK
from draftune.models import load_model
from draftune.published import variant
from draftune.recommended import recommended
from draftune.sampling.sampler import rollout
from helpers.errors import raises
from helpers.model_checks import STEPS, check_guidance, check_pictures, check_training
from helpers.pipelines import add_random_lora

TURBO_STEPS = (1, 2, 4, 8)


def draw(pipeline: Any, prompt: str, seed: int, scale: float = 4.5, steps: int = STEPS, **asked: Any) -> Tensor:
    """By diffusers' pipeline. Its own second angle is for two steps only."""
    pipeline.set_progress_bar_config(disable=True)
    asked = {"height": 32, "width": 32, "output_type": "pt", "use_resolution_binning": False, **asked}
    if steps != 2:
        asked["intermediate_timesteps"] = None
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline(prompt, guidance_scale=scale, generator=generator, num_inference_steps=steps, **asked).images
    assert isinstance(pictures, Tensor)
    return pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"scheduler": SCMScheduler(), "kind": SanaSprintPipeline, "guidance_embeds": True}
    return save_sana(tmp_path_factory.mktemp("sprint"), qk_norm="rms_norm_across_heads", **options)


def test_pictures_are_those_of_diffusers(folder: Path) -> None:
    check_pictures(folder, draw, 4.5)
    check_pictures(folder, partial(draw, scale=1.0), 1.0)
    check_guidance(folder, 4.5)


@pytest.mark.parametrize("steps", TURBO_STEPS)
def test_every_number_of_steps_sizes_and_prompts(folder: Path, steps: int) -> None:
    model, pipeline = load_model(folder), DiffusionPipeline.from_pretrained(folder)
    model.set_size(32, 64)
    prompts, seeds = ["a cat", "a much longer dog"], [3, 4]
    ours = model.sample_tensors(prompts, seeds, model.schedule(steps), 4.5)
    for image, prompt, seed in zip(ours, prompts, seeds, strict=True):
        assert (draw(pipeline, prompt, seed, steps=steps, width=64)[0] - image).abs().max() <= 1e-3


def test_the_noise_of_the_data_is_scaled_as_in_diffusers(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = SCMScheduler(sigma_data=0.8)
    model = load_model(pipeline)
    ours = model.sample_tensors(["a cat"], [0], model.schedule(4), 4.5)
    assert (draw(pipeline, "a cat", 0, steps=4) - ours).abs().max() <= 1e-3


def test_gradient_is_that_of_plain_autograd(folder: Path) -> None:
    """Through the official transformer, with the same noise. Its attention computes in float32 in every precision."""
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    for part in (model.denoiser, pipeline.transformer):
        part.to(torch.float64)
    model.dtype = torch.float64
    x, schedule = model.start(torch.Generator().manual_seed(0), 2, model.schedule(STEPS))
    fresh = [step.fresh_noise for step in schedule.steps]
    model.denoiser.requires_grad_(True)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def reward(latents: Tensor) -> Tensor:
        return (latents * weights).mean((1, 2, 3))

    prompts = ["a cat", "a much longer dog"]
    denoise = model.denoiser_for(prompts, schedule, 4.5)
    for loss in DraftK(2).losses([batch_of(denoise, schedule, noise=x, reward=reward)]):
        (-loss).backward()
    ours = [p.grad for p in model.denoiser.parameters()]

    text, mask = pipeline.encode_prompt(prompts, complex_human_instruction=model.instruction.split("\n"))
    scheduler = SCMScheduler()
    scheduler.set_timesteps(STEPS, intermediate_timesteps=None)
    angles = scheduler.timesteps.double()
    for i, t in enumerate(angles[:-1]):
        x = x.detach() if i <= STEPS - 2 else x
        s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        flow = x * (s**2 + (1 - s) ** 2).sqrt()
        guidance = torch.full((2,), 0.45, dtype=torch.float64)
        output = pipeline.transformer(
            flow, text.double(), s.expand(2), guidance=guidance, encoder_attention_mask=mask
        ).sample
        velocity = ((1 - 2 * s) * flow + (1 - 2 * s + 2 * s**2) * output) / (s**2 + (1 - s) ** 2).sqrt()
        clean = torch.cos(t) * x - torch.sin(t) * velocity
        noise = fresh[i]
        x = clean if noise is None else torch.cos(angles[i + 1]) * clean + torch.sin(angles[i + 1]) * noise
    reward(x).mean().backward()
    theirs = [p.grad for p in pipeline.transformer.parameters()]
    flat = [torch.cat([g.flatten() for g in gradients if g is not None]) for gradients in (ours, theirs)]
    assert flat[0].norm() > 0
    assert relative(*flat) < 1e-5


def test_lora_is_trained_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    check_training(folder, tmp_path, draw, 4.5)


@pytest.mark.parametrize("steps", TURBO_STEPS)
def test_full_gradient_trains_at_every_number_of_steps(folder: Path, tmp_path: Path, steps: int) -> None:
    """In bf16, with the settings that the family has by itself."""
    run = draftune.train(
        load_model(folder, "bf16"),
        brighter,
        prompts=["a cat"],
        steps=1,
        batch_size=2,
        num_inference_steps=steps,
        lora_rank=2,
        log_images_steps=0,
        num_log_prompts=1,
        height=32,
        width=32,
        mixed_precision="bf16",
        output=str(tmp_path / "run"),
    )
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["method"] == "draft"
    assert run.metrics[-1]["grad_norm"] > 0


def test_merged_pipeline_keeps_the_scheduler(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    add_random_lora(model)
    draftune.save_lora(model, tmp_path / "lora")
    model.set_size(32, 32)
    ours = model.sample_tensors(["a cat"], [0], model.schedule(2), 4.5)
    draftune.export_lora(tmp_path / "lora", tmp_path / "merged", "merged", model=str(folder))
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert isinstance(merged.scheduler, SCMScheduler)
    assert (draw(merged, "a cat", 0, steps=2) - ours).abs().max() <= 1e-3


def test_defaults(folder: Path) -> None:
    assert variant(str(folder)) == "sana-sprint"
    for model in (str(folder), "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"):
        found = recommended(model)
        assert (found["num_inference_steps"], found["guidance_scale"], found["method"]) == (2, 4.5, "draft")


def test_steps_without_their_noise_are_refused(folder: Path) -> None:
    model = load_model(folder)
    schedule = model.schedule(2)
    with raises(DraftuneError, "noise start"):
        rollout(model.denoiser_for(["a cat"], schedule, 4.5), schedule.steps, model.noise(torch.Generator(), 1))


def test_refusals(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    with raises(DraftuneError, "--negative-prompt"):
        model.check_prompts(["a cat"], "a dog")
    with raises(DraftuneError, "num_inference_steps 1000 1001"):
        model.schedule(1001)
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.scheduler = SCMScheduler(prediction_type="flow")
    with raises(DraftuneError, "scheduler.prediction_type flow trigflow"):
        load_model(pipeline)
    plain = save_sana(tmp_path, SCMScheduler(), SanaSprintPipeline)
    with raises(DraftuneError, "transformer.guidance_embeds False True"):
        load_model(plain)
    with raises(DraftuneError, "prefix_stride 2"):
        draftune.train(
            model, brighter, prompts=["a cat"], method="draft_k(k=1)", prefix_stride=2, output=str(tmp_path / "run")
        )


def test_guided_sampling_of_no_strength_is_the_sampler(folder: Path) -> None:
    model = load_model(folder)
    model.set_size(32, 32)
    ours = model.sample_tensors(["a cat"], [4], model.schedule(4), 4.5)
    options: dict[str, Any] = {"seeds": [4], "num_inference_steps": 4}
    guided = draftune.sample_guided(model, brighter, "a cat", "pgdiff_dynamic(strength=0)", **options)
    assert (guided.images - ours).abs().max() <= 1e-5
    brightened = draftune.sample_guided(model, brighter, "a cat", "pgdiff_dynamic(strength=0.5)", **options)
    assert brightened.rewards[-1] > guided.rewards[-1]
