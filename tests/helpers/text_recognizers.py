"""Small random PP-OCRv5 models in the published format, and what transformers' processors make of an image."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from transformers import (
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
)

from helpers.published_weights import photographs, randomise

CHARACTERS = ["blank", "\u3000", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!", " "]
# Kernel size, channels in, channels out, stride and squeeze-and-excitation of the published recognizer's blocks.
BLOCKS: list[Any] = [
    [[3, 16, 32, 1, False]],
    [[3, 32, 64, 1, False], [3, 64, 64, 1, False]],
    [[3, 64, 128, [2, 1], False], [3, 128, 128, 1, False]],
    [[3, 128, 256, [1, 2], False], [5, 256, 256, 1, False]],
    [[5, 256, 512, [2, 1], True], [5, 512, 512, [2, 1], False]],
]
STAGES = {"out_features": ["stage2", "stage3", "stage4", "stage5"], "out_indices": [2, 3, 4, 5]}


def with_statistics(network: nn.Module, size: tuple[int, int]) -> Any:
    """Set the statistics of batch normalization to those on photographs, without which activations explode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    batch = [levels(image.resize(size)) / 127.5 - 1 for image in photographs()[:16]]
    with torch.no_grad():
        network.train()(torch.cat(batch))
    return network.eval()


def save_recognizer(folder: Path, seed: int = 0, characters: list[str] = CHARACTERS) -> Path:
    """A recognizer with few channels and characters; its processor's config has the keys of the published one."""
    torch.manual_seed(seed)
    backbone = {"model_type": "pp_lcnet_v3", "scale": 0.125, "divisor": 8, "block_configs": BLOCKS, **STAGES}
    config = PPOCRV5MobileRecConfig(
        backbone_config=backbone, hidden_size=32, num_attention_heads=2, head_out_channels=len(characters)
    )
    with_statistics(randomise(PPOCRV5MobileRecForTextRecognition(config), seed), (320, 48)).save_pretrained(folder)
    size = {"height": 48, "width": 320}
    processor = {"image_processor_type": "PPOCRV5ServerRecImageProcessor", "character_list": characters}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size, "pad_size": size, "resample": 2}
    processor |= {"max_image_width": 3200, "do_convert_rgb": True, "do_pad": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_detector(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    backbone = {"model_type": "pp_lcnet_v3", "scale": 0.125, "divisor": 8, **STAGES}
    config = PPOCRV5MobileDetConfig(
        backbone_config=backbone, neck_out_channels=16, layer_list_out_channels=[8, 8, 8, 8]
    )
    with_statistics(randomise(PPOCRV5MobileDetForObjectDetection(config), seed), (96, 96)).save_pretrained(folder)
    processor = {"image_processor_type": "PPOCRV5ServerDetImageProcessor", "limit_side_len": 960, "limit_type": "max"}
    processor |= {"image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229], "max_side_limit": 4000}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def recognizer_pixels(image: Image.Image) -> Tensor:
    """The steps of PPOCRV5ServerRecImageProcessor; the class itself needs torchvision."""
    ratio = image.width / image.height
    width = min(int(48 * max(ratio, 320 / 48)), 3200)
    if width < 3200 and width >= math.ceil(48 * ratio):
        width = math.ceil(48 * ratio)
    resized = interpolate(levels(image), (48, width), mode="bilinear", antialias=True)
    return pad((resized - 127.5) / 127.5, (0, max(0, 320 - width)))


def detector_pixels(image: Image.Image) -> Tensor:
    """The steps of PPOCRV5ServerDetImageProcessor with limit_type "max"; the class itself needs torchvision."""
    shrink = min(1.0, 960 / max(image.size))
    height, width = (max(round(int(side * shrink) / 32) * 32, 32) for side in (image.height, image.width))
    resized = interpolate(levels(image), (height, width), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.406, 0.456, 0.485], [0.225, 0.224, 0.229]))
    return ((resized / 255 - mean) / std)[:, [2, 1, 0]]
