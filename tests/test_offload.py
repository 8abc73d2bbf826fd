"""Offloading of the frozen denoiser: the gradient does not depend on where a layer's weights are between its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_family import small
from test_flow import save_flux
from torch._subclasses.fake_tensor import FakeTensor

from draftune.errors import DraftuneError
from draftune.lora import lora_parameters, save_lora
from draftune.methods import Batch, DraftK
from draftune.models import DiffusionModel, load_model
from draftune.models.offloading import OffloadedLinear
from draftune.sampling.sampler import PrefixCache
from draftune.training.memory_count import count_run, network_bytes
from draftune.training.trainer import Trainer
from draftune.utils import converted_linear
from draftune.utils.memory import peak_memory
from helpers.pipelines import add_random_lora

MODES = ["none", "blocks", "denoiser", "both"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("schnell"), guidance_embeds=False)


def gradient(model: DiffusionModel, checkpointing: str) -> torch.Tensor:
    """Of DRaFT-K, for two of three steps."""
    parameters = add_random_lora(model)
    model.set_checkpointing(checkpointing)
    schedule = model.schedule(3)
    denoise, base = model.denoisers_for(["a cat", "a dog"], schedule, 1.0)
    noise = PrefixCache(model.noise(torch.Generator().manual_seed(0), 2))
    batch = Batch(["", ""], noise, schedule, denoise, base, lambda x: x.sin().mean((1, 2, 3)), torch.Generator())
    for loss in DraftK(2).losses([batch]):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])


def opened(folder: Path, precision: str = "no", offload: bool = False) -> DiffusionModel:
    model = load_model(folder, precision).to("cpu", precision, offload)
    model.set_size(16, 16)
    return model


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Weights that are copied for each product, as from main memory, by the addresses of what the layers hold: NaN."""
    stored: dict[int, torch.Tensor] = {}
    moved = converted_linear.moved

    def copied(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Weights without values, in a count, are moved as they are."""
        return moved(weight, x) if isinstance(weight, FakeTensor) else stored[weight.data_ptr()].to(x).clone()

    monkeypatch.setattr(converted_linear, "moved", copied)
    return stored


def take_away(model: DiffusionModel, elsewhere: dict[int, torch.Tensor]) -> None:
    for layer in model.denoiser.modules():
        if isinstance(layer, OffloadedLinear):
            elsewhere[layer.weight.data_ptr()] = layer.weight.data.clone()
            layer.weight.data.fill_(torch.nan)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", MODES)
def test_gradient_of_weights_elsewhere(
    schnell: Path, checkpointing: str, precision: str, elsewhere: dict[int, torch.Tensor]
) -> None:
    model = opened(schnell, precision, offload=True)
    take_away(model, elsewhere)
    assert len(elsewhere) > 20
    assert torch.equal(gradient(model, checkpointing), gradient(opened(schnell, precision), checkpointing))


@pytest.mark.parametrize("checkpointing", MODES)
def test_no_graph_holds_copied_weights(schnell: Path, checkpointing: str, elsewhere: dict[int, torch.Tensor]) -> None:
    """The peak is at most a copied weight above that of a run without offloading."""
    model = opened(schnell, offload=True)
    take_away(model, elsewhere)
    plain = opened(schnell)
    largest = max(weight.nbytes for weight in elsewhere.values())
    more = peak_memory(lambda: gradient(model, checkpointing)) - peak_memory(lambda: gradient(plain, checkpointing))
    assert more <= largest < 0.25 * sum(weight.nbytes for weight in elsewhere.values())


def test_the_count_is_without_the_weights_in_main_memory(
    schnell: Path, tmp_path: Path, elsewhere: dict[int, torch.Tensor]
) -> None:
    values: dict[str, Any] = {"method": "draft_k(k=2)", "offload": True, "gradient_checkpointing": "none"}
    settings = small(schnell, tmp_path / "run", **values)
    count, trainer = count_run(settings), Trainer(settings=settings)
    take_away(trainer.model, elsewhere)
    assert count.networks == network_bytes(trainer) - sum(weight.nbytes for weight in elsewhere.values())
    assert count.update == pytest.approx(peak_memory(lambda: trainer.train_step.run(1)), rel=0.02)


@pytest.mark.parametrize("first", [False, True])
def test_training(schnell: Path, tmp_path: Path, first: bool) -> None:
    """A run with offloading trains the LoRA of one without it, bit for bit, also on top of a frozen LoRA."""
    init = ""
    if first:
        start = opened(schnell)
        add_random_lora(start)
        init = str(save_lora(start, tmp_path / "first"))
    tuned = []
    for offload in (False, True):
        trainer = Trainer(
            str(schnell),
            "brightness",
            prompts=["a cat", "a dog"],
            method="draft_k(k=2)",
            steps=2,
            batch_size=2,
            num_inference_steps=3,
            mixed_precision="no",
            num_log_prompts=1,
            eval_prompts="",
            height=16,
            width=16,
            init_lora=init,
            offload=offload,
            output=str(tmp_path / str(offload)),
        )
        assert trainer.model.device == CPU
        trainer.train()
        tuned.append([p.detach().clone() for p in lora_parameters(trainer.model).values()])
        offloaded = [m for m in trainer.model.denoiser.modules() if isinstance(m, OffloadedLinear)]
        assert bool(offloaded) == offload
        assert not any(parameter.requires_grad for layer in offloaded for parameter in layer.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*tuned, strict=True))


@pytest.mark.parametrize("other", [{"quantization": "bnb_4bit"}, {"compile": True}])
def test_what_does_not_go_together(schnell: Path, tmp_path: Path, other: dict[str, str]) -> None:
    with pytest.raises(DraftuneError, match="offload"):
        Trainer(str(schnell), "brightness", prompts=["a cat"], offload=True, output=str(tmp_path / "run"), **other)


def test_a_lora_is_not_offloaded(schnell: Path) -> None:
    """As where `to` is called once more on a model that was offloaded and trained."""
    model = load_model(schnell).to(CPU, offload=True)
    trained = add_random_lora(model)
    model.to(CPU)
    assert len(lora_parameters(model)) == len(trained)
    assert any(isinstance(module, OffloadedLinear) for module in model.denoiser.modules())


def test_an_offloaded_denoiser_is_never_placed_as_a_whole(schnell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a second run on the same model, whose first call of `to` does not know of offloading."""
    model, placed, offloaded = load_model(schnell), list[Any](), list[Any]()
    monkeypatch.setattr(model, "place", lambda part, device: placed.append(device) if part is model.denoiser else None)
    monkeypatch.setattr("draftune.models.base.offload_layers", lambda network, device: offloaded.append(device))
    for offload in (True, False, True):
        model.to("meta", offload=offload)
    assert placed == ["cpu"] * 3
    assert offloaded == [torch.device("meta")] * 3
