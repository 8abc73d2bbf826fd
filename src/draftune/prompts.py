"""Prompts: named sets and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.paths import user_path

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


class Prompt(str):
    """A prompt that carries what its file says of it besides: metadata, by the name of the column."""

    metadata: dict[str, str]

    def __new__(cls, text: str, metadata: Mapping[str, str] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt


def metadata(prompt: str) -> Mapping[str, str]:
    """What the prompt's file says of it besides; nothing for plain text."""
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, which half of a surrogate pair can't."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def load_prompts(source: str | list[str] | tuple[str, ...]) -> list[str]:
    """The prompts of a named set, of a file, or of a list.

    A .csv file has a column "prompt", a .jsonl file an object with a key "prompt" in each line; what else stands there
    becomes the prompt's metadata. In any other text file each line is a prompt. Empty ones are left out. Raises
    DraftuneError for an unknown set, and for a file that is empty or can't be read, with the line.
    """
    if not isinstance(source, str):
        prompts = [prompt if isinstance(prompt, str) else str(prompt) for prompt in source if str(prompt).strip()]
        if not prompts:
            raise DraftuneError("the list of prompts is empty")
        return prompts
    if source in PROMPT_SETS:
        return PROMPT_SETS[source][1]()
    path = user_path(source)
    if not path.is_file():
        if path.suffix or "/" in source:
            raise DraftuneError(f"no prompt file {source!r}")
        raise unknown("prompt set", source, PROMPT_SETS)
    prompts = [prompt for prompt in read_prompts(path) if prompt.strip()]
    if not prompts:
        raise DraftuneError(f"the prompt file {source!r} is empty")
    return prompts


def read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DraftuneError(f"cannot read the prompt file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DraftuneError(f"{str(path)!r} is not a text file in UTF-8: one prompt a line is wanted") from error
    if any(ord(c) < 32 and c not in "\t\r\n\f" for c in text):
        raise DraftuneError(f"{str(path)!r} is a binary file: one prompt a line is wanted")
    if path.suffix.lower() in TABLES:
        rows = TABLES[path.suffix.lower()](text, path)
        for line, row in rows:
            if not isinstance(row.get("prompt"), str):
                kind = "column" if path.suffix.lower() == ".csv" else "key"
                raise DraftuneError(f"{str(path)!r}, line {line}: no {kind} 'prompt'")
            if not is_text(row["prompt"]):
                raise DraftuneError(f"{str(path)!r}, line {line}: the prompt is not text that can be written")
        return [
            Prompt(
                row["prompt"].strip(),
                {k: str(v) for k, v in row.items() if k and k != "prompt" and v not in (None, "")},
            )
            for _, row in rows
        ]
    return [line.strip() for line in text.splitlines()]


def read_csv(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DraftuneError(f"{str(path)!r}, line {reader.line_num}: {error}") from error


def read_jsonl(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DraftuneError(f"{str(path)!r}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DraftuneError(f'{str(path)!r}, line {number}: an object such as {{"prompt": …}} is wanted')
            rows.append((number, row))
    return rows


TABLES = {".csv": read_csv, ".jsonl": read_jsonl}
