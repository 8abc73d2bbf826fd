"""Krea 2: hidden states of several layers, a template around the padding, guidance counted from 1, a fixed shift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from test_flow import drawing, enliven, tiny_vae
from test_qwen_image import PROMPTS, SIZE, save_qwen_image
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters
from draftune.models import load_model
from draftune.published import PUBLISHED, variant
from draftune.settings import Settings
from draftune.training.memory_count import count_run
from helpers.draft_k import check_draft_k
from helpers.errors import raises
from helpers.model_checks import (
    STEPS,
    check_bf16_training,
    check_guidance,
    check_long_prompts,
    check_pictures,
    check_targets,
    check_training,
    drawn,
    opened,
)

pytest.importorskip("diffusers.pipelines.krea2.pipeline_krea2")
Krea2Pipeline, Krea2Transformer2DModel = diffusers.Krea2Pipeline, diffusers.Krea2Transformer2DModel

# What diffusers' pipeline expects of the published scheduler.
SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}


def save_krea(folder: Path, is_distilled: bool = False, **scheduler: Any) -> Path:
    donor = diffusers.QwenImagePipeline.from_pretrained(save_qwen_image(folder / "qwen"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    text = {**sizes, "vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    text_encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    enliven(text_encoder)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    enliven(transformer)
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SHIFT, "max_image_seq_len": 6400, **scheduler}),
        vae=donor.vae,
        text_encoder=text_encoder,
        tokenizer=donor.tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(0, 2, 3),
        is_distilled=is_distilled,
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_krea(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_krea(tmp_path_factory.mktemp("turbo"), is_distilled=True)


def test_pictures(raw: Path) -> None:
    """A scale of 5.5 is 4.5 in diffusers."""
    check_pictures(raw, drawing(4.5, SIZE), 5.5, size=SIZE)
    check_pictures(raw, drawing(0.0, SIZE), 1.0, size=SIZE)
    check_guidance(raw, 5.5, size=SIZE)


@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_turbo_pictures(turbo: Path, steps: int) -> None:
    """Its shift is the same for every size."""
    pipeline, model = DiffusionPipeline.from_pretrained(turbo), load_model(turbo)
    levels = []
    for side in (32, 48):
        model.set_size(side, side)
        schedule = model.schedule(steps)
        theirs = drawing(0.0, side, num_inference_steps=steps)(pipeline, "a cat", 0)
        assert (model.sample_tensors(["a cat"], [0], schedule, 0.0) - theirs).abs().max() <= 1e-3
        levels.append([step.sigma for step in schedule.steps])
    assert levels[0] == levels[1]


def test_prompts_of_different_lengths_in_any_shape(raw: Path) -> None:
    """In one batch as each alone, with a negative prompt."""
    pipeline, model = DiffusionPipeline.from_pretrained(raw), load_model(raw)
    assert model.latent_shape == (4, 256, 256)  # 1024 pixels
    model.set_size(32, 48)
    ours = model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 5.5, "bad dog")
    assert ours.shape == (2, 3, 32, 48)
    draw = drawing(4.5, 32, 48, negative_prompt="bad dog")
    for i, prompt in enumerate(PROMPTS):
        assert (ours[i : i + 1] - draw(pipeline, prompt, i)).abs().max() <= 1e-3
    assert (ours - model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 5.5)).abs().max() > 1e-3


@pytest.mark.parametrize("dynamic", [True, False])
def test_shift(tmp_path: Path, dynamic: bool) -> None:
    """By the image's size, or none of it; the latter is not of a published model."""
    lengths = {"base_image_seq_len": 16, "max_image_seq_len": 1016, "max_shift": 3.5}
    folder = save_krea(tmp_path, use_dynamic_shifting=dynamic, shift=2.0, **lengths)
    pipeline, levels = DiffusionPipeline.from_pretrained(folder), []
    for side in (32, 72):
        model = opened(folder, side)
        assert (drawn(model, "a cat", 0, 5.5) - drawing(4.5, side)(pipeline, "a cat", 0)).abs().max() <= 1e-3
        levels.append(model.schedule(STEPS).steps[1].sigma)
    assert (levels[1] > levels[0] + 0.01) == dynamic


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "denoiser"])
def test_draft_k_equals_plain_autograd(raw: Path, checkpointing: str) -> None:
    """In float64; the official networks compute norms, rotations and time in float32 in every precision."""
    pipeline = Krea2Pipeline.from_pretrained(raw, torch_dtype=torch.float64)
    for network in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        network.to(torch.float64)

    def official(noise: Tensor) -> Tensor:
        inputs = [pipeline.encode_prompt(texts) for texts in (PROMPTS, ["", ""])]
        scheduler, vae, x = pipeline.scheduler, pipeline.vae, pipeline._pack_latents(noise, 2, 4, 8, 8)
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=0.5 + 0.65 * (16 - 256) / (6400 - 256))
        levels, ids = scheduler.sigmas.double(), pipeline.prepare_position_ids(512, 4, 4, "cpu")
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= 1):  # the last two steps of three
                time = (timestep / 1000).expand(2).double()
                positive, negative = (pipeline.transformer(x, text, time, ids, mask).sample for text, mask in inputs)
                x = x + (levels[i + 1] - levels[i]) * (positive + 2 * (positive - negative))
        latents = pipeline._unpack_latents(x, SIZE, SIZE)
        moments = (vae.config.latents_std, vae.config.latents_mean)
        std, mean = (noise.new_tensor(moment).view(4, 1, 1, 1) for moment in moments)
        images = vae.decoder(vae.post_quant_conv(latents * std + mean))[:, :, 0] / 2 + 0.5
        return images

    check_draft_k(pipeline, checkpointing, PROMPTS, official, SIZE)


