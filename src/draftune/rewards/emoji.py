"""The judge of the embedded model: a classifier of emoji that is measured with and never trained against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from draftune.assets import EMBEDDED
from draftune.errors import unknown
from draftune.prompts import emoji
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import Preprocess
from draftune.utils.loading import load_part

STYLE = "style: "
STYLES = ("noto", "twemoji", "3d")


class Judge(Reward):
    """A ResNet with one group of logits for the names of emoji and one for their styles."""

    def load(self) -> None:
        from transformers import ResNetForImageClassification

        folder = EMBEDDED["emoji-judge"]
        self.model = load_part(ResNetForImageClassification, folder)
        self.preprocess = Preprocess.from_folder(folder)
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.names = {label: i for i, label in enumerate(labels) if not label.startswith(STYLE)}
        self.styles = {label.removeprefix(STYLE): i for i, label in enumerate(labels) if label.startswith(STYLE)}

    def logits(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=self.preprocess(images)).logits

    def features(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D]: how far apart two pictures' vectors are says how different they look."""
        return normalize(self.model.resnet(pixel_values=self.preprocess(images)).pooler_output.flatten(1), dim=-1)


class NameJudge(Judge):
    """1 where the picture shows the emoji that the prompt names, by the judge, and 0 elsewhere; no gradient."""

    reads_prompts = True

    @cached_property
    def common(self) -> list[str]:
        return emoji("common")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            logits = self.logits(images)
        scores = []
        for row, prompt in zip(logits, prompts, strict=True):
            name = next((p for p in (prompt, prompt.partition(" ")[2]) if p in self.names), None)
            choices = self.common if name in self.common else list(self.names)
            best = choices[int(row[[self.names[choice] for choice in choices]].argmax())]
            scores.append(float(best == name))
        return torch.tensor(scores, device=images.device)


class StyleJudge(Judge):
    """The probability of one style, 0 to 1."""

    def __init__(self, style: str) -> None:
        super().__init__()
        if style not in STYLES:
            raise unknown("style", style, STYLES)
        self.style = style

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        index = list(self.styles.values())
        probabilities = self.logits(images)[:, index].softmax(-1)
        return probabilities[:, index.index(self.styles[self.style])]


@register("emoji-judge-name")
def emoji_judge_name() -> Reward:
    """Share of emoji that a held-out classifier names rightly, among the 64 common names where it is one of them.

    0 or 1; for --held-out: it measures and has no gradient. 1.3 M parameters, 2.7 MB, Apache-2.0; input 64x64; see its
    model card. What names it can't see: whether the picture is pretty.
    """
    return NameJudge()


@register("emoji-judge-style")
def emoji_judge_style(style: str = "3d") -> Reward:
    """Probability that a held-out classifier gives to a style of emoji: noto, twemoji or 3d.

    0 to 1. Weights and input as for `emoji-judge-name`. Meant for --held-out; trained on, it is no judge any more.
    """
    return StyleJudge(style)
