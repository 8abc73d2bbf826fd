"""Measure the cost of each reward: the published architecture with random weights, loaded by name.

    python benchmarks/rewards.py                # all rewards; needs 10 GB of disk and of memory
    python benchmarks/rewards.py hpsv2 clip     # some

The table shows the parameters, their bytes in float32, the seconds to score 8 images of 512x512 without and with
gradient, and the process's peak memory. Rewards score the default of 4 images at a time.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    OwlViTConfig,
    OwlViTForObjectDetection,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from draftune.assets import EMBEDDED
from draftune.rewards import Reward, load_reward
from draftune.rewards.aesthetic import Head
from draftune.rewards.hpsv2 import OPEN_CLIP, VIT_H_14
from draftune.rewards.imagereward import BLIP, TEXT, VISION
from draftune.rewards.weights import KeyMap
from overhead import seconds

COUNT, SIZE = 8, 512
WORDS = EMBEDDED["emoji_clip"]
VIT_L_14: dict[str, Any] = {"projection_dim": 768}
VIT_L_14 |= {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
}
VIT_L_14 |= {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
}


def published(keys: KeyMap, network: Callable[[], nn.Module], path: Path) -> Path:
    """Write a file of random tensors in a published layout and return its path."""
    with torch.device("meta"):
        layout = keys.layout(network())
    save_file({name: torch.randn(shape) * 0.02 for name, shape in layout.items()}, path)
    return path


def folder(network: nn.Module, path: Path, **processor: object) -> Path:
    """Save a random network in transformers' format, with a tokenizer and an image processor config."""
    network.save_pretrained(path)  # type: ignore[operator]
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return clip_words(path, len(json.loads((WORDS / "vocab.json").read_text())))


def clip_words(path: Path, count: int) -> Path:
    """Write a CLIP tokenizer with `count` tokens, most of them unused."""
    path.mkdir(exist_ok=True)
    words = json.loads((WORDS / "vocab.json").read_text())
    words |= {f"unused{i}": i for i in range(len(words), count)}
    (path / "vocab.json").write_text(json.dumps(words))
    for name in ("merges.txt", "tokenizer_config.json"):
        (path / name).write_bytes((WORDS / name).read_bytes())
    return path


def blip() -> nn.Module:
    """Return ImageReward's network."""
    text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
    return nn.ModuleDict({"vision": BlipVisionModel(BlipVisionConfig(**VISION)), "text": text, "head": Head(768)})


def head(path: Path) -> Path:
    """Write a random aesthetic head."""
    save_file(Head(768).state_dict(), path)
    return path


def bert_words(path: Path) -> Path:
    """Write a BERT tokenizer with its published number of tokens, most of them unused."""
    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    (path / "vocab.txt").write_text("\n".join([*words, *(f"[unused{i}]" for i in range(30522 - len(words)))]))
    return path


def clip_l(path: Path) -> Path:
    return folder(CLIPModel(CLIPConfig(**VIT_L_14)), path, size=224)


def owl_vit(path: Path) -> Path:
    return folder(OwlViTForObjectDetection(OwlViTConfig()), path, do_center_crop=False, size=[768, 768])


def resnet(path: Path) -> Path:
    return folder(ResNetForImageClassification(ResNetConfig(num_labels=1000)), path, crop_pct=0.875, size=224)


EXPRESSIONS: dict[str, Callable[[Path], str]] = {
    "hpsv2": lambda d: (
        f"hpsv2(weights='{published(OPEN_CLIP, lambda: CLIPModel(CLIPConfig(**VIT_H_14)), d / 'h.safetensors')}', "
        f"tokenizer={clip_words(d / 'words', 49408)})"
    ),
    "pickscore": lambda d: f"pickscore(model='{folder(CLIPModel(CLIPConfig(**VIT_H_14)), d / 'h', size=224)}')",
    "clip": lambda d: f"clip(model='{clip_l(d / 'l')}')",
    "aesthetic": lambda d: f"aesthetic(model='{clip_l(d / 'l')}', head='{head(d / 'head.safetensors')}')",
    "imagereward": lambda d: (
        f"imagereward(weights='{published(BLIP, blip, d / 'blip.safetensors')}', tokenizer='{bert_words(d / 'words')}')"
    ),
    "object_detection": lambda d: f"object_detection(query=cat, model='{owl_vit(d / 'owl')}')",
    "object_removal": lambda d: f"object_removal(query=cat, model='{owl_vit(d / 'owl')}')",
    "classify, ResNet-50": lambda d: f"classify(target=1, model='{resnet(d / 'resnet')}')",
    "classify, EfficientNet-Lite0": lambda d: "classify(target=1)",
    "emoji_clip": lambda d: "emoji_clip",
    "emoji_aesthetic": lambda d: "emoji_aesthetic",
    "emoji_style_probability": lambda d: "emoji_style_probability",
    "jpeg_compressibility": lambda d: "jpeg_compressibility",
    "symmetry": lambda d: "symmetry",
    "sharpness": lambda d: "sharpness",
    "sharpness_aware(emoji_clip)": lambda d: "sharpness_aware(emoji_clip)",
}


def measure(name: str, expression: str) -> str:
    """Return the table row of one reward."""
    reward: Reward = load_reward(expression)
    parameters = sum(p.numel() for p in reward.parameters())
    images, prompts = torch.rand(COUNT, 3, SIZE, SIZE), ["a cat"] * COUNT
    with torch.no_grad():
        reward(images[:1], prompts[:1])
        forward = seconds(lambda: reward(images, prompts))
    images.requires_grad_()
    both = seconds(lambda: reward(images, prompts).sum().backward())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = f"{parameters / 1e6:.1f} M | {parameters * 4 / 1e6:,.0f} MB" if parameters else "0 | 0"
    return f"| {name} | {size} | {forward:.2f} | {both:.2f} | {peak:.1f} |"


def python(*arguments: str) -> str:
    """Run this script in a subprocess, for a separate peak memory, and return its output."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip()


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        print(EXPRESSIONS[sys.argv[2]](Path(sys.argv[3])))
        return
    if sys.argv[1:2] == ["--measure"]:
        print(measure(sys.argv[2], sys.argv[3]))
        return
    print("| reward | parameters | float32 | score, s | with gradient, s | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or EXPRESSIONS:
        with tempfile.TemporaryDirectory() as folder:
            print(python("--measure", name, python("--write", name, folder)), flush=True)


if __name__ == "__main__":
    main()
