"""Prompts: named sets, files, and metadata of a prompt."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.prompt_files import READERS, TEXT_KEYS, is_text, read_text
from draftune.utils.paths import user_path

# The 45 common animals of DDPO (Black et al., arXiv 2305.13301) that the paper's small runs use.
ANIMALS = [
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
]  # fmt: skip


def emoji(part: str) -> list[str]:
    """Return the emoji names that the embedded model knows: the 64 "common" ones of its evaluation, or the "other"."""
    path = Path(__file__).parent / "assets" / f"names-{part}.txt"
    return path.read_text(encoding="utf-8").split("\n")[:-1]


PROMPT_SETS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "animals": ("45 common animals, as in the paper", lambda: ANIMALS),
    "emoji": ("emoji names for the embedded model, without the common ones", lambda: emoji("other")),
    "emoji-common": ("the 64 common emoji names, for evaluating the embedded model", lambda: emoji("common")),
}

FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
INVISIBLE = {*FILLERS, *map(chr, range(0xFE00, 0xFE10))}
"""Fillers and variation selectors: invisible, though Unicode counts them as letters, marks or symbols."""


class Prompt(str):
    """A prompt with metadata: the other columns of its row in the prompt file, by name."""

    metadata: dict[str, str]

    def __new__(cls, text: str, metadata: Mapping[str, str] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt


def metadata(prompt: str) -> Mapping[str, str]:
    """Return a prompt's metadata; an empty mapping for plain text."""
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def copied(prompts: Sequence[str]) -> list[str]:
    """Copy prompts with their metadata, for code that may modify the list or the metadata."""
    return [Prompt(prompt, prompt.metadata) if isinstance(prompt, Prompt) else prompt for prompt in prompts]


def is_blank(text: str) -> bool:
    """Return whether a text is empty or consists of spaces and invisible characters."""
    return all(c.isspace() or c in INVISIBLE or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def load_prompts(source: str | list[str] | tuple[str, ...]) -> list[str]:
    """Return the prompts of a named set, a file or a list, without the blank ones.

    Raises:
        DraftuneError: the set is unknown, the file is missing, empty or invalid (see `read_prompts`), or the list is
            empty.
    """
    if not isinstance(source, str):
        prompts = [prompt if isinstance(prompt, str) else str(prompt) for prompt in source]
        prompts = [prompt for prompt in prompts if not is_blank(prompt)]
        if not prompts:
            raise DraftuneError("the list of prompts is empty")
        return prompts
    if source in PROMPT_SETS:
        return list(PROMPT_SETS[source][1]())
    path = user_path(source)
    if not path.is_file():
        if path.suffix or "/" in source:
            raise DraftuneError(f"no prompt file {source!r}")
        raise unknown("prompt set", source, PROMPT_SETS)
    prompts = [prompt for prompt in read_prompts(path) if not is_blank(prompt)]
    if not prompts:
        raise DraftuneError(f"the prompt file {source!r} is empty")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, including blank ones. The file extension selects the format.

    .txt, or none: one prompt a line. .csv, .tsv: a table with a header. .jsonl: one object a line. .json: an array of
    texts or objects. .yaml, .yml: a list of texts or mappings. The prompt of a table or object is its column `prompt`,
    else `text`, else `caption`, in any case; the other columns become the prompt's metadata.

    Raises:
        DraftuneError: the extension is unknown, the content does not match it, or an entry has no prompt.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(filter(None, READERS))
        raise DraftuneError(f"prompt files end in {known}, not as {str(path)!r} does")
    rows = reader(read_text(path), path)
    columns = {name.lower() for _, row in rows if isinstance(row, dict) for name in row}
    key = next((name for name in TEXT_KEYS if name in columns), None)
    kind = "column" if path.suffix.lower() in (".csv", ".tsv") else "key"
    return [prompt_of(row, key, kind, f"{str(path)!r}, {where}") for where, row in rows]


def prompt_of(row: Any, key: str | None, kind: str, where: str) -> str:
    """Return an entry's prompt: the entry itself, or its value of `key` in any case, with the rest as metadata."""
    names = [name for name in row if name.lower() == key] if isinstance(row, dict) else []
    if len(names) > 1:
        raise DraftuneError(f"{where}: the {kind} {key!r} appears twice, as {' and '.join(map(repr, names))}")
    text = (row[names[0]] if names else None) if isinstance(row, dict) else row
    if not isinstance(text, str):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DraftuneError(f"{where} must be text or an object with a prompt, not {kind}; put text in quotes")
        more = "" if key else f" (nor {' or '.join(map(repr, TEXT_KEYS[1:]))})"
        raise DraftuneError(f"{where} has no {kind} {key or TEXT_KEYS[0]!r} with text{more}")
    if not is_text(text):
        raise DraftuneError(f"{where}: the prompt contains a control character or a lone surrogate; remove it")
    if not isinstance(row, dict):
        return text.strip()
    return Prompt(text.strip(), {str(k): as_text(v) for k, v in row.items() if k not in names and v not in (None, "")})


def as_text(value: Any) -> str:
    """Return a value of a row as text; lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
