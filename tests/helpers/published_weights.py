"""Small random reward models in the published formats, and plain writings of what their official scorers do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import skimage.data
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, multi_head_attention_forward, normalize
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    OwlViTConfig,
    OwlViTForObjectDetection,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from draftune.rewards import Reward
from draftune.rewards.aesthetic import Head
from draftune.rewards.hpsv2 import OPEN_CLIP
from draftune.rewards.imagereward import BLIP
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD
from draftune.rewards.weights import KeyMap
from draftune.utils.images import from_pil
from helpers.pipelines import tiny_tokenizer

Pixels = np.ndarray[Any, Any]

HPS_CONFIG: dict[str, Any] = {
    "projection_dim": 24,
    "text_config": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
HPS_CONFIG["text_config"] |= {"hidden_act": "gelu", "max_position_embeddings": 12, "vocab_size": 74, "eos_token_id": 73}
HPS_CONFIG["vision_config"] |= {"hidden_act": "gelu", "patch_size": 8, "image_size": 32}

BLIP_VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BLIP_VISION |= {"patch_size": 8, "image_size": 32}
BLIP_TEXT = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BLIP_TEXT |= {"encoder_hidden_size": 32, "vocab_size": 35, "max_position_embeddings": 40}
BLIP_VISION_CONFIG: dict[str, Any] = {**BLIP_VISION, "layer_norm_eps": 1e-6}
BLIP_TEXT_CONFIG: dict[str, Any] = {**BLIP_TEXT, "layer_norm_eps": 1e-12}


OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
"""Earlier versions than 13 resize in another order of width and height: values differ by some levels of 255."""


def photographs() -> list[Image.Image]:
    """50 pictures of many sizes and aspects, from the photographs that scikit-image ships."""
    names = (
        "astronaut",
        "cat",
        "coffee",
        "rocket",
        "camera",
        "coins",
        "moon",
        "hubble_deep_field",
        "immunohistochemistry",
    )
    sources = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in names]
    sizes = [(64, 64), (72, 60), (150, 97), (41, 90), (33, 32), (225, 227), (32, 47), (300, 451), (99, 401), (256, 256)]
    if OLD_PILLOW:
        # Earlier versions resize the width of tall images first, so that some values differ by a level of 255.
        sizes = [(max(size), min(size)) for size in sizes]
    return [sources[i % len(sources)].resize(sizes[(i * 3) % len(sizes)]) for i in range(50)]


def randomise(network: nn.Module, seed: int = 0) -> Any:
    """Weights large enough that scores of different pictures differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                scale = 1.5 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def published_tensors(layout: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for a layout, scaled as `randomise` does; scales of normalisation are near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = noise * 1.5 / noise[0].numel() ** 0.5
        else:
            is_scale = name.endswith("weight") and len(shape) == 1
            tensors[name] = noise * 0.1 + is_scale
    return tensors


def small_layout(keys: KeyMap, network: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return keys.layout(network())


# OpenCLIP and HPSv2 -------------------------------------------------------------------------------------------------


def save_hpsv2(folder: Path) -> tuple[Path, Path]:
    """The weights as a published .pt, and the folder of its tokenizer."""
    tiny_tokenizer(folder / "tokenizer")
    tensors = published_tensors(small_layout(OPEN_CLIP, lambda: CLIPModel(CLIPConfig(**HPS_CONFIG))))
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt", folder / "tokenizer"


def open_clip_blocks(t: dict[str, Tensor], prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """The residual blocks of OpenCLIP's transformer on [length, batch, width], by torch's own attention."""
    width = x.shape[-1]
    for i in range(2):
        p = {k.removeprefix(f"{prefix}transformer.resblocks.{i}."): v for k, v in t.items()}
        h = layer_norm(x, (width,), p["ln_1.weight"], p["ln_1.bias"])
        weights = p["attn.in_proj_weight"], p["attn.in_proj_bias"], None, None, False, 0.0
        out = p["attn.out_proj.weight"], p["attn.out_proj.bias"]
        x = x + multi_head_attention_forward(h, h, h, width, heads, *weights, *out, False, attn_mask=mask)[0]
        h = layer_norm(x, (width,), p["ln_2.weight"], p["ln_2.bias"])
        h = gelu(linear(h, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"]))
        x = x + linear(h, p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])
    return x


def hpsv2_score(t: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """OpenCLIP's cosine from the published tensors, of pixels [1, 3, 32, 32] and tokens [1, 12]."""
    patches = torch.conv2d(pixels, t["visual.conv1.weight"], stride=8).flatten(2).permute(2, 0, 1)
    x = torch.cat([t["visual.class_embedding"].expand(1, 1, -1), patches]) + t["visual.positional_embedding"][:, None]
    x = layer_norm(x, (32,), t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    x = open_clip_blocks(t, "visual.", x, 2, None)[0]
    image = layer_norm(x, (32,), t["visual.ln_post.weight"], t["visual.ln_post.bias"]) @ t["visual.proj"]
    y = t["token_embedding.weight"][ids[0]][:, None] + t["positional_embedding"][:, None]
    y = open_clip_blocks(t, "", y, 2, torch.full((12, 12), -torch.inf).triu(1))
    y = layer_norm(y, (16,), t["ln_final.weight"], t["ln_final.bias"])[ids[0].argmax()]
    return (normalize(image) * normalize(y @ t["text_projection"])).sum()


def hpsv2_pixels(picture: Image.Image, size: int = 32) -> Tensor:
    """To floats, the longest edge to `size` (PIL's floats are not rounded), black bars, then the normalisation."""
    scale = size / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    array = np.asarray(picture, dtype=np.float32) / 255
    channels = [Image.fromarray(array[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
    padded = np.zeros((size, size, 3), dtype=np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    padded[top : top + height, left : left + width] = np.stack([np.asarray(c) for c in channels], -1)
    return to_tensor(padded, CLIP_MEAN, CLIP_STD)


# BLIP and ImageReward -----------------------------------------------------------------------------------------------


def save_imagereward(folder: Path) -> tuple[Path, Path]:
    """The weights as a published .pt, with the tensors that scoring does not use, and the folder of its tokenizer."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    (tokenizer / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", *letters])
    )
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))

    def network() -> nn.Module:
        text = BlipTextModel(BlipTextConfig(**BLIP_TEXT_CONFIG), add_pooling_layer=False)
        vision = BlipVisionModel(BlipVisionConfig(**BLIP_VISION_CONFIG))
        return nn.ModuleDict({"vision": vision, "text": text, "head": Head(16)})

    tensors = published_tensors(small_layout(BLIP, network))
    unused = {"blip.vision_proj.weight": torch.zeros(8, 32), "blip.text_proj.bias": torch.zeros(8)}
    unused |= {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(tensors | unused, folder / "ImageReward.pt")
    return folder / "ImageReward.pt", tokenizer


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (query, key, value))
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask).softmax(-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


def imagereward_score(t: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward from the published tensors, of pixels [1, 3, 32, 32] and tokens [1, 35] with their mask."""

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    e = "blip.visual_encoder"
    patch = t[f"{e}.patch_embed.proj.weight"], t[f"{e}.patch_embed.proj.bias"]
    x = torch.conv2d(pixels, *patch, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([t[f"{e}.cls_token"], x], 1) + t[f"{e}.pos_embed"]
    for i in range(2):
        b = f"{e}.blocks.{i}"
        x = x + dense(attention(*dense(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1), 2), f"{b}.attn.proj")
        x = x + dense(gelu(dense(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    x = norm(x, f"{e}.norm", 1e-6)

    e = "blip.text_encoder"
    y = t[f"{e}.embeddings.word_embeddings.weight"][ids] + t[f"{e}.embeddings.position_embeddings.weight"][:35]
    y = norm(y, f"{e}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        b = f"{e}.encoder.layer.{i}"
        for kind, seen, hidden in (("attention", None, (1 - mask.float()) * -10000), ("crossattention", x, 0.0)):
            seen = y if seen is None else seen
            a = attention(
                *(dense(s, f"{b}.{kind}.self.{n}") for s, n in ((y, "query"), (seen, "key"), (seen, "value"))),
                2,
                hidden,
            )
            y = norm(y + dense(a, f"{b}.{kind}.output.dense"), f"{b}.{kind}.output.LayerNorm", 1e-12)
        h = gelu(dense(y, f"{b}.intermediate.dense"))
        y = norm(y + dense(h, f"{b}.output.dense"), f"{b}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = dense(z, f"mlp.layers.{i}")
    return (z[0, 0] - 0.16717362830052426) / 1.0333394966054072


# transformers' own formats ------------------------------------------------------------------------------------------


def save_clip(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))).save_pretrained(folder)
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_siglip(folder: Path) -> Path:
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3, "dog": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_owlvit(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 16}
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    randomise(OwlViTForObjectDetection(config)).save_pretrained(folder)
    processor = {"feature_extractor_type": "OwlViTFeatureExtractor", "size": [64, 64], "crop_size": 64, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "do_center_crop": False}))
    return folder


def save_resnet(folder: Path) -> Path:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    config.id2label = dict(enumerate(["tench, Tinca tinca", "goldfish", "shark", "ray", "cock"]))
    randomise(ResNetForImageClassification(config)).save_pretrained(folder)
    processor = {"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, "size": 32, "resample": 3}
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def agree(reward: Reward, prompts: list[str], official: Callable[[Image.Image, str], Tensor]) -> None:
    """Our scores of 50 pictures are the official ones, within a share of the official scores' spread."""
    ours, theirs = [], []
    with torch.no_grad():
        for i, picture in enumerate(photographs()):
            prompt = prompts[i % len(prompts)]
            ours.append(float(reward(from_pil(picture), [prompt])))
            theirs.append(float(official(picture, prompt)))
    assert np.std(theirs) > 1e-3
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3 * np.std(theirs)


# What official scorers do to a picture, in PIL and NumPy --------------------------------------------------------------


def to_tensor(array: Pixels, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = (array - np.asarray(mean)) / np.asarray(std)
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]


def cropped_pixels(
    picture: Image.Image,
    size: int,
    crop: int,
    center: Callable[[float], int],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """The shortest edge to `size`, the centre square, with torchvision's (round) or transformers' (floor) centre."""
    short, long = min(picture.size), int(size * max(picture.size) / min(picture.size))
    shape = (size, long) if picture.width == short else (long, size)
    small = picture.resize(shape, Image.Resampling.BICUBIC)
    left, top = center((small.width - crop) / 2), center((small.height - crop) / 2)
    box = small.crop((left, top, left + crop, top + crop))
    return to_tensor(np.asarray(box, dtype=np.float32) / 255, mean, std)


def squashed_pixels(picture: Image.Image, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    small = picture.resize((size, size), Image.Resampling.BICUBIC)
    return to_tensor(np.asarray(small, dtype=np.float32) / 255, mean, std)


def tokens_of(folder: Path, prompt: str, length: int = 12) -> Tensor:
    kind = CLIPTokenizer if (folder / "vocab.json").exists() else PreTrainedTokenizerFast
    tokenizer = kind.from_pretrained(folder)
    return tokenizer([prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
