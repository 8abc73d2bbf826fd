"""Lumina-Image 2.0: Gemma 2 behind a system prompt, negated outputs, norms of rows, guidance in the first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from test_flow import drawing, enliven, tiny_vae
from test_sana import tiny_gemma
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters
from draftune.models import load_model
from draftune.models.lumina2 import Lumina2
from draftune.published import PUBLISHED, variant
from helpers.draft_k import check_draft_k
from helpers.errors import raises
from helpers.model_checks import (
    STEPS,
    check_bf16_training,
    check_guidance,
    check_long_prompts,
    check_pictures,
    check_training,
)

SIZE = 32
PROMPTS = ["a cat", "a dog that sits on a chair, looks at a cat"]
SHIFT = {"num_train_timesteps": 1000, "shift": 6.0}


def save_lumina(folder: Path, scheduler: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    tokenizer, gemma = tiny_gemma(folder / "words", layers=2)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    )
    enliven(gemma)
    enliven(transformer)
    Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler or SHIFT),
        vae=tiny_vae(4),
        text_encoder=gemma,
        tokenizer=tokenizer,
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lumina(tmp_path_factory.mktemp("lumina"))


@pytest.fixture
def always_guided(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, as diffusers does unless it is asked for less."""
    monkeypatch.setattr(Lumina2, "guided_share", 1.0)


def published(steps: int, **asked: Any) -> Any:
    return drawing(4.0, SIZE, **{"num_inference_steps": steps, "cfg_trunc_ratio": 0.25, **asked})


@pytest.mark.usefixtures("always_guided")
def test_pictures(folder: Path) -> None:
    check_pictures(folder, drawing(4.0, SIZE), 4.0)
    check_pictures(folder, drawing(1.0, SIZE), 1.0)
    check_guidance(folder, 4.0)


@pytest.mark.parametrize("steps", [1, 3, 4, 9, 30])
def test_guidance_of_the_first_steps_alone(folder: Path, steps: int) -> None:
    """Of the first quarter, in which the batch is doubled."""
    model, sizes = load_model(folder), []
    model.denoiser.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    ours = model.sample_tensors(["a cat"], [0], model.schedule(steps), 4.0)
    guided = steps // 4
    assert sizes == [2] * guided + [1] * (steps - guided)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert (ours - published(steps)(pipeline, "a cat", 0)).abs().max() <= 1e-3
    plain = model.sample_tensors(["a cat"], [0], model.schedule(steps), 1.0)
    assert torch.equal(ours, plain) == (guided == 0)


def test_prompts_of_different_lengths_in_any_shape(folder: Path) -> None:
    """In one batch as each alone, with a negative prompt."""
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    assert model.latent_shape == (4, 4, 4)
    model.set_size(32, 64)
    ours = model.sample_tensors(PROMPTS, [0, 1], model.schedule(8), 4.0, "bad dog")
    assert ours.shape == (2, 3, 32, 64)
    for i, prompt in enumerate(PROMPTS):
        draw = drawing(4.0, 32, 64, num_inference_steps=8, cfg_trunc_ratio=0.25, negative_prompt="bad dog")
        assert (ours[i : i + 1] - draw(pipeline, prompt, i)).abs().max() <= 1e-3
    assert (ours - model.sample_tensors(PROMPTS, [0, 1], model.schedule(8), 4.0)).abs().max() > 1e-3


def test_dynamic_shift(tmp_path: Path) -> None:
    """Not of the published model. diffusers computes it from the number of channels."""
    folder = save_lumina(tmp_path, {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 8})
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    ours = model.sample_tensors(["a cat"], [0], model.schedule(8), 4.0)
    assert (ours - published(8)(pipeline, "a cat", 0)).abs().max() <= 1e-3


CASES = [(1.0, 2, "none"), (1.0, 2, "blocks"), (0.5, 4, "denoiser")]


