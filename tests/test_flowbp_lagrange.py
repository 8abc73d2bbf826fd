"""FlowBP-Lagrange against the authors' steps, written out with plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from test_flowbp import FLOW, LEVELS, cached_rollout, flow_schedule, gradient, scaled
from test_gradients import GRIDS, NOISE, Network, batch_of, gradient_of_method, relative, reward
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.methods import FlowBPLagrange, LeapAlign
from draftune.methods.flowbp_lagrange import lagrange_weights, supports
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Step
from draftune.sampling.step_range import StepRange
from helpers.errors import raises

T = len(FLOW)


@pytest.fixture
def network() -> Network:
    return Network()


def test_the_weights_integrate_polynomials_exactly() -> None:
    """Of degree below the number of points, for any interval; one point gives Euler's step."""
    points, start, end = [1.0, 0.8, 0.55], 1.0, 0.1
    weights = lagrange_weights(points, start, end)
    for power in range(3):
        integral = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        assert sum(w * p**power for w, p in zip(weights, points, strict=True)) == pytest.approx(integral, abs=1e-13)
    assert lagrange_weights([0.7], 0.7, 0.2) == pytest.approx([-0.5])


def test_the_supports_are_evenly_spaced() -> None:
    assert supports(2, 5, 4) == [2, 3, 4]
    assert supports(3, 13, 4) == [3, 6, 9, 12]
    assert supports(0, 10, 1) == [0]


@pytest.mark.parametrize("seed", range(3))
def test_order_one_is_leapalign(seed: int, network: Network) -> None:
    ours = gradient_of_method(FlowBPLagrange(order=1, discount=0.3), FLOW, network, seed)
    assert relative(ours, gradient_of_method(LeapAlign(0.3), FLOW, network, seed)) < 1e-12


@pytest.mark.parametrize(("active", "scale", "rescale"), [(1, 1.0, 0.0), (2, 0.25, 0.5), (3, 0.6, 1.0)])
@pytest.mark.parametrize("pair", [(0, 3), (1, 2), (2, 4), (0, 4)])
def test_it_equals_the_authors_formula(
    pair: tuple[int, int], active: int, scale: float, rescale: float, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both connectors: x_start + sum of w_i v_i over the supports, of which the active ones are called again."""
    method, (k, j) = FlowBPLagrange(3, active, scale, rescale, 0.3), pair
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: torch.tensor([j, k]))
    ours = gradient_of_method(method, FLOW, network)
    latents, velocities = cached_rollout(network)
    network.zero_grad()
    x = latents[k]
    for start, end in ((k, j), (j, T)):
        seen = 0.3 * x + 0.7 * x.detach() if start == j else x
        points = supports(start, end, 3)
        weights = lagrange_weights([LEVELS[i] for i in points], LEVELS[start], LEVELS[end])
        share = sum(map(abs, weights)) / sum(map(abs, weights[:active]))
        predicted = x
        for n, (i, weight) in enumerate(zip(points, weights, strict=True)):
            velocity: Tensor = velocities[i]
            if n < active:
                velocity = network(seen if i == start else latents[i], FLOW.steps[i].timestep)
                velocity = scaled(scaled(velocity, 1.0 if i == start else scale), 1 + rescale * (share - 1))
            predicted = predicted + weight * velocity
        x = predicted + (latents[end] - predicted).detach()
    reward(x).mean().backward()
    assert relative(ours, gradient(network)) < 1e-12


def test_the_image_is_the_samplers(network: Network) -> None:
    calls: list[bool] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        calls.append(torch.is_grad_enabled())
        return FLOW.to_prediction(network(x, step.timestep), x, step)

    for seed in range(5):
        calls.clear()
        (clean,) = FlowBPLagrange().samples(batch_of(denoise, FLOW, seed=seed))
        assert (len(calls), sum(calls)) == (T, 2)
        assert torch.allclose(clean, rollout(denoise, FLOW.steps, NOISE), atol=1e-13)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_evenly_spaced_levels(rescale: float, network: Network) -> None:
    """The first of two or four supports has no weight there; its gradient is 0, not infinite."""
    assert lagrange_weights([1.0, 0.5], 1.0, 0.0)[0] == pytest.approx(0)
    even = flow_schedule([1.0, 0.75, 0.5, 0.25, 0.0])
    norms = [gradient_of_method(FlowBPLagrange(grad_rescale=rescale), even, network, seed).norm() for seed in range(12)]
    assert all(norm.isfinite() for norm in norms)
    assert max(norms) < 100 * rescale + 50 * float(torch.stack(norms).median())


def test_settings_that_do_not_fit_are_refused() -> None:
    with raises(DraftuneError, "flowbp_lagrange leapalign"):
        FlowBPLagrange().check(GRIDS["leading"])
    with raises(DraftuneError, "1 5 lora_steps"):
        FlowBPLagrange().check(StepRange.parse("0.0-0.2").mark(FLOW))
    for values, words in (({"order": 0}, "order 1 0"), ({"active": 5}, "active 5"), ({"discount": 2}, "discount 2")):
        with raises(DraftuneError, words):
            FlowBPLagrange(**values)
