"""Rewards without a gradient: a wrapper that estimates one from scores alone, and the size of a JPEG file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from draftune.errors import DraftuneError, unknown
from draftune.experimental.zeroth_order import Estimator
from draftune.rewards.base import Decode, Reward, register
from draftune.utils.images import to_pil

BASES, SPACES = ("dct", "grid", "detail"), ("image", "latent")
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


def in_range(images: Tensor) -> Tensor:
    return images.clamp(0, 1)


class Patterns:
    """Changes of pictures or latents [C, H, W] as sums of orthonormal patterns: numbers [d] to [C, H, W], linear."""

    def __init__(self, basis: str, size: int, image: Tensor) -> None:
        rows = waves if basis == "dct" else blocks
        self.vertical, self.horizontal = (rows(size, length).to(image) for length in image.shape[-2:])
        self.shape, self.detail = (1 if basis == "detail" else len(image), size, size), None
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
    The changed pictures keep to [0, 1]; in the space "latent" it is the clean latents that are changed, and each of
    them is decoded. Each is scored alone and from the same state of torch's random numbers, so that a reward that draws
    some draws the same for all of them. Without a gradient to be taken, it is the wrapped reward.
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
        space: str = "image",
    ) -> None:
        super().__init__()
        for name, given, known in (("basis", basis, BASES), ("space", space, SPACES)):
            if given not in known:
                raise unknown(name, given, known)
        for name, value in (("step", step), ("size", size)):
            if not 0 < value < math.inf:
                raise DraftuneError(f"{name} of reward black-box must be above 0, not {value}")
        self.estimator = Estimator(directions, coordinates)
        self.reward, self.step, self.basis, self.size, self.central = reward, step, basis, size, central
        self.past_decoder = space == "latent"
        self.label = f"black-box({reward.label})"

    def load(self) -> None:
        self.reward.ready()

    def carried(self) -> dict[str, Tensor]:
        return {"levels": self.estimator.levels}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self.reward(images, prompts)
        given = zip(images.detach(), prompts, strict=True)
        found = [self.estimated(image, in_range, prompt) for image, prompt in given]
        scores, gradients = (torch.stack(part) for part in zip(*found, strict=True))
        # Nothing is added to the scores but their gradient.
        return scores + ((images - images.detach()) * gradients).sum((1, 2, 3))

    def slope(self, latents: Tensor, decode: Decode, prompts: Sequence[str]) -> Tensor:
        if not self.central:
            self.extra_queries += len(latents)  # once more, from the same random numbers as what is changed
        given = zip(latents, prompts, strict=True)
        return torch.stack([self.estimated(latent, decode, prompt)[1] for latent, prompt in given])

    def estimated(self, at: Tensor, show: Decode, prompt: str) -> tuple[Tensor, Tensor]:
        """The score [] of what a picture or latent [C, H, W] shows and an estimate of the gradient by it."""
        if self.size > (most := min(at.shape[-2:])):
            of = "latents'" if self.past_decoder else "pictures'"
            raise DraftuneError(f"size of reward black-box must be at most the {of} {most} pixels, not {self.size}")
        change, seed = Patterns(self.basis, self.size, at), int(torch.randint(2**31, ()))

        def value(point: Tensor) -> Tensor:
            with torch.no_grad(), torch.random.fork_rng([at.device] if at.is_cuda else []):
                torch.manual_seed(seed)
                return self.reward(show((at + change(point))[None]), [prompt])[0]

        def values(points: Tensor) -> Tensor:
            self.extra_queries += len(points)
            return torch.stack([value(point) for point in points])

        start = at.new_zeros(change.shape).flatten()
        # With central differences nobody asks for the score of latents here.
        score = start.sum() if self.past_decoder and self.central else value(start)
        # Patterns are orthonormal: a change of this length has the wanted root of its mean square.
        length = self.step * math.sqrt(at.numel())
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
    space: str = "image",
) -> Reward:
    """Any reward, with a gradient that is estimated from scores alone: `black-box(jpeg-bytes, directions=8)`.

    Pictures are changed by sums of `size` x `size` patterns: slow waves in each channel (`basis=dct`), even blocks in
    each (`grid`), or the picture's own detail in such blocks, stronger or weaker (`detail`, as the size of files
    wants); what no pattern shows gets no gradient. `coordinates`: single patterns, drawn the more often the more
    strongly they answered so far, 8 unless anything is given; `directions`: random ones, each of all patterns at once,
    better for some hundreds of patterns or more; both together are the hybrid of ZO-HGD (arXiv 2012.11518), with this
    project's own way to draw and weigh them.
    `step`: the root mean square of a change of the picture's values in [0, 1]. Two more scored pictures for each, one
    with `central=false`, all of them counted. `space=latent` changes the clean latents instead, where a pattern is a
    change that the decoder can draw: the gradient goes past the decoder, every changed latent is decoded for its score,
    and `step` is in the latents' units, whose spread is about 1; it stands alone or in sums, not inside of `robust`.
    Range and weights are those of the wrapped reward, which is over-optimised as it is with its own gradient, though
    within what the patterns can change.
    """
    if not (directions or coordinates):
        coordinates = 8
    return BlackBox(reward, directions, coordinates, step, basis, size, central, space)


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
