"""The named sets of prompts: in the package, and data sets of papers on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# The 45 common animals of DDPO (Black et al., arXiv 2305.13301) that the paper's small runs use.
ANIMALS = [
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
]  # fmt: skip


def emoji(part: str) -> list[str]:
    """Return the emoji names that the embedded model knows: the 64 "common" ones of its evaluation, or the "other"."""
    path = Path(__file__).parent.parent / "assets" / f"names-{part}.txt"
    return path.read_text(encoding="utf-8").split("\n")[:-1]


HPDV2 = "hf://datasets/zhwang/HPDv2/benchmark"
PROMPT_SETS: dict[str, tuple[str, str | Callable[[], list[str]]]] = {
    "animals": ("45 common animals, as in the paper", lambda: ANIMALS),
    "emoji": ("emoji names for the embedded model, without the common ones", lambda: emoji("other")),
    "emoji-common": ("the 64 common emoji names, for evaluating the embedded model", lambda: emoji("common")),
    "hpdv2-anime": ("benchmark of HPSv2 (Wu et al., arXiv 2306.09341), anime; from the hub", f"{HPDV2}/anime.json"),
    "hpdv2-concept-art": ("benchmark of HPSv2, concept art; from the hub", f"{HPDV2}/concept-art.json"),
    "hpdv2-paintings": ("benchmark of HPSv2, paintings; from the hub", f"{HPDV2}/paintings.json"),
    "hpdv2-photo": ("benchmark of HPSv2, photos; from the hub", f"{HPDV2}/photo.json"),
    "partiprompts": (
        "PartiPrompts (Yu et al., arXiv 2206.10789); from the hub",
        "hf://datasets/nateraw/parti-prompts/PartiPrompts.tsv:Prompt",
    ),
    "drawbench": (
        "DrawBench (Saharia et al., arXiv 2205.11487); from the hub, with the package datasets",
        "hf://datasets/sayakpaul/drawbench:Prompts",
    ),
    "pickapic": (
        "Pick-a-Pic v1 (Kirstain et al., arXiv 2305.01569), training prompts, filtered for unsafe ones; likewise",
        "hf://datasets/CarperAI/pickapic_v1_no_images_training_sfw:caption",
    ),
    "pickapic-test": (
        "Pick-a-Pic v1, one row of each test prompt, not filtered; likewise",
        "hf://datasets/yuvalkirstain/pickapic_v1_no_images@test_unique:caption",
    ),
}
"""The named sets: a description, and the prompts of the package or the source on the hub."""
