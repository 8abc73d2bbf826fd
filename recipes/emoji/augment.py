"""Augmentations that keep what an image shows, and damage that makes it a worse image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate

from common import uniform

KINDS = 5


def sample_white(x: Tensor, grid: Tensor) -> Tensor:
    """Sample images in [-1, 1] at the positions of a grid, white outside: grid_sample itself pads with 0."""
    return 1 - grid_sample(1 - x, grid, align_corners=False)


def moved(x: Tensor, strength: float) -> Tensor:
    """Rotate, scale and shift at random."""
    n = len(x)
    angle = uniform(n, -1, 1).flatten() * strength * math.radians(12)
    zoom = torch.exp(uniform(n, -0.2, 0.3).flatten() * strength)
    shift = torch.empty(n, 2).uniform_(-0.2, 0.2) * strength
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(n, 2, 3)
    return sample_white(x, affine_grid(matrix, list(x.shape), align_corners=False))


def recolored(x: Tensor, strength: float) -> Tensor:
    """Change saturation, contrast, brightness and channel offsets at random."""
    n = len(x)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * torch.exp(uniform(n, -0.6, 0.4) * strength)
    x = x * torch.exp(uniform(n, -0.4, 0.2) * strength) + uniform(n, -0.2, 0.1) * strength
    return x + torch.empty(n, 3, 1, 1).uniform_(-0.12, 0.12) * strength


def blurred(x: Tensor, strength: float) -> Tensor:
    """Blur half of the images by a random amount."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    soft = conv2d(x, torch.outer(line, line).expand(3, 1, 5, 5), padding=2, groups=3)
    return x.lerp(soft, (uniform(len(x), -1, 1) * strength).clamp(min=0))


def cut_out(x: Tensor, strength: float) -> Tensor:
    """Fill a random rectangle with a random color (cutout)."""
    n, side = len(x), x.shape[-1]
    half = torch.empty(n, 2).uniform_(-side / 8, side / 6.4) * strength
    center, line = torch.empty(n, 2).uniform_(0, side), torch.arange(side)
    rows, columns = ((line - center[:, i, None]).abs() < half[:, i, None] for i in (0, 1))
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(hole, torch.empty(n, 3, 1, 1).uniform_(-1, 1), x)


def augmented(x: Tensor, strength: float) -> Tensor:
    """Augment images in [-1, 1] by changes that a generated image of the same emoji may show."""
    x = cut_out(blurred(recolored(moved(x, strength), strength), strength), strength)
    return (x + torch.randn_like(x) * uniform(len(x), 0, 0.15) * strength).clamp(-1, 1)


def smooth_noise(n: int, channels: int, cells: int, side: int) -> Tensor:
    """Return noise [n, channels, side, side] of unit variance at the nodes of a grid, interpolated between them."""
    return interpolate(torch.randn(n, channels, cells, cells), (side, side), mode="bicubic")


def coarse(x: Tensor, amount: Tensor) -> Tensor:
    """Mix images with versions of an eighth of their resolution; 0.2 blends in a faint one, 1 replaces the image."""
    side = x.shape[-1]
    return x.lerp(interpolate(interpolate(x, side // 8, mode="area"), side, mode="bilinear"), amount)


def noisy(x: Tensor, amount: Tensor) -> Tensor:
    """Add noise: of single pixels to half of the images, of patches to the others."""
    n, side = len(x), x.shape[-1]
    patches = smooth_noise(n, 3, side // 8, side)
    return x + 0.5 * amount * torch.where(uniform(n, 0, 1) < 0.5, torch.randn_like(x), patches)


def tinted(x: Tensor, amount: Tensor) -> Tensor:
    """Move the colors toward a random linear mixture of the channels, black and white kept in place."""
    mixture = torch.rand(len(x), 3, 3).pow(3)
    mixture = mixture / mixture.sum(-1, keepdim=True)
    return x.lerp(torch.einsum("nij,njhw->nihw", mixture, x), amount)


def smeared(x: Tensor, amount: Tensor) -> Tensor:
    """Move the pixels by a random smooth field of up to about a tenth of the image."""
    n, side = len(x), x.shape[-1]
    identity = affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False)
    field = smooth_noise(n, 2, 8, side).permute(0, 2, 3, 1)
    return sample_white(x, identity + 0.12 * amount * field)


def patched(x: Tensor, amount: Tensor) -> Tensor:
    """Replace random patches by those of another image; `amount` is about twice their share."""
    n, side = len(x), x.shape[-1]
    chosen = interpolate((torch.rand(n, 1, 8, 8) < amount / 2).float(), (side, side))
    return torch.where(chosen.bool(), x.roll(1, 0), x)


def damaged(x: Tensor) -> tuple[Tensor, Tensor]:
    """Damage images in [-1, 1], each in one of five ways.

    Returns:
        The images, and the strength of the damage [N] in [0.15, 1].
    """
    amount, kind = uniform(len(x), 0.15, 1), torch.randint(KINDS, (len(x), 1, 1, 1))
    y = x
    for i, change in enumerate((coarse, noisy, tinted, smeared, patched)):
        y = torch.where(kind == i, change(x, amount), y)
    return y.clamp(-1, 1), amount.flatten()
