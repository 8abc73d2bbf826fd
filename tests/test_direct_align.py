"""Direct-Align against the authors' steps, written out with plain autograd in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_gradients import GRIDS, NOISE, Network, batch_of, clean_and_noise, gradient_of_method, relative, reward
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods import DirectAlign
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.sampling.step_range import StepRange
from helpers.draws import injected
from helpers.errors import raises

LEVELS = [1.0, 0.85, 0.6, 0.35, 0.1, 0.0]
FLOW = Schedule(tuple(Step(200 * i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(LEVELS))), "flow")


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.mark.parametrize("inversion", [False, True])
@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_flow_models_follow_the_authors_code(drawn: int, inversion: bool, network: Network) -> None:
    """Noise x_0, take an Euler step by d sigma, subtract sigma_s times the noise, divide by 1 - sigma_s."""
    with injected(randint=[drawn]) as ranges:
        ours = gradient_of_method(DirectAlign(0.4, 1.0, inversion), FLOW, network)
    assert ranges == [(0, 3)]
    i = drawn + 2
    with torch.no_grad():
        image = NOISE
        for step in FLOW.steps:
            image = image + (step.sigma_next - step.sigma) * network(image, step.timestep)
    network.zero_grad()
    sigma = LEVELS[i]
    noisy = sigma * NOISE + (1.0 - sigma) * image
    for target, sign in ((LEVELS[i + 1], 1), (LEVELS[i - 1], -1))[: 1 + inversion]:
        moved = noisy + (target - sigma) * network(noisy, FLOW.steps[i].timestep)
        (sign * reward((moved - target * NOISE) / (1 - target)).mean()).backward()
    assert relative(ours, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])) < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
def test_diffusion_models_take_a_ddim_step(grid: str, network: Network) -> None:
    schedule = GRIDS[grid]
    with injected(randint=[1]):
        ours = gradient_of_method(DirectAlign(0.2, 0.8), schedule, network)
    kind, steps = schedule.prediction_type, schedule.steps
    with torch.no_grad():
        image = NOISE
        for step in steps:
            clean, noise = clean_and_noise(network(image, step.timestep), image, step, kind)
            image = step.alpha_next * clean + step.sigma_next * noise
    network.zero_grad()
    step, above = steps[2], steps[1]
    x = step.alpha * image + step.sigma * NOISE
    for alpha, sigma, sign in ((step.alpha_next, step.sigma_next, 1), (above.alpha, above.sigma, -1)):
        clean, noise = clean_and_noise(network(x, step.timestep), x, step, kind)
        (sign * reward((alpha * clean + sigma * noise - sigma * NOISE) / alpha).mean()).backward()
    assert relative(ours, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])) < 1e-12


@pytest.mark.parametrize("i", range(5))
def test_a_perfect_velocity_gives_the_image_back_at_any_noise(i: int) -> None:
    """Where the model predicts the noise that was added, both branches score the sampled image exactly."""
    image = 0.3 * NOISE.flip(0)
    seen: list[Tensor] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        return Prediction(image + 0 * x, NOISE + 0 * x)

    def scored(clean: Tensor) -> Tensor:
        seen.append(clean)
        return clean.mean((1, 2, 3))

    with injected(randint=[0]):
        method, schedule = DirectAlign(i / 5, (i + 1) / 5, inversion=i >= 2), replace(FLOW, initial_scale=0.9)
        losses = list(method.losses([batch_of(denoise, schedule, noise=0.9 * NOISE, reward=scored)]))
    assert len(losses) == len(seen) == 1 + (i >= 2)
    assert all(torch.allclose(clean, image, atol=1e-13) for clean in seen)


def test_two_calls_have_a_gradient_one_at_a_time(network: Network) -> None:
    calls: list[bool] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        calls.append(torch.is_grad_enabled())
        return FLOW.to_prediction(network(x, step.timestep), x, step)

    losses = DirectAlign(0.4, 1.0).losses([batch_of(denoise, FLOW)])
    next(losses)
    assert calls == [False] * 5 + [True]
    next(losses)
    assert calls == [False] * 5 + [True] * 2


def test_the_range_is_a_share_of_the_steps() -> None:
    fifty = Schedule(tuple(Step(i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(levels(50)))), "flow")
    assert DirectAlign().steps_with_gradient(fifty) == list(range(5, 25))
    assert DirectAlign(0, 1).steps_with_gradient(fifty) == list(range(2, 50))  # above step 1 is pure noise
    assert DirectAlign(0, 1, inversion=False).steps_with_gradient(fifty) == list(range(50))
    assert DirectAlign(0, 0.2).steps_with_gradient(GRIDS["leading"]) == []  # no level above step 0
    assert DirectAlign(0, 0.4).steps_with_gradient(GRIDS["leading"]) == [1]


def levels(count: int) -> list[float]:
    return [1 - i / count for i in range(count + 1)]


def test_settings_that_do_not_fit_are_refused() -> None:
    with raises(DraftuneError, "direct_align 5 num_inference_steps first=0.1 last=0.15"):
        DirectAlign(0.1, 0.15).check(FLOW)
    with raises(DraftuneError, "direct_align lora_steps"):
        DirectAlign(0.0, 0.5).check(StepRange.parse("0.6-1.0").mark(FLOW))
    with raises(DraftuneError, "first last 0.5 0.4"):
        DirectAlign(0.5, 0.4)
    with raises(DraftuneError, "last 1.5"):
        DirectAlign(0.5, 1.5)