@pytest.mark.parametrize(("share", "k", "checkpointing"), CASES)
def test_draft_k_equals_plain_autograd(
    folder: Path, share: float, k: int, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with guidance in all trained steps or only in the first of them."""
    monkeypatch.setattr(Lumina2, "guided_share", share)
    pipeline = Lumina2Pipeline.from_pretrained(folder, torch_dtype=torch.float64)

    def official(noise: Tensor) -> Tensor:
        text, mask, negative, negative_mask = pipeline.encode_prompt(PROMPTS, negative_prompt=["", ""])
        scheduler, x = pipeline.scheduler, noise
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
        levels = scheduler.sigmas.double()
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= 5 - k):
                time = (1 - timestep / 1000).expand(2)
                output = pipeline.transformer(x, time, text, mask).sample
                if (i + 1) / 5 <= share:
                    other = pipeline.transformer(x, time, negative, negative_mask).sample
                    guided = other + 3 * (output - other)
                    output = guided * (output.square().sum(3, True) / guided.square().sum(3, True)).sqrt()
                x = x - (levels[i + 1] - levels[i]) * output
        vae = pipeline.vae
        images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
        return images

    check_draft_k(pipeline, checkpointing, PROMPTS, official, steps=5, k=k)


@pytest.mark.usefixtures("always_guided")
def test_training(folder: Path, tmp_path: Path) -> None:
    check_training(folder, tmp_path, drawing(4.0, SIZE), 4.0, lora_rank=2, lora_alpha=4.0)


def test_more_targets(folder: Path, tmp_path: Path) -> None:
    """Every layer of the blocks is trained, as docs/reference/models.md names them, and exported."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    more = "feed_forward.linear_1,feed_forward.linear_2,feed_forward.linear_3"
    assert f"`{more}`" in page
    model = load_model(folder)
    add_lora(model, 2, targets=f"{PUBLISHED['lumina-2'].lora_target_modules},{more}".split(","))
    parameters = lora_parameters(model)
    assert len(parameters) == 2 * 7 * 4
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    schedule, x = model.schedule(4), model.noise(torch.Generator().manual_seed(0), 2)
    denoise = model.denoiser_for(PROMPTS, schedule, 4.0)
    (denoise(x, schedule.steps[0]).clean * torch.randn_like(x)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    ours = model.sample_tensors(["a cat"], [0], model.schedule(8), 4.0)
    draftune.save_lora(model, tmp_path / "lora")
    for kind in ("diffusers", "merged"):
        draftune.export_lora(tmp_path / "lora", tmp_path / kind, kind, model=str(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "diffusers", weight_name="pytorch_lora_weights.safetensors")
    for theirs in (pipeline, DiffusionPipeline.from_pretrained(tmp_path / "merged")):
        assert (published(8)(theirs, "a cat", 0) - ours).abs().max() <= 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(folder: Path, precision: str) -> None:
    """The network is told and says what it does in the official pipeline; Gemma 2 stays in float32 in fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.transformer.to(dtype)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, __, told, said: calls.append((told["hidden_states"], said[0])), with_kwargs=True
    )
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, told: (args, {name: half(value, dtype) for name, value in told.items()}), with_kwargs=True
    )
    drawing(1.0, SIZE, output_type="latent")(pipeline, "a cat", 0)
    model = load_model(folder, precision).to("cpu", precision)
    assert model.pipeline.text_encoder.dtype == (torch.float32 if precision == "fp16" else dtype)
    for step, (x, theirs) in zip(model.schedule(STEPS).steps, calls, strict=True):
        with torch.no_grad(), model.autocast():
            ours = model.predict(x.float(), step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert ours.dtype == torch.float32
        assert (ours + theirs).abs().mean() < (0.01 if precision == "fp16" else 0.05) * theirs.float().std()


def half(value: Any, dtype: torch.dtype) -> Any:
    """Embeddings and latents in half precision, but not the time."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else value


def test_bf16_trains(folder: Path, tmp_path: Path) -> None:
    check_bf16_training(folder, tmp_path)


def test_long_prompts_are_counted(folder: Path) -> None:
    check_long_prompts(folder)


def test_published_sampling(folder: Path) -> None:
    assert variant(str(folder)) == "lumina-2"
    wanted = {"num_inference_steps": 50, "guidance_scale": 4.0, "method": "refl(m=10)"}
    assert load_model(folder).recommended.items() >= wanted.items()


def test_refusals(folder: Path) -> None:
    with raises(DraftuneError, "height 16 40"):
        load_model(folder).set_size(40, 32)
    with raises(DraftuneError, "width 256 272"):
        load_model(folder).set_size(32, 272)
    parts = DiffusionPipeline.from_pretrained(folder).components
    cases: dict[str, dict[str, Any]] = {
        "text_encoder": {"text_encoder": None},
        "DDIMScheduler": {"scheduler": DDIMScheduler()},
        "pixels 2 8": {"vae": tiny_vae()},
        "shift_factor None": {"vae": AutoencoderKL.from_config({**parts["vae"].config, "shift_factor": None})},
    }
    changes = {
        "in_channels 8 4": {"in_channels": 8},
        "out_channels 8 4": {"out_channels": 8},
        "cap_feat_dim 24 16": {"cap_feat_dim": 24},
        "axes_lens 257": {"axes_lens": [256, 16, 16]},
        "axes_dim_rope 10 8": {"axes_dim_rope": [6, 2, 2]},
        "patch_size 4 2": {"patch_size": 4},
        "sample_size 5 2": {"sample_size": 5},
    }
    for words, change in changes.items():
        cases[words] = {"transformer": Lumina2Transformer2DModel.from_config({**parts["transformer"].config, **change})}
    for words, change in cases.items():
        with raises(DraftuneError, words):
            load_model(Lumina2Pipeline(**{**parts, **change}))
