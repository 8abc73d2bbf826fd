"""Z-Image: a language model reads the prompts, the time runs backwards, and guidance is counted from 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from test_flow import drawing, enliven, tiny_vae
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.guidance.sample import sample_guided
from draftune.lora import add_lora, lora_parameters
from draftune.models import load_model
from draftune.published import PUBLISHED, variant
from draftune.recommended import tell_sampling
from helpers.draft_k import check_draft_k
from helpers.errors import mentions, raises
from helpers.language_models import tiny_qwen
from helpers.model_checks import (
    STEPS,
    check_guidance,
    check_pictures,
    check_targets,
    check_training,
    drawn,
    opened,
)

OFFICIAL = pytest.importorskip("diffusers.pipelines.z_image.pipeline_z_image")
if not hasattr(OFFICIAL, "get_default_z_image_sigmas"):
    pytest.skip("the pipeline of this diffusers has other noise levels", allow_module_level=True)
ZImagePipeline, ZImageTransformer2DModel = diffusers.ZImagePipeline, diffusers.ZImageTransformer2DModel

# The scheduler configs published with the models.
BASE = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": 6.0}
TURBO = {**BASE, "shift": 3.0}


def build(folder: Path, scheduler: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    tokenizer, language_model = tiny_qwen(folder / "letters")
    enliven(language_model)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[640, 32, 32],
    )
    enliven(transformer)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=tiny_vae(),
        text_encoder=language_model.model,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder / "model")
    # As published: the index names the class without a head, the files are those of the class with one.
    language_model.save_pretrained(folder / "model" / "text_encoder")
    index = json.loads((folder / "model" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "Qwen3Model"]
    return folder / "model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base"), BASE)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("turbo"), TURBO)


def test_pictures(base: Path) -> None:
    """A scale of 5 is 4 in diffusers."""
    check_pictures(base, drawing(4.0, 16), 5.0, size=16)
    check_pictures(base, drawing(0.5, 16), 1.5, size=16)
    check_guidance(base, 5.0, size=16)


def test_turbo_pictures(turbo: Path) -> None:
    check_pictures(turbo, drawing(0.0, 16), 0.0, size=16)


def test_negative_prompt(base: Path) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(base), opened(base, 16)
    ours = model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 5.0, "bad dog")
    assert (ours - drawing(4.0, 16, negative_prompt="bad dog")(pipeline, "a cat", 0)).abs().max() <= 1e-3
    assert (ours - drawn(model, "a cat", 0, 5.0)).abs().max() > 1e-3


def test_prompts_of_different_lengths_in_any_shape(base: Path) -> None:
    """Also across the 32 tokens that the network's sequences are multiples of."""
    pipeline, model = DiffusionPipeline.from_pretrained(base), load_model(base)
    assert model.latent_shape == (4, 512, 512)  # 1024 pixels
    model.set_size(12, 20)
    prompts = ["a cat", "a dog that sits on a chair, looks at a cat"]
    noise = torch.cat([torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    ours = model.sample_tensors(prompts, [0, 1], model.schedule(STEPS), 5.0)
    assert ours.shape == (2, 3, 12, 20)
    assert (ours - drawing(4.0, 12, 20, latents=noise)(pipeline, prompts, 0)).abs().max() <= 1e-3


def test_shift_by_the_size(tmp_path: Path) -> None:
    """Not of a published model, but the pipeline computes it."""
    lengths = {"base_image_seq_len": 16, "max_image_seq_len": 1016, "max_shift": 1.5}
    folder = build(tmp_path, {"use_dynamic_shifting": True, **lengths})
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    levels = []
    for side in (16, 60):
        model.set_size(side, side)
        ours = drawn(model, "a cat", 0, 5.0)
        assert (ours - drawing(4.0, side)(pipeline, "a cat", 0)).abs().max() <= 1e-3
        levels.append(model.schedule(STEPS).steps[1].sigma)
    assert levels[1] > levels[0] + 0.01


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "denoiser"])
def test_draft_k_equals_plain_autograd(base: Path, checkpointing: str) -> None:
    """In float64; the official network's rotations and time are float32 in every precision."""
    pipeline = ZImagePipeline.from_pretrained(base, torch_dtype=torch.float64)
    prompts = ["a cat", "a dog that sits on a chair, looks at a cat"]

    def official(noise: Tensor) -> Tensor:
        positive, negative = pipeline.encode_prompt(list(prompts), negative_prompt=["", ""])
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
        levels = scheduler.sigmas.double()
        assert torch.allclose(levels, torch.tensor([1, 12 / 13, 6 / 8, 0], dtype=torch.float64))
        x = noise
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= 1):  # the last two steps of three
                latents, time = [*x[:, :, None], *x[:, :, None]], ((1000 - timestep) / 1000).expand(4)
                output = torch.stack(pipeline.transformer(latents, time, positive + negative, return_dict=False)[0])
                guided = output[:2] + 2 * (output[:2] - output[2:])
                x = x - (levels[i + 1] - levels[i]) * guided[:, :, 0]
        vae = pipeline.vae
        images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
        return images

    check_draft_k(pipeline, checkpointing, prompts, official, 16)


