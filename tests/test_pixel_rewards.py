"""Rewards of plain arithmetic, the robust wrapper, and scoring in chunks: against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import normalized_weights
from draftune.rewards import Reward, WeightedSum, load_reward
from draftune.utils.images import from_pil
from draftune.utils.memory import PeakMemory
from helpers.errors import raises

CAT = Image.fromarray(skimage.data.cat()).resize((48, 48))


def score(text: str, *pictures: Image.Image) -> list[float]:
    return load_reward(text)(torch.cat([from_pil(p) for p in pictures]), [""] * len(pictures)).tolist()


def test_symmetry_is_the_correlation_with_the_mirror_image() -> None:
    array = np.asarray(CAT, dtype=float)
    array = array - array.mean((0, 1))
    for axis, turned in (("vertical", array[:, ::-1]), ("horizontal", array[::-1])):
        wanted = np.corrcoef(array.ravel(), turned.ravel())[0, 1]
        assert score(f"symmetry(axis={axis})", CAT)[0] == pytest.approx(wanted, abs=1e-5)
    both = Image.fromarray(np.concatenate([np.asarray(CAT), np.asarray(CAT)[:, ::-1]], 1))
    assert score("symmetry", both)[0] == pytest.approx(1, abs=1e-5)
    assert score("-1*symmetry", both)[0] == pytest.approx(-1, abs=1e-5)
    assert score("symmetry", Image.new("RGB", (8, 8), "red")) == [0.0]


def test_rotation_is_the_correlation_with_the_turned_copy() -> None:
    wide = Image.fromarray(np.pad(np.asarray(CAT), ((0, 0), (7, 7), (0, 0))))
    array = np.asarray(CAT, dtype=float)
    array = array - array.mean((0, 1))
    for angle in (90, 180, 270):
        wanted = np.corrcoef(array.ravel(), np.rot90(array, angle // 90).ravel())[0, 1]
        for picture in (CAT, wide):
            assert score(f"rotation(angle={angle})", picture)[0] == pytest.approx(wanted, abs=1e-5)
    ramp = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8))
    assert score("rotation", ramp)[0] == pytest.approx(-1, abs=1e-3)
    with raises(DraftuneError, "90 180 270 45"):
        load_reward("rotation(angle=45)")


def test_brightness_and_saturation_of_known_colours() -> None:
    red, grey, white = (Image.new("RGB", (5, 4), c) for c in ("#ff0000", "#808080", "#ffffff"))
    assert score("brightness", red, grey, white) == pytest.approx([0.299, 128 / 255, 1])
    assert score("saturation", red, grey, white) == pytest.approx([1, 0, 0])


def test_sharpness_is_the_mean_squared_laplacian() -> None:
    spot = np.zeros((5, 5), dtype=np.uint8)
    spot[2, 2] = 255
    # Of the 25 pixels the spot has -4 and its four neighbours 1.
    assert score("sharpness", Image.fromarray(spot)) == pytest.approx([(16 + 4) / 25])
    assert score("sharpness", Image.new("RGB", (1, 50), "red")) == pytest.approx([0], abs=1e-12)
    assert score("sharpness", CAT)[0] > 2 * score("sharpness", CAT.resize((12, 12)).resize((48, 48)))[0]


def test_color_is_the_distance_to_it() -> None:
    orange = Image.new("RGB", (4, 4), "orange")
    assert score("color(target=orange)", orange)[0] == pytest.approx(0, abs=1e-12)
    assert score("color(target='#000000')", Image.new("RGB", (4, 4), "white"))[0] == pytest.approx(-1)
    with raises(DraftuneError, "oranje"):
        load_reward("color(target=oranje)")
    with raises(DraftuneError, "color target"):
        load_reward("color")


def test_reference_by_pixels_and_by_clip(tmp_path: Path) -> None:
    CAT.save(tmp_path / "cat.png")
    coffee = Image.fromarray(skimage.data.coffee()).resize((48, 48))
    by_pixels = f"image_similarity(image='{tmp_path / 'cat.png'}')"
    wanted = -np.square((np.asarray(CAT, dtype=float) - np.asarray(coffee, dtype=float)) / 255).mean()
    assert score(by_pixels, CAT, coffee) == pytest.approx([0, wanted], abs=1e-6)
    assert score(by_pixels, CAT.resize((20, 31), Image.Resampling.BICUBIC))[0] == pytest.approx(0, abs=1e-9)
    by_clip = score(f"image_similarity(image='{tmp_path / 'cat.png'}', model=emoji_clip)", CAT, coffee)
    assert by_clip[0] == pytest.approx(1, abs=1e-5)
    assert by_clip[1] < 0.99
    with raises(DraftuneError, "nowhere.png"):
        load_reward("image_similarity(image='nowhere.png')")


class Bowl(Reward):
    """-||x||^2 / 2, whose gradient is -x: at the locally worst picture x grows by rho."""

    label = "bowl"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -images.square().sum((1, 2, 3)) / 2


def test_robust_scores_the_locally_worst_picture() -> None:
    from draftune.rewards.sharpness_aware import SharpnessAware

    images = (torch.rand(3, 3, 6, 6) + 0.1).requires_grad_()
    norm = images.detach().flatten(1).norm(dim=1)
    reward = load_reward(SharpnessAware(Bowl(), rho=0.25) + 2 * Bowl())
    scores, parts = reward.components(images, [""] * 3)
    assert torch.allclose(scores, -((norm + 0.25) ** 2) / 2 - norm**2, rtol=1e-5)
    assert list(parts) == ["sharpness_aware(bowl)", "bowl"]
    scores.sum().backward()
    # The way to the worse picture is held fixed.
    unit = images.detach() / norm[:, None, None, None]
    assert images.grad is not None
    assert torch.allclose(images.grad, -(images.detach() + 0.25 * unit) - 2 * images.detach(), rtol=1e-4)
    alone = load_reward("sharpness_aware(brightness + 2*saturation, rho=0.5)")
    assert alone.expression == "sharpness_aware(brightness + 2*saturation, rho=0.5)"
    with torch.no_grad():
        total, parts = alone.components(images.detach(), [""] * 3)
    assert list(parts) == ["sharpness_aware_brightness", "sharpness_aware_saturation"]
    assert (total < load_reward("brightness + 2*saturation")(images.detach(), [""] * 3)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robust", "unknown reward known"),
        ("sharpness_aware(rho=1)", "sharpness_aware reward"),
        ("sharpness_aware(brightness, rho=0)", "rho sharpness_aware 0"),
        ("sharpness_aware(britness)", "'britness' 'brightness'"),
        ("brightness(saturation)", "brightness saturation"),
    ],
)
def test_wrappers_that_are_refused(text: str, message: str) -> None:
    with raises(DraftuneError, message):
        load_reward(text)


class Network(Reward):
    """A network with activations worth saving."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(6)]
        self.layers = nn.Sequential(*(m for layer in layers for m in (layer, nn.SiLU())))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.layers(images).square().mean((1, 2, 3))


