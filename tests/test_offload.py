"""Offloading of the frozen denoiser: the gradient does not depend on where a layer's weights are between its calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from test_flow import save_flux

from draftune.errors import DraftuneError
from draftune.lora import lora_parameters, save_lora
from draftune.methods import Batch, DraftK
from draftune.models import DiffusionModel, load_model
from draftune.models.offloading import offload_layers
from draftune.sampling.sampler import PrefixCache
from draftune.training.trainer import Trainer
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


def opened(folder: Path) -> DiffusionModel:
    model = load_model(folder).to("cpu")
    model.set_size(16, 16)
    return model


@pytest.mark.parametrize("checkpointing", MODES)
def test_gradient_of_weights_elsewhere(schnell: Path, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its calls a layer has other numbers, NaN, as on a device of its own: nothing reads them."""
    stored: dict[torch.Tensor, torch.Tensor] = {}

    def onload(self: ModuleGroup) -> None:
        for parameter in self.modules[0].parameters():
            parameter.data = stored[parameter].clone()

    def offload(self: ModuleGroup) -> None:
        for parameter in self.modules[0].parameters():
            stored.setdefault(parameter, parameter.data)
            parameter.data = torch.full_like(parameter.data, torch.nan)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    model = opened(schnell)
    offload_layers(model.denoiser, CPU)
    assert len(stored) > 40
    assert all(parameter.isnan().all() for parameter in stored)
    assert torch.equal(gradient(model, checkpointing), gradient(opened(schnell), checkpointing))
    assert all(parameter.isnan().all() for parameter in stored)


@pytest.mark.parametrize("first", [False, True])
def test_training(schnell: Path, tmp_path: Path, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with offloading trains the LoRA of one without it, bit for bit, also on top of a frozen LoRA."""
    moved: set[str] = set()
    onload = ModuleGroup.onload_

    def counted(self: ModuleGroup) -> None:
        moved.update(str(p.requires_grad) for module in self.modules for p in module.parameters())
        onload(self)

    monkeypatch.setattr(ModuleGroup, "onload_", counted)
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
        assert moved == ({"False"} if offload else set())
    assert all(torch.equal(a, b) for a, b in zip(*tuned, strict=True))


@pytest.mark.parametrize("other", [{"quantization": "bnb_4bit"}, {"compile": True}])
def test_what_does_not_go_together(schnell: Path, tmp_path: Path, other: dict[str, str]) -> None:
    with pytest.raises(DraftuneError, match="offload"):
        Trainer(str(schnell), "brightness", prompts=["a cat"], offload=True, output=str(tmp_path / "run"), **other)