def test_training(raw: Path, tmp_path: Path) -> None:
    check_training(raw, tmp_path, drawing(4.5, SIZE), 5.5, size=SIZE, lora_rank=2, lora_alpha=4.0)


def test_recommended_targets(turbo: Path, tmp_path: Path) -> None:
    """All get a gradient, and are exported."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    assert f"`{PUBLISHED['krea-2-turbo'].lora_target_modules}`" in page
    model = opened(turbo, SIZE)
    targets = PUBLISHED["krea-2-turbo"].lora_target_modules.split(",")
    add_lora(model, 2, targets=targets)
    parameters = lora_parameters(model)
    assert all(any(target in name for name in parameters) for target in targets)
    assert len(parameters) == 2 * (4 * 7 + 8)  # four blocks of seven layers, eight more layers
    check_targets(model, tmp_path, drawing(0.0, SIZE), 0.0, "diffusers", "merged", prompts=PROMPTS)


def test_bfloat16(raw: Path, tmp_path: Path) -> None:
    """The transformer is told and says what it does in the official pipeline in bfloat16, whose norms stay wide."""
    pipeline = DiffusionPipeline.from_pretrained(raw, torch_dtype=torch.bfloat16)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, __, told, said: calls.append((told["hidden_states"], said[0])), with_kwargs=True
    )
    drawing(0.0, SIZE)(pipeline, "a cat", 0)
    model = opened(raw, SIZE).to("cpu", "bf16")
    held, wide = (dict(network.named_parameters()) for network in (model.denoiser, pipeline.transformer))
    assert {name: p.dtype for name, p in held.items()} == {name: p.dtype for name, p in wide.items()}
    norms = [name for name, parameter in wide.items() if parameter.dtype == torch.float32]
    assert all(torch.equal(held[name], wide[name]) for name in norms)
    for step, (tokens, theirs) in zip(model.schedule(STEPS).steps, calls, strict=True):
        x, expected = (pipeline._unpack_latents(packed.float(), SIZE, SIZE)[:, :, 0] for packed in (tokens, theirs))
        with torch.no_grad(), model.autocast():
            ours = model.predict(x, step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert (ours - expected).abs().mean() < 0.05 * expected.std()
    check_bf16_training(raw, tmp_path, height=SIZE, width=SIZE)


def test_long_prompts_are_counted(raw: Path) -> None:
    check_long_prompts(raw)


def test_published_sampling(raw: Path, turbo: Path) -> None:
    assert [variant(str(folder)) for folder in (raw, turbo)] == ["krea-2-raw", "krea-2-turbo"]
    assert load_model(raw).recommended.items() >= {"num_inference_steps": 28, "guidance_scale": 5.5}.items()
    assert load_model(turbo).recommended.items() >= {"num_inference_steps": 8, "method": "draft"}.items()


def test_count(raw: Path, tmp_path: Path) -> None:
    """The memory of a run is counted from the configs alone."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    settings = {"model": str(raw), "prompts": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "run")}
    settings |= {"reward": "jpeg_compressibility", "method": "draft", "lora_target_modules": "to_q", "lora_rank": 2}
    found = count_run(Settings(**settings, num_inference_steps=2, height=SIZE, width=SIZE, device="cpu"))
    model = load_model(raw)
    networks = (model.denoiser, model.pipeline.vae)  # the text encoder has done its work
    assert found.networks >= 2 * sum(parameter.numel() for part in networks for parameter in part.parameters())
    assert found.update > 0


def test_refusals(raw: Path) -> None:
    with raises(DraftuneError, "height 8 36"):
        load_model(raw).set_size(36, None)
    pipeline = DiffusionPipeline.from_pretrained(raw)
    parts = {**pipeline.components, "text_encoder_select_layers": (0, 2, 3)}
    cases: dict[str, dict[str, Any]] = {
        "text_encoder": {"text_encoder": None},
        "DDIMScheduler": {"scheduler": DDIMScheduler()},
        "text_encoder_select_layers 3 4": {"text_encoder_select_layers": (0, 2, 4)},
        "num_text_layers 3 2": {"text_encoder_select_layers": (0, 2)},
        "patch_size 4 2": {"patch_size": 4},
    }
    changes = {"in_channels 8 16": {"in_channels": 8}, "text_hidden_dim 24 16": {"text_hidden_dim": 24}}
    for words, change in changes.items():
        cases[words] = {"transformer": Krea2Transformer2DModel.from_config({**parts["transformer"].config, **change})}
    for words, change in cases.items():
        with raises(DraftuneError, words):
            load_model(Krea2Pipeline(**{**parts, **change}))
    pipeline.vae = tiny_vae()
    with raises(DraftuneError, "AutoencoderKL AutoencoderKLQwenImage"):
        load_model(pipeline)
