"""Chroma: FLUX.1's blocks under an attention mask, with classifier-free guidance."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from test_flow import DEV, brighter, drawing, enliven, tiny_t5, tiny_vae
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import add_lora, lora_parameters
from draftune.models import load_model
from draftune.published import PUBLISHED, variant
from helpers.draft_k import check_draft_k
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

SIZE = 16
PROMPTS = ["a cat", "a dog that sits on a chair and looks at a cat"]
SCHEDULERS: dict[str, dict[str, Any]] = {
    "static shift": {"shift": 3.0},
    "shift by the size": {**DEV, "base_image_seq_len": 16, "max_image_seq_len": 48},
    "beta levels": {"use_beta_sigmas": True},
}


def save_chroma(folder: Path, scheduler: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(folder / "t5")
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    enliven(text_encoder)
    enliven(transformer)
    ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler or SCHEDULERS["static shift"]),
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chroma(tmp_path_factory.mktemp("chroma"))


def test_pictures(folder: Path) -> None:
    check_pictures(folder, drawing(5.0, SIZE), 5.0, size=SIZE)
    check_pictures(folder, drawing(1.0, SIZE), 1.0, size=SIZE)
    check_guidance(folder, 5.0, size=SIZE)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_schedulers_and_steps(scheduler: str, steps: int, tmp_path: Path) -> None:
    folder = save_chroma(tmp_path, SCHEDULERS[scheduler])
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    for height, width in ((16, 16), (20, 24)):
        model.set_size(height, width)
        ours = model.sample_tensors(["a cat"], [0], model.schedule(steps), 5.0)
        theirs = drawing(5.0, height, width, num_inference_steps=steps)(pipeline, "a cat", 0)
        assert (ours - theirs).abs().max() <= 1e-3


def test_prompts_of_different_lengths_in_any_shape(folder: Path) -> None:
    """In one batch as each alone, with a negative prompt."""
    pipeline, model = DiffusionPipeline.from_pretrained(folder), load_model(folder)
    assert model.latent_shape == (4, 128, 128)
    model.set_size(12, 20)
    ours = model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 5.0, "bad dog")
    assert ours.shape == (2, 3, 12, 20)
    draw = drawing(5.0, 12, 20, negative_prompt="bad dog")
    for i, prompt in enumerate(PROMPTS):
        assert (ours[i : i + 1] - draw(pipeline, prompt, i)).abs().max() <= 1e-3
    assert (ours - model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 5.0)).abs().max() > 1e-3


def test_mask(folder: Path) -> None:
    """The transformer is told what it is told in the official pipeline, and the pictures depend on it."""
    pipeline, model = DiffusionPipeline.from_pretrained(folder), opened(folder, SIZE)
    masks: list[Tensor] = []
    for network in (pipeline.transformer, model.denoiser):
        network.register_forward_hook(lambda _, __, told, ___: masks.append(told["attention_mask"]), with_kwargs=True)
    drawing(1.0, SIZE)(pipeline, "a cat", 0)
    ours = drawn(model, "a cat", 0, 1.0)
    assert torch.equal(masks[0], masks[-1])
    tokens = model.pipeline.tokenizer("a cat", return_tensors="pt").input_ids.shape[1]
    assert masks[0].sum() == tokens + 1 + 16  # one padding token and the image's
    model.denoiser.register_forward_pre_hook(
        lambda _, args, told: (args, told | {"attention_mask": torch.ones_like(told["attention_mask"])}),
        with_kwargs=True,
    )
    assert (drawn(model, "a cat", 0, 1.0) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "denoiser", "both"])
def test_draft_k_equals_plain_autograd(folder: Path, checkpointing: str) -> None:
    """In float64; diffusers' own checkpointing leaves the mask out."""
    pipeline = ChromaPipeline.from_pretrained(folder, torch_dtype=torch.float64)

    def official(noise: Tensor) -> Tensor:
        assert not pipeline.transformer.is_gradient_checkpointing
        text, text_ids, mask, other, _, other_mask = pipeline.encode_prompt(PROMPTS, ["", ""])
        ids = pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float64)
        scheduler, vae, x = pipeline.scheduler, pipeline.vae, pipeline._pack_latents(noise, 2, 4, 8, 8)
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
        levels, image = scheduler.sigmas.double(), torch.ones(2, 16)
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= 1):  # the last two steps of three
                time = timestep.expand(2).double() / 1000
                positive, negative = (
                    pipeline.transformer(x, states, time, ids, text_ids, torch.cat([part, image.to(part)], 1)).sample
                    for states, part in ((text, mask), (other, other_mask))
                )
                x = x + (levels[i + 1] - levels[i]) * (negative + 3 * (positive - negative))
        latents = pipeline._unpack_latents(x, SIZE, SIZE, 2)
        images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
        return images

    check_draft_k(pipeline, checkpointing, PROMPTS, official, SIZE)


