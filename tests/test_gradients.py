"""Every method's gradient in float64, against plain autograd and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from draftune.methods import AlignProp, BackpropMethod, Batch, Draft, DraftK, DraftLV, DRTune, LeapAlign, Method, ReFL
from draftune.models import StableDiffusion
from draftune.models.common import clamp_unit, decode_vae
from draftune.sampling.sampler import Denoiser, PrefixCache
from draftune.sampling.schedule import Prediction, Schedule, Step, ddim_schedule
from helpers.draws import injected, noises
from helpers.pipelines import SD14_SCHEDULER, add_random_lora, build_pipeline

T = 5  # divides the 1,000 training steps, so that the clean grids end at the clean latent
CLEAN = SD14_SCHEDULER | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
GRIDS = {
    "leading": ddim_schedule(SD14_SCHEDULER, T),
    "clean": ddim_schedule(CLEAN, T),
    "v": ddim_schedule(CLEAN | {"prediction_type": "v_prediction"}, T),
}


class Network(nn.Module):
    """A small nonlinear denoiser that looks at x and at the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
        self.last = nn.Conv2d(6, 4, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, timestep: int) -> Tensor:
        return self.last(torch.tanh(self.first(x) + timestep / 1000))


def reward(x: Tensor) -> Tensor:
    return (torch.sin(x) * torch.arange(1.0, 5.0)[:, None, None]).mean((1, 2, 3)) - x.square().mean((1, 2, 3))


NOISE = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def batch_of(
    denoise: Denoiser,
    schedule: Schedule,
    base: Denoiser | None = None,
    noise: Tensor = NOISE,
    reward: Callable[[Tensor], Tensor] = reward,
    seed: int = 0,
) -> Batch:
    prompts, generator = [""] * len(noise), torch.Generator().manual_seed(seed)
    return Batch(prompts, PrefixCache(noise), schedule, denoise, base or denoise, reward, generator)


def gradient_of_method(method: Method, schedule: Schedule, network: Network, seed: int = 0) -> Tensor:
    """Of the rewards' sum, uphill."""
    network.zero_grad()

    def denoise(x: Tensor, step: Step) -> Prediction:
        return schedule.to_prediction(network(x, step.timestep), x, step)

    for loss in method.losses([batch_of(denoise, schedule, seed=seed)]):
        (-loss).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def clean_and_noise(output: Tensor, x: Tensor, step: Step, prediction_type: str) -> tuple[Tensor, Tensor]:
    """DDIM's reading of the network, written out apart from the library's."""
    if prediction_type == "epsilon":
        return (x - step.sigma * output) / step.alpha, output
    return step.alpha * x - step.sigma * output, step.sigma * x + step.alpha * output


def gradient_by_hand(schedule: Schedule, network: Network, detached: int, noise: Tensor = NOISE) -> Tensor:
    """Plain autograd through a sampler with the state detached before all but the first `detached` steps."""
    network.zero_grad()
    x = noise
    for i, step in enumerate(schedule.steps):
        if i <= detached:
            x = x.detach()
        clean, noise = clean_and_noise(network(x, step.timestep), x, step, schedule.prediction_type)
        x = step.alpha_next * clean + step.sigma_next * noise
    reward(x).mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("k", [1, 2, T - 1, T])
def test_draft_k_equals_plain_autograd(grid: str, k: int, network: Network) -> None:
    ours = gradient_of_method(DraftK(k), GRIDS[grid], network)
    assert relative(ours, gradient_by_hand(GRIDS[grid], network, T - k)) < 1e-12
    # The cut is where it should be: one step more or less is another gradient.
    if k > 1:
        assert relative(ours, gradient_by_hand(GRIDS[grid], network, T - k + 1)) > 1e-4


@pytest.mark.parametrize("grid", GRIDS)
def test_draft_is_draft_k_at_all_steps(grid: str, network: Network) -> None:
    full = gradient_of_method(Draft(), GRIDS[grid], network)
    assert relative(full, gradient_by_hand(GRIDS[grid], network, 0)) < 1e-12


@pytest.mark.parametrize("grid", ["clean", "v"])
def test_refl_with_m_of_one_is_draft_1(grid: str, network: Network) -> None:
    one = gradient_of_method(DraftK(1), GRIDS[grid], network)
    assert relative(gradient_of_method(ReFL(1), GRIDS[grid], network), one) < 1e-12


