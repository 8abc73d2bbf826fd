"""Prompts: named sets, files, folders, data sets of the hub, and metadata of a prompt."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.prompts.files import PARQUET, READERS, TEXT_KEYS, Rows, is_text, read_parquet, read_text
from draftune.prompts.hub import PREFIX, HubSource, hub_file, hub_rows
from draftune.prompts.sets import PROMPT_SETS
from draftune.prompts.wildcards import expand
from draftune.utils.hub import is_hub_id
from draftune.utils.paths import user_path

__all__ = [
    "PROMPT_SETS",
    "Prompt",
    "copied",
    "is_blank",
    "load_prompts",
    "metadata",
    "read_captions",
    "read_prompts",
    "run_prompts",
    "split_prompts",
]

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
    """Return the prompts of a source, without the blank ones and with alternatives expanded (`wildcards.expand`).

    Args:
        source: A named set, a file (`read_prompts`), a folder of captions (`read_captions`), a data set of the hub
            (`HubSource`), or a list. `:COLUMN` after a file or data set names the column of the prompts.

    Raises:
        DraftuneError: the source is unknown, missing, empty or invalid.
    """
    if not isinstance(source, str):
        return filled([prompt if isinstance(prompt, str) else str(prompt) for prompt in source], "the list of prompts")
    if source in PROMPT_SETS:
        named = PROMPT_SETS[source][1]
        if not isinstance(named, str):
            return list(named())
        source = named
    if source.startswith(PREFIX):
        return filled(list(dict.fromkeys(hub_prompts(source))), f"the data set {source!r}")
    path, column = user_path(source), ""
    if not path.exists() and ":" in source:
        path, column = user_path(source.rpartition(":")[0]), source.rpartition(":")[2]
    if path.is_dir():
        return filled(read_captions(path), f"the folder {source!r}")
    if not path.is_file():
        if is_hub_id(source):
            raise DraftuneError(f"no prompt file {source!r}; for a data set of the hub write {PREFIX}{source}")
        if path.suffix or "/" in source:
            raise DraftuneError(f"no prompt file {source!r}")
        if " " in source:
            raise DraftuneError(f"{source!r} is no prompt set: write prompts into a .txt file, one a line")
        raise unknown("prompt set", source, PROMPT_SETS)
    return filled(read_prompts(path, column), f"the prompt file {source!r}")


def filled(prompts: Sequence[str], where: str) -> list[str]:
    """Return the prompts that are not blank, with alternatives expanded. Raises DraftuneError if none is left."""
    shown = [prompt for prompt in prompts if not is_blank(prompt)]
    if not shown:
        raise DraftuneError(f"{where} is empty")
    return [variant for prompt in shown for variant in variants(prompt) if not is_blank(variant)]


def variants(prompt: str) -> list[str]:
    """Return the prompts that a prompt with alternatives stands for, each with its metadata."""
    texts = expand(prompt)
    if texts == [prompt]:
        return [prompt]
    return [Prompt(text, prompt.metadata) if isinstance(prompt, Prompt) else text for text in texts]


def split_prompts(
    source: str | list[str] | tuple[str, ...], eval_source: str, seed: int
) -> tuple[list[str], list[str]]:
    """Return the training prompts and the evaluation prompts.

    Args:
        source: The training prompts (`load_prompts`).
        eval_source: The evaluation prompts; empty for none. A number N holds N of the training prompts out: they are
            evaluated and not trained on.
        seed: Seed of the choice of the held-out prompts.

    Raises:
        DraftuneError: a source is invalid, or too few prompts are left to train on.
    """
    prompts = load_prompts(source)
    if not eval_source.isdecimal():
        return prompts, load_prompts(eval_source) if eval_source else []
    count, known = int(eval_source), list(dict.fromkeys(prompts))
    if not 0 < count < len(known):
        raise DraftuneError(
            f"eval_prompts={eval_source} holds out {count} of {len(known)} different prompts: it must be between 1 and "
            f"{len(known) - 1}"
        )
    chosen = set(random.Random(seed).sample(range(len(known)), count))
    held_out = [prompt for i, prompt in enumerate(known) if i in chosen]
    return [prompt for prompt in prompts if prompt not in set(held_out)], held_out


def run_prompts(prompts: str, eval_prompts: str | None, seed: int) -> list[str]:
    """Return the prompts on which a run with these settings is evaluated: those it trains on if it names no others."""
    if eval_prompts and not eval_prompts.isdecimal():
        return load_prompts(eval_prompts)
    training, held_out = split_prompts(prompts, eval_prompts or "", seed)
    return held_out or training


def hub_prompts(source: str) -> list[str]:
    """Read the prompts of a data set of the hub, or of one of its files. Raises DraftuneError."""
    place, _, column = source.removeprefix(PREFIX).partition(":")
    found = HubSource.parse(PREFIX + place)
    if found.file:
        return read_prompts(hub_file(found), column)
    return prompts_of(hub_rows(found), "column", column, repr(source))


def read_captions(folder: Path) -> list[str]:
    """Read a folder of captions, as other trainers have it.

    A table `metadata.jsonl`, `metadata.csv` or `metadata.parquet` is read like a prompt file. Without a table, each
    .txt and .caption file is one prompt, in the order of their names; line breaks become spaces.

    Raises:
        DraftuneError: the folder has neither, or a file is invalid.
    """
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        if (folder / name).is_file():
            return read_prompts(folder / name)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".txt", ".caption") and path.is_file())
    if not files:
        raise DraftuneError(f"the folder {str(folder)!r} has no captions: neither .txt files nor a metadata.jsonl")
    return [" ".join(read_text(path).split()) for path in files]


def read_prompts(path: Path, column: str = "") -> list[str]:
    """Read the prompts of a file, including blank ones. The file extension selects the format.

    .txt, or none: one prompt a line. .csv, .tsv, .parquet: a table. .jsonl: one object a line. .json: an array of texts
    or objects. .yaml, .yml: a list of texts or mappings. The prompt of a table or object is the given column, else
    `prompt`, else `text`, else `caption`, in any case; the other columns become its metadata.

    Raises:
        DraftuneError: the extension is unknown, the content does not match it, or an entry has no prompt.
    """
    ending = path.suffix.lower()
    if ending not in READERS and ending != PARQUET:
        raise DraftuneError(
            f"prompt files end in {', '.join(filter(None, READERS))}, {PARQUET}, not as {str(path)!r} does"
        )
    rows = read_parquet(path) if ending == PARQUET else READERS[ending](read_text(path), path)
    kind = "column" if ending in (".csv", ".tsv", PARQUET) else "key"
    return prompts_of(rows, kind, column, repr(str(path)))


def prompts_of(rows: Rows, kind: str, column: str, where: str) -> list[str]:
    """Return the prompts of entries. Raises DraftuneError if one has no prompt, or none has the given column."""
    columns = {name.lower(): name for _, row in rows if isinstance(row, dict) for name in row}
    if column and rows and not columns:
        raise DraftuneError(f"{where} has no {kind}s, only prompts: leave out ':{column}'")
    if column and rows and column.lower() not in columns:
        raise unknown(f"{kind} of {where}", column, list(columns.values()))
    key = column.lower() or next((name for name in TEXT_KEYS if name in columns), None)
    return [prompt_of(row, key, kind, f"{where}, {place}") for place, row in rows]


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
