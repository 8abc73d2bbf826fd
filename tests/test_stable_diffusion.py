"""Stable Diffusion 1.x and 2.x: small random pipelines in the published layouts against diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from draftune.errors import DraftuneError
from draftune.models import load_model
from helpers.errors import raises
from helpers.model_checks import STEPS, check_guidance, check_pictures, check_training
from helpers.pipelines import build_pipeline
from helpers.published_weights import randomise

GUIDANCE = 4.0
# What differs in the UNet's config of Stable Diffusion 2.1.
SD21_UNET = {
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 20,
    "use_linear_projection": True,
    "upcast_attention": True,
}


def ddim(pipeline: StableDiffusionPipeline, prompt: str, seed: int) -> Tensor:
    unclipped = {"clip_sample": False, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **unclipped)
    pipeline.set_progress_bar_config(disable=True)
    said = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "pt"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **said).images


def encoder(layers: int) -> CLIPTextModel:
    """OpenCLIP's as it is published with Stable Diffusion 2."""
    config = {"vocab_size": 74, "max_position_embeddings": 12, "num_hidden_layers": layers, "num_attention_heads": 2}
    config |= {"hidden_size": 20, "intermediate_size": 40, "projection_dim": 12, "hidden_act": "gelu"}
    return randomise(CLIPTextModel(CLIPTextConfig(bos_token_id=0, eos_token_id=2, pad_token_id=1, **config)))


def save_sd2(folder: Path, **scheduler: object) -> tuple[Path, CLIPTextModel]:
    """A pipeline of the second version, and OpenCLIP's whole encoder, of which it has all layers but the last."""
    pipeline = build_pipeline(folder / "parts", "DDIM", prediction_type="v_prediction", **scheduler)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, **SD21_UNET)
    whole, pipeline.text_encoder = encoder(3), encoder(2)
    pipeline.text_encoder.load_state_dict(whole.state_dict(), strict=False)
    pipeline.tokenizer = CLIPTokenizer.from_pretrained(folder / "parts" / "words", pad_token="a")
    pipeline.save_pretrained(folder / "model")
    return folder / "model", whole


def test_version_1(pipeline_folder: Path, tmp_path: Path) -> None:
    check_pictures(pipeline_folder, ddim, GUIDANCE, "trailing")
    check_guidance(pipeline_folder, GUIDANCE)
    check_training(pipeline_folder, tmp_path, ddim, GUIDANCE)


def test_version_2(tmp_path: Path) -> None:
    folder, whole = save_sd2(tmp_path)
    check_pictures(folder, ddim, GUIDANCE, "trailing")
    check_guidance(folder, GUIDANCE)
    check_training(folder, tmp_path, ddim, GUIDANCE)
    model = load_model(folder)
    tokens = model.pipeline.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    assert tokens.tolist()[0][-2:] == [0, 0]
    states = whole(tokens, output_hidden_states=True).hidden_states
    norm = getattr(whole, "text_model", whole).final_layer_norm
    condition = model.encode(["a cat"], "", guided=False)
    assert (condition - norm(states[-2])).abs().max() < 1e-5
    assert (condition - norm(states[-1])).abs().max() > 0.1


def test_version_2_down_to_zero_signal(tmp_path: Path) -> None:
    folder, _ = save_sd2(tmp_path, rescale_betas_zero_snr=True)
    model = load_model(folder)
    model.set_sampler_options("trailing")
    assert model.schedule(STEPS).steps[0].alpha == 0
    check_pictures(folder, ddim, GUIDANCE, "trailing")


@pytest.mark.parametrize("saved", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_loaded_no_wider(tmp_path: Path, saved: torch.dtype, precision: str) -> None:
    build_pipeline(tmp_path / "parts").to(saved).save_pretrained(tmp_path / "model")
    wide, model = load_model(tmp_path / "model"), load_model(tmp_path / "model", precision)
    assert {part.dtype for part in wide.modules} == {torch.float32}
    unet, text_encoder, vae = model.modules
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (unet.dtype, text_encoder.dtype, vae.dtype, model.dtype) == (asked, saved, saved, torch.float32)
    for part, same in zip(wide.to("cpu", precision).modules, model.to("cpu", precision).modules, strict=True):
        assert part.dtype == asked
        for (name, weight), loaded in zip(part.state_dict().items(), same.state_dict().values(), strict=True):
            assert torch.equal(weight, loaded), name


def test_refusals(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path)
    pipeline.scheduler = EDMEulerScheduler()
    with raises(DraftuneError, "EDMEulerScheduler"):
        load_model(pipeline)
    pipeline = build_pipeline(tmp_path)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=2)
    with raises(DraftuneError, "unet.time_cond_proj_dim 2"):
        load_model(pipeline)