def test_training(base: Path, tmp_path: Path) -> None:
    check_training(base, tmp_path, drawing(4.0, 16), 5.0, size=16, lora_rank=2, lora_alpha=4.0)


def test_more_targets(turbo: Path, tmp_path: Path) -> None:
    """Every layer of the blocks is trained, as docs/reference/models.md names them, and exported."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    assert "`feed_forward.w1,feed_forward.w2,feed_forward.w3`" in page
    targets = ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    model = opened(turbo, 16)
    add_lora(model, 2, targets=targets)
    parameters = lora_parameters(model)
    assert len(parameters) == 2 * 7 * 4
    prompts = ["a cat", "a dog"]
    check_targets(model, tmp_path, drawing(0.0, 16), 0.0, "diffusers", "merged", prompts=prompts)
    with raises(DraftuneError, "UNet"):
        draftune.export_lora(tmp_path / "lora", tmp_path / "lora.safetensors", "kohya", model=str(turbo))


def test_bfloat16(base: Path) -> None:
    """The network is told and says what it does in the official pipeline held in bfloat16."""
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(lambda _, told, said: calls.append((told[0][0], said[0][0])))
    drawing(0.0, 16)(pipeline, "a cat", 0)
    model = opened(base, 16).to("cpu", "bf16")
    for step, (x, theirs) in zip(model.schedule(STEPS).steps, calls, strict=True):
        with torch.no_grad(), model.autocast():
            ours = model.predict(x[None, :, 0].float(), step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert ours.dtype == torch.float32
        assert (ours + theirs[:, 0]).abs().mean() < 0.01 * theirs.float().std()


def test_guided_sampling(base: Path) -> None:
    """A guidance scale of 1 is none in it as well."""
    model, few = opened(base, 16), {"num_inference_steps": 4, "guidance_scale": 2.0}
    plain = model.sample_tensors(["a cat"], [0], model.schedule(4), 2.0)
    still = sample_guided(model, "brightness", ["a cat"], "pgdiff_dynamic(strength=0, eta=0)", **few)
    assert torch.equal(still.images, plain)
    bright = sample_guided(model, "brightness", ["a cat"], "pgdiff_dynamic(strength=0.5, eta=0)", **few)
    assert (bright.rewards > still.rewards).all()


def test_long_prompts_are_counted(base: Path) -> None:
    """With the template's tokens."""
    model = load_model(base)
    around = len(model.pipeline.tokenizer(model.chat("")).input_ids)
    (found,) = model.truncated(["a" * (512 - around), "a" * (513 - around)])
    assert (found.limit, found.cut) == (512, 1)


def test_published_sampling(
    base: Path, turbo: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftune.recommended.announced", set())
    assert PUBLISHED[variant(str(base)) or ""][:2] == (50, 5.0)
    assert PUBLISHED[variant(str(turbo)) or ""][:2] == (8, 0.0)
    tell_sampling(str(base))
    assert caplog.messages == []
    tell_sampling(str(turbo))
    (line,) = caplog.messages
    assert mentions(line, "few-step", 8, 0)
    assert load_model(turbo).recommended.items() >= {"num_inference_steps": 8, "guidance_scale": 0.0}.items()


def test_refusals(base: Path) -> None:
    with raises(DraftuneError, "height 4 18"):
        load_model(base).set_size(18, 16)
    with raises(DraftuneError, "width 128 132"):
        load_model(base).set_size(16, 132)
    parts = DiffusionPipeline.from_pretrained(base).components
    with raises(DraftuneError, "text_encoder"):
        load_model(ZImagePipeline(**parts | {"text_encoder": None}))
    with raises(DraftuneError, "DDIMScheduler"):
        load_model(ZImagePipeline(**parts | {"scheduler": DDIMScheduler()}))
    config = dict(parts["transformer"].config)
    changes = {
        "in_channels 8 4": {"in_channels": 8},
        "cap_feat_dim 24 16": {"cap_feat_dim": 24},
        "axes_lens 514": {"axes_lens": [64, 32, 32]},
        "patch (2, 1)": {"all_patch_size": [4]},
    }
    for message, change in changes.items():
        other = ZImageTransformer2DModel.from_config({**config, **change})
        with raises(DraftuneError, message):
            load_model(ZImagePipeline(**parts | {"transformer": other}))
    parts["tokenizer"].chat_template = None
    with raises(DraftuneError, "chat_template"):
        load_model(ZImagePipeline(**parts))
