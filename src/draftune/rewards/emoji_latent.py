"""The aesthetic score of the embedded model's latents, by a small network that was distilled from the image reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import silu

from draftune.assets import EMBEDDED
from draftune.rewards.base import register
from draftune.rewards.latent import LatentScore
from draftune.rewards.weights import load_into
from draftune.utils.loading import load_part

WIDTHS = (32, 64)
"""Channels at the latents' resolution and at half of it."""
MEAN = 6.0
"""The constant that the scores start from in training, near the mean of the image reward."""


class ResidualBlock(nn.Module):
    """Two convolutions with group norms and a skip connection, [B, C, H, W] to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(silu(norm(y)))
        return x + y


class LatentNetwork(nn.Module):
    """Scores latents [B, channels, H, W], which have a standard deviation of about 1, by B numbers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        wide, wider = WIDTHS
        self.blocks = nn.Sequential(
            nn.Conv2d(channels, wide, 3, padding=1),
            ResidualBlock(wide),
            ResidualBlock(wide),
            nn.Conv2d(wide, wider, 3, stride=2, padding=1),
            ResidualBlock(wider),
            ResidualBlock(wider),
        )
        self.head = nn.Sequential(nn.GroupNorm(8, wider), nn.SiLU(), nn.Conv2d(wider, 8, 1), nn.AdaptiveAvgPool2d(8))
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 8, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.mlp(self.head(self.blocks(x)))
        return MEAN + scores.squeeze(-1)


@register("emoji_latent_aesthetic")
class EmojiLatentAesthetic(LatentScore):
    """`emoji_aesthetic` from the embedded model's clean latents, without its decoder; about 3 to 9.

    A small network that was distilled from `emoji_aesthetic` and its gradient; for models with the embedded
    autoencoder. Input: latents 8x16x16; images, as in evaluations, are encoded first. 0.2 M parameters,
    0.5 MB, Apache-2.0; see its model card.
    Over-optimized: as `emoji_aesthetic`, and beyond that, latents that the network scores too high.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: Path = EMBEDDED["emoji_latent_aesthetic"] / "model.safetensors"

    def load(self) -> None:
        from diffusers import AutoencoderKL

        self.network = LatentNetwork()
        load_into(self.network, self.weights)
        self.vae = load_part(AutoencoderKL, EMBEDDED["emoji"] / "vae")

    def encode(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(2 * images - 1).latent_dist
        return posterior.mean * self.vae.config.scaling_factor

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network(latents)