@pytest.mark.parametrize("remaining", range(1, 5))
def test_refl_jumps_to_the_clean_latent_at_its_step(remaining: int, network: Network) -> None:
    schedule = GRIDS["leading"]
    with injected(randint=[remaining]) as ranges:
        ours = gradient_of_method(ReFL(4), schedule, network)
    assert ranges == [(1, 5)]
    network.zero_grad()
    x = NOISE
    for step in schedule.steps[: T - remaining]:
        clean, noise = clean_and_noise(network(x, step.timestep), x, step, "epsilon")
        x = (step.alpha_next * clean + step.sigma_next * noise).detach()
    step = schedule.steps[T - remaining]
    reward((x - step.sigma * network(x, step.timestep)) / step.alpha).mean().backward()
    assert relative(ours, torch.cat([p.grad.flatten() for p in network.parameters()])) < 1e-12


@pytest.mark.parametrize("drawn", [[1, 4], [3, 2], [2, 2], [4, 1]])
def test_alignprop_is_draft_k_with_a_k_drawn_for_each_sample(drawn: list[int], network: Network) -> None:
    schedule = GRIDS["clean"]
    with injected(randint=[drawn]) as ranges:
        ours = gradient_of_method(AlignProp("uniform", 4), schedule, network)
    assert ranges == [(1, 5)]
    each = [gradient_by_hand(schedule, network, T - k, NOISE[i : i + 1]) for i, k in enumerate(drawn)]
    assert relative(ours, sum(each) / 2) < 1e-12


@pytest.mark.parametrize(("drawn", "cut"), [([0.0], 4), ([-2.0], 3), ([-4.0], 2), ([2.0, -8.2, -6.0], 1)])
def test_alignprop_draws_one_k_for_the_batch_by_default(drawn: list[float], cut: int, network: Network) -> None:
    """The cut is the integer part of N(42/50 T, 5/50 T), drawn again until it is from 1 to T - 1."""
    schedule = GRIDS["clean"]
    with injected(randn=drawn):
        ours = gradient_of_method(AlignProp(), schedule, network)
    assert relative(ours, gradient_by_hand(schedule, network, cut)) < 1e-12


def test_the_normal_cuts_are_those_of_the_authors_at_fifty_steps() -> None:
    """The integer part of N(42, 5), drawn again outside of 1 to 49: its probabilities by the normal's own integral."""
    generator, count = torch.Generator().manual_seed(0), 4000
    cuts = torch.stack([50 - AlignProp().draw(3, 50, generator) for _ in range(count)])
    assert (cuts == cuts[:, :1]).all()
    drawn = torch.bincount(cuts[:, 0], minlength=51).double() / count
    edges = torch.distributions.Normal(42.0, 5.0).cdf(torch.arange(1.0, 51.0)).double()
    expected = edges.diff() / (edges[-1] - edges[0])
    assert drawn[0] == drawn[50] == 0
    assert (drawn[1:50] - expected).abs().max() < 4 * (0.08 / count) ** 0.5
    few = torch.stack([AlignProp(m=4).draw(1, 50, generator) for _ in range(500)])
    assert sorted(set(few.flatten().tolist())) == [1, 2, 3, 4]
    assert int(AlignProp().draw(1, 1, generator)) == 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("order", "discount"),
    [([0, 1, 2, 3, 4], 0.0), ([3, 1, 0, 2, 4], 0.2), ([2, 4, 0, 1, 3], 0.2), ([4, 0, 1, 2, 3], 1.0)],
)
def test_leapalign_equals_plain_autograd(grid: str, order: list[int], discount: float, network: Network) -> None:
    schedule = GRIDS[grid]
    steps, kind = schedule.steps, schedule.prediction_type
    with injected(randperm=[order]):
        ours = gradient_of_method(LeapAlign(discount), schedule, network)
    k, j = sorted(order[:2])
    path = [NOISE]
    with torch.no_grad():
        for step in steps:
            clean, noise = clean_and_noise(network(path[-1], step.timestep), path[-1], step, kind)
            path.append(step.alpha_next * clean + step.sigma_next * noise)
    network.zero_grad()
    clean, noise = clean_and_noise(network(path[k], steps[k].timestep), path[k], steps[k], kind)
    x = steps[j].alpha * clean + steps[j].sigma * noise
    x = x + (path[j] - x).detach()
    output = network(discount * x + (1 - discount) * x.detach(), steps[j].timestep)
    clean, noise = clean_and_noise(output, x, steps[j], kind)
    x = steps[-1].alpha_next * clean + steps[-1].sigma_next * noise
    x = x + (path[T] - x).detach()
    reward(x).mean().backward()
    assert relative(ours, torch.cat([p.grad.flatten() for p in network.parameters()])) < 1e-12


