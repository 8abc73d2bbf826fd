"""Caches and precision of the prefix: against diffusers, with calls counted, and without effect on the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import test_dit
import test_flow
import test_lumina2
import test_pixart
import test_qwen_image
import torch
from diffusers.hooks import HookRegistry, TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models import DiffusionModel, load_model
from draftune.sampling.call_cache import FIRST_BLOCK_NETWORKS, FirstBlockCache, TaylorSeer, load_call_cache
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Schedule, Step, ddim_schedule, flow_schedule
from draftune.training.trainer import Trainer
from helpers.errors import raises
from helpers.pipelines import SD14_SCHEDULER

PROMPTS = ["a cat", "a dog"]
STEPS = 9


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        "dev": test_flow.save_flux(root / "dev", guidance_embeds=True),
        "dit": test_dit.build(root / "dit"),
        "pixart": test_pixart.build(root / "pixart"),
        "qwen_image": test_qwen_image.save_qwen_image(root / "qwen_image"),
    }


def prefix(model: DiffusionModel, cache: Any) -> tuple[Tensor, list[str]]:
    """The latent after all steps but the last, and the names of the blocks that were computed."""
    model.set_size(model.size_multiple, model.size_multiple)
    schedule = model.schedule(STEPS)
    prompts = ["0", "1"] if type(model).__name__ == "DiT" else PROMPTS
    denoise = model.denoiser_for(prompts, schedule, 3.0)
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    called: list[str] = []
    hooks = [
        list(block.modules())[1].register_forward_hook(lambda *_, name=name: called.append(name))
        for name, block in model.denoiser.named_modules()
        if name.count(".") == 1 and name.split(".")[0].endswith("transformer_blocks")
    ]
    with torch.no_grad(), cache.applied(model.denoiser, denoise, schedule) as approximate:
        latent = rollout(approximate, schedule.steps[:-1], noise)
    for hook in hooks:
        hook.remove()
    return latent, called


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["dev", "qwen_image", "pixart", "dit"])
def test_the_first_block_cache_skips_blocks_and_leaves_no_trace(saved: dict[str, Path], family: str) -> None:
    model = load_model(saved[family])
    exact, all_calls = prefix(model, TaylorSeer(interval=1))
    forwards = {name: module.forward for name, module in model.denoiser.named_modules()}
    same, calls = prefix(model, FirstBlockCache(threshold=0.0))
    assert torch.equal(same, exact)
    assert calls == all_calls
    for _ in range(2):  # the second prefix starts with an empty cache: it equals the first
        near, fewer = prefix(model, FirstBlockCache(threshold=1.0))
        assert 0 < distance(near, exact) < 0.2
        assert len(fewer) < len(calls)
        # The first block of every step, and all blocks of the first step.
        assert fewer.count(calls[0]) == STEPS - 1
        assert set(calls) == set(fewer)
    assert torch.equal(near, prefix(model, FirstBlockCache(threshold=1.0))[0])
    assert all(module.forward == forwards[name] for name, module in model.denoiser.named_modules())
    assert type(model.denoiser).__name__ in FIRST_BLOCK_NETWORKS


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylorseer_is_that_of_diffusers(saved: dict[str, Path], order: int) -> None:
    """diffusers predicts the output of the last layer, which is that of the network, a linear map of it."""
    model = load_model(saved["dev"])
    latent, calls = prefix(model, TaylorSeer(interval=3, first=2, order=order))
    config = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    apply_taylorseer_cache(model.denoiser, config)
    HookRegistry.check_if_exists_or_initialize(model.denoiser).invalidate_child_registries_cache()
    with CacheMixin.cache_context(model.denoiser, "prefix"):
        theirs, _ = prefix(model, TaylorSeer(interval=1))
    assert distance(latent, theirs) < 1e-5
    exact, all_calls = prefix(load_model(saved["dev"]), TaylorSeer(interval=1))
    assert distance(latent, exact) > 1e-4
    # Of the steps 0 to 7, TaylorSeer computes 0, 1, 3 and 6.
    assert len(calls) * 8 == len(all_calls) * 4


CLEAN = SD14_SCHEDULER | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
FLOW = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_taylorseer_is_exact_for_a_linear_output(kind: str) -> None:
    """An output that is a line of the step's index is predicted to rounding, whatever the network predicts."""
    if kind == "flow":
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = dict(FlowMatchEulerDiscreteScheduler(**FLOW).config)
        schedule = flow_schedule(config, STEPS, None, None)
    else:
        schedule = ddim_schedule(CLEAN | {"prediction_type": kind}, STEPS)
    slope = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    calls: list[int] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        calls.append(schedule.steps.index(step))
        return schedule.to_prediction(slope * (calls[-1] - 3.0), x, step)

    def run(cache: TaylorSeer) -> Tensor:
        noise = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with cache.applied(nn.Identity(), denoise, schedule) as approximate:
            return rollout(approximate, schedule.steps[:-1], noise)

    exact = run(TaylorSeer(interval=1))
    calls.clear()
    assert distance(run(TaylorSeer(interval=2, first=2)), exact) < 1e-12
    assert calls == [0, 1, 3, 5, 7]
    assert distance(run(TaylorSeer(interval=2, first=2, order=0)), exact) > 1e-3


