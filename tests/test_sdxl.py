"""Stable Diffusion XL: a small random pipeline in the published layout against diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from test_export import through_kohya
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME, save_lora
from draftune.models import DiffusionModel, load_model
from draftune.runs.export import export_lora
from draftune.runs.load import read_deltas
from draftune.sampling.schedule import ddim_schedule
from helpers.errors import raises
from helpers.model_checks import STEPS, check_guidance, check_pictures, check_training, drawn
from helpers.pipelines import SD14_SCHEDULER, add_random_lora, tiny_tokenizer
from helpers.published_weights import randomise

# The scheduler config published with Stable Diffusion XL 1.0, an Euler scheduler's, which keeps what is not its own.
SDXL_SCHEDULER = SD14_SCHEDULER | {
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
GUIDANCE = 5.0


def build_pipeline(folder: Path, force_zeros: bool = True, **vae: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "words")
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "num_attention_heads": 2}
    # As published: the end of the text is the highest token, since 2 is not where it is.
    text |= {"num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text_1 = CLIPTextConfig(hidden_size=16, intermediate_size=32, projection_dim=12, **text)
    text_2 = CLIPTextConfig(hidden_size=20, intermediate_size=40, projection_dim=12, hidden_act="gelu", **text)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 20,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        norm_num_groups=4,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **{"scaling_factor": 0.13025, **vae},
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=randomise(CLIPTextModel(text_1), 1),
        text_encoder_2=randomise(CLIPTextModelWithProjection(text_2), 2),
        tokenizer=tokenizer,
        # As published: the second one pads with another token than that of the end.
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "words", pad_token="a"),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def saved(folder: Path, **settings: Any) -> Path:
    build_pipeline(folder / "parts", **settings).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sdxl"))


def ddim(pipeline: StableDiffusionXLPipeline, prompt: str, seed: int, spacing: str = "trailing", **said: Any) -> Tensor:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    return official(pipeline, prompt, seed, **said)


def official(pipeline: StableDiffusionXLPipeline, prompt: str, seed: int, **said: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    said = {"guidance_scale": GUIDANCE, **said}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, num_inference_steps=STEPS, generator=generator, output_type="pt", **said).images


def ours(model: DiffusionModel, negative_prompt: str = "") -> Tensor:
    return model.sample_tensors(["a cat"], [0], model.schedule(STEPS), GUIDANCE, negative_prompt)


def trailing(folder: Path) -> DiffusionModel:
    model = load_model(folder)
    model.set_sampler_options("trailing")
    return model


def test_pictures_are_those_of_diffusers(folder: Path) -> None:
    check_pictures(folder, ddim, GUIDANCE, "trailing")
    check_pictures(
        folder, lambda p, prompt, seed: ddim(p, prompt, seed, "trailing", guidance_scale=1.0), 1.0, "trailing"
    )
    check_guidance(folder, GUIDANCE)


def test_the_published_euler_scheduler(folder: Path) -> None:
    """Its config gives DDIM's grid; and where both end at the clean latent, both draw the same."""
    model = load_model(folder)
    assert type(model.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert model.schedule(50) == ddim_schedule(SD14_SCHEDULER, 50)
    assert [step.timestep for step in model.schedule(50).steps[:2]] == [981, 961]
    assert model.schedule(50).steps[-1].alpha_next < 1
    model.set_sampler_options(set_alpha_to_one=True)
    theirs = official(DiffusionPipeline.from_pretrained(folder), "a cat", 0)
    assert (ours(model) - theirs).abs().max() <= 1e-3


def test_training(folder: Path, tmp_path: Path) -> None:
    check_training(folder, tmp_path, ddim, GUIDANCE)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_negative_prompts(folder: Path, tmp_path: Path, force_zeros: bool) -> None:
    """None is zeros or the empty text, as the pipeline says; a given one is read by both encoders."""
    path = folder if force_zeros else saved(tmp_path, force_zeros=False)
    pipeline, model = DiffusionPipeline.from_pretrained(path), trailing(path)
    none, empty, given = (ddim(pipeline, "a cat", 0, negative_prompt=words) for words in (None, "", "blurred"))
    assert (ours(model) - none).abs().max() <= 1e-3
    assert (ours(model, "blurred") - given).abs().max() <= 1e-3
    assert (given - none).abs().max() > 1e-2
    assert ((none - empty).abs().max() > 1e-2) == force_zeros


def test_the_size_is_told(folder: Path) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(folder), trailing(folder)
    model.set_size(24, 16)
    theirs = ddim(pipeline, "a cat", 0, height=24, width=16)
    assert (ours(model) - theirs).abs().max() <= 1e-3
    for wrong in ({"original_size": (16, 16)}, {"target_size": (16, 24)}, {"crops_coords_top_left": (8, 0)}):
        assert (ddim(pipeline, "a cat", 0, height=24, width=16, **wrong) - theirs).abs().max() > 5e-3
    with raises(DraftuneError, "width 4 18"):
        model.set_size(None, 18)


def test_latents_with_moments(folder: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, latents_mean=[1.0, -2.0, 0.5, 3.0], latents_std=[2.0, 0.5, 3.0, 1.0])
    check_pictures(path, ddim, GUIDANCE, "trailing")
    assert (ours(trailing(path)) - ours(trailing(folder))).abs().max() > 1e-2


def test_one_text_encoder(folder: Path, tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path / "parts")
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, cross_attention_dim=20)
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(tmp_path / "model")
    check_pictures(tmp_path / "model", ddim, GUIDANCE, "trailing")
    pipeline = build_pipeline(tmp_path / "parts")
    pipeline.register_modules(text_encoder_2=None, tokenizer_2=None)
    with raises(DraftuneError, "text_encoder_2"):
        load_model(pipeline)