def test_the_gradient_of_leapalign_has_the_closed_form() -> None:
    """On a flow, v = w_t + u_t x: -j dv(x_j) - (k - j) dv(x_k) + discount j (k - j) u_j dv(x_k)."""
    levels, discount = [1.0, 0.8, 0.55, 0.2, 0.0], 0.3
    steps = tuple(Step(i, 1 - s, s, 1 - n, n) for i, (s, n) in enumerate(pairwise(levels)))
    schedule = Schedule(steps, "flow")
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    u = [0.4, -0.7, 1.1, 0.6]

    def denoise(x: Tensor, step: Step) -> Prediction:
        v = w[step.timestep] + u[step.timestep] * x
        return Prediction(x - step.sigma * v, x + (1 - step.sigma) * v)

    a, b = 1, 3
    with injected(randperm=[[b, a, 0, 2]]):
        (clean,) = LeapAlign(discount).samples(batch_of(denoise, schedule))
    k, j = levels[a], levels[b]
    (gradient,) = torch.autograd.grad(clean.sum() / clean.numel(), w)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[b] = -j
    expected[a] = -(k - j) + discount * j * (k - j) * u[b]
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("k", "m", "remaining", "trained", "starts"),
    [
        (1, 1, 1, [3], 5),
        (2, 3, 1, [2, 4], 3),
        (2, 3, 2, [0, 2], 2),
        (2, 3, 3, [1, 2], 2),
        (3, 2, 2, [1, 2, 3], 2),
        (T, 1, 1, [0, 1, 2, 3, 4], 1),
    ],
)
def test_drtune_equals_plain_autograd(
    grid: str, k: int, m: int, remaining: int, trained: list[int], starts: int, network: Network
) -> None:
    """The network's input detached at every call, its output at all but the drawn ones, x's linear path kept.

    Args:
        remaining: The calls left when it jumps to the clean latent, counting the last one made.
        trained: The calls with gradient, evenly spaced.
        starts: How many places the first of them may have.
    """
    schedule, calls = GRIDS[grid], T + 1 - remaining
    with injected(randint=[remaining, trained[0]]) as ranges:
        ours = gradient_of_method(DRTune(k, m), schedule, network)
    assert ranges == [(1, m + 1), (0, starts)]
    network.zero_grad()
    x = NOISE
    for i, step in enumerate(schedule.steps[:calls]):
        output = network(x.detach(), step.timestep)
        output = output if i in trained else output.detach()
        clean, noise = clean_and_noise(output, x, step, schedule.prediction_type)
        x = step.alpha_next * clean + step.sigma_next * noise
    reward(clean).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert relative(ours, expected) < 1e-12


