"""Guidance: known outcomes on small problems with exact denoisers, every family of models, and the command."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import test_dit
import test_pixart
import test_pixels
import test_sdxl
import torch
from PIL import Image
from test_flow import SD3, save_flux, save_sd3
from test_sana import save_sana
from torch import Tensor

import draftune
from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.experimental.denoising_loss import LEVELS, DenoisingTrainer, fresh_lora
from draftune.guidance import sampler
from draftune.guidance.methods import load_guide
from draftune.guidance.sample import RewardGradientFn, sample_guided
from draftune.guidance.sampler import (
    dot,
    dynamic_scale,
    guided_sample,
    iterative_guidance,
    norm,
    posterior_guidance,
    sample_eta,
    variance_scale,
)
from draftune.lora import load_lora, lora_parameters, save_lora
from draftune.models import load_model
from draftune.rewards import load_reward
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.utils.images import open_image, to_pil
from helpers.draws import injected
from helpers.errors import mentions, raises

T, D = 200, 16


def steps_of(levels: Sequence[tuple[float, float]]) -> list[Step]:
    """From the noisiest to clean, told by (alpha, sigma)."""
    return [Step(0.0, *here, *there) for here, there in pairwise(levels)]


def cosine() -> list[Step]:
    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    bars = [1.0]
    for t in range(1, T + 1):
        bars.append(bars[-1] * max(f(t) / f(t - 1), 0.001))
    return steps_of([(bar**0.5, (1 - bar) ** 0.5) for bar in reversed(bars)])


DIFFUSION = cosine()
FLOW = steps_of([(t / T, 1 - t / T) for t in range(T + 1)])


class Subspace:
    """x_0 ~ N(0, P) in 4 of 16 dimensions, and a direction theta of which nine tenths lie outside of them."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.basis = torch.linalg.qr(self.normal(D, 4))[0]
        self.P = self.basis @ self.basis.T
        r = self.normal(D)
        inside, outside = self.P @ r, r - self.P @ r
        theta = inside / inside.norm() + 9 * outside / outside.norm()
        self.theta = theta / theta.norm()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def fresh(self, count: int) -> Callable[[], Tensor]:
        return lambda: self.normal(count, D)

    def denoise(self, x: Tensor, step: Step) -> Prediction:
        clean = step.alpha / (step.alpha**2 + step.sigma**2) * x @ self.P
        return Prediction(clean, (x - step.alpha * clean) / step.sigma)

    def f(self, x: Tensor) -> Tensor:
        return 10 - (x @ self.theta - 3) ** 2

    def uphill(self, x: Tensor) -> Tensor:
        return -2 * (x @ self.theta - 3)[:, None] * self.theta

    def outside(self, x: Tensor) -> float:
        return float((x - x @ self.P).norm() / (x @ self.P).norm())


@pytest.fixture
def toy() -> Subspace:
    return Subspace()


def naive(denoise: Denoiser, direction: Tensor, target: Tensor, sigma: float) -> Denoiser:
    """Along the gradient itself instead of what the network makes of it: what look-ahead is better than."""

    def call(x: Tensor, step: Step) -> Prediction:
        clean, noise = denoise(x, step)
        spread = sigma**2 + step.sigma**2 * norm(direction).square()
        push = step.alpha * (target - dot(direction, clean))[:, None] * direction / spread
        return Prediction(clean + step.sigma**2 / step.alpha * push, noise - step.sigma * push)

    return call


@pytest.mark.parametrize(("steps", "eta"), [(DIFFUSION, 1.0), (DIFFUSION, 0.0), (FLOW, 0.0)])
def test_look_ahead_draws_from_the_posterior(toy: Subspace, steps: list[Step], eta: float) -> None:
    count, nu, target, sigma = 4000, 1 / 82, 0.3, 0.1
    fresh, direction = toy.fresh(count), toy.theta.expand(count, D)
    x = sample_eta(
        posterior_guidance(toy.denoise, direction, torch.full((count,), target).double(), sigma),
        steps,
        fresh(),
        fresh,
        eta,
    )
    seen = x @ toy.theta
    assert float(seen.mean()) == pytest.approx(target * nu / (nu + sigma**2), rel=0.05)  # 0.1648
    assert float(seen.var()) == pytest.approx(nu * sigma**2 / (nu + sigma**2), rel=0.07)  # 0.0055
    assert toy.outside(x) < 1e-12


