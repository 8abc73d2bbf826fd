"""The LAION aesthetic predictor: an MLP on the CLIP embedding of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import Clip
from draftune.rewards.weights import load_tensors

WIDTHS = (1024, 128, 64, 16, 1)


class Head(nn.Module):
    """The published layers, "sac+logos+ava1-l14-linearMSE": linear throughout, with dropout in training only."""

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
        path = Path(head).expanduser()
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise DraftuneError(
                f"no aesthetic head at {str(head)!r}: download sac+logos+ava1-l14-linearMSE as a .safetensors file "
                "and name it with head="
            )
        tensors = load_tensors(path)
        self.clip = Clip(model)
        self.head = Head(self.clip.model.config.projection_dim)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.head.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wanted != found:
            differing = sorted(set(wanted.items()) ^ set(found.items()))
            raise DraftuneError(f"{path} is not an aesthetic head for {model!r}: {differing[0]} does not match")
        self.head.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.embed_images(images))


@register("aesthetic")
def aesthetic(
    model: str = "openai/clip-vit-large-patch14", head: str = "sac+logos+ava1-l14-linearMSE.safetensors"
) -> Reward:
    """LAION aesthetic score, about 1 to 10 (CLIP ViT-L/14 and the public MLP, given as a .safetensors file).

    Optimised hard it converges to one painterly look whatever the prompt.
    """
    return Aesthetic(model, head)


@register("emoji-aesthetic")
def emoji_aesthetic() -> Reward:
    """The same head on this package's small CLIP: glossy 3D emoji about 8, flat ones about 3."""
    return Aesthetic("emoji-clip", EMBEDDED["emoji-aesthetic"])
