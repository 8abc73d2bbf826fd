"""Few-step flow models at one to eight steps: FLUX.1 schnell, Stable Diffusion 3.5 Large Turbo, Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_z_image
import torch
from diffusers import DiffusionPipeline
from test_flow import SD3, brighter, drawing, save_flux, save_sd3

import draftune
from draftune.lora import lora_parameters
from draftune.published import variant
from helpers.few_steps import TURBO_STEPS
from helpers.model_checks import opened

BUILD: dict[str, Callable[[Path], Path]] = {
    "flux-schnell": lambda folder: save_flux(folder, guidance_embeds=False),
    "stable-diffusion-3.5-turbo": lambda folder: save_sd3(folder / "sd3.5-turbo", SD3),
    "z-image-turbo": lambda folder: test_z_image.build(folder, test_z_image.TURBO),
}
ASKED: dict[str, dict[str, Any]] = {"flux-schnell": {"max_sequence_length": 256}}


@pytest.mark.parametrize("steps", TURBO_STEPS)
@pytest.mark.parametrize("name", BUILD)
def test_pictures_and_an_update(name: str, steps: int, tmp_path: Path) -> None:
    """The images are diffusers', and one update of full DRaFT changes the LoRA."""
    folder = BUILD[name](tmp_path)
    assert variant(str(folder)) == name
    model, pipeline = opened(folder, 16), DiffusionPipeline.from_pretrained(folder)
    ours = model.sample_tensors(["a cat", "a dog"], [0, 1], model.schedule(steps), 0.0)
    draw = drawing(0.0, 16, num_inference_steps=steps, **ASKED.get(name, {}))
    for image, prompt, seed in zip(ours, ["a cat", "a dog"], [0, 1], strict=True):
        assert (draw(pipeline, prompt, seed)[0] - image).abs().max() <= 1e-3
    run = draftune.train(
        model,
        brighter,
        prompts=["a cat", "a dog"],
        steps=1,
        batch_size=2,
        num_inference_steps=steps,
        learning_rate=0.01,
        log_images_steps=0,
        num_log_prompts=1,
        height=16,
        width=16,
        output=str(tmp_path / "run"),
    )
    assert run.metrics[-1]["grad_norm"] > 0
    # B starts at 0.
    assert all(tensor.abs().max() > 0 for key, tensor in lora_parameters(model).items() if "lora_B" in key)
    after = model.sample_tensors(["a cat", "a dog"], [0, 1], model.schedule(steps), 0.0)
    assert not torch.equal(after, ours)
