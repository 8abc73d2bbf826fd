"""FlowBP-Sparse and FlowBP-Bridge against the authors' steps, written out with plain autograd in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_gradients import GRIDS, NOISE, Network, batch_of, clean_and_noise, gradient_of_method, relative, reward
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods import BackpropMethod, FlowBPBridge, FlowBPSparse
from draftune.methods.flowbp import FlowBP, choose, output_weights
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.sampling.step_range import StepRange
from helpers.errors import raises

LEVELS = [1.0, 0.85, 0.6, 0.35, 0.1, 0.0]


def flow_schedule(levels: list[float]) -> Schedule:
    """A flow model's steps between these noise levels, which end with 0."""
    return Schedule(tuple(Step(200 * i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(levels))), "flow")


FLOW = flow_schedule(LEVELS)
T = len(FLOW)


class Fixed:
    """Replaces the random choice of a method: which steps are active, with their discounts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, active: dict[int, float]) -> None:
        for kind in (FlowBPSparse, FlowBPBridge):
            self.monkeypatch.setattr(kind, "active_steps", lambda *_: active)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Fixed:
    return Fixed(monkeypatch)


def cached_rollout(network: Network) -> tuple[list[Tensor], list[Tensor]]:
    """The Euler sampler without gradient: every latent, and every velocity."""
    latents, velocities = [NOISE], []
    with torch.no_grad():
        for step in FLOW.steps:
            velocities.append(network(latents[-1], step.timestep))
            latents.append(latents[-1] + (step.sigma_next - step.sigma) * velocities[-1])
    return latents, velocities


def scaled(velocity: Tensor, factor: float) -> Tensor:
    return velocity.detach() + factor * (velocity - velocity.detach())


def factor_of(active: list[int], grad_rescale: float) -> float:
    weights = [abs(s - n) for s, n in pairwise(LEVELS)]
    return 1 + grad_rescale * (sum(weights) / sum(weights[i] for i in active) - 1)


def gradient(network: Network) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("grad_rescale", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("active", [[0], [4], [1, 3], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_sparse_equals_the_authors_formula(
    active: list[int], grad_rescale: float, network: Network, fixed: Fixed
) -> None:
    """x_0 = x_T + sum of (sigma_s - sigma_t) v_i, where the active v_i are called again on cached latents."""
    fixed(dict.fromkeys(active, 0.0))
    ours = gradient_of_method(FlowBPSparse(len(active), 2.0, grad_rescale), FLOW, network)
    latents, velocities = cached_rollout(network)
    network.zero_grad()
    x = NOISE
    for i, step in enumerate(FLOW.steps):
        again = scaled(network(latents[i], step.timestep), factor_of(active, grad_rescale))
        x = x + (step.sigma_next - step.sigma) * (again if i in active else velocities[i])
    reward(x + (latents[T] - x).detach()).mean().backward()
    assert relative(ours, gradient(network)) < 1e-12


@pytest.mark.parametrize("grad_rescale", [0.0, 0.7])
@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("before", "j", "after"), [([0], 1, []), ([2], 3, [4]), ([0, 1], 2, [3]), ([1], 4, [])])
def test_bridge_equals_the_authors_formula(
    before: list[int],
    j: int,
    after: list[int],
    discount: float,
    grad_rescale: float,
    network: Network,
    fixed: Fixed,
) -> None:
    """x_j by the velocities before it, x_0 by those after it, and the network at j sees discount * x_j + the rest."""
    active = [*before, j, *after]
    fixed({**dict.fromkeys([*before, *after], 0.0), j: discount})
    ours = gradient_of_method(FlowBPBridge(len(active), 2.0, grad_rescale, discount), FLOW, network)
    latents, velocities = cached_rollout(network)
    factor = factor_of(active, grad_rescale)
    network.zero_grad()
    x = NOISE
    for i, step in enumerate(FLOW.steps):
        if i == j:
            x = x + (latents[j] - x).detach()
        seen = discount * x + (1 - discount) * x.detach() if i == j else latents[i]
        velocity = scaled(network(seen, step.timestep), factor) if i in active else velocities[i]
        x = x + (step.sigma_next - step.sigma) * velocity
    reward(x + (latents[T] - x).detach()).mean().backward()
    assert relative(ours, gradient(network)) < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("discount", [0.0, 0.3])
def test_diffusion_models_follow_the_linear_path(grid: str, discount: float, network: Network, fixed: Fixed) -> None:
    schedule, factor = GRIDS[grid], 1.0
    fixed({1: 0.0, 2: discount, 4: 0.0})
    ours = gradient_of_method(FlowBPBridge(3, 2.0, 0.0, discount), schedule, network)
    network.zero_grad()
    x = NOISE
    for i, step in enumerate(schedule.steps):
        seen = discount * x + (1 - discount) * x.detach() if i == 2 else x.detach()
        output = network(seen, step.timestep)
        output = scaled(output, factor) if i in (1, 2, 4) else output.detach()
        clean, noise = clean_and_noise(output, x, step, schedule.prediction_type)
        x = step.alpha_next * clean + step.sigma_next * noise
    reward(x).mean().backward()
    assert relative(ours, gradient(network)) < 1e-12


def test_the_weights_are_the_closed_forms() -> None:
    """sigma_s - sigma_t for flows; alpha_0 (sigma_s / alpha_s - sigma_t / alpha_t) for noise prediction."""
    assert torch.allclose(output_weights(FLOW), torch.tensor(LEVELS, dtype=torch.float64).diff(), atol=1e-14)
    steps = GRIDS["leading"].steps
    expected = [steps[-1].alpha_next * (s.sigma_next / s.alpha_next - s.sigma / s.alpha) for s in steps]
    assert torch.allclose(output_weights(GRIDS["leading"]), torch.tensor(expected, dtype=torch.float64), rtol=1e-10)


@pytest.mark.parametrize("method", [FlowBPSparse(2), FlowBPSparse(T), FlowBPBridge(3), FlowBPBridge(T)], ids=repr)
def test_k_calls_have_a_gradient_and_the_image_is_the_samplers(method: BackpropMethod, network: Network) -> None:
    calls: list[bool] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        calls.append(torch.is_grad_enabled())
        return FLOW.to_prediction(network(x, step.timestep), x, step)

    for seed in range(5):
        calls.clear()
        (clean,) = method.samples(batch_of(denoise, FLOW, seed=seed))
        assert len(calls) == T
        assert isinstance(method, FlowBP)
        assert sum(calls) == method.k
        assert torch.allclose(clean, rollout(denoise, FLOW.steps, NOISE), atol=1e-13)


def test_late_steps_are_active_more_often() -> None:
    """One step is active with probability (i + 1)^late_bias over the sum of these."""
    generator, count = torch.Generator().manual_seed(0), 20_000
    drawn = torch.zeros(T)
    for _ in range(count):
        (i,) = FlowBPSparse(1, 1.5).active_steps(list(range(T)), generator)
        drawn[i] += 1
    expected = torch.arange(1.0, T + 1) ** 1.5
    expected /= expected.sum()
    assert ((drawn / count - expected).abs() < 3 * (expected / count).sqrt()).all()
    ranged = {i for _ in range(200) for i in FlowBPSparse(2).active_steps([1, 2, 3], generator)}
    assert ranged == {1, 2, 3}


@pytest.mark.parametrize("k", [2, 3, 4, 7, 10])
def test_the_bridge_splits_its_steps_as_the_authors_do(k: int) -> None:
    """At j = the later of two steps, round(k j / T) steps before it, at least one on either side, j itself after it."""
    generator, steps, count = torch.Generator().manual_seed(0), 10, 4000
    later = torch.zeros(steps)
    for _ in range(count):
        active = FlowBPBridge(k, discount=0.5).active_steps(list(range(steps)), generator)
        (j,) = (i for i, discount in active.items() if discount)
        before = sum(i < j for i in active)
        wanted = min(max(round(k * j / steps), 1), j)
        wanted = k - 1 if k - wanted < 1 else wanted
        wanted = k - (steps - j) if k - wanted > steps - j else wanted
        assert (len(active), before) == (k, wanted)
        later[j] += 1
    expected = torch.arange(0.0, steps) / (steps * (steps - 1) / 2)
    assert ((later / count - expected).abs() <= 3.5 * (expected / count).sqrt()).all()


def test_choose_takes_all_without_a_random_number() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert choose(torch.ones(3), 3, generator) == [0, 1, 2]
    assert choose(torch.ones(0), 0, generator) == []
    assert torch.equal(generator.get_state(), state)


def test_settings_that_do_not_fit_are_refused() -> None:
    marked = StepRange.parse("0.0-0.4").mark(FLOW)
    for method in (FlowBPSparse(3), FlowBPBridge(3)):
        method.check(FLOW)
        with raises(DraftuneError, "k=3 2 5 lora_steps"):
            method.check(marked)
    with raises(DraftuneError, "k=6 num_inference_steps"):
        FlowBPSparse(6).check(FLOW)
    for make, words in (
        (lambda: FlowBPSparse(0), "k 1 0"),
        (lambda: FlowBPBridge(1), "k 2 1"),
        (lambda: FlowBPSparse(late_bias=-1), "late_bias -1"),
        (lambda: FlowBPSparse(grad_rescale=float("nan")), "grad_rescale nan"),
        (lambda: FlowBPBridge(discount=1.5), "discount 1.5"),
    ):
        with raises(DraftuneError, words):
            make()


@pytest.fixture
def network() -> Network:
    return Network()
