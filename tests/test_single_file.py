"""Checkpoints in one file: the weights of the folder that they were made from, whatever the file holds of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.models import DiffusionModel, load_model
from draftune.models.layout import load_layout
from draftune.presets import read_yaml
from draftune.runs.load import load_for_sampling
from draftune.settings import Settings
from draftune.utils.model_options import ModelOptions
from draftune.utils.single_file import infer_pipeline, read_header
from helpers.errors import raises
from helpers.single_files import denoiser_of, flux_of_any_width, others_of, write

FAMILIES = ("sd", "sdxl", "sd3", "dev", "schnell", "z-image")
SCALED = ("sd3", "dev", "schnell", "z-image")


@pytest.fixture(autouse=True)
def of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    flux_of_any_width(monkeypatch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import test_flow
    import test_sdxl
    import test_z_image

    from helpers.pipelines import build_pipeline

    root = tmp_path_factory.mktemp("families")
    build_pipeline(root / "sd" / "parts", "DDIM").save_pretrained(root / "sd" / "model")
    folders = {
        "sd": root / "sd" / "model",
        "sdxl": test_sdxl.saved(root / "sdxl"),
        "sd3": test_flow.save_sd3(root / "sd3", test_flow.SD3),
        "dev": test_flow.save_flux(root / "dev", guidance_embeds=True),
        "schnell": test_flow.save_flux(root / "schnell", guidance_embeds=False),
        "z-image": test_z_image.build(root / "z-image", test_z_image.TURBO),
    }
    # The checkpoints of Stable Diffusion 3 have no text projection for CLIP-L, and diffusers takes the identity for it.
    weights = folders["sd3"] / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["text_projection.weight"] = torch.eye(len(state["text_projection.weight"]))
    save_file(state, weights, {"format": "pt"})
    return folders


def configs_of(folder: Path, target: Path, *without: str) -> Path:
    """A copy of a pipeline without the weights of some networks; without any weights if none is named."""
    shutil.copytree(folder, target)
    for file in target.rglob("*.safetensors"):
        if not without or file.parent.name in without:
            file.unlink()
    return target


def weights_of(model: DiffusionModel) -> dict[str, Tensor]:
    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def same_weights(one: DiffusionModel, two: DiffusionModel) -> None:
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def images(model: DiffusionModel, family: str) -> Tensor:
    if family in SCALED:
        model.set_size(16, 16)
    return model.sample_tensors(["a cat"], [0], model.schedule(2), 2.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_pipeline(saved: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Every network is read from the file: the folder beside it has the configs and tokenizers alone."""
    folder = saved[family]
    # The text encoder of Z-Image is in no checkpoint that diffusers reads.
    base = configs_of(folder, tmp_path / "configs", *(("transformer", "vae") if family == "z-image" else ()))
    file = write(tmp_path / "model.safetensors", denoiser_of(folder) | others_of(folder))
    model, known = load_model(file, base_pipeline=str(base)), load_model(folder)
    same_weights(model, known)
    # The weights lie elsewhere in memory, and some kernels round by that.
    assert (images(model, family) - images(known, family)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_denoiser_alone(saved: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = saved[family]
    base = configs_of(folder, tmp_path / "base", "unet", "transformer")
    file = write(tmp_path / "model.safetensors", denoiser_of(folder))
    same_weights(load_model(file, base_pipeline=str(base)), load_model(folder))


def test_the_denoiser_in_the_layout_of_diffusers(saved: dict[str, Path]) -> None:
    file = saved["sd3"] / "transformer" / "diffusion_pytorch_model.safetensors"
    same_weights(load_model(file, base_pipeline=str(saved["sd3"])), load_model(saved["sd3"]))
    with raises(DraftuneError, "--base-pipeline unknown"):
        load_model(file)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
def test_half_and_float8(saved: dict[str, Path], tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """float8 weights are cast up without loss."""
    folder = saved["sd"]
    rounded = {key: value.to(dtype) for key, value in (denoiser_of(folder) | others_of(folder)).items()}
    file = write(tmp_path / "model.safetensors", rounded)
    exact = write(tmp_path / "exact.safetensors", {key: value.float() for key, value in rounded.items()})
    model = load_model(file, precision, base_pipeline=str(folder))
    same_weights(load_model(file, base_pipeline=str(folder)), load_model(exact, base_pipeline=str(folder)))
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    unet, text_encoder, vae = model.modules
    assert unet.dtype == half
    of_file = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert {text_encoder.dtype, vae.dtype} == {torch.float32 if precision == "no" else of_file}


def test_the_pipeline_is_inferred(saved: dict[str, Path], tmp_path: Path) -> None:
    known = {}
    for family, folder in saved.items():
        header = read_header(write(tmp_path / f"{family}.safetensors", denoiser_of(folder) | others_of(folder)))
        inferred = infer_pipeline(header)
        assert inferred is not None
        kind, known[family] = inferred
        assert kind == json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert known["dev"] == "black-forest-labs/FLUX.1-dev"
    assert known["schnell"] == "black-forest-labs/FLUX.1-schnell"
    assert known["sd3"] == "stabilityai/stable-diffusion-3.5-medium"
    assert known["z-image"] == "Tongyi-MAI/Z-Image-Turbo"
    # Defaults are those of the inferred pipeline, known without a download.
    settings = Settings(model=str(tmp_path / "schnell.safetensors"))
    assert (settings.num_inference_steps, settings.guidance_scale) == (4, 0)
    assert settings.base_pipeline == known["schnell"]
    assert Settings(model=str(tmp_path / "z-image.safetensors")).num_inference_steps == 8
    assert (
        Settings(model=str(tmp_path / "z-image.safetensors"), base_pipeline="Tongyi-MAI/Z-Image").num_inference_steps
        == 50
    )


def test_a_pipeline_that_is_not_on_this_machine(saved: dict[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", denoiser_of(saved["dev"]))
    for load in (load_model, load_layout):
        with raises(DraftuneError, "black-forest-labs/FLUX.1-dev --base-pipeline"):
            load(file) if load is load_model else load(str(file))
    with raises(DraftuneError, "some/one --base-pipeline v2"):
        load_model(file, base_pipeline="some/one", revision="v2")


def test_a_run_on_a_file(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, resumes, and its LoRA finds the file and its pipeline by itself."""
    folder, file = saved["sd"], tmp_path / "model.safetensors"
    write(file, denoiser_of(saved["sd"]) | others_of(saved["sd"]))
    base = configs_of(folder, tmp_path / "configs")
    command = ["train", "--model", str(file), "--base-pipeline", str(base), "--reward", "brightness", "--prompts"]
    command += ["animals", "--output", str(tmp_path / "run"), "--num-inference-steps", "2", "--batch-size", "1"]
    command += ["--learning-rate", "0.01", "--eval-prompts", "", "--log-images-steps", "0", "--steps"]
    assert main([*command, "1"]) == 0
    assert main([*command, "2"]) == 0
    same = shutil.copy(file, tmp_path / "same.safetensors")
    assert main([*[str(same) if word == str(file) else word for word in command], "3"]) == 0
    plain = tmp_path / "plain"
    values: dict[str, Any] = {"num_inference_steps": 2, "batch_size": 1, "learning_rate": 0.01, "steps": 3}
    values |= {"eval_prompts": "", "log_images_steps": 0, "output": str(plain)}
    draftune.train(str(folder), "brightness", "animals", **values)
    name = "lora/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(plain / name)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)
    config = Settings.from_mapping(read_yaml(tmp_path / "run" / "config.yaml"))
    assert (config.model, config.base_pipeline) == (str(same), str(base))
    shutil.move(tmp_path / "run" / "lora", tmp_path / "lora")
    model, settings = load_for_sampling(str(tmp_path / "lora"))
    assert model.options == ModelOptions(str(base))
    assert settings.num_inference_steps == 50
    other, _ = load_for_sampling(str(tmp_path / "lora"), str(folder))
    other.load_text_encoders()
    same_weights(model, other)
    for format in ("diffusers", "merged"):
        draftune.export_lora(tmp_path / "lora", tmp_path / format, format)
    for format in ("comfyui", "kohya"):
        draftune.export_lora(tmp_path / "lora", tmp_path / f"{format}.safetensors", format)
    draftune.merge_loras([(tmp_path / "lora", 1.0)], tmp_path / "sum")
    assert load_for_sampling(str(tmp_path / "sum"))[0].options == ModelOptions(str(base))
    # Another file under the same name is another model.
    write(Path(same), {key: value + 1 for key, value in load_file(same).items()})
    capsys.readouterr()
    assert main([*[str(same) if word == str(file) else word for word in command], "4"]) == 2
    assert "model" in capsys.readouterr().err


def test_sampling_from_a_file(saved: dict[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", denoiser_of(saved["sd"]))
    picture = tmp_path / "cat.png"
    command = ["sample", str(file), "--base-pipeline", str(saved["sd"]), "--prompt", "a cat", "--output", str(picture)]
    assert main([*command, "--num-inference-steps", "2"]) == 0
    assert picture.is_file()
