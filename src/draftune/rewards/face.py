"""Face identity: the cosine of face embeddings by FaceNet's Inception-ResNet v1."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from draftune.errors import DraftuneError, gather
from draftune.rewards.base import register
from draftune.rewards.detection import OwlViT
from draftune.rewards.likeness import Likeness
from draftune.rewards.preprocess import normalized, resize
from draftune.rewards.weights import check_layout, find_file, load_tensors
from draftune.utils.weightless import fake_mode

RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
VGGFACE2 = "20180402-114759-vggface2.pt"
UNUSED = r"logits\..*|.*\.num_batches_tracked"
"""Names of tensors that an embedding does not need: the classifier, and counters of the training."""
SIZE = 160
WHOLE = (0.0, 0.0, 1.0, 1.0)
Spec = tuple[Any, ...]
"""Arguments of a `Conv`: channels in, channels out, kernel, stride, padding."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in shares of the image's width and height."""


class Conv(nn.Module):
    """A convolution without bias, a batch norm and a ReLU."""

    def __init__(self, channels_in: int, out: int, kernel: Any, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Parallel chains of convolutions, named branch0, branch1, …, whose channels are concatenated."""

    def __init__(self, *branches: Sequence[Spec]) -> None:
        super().__init__()
        for i, specs in enumerate(branches):
            convs = [Conv(*spec) for spec in specs]
            self.add_module(f"branch{i}", convs[0] if len(convs) == 1 else nn.Sequential(*convs))
        self.count = len(branches)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of each chain."""
        return [self.get_submodule(f"branch{i}")(x) for i in range(self.count)]


class Reduction(Branches):
    """Chains of convolutions and a max pooling, which halve the resolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self.outputs(x), nn.functional.max_pool2d(x, 3, 2)], 1)


class Residual(Branches):
    """relu(x + scale * projection of the chains); the last one of the network has no ReLU."""

    def __init__(self, channels: int, scale: float, *branches: Sequence[Spec], last: bool = False) -> None:
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(sum(specs[-1][1] for specs in branches), channels, 1)
        self.scale, self.last = scale, last

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.conv2d(torch.cat(self.outputs(x), 1))
        return x if self.last else relu(x)


def block35() -> Residual:
    first: Spec = (256, 32, 1)
    same: Spec = (32, 32, 3, 1, 1)
    return Residual(256, 0.17, [first], [first, same], [first, same, same])


def block17() -> Residual:
    chain: list[Spec] = [(896, 128, 1), (128, 128, (1, 7), 1, (0, 3)), (128, 128, (7, 1), 1, (3, 0))]
    return Residual(896, 0.1, chain[:1], chain)


def block8(scale: float = 0.2, last: bool = False) -> Residual:
    chain: list[Spec] = [(1792, 192, 1), (192, 192, (1, 3), 1, (0, 1)), (192, 192, (3, 1), 1, (1, 0))]
    return Residual(1792, scale, chain[:1], chain, last=last)


class InceptionResnetV1(nn.Module):
    """Embeds faces [B, 3, 160, 160], normalized, as unit vectors [B, 512]. Names are those of facenet-pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d_1a, self.conv2d_2a, self.conv2d_2b = Conv(3, 32, 3, 2), Conv(32, 32, 3), Conv(32, 64, 3, 1, 1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b, self.conv2d_4a, self.conv2d_4b = Conv(64, 80, 1), Conv(80, 192, 3), Conv(192, 256, 3, 2)
        self.repeat_1 = nn.Sequential(*(block35() for _ in range(5)))
        self.mixed_6a = Reduction([(256, 384, 3, 2)], [(256, 192, 1), (192, 192, 3, 1, 1), (192, 256, 3, 2)])
        self.repeat_2 = nn.Sequential(*(block17() for _ in range(10)))
        first: Spec = (896, 256, 1)
        chains: list[list[Spec]] = [[first, (256, 384, 3, 2)], [first, (256, 256, 3, 2)]]
        self.mixed_7a = Reduction(*chains, [first, (256, 256, 3, 1, 1), (256, 256, 3, 2)])
        self.repeat_3 = nn.Sequential(*(block8() for _ in range(5)))
        self.block8 = block8(1.0, last=True)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x.mean((2, 3)) if name == "last_linear" else x)
        return normalize(x, dim=-1)


@register("face")
class Face(Likeness):
    """Face identity: cosine of FaceNet embeddings of the image's face and a reference face, -1 to 1.

    `image`: an image file or a folder of images of one person. `detector`: an OWL-ViT, a folder or hub id, whose best
    box for `query` is cut out of the scored images and of the references. `box`: left, top, right and bottom of the
    face in shares of the image, such as "0.3,0.1,0.7,0.6", instead of a detector; the references are then used whole.
    The box is found without gradient, so that the reward can't move a face; without a face it is meaningless.
    `weights`: the path of the published 20180402-114759-vggface2.pt or 20180408-102900-casia-webface.pt.
    Source: Schroff et al., 2015, arXiv:1503.03832; github.com/timesler/facenet-pytorch (MIT), trained on VGGFace2 or
    CASIA-WebFace, photographs collected for research, so treat the weights as non-commercial. 23 M parameters, 94 MB in
    float32; input 160x160, the box. The detector: see `object_detection`.
    Over-optimized: the reference face pasted into every image, and patterns that are no face.
    """

    def __init__(
        self,
        image: str,
        weights: str = VGGFACE2,
        detector: str = "google/owlvit-base-patch32",
        query: str = "a human face",
        box: str = "",
    ) -> None:
        self.box = parsed_box(box) if box else None
        super().__init__(image)
        found: list[Any] = gather(
            lambda: find_file(
                weights,
                "the reward's weights=",
                url=f"{RELEASE}{VGGFACE2}",
                usage=f'face(image="/path/to/image.png", weights="/path/to/{VGGFACE2}")',
            ),
            lambda: None if self.box else OwlViT(query, detector),
        )
        self.path, self.detector = found

    def load(self) -> None:
        self.network = InceptionResnetV1()
        if fake_mode() is None:
            load_embedding(self.network, self.path)
        self.network.eval()
        if self.detector is not None:
            self.detector.load_weights()
        self.embed_references()

    def boxes(self, images: Tensor) -> list[Box]:
        """Return the box of each image's face: the setting, or the detector's best one."""
        if self.box is not None:
            return [self.box] * len(images)
        with torch.no_grad():
            return self.detector.best_boxes(images.detach(), [""] * len(images))

    def features(self, images: Tensor) -> Tensor:
        return self.embed(images, self.boxes(images))

    def reference_features(self, image: Tensor) -> Tensor:
        return self.embed(image, [WHOLE] if self.box else self.boxes(image))

    def embed(self, images: Tensor, boxes: Sequence[Box]) -> Tensor:
        """Return the normalized embeddings [B, 512] of what is in the boxes."""
        faces = torch.cat(
            [resize(cropped(i[None], box), (SIZE, SIZE), "bilinear") for i, box in zip(images, boxes, strict=True)]
        )
        embeddings: Tensor = self.network(normalized(faces, (0.5,) * 3, (128 / 255,) * 3))
        return embeddings


def load_embedding(network: InceptionResnetV1, path: Path) -> None:
    """Load the published weights. Raises DraftuneError if a tensor is missing, extra or of another shape."""
    shapes, tensors = (
        {name: tensor for name, tensor in named.items() if not re.fullmatch(UNUSED, name)}
        for named in (network.state_dict(), load_tensors(path))
    )
    check_layout({name: tuple(tensor.shape) for name, tensor in shapes.items()}, tensors, path)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)


def parsed_box(text: str) -> Box:
    """Return a box from "left,top,right,bottom". Raises DraftuneError for anything else."""
    try:
        left, top, right, bottom = (float(number) for number in text.split(","))
    except ValueError:
        left = top = right = bottom = math.nan
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise DraftuneError(
            f"box of reward face must be left,top,right,bottom in shares of the image, such as '0.3,0.1,0.7,0.6', not "
            f"{text!r}"
        )
    return left, top, right, bottom


def cropped(images: Tensor, box: Box) -> Tensor:
    """Cut a box out of images [B, 3, H, W]; its edges are rounded down to pixels, as in facenet-pytorch's cropping."""
    height, width = images.shape[-2:]
    left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    return images[..., top : max(int(box[3] * height), top + 1), left : max(int(box[2] * width), left + 1)]
