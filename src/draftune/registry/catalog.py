"""The rewards in groups, each with its size, license and source, and with what its scores were compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

YOUR_OWN = "your own"
"""The group of rewards that a user registers."""


class Facts(NamedTuple):
    """What `draftune list rewards` says of a reward beside its description.

    Attributes:
        size: The weights by default: parameters, and megabytes or gigabytes.
        license: The license of the weights.
        source: The paper or repository.
        compared: What tests or benchmarks compare the scores or gradients with; empty for nothing.
        never_run: What it never ran on; empty if it ran on its real weights, or has none.
    """

    size: str = "no weights"
    license: str = ""
    source: str = "this package"
    compared: str = "closed forms"
    never_run: str = ""

    def __str__(self) -> str:
        parts = "; ".join(filter(None, (self.size, self.license, self.source)))
        never = f" Never run on {self.never_run}." if self.never_run else ""
        compared = f" Compared with {self.compared}." if self.compared else ""
        return f"{parts}.{compared}{never}"


PUBLISHED = "published weights"
TRANSFORMERS = "transformers' processor and model on small random weights"
MODEL_CARD = "its model card"
WRAPPED = "weights of the wrapped reward"

CATALOG: dict[str, dict[str, Facts]] = {
    "preference": {
        "pickscore": Facts("986 M parameters, 3.9 GB", "MIT", "arXiv:2305.01569", TRANSFORMERS, PUBLISHED),
        "hpsv2": Facts(
            "986 M parameters, 3.9 GB",
            "Apache-2.0",
            "arXiv:2306.09341",
            "the package hpsv2 1.2.0 on small random weights",
            PUBLISHED,
        ),
        "hpsv3": Facts(
            "8.3 B parameters, 16.6 GB in bf16",
            "MIT",
            "arXiv:2508.03789",
            "the package hpsv3 1.0.0 on small random weights",
            PUBLISHED,
        ),
        "imagereward": Facts(
            "446 M parameters, 1.8 GB",
            "Apache-2.0",
            "arXiv:2304.05977",
            "the package image-reward 1.5 on small random weights",
            PUBLISHED,
        ),
        "unifiedreward": Facts("Qwen2.5-VL-7B", "MIT", "arXiv:2503.05236", TRANSFORMERS, PUBLISHED),
    },
    "alignment": {
        "clip": Facts("428 M parameters, 1.7 GB", "MIT", "arXiv:2103.00020", TRANSFORMERS, PUBLISHED),
        "vqa": Facts("SmolVLM-500M", "Apache-2.0", "arXiv:2404.01291", TRANSFORMERS, PUBLISHED),
        "emoji_clip": Facts("2.6 M parameters, 5 MB", "Apache-2.0", MODEL_CARD, ""),
        "emoji_name_accuracy": Facts("1.3 M parameters, 2.7 MB", "Apache-2.0", MODEL_CARD, ""),
    },
    "quality": {
        "aesthetic": Facts(
            "428 M parameters, 1.7 GB",
            "MIT and Apache-2.0",
            "github.com/christophschuhmann/improved-aesthetic-predictor",
            "OpenAI's preprocessing and CLIP on small random weights",
            PUBLISHED,
        ),
        "iqa": Facts(
            "weights of pyiqa's metric",
            "PolyForm Noncommercial 1.0.0",
            "github.com/chaofengc/IQA-PyTorch",
            "pyiqa 0.1.16 itself: MUSIQ with random weights, PIQE, entropy",
            PUBLISHED,
        ),
        "emoji_latent_aesthetic": Facts(
            "0.24 M parameters, 0.5 MB", "Apache-2.0", MODEL_CARD, "`emoji_aesthetic` by rank correlation"
        ),
        "emoji_aesthetic": Facts("2.9 M parameters, 6 MB", "Apache-2.0", MODEL_CARD, ""),
    },
    "likeness": {
        "dino": Facts(
            "DINOv2 small: 22 M parameters, 88 MB", "Apache-2.0", "arXiv:2304.07193", TRANSFORMERS, PUBLISHED
        ),
        "dreamsim": Facts(
            "258 M parameters, 1.0 GB",
            "MIT",
            "arXiv:2306.09344",
            "the package dreamsim 0.2.1 on small random weights",
            PUBLISHED,
        ),
        "face": Facts(
            "23 M parameters, 0.1 GB, and 0.6 GB for the detector",
            "trained on photographs collected for research: non-commercial",
            "arXiv:1503.03832",
            "the package facenet-pytorch 2.6.0 on random weights",
            PUBLISHED,
        ),
        "image_similarity": Facts(),
        "image_match": Facts(source="arXiv:2309.10810"),
        "emoji_style_probability": Facts("1.3 M parameters, 2.7 MB", "Apache-2.0", MODEL_CARD, ""),
        "discriminator": Facts(
            "random weights", source="arXiv:2301.13362", compared="the gradient of the paper's loss"
        ),
    },
    "text": {
        "ocr": Facts(
            "16 MB, and 5 MB for the detector",
            "Apache-2.0",
            "arXiv:2507.05595",
            "transformers' processors, ONNX Runtime on PP-OCRv4's weights, and the sum over all alignments",
            "PP-OCRv5's weights",
        ),
        "ocr_cer": Facts(
            "16 MB, and 5 MB for the detector",
            "Apache-2.0",
            "arXiv:2507.05595",
            "known edit distances",
            "PP-OCRv5's weights",
        ),
    },
    "detection": {
        "object_detection": Facts(
            "153 M parameters, 613 MB", "Apache-2.0", "arXiv:2205.06230", TRANSFORMERS, PUBLISHED
        ),
        "object_removal": Facts("153 M parameters, 613 MB", "Apache-2.0", "arXiv:2205.06230", TRANSFORMERS, PUBLISHED),
        "classify": Facts(
            "4.7 M parameters, 19 MB",
            "Apache-2.0",
            "arXiv:1905.11946",
            "the package efficientnet-lite-pytorch 0.1.0",
            "ResNet-50's published weights",
        ),
    },
    "low-level": {
        "jpeg_compressibility": Facts(source="arXiv:2309.17400", compared="Pillow's JPEG"),
        "jpeg_incompressibility": Facts(source="arXiv:2309.17400", compared="Pillow's JPEG"),
        "jpeg_file_size": Facts(compared="Pillow's JPEG"),
        "brightness": Facts(),
        "saturation": Facts(),
        "sharpness": Facts(),
        "color": Facts(),
        "symmetry": Facts(source="arXiv:2405.00760"),
        "rotation": Facts(source="arXiv:2309.17400"),
    },
    "around another reward": {
        "relative": Facts(WRAPPED, source="arXiv:2509.06942", compared="the authors' formula for CLIP"),
        "sharpness_aware": Facts(WRAPPED, source="arXiv:2603.21175"),
        "threshold": Facts(WRAPPED),
        "zeroth_order": Facts(WRAPPED, source="arXiv:2012.11518", compared="exact gradients"),
    },
    YOUR_OWN: {
        "taste": Facts(
            "that of its CLIP or SigLIP model",
            "that of its model; your comparisons are yours",
            "Bradley and Terry, 1952",
            "scipy's optimum of the same likelihood",
            "published CLIP or SigLIP weights, nor on a person's comparisons",
        ),
    },
}
"""The built-in rewards by their groups. A test fails for one that is missing."""


def in_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names of rewards by their groups; names that the catalog does not have are the user's own."""
    names = list(names)
    grouped = {group: [name for name in facts if name in names] for group, facts in CATALOG.items()}
    listed = {name for members in grouped.values() for name in members}
    grouped[YOUR_OWN] = [*grouped.get(YOUR_OWN, []), *(name for name in names if name not in listed)]
    return {group: members for group, members in grouped.items() if members}


def facts_of(name: str) -> str:
    """Return the facts of a reward as text; empty for the user's own."""
    return next((str(facts[name]) for facts in CATALOG.values() if name in facts), "")
