"""Checkpoint files that can't be loaded, and options that do not fit: one line and exit code 2, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.models import load_model
from draftune.settings import Settings
from helpers.errors import mentions, raises
from helpers.single_files import denoiser_of, others_of, write

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.x of random weights."""
    from helpers.pipelines import build_pipeline

    root = tmp_path_factory.mktemp("sd")
    build_pipeline(root / "parts", "DDIM").save_pretrained(root / "model")
    return root / "model"


def without(key: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if not k.endswith(key)}


def only(*starts: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k.startswith(starts)}


def with_more(key: str, value: Tensor | None = None) -> Callable[[State], State]:
    return lambda state: state | {key: torch.zeros(1) if value is None else value}


def one_more_block(state: State) -> State:
    start = "model.diffusion_model.middle_block.0"
    more = {k.replace(start, "model.diffusion_model.middle_block.7"): v.clone() for k, v in state.items() if start in k}
    return state | more


def stretched(state: State) -> State:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return state | {key: state[key].repeat(1, 2, 1, 1)}


CASES: dict[str, tuple[Callable[[State], State], str]] = {
    "a tensor is missing": (without("middle_block.1.norm.bias"), "unet lacks tensors --base-pipeline"),
    "a tensor of the text encoder is missing": (without("final_layer_norm.bias"), "text_encoder lacks 1"),
    "a UNet of other channels": (stretched, "unet --base-pipeline"),
    "a block more": (one_more_block, "unet --base-pipeline weights"),
    "an autoencoder alone": (only("first_stage_model."), "autoencoder first_stage_model"),
    "a text encoder alone": (
        lambda state: {k.partition(".transformer.")[2]: v for k, v in only("cond_stage_model.")(state).items()},
        "text encoder text_model",
    ),
    "nothing": (lambda state: {}, "no denoiser"),
    "weights of nothing known": (lambda state: {"weight": torch.zeros(2)}, "--base-pipeline"),
    "fp8 with scales": (with_more("model.diffusion_model.out.2.scale_weight"), "fp8 scales"),
    "8-bit integers": (
        with_more("model.diffusion_model.out.2.weight", torch.zeros(4, 8, 3, 3, dtype=torch.int8)),
        "quantized I8",
    ),
    "v prediction": (with_more("v_pred"), "predicts v prediction_type --base-pipeline"),
    "another family": (
        with_more("model.diffusion_model.label_emb.0.0.weight"),
        "StableDiffusionXLPipeline --base-pipeline",
    ),
    "a family that is not supported": (
        with_more("conditioner.embedders.0.model.ln_final.weight"),
        "StableDiffusionXLImg2ImgPipeline",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_does_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, said = CASES[case]
    file = write(tmp_path / "model.safetensors", change(denoiser_of(folder) | others_of(folder)))
    check_command(file, folder, said, capsys)


def check_command(file: Path, folder: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = file.parent / "out"
    command = ["train", "--model", str(file), "--base-pipeline", str(folder), "--reward", "brightness"]
    assert main([*command, "--prompts", "animals", "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert mentions(line, said, file.name), line
    assert len(line) < 600
    assert not output.exists()


@pytest.mark.parametrize("at", [4, 100, -100])
def test_a_truncated_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int) -> None:
    file = write(tmp_path / "model.safetensors", denoiser_of(folder))
    file.write_bytes(file.read_bytes()[:at])
    check_command(file, folder, "truncated", capsys)


def test_pickles_are_not_opened(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even where the content is a pickle under another name."""
    for suffix in (".ckpt", ".pt", ".bin", ".pth"):
        torch.save(denoiser_of(folder), tmp_path / f"model{suffix}")
        check_command(tmp_path / f"model{suffix}", folder, "pickle", capsys)
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    check_command(tmp_path / "model.safetensors", folder, "safetensors", capsys)


def test_a_gguf_file_without_its_package(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    check_command(tmp_path / "model.gguf", folder, "draftune[gguf]", capsys)


def test_options_that_do_not_apply(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", denoiser_of(folder))
    cases = (
        ({"model": str(folder), "base_pipeline": str(folder)}, "base_pipeline checkpoint"),
        ({"model": "emoji", "base_pipeline": str(folder)}, "base_pipeline emoji"),
        ({"model": "some/one", "base_pipeline": str(folder)}, "base_pipeline some/one"),
        ({"model": str(folder), "revision": "v2"}, "revision v2"),
        ({"model": "emoji", "revision": "v2"}, "revision v2 emoji"),
        ({"model": str(file), "base_pipeline": str(folder), "revision": "v2"}, "revision v2"),
        ({"model": str(file), "base_pipeline": str(file)}, "base_pipeline file"),
        ({"model": str(folder), "variant": "../fp16"}, "variant ../fp16"),
    )
    for values, said in cases:
        with raises(DraftuneError, said):
            Settings(**values)
        with raises(DraftuneError, said):
            load_model(**values)
    with raises(DraftuneError, "variant fp16"):
        load_model(folder, variant="fp16")
    # An empty setting counts as none.
    assert Settings(model=str(folder), revision="", variant="", base_pipeline="").revision == ""


def test_a_pipeline_without_a_network(folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    shutil.rmtree(base / "vae")
    file = write(tmp_path / "model.safetensors", denoiser_of(folder))
    with raises(DraftuneError, "vae"):
        load_model(file, base_pipeline=str(base))


def test_a_lora_in_place_of_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "lora.safetensors")
    check_command(tmp_path / "lora.safetensors", folder, "LoRA --init-lora", capsys)