def test_taylorseer_starts_anew_where_the_lora_starts_or_ends() -> None:
    schedule = ddim_schedule(CLEAN, 6)
    steps = tuple(step._replace(tuned=i < 3) for i, step in enumerate(schedule.steps))
    schedule = Schedule(steps)
    calls: list[int] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        calls.append(steps.index(step))
        return schedule.to_prediction(torch.ones_like(x) * (2.0 if step.tuned else -1.0), x, step)

    def exact(x: Tensor, step: Step) -> Prediction:
        return schedule.to_prediction(torch.ones_like(x) * (2.0 if step.tuned else -1.0), x, step)

    noise = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    with TaylorSeer(interval=4).applied(nn.Identity(), denoise, schedule) as approximate:
        assert torch.allclose(rollout(approximate, steps, noise), rollout(exact, steps, noise))
    assert calls == [0, 2, 3]


def waves(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.sin(6 * images).mean((1, 2, 3))


def trainer(folder: Path, output: Path, **values: Any) -> Trainer:
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "batch_size": 2, "method": "draft_k(k=2)"}
    settings |= {"device": "cpu", "mixed_precision": "no", "lora_rank": 2, "gradient_checkpointing": "none"}
    return Trainer(str(folder), waves, PROMPTS, output=str(output), **settings | values)


def gradients(made: Trainer) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in made.train_step.parameters.items()}


@pytest.mark.parametrize(
    ("values", "calls", "dtype"),
    [
        ({"prefix_cache": "taylorseer(interval=2)"}, 4, torch.float32),
        ({"prefix_cache": "taylorseer(interval=3)", "prefix_precision": "bf16", "prefix_stride": 2}, 2, torch.bfloat16),
    ],
)
def test_the_calls_with_gradient_are_exact(
    pipeline_folder: Path, tmp_path: Path, values: dict[str, Any], calls: int, dtype: torch.dtype
) -> None:
    """Two updates: the cheaper prefix alone differs; from its latent, the gradient is that of a run without it."""
    made, exact = trainer(pipeline_folder, tmp_path / "a", **values), trainer(pipeline_folder, tmp_path / "b")
    seen: list[tuple[bool, torch.dtype]] = []
    latents: list[Tensor] = []
    inner = made.model.denoiser.mid_block
    inner.register_forward_hook(lambda _, given, output: seen.append((torch.is_grad_enabled(), output.dtype)))
    get = exact.train_step.next_input

    for step in (1, 2):
        made.train_step.sample_inputs()
        item = made.train_step.pending[0]
        made.train_step.run(step)
        latents.append(item.prefix_cache.latents[STEPS - 2])
        other = get(exact.train_step.prompt_sampler)
        assert torch.equal(other.noise, item.noise)
        other.prefix_cache.latents[STEPS - 2] = latents[-1]
        exact.train_step.pending = [other]
        exact.train_step.run(step)
        for name, gradient in gradients(made).items():
            expected = gradients(exact)[name]
            assert gradient is not None
            assert expected is not None
            assert torch.equal(gradient, expected)
    with torch.no_grad():
        denoise = exact.model.denoiser_for(other_prompts(exact, other.prompt_indices), exact.schedule, 3.0)
        moved = distance(latents[-1], rollout(denoise, exact.schedule.steps[:-2], other.noise))
    assert 1e-6 < moved < 0.5
    assert [entry for entry in seen if not entry[0]] == [(False, dtype)] * calls * 2
    assert {entry for entry in seen if entry[0]} == {(True, torch.float32)}


def other_prompts(made: Trainer, indices: Sequence[int]) -> list[str]:
    return [made.prompts[i] for i in indices]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prefix_cache": "taylor"}, "taylor taylorseer"),
        ({"prefix_cache": "taylorseer(interval=0)"}, "interval 0"),
        ({"prefix_cache": "first_block_cache(threshold=-1)"}, "threshold -1"),
        ({"prefix_cache": "first_block_cache"}, "prefix_cache UNet2DConditionModel taylorseer"),
        ({"prefix_cache": "taylorseer", "method": "draft"}, "prefix_cache draft"),
        ({"prefix_cache": "taylorseer", "compile": True}, "prefix_cache --compile"),
        ({"prefix_precision": "bf16", "method": "draft"}, "prefix_precision draft"),
        ({"prefix_precision": "bf16", "mixed_precision": "bf16"}, "prefix_precision bf16 mixed_precision no"),
        ({"prefix_precision": "fp16"}, "prefix_precision fp16 bf16"),
    ],
)
def test_what_does_not_fit_is_refused(
    pipeline_folder: Path, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with raises(DraftuneError, words):
        trainer(pipeline_folder, tmp_path / "run", **values)


def test_guidance_that_ends_refuses_a_cache(tmp_path: Path) -> None:
    folder = test_lumina2.save_lumina(tmp_path / "lumina2")
    with raises(DraftuneError, "prefix_cache"):
        trainer(folder, tmp_path / "run", prefix_cache="taylorseer")


def test_a_sampler_with_noise_refuses_taylorseer() -> None:
    noisy = ddim_schedule(CLEAN, 3)
    noisy = Schedule(tuple(step._replace(noise_std=0.1) for step in noisy.steps))
    with raises(DraftuneError, "prefix_cache taylorseer"):
        load_call_cache("taylorseer").check(nn.Identity(), noisy)
