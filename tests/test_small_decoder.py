"""A small decoder for the gradient: its pictures and gradients are diffusers' own, and nothing else is drawn by it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from test_gradients import batch_of, relative
from test_pixels import build as build_pixels
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.methods import DraftK
from draftune.models import DiffusionModel, StableDiffusion, load_model
from draftune.models.tiny_decoder import check_likeness, find_small_decoder, load_small_decoder
from draftune.sampling.sampler import rollout
from draftune.training.memory_count import network_bytes
from draftune.training.trainer import Trainer
from helpers.errors import mentions, raises
from helpers.pipelines import add_random_lora, build_pipeline

PROMPTS = ["a cat", "a dog", "a bird"]
SETTINGS: dict[str, Any] = {
    "prompts": PROMPTS,
    "steps": 2,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "batch_size": 2,
    "learning_rate": 0.02,
    "log_images_steps": 0,
}


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def tiny(**config: Any) -> AutoencoderTiny:
    """A random one that makes two pixels of a latent, as the pipeline's own decoder does."""
    torch.manual_seed(1)
    widths: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**(widths | blocks | config)).eval()


def saved(folder: Path, **config: Any) -> Path:
    tiny(**config).save_pretrained(folder)
    return folder


def alike(folder: Path) -> Any:
    """A pipeline, and in `folder` a small decoder that draws its pictures with a tenth more contrast."""
    pipeline, small = build_pipeline(folder / "pipeline"), tiny()
    last = small.decoder.layers[-1]
    with torch.no_grad():
        last.weight.mul_(0.3)  # no pixel is clamped
        last.bias.fill_(0.5)
    pipeline.vae = copy.deepcopy(small)
    with torch.no_grad():
        last.weight.mul_(1.1)
    small.save_pretrained(folder / "small")
    return pipeline


@pytest.fixture
def model(pipeline_folder: Path, tmp_path: Path) -> DiffusionModel:
    """With a small decoder whose latents are scaled and shifted, unlike the published ones'."""
    model = load_model(pipeline_folder)
    model.tiny_decoder = load_small_decoder(saved(tmp_path / "small", scaling_factor=0.5, shift_factor=0.25), model)
    return model


def test_pictures_are_those_of_diffusers(model: DiffusionModel, tmp_path: Path) -> None:
    model.set_checkpointing("none")
    latents = 2 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = AutoencoderTiny.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = VaeImageProcessor().postprocess(theirs.decode(latents / 0.5 + 0.25).sample, "pt")
        own = VaeImageProcessor().postprocess(model.pipeline.vae.decode(latents / 0.7).sample, "pt")
    assert (own - expected).abs().max() > 0.1
    assert torch.allclose(model.decode(latents.clone().requires_grad_()), expected, atol=1e-6)
    # Where no gradient is wanted, by its own.
    assert torch.allclose(model.decode(latents), own, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model.decode(latents.clone().requires_grad_()), own, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "denoiser", "both"])
def test_the_gradient_equals_plain_autograd(tmp_path: Path, checkpointing: str) -> None:
    pipeline = build_pipeline(tmp_path)
    pipeline.unet.double()
    model = StableDiffusion(pipeline, "pipeline")
    model.tiny_decoder = small = load_small_decoder(saved(tmp_path / "small"), model).double()
    parameters = add_random_lora(model)
    model.set_checkpointing(checkpointing)
    assert small.decoder.gradient_checkpointing == (checkpointing != "none")
    schedule, prompts = model.schedule(3), ["a cat", "dogs"]
    noise, weights = model.noise(torch.Generator().manual_seed(0), 2), torch.linspace(-1, 1, 16, dtype=torch.float64)
    denoise = model.denoiser_for(prompts, schedule, 3.0)

    (clean,) = DraftK(3).samples(batch_of(denoise, schedule, noise=noise))
    (model.decode(clean) * weights).mean().backward()
    ours = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert ours.keys() == parameters.keys()
    assert all(p.grad is None for p in small.parameters())

    model.denoiser.zero_grad()
    plain = rollout(denoise, schedule.steps, noise)
    ((small.decode(plain).sample / 2 + 0.5) * weights).mean().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert relative(ours[name], parameter.grad) < 1e-12, name


def test_it_follows_the_model(model: DiffusionModel) -> None:
    small = model.tiny_decoder
    model.to("cpu", "bf16")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    latents = model.noise(torch.Generator().manual_seed(0), 1).requires_grad_()
    picture = model.decode(latents)
    assert picture.dtype == torch.float32
    half = picture.detach()
    model.to("cpu")
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert 0 < (model.decode(latents) - half).abs().max() < 0.05


