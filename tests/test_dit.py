"""DiT: classes instead of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME
from draftune.models import load_model
from draftune.runs.export import export_lora
from draftune.runs.merge import merge_loras
from helpers.errors import raises
from helpers.model_checks import STEPS, check_guidance, check_pictures, check_training, drawn
from helpers.pipelines import add_random_lora
from helpers.published_weights import randomise

LABELS = {0: "tench, Tinca tinca", 1: "a cat", 2: "a dog, hound"}


class AdaptableDiT(DiTTransformer2DModel, PeftAdapterMixin):
    """As the docs say how diffusers loads such a LoRA."""


def build(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 1000,
            **options,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    # As published with DiT-XL-2.
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(randomise(transformer), vae, scheduler).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": LABELS}))
    return folder


def draw(pipeline: Any, prompt: str, seed: int, guidance_scale: float = 4.0, spacing: str = "leading") -> Tensor:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        pipeline.get_label_ids([prompt]),
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    return torch.from_numpy(pictures).movedim(3, 1)


def unguided(pipeline: Any, prompt: str, seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, 1.0)


def trailing(pipeline: Any, prompt: str, seed: int) -> Tensor:
    return draw(pipeline, prompt, seed, spacing="trailing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dit") / "model")


def test_pictures_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    check_pictures(folder, draw, 4.0)
    check_pictures(folder, trailing, 4.0, "trailing")
    check_pictures(folder, unguided, 1.0)
    check_guidance(folder, 4.0)
    check_pictures(build(tmp_path / "plain", out_channels=4), draw, 4.0)  # no learned variance


def test_a_class_is_a_name_a_synonym_or_a_number(folder: Path) -> None:
    model = load_model(folder)
    name, synonym, number, other = (drawn(model, prompt, 0, 4.0) for prompt in ("a dog", " hound ", "2", "1"))
    assert torch.equal(name, synonym)
    assert torch.equal(name, number)
    assert (name - other).abs().max() > 1e-3
    assert model.encode(["999", "a cat"], "", True).tolist() == [1000, 1000, 999, 1]


def test_what_is_no_class_is_said_before_anything_is_drawn(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    for prompt, said in (
        ("a cats", "class 'a cats' 'a cat'"),
        ("1000", "class 1000 Tinca hound tench 0 999"),
        ("²", "class ²"),
    ):
        with raises(DraftuneError, said):
            model.sample_tensors(["a dog", prompt], [0, 0], model.schedule(STEPS), 4.0)
    for wrong, words in (
        ({"prompts": ["a dog", "zebra crossing"]}, "class zebra"),
        ({"prompts": ["a dog"], "negative_prompt": "a cat"}, "negative prompt"),
    ):
        with raises(DraftuneError, words):
            draftune.train(model, "saturation", output=str(tmp_path / "run"), num_inference_steps=2, **wrong)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_lora_is_trained_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    def load(pipeline: Any, lora: Path) -> None:
        pipeline.transformer = AdaptableDiT.from_pretrained(folder, subfolder="transformer")
        pipeline.transformer.load_lora_adapter(lora, prefix="transformer", weight_name=FILE_NAME)

    check_training(folder, tmp_path, trailing, 4.0, load)


def test_loras_are_mixed_and_exported(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    add_random_lora(model)
    tuned = drawn(model, "a cat", 0, 4.0)
    draftune.save_lora(model, tmp_path / "lora")
    again = load_model(folder)
    assert (drawn(again, "a cat", 0, 4.0) - tuned).abs().max() > 1e-2
    halves = [(str(tmp_path / "lora"), 0.5)] * 2
    draftune.load_lora(again, merge_loras(halves, str(tmp_path / "mixed")))
    assert (drawn(again, "a cat", 0, 4.0) - tuned).abs().max() <= 1e-4
    export_lora(tmp_path / "lora", tmp_path / "merged", "merged")
    assert (draw(DiffusionPipeline.from_pretrained(tmp_path / "merged"), "a cat", 0) - tuned).abs().max() <= 1e-3
    assert load_model(tmp_path / "merged").pipeline.labels == DiTPipeline.from_pretrained(folder).labels
    with raises(DraftuneError, "kohya"):
        export_lora(tmp_path / "lora", tmp_path / "lora.safetensors", "kohya")


def test_the_published_name_of_the_transformer(folder: Path, tmp_path: Path) -> None:
    """DiT-XL-2 was published with its transformer as a Transformer2DModel, which diffusers reads as a DiT's."""
    build(tmp_path / "old")
    for path in (tmp_path / "old/model_index.json", tmp_path / "old/transformer/config.json"):
        text = path.read_text()
        assert "DiTTransformer2DModel" in text
        path.write_text(text.replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert json.loads((tmp_path / "old/model_index.json").read_text())["transformer"][1] == "Transformer2DModel"
    assert torch.equal(drawn(load_model(tmp_path / "old"), "1", 0, 4.0), drawn(load_model(folder), "1", 0, 4.0))


def test_only_its_own_size_is_drawn(folder: Path) -> None:
    model = load_model(folder)
    model.set_size(16, None)
    assert drawn(model, "1", 0, 4.0).shape == (1, 3, 16, 16)
    with raises(DraftuneError, "width 16"):
        model.set_size(None, 32)