def test_the_gradient_of_drtune_has_the_closed_form(network: Network) -> None:
    """For noise prediction, d x_0 / d eps_t = alpha_0 (sigma_{t-1} / alpha_{t-1} - sigma_t / alpha_t), however deep."""
    schedule = GRIDS["clean"]
    biases = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in schedule.steps]
    ordered = {step.timestep: bias for step, bias in zip(schedule.steps, biases, strict=True)}

    def denoise(x: Tensor, step: Step) -> Prediction:
        return schedule.to_prediction(network(x, step.timestep) + ordered[step.timestep], x, step)

    (clean,) = DRTune(T, 1).samples(batch_of(denoise, schedule))
    for bias, step in zip(torch.autograd.grad(clean.sum(), biases), schedule.steps, strict=True):
        coefficient = step.sigma_next / step.alpha_next - step.sigma / step.alpha
        assert float(bias) == pytest.approx(clean.numel() * coefficient, rel=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
def test_lv_without_copies_is_draft_1(grid: str, network: Network) -> None:
    one = gradient_of_method(DraftK(1), GRIDS[grid], network)
    assert relative(gradient_of_method(DraftLV(0), GRIDS[grid], network), one) < 1e-12


@pytest.mark.parametrize("grid", ["leading", "v"])
def test_lv_adds_renoised_copies_of_the_latent(grid: str, network: Network) -> None:
    schedule, fresh = GRIDS[grid], noises(3, NOISE)
    with injected(randn=fresh):
        ours = gradient_of_method(DraftLV(3), schedule, network)
    expected = gradient_by_hand(schedule, network, T - 1)
    x = NOISE
    with torch.no_grad():
        for step in schedule.steps:
            clean, noise = clean_and_noise(network(x, step.timestep), x, step, schedule.prediction_type)
            x = step.alpha_next * clean + step.sigma_next * noise
    last = schedule.steps[-1]
    for noise in fresh:
        network.zero_grad()
        noisy = last.alpha * x + last.sigma * noise
        output = network(noisy, last.timestep)
        reward(clean_and_noise(output, noisy, last, schedule.prediction_type)[0]).mean().backward()
        expected = expected + torch.cat([p.grad.flatten() for p in network.parameters()])
    assert relative(ours, expected) < 1e-12


S, TARGET = 0.7, 1.5


class Gaussian:
    """Data ~ N(mu, S^2): the exact denoiser is clean = p mu + q x, and the noise is e mu + f x."""

    def __init__(self) -> None:
        self.mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    @staticmethod
    def coefficients(step: Step) -> tuple[float, float, float, float]:
        q = step.alpha * S**2 / (step.alpha**2 * S**2 + step.sigma**2)
        p = 1 - q * step.alpha
        return p, q, -step.alpha * p / step.sigma, (1 - step.alpha * q) / step.sigma

    def denoise(self, x: Tensor, step: Step) -> Prediction:
        p, q, e, f = self.coefficients(step)
        return Prediction(p * self.mu + q * x, e * self.mu + f * x)


def slopes(method: Method, schedule: Schedule, drawn: list[Any]) -> list[list[float]]:
    """d x_0 / d mu of every sample of every clean latent that the method yields, by recursions on paper."""
    steps = schedule.steps
    c = [Gaussian.coefficients(step) for step in steps]

    def last(k: int) -> float:
        slope = 0.0
        for step, (p, q, e, f) in list(zip(steps, c, strict=True))[T - k :]:
            slope = step.alpha_next * (p + q * slope) + step.sigma_next * (e + f * slope)
        return slope

    if isinstance(method, DraftK):
        return [[last(method.k)] * 2]
    if isinstance(method, Draft):
        return [[last(T)] * 2]
    if isinstance(method, DraftLV):
        return [[last(1)] * 2, *[[c[-1][0]] * 2] * method.n]
    if isinstance(method, ReFL):
        return [[c[T - drawn[0]][0]] * 2]
    if isinstance(method, AlignProp):
        return [[last(k) for k in drawn[0]]]
    if isinstance(method, LeapAlign):
        k, j = sorted(drawn[0][:2])
        at, (_, _, e, f) = steps[j], c[j]
        slope = at.alpha * c[k][0] + at.sigma * c[k][2]
        return [[(slope - at.sigma * (e + method.discount * f * slope)) / at.alpha] * 2]
    assert isinstance(method, DRTune)
    remaining, first = drawn
    calls = T + 1 - remaining
    stride = calls // method.k
    slope = 0.0
    for i, (step, (_, _, e, _)) in enumerate(zip(steps[:calls], c, strict=False)):
        noise = e if i in range(first, first + stride * method.k, stride) else 0.0
        clean = (slope - step.sigma * noise) / step.alpha
        slope = step.alpha_next * clean + step.sigma_next * noise
    return [[clean] * 2]


@pytest.mark.parametrize(
    ("method", "drawn"),
    [
        (DraftK(1), {}),
        (DraftK(3), {}),
        (Draft(), {}),
        (DraftLV(2), {}),
        *((ReFL(3), {"randint": [remaining]}) for remaining in (1, 2, 3)),
        *((AlignProp("uniform", 4), {"randint": [ks]}) for ks in ([1, 4], [3, 2], [4, 4])),
        *((DRTune(2, 3), {"randint": values}) for values in ([1, 2], [2, 1], [3, 0])),
        *((LeapAlign(0.3), {"randperm": [order]}) for order in ([0, 1, 2, 3, 4], [3, 1, 0, 2, 4], [4, 2, 0, 1, 3])),
    ],
    ids=repr,
)
def test_closed_form_on_gaussian_data_with_a_quadratic_reward(
    method: BackpropMethod, drawn: dict[str, list[Any]]
) -> None:
    schedule, data, expected = GRIDS["clean"], Gaussian(), 0.0
    with injected(**drawn):
        latents = list(method.samples(batch_of(data.denoise, schedule)))
    for clean, slope in zip(latents, slopes(method, schedule, next(iter(drawn.values()), [])), strict=True):
        (-((clean - TARGET) ** 2)).mean().backward()
        each = (-2 * (clean.detach() - TARGET)).mean((1, 2, 3))
        expected += float((each * torch.tensor(slope, dtype=torch.float64)).mean())
    assert data.mu.grad is not None
    assert float(data.mu.grad) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n", [2, 8])
def test_the_gradient_of_lv_has_a_lower_variance(n: int) -> None:
    """Over the noise, relative to its mean: on Gaussian data by hand, and lower than DRaFT-1's."""
    schedule, count = GRIDS["clean"], 40_000
    noise = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def spread(method: BackpropMethod) -> tuple[float, float]:
        data = Gaussian()
        mu, data.mu = 0.3, torch.full_like(noise, 0.3).requires_grad_()
        for clean in method.samples(batch_of(data.denoise, schedule, noise=noise, seed=1)):
            (-((clean - TARGET) ** 2)).sum().backward()
        assert data.mu.grad is not None
        mean, variance = 0.0, 1.0  # of x_0, which the sampler draws as gain * noise + offset
        for step in schedule.steps:
            p, q, e, f = data.coefficients(step)
            gain = step.alpha_next * q + step.sigma_next * f
            mean, variance = (step.alpha_next * p + step.sigma_next * e) * mu + gain * mean, gain**2 * variance
        last, copies = schedule.steps[-1], getattr(method, "n", 0)
        copied = -2 * copies * p * (p * mu + q * last.alpha * mean - TARGET)
        wanted_mean = -2 * p * (mean - TARGET) + copied
        shared = (p + copies * p * q * last.alpha) ** 2 * variance
        wanted_variance = 4 * (shared + copies * (p * q * last.sigma) ** 2)
        assert float(data.mu.grad.mean()) == pytest.approx(wanted_mean, rel=0.02)
        assert float(data.mu.grad.var()) == pytest.approx(wanted_variance, rel=0.03)
        return wanted_mean, wanted_variance

    (mean_one, variance_one), (mean_lv, variance_lv) = spread(DraftK(1)), spread(DraftLV(n))
    assert variance_lv / mean_lv**2 < 0.8 * variance_one / mean_one**2


def test_finite_differences(network: Network) -> None:
    schedule, step_size = GRIDS["clean"], 1e-6
    weight = network.first.weight
    ours = gradient_of_method(Draft(), schedule, network)[: weight.numel()].reshape(weight.shape)

    def value() -> float:
        x = NOISE
        for step in schedule.steps:
            clean, noise = clean_and_noise(network(x, step.timestep), x, step, "epsilon")
            x = step.alpha_next * clean + step.sigma_next * noise
        return float(reward(x).mean())

    with torch.no_grad():
        weight[2, 1, 0, 2] += step_size
        above = value()
        weight[2, 1, 0, 2] -= 2 * step_size
        below = value()
    assert float(ours[2, 1, 0, 2]) == pytest.approx((above - below) / (2 * step_size), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "stride", "levels"), [(3, 2, [0, 1]), (3, 1, [0, 1, 2]), (4, 2, [0, 2]), (4, 9, [0])]
)
def test_strides_over_the_steps_without_gradient(count: int, stride: int, levels: list[int]) -> None:
    """They start at the same levels and end where the single steps do."""
    schedule, network = GRIDS["clean"], Network()
    calls: list[float] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        calls.append(step.timestep)
        return schedule.to_prediction(network(x, step.timestep), x, step)

    latents = PrefixCache(NOISE, stride=stride)
    x = latents.get(count, denoise, schedule.steps)
    assert calls == [schedule.steps[i].timestep for i in levels]
    assert latents.get(count, denoise, schedule.steps) is x
    assert len(calls) == len(levels)
    wanted = NOISE
    for i, level in enumerate(levels):
        step, end = schedule.steps[level], schedule.steps[(levels[i + 1] if i + 1 < len(levels) else count) - 1]
        clean, noise = clean_and_noise(network(wanted, step.timestep), wanted, step, "epsilon")
        wanted = end.alpha_next * clean + end.sigma_next * noise
    assert relative(x, wanted) < 1e-12
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("k", "checkpointing"), [(2, "denoiser"), (4, "denoiser"), (4, "none"), (1, "blocks"), (4, "blocks"), (4, "both")]
)
def test_draft_k_on_a_pipeline_equals_plain_autograd(tmp_path: Path, k: int, checkpointing: str) -> None:
    """The whole way: LoRA, UNet, guidance through both branches, checkpoints, decoder; float64."""
    pipeline = build_pipeline(tmp_path)
    pipeline.unet.double()
    pipeline.vae.double()
    model = StableDiffusion(pipeline, "tiny")
    parameters = add_random_lora(model)
    assert all(p.dtype == torch.float64 for p in parameters.values())
    model.set_checkpointing(checkpointing)
    schedule, prompts, scale, steps = model.schedule(4), ["a cat", "dogs"], 3.0, 4
    noise = model.noise(torch.Generator().manual_seed(0), 2)
    weights = torch.linspace(-1, 1, 16, dtype=torch.float64)

    (clean,) = DraftK(k).samples(batch_of(model.denoiser_for(prompts, schedule, scale), schedule, noise=noise))
    (model.decode(clean) * weights).mean().backward()
    ours = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert ours.keys() == parameters.keys()

    model.denoiser.zero_grad()
    positive, negative = (c.double() for c in pipeline.encode_prompt(prompts, "cpu", 1, True))
    alphas = pipeline.scheduler.alphas_cumprod.double()
    x = noise
    for i, t in enumerate([751, 501, 251, 1]):
        if i <= steps - k:
            x = x.detach()
        eps_positive = pipeline.unet(x, t, positive).sample
        eps_negative = pipeline.unet(x, t, negative).sample
        eps = eps_negative + scale * (eps_positive - eps_negative)
        here, there = alphas[t], alphas[t - 250] if t > 250 else alphas[0]
        clean = (x - (1 - here).sqrt() * eps) / here.sqrt()
        x = there.sqrt() * clean + (1 - there).sqrt() * eps
    image = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    (image * weights).mean().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert relative(ours[name], parameter.grad) < 1e-9, name


