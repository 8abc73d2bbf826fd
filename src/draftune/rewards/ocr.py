"""Text rendering: how likely a text recognizer reads the wanted text, and the errors that it reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import ctc_loss

from draftune.errors import DraftuneError
from draftune.prompts import metadata
from draftune.rewards.base import Reward, register
from draftune.rewards.ocr_models import DETECTORS, RECOGNIZERS, Alphabet, Box, Detector, Recognizer, find_model
from draftune.utils.weightless import fake_mode

QUOTED = re.compile('"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|「([^」]*)」')
"""Quoted words of a prompt. A single quotation mark may be an apostrophe, so it does not quote."""


class TextReward(Reward):
    """Base class: what a recognizer reads in boxes of an image, and the text that it should read."""

    def __init__(
        self,
        text: str = "",
        box: str | tuple[float, ...] = "",
        model: str = "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors",
        detector: str = "PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
    ) -> None:
        super().__init__()
        self.text = text
        self.box = checked_box(box)
        self.folder = find_model(model, "the reward's model=", RECOGNIZERS)
        self.detector_folder = None if self.box else find_model(detector, "the reward's detector=", DETECTORS)
        self.alphabet = Alphabet.from_folder(self.folder)
        self.alphabet.encode(text)

    def load(self) -> None:
        self.recognizer = Recognizer(self.folder)
        self.detector = Detector(self.detector_folder) if self.detector_folder else None

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Return the wanted texts without spaces: the setting, the prompt file's column "text", or the quoted words.

        Raises:
            DraftuneError: A prompt has none of them.
        """
        texts = []
        for prompt in prompts:
            quoted = " ".join("".join(groups) for groups in QUOTED.findall(prompt))
            texts.append("".join((self.text or metadata(prompt).get("text") or quoted).split()))
            if not texts[-1]:
                raise DraftuneError(
                    f"{self.label} has no text for {prompt!r}: set {self.label}(text=…), a column 'text' of the prompt "
                    'file, or quote the text in the prompt as in: a sign that says "OPEN"'
                )
        return texts

    def check(self, prompts: Sequence[str]) -> None:
        for text in self.texts(prompts):
            self.alphabet.encode(text)

    def boxes(self, image: Tensor) -> list[Box]:
        """Return the boxes to read in an image [1, 3, H, W]."""
        if self.detector is not None:
            return self.detector.boxes(image)
        height, width = image.shape[-2:]
        x0, y0, x1, y1 = self.box
        left, top = min(round(x0 * width), width - 1), min(round(y0 * height), height - 1)
        return [(left, top, max(round(x1 * width), left + 1), max(round(y1 * height), top + 1))]

    def read(self, image: Tensor) -> Tensor:
        """Return the log-probabilities [T, C] of characters in all boxes of an image [1, 3, H, W], in reading order.

        Between two boxes is a certain blank, so that the same character at the end and at the start counts twice.
        """
        lines = [self.recognizer(image[..., top:bottom, left:right]) for left, top, right, bottom in self.boxes(image)]
        blank = torch.full_like(lines[0][:1], -1e4)
        blank[:, 0] = 0
        return torch.cat([part for line in lines for part in (line, blank)][:-1])


@register("ocr")
class OCR(TextReward):
    """Text rendering: the log-likelihood that a text recognizer reads the text, for each character, at most 0.

    `text`: the text; unless set, the column "text" of the prompt file, or the words in double quotes in the prompt.
    `box`: left, top, right and bottom as fractions of the image, such as "0.1, 0.4, 0.9, 0.6"; unless set, the boxes of
    `detector`, in reading order, or the whole image where it finds none. `model`, `detector`: PP-OCRv5 folders or hub
    ids in transformers' format. log p(text | image) / characters, with p the sum over all alignments of connectionist
    temporal classification (Graves et al., 2006, Eq. 3). Spaces are ignored, case counts. Other text in a box costs.
    The boxes have no gradient and are upright; a fixed box suits a model that writes nothing yet. Source: Cui et al.,
    2025, arXiv:2507.05595. PP-OCRv5 mobile: 16 MB, and 5 MB for the detector, Apache-2.0; input 48 pixels high.
    Run with the weights of PP-OCRv4, whose networks are the same; never with those of PP-OCRv5. Over-optimized: noise
    that only this recognizer reads as the text. Evaluate with `ocr_cer` and another recognizer.
    """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        targets = [self.alphabet.encode(text) for text in self.texts(prompts)]
        return torch.stack([self.likelihood(image[None], one) for image, one in zip(images, targets, strict=True)])

    def likelihood(self, image: Tensor, target: list[int]) -> Tensor:
        """Return the log-likelihood of a text, divided by its number of characters."""
        log_probs = self.alphabet.merge_spaces(self.read(image))
        needed = len(target) + sum(a == b for a, b in itertools.pairwise(target))
        if needed > len(log_probs):
            raise DraftuneError(
                f"{len(target)} characters are too many for the box of {self.label}: it is read in {len(log_probs)} "
                f"steps, and they need {needed}; give a wider or lower box="
            )
        if fake_mode() is not None:
            return log_probs.mean()  # torch does not compute CTC with fake tensors; its memory is small
        lengths = (torch.tensor([len(log_probs)]), torch.tensor([len(target)]))
        numbers = torch.tensor([target], device=log_probs.device)
        return -ctc_loss(log_probs[:, None], numbers, *lengths, reduction="sum") / len(target)


@register("ocr_cer")
class CharacterErrorRate(TextReward):
    """Minus the character error rate of what a text recognizer reads, 0 without an error: to evaluate `ocr`.

    Settings, source and weights are those of `ocr`. The Levenshtein distance of the likeliest characters to the text,
    divided by the characters of the text: an empty image scores -1, much wrong text less. Spaces are ignored, case
    counts. It has no gradient; `zeroth_order(ocr_cer)` estimates one. Over-optimized: never used for training here.
    """

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rates = []
        for image, text in zip(images, self.texts(prompts), strict=True):
            read = "".join(self.alphabet.decode(self.read(image[None].detach())).split())
            rates.append(-edit_distance(read, text) / len(text))
        return torch.tensor(rates, device=images.device)


def checked_box(box: str | tuple[float, ...]) -> tuple[float, ...]:
    """Return a box as numbers; empty for none. Raises DraftuneError unless it is a rectangle inside the image."""
    parts = re.split(r"[\s,]+", box.strip(" ()")) if isinstance(box, str) and box else box
    try:
        numbers = tuple(float(part) for part in parts)
        x0, y0, x1, y1 = numbers or (0, 0, 1, 1)
    except (TypeError, ValueError):
        x0, y0, x1, y1 = 1, 1, 0, 0
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise DraftuneError(
            f"box must be left, top, right and bottom between 0 and 1, such as '0.1, 0.4, 0.9, 0.6', not {box!r}"
        )
    return numbers


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: how many characters to insert, delete or replace to make b of a."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row = row, [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]
