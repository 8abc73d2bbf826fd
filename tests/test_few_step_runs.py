"""Training, guided sampling and exports with the samplers of few-step diffusion models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from test_flow import brighter
from test_gradients import batch_of
from test_resume import cut_off_after, lora, train
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.lora import check_sampler
from draftune.methods import load_method
from draftune.methods.leapalign import leap
from draftune.models import DiffusionModel, load_model
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Step
from helpers.few_steps import RANDOM, SAMPLERS, draw, with_bar_off, with_scheduler
from helpers.model_checks import check_training
from helpers.pipelines import add_random_lora, build_pipeline

METHODS = ["draft", "draft_k(k=2)", "draft_lv(n=1)", "refl(m=2)", "drtune(k=2, m=2)", "leapalign", "alignprop(m=3)"]
METHODS += ["flowbp_sparse(k=2)", "flowbp_bridge(k=3)", "direct_align(last=1)"]
METHODS += ["adjoint_matching(k=2)", "ddpo(min_count=2)", "kl(draft, beta=0.01)"]
METHODS += ["mix_grpo(window=2)", "diffusion_nft", "online_dpo"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", RANDOM)
def test_every_method_trains(method: str, sampler: str, tmp_path: Path) -> None:
    run = draftune.train(
        load_model(with_scheduler(build_pipeline(tmp_path / "parts"), sampler)),
        brighter,
        method=method,
        prompts=["a cat", "a dog"],
        steps=1,
        batch_size=2,
        num_images_per_prompt=load_method(method).min_images_per_prompt,
        num_inference_steps=4,
        guidance_scale=0.0,
        log_images_steps=0,
        num_log_prompts=1,
        output=str(tmp_path / "run"),
    )
    assert run.metrics[-1]["grad_norm"] > 0


ALL_STEPS = ["draft", "draft_k(k=2)", "drtune(k=2, m=1)", "leapalign", "alignprop(m=3)"]


@pytest.mark.parametrize("method", [*ALL_STEPS, "flowbp_sparse(k=2)", "flowbp_bridge(k=3)"])
def test_methods_score_the_samplers_image(method: str, tmp_path: Path) -> None:
    model = load_model(with_scheduler(build_pipeline(tmp_path), "lcm"))
    x, schedule = model.start(torch.Generator().manual_seed(0), 2, model.schedule(4))
    denoise = model.denoiser_for(["a cat", "a dog"], schedule, 0.0)
    (sampled,) = load_method(method).samples(batch_of(denoise, schedule, noise=x))  # type: ignore[attr-defined]
    assert torch.allclose(sampled, rollout(denoise, schedule.steps, x), atol=1e-5)


@pytest.mark.parametrize("sampler", RANDOM)
def test_lora_is_trained_saved_and_loaded(sampler: str, tmp_path: Path) -> None:
    with_scheduler(build_pipeline(tmp_path / "parts"), sampler).save_pretrained(tmp_path / "model")
    check_training(tmp_path / "model", tmp_path / "runs", draw, 0.0)


def unrewarded(model: DiffusionModel) -> Tensor:
    return model.sample_tensors(["a cat"], [4], model.schedule(4), 0.0)


@pytest.mark.parametrize("sampler", RANDOM)
def test_guided_sampling_and_noise_optimization_start_from_the_samplers_image(sampler: str, tmp_path: Path) -> None:
    model = load_model(with_scheduler(build_pipeline(tmp_path), sampler))
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 0.0}
    found = draftune.optimize_noise(model, brighter, "a cat", seed=4, steps=3, **options)
    assert (found.first - unrewarded(model)).abs().max() <= 1e-5
    assert found.rewards[-1] > found.rewards[0]
    guided = draftune.sample_guided(model, brighter, "a cat", "pgdiff_dynamic(strength=0)", seeds=[4], **options)
    if sampler != "turbo":  # where guided sampling starts from noise of variance 1
        assert (guided.images - unrewarded(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exports_name_the_sampler(sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_scheduler(build_pipeline(tmp_path / "parts"), sampler).save_pretrained(tmp_path / "model")
    model, kind = load_model(tmp_path / "model"), type(SAMPLERS[sampler])
    add_random_lora(model)
    draftune.save_lora(model, tmp_path / "lora")
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "lora"), "--format", "diffusers", "--output", out]) == 0
    printed = capsys.readouterr().out
    assert f"{kind.__name__}.from_config" in printed
    assert ("eta=0.3" in printed) is (sampler == "tcd")
    draftune.export_lora(tmp_path / "lora", tmp_path / "merged", "merged")
    merged = with_bar_off(DiffusionPipeline.from_pretrained(tmp_path / "merged"))
    assert type(merged.scheduler) is kind
    ours = model.sample_tensors(["a cat"], [0], model.schedule(4), 0.0)
    assert (draw(merged, "a cat", 0, 4) - ours).abs().max() <= 1e-3


@pytest.mark.parametrize("sampler", RANDOM)
def test_a_run_goes_on_bit_for_bit(sampler: str, tmp_path: Path) -> None:
    """Cut off while updates share a prefix, and so its noise."""
    with_scheduler(build_pipeline(tmp_path / "parts"), sampler).save_pretrained(tmp_path / "model")
    values: dict[str, Any] = {"method": "draft_k(k=2)", "prefix_reuse_steps": 3, "num_inference_steps": 4, "steps": 4}
    whole = train(tmp_path / "model", tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "model", tmp_path / "cut", cut_off_after(5), **values)
    resumed = train(tmp_path / "model", tmp_path / "cut", **values)
    assert len(resumed.metrics) == 4
    first, second = lora(whole.folder), lora(resumed.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_leap_has_no_fresh_noise() -> None:
    clean, noise = torch.full((1, 1, 2, 2), 2.0), torch.ones(1, 1, 2, 2)
    step = Step(0, 0.6, 0.8, 0.8, 0.6, noise_std=0.6, fresh_noise=torch.full_like(noise, 5.0))
    assert torch.allclose(leap(Prediction(clean, noise), step, 0.8, 0.6), 0.8 * clean + 0.6 * noise)


def test_a_lora_of_another_sampler_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where a pipeline object with another scheduler was trained, and its base model is loaded again by its name."""
    model = load_model(build_pipeline(tmp_path / "parts"))
    for sampler, reported in (
        ({}, False),
        ({"timestep_spacing": "trailing"}, False),
        ({"scheduler": "LCMScheduler"}, True),
    ):
        caplog.clear()
        save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors", {"sampler_options": json.dumps(sampler)})
        check_sampler(model, tmp_path / "lora.safetensors")
        assert ("LCMScheduler" in caplog.text) is reported
