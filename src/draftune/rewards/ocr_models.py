"""Text recognizers and text detectors of PP-OCR, as transformers has them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from draftune.errors import DraftuneError
from draftune.rewards.clip import model_type
from draftune.rewards.preprocess import HALF, IMAGENET_MEAN, IMAGENET_STD, normalized
from draftune.rewards.weights import find_network
from draftune.utils.loading import load_part
from draftune.utils.weightless import fake_mode

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a rectangle in pixels; the last two are exclusive."""

RECOGNIZERS = {
    "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecForTextRecognition",
    "pp_ocrv5_server_rec": "PPOCRV5ServerRecForTextRecognition",
}
"""The classes in transformers by the `model_type` of the configs."""
DETECTORS = {
    "pp_ocrv5_mobile_det": "PPOCRV5MobileDetForObjectDetection",
    "pp_ocrv5_server_det": "PPOCRV5ServerDetForObjectDetection",
}

# Defaults of transformers' image processors.
RECOGNIZER = {
    "size": {"height": 48, "width": 320},
    "pad_size": {"height": 48, "width": 320},
    "max_image_width": 3200,
    "image_mean": HALF,
    "image_std": HALF,
}
DETECTOR = {
    "limit_side_len": 960,
    "limit_type": "max",
    "max_side_limit": 4000,
    "image_mean": IMAGENET_MEAN[::-1],
    "image_std": IMAGENET_STD[::-1],
}
THRESHOLD = 0.3
"""Probability from which a pixel belongs to text; this and the next constants are transformers' defaults."""
BOX_THRESHOLD = 0.6
"""Mean probability from which a box is text."""
UNCLIP = 1.5
"""The detector marks text shrunk. A box grows by this factor times its area over its circumference."""
MIN_SIDE = 3
"""Least side of a box in pixels of the detector's input; the grown box has 2 more."""


def find_model(model: str, option: str, classes: dict[str, str]) -> Path:
    """Return the folder of a model. Raises DraftuneError if there is none, or it is of another kind."""
    folder = find_network(model, option, tokenizer=False)
    if (kind := model_type(folder)) not in classes:
        raise DraftuneError(f"{str(folder)!r} is a {kind} model; {option} takes {' or '.join(classes)}")
    return folder


