"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.loaders import PeftAdapterMixin
from test_flow import tiny_t5, tiny_vae
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME
from draftune.models import load_model
from draftune.runs.export import export_lora
from draftune.runs.merge import merge_loras
from helpers.errors import raises
from helpers.model_checks import STEPS, check_guidance, check_pictures, check_training, drawn
from helpers.pipelines import add_random_lora
from helpers.published_weights import randomise


class AdaptablePixArt(PixArtTransformer2DModel, PeftAdapterMixin):
    """As the docs say how diffusers loads such a LoRA."""


def build(folder: Path, kind: Any = PixArtSigmaPipeline, **options: Any) -> Path:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(folder / "words")
    transformer = PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
            "use_additional_conditions": False,
            **options,
        }
    )
    randomise(transformer)
    vae = tiny_vae()
    # As published: the solver is DPM-Solver, the betas are DDPM's.
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    parts = {"tokenizer": tokenizer, "text_encoder": randomise(text_encoder), "vae": vae, "transformer": transformer}
    kind(**parts, scheduler=scheduler).save_pretrained(folder / "model")
    return folder / "model"


def draw(pipeline: Any, prompt: str, seed: int, guidance_scale: float = 4.5, **asked: Any) -> Tensor:
    spacing = asked.pop("spacing", "linspace")
    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing=spacing, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompt,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=STEPS,
        use_resolution_binning=False,
        output_type="np",
        **asked,
    ).images
    return torch.from_numpy(pictures).movedim(3, 1)


def unguided(pipeline: Any, prompt: str, seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, 1.0)


def trailing(pipeline: Any, prompt: str, seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, spacing="trailing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pixart"))


def test_pictures_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    check_pictures(folder, draw, 4.5)
    check_pictures(folder, unguided, 1.0)
    check_pictures(folder, trailing, 4.5, "trailing")
    check_guidance(folder, 4.5)
    check_pictures(build(tmp_path / "alpha", PixArtAlphaPipeline), draw, 4.5)
    check_pictures(build(tmp_path / "plain", out_channels=4), draw, 4.5)  # no learned variance


@pytest.mark.parametrize("kind", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_other_sizes_which_alpha_is_told(tmp_path: Path, kind: Any) -> None:
    told = kind is PixArtAlphaPipeline
    # A whole number of its heads' width for each of three numbers; diffusers tells sizes at 128 latents alone.
    width = {"attention_head_dim": 12, "cross_attention_dim": 24}
    folder = build(tmp_path, kind, sample_size=128, use_additional_conditions=told, **width)
    model = load_model(folder)
    model.set_size(16, 24)
    ours = drawn(model, "a cat", 0, 4.5)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert ours.shape == (1, 3, 16, 24)
    assert (draw(pipeline, "a cat", 0, height=16, width=24) - ours).abs().max() <= 1e-3
    for wrong in (2, 18):
        with raises(DraftuneError, "height 4", wrong):
            model.set_size(wrong, None)


def test_prompts_and_negative_prompts(folder: Path) -> None:
    model = load_model(folder)
    schedule = model.schedule(STEPS)
    pictures = model.sample_tensors(["a cat", "a much longer dog"], [0, 0], schedule, 4.5, "a bird")
    for i, prompt in enumerate(("a cat", "a much longer dog")):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert (draw(pipeline, prompt, 0, negative_prompt="a bird") - pictures[i : i + 1]).abs().max() <= 1e-3
    assert (pictures[0] - drawn(model, "a cat", 0, 4.5)[0]).abs().max() > 1e-3


def test_a_lora_is_trained_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    def load(pipeline: Any, lora: Path) -> None:
        pipeline.transformer = AdaptablePixArt.from_pretrained(folder, subfolder="transformer")
        pipeline.transformer.load_lora_adapter(lora, prefix="transformer", weight_name=FILE_NAME)

    check_training(folder, tmp_path, trailing, 4.5, load)


def test_loras_are_mixed_and_exported(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    add_random_lora(model)
    tuned = drawn(model, "a cat", 0, 4.5)
    draftune.save_lora(model, tmp_path / "lora")
    again = load_model(folder)
    assert (drawn(again, "a cat", 0, 4.5) - tuned).abs().max() > 1e-2
    halves = [(str(tmp_path / "lora"), 0.5)] * 2
    draftune.load_lora(again, merge_loras(halves, str(tmp_path / "mixed")))
    assert (drawn(again, "a cat", 0, 4.5) - tuned).abs().max() <= 1e-4
    export_lora(tmp_path / "lora", tmp_path / "merged", "merged")
    assert (draw(DiffusionPipeline.from_pretrained(tmp_path / "merged"), "a cat", 0) - tuned).abs().max() <= 1e-3
    with raises(DraftuneError, "kohya"):
        export_lora(tmp_path / "lora", tmp_path / "lora.safetensors", "kohya")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(folder: Path, precision: str) -> None:
    whole = drawn(load_model(folder), "a cat", 0, 4.5)
    model = load_model(folder).to("cpu", precision)
    wide = {name for name, layer in model.pipeline.text_encoder.named_modules() if name.endswith(".wo")}
    assert wide
    assert {layer.weight.dtype for name, layer in model.pipeline.text_encoder.named_modules() if name in wide} == {
        torch.float32 if precision == "fp16" else torch.bfloat16
    }
    assert 0 < (drawn(model, "a cat", 0, 4.5) - whole).abs().mean() < 0.03


def test_without_a_text_encoder_it_is_refused(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder=None)
    with raises(DraftuneError, "text_encoder"):
        load_model(pipeline)
