"""Frozen weights in 8 and 4 bits: their gradients against autograd, training and memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from draftune.lora import load_lora, lora_parameters
from draftune.methods import Batch, DraftK
from draftune.models import DiffusionModel, load_model
from draftune.models.quantization import BACKENDS
from draftune.sampling.sampler import PrefixCache
from draftune.settings import Settings
from draftune.training.memory_count import count_run, network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory
from draftune.utils.tensors import stored_tensors
from helpers.pipelines import add_random_lora
from helpers.quantized import STEPS, dequantized, images, opened, quantized_layers, save_wide

BITS = {"bnb_4bit": 4, "bnb_8bit": 8, "torchao_int8": 8, "torchao_float8": 8}
K = 2


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(params=BACKENDS)
def quantization(request: pytest.FixtureRequest) -> str:
    """The name of a backend whose package is installed."""
    name: str = request.param
    pytest.importorskip(BACKENDS[name].package)
    return name


def reward(x: Tensor) -> Tensor:
    return (torch.sin(x) * torch.arange(1.0, 5.0, device=x.device)[:, None, None]).mean((1, 2, 3))


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


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


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


def test_bitsandbytes_fetches_no_kernel() -> None:
    """Every kernel that its code names has a path, for `kernels` and for processes that draftune starts."""
    (folder,) = find_spec("bitsandbytes").submodule_search_locations  # type: ignore[union-attr, misc]
    code = "".join(path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.py"))
    named = set(re.findall(r"\bget_kernel\(\s*['\"]([^'\"]+)", code))
    local = dict(entry.split("=") for entry in os.environ["LOCAL_KERNELS"].split(":"))
    assert named
    assert named <= local.keys()
    assert not any(Path(path).exists() for path in local.values())


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


def test_counted_memory(wide: Path, tmp_path: Path, quantization: str) -> None:
    """From configs alone: packed weights take what the backend's weights take."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    values: dict[str, Any] = {
        "prompts": str(tmp_path / "prompts.txt"),
        "reward": "emoji_aesthetic",
        "method": "draft_k(k=2)",
        "quantization": quantization,
        "mixed_precision": "bf16",
        "num_inference_steps": 2,
        "height": 64,
        "width": 64,
        "device": "cpu",
        "output": str(tmp_path / "run"),
    }
    made = Trainer(str(wide), **values)
    configs = Path(shutil.copytree(wide, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")))
    counted = count_run(Settings(model=str(configs), **values))
    # bitsandbytes stores the scales of its 8-bit layers outside of their parameters.
    rows = sum(layer.out_features for layer in quantized_layers(opened(wide, quantization)).values())
    assert counted.networks == network_bytes(made) + (4 * rows if quantization == "bnb_8bit" else 0)
    peak = peak_memory(lambda: made.train_step.run(1))
    # Its layers also keep their rounded inputs, which are not counted.
    assert counted.update < peak if quantization == "bnb_8bit" else counted.update == pytest.approx(peak, rel=0.02)


def test_activations_have_the_precision_of_autocast(wide: Path, quantization: str) -> None:
    """As those of plain layers: not that of the norm before them."""
    model = opened(wide, quantization, "bf16")
    found = []
    for layer in quantized_layers(model).values():
        layer.register_forward_hook(lambda layer, inputs, output: found.append(output.dtype))
    images(model)
    assert set(found) == {torch.bfloat16}


def test_the_precision_of_a_network_is_not_that_of_its_lora(wide: Path, quantization: str) -> None:
    """Also if no linear layer has a bias, so that the LoRA's weights are the first ones in floating point."""
    model = opened(wide, quantization, "bf16")
    for layer in model.denoiser.modules():
        if isinstance(layer, nn.Linear):
            layer.register_parameter("bias", None)
    add_random_lora(model)
    assert model.denoiser.dtype == torch.bfloat16
    model.to("cpu", "no")
    assert model.denoiser.dtype == torch.float32


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
