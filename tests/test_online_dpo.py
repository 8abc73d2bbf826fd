"""Online DPO in float64: the authors' loss by hand, its gradient on Gaussian data, pairs, and the reference."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_diffusion_nft import scaled, through
from test_gradients import GRIDS, Gaussian, Network, batch_of, relative
from torch import Tensor
from torch.nn.functional import logsigmoid

from draftune.errors import DraftuneError
from draftune.methods import Batch, OnlineDPO
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Schedule, Step
from draftune.utils.processes import Processes
from helpers.climbing import check_it_climbs
from helpers.draws import injected
from helpers.errors import mentions, raises

LEVELS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.0]
FLOW = Schedule(tuple(Step(i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(LEVELS))), "flow")
REWARDS = torch.tensor([3.0, -1.0, 0.5, 5.0, 0.0, 1.0, -2.0, 0.5], dtype=torch.float64)


def group_batch(network: Network, schedule: Schedule, rewards: Tensor = REWARDS, size: int = 4) -> Batch:
    noise = torch.randn(len(rewards), 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    batch = batch_of(through(network, schedule), schedule, None, noise, lambda x: rewards)
    batch.images_per_prompt, batch.parameters = size, dict(network.named_parameters())
    return batch


def gradient(network: Network) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def targets(schedule: Schedule, x0: Tensor, noise: Tensor, step: Step) -> Tensor:
    """What the network should predict."""
    kinds = {"epsilon": noise, "v_prediction": step.alpha * noise - step.sigma * x0, "flow": noise - x0}
    return kinds[schedule.prediction_type]


@pytest.mark.parametrize("schedule", [FLOW, GRIDS["leading"], GRIDS["v"]], ids=lambda s: s.prediction_type)
@pytest.mark.parametrize(("pairs", "better", "worse"), [(1, [3, 5], [1, 6]), (2, [3, 0, 5, 7], [1, 2, 6, 4])])
def test_the_loss_of_the_authors_by_hand(schedule: Schedule, pairs: int, better: list[int], worse: list[int]) -> None:
    """-log sigmoid(-beta / 2 (w_diff - l_diff)) of train_sd3_dpo.py: one noise for a pair, and a reference."""
    beta, network, reference = 30.0, scaled(1.1), Network()
    method = OnlineDPO(beta=beta, pairs=pairs)
    method.reference.start(dict(reference.named_parameters()))
    batch = group_batch(network, schedule)
    generator = torch.Generator().manual_seed(1)
    fresh = [torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=generator) for _ in schedule.steps]
    with injected(randn=fresh):
        (losses,) = method.losses_per_step([batch])
        for loss in losses:
            loss.backward()
    found = gradient(network)

    network.zero_grad()
    with torch.no_grad():
        images = rollout(through(network, schedule), schedule.steps, batch.noise)
    chosen, correct = torch.cat([images[better], images[worse]]), []
    for step, eps in zip(schedule.steps, fresh, strict=True):
        noise = eps[[i // 4 for i in (*better, *worse)]]
        x, target = step.alpha * chosen + step.sigma * noise, targets(schedule, chosen, noise, step)
        own, ref = ((net(x, step.timestep) - target).square().mean((1, 2, 3)) for net in (network, reference))
        w_diff, l_diff = (own - ref.detach()).chunk(2)
        inside = -0.5 * beta * (w_diff - l_diff)
        (-logsigmoid(inside).mean() / len(schedule)).backward()
        correct.append((inside > 0).double().mean())
    assert relative(found, gradient(network)) < 1e-9
    assert method.metrics()["preference_accuracy"] == pytest.approx(float(sum(correct) / len(correct)))


def test_the_direction_on_gaussian_data_has_a_closed_form() -> None:
    """With the value itself as the reward, the better of two images is sqrt(4 / pi) standard deviations larger.

    At the reference the margin is 0, and d loss / d mu = -beta p^2 / sigma^2 * std / sqrt(pi) at each step of a flow.
    """
    data, beta = Gaussian(), 3.0
    slope = 1.0
    for step in FLOW.steps:
        _, q, _, f = data.coefficients(step)
        slope *= step.alpha_next * q + step.sigma_next * f
    weights = [(data.coefficients(step)[0] / step.sigma) ** 2 for step in FLOW.steps]
    expected = -beta * sum(weights) / len(weights) * abs(slope) / math.sqrt(math.pi)

    estimates = []
    for seed in range(100):
        noise = torch.randn(100, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        batch = batch_of(data.denoise, FLOW, None, noise, lambda x: x.flatten(), 10_000 + seed)
        batch.images_per_prompt = 2
        data.mu.grad = None
        (losses,) = OnlineDPO(beta=beta).losses_per_step([batch])
        for loss in losses:
            loss.backward()
        assert data.mu.grad is not None
        estimates.append(float(data.mu.grad))
    values = torch.tensor(estimates, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values)))
    assert error < 0.1 * abs(expected)
    assert abs(float(values.mean()) - expected) < 3 * error


def test_it_climbs_a_reward_without_a_gradient() -> None:
    check_it_climbs(OnlineDPO(beta=1.0, reference_updates=5), FLOW, 4)


def test_a_pair_may_be_split_between_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the gradients of the two processes is that of one: each knows the errors of all images."""
    network = scaled(1.1)
    reference = dict(Network().named_parameters())

    def of(batch: Batch) -> Tensor:
        method = OnlineDPO(beta=30.0)
        method.reference.start(reference)
        network.zero_grad()
        (losses,) = method.losses_per_step([batch])
        for loss in losses:
            loss.backward()
        return gradient(network).clone()

    seen: list[Tensor] = []
    plain = Processes.gather

    def recording(self: Processes, own: Tensor) -> Tensor:
        seen.append(own.clone())
        return plain(self, own)

    monkeypatch.setattr(Processes, "gather", recording)
    alone = of(group_batch(network, FLOW, REWARDS[:2], 2))
    gathered, parts = list(seen), []
    for index in range(2):
        batch = group_batch(network, FLOW, REWARDS[:2], 2)
        batch.prefix_cache.latents[0] = batch.noise[index : index + 1]
        batch.processes, left = Processes(index, 2), list(gathered)
        monkeypatch.setattr(Processes, "gather", lambda self, own, left=left: left.pop(0))
        parts.append(of(batch))
        assert not left
    assert relative((parts[0] + parts[1]) / 2, alone) < 1e-12
    assert relative(parts[0], parts[1]) > 0.1


