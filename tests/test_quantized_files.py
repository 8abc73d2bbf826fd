"""LoRA files and pipelines of quantized models, merged exports, and bad inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import freeze_lora, load_lora, save_lora
from draftune.models import load_model
from draftune.models.quantization import BACKENDS
from draftune.training.trainer import Trainer
from helpers.pipelines import add_random_lora
from helpers.quantized import images, opened, save_wide


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(params=BACKENDS)
def quantization(request: pytest.FixtureRequest) -> str:
    """The name of a backend whose package is installed."""
    name: str = request.param
    pytest.importorskip(BACKENDS[name].package)
    return name


def test_second_lora(wide: Path, tmp_path: Path, quantization: str) -> None:
    """A frozen LoRA and the one trained on it are saved as their sum, which is the plain model's too."""
    first = opened(wide)
    add_random_lora(first)
    save_lora(first, tmp_path / "first")
    model = opened(wide, quantization)
    freeze_lora(model, tmp_path / "first")
    alone = images(model)
    add_random_lora(model)
    both = images(model)
    again = opened(wide, quantization)
    load_lora(again, save_lora(model, tmp_path / "both"))
    assert (both - alone).abs().max() > 0.01
    # bitsandbytes' 8-bit layers round their inputs, which magnifies the last digits.
    assert (images(again) - both).abs().max() < (0.01 if quantization == "bnb_8bit" else 1e-4)


def test_a_quantized_pipeline_in_memory(wide: Path, quantization: str) -> None:
    expected = images(opened(wide, quantization))
    model = load_model(opened(wide, quantization).pipeline).to("cpu")
    model.set_size(16, 16)
    assert torch.equal(images(model), expected)
    with pytest.raises(DraftuneError, match=quantization):
        load_model(model.pipeline, quantization=quantization)
    with pytest.raises(DraftuneError, match=quantization):
        Trainer(model, "brightness", prompts=["a cat"], quantization=quantization)


def test_a_quantized_pipeline_on_disk(wide: Path, tmp_path: Path, quantization: str) -> None:
    model = opened(wide, quantization)
    model.pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(images(opened(tmp_path / "saved")), images(model))
    with pytest.raises(DraftuneError, match="--quantization"):
        load_model(tmp_path / "saved", quantization=quantization)


def test_dora_needs_unquantized_weights(wide: Path, tmp_path: Path, quantization: str) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {"lora_A.weight": torch.ones(1, 256), "lora_B.weight": torch.ones(256, 1)}
    tensors["lora_magnitude_vector"] = torch.ones(256)
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "dora.safetensors")
    load_lora(opened(wide), tmp_path / "dora.safetensors")
    with pytest.raises(DraftuneError, match="unquantized"):
        load_lora(opened(wide, quantization), tmp_path / "dora.safetensors")


def test_merged_export_of_a_quantized_run(wide: Path, tmp_path: Path, quantization: str) -> None:
    """The LoRA is merged into the unquantized weights of the run's base model."""
    common = ["--quantization", quantization, "--height", "16", "--width", "16", "--guidance-scale", "1"]
    common += ["--num-inference-steps", "2", "--steps", "1", "--num-log-prompts", "1", "--method", "draft_k(k=1)"]
    run, merged = str(tmp_path / "run"), tmp_path / "merged"
    reward = ["--reward", "brightness"]
    assert main(["train", "--model", str(wide), *reward, "--prompts", "animals", "--output", run, *common]) == 0
    assert main(["export", run, "--format", "merged", "--output", str(merged)]) == 0
    model = opened(wide)
    load_lora(model, run)
    assert (images(opened(merged)) - images(model)).abs().max() < 1e-4
    sample = ["sample", run, "--prompt", "a cat", "--output", str(tmp_path / "images")]
    assert main([*sample, "--quantization", quantization, "--device", "cpu"]) == 0


def test_bad_values(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for package in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    train = ["train", "--model", str(wide), "--reward", "brightness", "--prompts", "animals"]
    train += ["--output", str(tmp_path / "run")]
    for name, backend in BACKENDS.items():
        assert main([*train, "--quantization", name]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert backend.package in error
        assert "draftune[quant]" in error
    assert main([*train, "--quantization", "bnb_4bit", "--mixed-precision", "fp16"]) == 2
    assert "fp16" in capsys.readouterr().err
    assert main([*train, "--quantization", "int4"]) == 2
    assert not (tmp_path / "run").exists()


def test_networks_of_convolutions_are_refused(tmp_path: Path, quantization: str) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    with pytest.raises(DraftuneError, match=quantization):
        load_model(tmp_path / "pixels", quantization=quantization)
