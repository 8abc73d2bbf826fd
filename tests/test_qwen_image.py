"""Qwen-Image: a template that is dropped again, norms of packed tokens, a video decoder, a last noise level."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from test_flow import enliven
from test_z_image import tiny_qwen
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from draftune.errors import DraftuneError
from draftune.guidance.sample import sample_guided
from draftune.lora import add_lora, lora_parameters
from draftune.models import load_model
from draftune.published import PUBLISHED, variant
from draftune.settings import Settings
from draftune.training.memory_count import count_run
from helpers.errors import raises
from helpers.model_checks import (
    STEPS,
    check_guidance,
    check_pictures,
    check_targets,
    check_training,
    drawn,
    opened,
)

if "txt_seq_lens" in inspect.signature(diffusers.QwenImageTransformer2DModel.forward).parameters:
    pytest.skip("the transformer of this diffusers takes text lengths", allow_module_level=True)

# As published with the models.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
WORDS = "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
PROMPTS = ["a cat", "a dog that sits on a chair, looks at a cat"]
SIZE = 32


def tiny_encoder(folder: Path) -> tuple[Any, Qwen2_5_VLForConditionalGeneration]:
    """A Qwen2.5-VL whose tokens are letters and the template's words, as in the published vocabulary."""
    tokenizer, _ = tiny_qwen(folder)
    tokenizer.add_tokens(["system", "user", "assistant", "Describe", ":", *(f" {word}" for word in WORDS.split())])
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    text = {**sizes, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    return tokenizer, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def save_qwen_image(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_encoder(folder / "letters")
    enliven(text_encoder)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    enliven(transformer)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7571, -0.7089, 0.9653, 0.1075],
        latents_std=[2.8184, 1.4541, 0.7075, 2.6558],
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 2  # some pixels are beyond white and black
    diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **scheduler}),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder / "model")
    return folder / "model"