@pytest.mark.parametrize(("mode", "outside"), [("straight_through", 1.0), ("hard", 0.0)])
def test_the_gradient_of_a_saturated_pixel(mode: str, outside: float) -> None:
    """1 within the range, its bounds included; beyond it 1 or 0. The values are those of the clamp, to the last bit."""
    inside = torch.linspace(0, 1, 101)
    beyond = torch.cat([torch.linspace(-2, -1e-3, 100), 1 + torch.linspace(1e-3, 2, 100)])
    images = torch.cat([inside, beyond]).requires_grad_()
    clamped = clamp_unit(images, mode)
    assert torch.equal(clamped, images.clamp(0, 1))
    (gradient,) = torch.autograd.grad((3 * clamped).sum(), images)
    assert torch.equal(gradient, torch.cat([torch.full((101,), 3.0), torch.full((200,), 3 * outside)]))


@pytest.mark.parametrize("small", [False, True], ids=["own", "tiny"])
def test_out_of_range_pixels_are_clamped_as_the_model_says(tmp_path: Path, small: bool) -> None:
    """Through either decoder; the straight-through gradient is that of the decoder without a clamp."""
    model = StableDiffusion(build_pipeline(tmp_path), "tiny")
    if small:
        torch.manual_seed(1)
        widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        model.tiny_decoder = AutoencoderTiny(**widths, **blocks).eval().requires_grad_(False)
    latents = 40 * model.noise(torch.Generator().manual_seed(0), 1)
    latents.requires_grad_()
    tiny = model.tiny_decoder
    raw = decode_vae(tiny, latents, mean=tiny.config.shift_factor) if small else model._decode(latents)
    outside = (raw < 0) | (raw > 1)
    assert outside.any()
    assert not outside.all()
    assert model.pixel_clamp == "straight_through"
    images = model.decode(latents)
    assert images.min() >= 0
    assert images.max() <= 1
    (gradient,) = torch.autograd.grad(images[outside].sum(), latents)
    (expected,) = torch.autograd.grad(raw[outside].sum(), latents, retain_graph=True)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert gradient.abs().max() > 0
    model.pixel_clamp = "hard"
    same = model.decode(latents)
    assert torch.equal(same, images)
    (gradient,) = torch.autograd.grad(same.sum(), latents)
    (expected,) = torch.autograd.grad(raw[~outside].sum(), latents)
    assert torch.allclose(gradient, expected, atol=1e-5)