def test_equal_rewards_make_no_pair_and_are_named() -> None:
    method, network = OnlineDPO(), Network()
    rewards = torch.tensor([0.1, 0.1, 0.7, 0.7], dtype=torch.float64)
    (losses,) = method.losses_per_step([group_batch(network, FLOW, rewards, 2)])
    for loss in losses:
        loss.backward()
    assert not gradient(network).any()
    assert mentions(method.explain_zero_gradient(), "prompt rewards")
    (losses,) = method.losses_per_step([group_batch(network, FLOW, REWARDS[:4], 2)])
    for loss in losses:
        loss.backward()
    assert gradient(network).any()
    assert method.explain_zero_gradient() == ""


def test_the_reference_is_replaced_after_its_updates() -> None:
    network, method, kept = Network(), OnlineDPO(reference_updates=2), OnlineDPO(reference_updates=0)
    start = network.last.weight.detach().clone()
    for update in range(1, 5):
        for one in (kept, method):
            for losses in one.losses_per_step([group_batch(network, FLOW)]):
                for loss in losses:
                    loss.backward()
                with torch.no_grad():
                    network.last.weight.add_(0.1 * (one is method))
        method_reference = method.reference.weights["last.weight"]
        expected = start + 0.1 * (update // 2 * 2)
        assert torch.allclose(method_reference, expected, atol=1e-12), update
        assert torch.equal(kept.reference.weights["last.weight"], start)
        other = OnlineDPO()
        other.load_state_dict(method.state_dict())
        assert other.updates == update
        assert torch.equal(other.reference.weights["last.weight"], method_reference)


def test_settings_out_of_range_are_refused() -> None:
    for values, words in (
        ({"beta": 0.0}, "beta 0"),
        ({"pairs": 0}, "pairs 1 0"),
        ({"reference_updates": -1}, "reference_updates 0 -1"),
        ({"inner_epochs": 0}, "inner_epochs 1 0"),
        ({"timestep_fraction": 2.0}, "timestep_fraction 1 2"),
    ):
        with raises(DraftuneError, words):
            OnlineDPO(**values)  # type: ignore[arg-type]
