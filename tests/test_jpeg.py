"""The JPEG reward against PIL's JPEG, on photographs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.rewards import load_reward
from draftune.rewards.jpeg import CHROMINANCE, LUMINANCE, JPEGCompressibility, quantization_table, soft_round
from draftune.utils.images import from_pil, to_pil
from helpers.errors import raises


def photographs() -> list[Image.Image]:
    """100 pictures of 64x64: crops of photographs at several scales."""
    pictures = []
    rng = np.random.default_rng(0)
    for photo in (skimage.data.astronaut(), skimage.data.cat(), skimage.data.coffee(), skimage.data.rocket()):
        image = Image.fromarray(photo)
        for size in rng.integers(48, min(image.size), 25):
            left, top = (int(rng.integers(0, side - size + 1)) for side in image.size)
            crop = image.crop((left, top, left + int(size), top + int(size)))
            pictures.append(crop.resize((64, 64), Image.Resampling.LANCZOS))
    return pictures


def jpeg_bytes(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


PHOTOGRAPHS = photographs()
IMAGES = torch.cat([from_pil(image) for image in PHOTOGRAPHS])


@pytest.mark.parametrize("quality", [20, 50, 80, 95])
def test_tables_are_those_that_pil_writes(quality: int) -> None:
    with Image.open(io.BytesIO(jpeg_bytes(PHOTOGRAPHS[0], quality))) as image:
        written: dict[int, list[int]] = image.quantization  # type: ignore[attr-defined]
    for table, text in enumerate((LUMINANCE, CHROMINANCE)):
        assert sorted(written[table]) == sorted(quantization_table(text, quality).int().flatten().tolist())


@pytest.mark.parametrize("quality", [20, 50, 80])
def test_round_trip_is_that_of_pil(quality: int) -> None:
    ours = JPEGCompressibility(quality).round_trip(IMAGES)
    theirs = torch.cat([from_pil(Image.open(io.BytesIO(jpeg_bytes(image, quality)))) for image in PHOTOGRAPHS])
    # libjpeg rounds to integers in between and smooths the chroma a little differently.
    assert (ours.clamp(0, 1) - theirs).abs().mean() < 1.5 / 255
    assert (ours.clamp(0, 1) - theirs).abs().mean() < 0.35 * (IMAGES - theirs).abs().mean()


def test_reward_ranks_pictures_as_the_size_of_their_files() -> None:
    for quality in (10, 50, 80):
        sizes = [len(jpeg_bytes(image, quality)) for image in PHOTOGRAPHS]
        scores = load_reward(f"jpeg_incompressibility(quality={quality})")(IMAGES, [""] * len(IMAGES))
        assert spearmanr(scores, sizes).statistic > 0.9


def test_following_the_gradient_shrinks_the_files() -> None:
    reward = load_reward("jpeg_compressibility")
    images = IMAGES[::10].clone().requires_grad_()
    before = [len(jpeg_bytes(image, 75)) for image in to_pil(images)]
    optimizer = torch.optim.Adam([images], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (-reward(images, [""] * len(images)).mean()).backward()
        optimizer.step()
    after = [len(jpeg_bytes(image, 75)) for image in to_pil(images)]
    assert np.mean(after) < 0.8 * np.mean(before)


def test_the_two_rewards_are_each_others_negative() -> None:
    images: Tensor = IMAGES[:3]
    up, down = load_reward("jpeg_incompressibility"), load_reward("jpeg_compressibility")
    assert torch.equal(up(images, [""] * 3), -down(images, [""] * 3))
    assert (up(images, [""] * 3) > 0).all()


def test_any_size() -> None:
    images = IMAGES[:1, :, :50, :35]
    assert JPEGCompressibility(50).round_trip(images).shape == images.shape


def test_soft_round_rounds_and_has_the_gradient_of_its_cubic() -> None:
    x = torch.tensor([0.2, 1.5, -0.7], requires_grad=True)
    y = soft_round(x)
    assert y.tolist() == [0.0, 2.0, -1.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([3 * 0.2**2, 3 * 0.5**2, 3 * 0.3**2], rel=1e-5)


def test_qualities_that_are_refused() -> None:
    for quality in ("0", "101", "50.5", "best"):
        with raises(DraftuneError, "quality", quality):
            load_reward(f"jpeg_compressibility(quality={quality})")
