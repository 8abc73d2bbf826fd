"""Likeness to reference images: cosines of image embeddings, and the DINO models that compute them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from draftune.errors import DraftuneError, unknown
from draftune.rewards.base import Reward, register
from draftune.rewards.clip import model_type
from draftune.rewards.preprocess import Preprocess
from draftune.rewards.weights import find_network
from draftune.utils.images import find_images, open_image
from draftune.utils.loading import load_part

DINO = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "dinov3_convnext": "DINOv3ConvNextModel",
}
"""The classes of transformers by `model_type`."""
TOKENS = ("cls", "patches")


class Likeness(Reward):
    """Base class: the mean cosine similarity of an image's embedding and those of the reference images.

    A subclass implements `features`, and `load`, which calls `embed_references` at its end. As an evaluation reward it
    also measures the diversity of the images of one prompt.
    """

    references: Tensor
    cosine_distance = True
    """Diversity is the mean of one minus the cosine of two images."""

    def __init__(self, image: str) -> None:
        super().__init__()
        # Read here, so that an image that is missing or damaged is reported before weights are loaded.
        self.images = [open_image(path) for path in find_images([image])]
        if not self.images:
            raise DraftuneError(f"no image in {image!r}: image= takes an image file or a folder of images")

    def features(self, images: Tensor) -> Tensor:
        """Return normalized embeddings [B, D] of images [B, 3, H, W]."""
        raise NotImplementedError

    def reference_features(self, image: Tensor) -> Tensor:
        """Return the normalized embedding [1, D] of a reference image [1, 3, H, W]."""
        return self.features(image)

    def embed_references(self) -> None:
        """Compute the mean of the reference images' embeddings."""
        with torch.no_grad():
            embeddings = torch.cat([self.reference_features(image) for image in self.images])
        self.register_buffer("references", embeddings.mean(0), persistent=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.features(images) @ self.references


@register("dino")
class Dino(Likeness):
    """DINO similarity: cosine of the image's and a reference image's DINO features, -1 to 1.

    `image`: an image file or a folder, for the mean cosine with each of its images. `model`: a folder or hub id of
    DINOv2 (with or without registers), a DINOv3 ViT or a DINOv3 ConvNeXt. `tokens`: cls compares what is shown, patches
    compares each patch with the one in the same place, so that the layout matters too.
    Source: Oquab et al., 2023, arXiv:2304.07193; Siméoni et al., 2025, arXiv:2508.10104; as a measure of subject
    fidelity in DreamBooth (Ruiz et al., 2022, arXiv:2208.12242). The default: ViT-S/14, 22 M parameters, 88 MB in
    float32, Apache-2.0; DINOv3 has a license of its own and is gated. Input of DINOv2: 224x224, the center square; of
    DINOv3: 224x224, whatever the aspect ratio.
    As an evaluation reward it also measures diversity. Over-optimized: the reference image for every prompt.
    """

    def __init__(self, image: str, model: str = "facebook/dinov2-small", tokens: str = "cls") -> None:
        if tokens not in TOKENS:
            raise unknown("tokens of reward dino", tokens, TOKENS)
        super().__init__(image)
        self.folder = find_network(model, "the reward's model=", tokenizer=False)
        self.tokens = tokens

    def load(self) -> None:
        import transformers

        kind = model_type(self.folder)
        if kind not in DINO:
            raise DraftuneError(f"{str(self.folder)!r} is a {kind} model; {', '.join(DINO)} are supported")
        self.model = load_part(getattr(transformers, DINO[kind]), self.folder).eval()
        self.preprocess = Preprocess.from_folder(self.folder)
        self.embed_references()

    def features(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=self.preprocess(images))
        if self.tokens == "cls":
            return normalize(output.pooler_output, dim=-1)
        first = 1 + getattr(self.model.config, "num_register_tokens", 0)
        patches = normalize(output.last_hidden_state[:, first:], dim=-1)
        return patches.flatten(1) / patches.shape[1] ** 0.5
