"""How a model's weights lie on disk: variants in half precision, and checkpoints in one file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME
from draftune.models import fetch_pipeline, load_model
from draftune.utils.single_file import single_file_error
from helpers.errors import mentions, raises
from helpers.odd_models import as_variant
from helpers.pipelines import add_random_lora

PARTS = ("unet", "vae", "text_encoder")


def picture(folder: Path, precision: str = "no") -> torch.Tensor:
    model = load_model(folder, precision)
    return model.sample_tensors(["a cat"], [0], model.schedule(2), 2.0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("parts", [PARTS, ("unet",), ("text_encoder",)], ids=str)
def test_a_variant_alone_is_read(pipeline_folder: Path, tmp_path: Path, parts: tuple[str, ...], shards: int) -> None:
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "model"))
    as_variant(*parts, shards=shards)(folder)
    half, whole = picture(folder), picture(pipeline_folder)
    assert 0 < (half - whole).abs().max() < 0.02


def test_a_variant_beside_the_plain_weights_is_not(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "model"))
    as_variant(*PARTS)(folder)
    for part in PARTS:
        for file in (pipeline_folder / part).glob("*.safetensors"):
            shutil.copy(file, folder / part / file.name)
    assert torch.equal(picture(folder), picture(pipeline_folder))
    # Of two precisions beside each other, that of the weights that are read counts.
    assert {part.dtype for part in load_model(folder, "bf16").modules} == {torch.bfloat16, torch.float32}


def test_a_variant_is_held_as_it_was_saved(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "model"))
    as_variant(*PARTS)(folder)
    unet, text_encoder, vae = load_model(folder, "fp16").modules
    assert unet.dtype == text_encoder.dtype == vae.dtype == torch.float16
    assert {part.dtype for part in load_model(folder).modules} == {torch.float32}


def test_a_model_that_is_published_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, variant: str | None = None, **options: Any) -> str:
        asked.append(variant)
        if variant is None:
            raise OSError("Could not find the necessary `safetensors` weights")
        return str(tmp_path)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "model_index.json")
    assert fetch_pipeline("some/one") == tmp_path
    assert asked == [None, "fp16"]


KEYS = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")
"""Keys of the published Stable Diffusion 1.5 in one file."""
NO_LORA = "checkpoint not LoRA --model"
NO_PIPELINE = "stable-diffusion-v1-5/stable-diffusion-v1-5 --base-pipeline"


COMMANDS = {
    "train": ("train --model FILE --reward brightness --prompts animals --output OUT", NO_PIPELINE),
    "sample": ("sample FILE --prompt cat --output OUT", NO_PIPELINE),
    "sample with a model": ("sample FILE --model MODEL --prompt cat --output OUT", NO_LORA),
    "sample on it": ("sample LORA --model FILE --prompt cat --output OUT", NO_PIPELINE),
    "eval": ("eval FILE --prompts animals --reward brightness", NO_LORA),
    "optimize-noise": ("optimize-noise FILE --prompt cat --reward brightness --output OUT", NO_PIPELINE),
    "export on it": ("export LORA --output OUT --format diffusers --model FILE", NO_PIPELINE),
    "export": ("export FILE --output OUT --format merged --model MODEL", NO_LORA),
}
"""Command lines, and what they say about a checkpoint whose pipeline is not on this machine."""


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, suffix: str
) -> None:
    file = tmp_path / f"dreamshaper{suffix}"
    tensors = {key: torch.zeros(2, 2) for key in KEYS}
    torch.save({"state_dict": tensors}, file) if suffix == ".ckpt" else save_file(tensors, file)
    model = load_model(pipeline_folder)
    add_random_lora(model)
    draftune.save_lora(model, tmp_path / "lora")
    places = {"FILE": file, "OUT": tmp_path / "out", "MODEL": pipeline_folder, "LORA": tmp_path / "lora"}
    line, said = COMMANDS[command]
    assert main([str(places.get(word, word)) for word in line.split()]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert mentions(error, *("pickle dreamshaper" if suffix == ".ckpt" else said).split()), error


def test_adapters_are_no_checkpoints(pipeline_folder: Path, tmp_path: Path) -> None:
    model = load_model(pipeline_folder)
    add_random_lora(model)
    draftune.save_lora(model, tmp_path / "lora")
    assert single_file_error(tmp_path / "lora" / FILE_NAME) is None
    for key in (
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.lora_down.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "lycoris_unet_mid_block.lokr_w1",
    ):
        save_file({key: torch.zeros(2, 2)}, tmp_path / "adapter.safetensors")
        assert single_file_error(tmp_path / "adapter.safetensors") is None
        with raises(DraftuneError, "adapter.safetensors LoRA --init-lora"):
            load_model(tmp_path / "adapter.safetensors", base_pipeline=str(pipeline_folder))
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "adapter.safetensors")
    assert single_file_error(tmp_path / "adapter.safetensors") is None