@pytest.mark.parametrize(("eta", "reached"), [(1.0, 0.0231), (0.0, 0.0179)])
def test_the_naive_gradient_misses_the_posterior_and_leaves_the_subspace(
    toy: Subspace, eta: float, reached: float
) -> None:
    # Every map is affine, so that the mean is what comes of no noise at all.
    zero = torch.zeros(1, D, dtype=torch.float64)
    means = {}
    for guide in (posterior_guidance, naive):
        guided = guide(toy.denoise, toy.theta[None], torch.tensor([0.3]).double(), 0.1)
        means[guide] = float(sample_eta(guided, DIFFUSION, zero, lambda: zero, eta) @ toy.theta)
    assert means[posterior_guidance] == pytest.approx(0.1648, abs=2e-4)
    # With the ancestral sampler 92 % short of the target, 86 % of the posterior's mean.
    assert means[naive] == pytest.approx(reached, abs=2e-4)
    fresh = toy.fresh(4000)
    y = sample_eta(naive(toy.denoise, toy.theta[None], torch.tensor(0.3), 0.1), DIFFUSION, fresh(), fresh, eta)
    # The last call's push alone, h / (sigma^2 + h) of the gap; on this grid h = 2.55e-4.
    assert toy.outside(y) == pytest.approx(0.0038, abs=2e-4)


def test_rounds_settle_at_the_regularised_optimum(toy: Subspace) -> None:
    fresh = toy.fresh(64)
    means = []
    for x in iterative_guidance(toy.denoise, DIFFUSION, toy.uphill, fresh, 60, 0.2, 0.1):
        means.append(float(toy.f(x).mean()))
    assert means[0] == pytest.approx(1, abs=0.4)
    assert means[60] == pytest.approx(5.79, abs=0.1)
    assert toy.outside(x) < 1e-14


@pytest.mark.parametrize(("rise", "rounds", "told"), [(0.2, 200, 5.93), (0.9, 80, 9.12)])
def test_where_the_rounds_would_stay_without_noise(toy: Subspace, rise: float, rounds: int, told: float) -> None:
    """Gradient Guidance's fixed point, where f(x) - sigma^2 / (2 rise) |x|^2 is highest in the subspace."""
    zero = torch.zeros(1, D, dtype=torch.float64)
    *_, x = iterative_guidance(toy.denoise, DIFFUSION, toy.uphill, lambda: zero, rounds, rise, 0.1)
    limit = 10 - (3 / (1 + 2 * rise / 0.1**2 / 82)) ** 2
    assert limit == pytest.approx(told, abs=0.005)
    assert float(toy.f(x)) == pytest.approx(limit, abs=1e-4)


def test_the_first_round(toy: Subspace) -> None:
    fresh = toy.fresh(4000)
    means = [float(toy.f(x).mean()) for x in iterative_guidance(toy.denoise, DIFFUSION, toy.uphill, fresh, 1, 0.2, 0.1)]
    assert means[0] == pytest.approx(1 - 1 / 82, abs=0.04)
    # By quadrature over the seen value of the first batch, N(0, 1 / 82). Of 64 samples it has a standard error of 0.1:
    # 1.31, which was told, is one of them.
    assert means[1] == pytest.approx(1.181, abs=0.04)


def test_the_naive_rounds_stall(toy: Subspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "posterior_guidance", naive)
    *last, x = iterative_guidance(toy.denoise, DIFFUSION, toy.uphill, toy.fresh(64), 30, 0.9, 0.1)
    assert sum(float(toy.f(y).mean()) for y in last[-10:]) / 10 == pytest.approx(1.9, abs=0.1)
    assert toy.outside(x) == pytest.approx(0.077, abs=0.006)


class Learned:
    """The exact denoiser of N(mean, P), the mean in the subspace learned."""

    def __init__(self, toy: Subspace) -> None:
        self.toy, self.place = toy, torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def __call__(self, x: Tensor, step: Step) -> Prediction:
        mean = self.toy.basis @ self.place
        clean = mean + step.alpha / (step.alpha**2 + step.sigma**2) * (x - step.alpha * mean) @ self.toy.P
        return Prediction(clean, (x - step.alpha * clean) / step.sigma)