def draw(pipeline: Any, prompt: str | list[str], seed: int, **asked: Any) -> Tensor:
    """By diffusers' pipeline, with guidance, as on the model card."""
    pipeline.set_progress_bar_config(disable=True)
    told = {"negative_prompt": " ", "num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline(prompt, generator=generator, **{**told, **asked}).images
    assert isinstance(pictures, Tensor)
    return pictures


def unguided(pipeline: Any, prompt: str | list[str], seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, negative_prompt=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_image(tmp_path_factory.mktemp("qwen"))


def test_pictures(folder: Path) -> None:
    check_pictures(folder, draw, 4.0, size=SIZE)
    check_pictures(folder, unguided, 1.0, size=SIZE)
    check_guidance(folder, 4.0, size=SIZE)


def test_template(folder: Path) -> None:
    """The dropped tokens are those before the prompt, as with the published vocabulary."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    before = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("steps", [2, 4, 30])
def test_steps(folder: Path, steps: int) -> None:
    """The last call is at the noise level `shift_terminal`."""
    model = opened(folder, SIZE)
    schedule = model.schedule(steps)
    assert schedule.steps[-1].sigma == pytest.approx(0.02)
    assert schedule.steps[-1].sigma_next == 0
    theirs = draw(DiffusionPipeline.from_pretrained(folder), "a cat", 0, num_inference_steps=steps)
    assert (model.sample_tensors(["a cat"], [0], schedule, 4.0) - theirs).abs().max() <= 1e-3


def test_one_step_is_refused(folder: Path) -> None:
    """Its noise level would be 0 / 0 in diffusers."""
    with raises(DraftuneError, "num_inference_steps 2 1 shift_terminal 0.02"):
        load_model(folder).schedule(1)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_prompts_of_different_lengths_in_any_shape(folder: Path, padding_side: str) -> None:
    """In one batch as each alone, whichever side the tokenizer pads."""
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    assert model.latent_shape == (4, 128, 128)
    pipeline.tokenizer.padding_side = model.pipeline.tokenizer.padding_side = padding_side
    model.set_size(32, 48)
    ours = model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 4.0, "bad dog")
    assert ours.shape == (2, 3, 32, 48)
    for i, prompt in enumerate(PROMPTS):
        theirs = draw(pipeline, prompt, i, width=48, negative_prompt="bad dog")
        assert (ours[i : i + 1] - theirs).abs().max() <= 1e-3
    plain = model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 4.0)
    assert (ours - plain).abs().max() > 1e-3


def test_shift_by_the_size(tmp_path: Path) -> None:
    folder = save_qwen_image(tmp_path, base_image_seq_len=16, max_image_seq_len=1016, max_shift=1.5)
    pipeline, levels = DiffusionPipeline.from_pretrained(folder), []
    for side in (32, 96):
        model = opened(folder, side)
        theirs = draw(pipeline, "a cat", 0, height=side, width=side)
        assert (drawn(model, "a cat", 0, 4.0) - theirs).abs().max() <= 1e-3
        levels.append(model.schedule(STEPS).steps[1].sigma)
    assert levels[1] > levels[0] + 0.01


def test_training(folder: Path, tmp_path: Path) -> None:
    check_training(folder, tmp_path, draw, 4.0, size=SIZE, lora_rank=2, lora_alpha=4.0)


def test_recommended_targets(folder: Path, tmp_path: Path) -> None:
    """Every layer that docs/reference/models.md names gets a gradient, and is exported."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    text, feed_forward = "add_q_proj,add_k_proj,add_v_proj,to_add_out", "img_mlp.net.0.proj,img_mlp.net.2"
    feed_forward += ",txt_mlp.net.0.proj,txt_mlp.net.2"
    assert all(f"`{names}`" in page for names in (text, feed_forward))
    model = opened(folder, SIZE)
    add_lora(model, 2, targets=f"{PUBLISHED['qwen-image'].lora_target_modules},{text},{feed_forward}".split(","))
    parameters = lora_parameters(model)
    assert len(parameters) == 2 * (12 + 8)  # the last block's text tokens go nowhere
    check_targets(model, tmp_path, draw, 4.0, "diffusers", "merged", "comfyui", prompts=PROMPTS)


def test_guided_sampling(folder: Path) -> None:
    model, few = opened(folder, SIZE), {"num_inference_steps": 4, "guidance_scale": 2.0}
    plain = model.sample_tensors(["a cat"], [0], model.schedule(4), 2.0)
    still = sample_guided(model, "brightness", ["a cat"], "pgdiff_dynamic(strength=0, eta=0)", **few)
    assert torch.equal(still.images, plain)
    bright = sample_guided(model, "brightness", ["a cat"], "pgdiff_dynamic(strength=0.5, eta=0)", **few)
    assert (bright.rewards > still.rewards).all()


def test_long_prompts_are_counted(folder: Path) -> None:
    """With the template's tokens; a counted prompt is one that is cut."""
    model = load_model(folder)
    around = len(model.pipeline.tokenizer(model.pipeline.prompt_template_encode.format("")).input_ids)
    fits, longer = "a" * (546 - around), "a" * (547 - around)
    (found,) = model.truncated([fits, longer])
    assert (found.limit, found.cut) == (546, 1)
    assert [model.encode([prompt], "", False).text.shape[1] for prompt in (fits[1:], fits, longer)] == [511, 512, 512]


def test_memory_is_counted(folder: Path, tmp_path: Path) -> None:
    """From the configs, with their sequences of any length and convolutions in time."""
    settings = {
        "model": str(folder),
        "reward": "brightness",
        "output": str(tmp_path),
        "lora_rank": 2,
        "method": "draft",
    }
    found = count_run(Settings(**settings, num_inference_steps=2, batch_size=2, height=SIZE, width=SIZE, device="cpu"))
    model = load_model(folder)
    networks = (model.denoiser, model.pipeline.vae)  # the text encoder is freed
    parameters = sum(parameter.numel() for part in networks for parameter in part.parameters())
    lora = 2 * 16 * 2 * 2 * 4  # rank, width, both matrices, blocks, layers of each block
    assert found.networks >= 2 * parameters + 4 * lora  # bf16, and float32 for the LoRA
    assert found.optimizer == 2 * 4 * lora
    assert found.update > 0


def test_published_sampling(folder: Path) -> None:
    assert variant(str(folder)) == "qwen-image"
    parameters = inspect.signature(diffusers.QwenImagePipeline.__call__).parameters
    assert PUBLISHED["qwen-image"][:2] == tuple(
        parameters[name].default for name in ("num_inference_steps", "true_cfg_scale")
    )
    assert load_model(folder).recommended.items() >= {"num_inference_steps": 50, "method": "refl(m=10)"}.items()


def test_refusals(folder: Path) -> None:
    with raises(DraftuneError, "height 8 36"):
        load_model(folder).set_size(36, None)
    parts = DiffusionPipeline.from_pretrained(folder).components
    cases: dict[str, dict[str, Any]] = {
        "text_encoder": {"text_encoder": None},
        "DDIMScheduler": {"scheduler": DDIMScheduler()},
    }
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "guidance_embeds": ("transformer", {"guidance_embeds": True}),
        "joint_attention_dim 24 16": ("transformer", {"joint_attention_dim": 24}),
        "in_channels 8 16": ("transformer", {"in_channels": 8}),
        "out_channels 8 4": ("transformer", {"out_channels": 8}),
        "axes_dims_rope 10 8": ("transformer", {"axes_dims_rope": (4, 2, 4)}),
        "input_channels 4 3": ("vae", {"input_channels": 4}),
        "latents_std 4": ("vae", {"latents_std": [1.0, 2.0]}),
    }
    for words, (part, change) in changes.items():
        cases[words] = {part: type(parts[part]).from_config({**parts[part].config, **change})}
    for words, change in cases.items():
        with raises(DraftuneError, words):
            load_model(diffusers.QwenImagePipeline(**{**parts, **change}))
