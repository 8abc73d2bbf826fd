"""Unconditional models of pixels: DDPM and DDIM pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME, set_lora_scale
from draftune.methods import load_method
from draftune.methods.drtune import linear_path
from draftune.models import load_model
from draftune.runs.export import export_lora
from draftune.runs.merge import merge_loras
from draftune.sampling.clip import ClipSample
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Schedule, Step, ddim_schedule
from helpers.errors import raises
from helpers.model_checks import STEPS, check_pictures, check_training, drawn
from helpers.pipelines import add_random_lora
from helpers.published_weights import randomise


class AdaptableUNet(UNet2DModel, PeftAdapterMixin):
    """As the docs say how diffusers loads such a LoRA."""


def build(folder: Path, pipeline: Any = DDPMPipeline, scheduler: Any = DDPMScheduler, **options: Any) -> Path:
    """A random pipeline; `options` are the UNet's, and in `grid` the scheduler's."""
    torch.manual_seed(0)
    grid = options.pop("grid", {})
    unet = UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **options,
        }
    )
    pipeline(unet=randomise(unet), scheduler=scheduler(**grid)).save_pretrained(folder)
    return folder


def draw(pipeline: Any, prompt: str, seed: int, spacing: str = "leading") -> Tensor:
    """By DDIM, which either pipeline becomes."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    ddim = DDIMPipeline(unet=pipeline.unet, scheduler=scheduler)
    ddim.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(ddim(generator=generator, num_inference_steps=STEPS, output_type="np").images).movedim(3, 1)


def trailing(pipeline: Any, prompt: str, seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, "trailing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ddpm") / "model")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "clip",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.3},
        {"clip_sample": False},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    ],
)
def test_pictures_are_ddims_however_they_are_clipped(
    tmp_path: Path, clip: dict[str, Any], prediction_type: str
) -> None:
    grid = {"prediction_type": prediction_type, **clip}
    check_pictures(build(tmp_path / "ddpm", grid=grid), draw, 1.0)
    build(tmp_path / "ddim", DDIMPipeline, DDIMScheduler, grid={**grid, "set_alpha_to_one": False, "steps_offset": 1})
    check_pictures(tmp_path / "ddim", trailing, 1.0, "trailing")


def test_clipping_matters(tmp_path: Path) -> None:
    pictures = [
        drawn(load_model(build(tmp_path / str(i), grid=clip)), "", 0, 1.0)
        for i, clip in enumerate(({}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}))
    ]
    assert all((a - b).abs().max() > 0.01 for a, b in zip(pictures, [pictures[-1], *pictures], strict=False))


def test_a_scheduler_that_says_nothing_of_clipping_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    build(tmp_path / "model", scheduler=DPMSolverMultistepScheduler)
    check_pictures(tmp_path / "model", lambda *asked: draw(*asked, "linspace"), 1.0)


