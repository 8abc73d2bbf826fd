"""Thresholds with annealed gradients: their limits, ascents whose ends are known, and training on one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import draftune
from draftune.errors import DraftuneError
from draftune.experimental.threshold import AnnealedReward, smooth_round, smooth_step, smooth_where
from draftune.rewards import Reward, load_reward
from draftune.rewards.base import begin_step

X = torch.linspace(-2, 2, 81, dtype=torch.float64)
SEEDS, UPDATES = 5, 5000
OPTIMUM = 0.3722
"""Of E[−θ²/2 + 1{z ≥ 0}], z ~ N(θ, 1): where θ = φ(θ)."""


def test_the_limits_are_the_branches_and_their_mean() -> None:
    yes, no = X.square(), 3 * X
    hard = torch.where(X >= 0, yes, no)
    assert torch.equal(smooth_where(X, yes, no, 0), hard)
    assert smooth_step(torch.tensor([-1e-9, 0.0]), 0).tolist() == [0, 1]
    off = X != 0
    assert torch.allclose(smooth_where(X, yes, no, 1e-4)[off], hard[off], atol=1e-9)
    assert torch.allclose(smooth_where(X, yes, no, math.inf), (yes + no) / 2)
    weight = 1 / (1 + torch.exp(-X / 0.5))
    assert torch.allclose(smooth_where(X, yes, no, 0.5), weight * yes + (1 - weight) * no)
    assert float(smooth_step(X[60], 0.5)) == pytest.approx(1 / (1 + math.exp(-2)))
    assert torch.equal(smooth_where(X, 1.0, 0.0, 0), (X >= 0).double())


def test_guards_inside_guards_are_smoothed_too() -> None:
    a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    value = smooth_where(smooth_where(a, 1.0, -1.0, 0.7) + b, 2.0, 0.5, 0.7)
    inner = 2 * torch.sigmoid(a / 0.7) - 1
    expected = 0.5 + 1.5 * torch.sigmoid((inner + b) / 0.7)
    assert torch.allclose(value, expected)
    assert torch.allclose(
        torch.stack(torch.autograd.grad(value, (a, b))), torch.stack(torch.autograd.grad(expected, (a, b)))
    )


def test_rounding() -> None:
    assert smooth_round(torch.tensor([-1.5, -0.51, -0.5, 0.49, 0.5, 2.6]), 0).tolist() == [-1, -1, 0, 0, 1, 3]
    thresholds = torch.arange(-200, 200, dtype=torch.float64) + 0.5
    for width in (0.01, 0.1, 0.4, 0.99):
        expected = torch.sigmoid((X[:, None] - thresholds) / width).sum(1) - 200
        assert torch.allclose(smooth_round(X, width), expected, atol=1e-6)
        points = (X[::7] + 0.01).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, width=width: smooth_round(x, width), points, atol=1e-5)
    assert torch.equal(smooth_round(X, 5), X)


def ascended(widths: Tensor, power: float) -> Tensor:
    """Where the ascent of E[−θ²/2 + 1{z ≥ 0}], z ~ N(θ, 1), ends from θ = 1 with the rate 1 / (k + 10), [N, seeds].

    Each guard is divided by its width, so that one loop serves them all.
    """
    noise = torch.randn(UPDATES, SEEDS, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.ones(len(widths), SEEDS, dtype=torch.float64)
    for k, z in enumerate(noise, 1):
        at = theta.requires_grad_()
        value = -at.square() / 2 + smooth_step((at[..., None] + z) / widths[:, None, None], k**-power).mean(-1)
        (gradient,) = torch.autograd.grad(value.sum(), at)
        theta = theta.detach() + gradient / (k + 10)
    return theta.detach()


def test_a_fixed_width_ends_beside_the_optimum() -> None:
    """The reparameterised gradient without smoothing goes to 0: it does not see the threshold."""
    ends = ascended(torch.tensor([1e-30, 1.0, 0.5, 0.2, 0.1, 0.05], dtype=torch.float64), 0).mean(1)
    # Of 1 the k-th update leaves the share 1 - 1 / (k + 10).
    assert float(ends[0]) == pytest.approx(10 / (UPDATES + 10), rel=1e-9)
    for end, expected in zip(ends.tolist()[1:], [0.207, 0.295, 0.355, 0.3677, 0.3711], strict=True):
        assert end == pytest.approx(expected, abs=0.003)


def test_a_width_that_falls_ends_at_the_optimum_unless_it_falls_too_fast() -> None:
    one = torch.ones(1, dtype=torch.float64)
    falling, too_fast = ascended(one, 0.5)[0], ascended(one, 1.01)[0]
    assert float(falling.mean()) == pytest.approx(0.3746, abs=0.004)
    assert falling.tolist() == pytest.approx([0.3722] * SEEDS, abs=0.01)
    assert [float(too_fast.min()), float(too_fast.max())] == pytest.approx([0.305, 0.42], abs=0.01)


def variance_of_the_gradient(width: float) -> float:
    """Of a smoothed threshold, by θ at the optimum."""
    z = OPTIMUM + torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z.requires_grad_()
    (gradients,) = torch.autograd.grad(smooth_step(z, width).sum(), z)
    return float(gradients.var())


@pytest.mark.parametrize(("width", "expected"), [(0.2, 0.179), (0.1, 0.483)])
def test_variance_of_the_smoothed_gradient(width: float, expected: float) -> None:
    """φ(θ) / (6 width) − φ(θ)² at the optimum, to the order of the width squared."""
    phi = math.exp(-(OPTIMUM**2) / 2) / math.sqrt(2 * math.pi)
    assert phi / (6 * width) - phi**2 == pytest.approx(expected, abs=0.01)
    assert variance_of_the_gradient(width) == pytest.approx(expected, rel=0.05)


def test_from_which_width_on_the_score_function_estimate_is_quieter() -> None:
    """In one dimension: 1{z ≥ 0} · (z − θ) has a variance of .368, smoothed gradients a larger one from .12 down."""
    phi = math.exp(-(OPTIMUM**2) / 2) / math.sqrt(2 * math.pi)
    assert phi == pytest.approx(OPTIMUM, abs=1e-4)
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = smooth_step(OPTIMUM + noise, 0) * noise
    assert float(score.mean()) == pytest.approx(phi, abs=0.005)
    assert float(score.var()) == pytest.approx(0.368, rel=0.01)
    wider, narrower = (variance_of_the_gradient(width) for width in (0.13, 0.12))
    assert wider < float(score.var()) < narrower


class Bright(AnnealedReward):
    """How many of the three channels are brighter than a level."""

    label = "bright"

    def score_at(self, images: Tensor, prompts: Sequence[str], temperature: float) -> Tensor:
        return smooth_step((images.mean((2, 3)) - 0.5) / 0.1, temperature).sum(1)


def brightness_images() -> Tensor:
    return torch.tensor([0.2, 0.5, 0.6])[:, None, None, None].expand(3, 3, 4, 4).clone().requires_grad_()


def test_a_threshold_scores_exactly_and_has_the_gradient_of_a_sigmoid() -> None:
    images = brightness_images()
    reward = load_reward("threshold(brightness, at=0.5, temperature=0.2)")
    score = load_reward("brightness")(images, ["a"] * 3).detach()
    for step, temperature in ((None, 0.2), (1, 0.2), (4, 0.1), (16, 0.05)):
        if step is not None:
            begin_step(2 * reward, step)
        total = reward(images, ["a"] * 3)
        assert total.tolist() == [0, 1, 1]
        (gradient,) = torch.autograd.grad(total.sum(), images)
        sigmoid = torch.sigmoid((score - 0.5) / temperature)
        slope = sigmoid * (1 - sigmoid) / temperature
        assert torch.allclose(gradient.sum((1, 2, 3)), slope, rtol=1e-4)
    with torch.no_grad():
        assert reward(images, ["a"] * 3).tolist() == [0, 1, 1]


def test_decay_is_the_power_by_which_the_temperature_falls() -> None:
    for decay, expected in ((0.0, 0.8), (0.5, 0.4), (1.0, 0.2)):
        reward = Bright(0.8, decay)
        reward.on_step(4)
        assert reward.current_temperature() == pytest.approx(expected)


def test_the_threshold_of_a_threshold_sees_smoothed_scores_in_its_gradient_only() -> None:
    images = brightness_images()
    inner = "threshold(brightness, at=0.55, temperature=0.1)"
    reward = load_reward(f"threshold({inner} + 0.5*{inner}, at=1, temperature=0.3)")
    total = reward(images, ["a"] * 3)
    assert total.tolist() == [0, 0, 1]
    (gradient,) = torch.autograd.grad(total.sum(), images)
    score = load_reward("brightness")(images, ["a"] * 3)
    smooth = torch.sigmoid((1.5 * torch.sigmoid((score - 0.55) / 0.1) - 1) / 0.3)
    (expected,) = torch.autograd.grad(smooth.sum(), images)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("threshold(brightness)", "threshold.*at"),
        ("threshold(brightness, at=0.5, temperature=-1)", "temperature.*threshold.*-1"),
        ("threshold(brightness, at=0.5, decay=-1)", "decay.*threshold.*-1"),
    ],
)
def test_what_is_refused(expression: str, message: str) -> None:
    with pytest.raises(DraftuneError, match=message):
        load_reward(expression)


def train(model: Path, output: Path, reward: Reward, **values: Any) -> draftune.training.Run:
    settings = {
        "steps": 3,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "log_images_steps": 0,
        "num_log_prompts": 1,
    }
    settings |= {"batch_size": 2, "learning_rate": 0.01, "prompts": ["a cat", "a dog"]}
    return draftune.train(str(model), load_reward(reward), output=str(output), **(settings | values))


class Recorded(Bright):
    """Records the temperatures of all scores with a gradient."""

    def __init__(self, temperature: float, decay: float) -> None:
        super().__init__(temperature, decay)
        self.seen: list[float] = []

    def score_at(self, images: Tensor, prompts: Sequence[str], temperature: float) -> Tensor:
        if temperature:
            self.seen.append(temperature)
        return super().score_at(images, prompts, temperature)


def test_training_takes_the_smooth_gradient_lowers_the_temperature_and_logs_the_exact_reward(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DraftuneError, match=r"'bright' .*gradient"):
        train(pipeline_folder, tmp_path / "hard", Bright(0, 0.5))
    reward = Recorded(2, 0.5)
    run = train(pipeline_folder, tmp_path / "run", reward, method="draft_lv(n=1)", checkpointing_steps=1)
    assert all(row["grad_norm"] > 0 for row in run.metrics)
    # Counts of channels: of two images, halves are whole.
    assert all((2 * row["reward"]).is_integer() for row in run.metrics)
    # The sample and its noised copy, once each.
    assert [row["reward_queries"] for row in run.metrics] == [4, 8, 12]
    assert sorted(set(reward.seen), reverse=True) == pytest.approx([2, 2 / 2**0.5, 2 / 3**0.5])
    # A resumed run goes on with the temperature of its next update.
    again = Recorded(2, 0.5)
    train(pipeline_folder, tmp_path / "run", again, method="draft_lv(n=1)", checkpointing_steps=1, steps=5)
    assert sorted(set(again.seen[2:]), reverse=True) == pytest.approx([2 / 4**0.5, 2 / 5**0.5])


def test_a_method_without_a_gradient_takes_the_exact_reward(pipeline_folder: Path, tmp_path: Path) -> None:
    reward = Recorded(2, 0.5)
    train(pipeline_folder, tmp_path / "run", reward, method="ddpo", steps=1)
    assert not reward.seen
