"""A reward that is known by examples alone: a critic that learns to tell them from what the model draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, out_of_memory
from draftune.experimental.learner import Learner, missed
from draftune.rewards.base import Reward, register
from draftune.rewards.preprocess import HALF, Preprocess
from draftune.utils.images import open_image
from draftune.utils.paths import user_path

FEWEST = 2
"""Pictures in a folder of examples."""
SMALLEST = 16
"""Pixels that are left one by four halvings."""


def critic_loss(real: Tensor, drawn: Tensor, expected: Tensor, baseline: float) -> Tensor:
    """What the critic makes smaller: scores of examples [N] above those of drawn pictures [B].

    mean(drawn) - mean(real) + baseline * sum over s of mean over b of (expected[b, s] - drawn[b])^2; `expected` [B, S]
    is what was expected of each drawn picture at each of S steps. The last term holds the critic back, which has no
    other bound; drawn is no constant in it.
    """
    return drawn.mean() - real.mean() + baseline * missed(expected, drawn)


def critic_network(width: int) -> nn.Sequential:
    """Four convolutions that halve the size, `width` channels first and four times as many in the end."""
    layers: list[nn.Module] = []
    for channels, following in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(channels, following, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))


class Examples(Reward):
    """How much a picture looks like those of a folder, by a critic that learns while a run goes on.

    It has no meaning before it has learned, and its zero and its unit move while it does.
    """

    learns = True

    def __init__(
        self, folder: str, width: int, size: int, learning_rate: float, baseline: float, seed: int, critic: str
    ) -> None:
        super().__init__()
        lowest = {"width": (width, 1), "size": (size, SMALLEST), "baseline": (baseline, 0), "seed": (seed, 0)}
        for name, (value, low) in lowest.items():
            if not low <= value < 2**63:
                raise DraftuneError(f"{name} of reward examples must be at least {low}, not {value}")
        if not 0 < learning_rate < 1:
            raise DraftuneError(f"learning_rate of reward examples must be between 0 and 1, not {learning_rate}")
        self.baseline, self.seed = baseline, seed
        self.preprocess = Preprocess(size, size, HALF, HALF)
        self.checkpoint = find_critic(critic) if critic else None
        self.learner = Learner(lambda: critic_network(width), learning_rate, seed)
        self.examples = read_examples(folder, self.preprocess)

    @property
    def untaught(self) -> bool:  # type: ignore[override]
        return self.checkpoint is None and not self.learner.count

    def load(self) -> None:
        if self.checkpoint is not None:
            load_critic(self.learner, self.checkpoint)

    def carried(self) -> dict[str, Tensor]:
        return self.learner.state_dict()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.learner(self.preprocess(images))

    def learn(self, images: Tensor, prompts: Sequence[str], expected: Tensor | None) -> None:
        drawn = self.preprocess(images.detach().float())
        # By how many times it has learned, so that a run that goes on draws what it would have drawn.
        generator = torch.Generator().manual_seed((self.seed * 2**32 + int(self.learner.count)) % 2**63)
        chosen = torch.randint(len(self.examples), (len(images),), generator=generator)
        real = self.examples[chosen].to(images.device).float() / 127.5 - 1
        if expected is None:
            expected = self.learner(drawn).mean().expand(len(images), 1)

        def loss(critic: Callable[..., Tensor]) -> Tensor:
            return critic_loss(critic(real), critic(drawn), expected.to(real), self.baseline)

        self.learner.learn(loss)


def read_examples(folder: str, preprocess: Preprocess) -> Tensor:
    """The pictures in a folder and those inside it as the critic sees them, in 8 bits [N, 3, size, size].

    Raises DraftuneError for one that can't be read, or where there are none.
    """
    from draftune.utils.images import find_images

    path = user_path(folder)
    if not folder.strip() or not path.is_dir():
        raise DraftuneError(f"no folder {folder!r}: the reward examples takes a folder of pictures")
    files = find_images([folder])
    if len(files) < FEWEST:
        raise DraftuneError(f"{folder!r} holds {len(files)} picture: the reward examples wants at least {FEWEST}")
    return torch.cat([((preprocess(open_image(file)) + 1) * 127.5).round().byte() for file in files])


def find_critic(run: str) -> Path:
    """The newest checkpoint of a run. Raises DraftuneError where it has none."""
    from draftune.runs.checkpoint import checkpoints

    found = checkpoints(user_path(run) / "checkpoints")
    if not found:
        raise DraftuneError(f"no run with a checkpoint at {run!r}: critic= takes the folder of a run")
    return found[-1]


def load_critic(learner: Learner, checkpoint: Path) -> None:
    """Gives the critic the weights that it has in a checkpoint. Raises DraftuneError where there are none that fit."""
    from draftune.runs.checkpoint import check, read_tensors

    check(checkpoint)
    name = "network.0.weight"
    tensors = read_tensors(checkpoint)
    start = next((key.removesuffix(name) for key in tensors if key.startswith("reward/") and key.endswith(name)), None)
    if start is None:
        raise DraftuneError(f"the run of {str(checkpoint)!r} was not trained on examples(…): it has no critic")
    try:
        learner.load_state_dict({key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)})
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the critic in {str(checkpoint)!r} has another width") from error


@register("examples")
def examples(
    folder: str,
    width: int = 128,
    size: int = 64,
    learning_rate: float = 1e-4,
    baseline: float = 1.0,
    seed: int = 0,
    critic: str = "",
) -> Reward:
    """Likeness to the pictures of a folder, by a critic that learns during training to tell them from the model's.

    `folder`: at least 2 pictures, some hundreds to be worth it; whatever the prompts. The critic: four convolutions on
    the middle `size` x `size` pixels, of `width`, 2 and 4 times that and 1 channels; for each batch that is drawn one
    step of Adam at `learning_rate`, with as many examples, that lowers the scores of what was drawn and raises those of
    the examples, held by `baseline` times the squared distance from the scores that were expected. From random weights
    of `seed`, or from those that a run left: `critic=RUN`. Any size; no weights to download.
    Its zero and unit move while it learns: compare scores of one state alone, and watch --held-out rewards.
    Over-optimised: whatever texture this critic takes for the examples'. Source: SFT-PG (Fan and Lee, arXiv
    2301.13362), whose width, rate (of its larger runs) and baseline are the defaults.
    """
    return Examples(folder, width, size, learning_rate, baseline, seed, critic)
