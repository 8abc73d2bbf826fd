"""What every family of models is held to, on a small random pipeline of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import draftune
from draftune.lora import lora_parameters
from draftune.models import DiffusionModel, load_model

METHODS = ("draft_k(k=2)", "draft_lv(n=1)", "refl(m=2)", "drtune(k=2, m=2)")
STEPS = 3
Draw = Callable[[Any, str, int], Tensor]
"""(diffusers' pipeline, prompt, seed) to a picture [1, 3, H, W] drawn by that pipeline alone in STEPS steps."""


Load = Callable[[Any, Path], object]
"""Gives diffusers' pipeline the LoRA in a folder."""


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def load_weights(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")


def opened(folder: Path, size: int | None) -> DiffusionModel:
    """The model, for square pictures of this many pixels if not of its own."""
    model = load_model(folder)
    model.set_size(size, size)
    return model


def drawn(model: DiffusionModel, prompt: str, seed: int, guidance_scale: float) -> Tensor:
    return model.sample_tensors([prompt], [seed], model.schedule(STEPS), guidance_scale)


def check_pictures(
    folder: Path, draw: Draw, guidance_scale: float, spacing: str | None = None, size: int | None = None
) -> None:
    """From the same noise the same pictures as diffusers' own pipeline, at most 1e-3 apart, and not all the same."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    model = opened(folder, size)
    model.set_sampler_options(spacing)
    ours = [drawn(model, prompt, seed, guidance_scale) for prompt, seed in (("a cat", 0), ("a dog", 0), ("a cat", 1))]
    theirs = draw(pipeline, "a cat", 0), draw(pipeline, "a dog", 0), draw(pipeline, "a cat", 1)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-3
    assert (ours[0] - ours[2]).abs().max() > 1e-2


def check_guidance(folder: Path, guidance_scale: float, size: int | None = None) -> None:
    """The guided pictures are others than those without guidance."""
    model = opened(folder, size)
    assert (drawn(model, "a cat", 0, guidance_scale) - drawn(model, "a cat", 0, 1.0)).abs().max() > 1e-3


def check_training(
    folder: Path,
    output: Path,
    draw: Draw,
    guidance_scale: float,
    load: Load = load_weights,
    size: int | None = None,
    **settings: Any,
) -> None:
    """LoRA trains by every kind of method, is saved, and gives the same pictures in diffusers."""
    from diffusers import DiffusionPipeline

    for method in METHODS:
        model = opened(folder, size)
        before = drawn(model, "a cat", 0, guidance_scale)
        run = draftune.train(
            model,
            brightness,
            method=method,
            prompts=["a cat", "a dog"],
            steps=3,
            batch_size=2,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            learning_rate=0.02,
            log_images_steps=0,
            num_log_prompts=1,
            height=size,
            width=size,
            output=str(output / method.partition("(")[0]),
            **settings,
        )
        assert all(parameter.isfinite().all() for parameter in lora_parameters(model).values())
        after = drawn(model, "a cat", 0, guidance_scale)
        assert (after - before).abs().max() > 1e-3
    pipeline = DiffusionPipeline.from_pretrained(folder)
    load(pipeline, run.folder / "lora")
    assert (draw(pipeline, "a cat", 0) - after).abs().max() <= 1e-3
    again = opened(folder, size)
    again.set_sampler_options(settings.get("timestep_spacing", "trailing"))
    draftune.load_lora(again, run.folder)
    assert (drawn(again, "a cat", 0, guidance_scale) - after).abs().max() <= 1e-5


def check_targets(
    model: DiffusionModel, output: Path, draw: Draw, guidance_scale: float, *kinds: str, prompts: Sequence[str]
) -> None:
    """Every tensor of a new LoRA gets a gradient, and its exports of these kinds give the same images in diffusers."""
    from diffusers import DiffusionPipeline

    parameters, folder = lora_parameters(model), model.name
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    schedule, x = model.schedule(2), model.noise(torch.Generator().manual_seed(0), len(prompts))
    denoise = model.denoiser_for(prompts, schedule, guidance_scale)
    (denoise(x, schedule.steps[0]).clean * torch.randn_like(x)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())
    ours = drawn(model, "a cat", 0, guidance_scale)
    draftune.save_lora(model, output / "lora")
    for kind in kinds:
        made = output / (f"{kind}.safetensors" if kind == "comfyui" else kind)
        draftune.export_lora(output / "lora", made, kind)
        pipeline = DiffusionPipeline.from_pretrained(made if kind == "merged" else folder)
        if kind == "comfyui":
            pipeline.load_lora_weights(output, weight_name=made.name)
        elif kind == "diffusers":
            load_weights(pipeline, made)
        assert (draw(pipeline, "a cat", 0) - ours).abs().max() <= 1e-3


def check_long_prompts(folder: Path) -> None:
    """Prompts that are too long with the text before them are counted, and what is cut is not read."""
    model = load_model(folder)
    ((_, limit, (text,)),) = model.text_readers(["a"])
    room = limit - len(model.pipeline.tokenizer(text).input_ids)
    fits, longer = "a" * (1 + room), "a" * (2 + room)
    assert [found.cut for found in model.truncated([fits, longer])] == [1]
    texts = [model.encode([prompt], "", False).text for prompt in (fits, longer, fits[:-1] + "b")]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def check_bf16_training(folder: Path, output: Path, **settings: Any) -> None:
    """Each of two updates in bf16 has a gradient."""
    values: dict[str, Any] = {"method": "draft_k(k=2)", "steps": 2, "num_inference_steps": 2, "batch_size": 2}
    values |= {"lora_rank": 2, "log_images_steps": 0, "num_log_prompts": 1, "mixed_precision": "bf16", **settings}
    run = draftune.train(
        load_model(folder, "bf16"), brightness, prompts=["a cat"], output=str(output / "bf16"), **values
    )
    assert all(row["grad_norm"] > 0 for row in run.metrics)
