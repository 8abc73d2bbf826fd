"""The cache of prompt embeddings on disk: its keys, damaged files, its folder and its limit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from draftune.cli.main import main
from draftune.models import DiffusionModel, embedding_cache, load_model
from helpers.embeddings import PROMPTS, direct, files, same
from helpers.errors import mentions


def fill(folder: Path, prompts: list[str] = PROMPTS) -> DiffusionModel:
    model = load_model(folder, text_encoders=False)
    model.cache_prompts(prompts, "", 1.0)
    return model


def test_damaged_files_are_made_again(
    pipeline_folder: Path, prompt_cache: Path, loaded_encoders: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    fill(pipeline_folder)
    first, second, third = files(prompt_cache)
    whole = {path: path.read_bytes() for path in files(prompt_cache)}
    first.write_bytes(whole[first][:100])
    second.write_bytes(whole[second][:-1] + bytes([whole[second][-1] ^ 1]))  # one bit of a number
    save_file(load_file(third), third)  # without metadata
    del loaded_encoders[:]
    model = fill(pipeline_folder)
    assert len(loaded_encoders) == 1
    assert sorted(m.split("'")[1] for m in caplog.messages) == sorted(map(str, (first, second, third)))
    assert {path: path.read_bytes() for path in files(prompt_cache)} == whole
    assert model.embeddings is not None
    assert same(model.embeddings.condition(PROMPTS, "", False), direct(load_model(pipeline_folder), PROMPTS, "", False))


def test_changed_encoders_have_another_key(pipeline_folder: Path, tmp_path: Path, prompt_cache: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    fill(folder)
    assert fill(folder).embeddings.rounds == 0  # type: ignore[union-attr]
    # Other networks do not matter.
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(unet).items()}, unet, {"format": "pt"})
    assert fill(folder).embeddings.rounds == 0  # type: ignore[union-attr]
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    model = fill(folder)
    assert model.embeddings is not None
    assert model.embeddings.rounds == 1
    assert same(model.embeddings.condition(PROMPTS, "", False), direct(load_model(folder), PROMPTS, "", False))
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_eps": 1e-3}))
    assert fill(folder).embeddings.rounds == 1  # type: ignore[union-attr]
    vocabulary = folder / "tokenizer" / "tokenizer_config.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()) | {"model_max_length": 7}))
    assert fill(folder).embeddings.rounds == 1  # type: ignore[union-attr]
    assert len(list(prompt_cache.iterdir())) == 4


def test_weights_digest_sees_a_change_of_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    digests = set()
    for factor in (1.0, 2.0):
        save_file({"a": factor * torch.ones(1000, 1000)}, path)
        os.utime(path, ns=(0, 0))
        digests.add(embedding_cache.weights_digest(path))
    os.utime(path, ns=(0, 1))
    assert len({*digests, embedding_cache.weights_digest(path)}) == 3


def test_off_and_the_default_folder(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(embedding_cache.VARIABLE, "off")
    fill(pipeline_folder)
    assert not files(tmp_path)
    monkeypatch.delenv(embedding_cache.VARIABLE)
    fill(pipeline_folder)
    assert len(files(tmp_path / "draftune" / "prompts")) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(embedding_cache.VARIABLE, str(tmp_path / "file"))
    assert not caplog.messages
    model = fill(pipeline_folder)
    assert mentions("\n".join(caplog.messages), str(tmp_path / "file"))
    assert len(caplog.messages) == 1
    assert model.sample_tensors(["a cat"], [0], model.schedule(1), 1.0).isfinite().all()


def test_the_oldest_files_are_deleted(
    pipeline_folder: Path, prompt_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pipeline_folder)
    before = set(files(prompt_cache))
    monkeypatch.setattr(embedding_cache, "LIMIT", sum(path.stat().st_size for path in before))
    fill(pipeline_folder, [PROMPTS[1]])  # used again, so that it is not the oldest
    fill(pipeline_folder, ["a fish"])
    left = set(files(prompt_cache))
    assert len(left) == 3
    assert len(left - before) == 1
    assert fill(pipeline_folder, [PROMPTS[1], "a fish"]).embeddings.rounds == 0  # type: ignore[union-attr]


def test_commands_do_not_load_what_the_cache_has(
    pipeline_folder: Path,
    tmp_path: Path,
    prompt_cache: Path,
    loaded_encoders: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["sample", str(pipeline_folder), "--prompt", "a cat", "--num-inference-steps", "1", "--device", "cpu"]
    for name in ("a.png", "b.png"):
        assert main([*command, "--output", str(tmp_path / name)]) == 0
        assert len(loaded_encoders) == 1
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_outputs_of_fake_weights_are_not_stored(
    pipeline_folder: Path, prompt_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(pipeline_folder, text_encoders=False)
    assert model.embeddings is not None
    encoder = torch.nn.Module()
    with FakeTensorMode():
        encoder.weight = torch.nn.Parameter(torch.empty(2))
    model.embeddings.loaders["text_encoder"] = lambda: encoder
    monkeypatch.setattr(model, "place", lambda part, device: None)
    monkeypatch.setattr(model, "encode", lambda prompts, negative_prompt, guided: torch.zeros(1, 12, 8))
    model.cache_prompts(PROMPTS, "", 1.0)
    assert model.embeddings.rounds == 1
    assert not files(prompt_cache)
