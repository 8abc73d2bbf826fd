"""What must hold for every model family: counted memory, a trained LoRA in ComfyUI's layout, the family's defaults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from draftune.cli.main import main
from draftune.models import FAMILIES, load_model
from draftune.models.prompt_embeddings import text_encoders
from draftune.runs.load import read_deltas
from draftune.settings import Settings
from draftune.training.memory_count import count_run, network_bytes
from draftune.training.trainer import Trainer
from draftune.utils.memory import peak_memory
from helpers.every_family import TEXT_FAMILIES, every_family

NO_COMFYUI = ("sana", "sprint", "krea2", "krea2_turbo")
"""Families that ComfyUI loads no LoRA for."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return every_family(tmp_path_factory.mktemp("every"))


def small(folder: Path, output: Path, **values: Any) -> Settings:
    """Settings of one update at the model's smallest size, with the defaults of its family for the rest."""
    model = load_model(folder)
    prompts = output.parent / "prompts.txt"
    prompts.write_text("a cat\na large red bird on a stone\n")
    settings = {
        "reward": "saturation",
        "steps": 1,
        "batch_size": 2,
        "num_inference_steps": min(4, model.recommended["num_inference_steps"]),
        "mixed_precision": "no",
        "lora_rank": 2,
        "num_log_prompts": 1,
        "log_images_steps": 0,
        "device": "cpu",
        "report_to": "none",
        "height": model.size_multiple,
        "width": model.size_multiple,
    }
    return Settings(model=str(folder), prompts=str(prompts), output=str(output), **settings | values)


def test_every_pipeline_class_is_tested(saved: dict[str, Path]) -> None:
    tested = {type(load_model(folder)) for folder in saved.values()}
    assert tested == set(FAMILIES.values())


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_count_from_configs_is_the_memory_of_the_run(saved: dict[str, Path], tmp_path: Path, family: str) -> None:
    settings = small(saved[family], tmp_path / "run", num_inference_steps=2, method="draft_k(k=1)")
    trainer = Trainer(settings=settings)
    real = network_bytes(trainer), peak_memory(lambda: trainer.train_step.run(1))
    configs = Path(shutil.copytree(saved[family], tmp_path / "configs"))
    for path in configs.rglob("*.safetensors"):
        path.unlink()
    count = count_run(Settings(**{**vars(settings), "model": str(configs)}))
    assert count.networks == real[0]
    assert count.update == pytest.approx(real[1], rel=0.02)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_lora_of_the_default_layers_is_exported_for_comfyui(
    saved: dict[str, Path], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small(saved[family], tmp_path / "run")
    run = Trainer(settings=settings).train()
    export = ["export", str(run.folder), "--format", "comfyui", "--output", str(tmp_path / "lora.safetensors")]
    if family in NO_COMFYUI:
        assert main(export) == 2
        assert type(load_model(saved[family]).denoiser).__name__ in capsys.readouterr().err
        return
    assert main(export) == 0
    own = read_deltas(run.folder / "lora")
    back = read_deltas(tmp_path / "lora.safetensors", str(saved[family]))
    assert own.layers.keys() == back.layers.keys()
    for name, delta in own.layers.items():
        assert torch.allclose(delta.change, back.layers[name].change, atol=1e-6)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_encoders_in_bf16_are_those_of_diffusers(saved: dict[str, Path], family: str) -> None:
    """Weights are rounded; computed tables such as rotary frequencies are not."""
    model = load_model(saved[family], "bf16").to("cpu", "bf16")
    pipeline = DiffusionPipeline.from_pretrained(saved[family], torch_dtype=torch.bfloat16)
    for name, encoder in text_encoders(model.pipeline).items():
        official = getattr(pipeline, name)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = dict(getattr(encoder, kind)()), dict(getattr(official, kind)())
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                assert torch.promote_types(tensor.dtype, theirs[key].dtype) == tensor.dtype, key
                assert torch.equal(tensor.to(theirs[key].dtype), theirs[key]), key
