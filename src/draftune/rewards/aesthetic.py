"""The LAION aesthetic predictor: an MLP on the CLIP embedding of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from draftune.assets import EMBEDDED
from draftune.errors import gather
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import ClipEncoder, openai_preprocess
from draftune.rewards.weights import check_layout, find_file, find_network, load_tensors

WIDTHS = (1024, 128, 64, 16, 1)
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"


class Head(nn.Module):
    """The published layers of the aesthetic predictor and of ImageReward: linear throughout; no dropout in scoring."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in zip((width, *WIDTHS), WIDTHS, strict=False)]
        # The gaps in the published numbering (0, 2, 4, 6, 7) are the dropouts.
        self.layers = nn.ModuleDict(dict(zip(("0", "2", "4", "6", "7"), linear, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(-1)


class Aesthetic(Reward):
    """The head on the unit-length CLIP image embedding. The prompts are not looked at."""

    def __init__(self, model: str, head: str | Path) -> None:
        super().__init__()
        self.path, self.folder = gather(
            lambda: find_file(head, "the reward's head=", url=URL), lambda: find_network(model, "the reward's model=")
        )

    def load(self) -> None:
        tensors = load_tensors(self.path)
        self.clip = openai_preprocess(ClipEncoder.from_folder(self.folder))
        self.head = Head(self.clip.width)
        check_layout({name: tuple(t.shape) for name, t in self.head.state_dict().items()}, tensors, self.path)
        self.head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.embed_images(images))


@register("aesthetic")
def aesthetic(model: str = "openai/clip-vit-large-patch14", head: str = HEAD) -> Reward:
    """LAION aesthetic predictor v2: 1 to 10 on real pictures, most between 4 and 7.

    `head`: the path of the published sac+logos+ava1-l14-linearMSE, as .pth or .safetensors; `model`: the CLIP under
    it. Source: github.com/christophschuhmann/improved-aesthetic-predictor. CLIP ViT-L/14 (428 M parameters, 1.7 GB,
    MIT) and an MLP (4 MB, Apache-2.0); input 224x224, the centre square.
    The head is linear and unbounded. Over-optimised it converges to one painterly look whatever the prompt.
    """
    return Aesthetic(model, head)


@register("emoji-aesthetic")
def emoji_aesthetic() -> Reward:
    """The same head on this package's small CLIP: glossy 3D emoji about 7 to 8, flat ones about 3.

    2.9 M parameters, 6 MB, Apache-2.0; input 64x64. Source: its model card.
    Over-optimised it goes past real pictures: everything turns purple and glossy.
    """
    return Aesthetic("emoji-clip", EMBEDDED["emoji-aesthetic"] / "model.safetensors")
