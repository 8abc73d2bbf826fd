"""Revisions and variants of hub ids, sharded weights, and a hub cache without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.models import DiffusionModel, load_model
from draftune.models.layout import load_layout
from draftune.runs.fingerprint import find_source
from draftune.runs.load import load_for_sampling
from draftune.settings import Settings
from draftune.utils.model_options import ModelOptions
from helpers.errors import mentions, raises
from helpers.odd_models import as_variant, scheduler
from helpers.single_files import denoiser_of, others_of, write

NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture
def cache(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two revisions of some/one: main, and v2 with other weights and a few-step scheduler."""
    repository = tmp_path / "hub" / "models--some--one"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(pipeline_folder, repository / "snapshots" / commit)
    second = repository / "snapshots" / ("b" * 40)
    doubled = {key: 2 * value for key, value in load_file(weights(second / "vae")).items()}
    write(weights(second / "vae"), doubled)
    scheduler("LCMScheduler")(second)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository / "snapshots"


def weights(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def state(model: DiffusionModel) -> dict[str, Tensor]:
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def equal(one: DiffusionModel, two: DiffusionModel) -> bool:
    first, second = state(one), state(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_revision_in_the_cache(cache: Path) -> None:
    main_branch, v2 = cache / ("a" * 40), cache / ("b" * 40)
    assert equal(load_model("some/one"), load_model(main_branch))
    for revision in ("v2", "b" * 40):
        assert equal(load_model("some/one", revision=revision), load_model(v2))
        assert load_model("some/one", revision=revision).options == ModelOptions(revision=revision)
    assert not equal(load_model("some/one"), load_model(v2))
    assert load_layout("some/one", ModelOptions(revision="v2")).keys() == {"unet", "text_encoder"}
    assert Settings(model="some/one").num_inference_steps == 50
    assert Settings(model="some/one", revision="v2").num_inference_steps == 4


def test_a_revision_that_is_not_there(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for load in (load_model, load_layout):
        options = ModelOptions(revision="v3")
        with raises(DraftuneError, "some/one revision v3 --model"):
            load_model("some/one", revision="v3") if load is load_model else load_layout("some/one", options)
    command = ["train", "--model", "some/one", "--revision", "v3", "--reward", "brightness", "--prompts", "animals"]
    command += ["--num-inference-steps", "2", "--guidance-scale", "2", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert mentions(line, "some/one revision v3 --model"), line
    assert not (tmp_path / "out").exists()


def test_a_run_belongs_to_its_revision(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another revision is another model, and the LoRA knows its own."""
    command = ["train", "--model", "some/one", "--reward", "brightness", "--prompts", "animals", "--batch-size", "1"]
    command += ["--num-inference-steps", "2", "--output", str(tmp_path / "run"), "--log-images-steps", "0"]
    command += ["--eval-prompts", "", "--method", "draft_k(k=1)", "--guidance-scale", "2"]
    assert main([*command, "--revision", "v2", "--steps", "1"]) == 0
    assert main([*command, "--revision", "v2", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main([*command, "--steps", "3"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert mentions(line, "revision v2"), line
    shutil.move(tmp_path / "run" / "lora", tmp_path / "lora")
    model, _ = load_for_sampling(str(tmp_path / "lora"))
    assert model.options == ModelOptions(revision="v2")
    own, expected = state(model), state(load_model(cache / ("b" * 40)))
    assert torch.equal(own["vae.decoder.conv_in.weight"], expected["vae.decoder.conv_in.weight"])


def test_the_contents_of_a_revision_are_compared(cache: Path) -> None:
    first, second = find_source("some/one"), find_source("some/one", ModelOptions(revision="v2"))
    assert first is not None
    assert second is not None
    assert not second.holds(first)
    copy = find_source(str(cache / ("b" * 40)))
    assert copy is not None
    assert second.holds(copy)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_variant_beside_plain_weights(pipeline_folder: Path, tmp_path: Path, shards: int) -> None:
    folder, half = (Path(shutil.copytree(pipeline_folder, tmp_path / name)) for name in ("both", "half"))
    as_variant("unet", "text_encoder", shards=shards)(half)
    for part in ("unet", "text_encoder"):
        for file in (*(half / part).glob("*.fp16*.safetensors"), *(half / part).glob("*.index.fp16.json")):
            shutil.copy(file, folder / part)
    assert equal(load_model(folder), load_model(pipeline_folder))
    # The autoencoder has no such variant: its plain weights are taken.
    assert equal(load_model(folder, variant="fp16"), load_model(half))
    assert not equal(load_model(folder, variant="fp16"), load_model(pipeline_folder))
    unet, text_encoder, vae = load_model(folder, "bf16", variant="fp16").modules
    assert [part.dtype for part in (unet, text_encoder, vae)] == [torch.bfloat16, torch.float16, torch.float32]
    with raises(DraftuneError, "variant bf16 --variant"):
        load_model(folder, variant="bf16")
    # A run resumes as long as the files of its variant are the same.
    before = find_source(str(folder), ModelOptions(variant="fp16"))
    assert before is not None
    hashes = before.sha256
    assert any(".fp16" in name for name in hashes)
    assert not any(".fp16" in name for name in find_source(str(folder)).sha256)  # type: ignore[union-attr]


def test_a_variant_of_any_name(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "model"))
    pipeline.unet.save_pretrained(folder / "unet", variant="non_ema")
    assert equal(load_model(folder), load_model(pipeline_folder))
    ema = load_model(folder, variant="non_ema").denoiser
    assert torch.equal(ema.conv_in.bias, pipeline.unet.conv_in.bias)


def test_sharded_weights_in_the_cache(cache: Path, pipeline_folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    for name in NETWORKS:
        for file in (cache / ("a" * 40) / name).glob("*.safetensors"):
            file.unlink()
        getattr(pipeline, name).save_pretrained(cache / ("a" * 40) / name, max_shard_size="8KB")
    assert len(list((cache / ("a" * 40) / "unet").glob("*-of-*.safetensors"))) > 1
    assert equal(load_model("some/one"), load_model(pipeline_folder))


def test_only_what_a_file_lacks_is_downloaded(
    cache: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers leaves out the components that are passed as None."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(cache / ("b" * 40))

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    file = write(tmp_path / "model.safetensors", denoiser_of(pipeline_folder))
    load_model(file, base_pipeline="some/one", revision="v2")
    load_model("some/one", revision="v2")
    of_file, of_hub = asked
    assert (of_file["name"], of_file["revision"], of_file["unet"]) == ("some/one", "v2", None)
    assert not {"unet", "vae", "text_encoder"} & of_hub.keys()
    assert not {"vae", "text_encoder"} & of_file.keys()
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: asked.append(options))
    with raises(DraftuneError, "some/one variant ema"):
        load_model("some/one", variant="ema")
    assert asked[-1]["variant"] == "ema"


def test_a_checkpoint_file_with_a_pipeline_in_the_cache(cache: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """Its configs alone are in the cache; the revision and the variant are those of the pipeline."""
    file = write(tmp_path / "model.safetensors", denoiser_of(pipeline_folder) | others_of(pipeline_folder))
    for weights_file in cache.rglob("*.safetensors"):
        weights_file.unlink()
    assert equal(load_model(file, base_pipeline="some/one"), load_model(pipeline_folder))
    model = load_model(file, base_pipeline="some/one", revision="v2")
    assert type(model.pipeline.scheduler).__name__ == "LCMScheduler"
    assert Settings(model=str(file), base_pipeline="some/one", revision="v2").num_inference_steps == 4