def test_half_precision(folder: Path, tmp_path: Path) -> None:
    """As in diffusers, an autoencoder that overflows in float16 is held and run in float32."""
    model, latents = load_model(folder), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = model.to("cpu").decode(latents)
    model.to("cpu", "fp16")
    assert (model.pipeline.vae.dtype, model.denoiser.dtype) == (torch.float32, torch.float16)
    assert torch.equal(model.decode(latents), exact)
    mended = load_model(saved(tmp_path, force_upcast=False)).to("cpu", "fp16")
    assert mended.pipeline.vae.dtype == torch.float16
    assert 0 < (mended.decode(latents) - exact).abs().max() < 1e-2
    model.to("cpu", "bf16")
    assert model.pipeline.vae.dtype == torch.bfloat16
    assert (drawn(model, "a cat", 0, GUIDANCE) - drawn(load_model(folder), "a cat", 0, GUIDANCE)).abs().max() < 0.1


def test_what_reads_pictures_is_left_out(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path / "parts")
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    pipeline.register_modules(image_encoder=CLIPVisionModelWithProjection(config))
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "image_encoder" / "model.safetensors").write_bytes(b"never read")
    model = load_model(tmp_path / "model")
    assert model.pipeline.image_encoder is None
    assert len(model.modules) == 4


@pytest.mark.parametrize("format", ["diffusers", "kohya", "merged"])
def test_exports(folder: Path, tmp_path: Path, format: str) -> None:
    model = trailing(folder)
    before = ours(model)
    add_random_lora(model)
    save_lora(model, tmp_path / "lora")
    out = export_lora(tmp_path / "lora", tmp_path / ("out.safetensors" if format == "kohya" else "out"), format)
    if format == "merged":
        pipeline = DiffusionPipeline.from_pretrained(out)
        theirs = official(pipeline, "a cat", 0)  # by the sampler that it was saved with
    else:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        file = out if format == "kohya" else out / FILE_NAME
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        theirs = ddim(pipeline, "a cat", 0)
        assert read_deltas(out).layers.keys() == read_deltas(tmp_path / "lora").layers.keys()
    assert (ours(model) - before).abs().max() > 1e-2
    assert (theirs - ours(model)).abs().max() <= 1e-3


def test_kohya_names_of_the_published_unet_are_read_back(tmp_path: Path) -> None:
    blocks = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=2048, use_linear_projection=True, **blocks)
    assert through_kohya(unet, tmp_path) == 792


def test_refusals(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path / "parts")
    pipeline.scheduler = EDMEulerScheduler()
    pipeline.save_pretrained(tmp_path / "edm")
    with raises(DraftuneError, "EDMEulerScheduler"):
        load_model(tmp_path / "edm")
    pipeline = build_pipeline(tmp_path / "parts")
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=2)
    with raises(DraftuneError, "unet.time_cond_proj_dim 2"):
        load_model(pipeline)
