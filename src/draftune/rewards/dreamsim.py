"""DreamSim: a distance of two images that was trained on people's judgments of similarity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention

from draftune.errors import DraftuneError, gather, unknown
from draftune.rewards.base import register
from draftune.rewards.likeness import Likeness
from draftune.rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalized, resize
from draftune.rewards.weights import check_layout, find_file, load_into, load_tensors
from draftune.utils.paths import user_path
from draftune.utils.weightless import fake_mode

RELEASES = "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
USAGE = 'dreamsim(image="/path/to/image.png", weights="/path/to/folder")'
VIT_B: dict[str, int] = {"width": 768, "depth": 12, "heads": 12, "size": 224, "output": 512}


class Branch(NamedTuple):
    """One of DreamSim's networks.

    Attributes:
        file: The published file of its weights before DreamSim's LoRA.
        patch: Side of a patch in pixels.
        clip: Whether it is a CLIP, with a projected embedding; DINO's is the class token before the last norm.
        quick: Whether it has OpenAI's approximation of the GELU.
    """

    file: str
    patch: int
    clip: bool
    quick: bool = False


DINO = Branch("dino_vitbase16_pretrain.pth", 16, False)
VARIANTS: dict[str, tuple[str, list[Branch]]] = {
    "ensemble": (
        "ensemble_lora",
        [
            DINO,
            Branch("clip_vitb16_pretrain.pth.tar", 16, True, quick=True),
            Branch("open_clip_vitb16_pretrain.pth.tar", 16, True),
        ],
    ),
    "dino_vitb16": ("dino_vitb16_single_lora", [DINO]),
    "clip_vitb32": ("clip_vitb32_single_lora", [Branch("clip_vitb32_pretrain.pth.tar", 32, True, quick=True)]),
    "open_clip_vitb32": ("open_clip_vitb32_single_lora", [Branch("open_clip_vitb32_pretrain.pth.tar", 32, True)]),
}
"""The folder of the LoRA and the networks of each variant, in the order of the published embedding."""


class Block(nn.Module):
    """A pre-norm transformer block, [B, tokens, width] to the same shape."""

    def __init__(self, width: int, heads: int, eps: float, quick: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.heads, self.quick = heads, quick

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden) if self.quick else gelu(hidden))


class VisionTransformer(nn.Module):
    """A vision transformer with the parameter names of DINO's code, which DreamSim converted CLIP's weights to.

    It embeds images [B, 3, size, size] in [0, 1] as [B, output], or [B, width] for DINO.
    """

    def __init__(self, branch: Branch, width: int, depth: int, heads: int, size: int, output: int) -> None:
        super().__init__()
        self.clip, eps = branch.clip, 1e-5 if branch.clip else 1e-6
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // branch.patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, branch.patch, branch.patch)})
        self.blocks = nn.Sequential(*(Block(width, heads, eps, branch.quick) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps)
        if branch.clip:
            self.pos_drop = nn.LayerNorm(width, eps)  # CLIP's norm before the blocks, under DINO's name
            self.proj = nn.Parameter(torch.zeros(width, output))

    def forward(self, images: Tensor) -> Tensor:
        pixels = normalized(images, *((CLIP_MEAN, CLIP_STD) if self.clip else (IMAGENET_MEAN, IMAGENET_STD)))
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        if not self.clip:
            return self.blocks(x)[:, 0]
        return self.norm(self.blocks(self.pos_drop(x)))[:, 0] @ self.proj


@register("dreamsim")
class DreamSim(Likeness):
    """DreamSim: minus a learned distance to a reference image, -2 to 0, 0 for the image itself.

    `image`: an image file or a folder, for the mean over its images. `weights`: the unzipped folder of a release of
    DreamSim, by default that of its package. `variant`: ensemble, dino_vitb16, clip_vitb32 or open_clip_vitb32.
    ensemble and dino_vitb16 also need DINO's own dino_vitbase16_pretrain.pth in that folder.
    Source: Fu et al., 2023, arXiv:2306.09344. DINO, CLIP and OpenCLIP ViT-B/16 with a LoRA, 258 M parameters, 1.0 GB in
    float32, MIT license (DINO's weights: Apache-2.0); a single variant: about 86 M, 0.35 GB. Input 224x224, whatever
    the aspect ratio.
    As an evaluation reward it also measures diversity. Over-optimized: the reference image for every prompt.
    """

    def __init__(
        self, image: str, weights: str = "models", variant: str = "ensemble", shape: Mapping[str, int] = VIT_B
    ) -> None:
        if variant not in VARIANTS:
            raise unknown("variant of reward dreamsim", variant, VARIANTS)
        super().__init__(image)
        folder = user_path(weights)
        lora, branches = VARIANTS[variant]
        zipped = f"{RELEASES}dreamsim_{variant}_checkpoint.zip, unzip it"
        adapter = folder / lora / "adapter_model.safetensors"
        if not adapter.is_file():
            adapter = adapter.with_suffix(".bin")
        # The package lets torch.hub download DINO's weights to checkpoints/.
        inner = "checkpoints" if (folder / "checkpoints" / DINO.file).is_file() else ""
        paths = [(folder / (inner if b is DINO else "") / b.file, DINO_URL if b is DINO else zipped) for b in branches]
        paths += [(adapter, zipped), (folder / lora / "adapter_config.json", zipped)]
        *self.files, self.adapter, self.adapter_config = gather(
            *(
                lambda path=path, url=url: find_file(path, "the reward's weights= as a folder", url=url, usage=USAGE)
                for path, url in paths
            )
        )
        self.branches, self.shape = branches, shape

    def load(self) -> None:
        self.networks = nn.ModuleList(VisionTransformer(branch, **self.shape) for branch in self.branches)
        for network, file in zip(self.networks, self.files, strict=True):
            load_into(network, file)
        if fake_mode() is None:
            merge_lora(self.networks, self.adapter, self.adapter_config)
        self.embed_references()

    def features(self, images: Tensor) -> Tensor:
        size = self.shape["size"]
        resized = resize(images, (size, size), "bicubic")
        embedding = torch.cat([network(resized) for network in self.networks], -1)
        return normalize(embedding - embedding.mean(-1, keepdim=True), dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts) - 1


def merge_lora(networks: nn.ModuleList, weights: Path, config: Path) -> None:
    """Add the LoRA that peft saved for DreamSim's networks to their linear layers: W + alpha / r * B A.

    Raises:
        DraftuneError: if the config can't be read, or a tensor is missing, extra or of another shape.
    """
    try:
        settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        rank, targets = int(settings["r"]), settings["target_modules"]
        scale, targets = float(settings["lora_alpha"]) / rank, [targets] if isinstance(targets, str) else list(targets)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DraftuneError(f"cannot read the LoRA's config {str(config)!r}: {error!r}") from error
    layers = {
        f"base_model.model.extractor_list.{i}.model.{name}": module
        for i, network in enumerate(networks)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    shapes = {f"{name}.lora_A.weight": (rank, layer.in_features) for name, layer in layers.items()}
    shapes |= {f"{name}.lora_B.weight": (layer.out_features, rank) for name, layer in layers.items()}
    tensors = load_tensors(weights)
    check_layout(shapes, tensors, weights)
    with torch.no_grad():
        for name, layer in layers.items():
            up, down = (tensors[f"{name}.lora_{part}.weight"].float() for part in "BA")
            layer.weight += scale * up @ down
