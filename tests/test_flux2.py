"""FLUX.2: latents in normalized patches, noise levels by size and steps, single blocks with fused layers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from test_flow import drawing
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models import load_model
from draftune.published import PUBLISHED
from helpers.draft_k import check_draft_k
from helpers.errors import raises
from helpers.flux2 import FAMILIES, tiny_flux2
from helpers.model_checks import STEPS, check_guidance, check_pictures, drawn, opened

OFFICIAL = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2")
if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("this diffusers has no FLUX.2-klein", allow_module_level=True)

PROMPTS = ["a cat", "a dog that sits on a chair, looks at a cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_flux2(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    check_pictures(folder, drawing(FAMILIES[family], 16), FAMILIES[family], size=16)
    model = opened(folder, 16)
    assert (drawn(model, "a cat", 0, 1.0) - drawn(model, "a dog", 0, 1.0)).abs().max() > 1e-3
    if family == "distilled":
        assert torch.equal(drawn(model, "a cat", 0, 7.5), drawn(model, "a cat", 0, 0.0))
    else:
        check_pictures(folder, drawing(1.0, 16), 1.0, size=16)
        check_guidance(folder, 4.0, size=16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width", "steps"), [(12, 20, 1), (24, 16, 4), (16, 16, 50)])
def test_any_shape_and_number_of_steps(
    folders: dict[str, Path], family: str, height: int, width: int, steps: int
) -> None:
    """Also prompts of different lengths in one batch, and each alone."""
    pipeline, model, scale = DiffusionPipeline.from_pretrained(folders[family]), load_model(folders[family]), 2.5
    model.set_size(height, width)
    schedule = model.schedule(steps)
    noise = torch.cat([model.noise(torch.Generator().manual_seed(seed), 1) for seed in (0, 1)])
    ours = model.sample_tensors(PROMPTS, [0, 1], schedule, scale)
    theirs = drawing(scale, height, width, num_inference_steps=steps, latents=noise)(pipeline, PROMPTS, 0)
    assert ours.shape == (2, 3, height, width)
    assert (ours - theirs).abs().max() <= 1e-3
    for i, prompt in enumerate(PROMPTS):
        assert (model.sample_tensors([prompt], [i], schedule, scale) - ours[i]).abs().max() <= 1e-4


@pytest.mark.parametrize("tokens", [(4, 4), (66, 66)])
def test_noise_and_its_levels_are_diffusers(folders: dict[str, Path], tokens: tuple[int, int]) -> None:
    """The shift has another formula above 4300 tokens."""
    pipeline, model = DiffusionPipeline.from_pretrained(folders["base"]), load_model(folders["base"])
    assert model.latent_shape == (16, 64, 64)
    rows, columns = tokens
    model.set_size(4 * rows, 4 * columns)
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    theirs, _ = pipeline.prepare_latents(
        2, 4, 4 * rows, 4 * columns, torch.float32, "cpu", torch.Generator().manual_seed(0)
    )
    assert torch.equal(noise.flatten(2).transpose(1, 2), theirs)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2):
        few = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        pipeline(prompt="a cat", height=4 * rows, width=4 * columns, **few)
        levels = [step.sigma for step in model.schedule(steps).steps]
        assert levels == pytest.approx(pipeline.scheduler.sigmas[:-1].tolist(), abs=1e-7)


def test_the_shift_depends_on_size_and_steps(folders: dict[str, Path]) -> None:
    model = load_model(folders["base"])
    shifts = {}
    for side in (16, 64):
        model.set_size(side, side)
        shifts[side] = [model.mu(steps) for steps in (4, 50)]  # type: ignore[attr-defined]
    assert shifts[16][0] != shifts[16][1]
    assert shifts[16][0] != shifts[64][0]


def test_negative_prompts(folders: dict[str, Path]) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(folders["base"]), opened(folders["base"], 16)
    ours = model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 4.0, "bad dog")
    negative, _ = pipeline.encode_prompt("bad dog")
    theirs = drawing(4.0, 16, negative_prompt_embeds=negative)(pipeline, "a cat", 0)
    assert (ours - theirs).abs().max() <= 1e-3
    assert (ours - drawn(model, "a cat", 0, 4.0)).abs().max() > 1e-3
    for family in ("distilled", "dev"):
        with raises(DraftuneError, "negative-prompt"):
            load_model(folders[family]).check_prompts(["a cat"], "bad dog")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_call(folders: dict[str, Path], family: str) -> None:
    """Only the base model has a second row for each latent."""
    model = opened(folders[family], 16)
    rows = []
    model.denoiser.x_embedder.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    model.sample_tensors(PROMPTS, [0, 1], model.schedule(STEPS), 4.0)
    assert rows == [4 if family == "base" else 2] * STEPS


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("base", "none"), ("base", "blocks"), ("distilled", "both"), ("dev", "denoiser")],
)
def test_draft_k_equals_plain_autograd(folders: dict[str, Path], family: str, checkpointing: str) -> None:
    """In float64; the official network's rotations are float32 in every precision."""
    pipeline = DiffusionPipeline.from_pretrained(folders[family], torch_dtype=torch.float64)

    def official(noise: Tensor) -> Tensor:
        text, text_ids = pipeline.encode_prompt(PROMPTS)
        empty, _ = pipeline.encode_prompt(["", ""])
        scheduler, vae = pipeline.scheduler, pipeline.vae
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=OFFICIAL.compute_empirical_mu(16, 3))
        levels, ids = scheduler.sigmas.double(), pipeline._prepare_latent_ids(noise)
        guidance = torch.full((2,), 3.0, dtype=torch.float64) if family == "dev" else None
        x = pipeline._pack_latents(noise)
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= 1):  # the last two steps of three
                time = timestep.double().expand(2) / 1000
                outputs = [
                    pipeline.transformer(x, states, time, ids, text_ids, guidance, return_dict=False)[0]
                    for states in ((text, empty) if family == "base" else (text,))
                ]
                guided = outputs[-1] + 3 * (outputs[0] - outputs[-1]) if family == "base" else outputs[0]
                x = x + (levels[i + 1] - levels[i]) * guided
        latents = pipeline._unpack_latents_with_ids(x, ids)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        latents = latents * std[:, None, None] + vae.bn.running_mean[:, None, None]
        images = vae.decode(pipeline._unpatchify_latents(latents)).sample / 2 + 0.5
        return images

    check_draft_k(
        pipeline, checkpointing, PROMPTS, official, 16, targets=PUBLISHED["flux2-klein"].lora_target_modules.split(",")
    )
