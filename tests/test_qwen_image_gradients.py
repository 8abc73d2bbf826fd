"""Qwen-Image: gradients against plain autograd through the official networks, and half precision."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from test_flow import brighter
from test_qwen_image import PROMPTS, SIZE, save_qwen_image, unguided
from torch import Tensor

import draftune
from draftune.models import load_model
from helpers.draft_k import check_draft_k
from helpers.model_checks import STEPS, opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_image(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "denoiser"])
def test_draft_k_equals_plain_autograd(folder: Path, checkpointing: str) -> None:
    """In float64; the official networks compute rotations, time and enlargement in float32 in every precision."""
    pipeline = diffusers.QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float64)

    def official(noise: Tensor) -> Tensor:
        inputs = [pipeline.encode_prompt(texts) for texts in (PROMPTS, [" ", " "])]
        scheduler, vae, x = pipeline.scheduler, pipeline.vae, pipeline._pack_latents(noise, 2, 4, 8, 8)
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=0.5 + 0.4 * (16 - 256) / (8192 - 256))
        levels = scheduler.sigmas.double()
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= 1):  # the last two steps of three
                positive, negative = (
                    pipeline.transformer(x, text, mask, timestep.expand(2).double() / 1000, [[(1, 4, 4)]] * 2).sample
                    for text, mask in inputs
                )
                guided = negative + 3 * (positive - negative)
                guided = (
                    guided * positive.square().sum(2, keepdim=True).sqrt() / guided.square().sum(2, keepdim=True).sqrt()
                )
                x = x + (levels[i + 1] - levels[i]) * guided
        latents = pipeline._unpack_latents(x, SIZE, SIZE, 4)
        moments = (vae.config.latents_std, vae.config.latents_mean)
        std, mean = (noise.new_tensor(moment).view(4, 1, 1, 1) for moment in moments)
        images = vae.decoder(vae.post_quant_conv(latents * std + mean))[:, :, 0] / 2 + 0.5
        assert 0.01 < (images != images.clamp(0, 1)).double().mean() < 0.5
        return images

    check_draft_k(pipeline, checkpointing, PROMPTS, official, SIZE)


def test_decoder_is_recomputed(folder: Path) -> None:
    """The gradient is the same, and the graph stores less."""
    model = opened(folder, SIZE)
    latents, gradients, stored = model.noise(torch.Generator().manual_seed(0), 1), [], []
    for mode in ("none", "denoiser"):
        model.set_checkpointing(mode)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = latents.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            images = model.decode(x)
        stored.append(sum(kept.values()))
        images.square().mean().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)
    assert stored[1] < 0.5 * stored[0]


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    """The transformer is told and says what it does in the official pipeline held in bfloat16."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, args, told, said: calls.append((told["hidden_states"], said[0])), with_kwargs=True
    )
    unguided(pipeline, "a cat", 0)
    model = opened(folder, SIZE).to("cpu", "bf16")
    for step, (tokens, theirs) in zip(model.schedule(STEPS).steps, calls, strict=True):
        x, expected = (pipeline._unpack_latents(packed.float(), SIZE, SIZE, 4)[:, :, 0] for packed in (tokens, theirs))
        with torch.no_grad(), model.autocast():
            ours = model.predict(x, step.timestep, model.encode(["a cat"], "", False), 1.0)
        assert (ours - expected).abs().mean() < 0.05 * expected.std()
    settings = {"method": "draft_k(k=2)", "steps": 2, "num_inference_steps": 2, "lora_rank": 2, "log_images_steps": 0}
    settings |= {"num_log_prompts": 1, "height": SIZE, "width": SIZE, "guidance_scale": 4.0, "batch_size": 2}
    run = draftune.train(
        load_model(folder, "bf16"),
        brighter,
        prompts=["a cat"],
        output=str(tmp_path),
        mixed_precision="bf16",
        **settings,
    )
    assert all(row["grad_norm"] > 0 for row in run.metrics)