def test_training_on_what_is_drawn_goes_past_the_regularised_optimum(toy: Subspace) -> None:
    steps = steps_of([(step.alpha, step.sigma) for step in DIFFUSION[::4]] + [(1.0, 0.0)])
    network, schedule = Learned(toy), Schedule(tuple(steps))
    fit = DenoisingTrainer([network.place], schedule, 0.3, torch.Generator().manual_seed(0))
    means = []
    for drawing, x in enumerate(iterative_guidance(network, steps, toy.uphill, toy.fresh(32), 80, 0.2, 0.1)):
        means.append(float(toy.f(x).mean()))
        if drawing >= 20:
            fit(network, x)
    assert means[20] < 5  # still on the way to 5.93
    assert means[80] == pytest.approx(9.8, abs=0.15)  # 10 is the optimum
    assert toy.outside(x) < 1e-12


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_loss_of_the_denoiser(toy: Subspace, kind: str) -> None:
    steps = DIFFUSION if kind == "epsilon" else FLOW[1:]
    place = torch.full((), 0.3, dtype=torch.float64, requires_grad=True)

    def denoise(x: Tensor, step: Step) -> Prediction:
        clean, noise = toy.denoise(x, step)
        return Prediction(clean, noise + place)

    fit = DenoisingTrainer([place], Schedule(tuple(steps), kind), 0.01, torch.Generator().manual_seed(0))
    seen = [i % len(steps) for i in range(LEVELS)]
    with injected(randint=[seen]):
        found = fit(denoise, toy.normal(4000, D) @ toy.P)
    # What an exact denoiser can't know of N(0, P), and the square of the shift.
    weights = [
        (steps[i].alpha ** 2 if kind == "epsilon" else 1) / (steps[i].alpha ** 2 + steps[i].sigma ** 2) for i in seen
    ]
    assert found == pytest.approx(sum(weights) / LEVELS * 4 / D + 0.3**2, rel=0.02)
    assert place.grad is not None
    assert place.grad.item() == pytest.approx(2 * 0.3, rel=0.02)
    assert place.item() == pytest.approx(0.3 - 0.01, rel=1e-3)  # Adam's first step


def test_a_larger_rise_settles_higher_and_stays_in_the_subspace(toy: Subspace) -> None:
    fresh = toy.fresh(64)
    *_, x = iterative_guidance(toy.denoise, DIFFUSION, toy.uphill, fresh, 30, 0.9, 0.1, resample_noise=False)
    assert float(toy.f(x).mean()) == pytest.approx(9.12, abs=0.1)  # from the same noise every round
    assert toy.outside(x) < 1e-12


CENTRES = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)], dtype=torch.float64)


def denoise_mixture(x: Tensor, step: Step) -> Prediction:
    """Of four Gaussians of spread 0.1 around the corners of a square."""
    variance = (0.1 * step.alpha) ** 2 + step.sigma**2
    away = x[:, None] - step.alpha * CENTRES
    weights = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)
    middle = weights @ CENTRES
    clean = middle + 0.01 * step.alpha / variance * (x - step.alpha * middle)
    return Prediction(clean, (x - step.alpha * clean) / step.sigma)


def pulled_right(pull: Callable[..., Tensor], scale: float = 1.0, count: int = 4000, **options: float) -> Tensor:
    """Points drawn while the loss scale * (x[0] - 1)^2 of the clean point is made smaller."""
    generator = torch.Generator().manual_seed(0)

    def fresh() -> Tensor:
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def uphill(clean: Tensor) -> Tensor:
        return scale * torch.stack([2 * (1 - clean[:, 0]), 0 * clean[:, 0]], 1)

    return guided_sample(denoise_mixture, DIFFUSION, fresh(), uphill, pull, fresh, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pull", "right"),
    [
        (dynamic_scale(0.0), 0.51),
        (variance_scale(1.0), 0.99),
        (variance_scale(5.0), 1.0),
        (dynamic_scale(0.05), 0.77),
        (dynamic_scale(0.1), 0.92),
        (dynamic_scale(0.3), 1.0),
    ],
)
def test_a_property_is_met_and_what_it_leaves_free_stays_free(pull: Callable[..., Tensor], right: float) -> None:
    x = pulled_right(pull)
    assert float((x[:, 0] > 0).double().mean()) == pytest.approx(right, abs=0.02)
    assert float((x[:, 1] > 0).double().mean()) == pytest.approx(0.504, abs=0.001)
    assert float((x[:, None] - CENTRES).norm(dim=-1).amin(1).max()) < 0.5