def read_processor(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a folder's image processor, with defaults. Raises DraftuneError if it can't be read."""
    path = folder / "preprocessor_config.json"
    try:
        return defaults | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise DraftuneError(f"{str(path)!r} is not the config of an image processor: {error!r}") from error


def load_network(folder: Path, classes: dict[str, str]) -> Any:
    """Load a network in evaluation mode. Raises DraftuneError if the installed transformers has no such class."""
    import transformers

    name = classes[model_type(folder)]
    if not hasattr(transformers, name):
        raise DraftuneError(f"transformers {transformers.__version__} has no {name}: pip install -U transformers")
    return load_part(getattr(transformers, name), folder).eval()


class Alphabet:
    """The characters of a recognizer by their numbers; number 0 is the blank of CTC."""

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        numbers = range(1, len(self.characters))
        self.spaces = [number for number in numbers if self.characters[number].isspace()]
        self.kept = [number for number in numbers if not self.characters[number].isspace()]
        self.columns = {self.characters[number]: column for column, number in enumerate(self.kept, start=1)}

    @classmethod
    def from_folder(cls, folder: Path) -> Alphabet:
        """Read a recognizer's alphabet. Raises DraftuneError unless it has a character for each of its outputs."""
        characters = read_processor(folder, {}).get("character_list") or []
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        outputs = config.get("head_out_channels", len(characters))
        if not characters or len(characters) != outputs:
            path = str(folder / "preprocessor_config.json")
            raise DraftuneError(f"{path!r} has a character_list of {len(characters)} characters instead of {outputs}")
        return cls(characters)

    def encode(self, text: str) -> list[int]:
        """Return the columns of a text's characters in `merge_spaces`, without its spaces.

        Raises:
            DraftuneError: The recognizer does not know a character.
        """
        text = "".join(text.split())
        if unknown := sorted(set(text) - self.columns.keys()):
            raise DraftuneError(f"the text recognizer does not know the character {unknown[0]!r} in {text!r}")
        return [self.columns[character] for character in text]

    def merge_spaces(self, log_probs: Tensor) -> Tensor:
        """Count the spaces as blanks: the likelihood of a text is then that of all texts that differ in spaces only.

        Args:
            log_probs: Log-probabilities [T, C] of all C characters.

        Returns:
            Log-probabilities [T, C - S] without the S spaces. They sum to one, which the gradient of torch's `ctc_loss`
            relies on.
        """
        blank = log_probs[:, [0, *self.spaces]].logsumexp(-1, keepdim=True)
        return torch.cat([blank, log_probs[:, self.kept]], -1)

    def decode(self, log_probs: Tensor) -> str:
        """Return the text of the likeliest character of each row [T, C]: repeated ones count once, blanks not."""
        numbers = log_probs.argmax(-1).unique_consecutive().tolist()
        return "".join(self.characters[number] for number in numbers if number)


class Recognizer(nn.Module):
    """Reads one line of text: log-probabilities of characters from left to right."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.processor = read_processor(folder, RECOGNIZER)
        self.model = load_network(folder, RECOGNIZERS)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(make_gradient_contiguous)

    def pixels(self, image: Tensor) -> Tensor:
        """Resize an image [1, 3, h, w] to the network's height, normalize it, and pad it on the right with zeros."""
        size, height, width = self.processor["size"], *image.shape[-2:]
        widest = int(size["height"] * max(width / height, size["width"] / size["height"]))
        own = math.ceil(size["height"] * (width / height))
        shape = (size["height"], min(own, widest, self.processor["max_image_width"]))
        pixels = normalized(resized(image, shape), self.processor["image_mean"], self.processor["image_std"])
        return pad(pixels, (0, max(0, self.processor["pad_size"]["width"] - shape[1])))

    def forward(self, image: Tensor) -> Tensor:
        """Return the log-probabilities [T, C] of an image [1, 3, h, w] of one line."""
        states = self.model.model(self.pixels(image)).last_hidden_state
        # The network itself returns a softmax, whose logarithm would be -inf for an unlikely character.
        logits: Tensor = self.model.head.head(self.model.head.encoder(states).last_hidden_state)
        return logits[0].log_softmax(-1)


class Detector(nn.Module):
    """Finds the lines of text in an image, without a gradient."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.processor = read_processor(folder, DETECTOR)
        self.model = load_network(folder, DETECTORS)

    def pixels(self, image: Tensor) -> Tensor:
        """Resize an image [1, 3, H, W] to sides that are multiples of 32, normalize it, and reverse the channels."""
        limit, kind, sides = self.processor["limit_side_len"], self.processor["limit_type"], image.shape[-2:]
        edge = min(sides) if kind == "min" else max(sides)
        inside = edge >= limit if kind == "min" else edge <= limit if kind == "max" else False
        shape = [side if inside else int(side * (limit / edge)) for side in sides]
        if max(shape) > self.processor["max_side_limit"]:
            shape = [int(side * (self.processor["max_side_limit"] / max(shape))) for side in shape]
        height, width = (max(round(side / 32) * 32, 32) for side in shape)
        pixels = resized(image, (height, width))
        return normalized(pixels, self.processor["image_mean"], self.processor["image_std"]).flip(1)

    @torch.no_grad()
    def boxes(self, image: Tensor) -> list[Box]:
        """Return the boxes of an image [1, 3, H, W] in reading order; the whole image if no text is found."""
        height, width = image.shape[-2:]
        probabilities = self.model(pixel_values=self.pixels(image)).last_hidden_state[0, 0]
        found = [] if fake_mode() is not None else text_boxes(probabilities.float().cpu().numpy(), height, width)
        return reading_order(found) or [(0, 0, width, height)]


def text_boxes(probabilities: np.ndarray[Any, Any], height: int, width: int) -> list[Box]:
    """Return upright boxes around the text in a detector's map, in pixels of an image of this height and width.

    The steps are those of transformers' processor, for upright rectangles: pixels above a threshold, their connected
    components, the mean probability of each component's rectangle, and growth by `UNCLIP`.
    """
    import scipy.ndimage

    labels, _ = scipy.ndimage.label(probabilities > THRESHOLD, structure=np.ones((3, 3)))
    boxes = []
    for rows, columns in scipy.ndimage.find_objects(labels):
        tall, wide = rows.stop - 1 - rows.start, columns.stop - 1 - columns.start
        if min(tall, wide) < MIN_SIDE or probabilities[rows, columns].mean() < BOX_THRESHOLD:
            continue
        grown = tall * wide * UNCLIP / (2 * (tall + wide))
        if min(tall, wide) + 2 * grown < MIN_SIDE + 2:
            continue
        across, down = width / probabilities.shape[1], height / probabilities.shape[0]
        left, right = (min(max(round(x * across), 0), width) for x in (columns.start - grown, columns.stop - 1 + grown))
        top, bottom = (min(max(round(y * down), 0), height) for y in (rows.start - grown, rows.stop - 1 + grown))
        boxes.append((left, top, right, bottom))
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Sort boxes from top to bottom, and from left to right within a line."""
    lines: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box[1] + box[3]):
        if lines and (box[1] + box[3]) / 2 < lines[-1][0][3]:
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line)]


def make_gradient_contiguous(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Copy the gradient of a batch normalization's output to a contiguous tensor; a forward hook.

    torch 2.13 computes wrong gradients on the CPU for the strides (C, 1, C * W, C) of one image, which this network's
    change from columns of pixels to tokens leads to.
    """
    if output.requires_grad:
        output.register_hook(Tensor.contiguous)


def resized(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize an image [1, 3, H, W] to (height, width) as transformers' processors with torchvision do."""
    return interpolate(image, shape, mode="bilinear", antialias=True)
