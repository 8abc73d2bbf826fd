"""Noise optimisation: its gradient by hand in float64, what it keeps, and its command."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from draftune.cli.main import main
from draftune.errors import DraftuneError
from draftune.guidance.noise_optimization import log_likelihood, optimize_noise
from draftune.lora import add_lora, lora_parameters
from draftune.models import StableDiffusion
from draftune.rewards import load_reward
from draftune.utils.images import open_image
from helpers.errors import mentions, raises

T, GUIDANCE, SEED = 2, 2.0, 4
DRAWN = {"seed": SEED, "num_inference_steps": T, "guidance_scale": GUIDANCE, "negative_prompt": "dog"}
# Whole numbers, so that a reward in float32 still has an exact gradient.
WEIGHTS = torch.randint(-4, 5, (3, 16, 16), generator=torch.Generator().manual_seed(1)).float()


def weighted(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images * WEIGHTS).sum((1, 2, 3))


def gradient_by_hand(model: StableDiffusion, noise: Tensor, regularization: float) -> Tensor:
    """Plain autograd through DDIM and the decoder, and the regulariser's closed form."""
    unet, vae = model.pipeline.unet, model.pipeline.vae
    condition = model.encode(["cat"], "dog", guided=True)
    x = start = noise.clone().requires_grad_()
    for timestep, alpha, sigma, alpha_next, sigma_next, *_ in model.schedule(T).steps:
        negative, positive = unet(torch.cat([x, x]), timestep, encoder_hidden_states=condition).sample.chunk(2)
        output = negative + GUIDANCE * (positive - negative)
        x = alpha_next * (x - sigma * output) / alpha + sigma_next * output
    picture = vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5
    (gradient,) = torch.autograd.grad((picture * WEIGHTS).sum(), start)
    return gradient + regularization * ((noise.numel() - 1) / noise.square().sum() - 1) * noise


@pytest.fixture
def model(pipeline: StableDiffusionPipeline) -> StableDiffusion:
    return StableDiffusion(pipeline, "tiny")


@pytest.mark.parametrize(("steps", "momentum", "limit"), [(1, 0.0, 0.0), (3, 0.9, 0.1)])
def test_the_noise_moves_as_by_hand(
    pipeline: StableDiffusionPipeline, steps: int, momentum: float, limit: float
) -> None:
    for part in (pipeline.unet, pipeline.vae):
        part.double()
    model = StableDiffusion(pipeline, "tiny")
    rate, regularization = (1.0, 10.0) if limit else (1e-3, 10.0)
    found = optimize_noise(
        model,
        weighted,
        "cat",
        **DRAWN,
        steps=steps,
        learning_rate=rate,
        momentum=momentum,
        max_grad_norm=limit,
        regularization=regularization,
    )
    assert found.best_step == steps
    noise = start = model.noise(torch.Generator().manual_seed(SEED), 1)
    velocity = torch.zeros_like(noise)
    for _ in range(steps):
        gradient = gradient_by_hand(model, noise, regularization)
        if limit:
            gradient = gradient * limit / (gradient.norm() + 1e-6)
        velocity = momentum * velocity + gradient
        noise = noise + rate * (gradient + momentum * velocity)
    assert (found.noise - noise).norm() < 1e-11 * (noise - start).norm()
    assert (gradient_by_hand(model, start, 0) - gradient_by_hand(model, start, regularization)).norm() > 1


def test_the_likelihood_of_the_norm_has_its_closed_form() -> None:
    noise = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.3
    noise.requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(noise), noise)
    assert torch.allclose(gradient, (99 / noise.square().sum() - 1) * noise, atol=1e-14)
    mode = noise.detach() / noise.norm().detach() * 99**0.5
    assert all(log_likelihood(mode) > log_likelihood(mode * scale) for scale in (0.99, 1.01))
    radii = torch.tensor([7.0, 9.0, 12.0], dtype=torch.float64)
    ours = torch.stack([log_likelihood(mode / mode.norm() * radius) for radius in radii])
    # The chi distribution's square is a chi-squared one, torch's Gamma(d / 2, 1 / 2); p(r) = 2 r p(r^2).
    density = torch.distributions.Gamma(50.0, 0.5).log_prob(radii.square()) + (2 * radii).log()
    assert torch.allclose(ours.diff(), density.diff(), atol=1e-10)


def test_the_best_picture_is_brighter_and_drawn_from_its_noise(model: StableDiffusion) -> None:
    add_lora(model, 2)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    found = optimize_noise(model, "brightness", "cat", **DRAWN, steps=2, learning_rate=300, regularization=0)
    assert torch.equal(found.first, model.sample_tensors(["cat"], [SEED], model.schedule(T), GUIDANCE, "dog"))
    assert len(found.rewards) == 3
    assert found.rewards[found.best_step] == max(found.rewards) > found.rewards[0] + 0.02
    model.noise = lambda *_: found.noise  # type: ignore[method-assign]
    assert torch.equal(found.best, model.sample_tensors(["cat"], [0], model.schedule(T), GUIDANCE, "dog"))
    score = load_reward("brightness")(torch.cat([found.first, found.best]), ["cat"] * 2).tolist()
    assert score == pytest.approx([found.rewards[0], max(found.rewards)], abs=1e-6)
    after = model.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for part in model.modules for p in part.parameters())
    assert all(p.requires_grad for p in lora_parameters(model).values())


