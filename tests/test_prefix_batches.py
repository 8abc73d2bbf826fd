"""One prefix call for several batches, and a compiled prefix: the same gradient, from other calls of the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from test_prefix_reuse import waves, weights
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models import load_model
from draftune.training import placement
from draftune.training.trainer import Trainer
from helpers.errors import raises
from helpers.few_steps import with_scheduler

PROMPTS = ["a cat", "a dog", "a bird", "a fish", "a tree"]


def trainer(
    folder: Path, output: Path, sampler: str = "", parts: Mapping[str, Any] = MappingProxyType({}), **values: Any
) -> Trainer:
    """A run of two images a batch and four batches an update, in float64."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **parts).to(torch.float64)
    model = load_model(with_scheduler(pipeline, sampler) if sampler else pipeline)
    settings = {"method": "draft_k(k=1)", "num_inference_steps": 4, "guidance_scale": 3.0, "batch_size": 2}
    settings |= {"gradient_accumulation_steps": 4, "learning_rate": 0.05, "device": "cpu", "prefix_reuse_steps": 1}
    return Trainer(model, waves, PROMPTS, output=str(output), **settings | values)


def watched(made: Trainer) -> list[tuple[bool, int, bool]]:
    """List the network's calls: whether it has a graph, its images, and whether it is compiled."""
    calls: list[tuple[bool, int, bool]] = []
    network = made.model.denoiser

    def note(module: Any, given: tuple[Tensor, ...]) -> None:
        calls.append((torch.is_grad_enabled(), len(given[0]), network._compiled_call_impl is not None))

    network.register_forward_pre_hook(torch.compiler.disable(note))
    return calls


def gradients(made: Trainer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in made.train_step.parameters.values() if p.grad is not None])


@pytest.mark.parametrize(
    "values",
    [
        {"method": "draft_lv(n=1)", "prefix_reuse_steps": 2, "prefix_stride": 2},
        {"method": "kl(draft_k(k=2))", "sampler": "lcm", "guidance_scale": 0.0, "prefix_batches": 4},
    ],
)
def test_the_gradient_is_that_of_batches_alone(pipeline_folder: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    """With fresh noise and with a shared prefix; a call of the prefix has the images of several batches."""
    together = trainer(pipeline_folder, tmp_path / "a", **{"prefix_batches": 2} | values)
    alone = trainer(pipeline_folder, tmp_path / "b", **values | {"prefix_batches": 1})
    calls, others = watched(together), watched(alone)
    for step in (1, 2):
        rows = [made.train_step.run(step) for made in (together, alone)]
        assert rows[0]["reward"] == pytest.approx(rows[1]["reward"], rel=1e-12)
        distance = (gradients(together) - gradients(alone)).norm() / gradients(alone).norm()
        assert 0 <= distance < 1e-10
    assert (weights(together) - weights(alone)).norm() < 1e-9 * weights(alone).norm()
    several = together.settings.prefix_batches
    joined, single = ([images for graph, images, _ in seen if not graph] for seen in (calls, others))
    # The KL term calls the base model without a graph, one batch at a time.
    ends = [images for images in joined if images == single[0]]
    assert len(joined) - len(ends) == (len(single) - len(ends)) / several > 0
    assert {images for images in joined if images != single[0]} == {several * single[0]}
    assert [call for call in calls if call[0]] == [call for call in others if call[0]]


def small_unet() -> UNet2DConditionModel:
    """A UNet of two blocks, since inductor builds each of its kernels with a C++ compiler."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 16}
    return UNet2DConditionModel(8, layers_per_block=1, mid_block_type=None, **blocks, **sizes)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_prefix_has_the_same_gradient(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Only calls without a graph are compiled, and the second update compiles nothing."""
    monkeypatch.setattr(placement, "COMPILE_BACKEND", backend)
    torch._dynamo.reset()
    values = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "guidance_scale": 0.0, "lora_rank": 2}
    plain, compiled = (
        trainer(pipeline_folder, tmp_path / str(on), parts={"unet": small_unet()}, prefix_compile=on, **values)
        for on in (False, True)
    )
    calls, counters, graphs = watched(compiled), torch._dynamo.utils.counters, []
    counters.clear()
    for step in (1, 2):
        for made in (plain, compiled):
            made.train_step.run(step)
        graphs.append(counters["stats"]["unique_graphs"])
        assert (gradients(compiled) - gradients(plain)).norm() < 1e-6 * gradients(plain).norm()
    assert {(graph, active) for graph, _, active in calls} == {(False, True), (True, False)}
    assert compiled.model.denoiser._compiled_call_impl is None
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prefix_batches": 3}, "prefix_batches=3 gradient_accumulation_steps 4"),
        ({"prefix_batches": 2, "method": "refl(m=2)"}, "prefix_batches=2 refl"),
        ({"prefix_batches": 2, "method": "draft"}, "draft prefix_batches 1"),
        ({"prefix_compile": True, "method": "draft"}, "draft prefix_compile false"),
        ({"prefix_compile": True, "prefix_cache": "taylorseer"}, "prefix_cache --prefix-compile"),
        ({"prefix_compile": True, "compile": True}, "prefix_compile --compile"),
        ({"prefix_compile": True, "offload": True}, "prefix_compile --offload"),
    ],
)
def test_what_does_not_fit_is_refused(
    pipeline_folder: Path, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with raises(DraftuneError, words):
        trainer(pipeline_folder, tmp_path / "run", **values)
