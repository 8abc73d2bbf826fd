"""A reward known by example images only: a discriminator that is trained during fine-tuning (SFT-PG)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, out_of_memory
from draftune.experimental.learner import OnlineModule, value_loss
from draftune.registry.factories import check_range
from draftune.rewards.base import register
from draftune.rewards.online import OnlineReward
from draftune.rewards.preprocess import HALF, Preprocess
from draftune.utils.images import open_image
from draftune.utils.paths import user_path

MIN_EXAMPLES = 2
MIN_SIZE = 16
"""Pixels from which four halvings leave one."""


def critic_loss(real: Tensor, generated: Tensor, expected: Tensor, baseline: float) -> Tensor:
    """Return the discriminator's loss for scores of examples [N] and of generated images [B].

    mean(generated) - mean(real) + baseline * sum over s of mean over b of (expected[b, s] - generated[b])^2

    The last term bounds the discriminator, and its gradient flows through `generated` too.

    Args:
        real: Scores of examples [N].
        generated: Scores of generated images [B].
        expected: The value function's prediction of each score at S sampling steps, [B, S].
        baseline: Weight of the last term.
    """
    return generated.mean() - real.mean() + baseline * value_loss(expected, generated)


def critic_network(width: int) -> nn.Sequential:
    """Build four convolutions that each halve the size, with `width`, 2 * width, 4 * width and 1 channels."""
    layers: list[nn.Module] = []
    for channels, following in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(channels, following, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))


@register("discriminator")
class Discriminator(OnlineReward):
    """Similarity to the images of a folder, by a discriminator that is trained during fine-tuning.

    `folder`: at least 2 images, better some hundreds; prompts are ignored. The discriminator has four convolutions on
    the center `size` x `size` pixels. Each batch of generated images gives it one Adam step at `learning_rate` that
    lowers their scores and raises those of as many examples; `baseline` weighs the squared distance from the expected
    scores, which bounds it. It starts from random weights of `seed`, or from those in a run: `critic=RUN`. Input: any
    size; no weights to download.
    Its zero and unit change while it learns: compare scores of one state only, and use evaluation rewards.
    Over-optimized: textures that this discriminator takes for those of the examples. Source: SFT-PG (Fan and Lee, 2023,
    arXiv:2301.13362); its width, learning rate (of the larger runs) and baseline are the defaults.
    """

    def __init__(
        self,
        folder: str,
        width: int = 128,
        size: int = 64,
        learning_rate: float = 1e-4,
        baseline: float = 1.0,
        seed: int = 0,
        critic: str = "",
    ) -> None:
        super().__init__()
        limit = 2**63 - 1
        lowest = {"width": (width, 1, limit), "size": (size, MIN_SIZE, limit), "seed": (seed, 0, limit)}
        check_range("reward discriminator", **lowest, baseline=(baseline, 0, math.inf))
        if not 0 < learning_rate < 1:
            raise DraftuneError(f"learning_rate of reward discriminator must be between 0 and 1, not {learning_rate}")
        self.baseline, self.seed = baseline, seed
        self.preprocess = Preprocess(size, size, HALF, HALF)
        self.checkpoint = find_checkpoint(critic) if critic else None
        self.learner = OnlineModule(lambda: critic_network(width), learning_rate, seed)
        self.examples = read_examples(folder, self.preprocess)

    @property
    def untaught(self) -> bool:  # type: ignore[override]
        return self.checkpoint is None and not self.learner.count

    def load(self) -> None:
        if self.checkpoint is not None:
            load_discriminator(self.learner, self.checkpoint)

    def carried(self) -> dict[str, Tensor]:
        return self.learner.state_dict()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.learner(self.preprocess(images))

    def learn(self, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
        generated = self.preprocess(images.detach().float())
        # Seeded by the number of steps so far, so that a resumed run samples the same examples.
        generator = torch.Generator().manual_seed((self.seed * 2**32 + int(self.learner.count)) % 2**63)
        chosen = torch.randint(len(self.examples), (len(images),), generator=generator)
        real = self.examples[chosen].to(images.device).float() / 127.5 - 1
        if expected is None:
            expected = self.learner(generated).mean().expand(len(images), 1)

        def loss(critic: Callable[..., Tensor]) -> Tensor:
            return critic_loss(critic(real), critic(generated), expected.to(real), self.baseline)

        self.learner.learn(loss)


def read_examples(folder: str, preprocess: Preprocess) -> Tensor:
    """Read the images in a folder and its subfolders, preprocessed, in 8 bits: [N, 3, size, size].

    Raises:
        DraftuneError: if there is no such folder, for an image that can't be read, and for fewer than MIN_EXAMPLES.
    """
    from draftune.utils.images import find_images

    if not folder.strip() or not user_path(folder).is_dir():
        raise DraftuneError(f"no folder {folder!r}: the reward discriminator takes a folder of images")
    files = find_images([folder])
    if len(files) < MIN_EXAMPLES:
        raise DraftuneError(
            f"{folder!r} has {len(files)} image: the reward discriminator needs at least {MIN_EXAMPLES}"
        )
    return torch.cat([((preprocess(open_image(file)) + 1) * 127.5).round().byte() for file in files])


def find_checkpoint(run: str) -> Path:
    """Return the newest checkpoint of a run. Raises DraftuneError if there is none."""
    from draftune.runs.checkpoint import checkpoints

    paths = checkpoints(user_path(run) / "checkpoints")
    if not paths:
        raise DraftuneError(f"no run with a checkpoint at {run!r}: critic= takes the folder of a run")
    return paths[-1]


def load_discriminator(learner: OnlineModule, checkpoint: Path) -> None:
    """Load the discriminator's weights from a run's checkpoint. Raises DraftuneError if none there fit."""
    from draftune.runs.checkpoint import check, read_tensors

    check(checkpoint)
    name = "network.0.weight"
    tensors = read_tensors(checkpoint)
    start = next((key.removesuffix(name) for key in tensors if key.startswith("reward/") and key.endswith(name)), None)
    if start is None:
        raise DraftuneError(f"the run of {str(checkpoint)!r} was not trained on discriminator(…)")
    try:
        learner.load_state_dict({key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)})
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the discriminator in {str(checkpoint)!r} has another width") from error