def test_the_same_seed_is_the_same_search(model: StableDiffusion) -> None:
    one, two = (optimize_noise(model, "brightness", "cat", **DRAWN, steps=2) for _ in range(2))
    assert one.rewards == two.rewards
    assert torch.equal(one.noise, two.noise)


def with_terms(terms: Sequence[float]) -> Callable[..., Tensor]:
    """Brightness plus one of these at each call; the first call is the trial."""
    waiting = iter(terms)
    return lambda images, prompts: images.mean((1, 2, 3)) + next(waiting)


def test_the_best_is_kept_wherever_it_was(model: StableDiffusion) -> None:
    worse = optimize_noise(model, with_terms([0, 0, -9, -9]), "cat", **DRAWN, steps=2)
    assert worse.best_step == 0
    assert torch.equal(worse.best, worse.first)
    assert torch.equal(worse.noise, model.noise(torch.Generator().manual_seed(SEED), 1))
    between = optimize_noise(model, with_terms([0, 0, 9, 5, 0]), "cat", **DRAWN, steps=3)
    once = optimize_noise(model, with_terms([0, 0, 9]), "cat", **DRAWN, steps=1)
    assert between.best_step == 1
    assert torch.equal(between.best, once.best)
    assert torch.equal(between.noise, once.noise)


def test_what_cannot_be_climbed_is_refused(model: StableDiffusion) -> None:
    slopes = iter([1.0, 1.0, float("nan")])

    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) + ((images - images.detach()) * next(slopes)).nan_to_num().sum((1, 2, 3))

    cases: dict[str, Callable[..., Tensor]] = {
        "gradient <lambda>": lambda images, prompts: images.detach().mean((1, 2, 3)),
        "gradient 1": lambda images, prompts: images.round().mean((1, 2, 3)),
        "reward nan step 1": with_terms([0, 0, float("nan")]),
        "gradient nan step 1": broken,
    }
    for message, reward in cases.items():
        with raises(DraftuneError, message):
            optimize_noise(model, reward, "cat", **DRAWN, steps=3)


def test_the_command(pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [
        str(pipeline_folder),
        "--prompt",
        "cat",
        "--seed",
        "5",
        "--num-inference-steps",
        "2",
        "--negative-prompt",
        "dog",
    ]
    command = [
        "optimize-noise",
        *drawn,
        "--reward",
        "-2*brightness",
        "--steps",
        "2",
        "--learning-rate",
        "100",
        "--output",
    ]
    assert main([*command, str(tmp_path / "both.png")]) == 0
    line, path = capsys.readouterr().out.splitlines()
    label, before, after = re.match(r"(\S+)  (\S+) → (\S+)  at step [12] of 2; 3 reward queries", line).groups()
    assert (label, path) == ("-2*brightness", str(tmp_path / "both.png"))
    assert float(after) > float(before) + 0.05
    with Image.open(tmp_path / "both.png") as sheet:
        assert sheet.width > 2 * 128 > sheet.height
    assert main([*command, str(tmp_path / "apart")]) == 0
    assert main(["sample", *drawn, "--output", str(tmp_path / "plain.png")]) == 0
    pictures = {name: open_image(tmp_path / name) for name in ("apart/before.png", "apart/after.png", "plain.png")}
    assert torch.equal(pictures["apart/before.png"], pictures["plain.png"])
    score = load_reward("-2*brightness")
    for name, printed in (("apart/before.png", before), ("apart/after.png", after)):
        assert float(score(pictures[name], ["cat"])) == pytest.approx(float(printed), abs=2e-3)


def test_mistakes_get_one_line_and_code_2(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def flat(images, prompts):\n    return images.round().mean((1, 2, 3))\n")
    command = ["optimize-noise", str(pipeline_folder), "--prompt", "cat", "--num-inference-steps", "1"]
    rewarded = [*command, "--reward", "brightness", "--output", str(tmp_path / "x.png")]
    cases = {
        "flat gradient": [*rewarded, "--reward", f"{tmp_path}/mine.py:flat"],
        "'brightnes' 'brightness'": [*rewarded, "--reward", "brightnes"],
        "--steps 0": [*rewarded, "--steps", "0"],
        "--learning-rate inf": [*rewarded, "--learning-rate", "inf"],
        "--output .png x.jpg": [*rewarded, "--output", "x.jpg"],
        "--reward": [*command, "--output", str(tmp_path / "x.png")],
        f"LoRA {tmp_path}": [*rewarded[:1], str(tmp_path), *rewarded[2:]],
    }
    for message, argv in cases.items():
        code = main(argv)
        # Progress bars stand on lines of their own.
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftune: ")]
        assert (code, len(lines)) == (2, 1), (argv, lines)
        assert mentions(lines[0], message), (message, lines[0])
    assert not (tmp_path / "x.png").exists()
