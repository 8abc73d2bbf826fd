"""A negative prompt that changes nothing is said to, once, by whatever draws; a family without one refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.models import DiffusionModel, load_model
from helpers.errors import mentions, raises
from helpers.odd_models import families
from helpers.pipelines import add_random_lora

EFFECT = "negative prompt no effect"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families(tmp_path_factory.mktemp("families"))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if mentions(line, EFFECT)]


def bright(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3))


def drawn(model: DiffusionModel, negative_prompt: str, guidance_scale: float) -> Tensor:
    return model.sample_tensors(["a cat"], [0], model.schedule(2), guidance_scale, negative_prompt)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_it_is_said_where_the_pictures_are_the_same(
    saved: dict[str, Path], caplog: pytest.LogCaptureFixture, family: str, guidance_scale: float
) -> None:
    model = load_model(saved[family])
    plain = drawn(model, "", guidance_scale)
    assert not caplog.messages
    same = torch.equal(plain, drawn(model, "a bad dog", guidance_scale))
    assert len([line for line in caplog.messages if mentions(line, EFFECT)]) == same
    assert same == (guidance_scale <= 1 or family == "ddpm")
    drawn(model, "a bad dog", guidance_scale)
    assert len([line for line in caplog.messages if mentions(line, EFFECT)]) == same  # once


def train(folder: Path, out: Path, lora: Path, words: list[str]) -> list[str]:
    short = ["--steps", "1", "--batch-size", "1", "--num-log-prompts", "1", "--prompts", "animals"]
    return ["train", "--model", str(folder), "--reward", "brightness", "--method", "draft_k(k=1)", *short, *words]


COMMANDS: dict[str, Callable[[Path, Path, Path, list[str]], list[str]]] = {
    "train": train,
    "sample": lambda folder, out, lora, words: ["sample", str(folder), "--prompt", "a cat", *words],
    "sample a lora": lambda folder, out, lora, words: ["sample", str(lora), "--prompt", "a cat", *words],
    "sample guided": lambda folder, out, lora, words: [
        *["sample", str(folder), "--prompt", "a cat", "--guidance-reward", "brightness", *words]
    ],
    "eval": lambda folder, out, lora, words: [
        "eval",
        str(lora),
        "--prompts",
        "animals",
        "--reward",
        "brightness",
        *words,
    ],
    "optimize-noise": lambda folder, out, lora, words: [
        *["optimize-noise", str(folder), "--prompt", "a cat", "--reward", "brightness", "--steps", "1", *words]
    ],
}


@pytest.fixture(scope="module")
def lora(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    model = load_model(saved["sd"])
    add_random_lora(model)
    draftune.save_lora(model, folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("scale", ["1", "2"])
def test_every_command_says_it_once(
    saved: dict[str, Path], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, scale: str
) -> None:
    words = ["--guidance-scale", scale, "--negative-prompt", "a bad dog", "--num-inference-steps", "2"]
    out = tmp_path / ("out.csv" if command == "eval" else "out")
    argv = COMMANDS[command](saved["sd"], out, lora, [*words, "--output", str(out)])
    assert main(argv) == 0
    assert len(said(capsys)) == (scale == "1")


@pytest.mark.parametrize("family", ["dev", "schnell", "dit"])
def test_families_without_one_refuse_it(saved: dict[str, Path], family: str) -> None:
    model = load_model(saved[family])
    if family != "dit":
        model.set_size(16, 16)
    prompt = "1" if family == "dit" else "a cat"
    for scale in (1.0, 3.0):
        with raises(DraftuneError, "negative prompt"):
            model.sample_tensors([prompt], [0], model.schedule(1), scale, "a bad dog")
        with raises(DraftuneError, "negative prompt"):
            draftune.optimize_noise(
                model, bright, prompt, num_inference_steps=1, guidance_scale=scale, negative_prompt="x"
            )