def test_too_much_strength_narrows_what_is_drawn() -> None:
    spread = [
        float(x[x[:, 0] > 0, 0].std()) for x in (pulled_right(dynamic_scale(0.0)), pulled_right(dynamic_scale(1.0)))
    ]
    assert spread == pytest.approx([0.0926, 0.0223], abs=0.002)


def test_without_the_samplers_noise_the_ratio_does_little() -> None:
    assert float((pulled_right(dynamic_scale(0.1), eta=0.0)[:, 0] > 0).double().mean()) < 0.55


def test_the_ratio_knows_no_units_and_the_static_scale_does() -> None:
    few = {"count": 50}
    assert (
        pulled_right(dynamic_scale(0.1), 1000.0, **few) - pulled_right(dynamic_scale(0.1), **few)
    ).abs().max() < 1e-6
    static = pulled_right(variance_scale(1.0), **few)
    assert (pulled_right(variance_scale(1e-3), 1000.0, **few) - static).abs().max() < 1e-12
    assert (pulled_right(variance_scale(1.0), 1000.0, **few) - static).abs().max() > 0.1


def test_the_length_of_a_pull() -> None:
    generator = torch.Generator().manual_seed(0)
    move, gradient = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    step = DIFFUSION[100]
    pull = dynamic_scale(0.3)(move, gradient, step)
    assert torch.allclose(norm(pull), 0.3 * norm(move), rtol=1e-12)
    assert torch.allclose(dot(pull, gradient), 0.3 * (norm(move) * norm(gradient)).flatten(), rtol=1e-12)
    by_channel = dynamic_scale(0.3, per_channel=True)(move, gradient, step)
    assert torch.allclose(by_channel.norm(dim=(2, 3)), 0.3 * move.norm(dim=(2, 3)), rtol=1e-12)
    gradient[1] = 0
    assert not dynamic_scale(0.3)(move, gradient, step)[1].any()
    assert torch.equal(variance_scale(2.0)(move, gradient, step), 2 * step.ancestral_std**2 * gradient)


def test_the_first_steps_are_made_again_at_the_same_level() -> None:
    seen: list[float] = []

    def denoise(x: Tensor, step: Step) -> Prediction:
        seen.append(step.alpha)
        return denoise_mixture(x, step)

    steps = DIFFUSION[::20]
    noise = torch.randn(2, 2, dtype=torch.float64)
    guided_sample(denoise, steps, noise, torch.zeros_like, dynamic_scale(0.1), lambda: noise, repeats=3)
    assert seen == [step.alpha for i, step in enumerate(steps) for _ in range(3 if i < 3 else 1)]


# Pipelines.