def test_training_decodes_by_it_alone_and_pictures_to_look_at_by_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError

    settings = SETTINGS | {"output": str(tmp_path / "run"), "method": "draft_lv"}
    plain = Trainer(alike(tmp_path), brightness, **settings)
    trainer = Trainer(alike(tmp_path), brightness, **settings, tiny_decoder=str(tmp_path / "small"))
    weights = sum(p.nbytes for p in trainer.model.tiny_decoder.parameters())
    assert network_bytes(trainer) - network_bytes(plain) == weights > 0
    trainer.train_step.folder = None
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model.tiny_decoder, "decode", refuse)
        assert torch.equal(
            trainer.context.sample_images(PROMPTS, range(3)), plain.context.sample_images(PROMPTS, range(3))
        )
    monkeypatch.setattr(trainer.model, "_decode", refuse)
    assert trainer.train_step.run(1)["reward_queries"] == 2 * 3


def test_a_run_through_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fish\na tree\n")
    settings = SETTINGS | {"steps": 6, "method": "draft_k(k=1)", "eval_prompts": str(tmp_path / "prompts.txt")}
    settings |= {"num_validation_images": 1, "num_log_prompts": 1}
    own = Trainer(alike(tmp_path), brightness, **settings, output=str(tmp_path / "own"))
    model, small = StableDiffusion(alike(tmp_path), "pipeline"), str(tmp_path / "small")
    run = draftune.train(model, brightness, **settings, tiny_decoder=small, output=str(tmp_path / "run"))
    # The training reward is that of its pictures; the evaluations are of the model's own.
    before = float(own.context.sample_images(["a fish", "a tree"], [0, 0]).mean())
    reward = own.train_step.run(1)["reward"]
    assert run.metrics[0]["reward"] - 0.5 == pytest.approx(1.1 * (reward - 0.5), rel=1e-4)
    assert abs(reward - 0.5) > 1e-3
    first, last = (run.evaluations[i]["brightness"] for i in (0, -1))
    assert first == pytest.approx(before, abs=1e-6)
    assert last > first + 0.001
    # A gradient by the noise goes through the model's own pictures from here on.
    assert model.tiny_decoder is None
    assert f"tiny_decoder: {small}" in (run.folder / "config.yaml").read_text()


def test_likeness(tmp_path: Path) -> None:
    model = StableDiffusion(alike(tmp_path), "pipeline")
    schedule = model.schedule(3)
    model.tiny_decoder = load_small_decoder(tmp_path / "small", model)
    pictures = model.sample_tensors(PROMPTS, [0, 1, 2], schedule, 3.0)
    expected = 1 - 0.01 * (pictures - 0.5).square().mean() / (pictures - pictures.mean()).square().mean()
    assert check_likeness(model, PROMPTS, schedule, 3.0) == pytest.approx(float(expected), abs=1e-4)
    assert 0.5 < expected < 0.999
    # Of other latents: before a run, and before anything is written.
    other = saved(tmp_path / "other")
    with raises(DraftuneError, "decoder 0% variance pipeline"):
        draftune.train(model, brightness, **SETTINGS, tiny_decoder=str(other), output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_channels": 16}, "16 channels latent 4"),
        ({"upsampling_scaling_factor": 4}, "4 latent 2"),
        ({"out_channels": 1}, "1 3"),
    ],
)
def test_one_of_another_shape_is_refused(
    pipeline_folder: Path, tmp_path: Path, config: dict[str, int], message: str
) -> None:
    folder = saved(tmp_path / "small", **config)
    with raises(DraftuneError, message):
        load_small_decoder(folder, load_model(pipeline_folder))


def test_what_is_none_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    with raises(DraftuneError, "./nothing --tiny-decoder AutoencoderTiny"):
        find_small_decoder("./nothing")
    with raises(DraftuneError, "some/one --tiny-decoder"):
        find_small_decoder("some/one")
    with raises(DraftuneError, "AutoencoderKL AutoencoderTiny"):
        find_small_decoder(str(pipeline_folder / "vae"))
    with raises(DraftuneError, "AutoencoderTiny config.json"):
        find_small_decoder(str(pipeline_folder))
    folder = saved(tmp_path / "small")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with raises(DraftuneError, ".safetensors", folder):
        find_small_decoder(str(folder))


def test_where_there_is_nothing_to_decode(tmp_path: Path) -> None:
    pixels = load_model(build_pixels(tmp_path / "pixels"))
    with raises(DraftuneError, "pixels --tiny-decoder"):
        load_small_decoder(saved(tmp_path / "small"), pixels)


def test_on_the_command_line(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a fish\n")
    common = ["train", "--model", str(pipeline_folder), "--reward", "jpeg_compressibility", "--output", "no"]
    common += ["--prompts", str(tmp_path / "prompts.txt"), "--tiny-decoder"]
    for extra, message in (
        (["no/such/folder"], "no/such/folder"),
        ([str(saved(tmp_path / "small")), "--method", "ddpo"], "ddpo gradient"),
        ([str(saved(tmp_path / "wide", latent_channels=16))], "16 channels latent"),
    ):
        assert main([*common, *extra]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert mentions(line, message)
