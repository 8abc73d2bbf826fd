"""The model family that docs/how-to/add-a-model-family.md defines, run as it is written there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import lora_parameters
from draftune.models import FAMILIES, DiffusionModel, load_model

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "add-a-model-family.md"
CLASSES = 4


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path_factory.mktemp("example") / "class_conditional.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("class_conditional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del FAMILIES["ClassPipeline"]


def build(example: ModuleType, **unet: Any) -> Any:
    """A small random pipeline of the example's class."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    config = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "num_class_embeds": CLASSES + 1} | unet
    network = UNet2DModel(
        **blocks,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )
    vae = AutoencoderKL(
        **blocks,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.7,
    )
    return example.ClassPipeline(network, vae, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))


def reference(pipeline: Any, label: int, seed: int, steps: int, guidance_scale: float) -> Tensor:
    """Sample with diffusers only."""
    scheduler, unet, vae = pipeline.scheduler, pipeline.unet, pipeline.vae
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            positive, null = (unet(x, t, class_labels=torch.tensor([c])).sample for c in (label, CLASSES))
            x = scheduler.step(null + guidance_scale * (positive - null), t, x).prev_sample
        return (vae.decode(x / 0.7).sample / 2 + 0.5).clamp(0, 1)


def sampled(model: DiffusionModel, prompt: str, guidance_scale: float = 3.0) -> Tensor:
    return model.sample_tensors([prompt], [0], model.schedule(3), guidance_scale)


def test_it_samples_the_images_of_diffusers(example: ModuleType) -> None:
    pipeline = build(example)
    model = load_model(pipeline)
    for label in (0, 3):
        assert (sampled(model, str(label)) - reference(pipeline, label, 0, 3, 3.0)).abs().max() < 1e-5
    assert (sampled(model, "0") - sampled(model, "3")).abs().max() > 1e-4
    assert (sampled(model, "0") - sampled(model, "0", 1.0)).abs().max() > 1e-4
    model.set_size(32, 24)
    assert sampled(model, "0").shape == (1, 3, 32, 24)


@pytest.mark.parametrize("method", ["draft_k(k=2)", "kl(draft_lv(n=1), beta=1)"])
def test_it_trains_and_its_lora_loads(example: ModuleType, tmp_path: Path, method: str) -> None:
    def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    model = load_model(build(example))
    before = sampled(model, "1")
    run = draftune.train(
        model,
        brightness,
        method=method,
        prompts=["1", "2"],
        steps=2,
        batch_size=2,
        num_inference_steps=3,
        guidance_scale=3.0,
        learning_rate=0.02,
        log_images_steps=0,
        num_log_prompts=1,
        output=str(tmp_path / "run"),
    )
    after = sampled(model, "1")
    assert all(parameter.isfinite().all() for parameter in lora_parameters(model).values())
    assert (after - before).abs().max() > 1e-4
    other = load_model(build(example))
    draftune.load_lora(other, run.folder)
    assert (sampled(other, "1") - after).abs().max() < 1e-5


def test_what_does_not_fit_is_refused(example: ModuleType) -> None:
    with pytest.raises(DraftuneError, match=r"unet\.in_channels.* 3"):
        load_model(build(example, in_channels=3))
    model = load_model(build(example))
    with pytest.raises(DraftuneError, match=r"height.*multiple of 4.*30"):
        model.set_size(30, None)
    with pytest.raises(DraftuneError, match="--negative-prompt"):
        model.check_prompts(["1"], "blurry")