def test_blocks_are_recomputed(folder: Path) -> None:
    """The graph of a call stores less with it."""
    stored = []
    for mode in ("none", "blocks"):
        model = opened(folder, SIZE)
        model.set_checkpointing(mode)
        add_lora(model, 2)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        denoise = model.denoiser_for(PROMPTS, schedule := model.schedule(2), 5.0)
        x = model.noise(torch.Generator().manual_seed(0), 2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = denoise(x, schedule.steps[0])
        stored.append(sum(kept.values()))
        prediction.clean.sum().backward()
    assert stored[1] < 0.5 * stored[0]


def test_training(folder: Path, tmp_path: Path) -> None:
    check_training(folder, tmp_path, drawing(5.0, SIZE), 5.0, size=SIZE, lora_rank=2, lora_alpha=4.0)


def test_recommended_targets(folder: Path, tmp_path: Path) -> None:
    """All get a gradient, and are exported."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
    assert "`proj_mlp,proj_out`" in page
    model = opened(folder, SIZE)
    add_lora(model, 2, targets=f"{PUBLISHED['chroma'].lora_target_modules},proj_mlp,proj_out".split(","))
    assert model.unused_layers() == frozenset()
    parameters = lora_parameters(model)
    assert len(parameters) == 2 * (12 + 2 * 5 + 1)
    check_targets(model, tmp_path, drawing(5.0, SIZE), 5.0, "diffusers", "merged", "comfyui", prompts=PROMPTS)


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    """The network is told and says what it does in the official pipeline held in bfloat16."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, __, told, said: calls.append((told["hidden_states"], said[0])), with_kwargs=True
    )
    drawing(1.0, SIZE)(pipeline, "a cat", 0)
    model = opened(folder, SIZE).to("cpu", "bf16")
    for step, call in zip(model.schedule(STEPS).steps, calls, strict=True):
        x, theirs = (pipeline._unpack_latents(tokens, SIZE, SIZE, 2) for tokens in call)
        with torch.no_grad(), model.autocast():
            ours = model.predict(x.float(), step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert (ours - theirs).abs().mean() < 0.01 * theirs.float().std()
    settings = {"method": "draft_k(k=2)", "steps": 2, "num_inference_steps": 2, "lora_rank": 2, "log_images_steps": 0}
    settings |= {"num_log_prompts": 1, "height": SIZE, "width": SIZE, "gradient_checkpointing": "both"}
    settings |= {"batch_size": 2, "mixed_precision": "bf16", "output": str(tmp_path)}
    run = draftune.train(load_model(folder, "bf16"), brighter, prompts=["a cat"], **settings)
    assert all(row["grad_norm"] > 0 for row in run.metrics)


def test_published_sampling(folder: Path) -> None:
    assert variant(str(folder)) == "chroma"
    parameters = inspect.signature(ChromaPipeline.__call__).parameters
    names = ("num_inference_steps", "guidance_scale")
    assert PUBLISHED["chroma"][:2] == tuple(parameters[name].default for name in names)
    assert load_model(folder).recommended.items() >= {"num_inference_steps": 35, "method": "refl(m=10)"}.items()


def test_refusals(folder: Path) -> None:
    with raises(DraftuneError, "height 4 18"):
        load_model(folder).set_size(18, 16)
    parts = DiffusionPipeline.from_pretrained(folder).components
    cases: dict[str, dict[str, Any]] = {
        "text_encoder": {"text_encoder": None},
        "DDIMScheduler": {"scheduler": DDIMScheduler()},
    }
    changes = {
        "in_channels 8 16": {"in_channels": 8},
        "joint_attention_dim 24 16": {"joint_attention_dim": 24},
        "axes_dims_rope 10 8": {"axes_dims_rope": (4, 2, 4)},
        "patch_size 2 1": {"patch_size": 2},
    }
    for words, change in changes.items():
        cases[words] = {"transformer": ChromaTransformer2DModel.from_config({**parts["transformer"].config, **change})}
    for words, change in cases.items():
        with raises(DraftuneError, words):
            load_model(ChromaPipeline(**{**parts, **change}))
