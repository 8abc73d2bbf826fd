"""Prompts: named sets and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from draftune.errors import DraftuneError, unknown

# The 45 common animals of DDPO (Black et al., arXiv 2305.13301) that the paper's small runs use.
ANIMALS = [
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
]  # fmt: skip


def emoji(part: str) -> list[str]:
    """Names that the embedded model draws: "common" are the 64 it is judged on, "other" all the rest."""
    path = Path(__file__).parent / "assets" / f"names-{part}.txt"
    return path.read_text(encoding="utf-8").split("\n")[:-1]


PROMPT_SETS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "animals": ("45 common animals, as in the paper", lambda: ANIMALS),
    "emoji": ("names of emoji for the embedded model, without the common ones", lambda: emoji("other")),
    "emoji-common": ("the 64 common names of emoji on which the embedded model is judged", lambda: emoji("common")),
}


def load_prompts(source: str | list[str] | tuple[str, ...]) -> list[str]:
    """The prompts of a named set, of a text file with one prompt a line, or of a list.

    Empty lines are left out. Raises DraftuneError for an unknown set, and for a file that is empty or not text.
    """
    if not isinstance(source, str):
        prompts = [str(prompt) for prompt in source if str(prompt).strip()]
        if not prompts:
            raise DraftuneError("the list of prompts is empty")
        return prompts
    if source in PROMPT_SETS:
        return PROMPT_SETS[source][1]()
    path = Path(source).expanduser()
    if not path.is_file():
        if path.suffix or "/" in source:
            raise DraftuneError(f"no prompt file {source!r}")
        raise unknown("prompt set", source, PROMPT_SETS)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DraftuneError(f"{source!r} is not a text file in UTF-8: one prompt a line is wanted") from error
    if any(ord(c) < 32 and c not in "\t\r\n\f" for c in text):
        raise DraftuneError(f"{source!r} is a binary file: one prompt a line is wanted")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DraftuneError(f"the prompt file {source!r} is empty")
    return prompts
