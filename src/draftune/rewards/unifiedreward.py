"""UnifiedReward 2.0: a vision-language model that rates an image of a prompt from 1 to 5 on three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftune.errors import unknown
from draftune.rewards.base import Reward, register
from draftune.rewards.vlm import VisionLanguageModel, find_model
from draftune.rewards.vqa import checked_side

AXES = ("Alignment", "Coherence", "Style")
"""The axes, in the order of the model's answer."""
SCORES = ("1", "2", "3", "4", "5")
# The published instruction for one image, word for word.
QUESTION = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)


@register("unifiedreward")
class UnifiedReward(Reward):
    """UnifiedReward 2.0: the expected score of an image, 1 to 5, on one of three axes that its authors trained.

    `axis`: `alignment` with the prompt, `coherence` or `style`; `model`: a folder or hub id of a Qwen2.5-VL or Qwen3-VL
    version, which computes in bf16 unless `--reward-precision` is `no`; `max_side`: as of `vqa`.
    The score is sum_s s p(s), p the softmax over the tokens 1 to 5 where the answer has the axis' score; digits after
    the point are left out. The axes before it in the answer have their expected scores, rounded.
    Source: Wang et al., 2025, arXiv:2503.05236, CodeGoat24/UnifiedReward on GitHub. The default: Qwen2.5-VL-7B, MIT
    license; input size that of the model. The expectation is this package's; never run on the published weights.
    Over-optimized: not known.
    """

    reads_prompts = True
    precision, converts_itself = "bf16", True

    def __init__(
        self,
        axis: str = "alignment",
        model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b",
        max_side: int = 0,
    ) -> None:
        super().__init__()
        names = [name.lower() for name in AXES]
        if axis not in names:
            raise unknown("axis", axis, names)
        self.axes = AXES[: names.index(axis) + 1]
        self.max_side = checked_side(max_side)
        self.folder = find_model(model)

    def load(self) -> None:
        self.vlm = VisionLanguageModel.from_folder(self.folder, self.precision, self.max_side)
        text = self.vlm.prompt(QUESTION) + label(AXES[0])
        self.tokens = [self.vlm.first_token(text, score) for score in SCORES]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = [self.vlm.prompt(QUESTION.replace("{prompt}", prompt)) for prompt in prompts]
        return torch.stack([self.expected(image[None], text) for image, text in zip(images, texts, strict=True)])

    def expected(self, image: Tensor, text: str) -> Tensor:
        """Return the expected score of the last axis after a chat."""
        for axis in self.axes[:-1]:
            with torch.no_grad():
                rounded = round(float(self.mean(image, text + label(axis))))
            text += f"{label(axis)}{rounded}\n"
        return self.mean(image, text + label(self.axes[-1]))

    def mean(self, image: Tensor, text: str) -> Tensor:
        """Return the expected score of what comes after a text."""
        p = self.vlm.next_token(image, text, self.tokens).softmax(0)
        return p @ torch.arange(1, 6, dtype=p.dtype, device=p.device)


def label(axis: str) -> str:
    """Return what comes before the score of an axis in the answer."""
    return f"{axis} Score (1-5): "