def test_chunks_change_neither_scores_nor_gradients() -> None:
    images, weights = torch.rand(7, 3, 16, 16), torch.arange(7.0)
    gradients = []
    for size in (1, 3, 7):
        reward = load_reward(Network() + 0.5 * Bowl())
        reward.set_chunk_size(size)
        x = images.clone().requires_grad_()
        (reward(x, [""] * 7) * weights).sum().backward()
        gradients.append(x.grad)
    plain = images.clone().requires_grad_()
    scores = Network().score(plain, []) + 0.5 * Bowl().score(plain, [])
    (scores * weights).sum().backward()
    for gradient in gradients:
        assert torch.allclose(gradient, plain.grad, rtol=1e-5, atol=1e-8)


def test_memory_is_that_of_one_chunk() -> None:
    peaks = {}
    for size, count in ((2, 2), (2, 16), (16, 16)):
        reward, images = load_reward(Network()), torch.rand(count, 3, 32, 32, requires_grad=True)
        reward.set_chunk_size(size)
        with PeakMemory() as memory:
            reward(images, [""] * count).sum().backward()
        peaks[size, count] = memory.peak - 3 * images.nbytes
    assert peaks[2, 16] < 1.2 * peaks[2, 2]
    assert peaks[16, 16] > 6 * peaks[2, 16]


def test_normalised_parts_have_spread_one() -> None:
    images = torch.rand(12, 3, 8, 8) * torch.linspace(0.2, 1, 12)[:, None, None, None]
    reward = load_reward("brightness - 3*sharpness")
    weights = normalized_weights(reward, images, [""] * 12)
    even = WeightedSum([(weight, part) for weight, (_, part) in zip(weights, reward.terms, strict=True)])
    _, parts = reward.components(images, [""] * 12)
    wanted = parts["brightness"] / parts["brightness"].std() - 3 * parts["sharpness"] / parts["sharpness"].std()
    assert torch.allclose(even(images, [""] * 12), wanted, rtol=1e-4)
    again = load_reward(even.expression)
    assert torch.allclose(again(images, [""] * 12), wanted, rtol=1e-4)
    with raises(DraftuneError, "color 3"):
        normalized_weights(load_reward("color(target=red)"), torch.zeros(3, 3, 4, 4), [""] * 3)
