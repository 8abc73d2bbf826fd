"""The black box in latent space: the gradient by clean latents, past the decoder, wherever latents are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

import draftune
from draftune.errors import DraftuneError
from draftune.evaluation.reward_check import check_reward
from draftune.experimental.black_box import ZerothOrder
from draftune.guidance.noise_optimization import optimize_noise
from draftune.guidance.sample import sample_guided
from draftune.models import load_model
from draftune.rewards import load_reward
from draftune.rewards.latent import score_latents
from draftune.rewards.online import carried, extra_queries
from helpers.errors import raises

PROMPTS = ["a cat", "a dog"]
LATENTS = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
"""Of five channels, which no picture has."""


def decode(latents: Tensor) -> Tensor:
    return torch.sigmoid(interpolate(latents[:, :3] + latents[:, 2:], scale_factor=2.0, mode="bilinear"))


def hidden(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """It has a gradient, but lets nobody see it."""
    return seen(images.detach(), prompts)


def seen(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (torch.linspace(-1, 1, images[0].numel()).reshape(images[0].shape) * images.square()).sum((1, 2, 3))


def gradient(reward: draftune.Reward, show: Any = decode) -> Tensor:
    given = LATENTS.clone().requires_grad_()
    total, _, pictures = score_latents(reward, given, show, PROMPTS)
    assert not pictures.requires_grad
    (found,) = torch.autograd.grad(total.sum(), given)
    return found


def test_asked_about_every_number_of_the_latents_it_has_the_gradient_without_one_through_the_decoder() -> None:
    graphs = []

    def watched(latents: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return decode(latents)

    exact = gradient(load_reward(seen))
    black = ZerothOrder(
        load_reward(hidden), coordinates=80, basis="grid", size=4, perturbation_std=0.01, space="latent"
    )
    assert torch.allclose(gradient(black, watched), exact, atol=5e-3)
    assert len(graphs) == 1 + 2 * 160
    assert not any(graphs)
    assert extra_queries(black) == 2 * 160
    assert torch.equal(black(decode(LATENTS), PROMPTS), load_reward(seen)(decode(LATENTS), PROMPTS))


def test_in_a_sum_each_part_has_its_own_way_to_the_latents() -> None:
    black = ZerothOrder(
        load_reward(hidden), coordinates=80, basis="grid", size=4, perturbation_std=0.01, space="latent"
    )
    both = 0.5 * black + 3 * load_reward("sharpness")
    expected = 0.5 * gradient(load_reward(seen)) + 3 * gradient(load_reward("sharpness"))
    assert torch.allclose(gradient(both), expected, atol=5e-3)
    total, parts, pictures = score_latents(both, LATENTS, decode, PROMPTS)
    assert torch.allclose(total, 0.5 * parts["zeroth_order(hidden)"] + 3 * parts["sharpness"])
    assert torch.equal(pictures, decode(LATENTS))
    assert extra_queries(black) == 2 * 160  # nobody asked for a gradient the second time


@pytest.mark.parametrize(("central", "queries"), [(True, 2 * 2 * 7), (False, 2 * (7 + 1))])
def test_every_decoded_picture_is_counted(central: bool, queries: int) -> None:
    scored = []

    def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scored.extend(images.detach())
        return seen(images.detach(), prompts) + 100 * torch.rand(len(images))

    black = ZerothOrder(load_reward(counted), directions=7, size=2, central=central, space="latent")
    # Each is scored with the same random numbers: the gradient is not one of noise.
    assert gradient(black).norm() < 100 * gradient(load_reward(seen)).norm()
    assert extra_queries(black) == queries
    assert len(scored) == queries + 2


def test_pictures_alone_are_refused_and_what_is_asked_is_checked() -> None:
    black = ZerothOrder(load_reward(hidden), coordinates=4, size=2, space="latent")
    given = decode(LATENTS).requires_grad_()
    assert not black(given, PROMPTS).requires_grad
    assert "gradient_norm" not in check_reward(black, given, PROMPTS)["zeroth_order(hidden)"]
    with raises(DraftuneError, "sharpness_aware zeroth_order(brightness) gradient"):
        load_reward("sharpness_aware(zeroth_order(brightness, space=latent))")
    with raises(DraftuneError, "space 'latents' 'latent'"):
        load_reward("zeroth_order(brightness, space=latents)")
    with raises(DraftuneError, "size zeroth_order 4 5"):
        gradient(load_reward("zeroth_order(brightness, size=5, space=latent)"))


def train(model: Path, output: Path, reward: Any, **values: Any) -> draftune.training.Run:
    settings = {
        "steps": 2,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "log_images_steps": 0,
        "num_log_prompts": 1,
    }
    settings |= {"batch_size": 2, "learning_rate": 0.02, "prompts": PROMPTS}
    return draftune.train(str(model), reward, output=str(output), **(settings | values))


def test_training_on_it_is_training_on_the_gradient(pipeline_folder: Path, tmp_path: Path) -> None:
    black = ZerothOrder(
        load_reward(hidden), coordinates=256, basis="grid", size=8, perturbation_std=0.02, space="latent"
    )
    runs = [
        train(pipeline_folder, tmp_path / str(i), reward, method="draft_k(k=1)", batch_size=1, steps=1)
        for i, reward in enumerate((black, seen))
    ]
    found, exact = ([row["grad_norm"] for row in run.metrics] for run in runs)
    assert found == pytest.approx(exact, rel=0.01)
    assert [run.metrics[0]["reward"] for run in runs] == pytest.approx([runs[1].metrics[0]["reward"]] * 2)
    assert [run.metrics[0]["reward_queries"] for run in runs] == [513, 1]


def test_a_run_goes_on_bit_for_bit(pipeline_folder: Path, tmp_path: Path) -> None:
    loras, learned = [], []
    for name, cuts in (("whole", (3,)), ("cut", (2, 3))):
        for steps in cuts:
            reward = load_reward("0.5*zeroth_order(sharpness, coordinates=3, directions=2, space=latent) + brightness")
            assert not carried(reward)["reward/rewards.0/levels"].numel()
            train(pipeline_folder, tmp_path / name, reward, steps=steps, method="draft_lv(n=1)")
        loras.append(load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors"))
        learned.append(carried(reward)["reward/rewards.0/levels"])
    assert all(torch.equal(value, loras[1][name]) for name, value in loras[0].items())
    assert torch.equal(*learned)
    assert (learned[0] > 0).sum() > 3


def test_the_noise_of_one_picture_and_guidance_follow_it(pipeline_folder: Path) -> None:
    model, expression = load_model(pipeline_folder), "zeroth_order(brightness, coordinates=16, size=2, space=latent)"
    found = optimize_noise(model, expression, "a cat", num_inference_steps=2, guidance_scale=1.0, steps=3)
    assert found.rewards[-1] > found.rewards[0]
    assert found.queries == 4 + 3 * 32
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}
    guided = sample_guided(model, expression, PROMPTS, "pgdiff_dynamic(strength=0.3, eta=0)", **options)
    plain = sample_guided(model, "brightness", PROMPTS, "pgdiff_dynamic(strength=0, eta=0)", **options)
    assert (guided.rewards[-1] > plain.rewards[-1]).all()
    assert guided.queries == plain.queries + 4 * 2 * 32
