"""Rewards: the algebra, the preprocessing, and models in the published formats, small and random."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.rewards import REWARDS, Reward, load_reward
from draftune.rewards.preprocess import CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from draftune.utils.images import from_pil, open_image
from draftune.utils.memory import PeakMemory
from helpers.errors import raises
from helpers.published_weights import OLD_PILLOW

PHOTOGRAPHS = [
    Image.fromarray(skimage.data.astronaut()),
    Image.fromarray(skimage.data.cat()),
    Image.fromarray(skimage.data.coffee()).resize((150, 97)),
    Image.fromarray(skimage.data.rocket()).resize((41, 90)),
]


class Constant(Reward):
    def __init__(self, value: float, label: str) -> None:
        super().__init__()
        self.value, self.label = value, label

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
        return images.mean((1, 2, 3)) * 0 + self.value


def test_algebra() -> None:
    a, b, images = Constant(2.0, "a"), Constant(3.0, "b"), torch.rand(2, 3, 4, 4)
    total, parts = (a + 0.1 * b - b * 2 + -a).components(images, ["", ""])
    assert torch.allclose(total, torch.full((2,), 2 + 0.3 - 6 - 2))
    assert parts.keys() == {"a", "b"}
    assert parts["b"].tolist() == [3.0, 3.0]
    assert a.label == "a"


def test_two_parts_of_one_kind_are_logged_apart() -> None:
    reward = load_reward("jpeg_compressibility(quality=10) + jpeg_compressibility(quality=50)")
    _, parts = reward.components(torch.rand(1, 3, 16, 16), [""])
    assert list(parts) == ["jpeg_compressibility(quality=10)", "jpeg_compressibility(quality=50)"]
    assert reward.label == "jpeg_compressibility(quality=10) + jpeg_compressibility(quality=50)"
    _, parts = (Constant(1.0, "a") + Constant(2.0, "a")).components(torch.rand(1, 3, 16, 16), [""])
    assert list(parts) == ["a", "a-2"]


def test_rewards_run_in_float32_under_autocast() -> None:
    seen = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append((images.dtype, (images[:, 0] @ images[:, 1]).dtype))
        return images.mean((1, 2, 3))

    with torch.autocast("cpu", torch.bfloat16):
        load_reward(reward)(torch.rand(1, 3, 8, 8).bfloat16(), [""])
    assert seen == [(torch.float32, torch.float32)]


def test_gradient_reaches_the_picture_but_no_weight(clip_folder: Path, head_file: Path) -> None:
    reward = load_reward(f"clip(model='{clip_folder}') + 0.1*aesthetic(model='{clip_folder}', head='{head_file}')")
    images = torch.rand(2, 3, 40, 56, requires_grad=True)
    reward(images, ["a cat", "a dog"]).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.flatten(1).abs().sum(1).min() > 0
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.training


@pytest.mark.parametrize("mode", ["truncated", "html", "missing tensor", "wrong shape", "pickle"])
def test_files_that_are_not_a_head_are_refused(clip_folder: Path, head_file: Path, tmp_path: Path, mode: str) -> None:
    bad, tensors = tmp_path / "bad.safetensors", load_file(head_file)
    if mode == "truncated":
        bad.write_bytes(head_file.read_bytes()[:500])
    elif mode == "html":
        bad.write_text("<!doctype html><title>404</title>")
    elif mode == "pickle":
        torch.save(tensors, bad)
    else:
        if mode == "missing tensor":
            del tensors["layers.4.bias"]
        else:
            tensors["layers.7.weight"] = torch.zeros(2, 16)
        save_file(tensors, bad)
    with raises(DraftuneError, "bad.safetensors"):
        load_reward(f"aesthetic(model='{clip_folder}', head='{bad}')")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clipp", "'clipp' 'clip'"),
        ("clip(modell=x)", "'modell' 'model'"),
        ("clip(model='./nowhere')", "./nowhere"),
        ("clip(model=3)", "model clip 3"),
        ("clip(model='someone/something')", "someone/something"),
        ("aesthetic", "head="),
    ],
)
def test_rewards_that_are_not_there(text: str, message: str) -> None:
    with raises(DraftuneError, message):
        load_reward(text)


def test_white_pictures_keep_their_gradient_through_resizing() -> None:
    """Bicubic weights sum to a little more than one: a hard clamp would cut a third of the pixels off."""
    images = torch.ones(1, 3, 96, 96, requires_grad=True)
    Preprocess(42, 42)(images).sum().backward()
    assert images.grad is not None
    assert images.grad.all()


def test_modules_given_as_rewards_are_frozen() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            return (images * self.weight).mean((1, 2, 3))

    reward = load_reward(Mine())
    assert not reward.training
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_clip_that_is_not_all_there_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(path)
    del tensors["visual_projection.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with raises(DraftuneError, "1 visual_projection"):
        load_reward(f"clip(model='{tmp_path / 'clip'}')")


def test_every_reward_says_what_it_is() -> None:
    """Its range and input in the docstring, and how it is over-optimised."""
    for name, factory in REWARDS.items():
        text = (factory.__doc__ or "").lower()
        assert "over-optimi" in text or name.startswith(("emoji_name", "emoji_style")), name
        assert any(word in text for word in ("input", "any size", "settings, source", "wrapped")), name


SQUARE = {"height": 48, "width": 48}


@pytest.mark.parametrize(
    "config",
    [
        {"size": 48, "crop_size": 48},
        {"size": {"shortest_edge": 48}, "crop_size": SQUARE},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": SQUARE, "do_center_crop": True},
    ],
)
def test_processor_configs_of_all_years(tmp_path: Path, config: dict[str, object]) -> None:
    config = {**config, "image_mean": [0.5, 0.5, 0.5]}
    with raises(DraftuneError, "preprocessor_config.json"):
        Preprocess.from_folder(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "processor_class": "X"}))
    assert Preprocess.from_folder(tmp_path).size == 48
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    preprocess = Preprocess.from_folder(tmp_path)
    assert (preprocess.size, preprocess.mean, preprocess.std) == (48, (0.5, 0.5, 0.5), CLIP_STD)


@pytest.mark.skipif(OLD_PILLOW, reason="Pillow before version 13 resizes in another order")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("CLIP", {}),
        ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": 33}),
        ("CLIP", {"do_center_crop": False, "size": {"height": 30, "width": 50}}),
        ("Siglip", {"size": {"height": 48, "width": 48}}),
        ("ViT", {}),
        ("ViT", {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3}),
        ("ConvNext", {}),
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("ConvNext", {"size": {"shortest_edge": 48}, "crop_pct": 0.9}),
        ("OwlViT", {"size": {"height": 64, "width": 96}}),
    ],
)
def test_pictures_are_prepared_as_by_transformers(tmp_path: Path, kind: str, settings: dict[str, object]) -> None:
    name = f"{kind}ImageProcessor"
    processor = (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)
    processor.save_pretrained(tmp_path)
    for picture in PHOTOGRAPHS:
        theirs = processor(images=picture, return_tensors="pt").pixel_values
        ours = Preprocess.from_folder(tmp_path)(from_pil(picture))
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "DeiTImageProcessor"}, "DeiT CLIP ConvNext"),
        ({"do_normalize": False}, "do_normalize false"),
        ({"size": 100, "crop_size": 224}, "crop_size 224 size 100"),
        ({"resample": 1}, "KeyError"),
        ([], "AttributeError"),
    ],
)
def test_preparations_that_are_not_done_here_are_refused(tmp_path: Path, config: object, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with raises(DraftuneError, message):
        Preprocess.from_folder(tmp_path)


def test_of_thin_pictures_only_the_crop_is_made() -> None:
    thin = torch.rand(1, 3, 1, 3000)
    with PeakMemory() as memory:
        assert Preprocess()(thin).shape == (1, 3, 224, 224)
    assert memory.peak < 100e6


def test_a_list_of_prompts_is_wanted() -> None:
    reward, images = load_reward("brightness"), torch.rand(4, 3, 8, 8)
    for prompts in ("cats", ["cat"], ["cat"] * 5):
        with raises(DraftuneError, "4 prompts"):
            reward(images, prompts)


def test_pictures_of_all_modes(tmp_path: Path) -> None:
    """16 bits and floats keep their scale, transparency is white, and a camera's turn is undone."""
    grey = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    Image.fromarray((grey * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(grey).save(tmp_path / "float.tif")
    Image.fromarray((grey * 255).round().astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((grey * 255).round().astype(np.uint8)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name in ("16.png", "float.tif", "8.png", "cmyk.jpg"):
        picture = open_image(tmp_path / name)
        assert picture.shape == (1, 3, 6, 8)
        assert (picture[0].mean(0) - torch.from_numpy(grey)).abs().max() < 0.02, name
    turned, exif = Image.new("RGB", (8, 6)), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").shape == (1, 3, 8, 6)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").min() == 1


def test_a_template_is_what_the_image_is_compared_with() -> None:
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    asked = load_reward("emoji_clip(template='3d {prompt}')")
    plain, style = load_reward("emoji_clip"), load_reward("emoji_clip(template='3d')")
    names = ["cat face", "pizza"]
    with torch.no_grad():
        expected = plain.score(images, [f"3d {name}" for name in names])
        assert torch.equal(asked.score(images, names), expected)
        assert not torch.equal(plain.score(images, names), expected)
        assert torch.equal(style.score(images, names), plain.score(images, ["3d", "3d"]))
    assert (asked.reads_prompts, style.reads_prompts) == (True, False)
