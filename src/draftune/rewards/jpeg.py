"""JPEG compressibility and incompressibility: the error of a differentiable JPEG round trip.

The reward of DRaFT is -||x - d(c(x))||^2 (Clark et al., 2023, arXiv:2309.17400). The compression is that of JPEG: YCbCr
with chroma at half resolution, 8x8 DCT, the standard's quantization tables scaled to the quality as in libjpeg, and
rounding. The gradient of rounding is that of its cubic approximation (Shin and Song, 2017).

The paper's quality is not known. The gradient moves each DCT coefficient towards the nearest multiple of its divisor.
Files shrink if they are written at a higher quality than the reward's, so a low quality is useful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from draftune.errors import DraftuneError
from draftune.rewards.base import Reward, register

# ITU-T T.81, tables K.1 and K.2.
LUMINANCE = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
"""
CHROMINANCE = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99
"""
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


def quantization_table(text: str, quality: int) -> Tensor:
    """Return the divisors [8, 8] at a quality of 1 to 100, by libjpeg's rule."""
    table = torch.tensor([float(v) for v in text.split()]).reshape(8, 8)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((table * scale + 50) / 100).floor().clamp(1, 255)


def dct_matrix() -> Tensor:
    """Return the orthonormal DCT-II matrix of length 8; its rows are frequencies."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    matrix = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def soft_round(x: Tensor) -> Tensor:
    """Round, with the gradient of round(x) + (x - round(x))^3."""
    rounded = x.round()
    smooth = rounded.detach() + (x - rounded.detach()) ** 3
    return smooth + (rounded - smooth).detach()


class JPEGRoundTrip(Reward):
    """Base class: ||x - d(c(x))||^2, the squared error of a JPEG round trip summed over all values in [0, 1]."""

    sign: float

    luminance: Tensor
    chrominance: Tensor
    dct: Tensor
    ycbcr: Tensor
    rgb: Tensor

    def __init__(self, quality: int = 10) -> None:
        super().__init__()
        if not isinstance(quality, int) or not 1 <= quality <= 100:
            raise DraftuneError(f"JPEG quality must be a whole number from 1 to 100, not {quality!r}")
        self.register_buffer("luminance", quantization_table(LUMINANCE, quality), persistent=False)
        self.register_buffer("chrominance", quantization_table(CHROMINANCE, quality), persistent=False)
        self.register_buffer("dct", dct_matrix(), persistent=False)
        self.register_buffer("ycbcr", torch.tensor(YCBCR), persistent=False)
        self.register_buffer("rgb", torch.linalg.inv(torch.tensor(YCBCR)), persistent=False)

    def round_trip(self, images: Tensor) -> Tensor:
        """Compress and decompress images [B, 3, H, W] in [0, 1]."""
        height, width = images.shape[-2:]
        x = pad(images * 255, (0, -width % 16, 0, -height % 16), mode="replicate")
        y, cb, cr = torch.einsum("ij,bjhw->bihw", self.ycbcr, x).unbind(1)
        y = self.code(y - 128, self.luminance) + 128
        chroma = avg_pool2d(torch.stack([cb, cr], 1), 2)
        chroma = self.code(chroma, self.chrominance)
        chroma = interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
        x = torch.einsum("ij,bjhw->bihw", self.rgb, torch.cat([y[:, None], chroma], 1)) / 255
        return x[..., :height, :width]

    def code(self, x: Tensor, table: Tensor) -> Tensor:
        """Quantize the DCT coefficients of each 8x8 block of [..., H, W]."""
        *batch, height, width = x.shape
        blocks = x.reshape(*batch, height // 8, 8, width // 8, 8).transpose(-3, -2)
        coefficients = self.dct @ blocks @ self.dct.T
        coefficients = soft_round(coefficients / table) * table
        blocks = self.dct.T @ coefficients @ self.dct
        return blocks.transpose(-3, -2).reshape(x.shape)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.sign * (images - self.round_trip(images)).square().sum((1, 2, 3))


@register("jpeg_compressibility")
class JPEGCompressibility(JPEGRoundTrip):
    """Minus the squared error of JPEG at `quality` (1-100): smooth images score near 0, detailed ones below.

    Source: Clark et al., 2023, arXiv:2309.17400; their quality is not known. No weights; any size.
    Over-optimized: the background disappears, then the subject.
    """

    sign = -1.0


@register("jpeg_incompressibility")
class JPEGIncompressibility(JPEGRoundTrip):
    """The squared error of JPEG at `quality` (1-100), 0 and above: detailed images score high.

    Source: Clark et al., 2023, arXiv:2309.17400; their quality is not known. No weights; any size.
    Over-optimized: noise.
    """

    sign = 1.0
