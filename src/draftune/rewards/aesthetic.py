"""The LAION aesthetic predictor: an MLP on the CLIP embedding of the image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from draftune.errors import gather
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import ClipEncoder, openai_preprocess
from draftune.rewards.weights import find_file, find_network, load_into

WIDTHS = (1024, 128, 64, 16, 1)
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"


class Head(nn.Module):
    """The MLP of the aesthetic predictor and of ImageReward: linear layers only, [B, width] to [B]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in zip((width, *WIDTHS), WIDTHS, strict=False)]
        # The gaps in the published numbering (0, 2, 4, 6, 7) are the dropouts.
        self.layers = nn.ModuleDict(dict(zip(("0", "2", "4", "6", "7"), linear, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(-1)


@register("aesthetic")
class Aesthetic(Reward):
    """LAION aesthetic predictor v2: 1 to 10 on real images, most between 4 and 7.

    An MLP on the normalized CLIP image embedding; it ignores the prompts. `head`: the path of the published
    sac+logos+ava1-l14-linearMSE, as .pth or .safetensors; `model`: its CLIP. Source:
    github.com/christophschuhmann/improved-aesthetic-predictor. CLIP ViT-L/14 (428 M parameters, 1.7 GB, MIT) and an MLP
    (4 MB, Apache-2.0); input 224x224, the center square.
    The score is linear and unbounded. Over-optimized: one painterly style whatever the prompt.
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14", head: str = HEAD) -> None:
        super().__init__()
        self.path, self.folder = gather(
            lambda: find_file(head, "the reward's head=", url=URL, usage=f'aesthetic(head="/path/to/{HEAD}")'),
            lambda: find_network(model, "the reward's model="),
        )

    def load(self) -> None:
        self.clip = openai_preprocess(ClipEncoder.from_folder(self.folder))
        self.head = Head(self.clip.width)
        load_into(self.head, self.path)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.embed_images(images))
