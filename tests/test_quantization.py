"""Frozen weights in 8 and 4 bits: their gradients against autograd, training, LoRA files and bad inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DModel,
)
from safetensors.torch import save_file
from test_flow import SCHNELL, tiny_clip, tiny_t5, tiny_vae
from torch import Tensor, nn
from transformers import CLIPTextModel

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.lora import freeze_lora, load_lora, lora_parameters, save_lora
from draftune.methods import Batch, DraftK
from draftune.models import DiffusionModel, load_model
from draftune.models.quantization import BACKENDS
from draftune.sampling.sampler import PrefixCache
from draftune.training.memory_count import network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.tensors import is_quantized_weight, stored_tensors
from helpers.pipelines import add_random_lora, tiny_tokenizer

BITS = {"bnb_4bit": 4, "bnb_8bit": 8, "torchao_int8": 8, "torchao_float8": 8}
K, STEPS = 2, 3


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 pipeline of two blocks with 256 channels, wide enough that rounding errors average out."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    tokenizer_2, text_encoder_2 = tiny_t5(folder / "t5")
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(16, 24, 24),
    )
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHNELL),
        vae=tiny_vae(),
        text_encoder=tiny_clip(CLIPTextModel, 8),
        tokenizer=tiny_tokenizer(folder / "words"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(params=BACKENDS)
def quantization(request: pytest.FixtureRequest) -> str:
    """The name of a backend whose package is installed."""
    name: str = request.param
    pytest.importorskip(BACKENDS[name].package)
    return name


def opened(folder: Path, quantization: str = "none", precision: str = "no") -> DiffusionModel:
    model = load_model(folder, precision, quantization).to("cpu", precision)
    model.set_size(16, 16)
    return model


def reward(x: Tensor) -> Tensor:
    return (torch.sin(x) * torch.arange(1.0, 5.0)[:, None, None]).mean((1, 2, 3))


def gradient(model: DiffusionModel, checkpointing: str = "none") -> Tensor:
    """Of DRaFT-K, by the library."""
    parameters = add_random_lora(model)
    model.set_checkpointing(checkpointing)
    schedule = model.schedule(STEPS)
    denoise, base = model.denoisers_for(["a cat", "a dog"], schedule, 1.0)
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    batch = Batch(["", ""], PrefixCache(noise), schedule, denoise, base, reward, torch.Generator().manual_seed(0))
    for loss in DraftK(K).losses([batch]):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])


def gradient_by_hand(model: DiffusionModel) -> Tensor:
    """Plain autograd through Euler's steps of diffusers' transformer."""
    parameters = add_random_lora(model)
    model.set_checkpointing("none")
    sigmas = [*(step.sigma for step in model.schedule(STEPS).steps), 0.0]
    with torch.no_grad():
        condition = model.encode(["a cat", "a dog"], "", False)
    x = model.noise(torch.Generator().manual_seed(0), 2)
    for i in range(STEPS):
        x = x.detach() if i <= STEPS - K else x
        x = x + (sigmas[i + 1] - sigmas[i]) * model.predict(x, 1000 * sigmas[i], condition, 1.0)
    (-reward(x).mean()).backward()
    return torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])


def dequantized(layer: Any) -> Tensor:
    """The numbers that a layer's quantized weight stands for."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # the first call moves the scales to the layer
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data * scales[:, None] / 127
    return weight.dequantize()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def quantized_layers(model: DiffusionModel) -> dict[str, Any]:
    modules = model.denoiser.named_modules()
    return {name: layer for name, layer in modules if is_quantized_weight(getattr(layer, "weight", None))}


def test_gradient(wide: Path, quantization: str) -> None:
    """Measured: a cosine of 0.937 for bnb_4bit, 0.9993, 0.9998 and 0.9959 for the others."""
    ours, unquantized = gradient(opened(wide, quantization)), gradient(opened(wide))
    assert 0.9 < cosine(ours, unquantized) < 0.999999
    if BITS[quantization] == 8:
        assert cosine(ours, unquantized) > 0.99


