"""Rewards for the embedded model: a score of glossy emoji, and a classifier of names and styles for evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from draftune.assets import EMBEDDED
from draftune.errors import unknown
from draftune.prompts.sets import emoji
from draftune.rewards.aesthetic import Head
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import load_into
from draftune.utils.loading import load_part

STYLE = "style: "
STYLES = ("noto", "twemoji", "3d", "damaged")


@register("emoji_aesthetic")
class EmojiAesthetic(Reward):
    """Score of glossy 3D emoji, 0 to 10: real ones about 8, flat ones about 3, damaged ones less.

    The mean of two networks, each 10 sigmoid(logit): an MLP on the embedding of `emoji_clip`, and a ResNet of the
    pixels. They were also trained on blurred, noisy, tinted and smeared images, and on images of models that were
    over-optimized on their former versions. 3.4 M parameters, 7 MB, Apache-2.0; input 128x128; see its model card.
    Over-optimized: see its model card.
    """

    def load(self) -> None:
        from transformers import ResNetForImageClassification

        folder = EMBEDDED["emoji_aesthetic"]
        self.clip = ClipEncoder.from_folder(EMBEDDED["emoji_clip"])
        self.head = Head(self.clip.width)
        load_into(self.head, folder / "head.safetensors")
        self.network = load_part(ResNetForImageClassification, folder)
        self.preprocess = Preprocess.from_folder(folder)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        head = self.head(self.clip.embed_images(images))
        network = self.network(pixel_values=self.preprocess(images)).logits[:, 0]
        return 10 * torch.stack([head, network]).sigmoid().mean(0)


class EmojiClassifier(Reward):
    """Base class: a ResNet with logits for the names of emoji and for their styles."""

    def load(self) -> None:
        from transformers import ResNetForImageClassification

        folder = EMBEDDED["emoji_judge"]
        self.model = load_part(ResNetForImageClassification, folder)
        self.preprocess = Preprocess.from_folder(folder)
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.names = {label: i for i, label in enumerate(labels) if not label.startswith(STYLE)}
        self.styles = {label.removeprefix(STYLE): i for i, label in enumerate(labels) if label.startswith(STYLE)}

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, names + styles]."""
        return self.model(pixel_values=self.preprocess(images)).logits

    def features(self, images: Tensor) -> Tensor:
        """Return normalized features [B, D]; their distance measures how different two images look."""
        return normalize(self.model.resnet(pixel_values=self.preprocess(images)).pooler_output.flatten(1), dim=-1)


@register("emoji_name_accuracy")
class EmojiNameAccuracy(EmojiClassifier):
    """Share of emoji whose name a held-out classifier predicts, among the 64 common names if it is one of them.

    0 or 1, without gradient: an evaluation reward, for --eval-rewards. 1.3 M parameters, 2.7 MB, Apache-2.0; input
    128x128; see its model card. It does not measure image quality.
    """

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


@register("emoji_style_probability")
class EmojiStyleProbability(EmojiClassifier):
    """Probability of a style of emoji under a held-out classifier, 0 to 1: "noto", "twemoji", "3d" or "damaged".

    Weights and input are those of `emoji_name_accuracy`. An evaluation reward, for --eval-rewards: a reward that is
    trained on can no longer evaluate.
    """

    def __init__(self, style: str = "3d") -> None:
        super().__init__()
        if style not in STYLES:
            raise unknown("style", style, STYLES)
        self.style = style

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        index = list(self.styles.values())
        probabilities = self.logits(images)[:, index].softmax(-1)
        return probabilities[:, index.index(self.styles[self.style])]