def test_the_gradient_through_the_clip_is_that_of_diffusers_own_steps(folder: Path) -> None:
    model = load_model(folder)
    schedule = model.schedule(STEPS)
    noise = model.noise(torch.Generator().manual_seed(0), 1)
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(STEPS)
    gradients = []
    for ours in (True, False):
        start = x = noise.clone().requires_grad_()
        if ours:
            x = rollout(model.denoiser_for([""], schedule, 1.0), schedule.steps, x)
        else:
            for t in scheduler.timesteps:
                x = scheduler.step(model.denoiser(x, t).sample, t, x).prev_sample
        (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
        assert start.grad is not None
        gradients.append(start.grad)
    assert (x.abs() == 1).float().mean() > 0.1, "nothing is clipped: the test says nothing"
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[1].abs().max()
    unclipped = Schedule(schedule.steps, schedule.prediction_type)
    start = noise.clone().requires_grad_()
    x = rollout(model.denoiser_for([""], unclipped, 1.0), schedule.steps, start)
    (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
    assert start.grad is not None
    assert (start.grad - gradients[1]).abs().max() > 0.01 * gradients[1].abs().max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_drtunes_way_back_ends_where_the_picture_was_clipped(prediction_type: str) -> None:
    step = Step(10, 0.8, 0.6, 0.9, 0.43)
    schedule = Schedule((step,), prediction_type, ClipSample(1.0))
    x, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    wanted = schedule.to_prediction(output, x, step)
    found = linear_path(schedule.to_prediction(output, x.detach(), step), x, step, schedule)
    assert 0.1 < (wanted.clean.abs() == 1).float().mean() < 0.9
    for theirs, ours in zip(wanted, found, strict=True):
        assert torch.equal(theirs, ours)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        if theirs.requires_grad:
            (a,) = torch.autograd.grad((theirs * weights).sum(), x, retain_graph=True)
            (b,) = torch.autograd.grad((ours * weights).sum(), x, retain_graph=True)
            assert (a - b).abs().max() <= 1e-6


def test_latents_are_never_clipped() -> None:
    config = {"clip_sample": True, "thresholding": True}
    assert ddim_schedule(config, 5).clip is None
    assert ddim_schedule(config, 5, clipped=True).clip == ClipSample(1.0, 0.995)
    assert ddim_schedule({"clip_sample": False}, 5, clipped=True).clip is None
    read = Schedule((), "sample", ClipSample(0.5)).to_prediction(
        torch.tensor([[[[2.0]]]]), torch.zeros(1, 1, 1, 1), Step(1, 1, 1, 1, 1)
    )
    assert read == Prediction(torch.tensor([[[[0.5]]]]), torch.tensor([[[[-2.0]]]]))


def test_a_lora_is_trained_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    def load(pipeline: Any, lora: Path) -> None:
        pipeline.unet = AdaptableUNet.from_pretrained(folder, subfolder="unet")
        pipeline.unet.load_lora_adapter(lora, prefix="unet", weight_name=FILE_NAME)

    check_training(folder, tmp_path, trailing, 1.0, load)


def test_dynamic_thresholding_is_refused_where_its_gradient_is_not_known(tmp_path: Path) -> None:
    model = load_model(build(tmp_path / "model", grid={"thresholding": True}))
    for method in ("drtune(k=1, m=1)", "leapalign", "flowbp_sparse(k=1)"):
        with raises(DraftuneError, "thresholding"):
            load_method(method).check(model.schedule(STEPS))
    load_method("draft").check(model.schedule(STEPS))


def test_loras_are_mixed_scaled_and_exported(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    base = drawn(model, "", 0, 1.0)
    add_random_lora(model)
    tuned = drawn(model, "", 0, 1.0)
    assert (tuned - base).abs().max() > 0.01
    draftune.save_lora(model, tmp_path / "lora")
    mixed = merge_loras([(str(tmp_path / "lora"), 0.25), (str(tmp_path / "lora"), 0.75)], str(tmp_path / "mixed"))
    again = load_model(folder)
    draftune.load_lora(again, mixed)
    assert (drawn(again, "", 0, 1.0) - tuned).abs().max() <= 1e-4
    set_lora_scale(again, 0.0)
    assert (drawn(again, "", 0, 1.0) - base).abs().max() <= 1e-5
    export_lora(tmp_path / "lora", tmp_path / "merged", "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert merged.scheduler.config.clip_sample
    generator = torch.Generator().manual_seed(0)
    picture = merged(generator=generator, num_inference_steps=STEPS, output_type="np").images
    assert (torch.from_numpy(picture).movedim(3, 1) - tuned).abs().max() <= 1e-3
    assert (drawn(load_model(tmp_path / "merged"), "", 0, 1.0) - tuned).abs().max() <= 1e-4
    with raises(DraftuneError, "kohya"):
        export_lora(tmp_path / "lora", tmp_path / "lora.safetensors", "kohya")


def test_prompts_and_guidance_change_nothing_but_the_reward(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    schedule = model.schedule(STEPS)
    one = model.sample_tensors(["a cat"], [0], schedule, 7.5, "a dog")
    assert torch.equal(one, model.sample_tensors([""], [0], schedule, 1.0))
    seen: list[str] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.extend(prompts)
        return images.mean((1, 2, 3))

    output = str(tmp_path / "run")
    draftune.train(model, reward, prompts=["a cat"], steps=1, num_inference_steps=2, log_images_steps=0, output=output)
    assert "a cat" in seen


def test_the_layout_of_the_first_published_pipelines(folder: Path, tmp_path: Path) -> None:
    """The UNet beside the index, and its attention by the names of that time."""
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    for part in ("unet", "scheduler"):
        for file in (old / part).iterdir():
            file.rename(old / file.name)
        (old / part).rmdir()
    weights = old / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(weights)
    for new, name in names.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, weights, {"format": "pt"})
    assert torch.equal(drawn(load_model(old), "", 0, 1.0), drawn(load_model(folder), "", 0, 1.0))
    del tensors["conv_in.bias"]
    save_file(tensors, weights, {"format": "pt"})
    with raises(DraftuneError, "1 conv_in.bias"):
        load_model(old)


def test_grey_pictures_and_other_sizes(tmp_path: Path) -> None:
    grey = load_model(build(tmp_path / "grey", in_channels=1, out_channels=1, sample_size=[8, 16]))
    pictures = drawn(grey, "", 0, 1.0)
    assert pictures.shape == (1, 3, 8, 16)
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "grey")
    assert (draw(pipeline, "", 0) - pictures[:, :1]).abs().max() <= 1e-3
    grey.set_size(12, None)
    assert drawn(grey, "", 0, 1.0).shape == (1, 3, 12, 16)
    for wrong in (7, 0):
        with raises(DraftuneError, "width 2", wrong):
            grey.set_size(None, wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_class_embeds": 5}, "unet.num_class_embeds 5"),
        ({"out_channels": 6}, "unet.out_channels 6 3"),
        ({"in_channels": 4, "out_channels": 4}, "unet.in_channels 4 1 3"),
        ({"sample_size": None}, "unet.sample_size None"),
    ],
)
def test_what_can_not_be_drawn_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with raises(DraftuneError, said):
        load_model(build(tmp_path / "model", **options))


def test_no_steps_at_zero_signal(tmp_path: Path) -> None:
    build(tmp_path / "model", grid={"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    assert json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"]
    with raises(DraftuneError, "signal-to-noise"):
        load_model(tmp_path / "model").schedule(STEPS)
