"""A person's taste as a reward, learned from comparisons of two images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.registry.factories import check_range
from draftune.rewards.base import register
from draftune.rewards.bradley_terry import Accuracy, cross_validate, fit
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.comparisons import SKIP, Comparison, image_path, missing_images, read_comparisons
from draftune.rewards.online import OnlineReward
from draftune.rewards.weights import find_network
from draftune.utils.devices import default_device
from draftune.utils.images import open_image
from draftune.utils.logging import logger
from draftune.utils.paths import user_path
from draftune.utils.weightless import fake_mode

MIN_COMPARISONS = 10


@register("taste")
class Taste(OnlineReward):
    """Your own taste, from the comparisons of `draftune rate`: log-odds of being preferred to the mean rated image.

    A Bradley-Terry model with linear scores on the normalized image embedding of a CLIP or SigLIP model; it ignores the
    prompts. `ratings`: the file of comparisons; `model`: a folder or hub id in transformers' format, or emoji_clip;
    `ridge`: weight of the penalty |w|^2 / 2, where differences of embeddings have the mean square 1. It is fitted when
    it is loaded, and refused if the 95 % interval of its held-out accuracy (10-fold cross-validation) is not above one
    half. With `--rate-every`, it is fitted again during training. Source: Bradley and Terry, 1952. Size, license and
    input: those of the model, see `clip`.
    Over-optimized: what the compared images have in common with it is exaggerated; rate again.
    """

    weight: Tensor
    mean: Tensor
    learns = False  # it is fitted to answers, between updates

    def __init__(self, ratings: str, model: str = "openai/clip-vit-large-patch14", ridge: float = 0.3) -> None:
        super().__init__()
        check_range("reward taste", ridge=(ridge, 1e-6, math.inf))
        self.ratings, self.ridge = user_path(ratings), ridge
        self.comparisons = decided(self.ratings, read_comparisons(self.ratings))
        self.folder = find_network(model, "the reward's model=")
        self.embeddings: dict[Path, Tensor] = {}
        self.accuracy: Accuracy | None = None

    def load(self) -> None:
        self.clip: ClipEncoder = ClipEncoder.from_folder(self.folder)
        for name in ("weight", "mean"):
            self.register_buffer(name, torch.zeros(self.clip.width))
        if fake_mode() is None:
            self.learn_comparisons(self.ratings, self.comparisons)

    def carried(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "mean": self.mean}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.clip.embed_images(images) - self.mean) @ self.weight

    def learn_comparisons(self, path: Path, comparisons: Sequence[Comparison]) -> None:
        """Fit the weight to the comparisons of a file, and log the held-out accuracy.

        Raises:
            DraftuneError: the accuracy is not above chance.
        """
        differences, mean = self.differences(path, comparisons)
        # Two answers about one pair count as one pair, whichever side its images were on.
        pairs = [frozenset(comparison.images) for comparison in comparisons]
        self.accuracy = cross_validate(differences, pairs, self.ridge)
        message = f"the reward {self.label!r} predicts {self.accuracy} of the held-out comparisons in {str(path)!r}"
        if not self.accuracy.above_chance:
            raise DraftuneError(f"{message}: this is not above chance; rate more pairs (draftune rate)")
        logger.info(message)
        weight = fit(differences, self.ridge)
        self.mean.copy_(mean)
        self.weight.copy_(weight / self.scale)

    def predict(self, path: Path, comparisons: Sequence[Comparison]) -> Accuracy:
        """Return how many comparisons of a file the present weight predicts."""
        differences, _ = self.differences(path, comparisons)
        return Accuracy(int((differences @ self.weight.double().cpu() > 0).sum()), len(comparisons))

    def differences(self, path: Path, comparisons: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
        """Return embeddings of preferred minus other images [N, D] with mean square 1, and the mean embedding [D]."""
        files = [[image_path(path, name) for name in comparison.images] for comparison in comparisons]
        self.embed([file for pair in files for file in pair])
        pairs = torch.stack([torch.stack([self.embeddings[file] for file in pair]) for pair in files])  # [N, 2, D]
        differences = pairs[:, 0] - pairs[:, 1]
        self.scale = float(differences.square().sum(1).mean().sqrt()) or 1.0
        return differences / self.scale, pairs.flatten(0, 1).mean(0)

    @torch.no_grad()
    def embed(self, files: Sequence[Path]) -> None:
        """Compute the embeddings of images that have none yet, on a GPU if there is one."""
        new = [file for file in dict.fromkeys(files) if file not in self.embeddings]
        home, place = self.clip.model.device, default_device()
        self.clip.to(place)
        for file in new:
            self.embeddings[file] = self.clip.embed_images(open_image(file).to(place))[0].double().cpu()
        self.clip.to(home)


def decided(path: Path, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons that are not skipped.

    Raises:
        DraftuneError: they are too few, or an image is missing.
    """
    found = [comparison for comparison in comparisons if comparison.choice != SKIP]
    if len(found) < MIN_COMPARISONS:
        raise DraftuneError(
            f"{str(path)!r} has {len(found)} comparisons that are not skipped: the reward taste needs at least "
            f"{MIN_COMPARISONS}; rate more pairs (draftune rate)"
        )
    if missing := missing_images(path, found):
        raise DraftuneError(
            f"{len(missing)} images of {str(path)!r} are missing, such as {missing[0]!r}: "
            "'draftune rate --restore-images' samples them again"
        )
    return found