FAMILIES = {
    "stable-diffusion": None,
    "pixels": lambda folder: test_pixels.build(folder / "model"),
    "dit": lambda folder: test_dit.build(folder / "model"),
    "pixart": test_pixart.build,
    "sana": save_sana,
    "sdxl": test_sdxl.saved,
    "sd3": lambda folder: save_sd3(folder, SD3),
    "flux": lambda folder: save_flux(folder, guidance_embeds=True),
}
PROMPTS = ["a cat", "a dog"]
FEW = {"num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_guided(family: str, pipeline_folder: Path, tmp_path: Path) -> None:
    build = FAMILIES[family]
    model = load_model(build(tmp_path) if build else pipeline_folder)
    if family == "flux":
        model.set_size(16, 16)  # its own is 256
    plain = model.sample_tensors(PROMPTS, [0, 1], model.schedule(4), 2.0)
    still = sample_guided(model, "brightness", PROMPTS, "pgdiff_dynamic(strength=0, eta=0)", **FEW)
    assert torch.equal(still.images, plain)
    assert torch.allclose(still.rewards[0], load_reward("brightness")(plain, PROMPTS), atol=1e-6)
    assert still.queries == 2 * 4 + 2
    noisy, bright = (
        sample_guided(model, "brightness", PROMPTS, f"pgdiff_dynamic(strength={strength})", **FEW)
        for strength in (0, 0.5)
    )
    assert (bright.rewards > noisy.rewards).all()
    static = sample_guided(model, "brightness", PROMPTS, "classifier_style(strength=100)", **FEW)
    assert (static.rewards > noisy.rewards).all()
    assert static.queries == noisy.queries
    ahead = sample_guided(
        model, "brightness", PROMPTS, "gradient_guidance(target_increase=0.02, sigma=0.01, rounds=2)", **FEW
    )
    assert torch.allclose(ahead.rewards[0], still.rewards[0], atol=1e-6)
    assert (ahead.rewards[2] > ahead.rewards[0]).all()
    assert ahead.queries == 2 * (2 + 3)


def test_the_slope_is_that_of_the_decoder_by_hand(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder)
    weights = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    reward = load_reward(lambda images, prompts: (images * weights).sum((1, 2, 3)))
    latents = model.noise(torch.Generator().manual_seed(1), 2)
    slope = RewardGradientFn(model, reward, PROMPTS)
    leaf = latents.clone().requires_grad_()
    picture = model.pipeline.vae.decode(leaf / 0.7).sample / 2 + 0.5
    (expected,) = torch.autograd.grad((picture * weights).sum(), leaf)
    assert (slope(latents) - expected).norm() < 1e-5 * expected.norm()
    assert slope.queries == 2


def test_a_picture_depends_on_its_own_seed_alone(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder)
    for method in ("pgdiff_dynamic", "gradient_guidance(rounds=1, resample_noise=True, eta=1)"):
        both = sample_guided(model, "brightness", PROMPTS, method, seeds=[5, 6], **FEW).images
        alone = sample_guided(model, "brightness", PROMPTS, method, seeds=[5, 6], batch_size=1, **FEW).images
        assert torch.allclose(both, alone, atol=1e-5)
        assert (both[0] - both[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["stable-diffusion", "sd3"])
def test_the_lora_that_look_ahead_trains(family: str, pipeline_folder: Path, tmp_path: Path) -> None:
    build = FAMILIES[family]
    folder = build(tmp_path) if build else pipeline_folder
    model = load_model(folder)
    plain = "gradient_guidance(target_increase=0.02, sigma=0.01, rounds=3"
    free = sample_guided(model, "brightness", PROMPTS, f"{plain})", **FEW)
    tuned = sample_guided(model, "brightness", PROMPTS, f"{plain}, finetune_from_round=2, learning_rate=0.01)", **FEW)
    # Rounds 2 and 3 train; the first that shows it is round 3.
    assert torch.allclose(tuned.rewards[:3], free.rewards[:3], atol=1e-6)
    assert (tuned.rewards[3] - free.rewards[3]).abs().max() > 1e-5
    assert tuned.queries == free.queries
    learned = lora_parameters(model)
    moved = [p.abs().max().item() for name, p in learned.items() if ".lora_B." in name]
    assert max(moved) == pytest.approx(0.02, rel=0.3)  # two steps of Adam
    save_lora(model, tmp_path / "lora")
    again = load_model(folder)
    load_lora(again, tmp_path / "lora")
    drawn_by = [m.sample_tensors(PROMPTS, [0, 1], m.schedule(4), 2.0) for m in (model, again, load_model(folder))]
    assert torch.allclose(drawn_by[0], drawn_by[1], atol=1e-4)
    assert (drawn_by[0] - drawn_by[2]).abs().max() > 1e-3
    with raises(DraftuneError, "LoRA already"):
        sample_guided(model, "brightness", PROMPTS, f"{plain}, finetune_from_round=1)", **FEW)


def test_what_is_trained_on_becomes_likelier(pipeline_folder: Path) -> None:
    model = load_model(pipeline_folder)
    schedule = model.schedule(8)
    fit = fresh_lora(model, schedule, 0.1)
    clean = 2 * model.noise(torch.Generator().manual_seed(0), 2)

    def loss() -> float:
        fit.generator.manual_seed(1)
        return fit(model.denoiser_for(PROMPTS, schedule, 1), clean)

    losses = [loss() for _ in range(30)]
    assert losses[-1] < 0.93 * losses[0]  # the same levels and noise every time
    with raises(DraftuneError, "learning_rate"):
        fit(model.denoiser_for(PROMPTS, schedule, 1), clean / 0)


# Properties as rewards.


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    to_pil(images)[0].save(tmp_path / "picture.png")
    half = torch.zeros(1, 3, 8, 8)
    half[..., 4:] = 1
    to_pil(half)[0].save(tmp_path / "mask.png")
    Image.new("L", (8, 8), "white").save(tmp_path / "white.png")
    return tmp_path / "picture.png"


def test_pixels_under_a_mask_are_free(picture: Path) -> None:
    target = open_image(picture)
    images = torch.rand(2, 3, 8, 8).requires_grad_()
    reward = load_reward(f"image_match(image='{picture}', mask='{picture.parent}/mask.png')")
    score = reward(images, PROMPTS)
    assert torch.allclose(score, -(images - target)[..., :4].square().mean((1, 2, 3)), atol=1e-6)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert not gradient[..., 4:].any()
    assert gradient[..., :4].all()
    whole = load_reward(f"image_match(image='{picture}')")(images, PROMPTS)
    assert torch.allclose(whole, load_reward(f"image_similarity(image='{picture}')")(images, PROMPTS), atol=1e-6)


def test_greys_and_colours(picture: Path) -> None:
    target = open_image(picture)
    images = torch.rand(2, 3, 8, 8)
    grey = load_reward(f"image_match(image='{picture}', property=gray)")
    assert torch.allclose(grey(images, PROMPTS), -(images - target).mean(1).square().mean((1, 2)), atol=1e-6)
    swapped = target[:, [1, 2, 0]]
    assert float(grey(swapped, ["a"])) == pytest.approx(0, abs=1e-7)
    colors = load_reward(f"image_match(image='{picture}', property=colors)")
    shuffled = target.flatten(2)[..., torch.randperm(64)].reshape(target.shape)
    assert float(colors(shuffled, ["a"])) == pytest.approx(0, abs=1e-7)
    # Half the mean squared distance to the picture recoloured by AdaIN, which moves means and spreads alone.
    mean, std = ((f(images, (2, 3)), f(target, (2, 3))) for f in (lambda x, d: x.mean(d), lambda x, d: x.std(d, False)))
    recoloured = (images - mean[0][..., None, None]) / std[0][..., None, None] * std[1][..., None, None]
    recoloured = recoloured + mean[1][..., None, None]
    expected = -(images - recoloured).square().mean((1, 2, 3)) / 2
    assert torch.allclose(colors(images, PROMPTS), expected, atol=1e-5)
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(colors(flat, ["a"]).sum(), flat)
    assert gradient.isfinite().all()


def test_a_picture_is_filled_in_where_the_mask_is_white(pipeline_folder: Path, tmp_path: Path) -> None:
    model = load_model(pipeline_folder)
    known = model.sample_tensors(["a cat"], [3], model.schedule(8), 2.0)
    size = known.shape[-1]
    to_pil(known)[0].save(tmp_path / "known.png")
    mask = torch.zeros(1, 3, size, size)
    mask[..., size // 2 :] = 1
    to_pil(mask)[0].save(tmp_path / "mask.png")
    reward = f"image_match(image='{tmp_path}/known.png', mask='{tmp_path}/mask.png')"
    options = {"seeds": [0], "num_inference_steps": 8, "guidance_scale": 2.0}
    free, met = (sample_guided(model, reward, "a cat", f"pgdiff_dynamic(strength={s})", **options) for s in (0, 0.3))
    assert float(met.rewards[-1]) > 0.5 * float(free.rewards[-1])


# The command, and what is refused.


def test_the_command(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sample", str(pipeline_folder), "--prompt", "cat", "--num-inference-steps", "3", "--guidance-scale", "1"]
    guide = [
        "--guidance-reward",
        "-brightness",
        "--guidance-method",
        "gradient_guidance(target_increase=1, sigma=0.01, rounds=2)",
    ]
    assert main([*asked, *guide, "--seed", "4", "--output", str(tmp_path / "cat.png")]) == 0
    said = capsys.readouterr().out
    values = re.fullmatch(r"-brightness  (\S+) → (\S+) → (\S+); 5 .*\n.*cat.png\n", said)
    assert values, said
    assert float(values[3]) > float(values[1])
    model = load_model(pipeline_folder)
    found = draftune.sample_guided(
        model, "-brightness", "cat", guide[-1], seeds=[4], num_inference_steps=3, guidance_scale=1.0
    )
    assert (open_image(tmp_path / "cat.png") - found.images).abs().max() <= 0.51 / 255
    assert f"{float(found.rewards[-1]):.3f}" == values[3]


def test_the_command_with_a_sum_and_its_prompts(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward that reads prompts: one prompt's pictures are to be bright, the other's dark."""
    (tmp_path / "named.py").write_text(
        "def named(images, prompts):\n"
        "    signs = images.new_tensor([1 if prompt == 'day' else -1 for prompt in prompts])\n"
        "    return signs * images.mean((1, 2, 3))\n"
    )
    guide = f"'{tmp_path}/named.py:named' + 0.1*saturation"
    scores = {}
    for strength in (0, 0.5):
        for prompt in ("day", "night"):
            asked = [
                "--prompt",
                prompt,
                "--num-inference-steps",
                "4",
                "--guidance-scale",
                "1",
                "--guidance-reward",
                guide,
            ]
            output = tmp_path / f"{prompt}-{strength}.png"
            method = ["--guidance-method", f"pgdiff_dynamic(strength={strength})"]
            assert main(["sample", str(pipeline_folder), *asked, *method, "--output", str(output)]) == 0
            assert mentions(capsys.readouterr().out, 5)
            scores[prompt, strength] = float(open_image(output).mean())
    assert scores["day", 0.5] > scores["day", 0] + 0.01
    assert scores["night", 0.5] < scores["night", 0] - 0.01


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guidance-reward", "brightnes"], "'brightnes' 'brightness'"),
        (["--guidance-reward", "brightness", "--guidance-method", "pgdiff"], "'pgdiff' 'pgdiff_dynamic'"),
        (
            ["--guidance-reward", "brightness", "--guidance-method", "pgdiff_dynamic(strength=-1)"],
            "strength pgdiff_dynamic -1 0",
        ),
        (["--guidance-reward", "brightness", "--guidance-method", "pgdiff_dynamic(eta=2)"], "eta pgdiff_dynamic 0 1 2"),
        (["--guidance-reward", "brightness", "--guidance-method", "classifier_style"], "classifier_style strength"),
        (
            ["--guidance-reward", "brightness", "--guidance-method", "gradient_guidance(rounds=0)"],
            "rounds gradient_guidance 0 1",
        ),
        (
            ["--guidance-reward", "brightness", "--guidance-method", "gradient_guidance(finetune_from_round=9)"],
            "finetune_from_round gradient_guidance 9 0",
        ),
        (
            ["--guidance-reward", "brightness", "--guidance-method", "pgdiff_dynamic + classifier_style"],
            "pgdiff_dynamic + classifier_style",
        ),
        (["--guidance-method", "classifier_style(strength=1)"], "--guidance-method --guidance-reward"),
    ],
)
def test_mistakes_are_told_before_a_model_is_read(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "nowhere", "--prompt", "cat", "--output", str(tmp_path / "a.png"), *flags]) == 2
    assert mentions(capsys.readouterr().err, words)


def test_what_can_not_guide_is_refused(pipeline_folder: Path, picture: Path) -> None:
    model = load_model(pipeline_folder)
    for reward, words in (
        (lambda images, prompts: (images * 255).round().mean((1, 2, 3)), "gradient"),
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "gradient"),
        (lambda images, prompts: images.mean((1, 2, 3)) / 0, "guid"),
    ):
        with raises(DraftuneError, words):
            sample_guided(model, reward, "cat", **FEW)
    with raises(DraftuneError, "white.png"):
        load_reward(f"image_match(image='{picture}', mask='{picture.parent}/white.png')")
    with raises(DraftuneError, "'grey' 'gray'"):
        load_reward(f"image_match(image='{picture}', property=grey)")
    model.to("cpu", "fp16")
    with raises(DraftuneError, "fp16"):
        sample_guided(model, "brightness", "cat", **FEW)
    assert load_guide("pgdiff_dynamic").num_samplings == 1
    assert load_guide("gradient_guidance(rounds=3)").num_samplings == 4
