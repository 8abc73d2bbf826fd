"""Rewards without a gradient: a wrapper that estimates one from scores alone, and the size of a JPEG file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from draftune.errors import DraftuneError, unknown
from draftune.images import to_pil
from draftune.rewards.base import Reward, register
from draftune.zeroth_order import Estimator

BASES = ("dct", "grid", "detail")
NEIGHBOURS = 5
"""Pixels across from whose mean a picture's detail is the difference."""


def waves(count: int, length: int) -> Tensor:
    """The `count` slowest cosines over `length` pixels, orthonormal rows [count, length]."""
    k, n = torch.arange(count)[:, None], torch.arange(length)[None]
    rows = torch.cos((2 * n + 1) * k * (math.pi / (2 * length)))
    return rows / rows.norm(dim=1, keepdim=True)


def blocks(count: int, length: int) -> Tensor:
    """`count` blocks that part `length` pixels as evenly as can be, orthonormal rows [count, length]."""
    rows = (torch.arange(count)[:, None] == torch.arange(length)[None] * count // length).float()
    return rows / rows.norm(dim=1, keepdim=True)


class Patterns:
    """Changes of a picture [3, H, W] as sums of orthonormal patterns: numbers [d] to [3, H, W], and linear."""

    def __init__(self, basis: str, size: int, image: Tensor) -> None:
        rows = waves if basis == "dct" else blocks
        self.vertical, self.horizontal = (rows(size, length).to(image) for length in image.shape[-2:])
        self.shape, self.detail = (-1, size, size), None
        if basis == "detail":
            near = avg_pool2d(image, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False)
            self.detail = image - near
            squares = self.detail.square().sum(0, keepdim=True)
            lengths = torch.einsum("chw,kh,lw->ckl", squares, self.vertical**2, self.horizontal**2).sqrt()
            # Where there is no detail, there is nothing to strengthen.
            self.weights = 1 / lengths.clamp(min=1e-3)

    def __call__(self, point: Tensor) -> Tensor:
        given = point.reshape(self.shape)
        if self.detail is not None:
            given = given * self.weights
        change = torch.einsum("ckl,kh,lw->chw", given, self.vertical, self.horizontal)
        return change if self.detail is None else change * self.detail


class BlackBox(Reward):
    """A reward with a gradient that is estimated from its scores of changed pictures, whether it has one or not.

    Every picture is asked about by itself, with changes that are sums of patterns; what none shows gets no gradient.
    The changed pictures keep to [0, 1]. Each is scored alone and from the same state of torch's random numbers, so that
    a reward that draws some draws the same for all of them. Without a gradient to be taken, it is the wrapped reward.
    """

    def __init__(
        self,
        reward: Reward,
        directions: int = 0,
        coordinates: int = 0,
        step: float = 0.05,
        basis: str = "dct",
        size: int = 4,
        central: bool = True,
    ) -> None:
        super().__init__()
        if basis not in BASES:
            raise unknown("basis", basis, BASES)
        for name, value in (("step", step), ("size", size)):
            if not 0 < value < math.inf:
                raise DraftuneError(f"{name} of reward black-box must be above 0, not {value}")
        self.dimensions = (1 if basis == "detail" else 3) * size**2
        self.estimator = Estimator(self.dimensions, directions, coordinates)
        self.reward, self.step, self.basis, self.size, self.central = reward, step, basis, size, central
        self.label = f"black-box({reward.label})"

    def load(self) -> None:
        self.reward.ready()

    def check(self, prompts: Sequence[str]) -> None:
        self.reward.check(prompts)

    def carried(self) -> dict[str, Tensor]:
        return {"levels": self.estimator.levels}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self.reward(images, prompts)
        if self.size > (most := min(images.shape[-2:])):
            raise DraftuneError(
                f"size of reward black-box must be at most the pictures' {most} pixels, not {self.size}"
            )
        found = [self.estimated(image, prompt) for image, prompt in zip(images.detach(), prompts, strict=True)]
        scores, gradients = (torch.stack(part) for part in zip(*found, strict=True))
        # Nothing is added to the scores but their gradient.
        return scores + ((images - images.detach()) * gradients).sum((1, 2, 3))

    def estimated(self, image: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
        """The score [] of a picture [3, H, W] and an estimate of the gradient."""
        change, seed = Patterns(self.basis, self.size, image), int(torch.randint(2**31, ()))

        def value(point: Tensor) -> Tensor:
            with torch.no_grad(), torch.random.fork_rng([image.device] if image.is_cuda else []):
                torch.manual_seed(seed)
                return self.reward((image + change(point)).clamp(0, 1)[None], [prompt])[0]

        def values(points: Tensor) -> Tensor:
            self.extra_queries += len(points)
            return torch.stack([value(point) for point in points])

        start = image.new_zeros(self.dimensions)
        score = value(start)
        # Patterns are orthonormal: a change of this length has the wanted root of its mean square.
        length = self.step * math.sqrt(image.numel())
        return score, change(self.estimator(values, start, length, None if self.central else score))


@register("black-box")
def black_box(
    reward: Reward,
    directions: int = 0,
    coordinates: int = 0,
    step: float = 0.05,
    basis: str = "dct",
    size: int = 4,
    central: bool = True,
) -> Reward:
    """Any reward, with a gradient that is estimated from scores alone: `black-box(jpeg-bytes, directions=8)`.

    Pictures are changed by sums of `size` x `size` patterns: slow waves in each channel (`basis=dct`), even blocks in
    each (`grid`), or the picture's own detail in such blocks, stronger or weaker (`detail`, as the size of files
    wants); what no pattern shows gets no gradient. `coordinates`: single patterns, drawn the more often the more
    strongly they answered so far, 8 unless anything is given; `directions`: random ones, each of all patterns at once,
    better for some hundreds of patterns or more; both together are the hybrid of ZO-HGD (arXiv 2012.11518; how that
    draws and weighs them is not confirmed).
    `step`: the root mean square of a change of the picture's values in [0, 1]. Two more scored pictures for each, one
    with `central=false`, all of them counted. Range and weights are those of the wrapped reward, which is
    over-optimised as it is with its own gradient, though within what the patterns can change.
    """
    if not (directions or coordinates):
        coordinates = 8
    return BlackBox(reward, directions, coordinates, step, basis, size, central)


class JpegBytes(Reward):
    """Minus the thousands of bytes of the picture as Pillow writes it."""

    def __init__(self, quality: int) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise DraftuneError(f"JPEG quality must be a whole number from 1 to 100, not {quality}")
        self.quality = quality

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes = []
        for image in to_pil(images):
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell())
        return torch.tensor(sizes, device=images.device) / -1000


@register("jpeg-bytes")
def jpeg_bytes(quality: int = 75) -> Reward:
    """Minus the size of the picture's JPEG file in thousands of bytes, as Pillow writes it at `quality` (1-100).

    It has no gradient: train on it with `black-box(jpeg-bytes, basis=detail)` or with the method `ddpo`;
    `jpeg-compressibility` is the differentiable one. No weights; any size. Over-optimised: a picture of one colour.
    """
    return JpegBytes(quality)
