"""MixGRPO's window: the steps that are random and trained in an update, and where they are in the next."""

from __future__ import annotations

import torch
from test_flow_grpo import FLOW
from test_gradients import Network, batch_of
from torch import Tensor

from draftune.methods import FlowGRPO, MixGRPO
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Prediction, Step


def calls_of(method: FlowGRPO, seed: int = 0) -> tuple[list[int], list[int]]:
    """The steps that one update trains, and those whose latent depends on fresh noise."""
    network, trained = Network(), []
    noise = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    seen: dict[int, Tensor] = {}

    def denoise(x: Tensor, step: Step) -> Prediction:
        if torch.is_grad_enabled():
            trained.append(int(step.timestep))
        else:
            seen[int(step.timestep)] = x
        return FLOW.to_prediction(network(x, step.timestep), x, step)

    def reward(x: Tensor) -> Tensor:
        seen[len(FLOW)] = x
        return x.mean((1, 2, 3))

    batch = batch_of(denoise, FLOW, None, noise, reward, seed)
    batch.images_per_prompt = 2
    for losses in method.losses_per_step([batch]):
        for loss in losses:
            loss.backward()

    def follows(i: int) -> bool:
        """Whether step i gave images of the same latent other latents."""
        with torch.no_grad():
            mean = rollout(lambda x, s: FLOW.to_prediction(network(x, s.timestep), x, s), [FLOW.steps[i]], seen[i])
        return not torch.allclose(mean, seen[i + 1], atol=1e-9)

    return sorted(trained), [i for i in range(len(FLOW)) if follows(i)]


def test_the_window_moves_along_the_steps() -> None:
    """Two neighbors of the four random steps, random and trained together, for two updates at each position."""
    method = MixGRPO(window=2, window_updates=2)
    found = [calls_of(method) for _ in range(8)]
    expected = [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3], [0, 1], [0, 1]]
    assert found == [(steps, steps) for steps in expected]
    strided = MixGRPO(window=1, window_updates=1, window_stride=3)
    assert [calls_of(strided)[0] for _ in range(4)] == [[0], [3], [2], [1]]
    assert calls_of(FlowGRPO()) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_a_random_window_takes_each_position() -> None:
    method = MixGRPO(window=2, window_order="random")
    found = {tuple(calls_of(method, seed)[0]) for seed in range(20)}
    assert found == {(0, 1), (1, 2), (2, 3)}


def test_the_position_is_restored() -> None:
    method, other = MixGRPO(window=2, window_updates=1), MixGRPO(window=2, window_updates=1)
    calls_of(method)
    other.load_state_dict(method.state_dict())
    assert calls_of(other) == calls_of(method) == ([1, 2], [1, 2])
