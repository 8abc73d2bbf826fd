"""What happens to a pipeline that Python gives: what the docstring of load_model says, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from torch import nn

from draftune.errors import DraftuneError
from draftune.lora import add_lora
from draftune.models import load_model
from helpers.odd_models import families


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families(tmp_path_factory.mktemp("families"))


def networks(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def kept(pipeline: Any) -> Mapping[str, Any]:
    """What no model of ours may change."""
    weights = {
        f"{part}.{name}": (tensor.clone(), tensor.dtype, tensor.device)
        for part, network in networks(pipeline).items()
        for name, tensor in network.state_dict().items()
    }
    configs = {name: dict(part.config) for name, part in networks(pipeline).items() if isinstance(part.config, dict)}
    parts = {name: id(part) for name, part in pipeline.components.items()}
    return {
        "config": dict(pipeline.config),
        "scheduler": dict(pipeline.scheduler.config),
        "parts": parts,
        "configs": configs,
        "weights": weights,
    }


def changeable(pipeline: Any) -> list[Any]:
    """What the docstring says is changed."""
    return [
        (
            type(network),
            network.training,
            [parameter.requires_grad for parameter in network.parameters()],
            [parameter.stride() for parameter in network.parameters()],
            [getattr(module, "gradient_checkpointing", None) for module in network.modules()],
        )
        for network in networks(pipeline).values()
    ]


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for key in ("config", "scheduler", "parts", "configs"):
        assert before[key] == after[key], key
    assert before["weights"].keys() == after["weights"].keys()
    for name, (tensor, *held) in before["weights"].items():
        assert torch.equal(tensor, after["weights"][name][0]), name
        assert held == list(after["weights"][name][1:])


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "dev", "dit", "pixart", "ddpm"])
def test_config_scheduler_and_weights_stay(saved: dict[str, Path], family: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(saved[family])
    for network in networks(pipeline).values():
        network.train()
    before, classes = kept(pipeline), {name: type(part) for name, part in networks(pipeline).items()}
    model = load_model(pipeline)
    assert model.pipeline is pipeline
    assert_same(before, kept(pipeline))
    for name, network in networks(pipeline).items():
        assert type(network) is classes[name]
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    if family != "dev":
        # Nor does drawing change any of it.
        model.set_sampler_options("trailing")
        model.sample_tensors(["1"], [0], model.schedule(1), 2.0)
        assert_same(before, kept(pipeline))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "dev", "dit", "pixart", "ddpm"])
def test_what_is_refused_is_not_changed_at_all(saved: dict[str, Path], family: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(saved[family])
    for network in networks(pipeline).values():
        network.train()
    pipeline.scheduler = EDMEulerScheduler()
    before, others = kept(pipeline), changeable(pipeline)
    with pytest.raises(DraftuneError, match="EDMEulerScheduler"):
        load_model(pipeline)
    assert_same(before, kept(pipeline))
    assert changeable(pipeline) == others


@pytest.mark.parametrize("family", ["sd", "dit", "ddpm"])
def test_a_lora_changes_neither_classes_nor_weights(saved: dict[str, Path], family: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(saved[family])
    model = load_model(pipeline)
    denoiser, weights = type(model.denoiser), [(p, p.detach().clone()) for p in model.denoiser.parameters()]
    add_lora(model, 2)
    assert type(model.denoiser) is denoiser
    present = {id(parameter): parameter for parameter in model.denoiser.parameters()}
    for parameter, value in weights:
        assert torch.equal(present[id(parameter)], value)
        assert not parameter.requires_grad


def test_a_copy_leaves_the_pipeline_unchanged(saved: dict[str, Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(saved["sd"])
    before, others = kept(pipeline), changeable(pipeline)
    model = load_model(copy.deepcopy(pipeline))
    add_lora(model, 2)
    model.sample_tensors(["1"], [0], model.schedule(1), 2.0)
    assert_same(before, kept(pipeline))
    assert changeable(pipeline) == others