def test_gradient_is_that_of_the_dequantized_weights(wide: Path, quantization: str) -> None:
    layers, plain = quantized_layers(opened(wide, quantization)), opened(wide)
    assert layers.keys() == {n for n, layer in plain.denoiser.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        plain.denoiser.get_submodule(name).weight.data = dequantized(layer).float()
    # bitsandbytes' 8-bit layers also round their inputs, which changes the point at which the gradient is taken.
    tolerance = 0.03 if quantization == "bnb_8bit" else 1e-5
    assert relative(gradient(opened(wide, quantization)), gradient_by_hand(plain)) < tolerance


@pytest.mark.parametrize("checkpointing", ["blocks", "denoiser", "both"])
def test_checkpointing_changes_nothing(wide: Path, quantization: str, checkpointing: str) -> None:
    assert torch.equal(gradient(opened(wide, quantization), checkpointing), gradient(opened(wide, quantization)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training(wide: Path, tmp_path: Path, quantization: str, precision: str) -> None:
    """A LoRA is trained, is saved in the plain format, and changes the unquantized model's images in the same way."""
    weights = {name: dequantized(layer) for name, layer in quantized_layers(opened(wide, quantization)).items()}
    settings = {"prompts": ["a cat"], "batch_size": 2, "num_inference_steps": STEPS, "learning_rate": 0.02}
    trainer = Trainer(
        str(wide),
        brightness,
        method=f"draft_k(k={K})",
        steps=4,
        quantization=quantization,
        mixed_precision=precision,
        height=16,
        width=16,
        num_log_prompts=1,
        output=str(tmp_path / "run"),
        **settings,
    )
    run = trainer.train()
    model, plain = trainer.model, opened(wide)
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(model).values())
    if precision == "no":  # in bf16, scales are rounded
        for name, layer in weights.items():
            layer_now = model.denoiser.get_submodule(name)
            assert torch.equal(dequantized(getattr(layer_now, "base_layer", layer_now)), layer)
    before = plain.sample_tensors(["a cat"], [0], plain.schedule(STEPS), 1.0)
    load_lora(plain, run.folder)
    after = plain.sample_tensors(["a cat"], [0], plain.schedule(STEPS), 1.0)
    tuned = model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 1.0)
    assert (after - before).mean() > 0.02
    assert (tuned - after).abs().mean() < 0.2 * (after - before).abs().mean()
    pipeline = FluxPipeline.from_pretrained(wide)
    pipeline.load_lora_weights(run.folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    theirs = load_model(pipeline)
    theirs.set_size(16, 16)
    assert torch.equal(theirs.sample_tensors(["a cat"], [0], theirs.schedule(STEPS), 1.0), after)


def images(model: DiffusionModel) -> Tensor:
    return model.sample_tensors(["a cat"], [0], model.schedule(STEPS), 1.0)


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


def test_memory(wide: Path, tmp_path: Path, quantization: str) -> None:
    """Numbers and scales are counted: 4.127 bits for a weight with QLoRA's scales, 8 bits and one scale a row."""
    layers = quantized_layers(opened(wide, quantization))
    bits = 8 * sum(t.nbytes for layer in layers.values() for t in stored_tensors(layer.weight))
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert BITS[quantization] <= bits / weights < 1.15 * BITS[quantization]
    settings = {"prompts": ["a cat"], "method": "draft_k(k=1)", "num_inference_steps": 2, "mixed_precision": "no"}
    held = {
        name: network_bytes(Trainer(str(wide), brightness, quantization=name, output=str(tmp_path / name), **settings))
        for name in ("none", quantization)
    }
    assert held["none"] - held[quantization] == pytest.approx(4 * weights - bits / 8, rel=0.02)


def test_a_quantized_pipeline_in_memory(wide: Path, quantization: str) -> None:
    expected = images(opened(wide, quantization))
    model = load_model(opened(wide, quantization).pipeline).to("cpu")
    model.set_size(16, 16)
    assert torch.equal(images(model), expected)
    with pytest.raises(DraftuneError, match=quantization):
        load_model(model.pipeline, quantization=quantization)
    with pytest.raises(DraftuneError, match=quantization):
        Trainer(model, brightness, prompts=["a cat"], quantization=quantization)


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
        assert "draftune[quantization]" in error
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
