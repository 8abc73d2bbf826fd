"""Zeroth-order gradients: rewards known by their scores only, and the size of a JPEG file as one of them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from draftune.errors import DraftuneError, unknown
from draftune.experimental.zeroth_order import Estimator
from draftune.registry.factories import check_range
from draftune.rewards.base import Reward, register
from draftune.rewards.latent import Decode, LatentReward
from draftune.rewards.online import OnlineReward
from draftune.utils.images import to_pil

BASES, SPACES = ("dct", "grid", "high_pass"), ("image", "latent")
DEFAULT_COORDINATES = 8
BLUR = 5
"""Side in pixels of the box blur that the high-pass basis subtracts."""


def dct_rows(count: int, length: int) -> Tensor:
    """Return the `count` lowest frequencies of the DCT-II over `length` pixels as orthonormal rows [count, length]."""
    k, n = torch.arange(count)[:, None], torch.arange(length)[None]
    rows = torch.cos((2 * n + 1) * k * (math.pi / (2 * length)))
    return rows / rows.norm(dim=1, keepdim=True)


def block_rows(count: int, length: int) -> Tensor:
    """Return `count` blocks that divide `length` pixels as evenly as possible, orthonormal rows [count, length]."""
    rows = (torch.arange(count)[:, None] == torch.arange(length)[None] * count // length).float()
    return rows / rows.norm(dim=1, keepdim=True)


def clamp_to_image(images: Tensor) -> Tensor:
    return images.clamp(0, 1)


class PerturbationBasis:
    """A linear map from coefficients [d] to a change of one image or latent [C, H, W], with orthonormal basis images.

    `size` x `size` basis images for each channel: low frequencies ("dct") or blocks ("grid"). "high_pass" has blocks of
    the image's own high-pass detail, shared by the channels.
    """

    def __init__(self, basis: str, size: int, image: Tensor) -> None:
        rows = dct_rows if basis == "dct" else block_rows
        self.vertical, self.horizontal = (rows(size, length).to(image) for length in image.shape[-2:])
        self.shape, self.detail = (1 if basis == "high_pass" else len(image), size, size), None
        if basis == "high_pass":
            blurred = avg_pool2d(image, BLUR, 1, BLUR // 2, count_include_pad=False)
            self.detail = image - blurred
            squares = self.detail.square().sum(0, keepdim=True)
            norms = torch.einsum("chw,kh,lw->ckl", squares, self.vertical**2, self.horizontal**2).sqrt()
            # A block without detail keeps a change of about 0, instead of a division by 0.
            self.weights = 1 / norms.clamp(min=1e-3)

    def __call__(self, coefficients: Tensor) -> Tensor:
        values = coefficients.reshape(self.shape)
        if self.detail is not None:
            values = values * self.weights
        change = torch.einsum("ckl,kh,lw->chw", values, self.vertical, self.horizontal)
        return change if self.detail is None else change * self.detail


@register("zeroth_order")
class ZerothOrder(OnlineReward, LatentReward):
    """Any reward, with a gradient estimated from its scores: `zeroth_order(jpeg_file_size, directions=8)`.

    Each image is perturbed by `size` x `size` basis images: low frequencies of each channel (`basis=dct`), blocks of
    each channel (`grid`), or blocks of the image's own high-pass detail (`high_pass`, suited to file sizes). Directions
    outside the basis get no gradient. Without a gradient to compute, this is the wrapped reward.
    `coordinates`: basis images perturbed one at a time, sampled in proportion to how strongly the score responded so
    far; 8 if neither is set. `directions`: random directions that perturb all basis images together, better for some
    hundreds of basis images or more. Both together are the hybrid of ZO-HGD (Sharma et al., 2020, arXiv:2012.11518),
    with this project's own sampling probabilities and weights.
    `perturbation_std`: the root mean square of a perturbation, in pixel values of [0, 1]. `central`: central
    differences, 2 more scored images for each direction or coordinate; else forward differences, 1 more. All are
    counted, and all perturbations of an image are scored from the same random state of torch.
    `space=latent` perturbs the clean latents and decodes each perturbation; `perturbation_std` is then in units of the
    latents, whose standard deviation is about 1. This works alone or in sums, not inside `sharpness_aware`.
    Range and weights are those of the wrapped reward. It is over-optimized like that, within the span of the basis.
    """

    learns = False

    def __init__(
        self,
        reward: Reward,
        directions: int = 0,
        coordinates: int = 0,
        perturbation_std: float = 0.05,
        basis: str = "dct",
        size: int = 4,
        central: bool = True,
        space: str = "image",
    ) -> None:
        super().__init__()
        for name, value, known in (("basis", basis, BASES), ("space", space, SPACES)):
            if value not in known:
                raise unknown(name, value, known)
        check_range("reward zeroth_order", size=(size, 1, math.inf))
        if not 0 < perturbation_std < math.inf:
            raise DraftuneError(
                f"perturbation_std of reward zeroth_order must be above 0 and finite, not {perturbation_std}"
            )
        if not (directions or coordinates):
            coordinates = DEFAULT_COORDINATES
        self.estimator = Estimator(directions, coordinates)
        self.reward, self.perturbation_std, self.basis = reward, perturbation_std, basis
        self.size, self.central, self.past_decoder = size, central, space == "latent"
        self.label = f"zeroth_order({reward.label})"

    def load(self) -> None:
        self.reward.load_weights()

    def carried(self) -> dict[str, Tensor]:
        return {"levels": self.estimator.levels}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self.reward(images, prompts)
        pairs = zip(images.detach(), prompts, strict=True)
        estimates = [self.estimate(image, clamp_to_image, prompt) for image, prompt in pairs]
        scores, gradients = (torch.stack(part) for part in zip(*estimates, strict=True))
        # Adds 0 to the scores, and the estimate to the images' gradient.
        return scores + ((images - images.detach()) * gradients).sum((1, 2, 3))

    def slope(self, latents: Tensor, decode: Decode, prompts: Sequence[str]) -> Tensor:
        if not self.central:
            self.extra_queries += len(latents)  # the unperturbed latents are scored again, from the same random state
        pairs = zip(latents, prompts, strict=True)
        return torch.stack([self.estimate(latent, decode, prompt)[1] for latent, prompt in pairs])

    def estimate(self, point: Tensor, to_images: Callable[[Tensor], Tensor], prompt: str) -> tuple[Tensor, Tensor]:
        """Return the score [] of an image or latent [C, H, W], and an estimate of its gradient [C, H, W]."""
        if self.size > (limit := min(point.shape[-2:])):
            owner = "latents'" if self.past_decoder else "images'"
            raise DraftuneError(
                f"size of reward zeroth_order must be at most the {owner} {limit} pixels, not {self.size}"
            )
        change, seed = PerturbationBasis(self.basis, self.size, point), int(torch.randint(2**31, ()))

        def score_at(coefficients: Tensor) -> Tensor:
            with torch.no_grad(), torch.random.fork_rng([point.device] if point.is_cuda else []):
                torch.manual_seed(seed)
                return self.reward(to_images((point + change(coefficients))[None]), [prompt])[0]

        def scores_at(coefficients: Tensor) -> Tensor:
            self.extra_queries += len(coefficients)
            return torch.stack([score_at(row) for row in coefficients])

        origin = point.new_zeros(change.shape).flatten()
        # With central differences in latent space, the score of the unperturbed latents is not needed here.
        score = origin.sum() if self.past_decoder and self.central else score_at(origin)
        # The basis is orthonormal, so coefficients of this length change the image by the root mean square.
        length = self.perturbation_std * math.sqrt(point.numel())
        return score, change(self.estimator(scores_at, origin, length, None if self.central else score))


@register("jpeg_file_size")
class JPEGFileSize(Reward):
    """Minus the size of the image's JPEG file in thousands of bytes, as Pillow writes it at `quality` (1-100).

    It has no gradient: train on it with `zeroth_order(jpeg_file_size, basis=high_pass)` or with the method `ddpo`;
    `jpeg_compressibility` is differentiable. No weights; any size. Over-optimized: an image of one color.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        check_range("reward jpeg_file_size", quality=(quality, 1, 100))
        self.quality = quality

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes = []
        for image in to_pil(images):
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell())
        return torch.tensor(sizes, device=images.device) / -1000
