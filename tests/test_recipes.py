"""The recipes of the embedded models: their functions without a training run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes" / "emoji"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports a module of the recipes by its name, which is not kept."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(RECIPES)
    yield import_module
    for path in RECIPES.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def test_standardized_latents_decode_to_the_same_images(recipe: Callable[[str], ModuleType]) -> None:
    autoencoder = recipe("autoencoder")
    torch.manual_seed(0)
    vae = autoencoder.AutoencoderKL(**autoencoder.CONFIG).eval()
    images = torch.rand(3, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.bias.add_(torch.randn(16))
        before = vae.encode(images).latent_dist
        expected = vae.decode(before.mean).sample
        autoencoder.standardize(vae, images)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, expected, atol=1e-4, rtol=1e-4)
    std = before.mean.std((0, 2, 3))
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-3, rtol=1e-3)


def test_min_snr_weights_are_those_of_v_prediction(recipe: Callable[[str], ModuleType]) -> None:
    alphas_cumprod = torch.tensor([0.999, 0.9, 0.5, 0.0])
    snr = alphas_cumprod / (1 - alphas_cumprod)
    expected = (snr + 1).clamp(max=5) / (snr + 1)
    torch.testing.assert_close(recipe("text2image").min_snr_weights(alphas_cumprod, 5.0), expected)


def test_the_tokenizer_is_the_same_in_every_call(recipe: Callable[[str], ModuleType]) -> None:
    build = recipe("tokenizer").build_tokenizer
    names = (RECIPES.parents[1] / "src/draftune/assets/names-other.txt").read_text(encoding="utf-8").split("\n")
    vocabularies = [build(names, ("noto", "twemoji", "3d")).get_vocab() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1]


def test_edge_energy_counts_both_directions(recipe: Callable[[str], ModuleType]) -> None:
    rows = torch.tensor([-1.0, 1.0]).repeat(4)[:, None].expand(1, 3, 8, 8)
    assert recipe("common").edge_energy(rows) == 4
    assert recipe("common").edge_energy(rows * rows.mT) == 8


def test_hinge_loss_has_margins_of_1(recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    discriminator = recipe("perceptual").PatchDiscriminator()
    monkeypatch.setattr(discriminator, "forward", lambda images: images)
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.25]])
    assert discriminator.loss(real, fake) == pytest.approx(0.25 + 0.625)


def test_damage_of_strength_0_is_none_and_of_strength_1_is_visible(recipe: Callable[[str], ModuleType]) -> None:
    augment = recipe("augment")
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    for change in (augment.coarse, augment.noisy, augment.tinted, augment.smeared, augment.patched):
        unchanged, changed = (change(images, torch.full((4, 1, 1, 1), amount)) for amount in (0.0, 1.0))
        torch.testing.assert_close(unchanged, images, atol=1e-5, rtol=0)
        assert (changed - images).abs().mean() > 0.05


def test_targets_of_a_batch(recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Intact images have the target of their style, over-optimized ones the least, damaged ones less by strength."""
    aesthetic = recipe("aesthetic")
    monkeypatch.setattr(aesthetic, "augmented", lambda x, strength: x)
    monkeypatch.setattr(aesthetic, "damaged", lambda x: (x, torch.full((len(x),), 0.5)))
    styles = torch.tensor([3.0, 8.0])
    images = styles.view(1, 2, 1, 1, 1).expand(5, 2, 3, 4, 4) / 10
    exploited = torch.full((7, 4, 4, 3), 255, dtype=torch.uint8)
    for worst, count in ((exploited, 20), (exploited[:0], 0)):
        x, y = aesthetic.pick(images, styles, worst, 100)
        own = x[:, 0, 0, 0] * 10
        kept = (100 - count) // 2
        torch.testing.assert_close(y[:kept], own[:kept])
        assert (own[kept : kept + count] == 10).all()
        assert (y[kept : kept + count] == 1).all()
        torch.testing.assert_close(y[kept + count :], (own[kept + count :] + 1) / 2)


def test_scores_are_bounded(recipe: Callable[[str], ModuleType]) -> None:
    torch.testing.assert_close(
        recipe("aesthetic").bounded(torch.tensor([-99.0, 0.0, 99.0])), torch.tensor([0.0, 5, 10])
    )


def test_the_judge_and_the_rewards_share_no_over_optimized_image(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    exploit = recipe("exploit")
    (tmp_path / "exploited").mkdir()
    assert [len(exploit.load_exploited(tmp_path, judge)) for judge in (True, False)] == [0, 0]
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 128, 128, 3).numpy()
    rewards = ["emoji_aesthetic"] * 4 + ["emoji_clip"] * 4
    numpy.savez(tmp_path / "exploited" / "round-1.npz", images=images, rewards=rewards)
    numbers = [exploit.load_exploited(tmp_path, judge)[:, 0, 0, 0].tolist() for judge in (True, False)]
    assert numbers == [[0, 4], [1, 2, 3, 5, 6, 7]]
    assert exploit.load_exploited(tmp_path, False, exploit.DAMAGING)[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert exploit.sample_exploited(exploit.load_exploited(tmp_path), 5).shape == (5, 3, 128, 128)


def test_the_demo_reaches_its_limits_with_the_weights_of_the_package(recipe: Callable[[str], ModuleType]) -> None:
    demo = recipe("demo")
    measured = json.loads((RECIPES / "demo.json").read_text(encoding="utf-8"))
    assert measured["weights"] == demo.digest(), "the weights changed: measure again, see recipes/emoji/demo.py"
    limits = demo.limits(measured["rows"])
    assert [name for name, (value, limit) in limits.items() if not demo.met(name, value, limit)] == []


def test_the_distance_of_images_is_that_of_kid_without_its_correction(recipe: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 8), torch.randn(7, 8)
    squared_mmd = recipe("demo").squared_mmd
    pairs = [(a @ b / 8 + 1) ** 3 for first, second in ((x, x), (y, y), (x, y)) for a in first for b in second]
    expected = sum(pairs[:25]) / 25 + sum(pairs[25:74]) / 49 - 2 * sum(pairs[74:]) / 35
    assert squared_mmd(x, y) == pytest.approx(float(expected), abs=1e-5)
    assert squared_mmd(x, x) == pytest.approx(0.0, abs=1e-9)
