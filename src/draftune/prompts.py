"""Prompts: named sets and files."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.utils.paths import user_path

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

FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
INVISIBLE = {*FILLERS, *map(chr, range(0xFE00, 0xFE10))}
"""Fillers and variation selectors: they draw nothing, though Unicode counts them as letters, marks or symbols."""
TEXT_KEYS = ("prompt", "text", "caption")
"""The column of a prompt's text, in any case: the first of these that a file has."""
Rows = list[tuple[str, Any]]
"""Where an entry stands in its file ("line 3"), and the entry: text, or a table of columns."""


class Prompt(str):
    """A prompt with metadata: the other columns of its row in the prompt file, by their names."""

    metadata: dict[str, str]

    def __new__(cls, text: str, metadata: Mapping[str, str] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt


def metadata(prompt: str) -> Mapping[str, str]:
    """Return the other columns of the prompt's row in the prompt file; nothing for plain text."""
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def copied(prompts: Sequence[str]) -> list[str]:
    """Copy prompts with their metadata, for code that may change the list or what it holds."""
    return [Prompt(prompt, prompt.metadata) if isinstance(prompt, Prompt) else prompt for prompt in prompts]


def is_text(text: str) -> bool:
    """Return whether a text can be written as UTF-8 and moves no cursor: no lone surrogates, no control characters."""
    return not any("\ud800" <= c <= "\udfff" or (c < " " and c not in "\t\n\v\f\r") for c in text)


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it is empty, or all of it is spaces and invisible characters."""
    return all(c.isspace() or c in INVISIBLE or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def load_prompts(source: str | list[str] | tuple[str, ...]) -> list[str]:
    """Return the prompts of a named set, of a file, or of a list; blank ones are left out.

    The ending of a file's name says how it is read, see `read_prompts`.

    Raises:
        DraftuneError: for an unknown set, a file that is empty or can't be read, and an entry that is no prompt.
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
    """Read a file's prompts, the blank ones included.

    .txt, or no ending: one prompt a line. .csv, .tsv: a table with a header. .jsonl: an object a line. .json: an array
    of texts or objects. .yaml, .yml: a list of texts or mappings. A table's prompt is its column `prompt`, or `text`
    or `caption` where it has no `prompt`, in capitals or not; the other columns become the prompt's metadata. Lines end
    at newlines alone.

    Raises:
        DraftuneError: for another ending, a file of another kind than its ending says, and an entry that is no prompt.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(filter(None, READERS))
        raise DraftuneError(f"the ending of {str(path)!r} is not one of a prompt file: {known}")
    rows = reader(read_text(path), path)
    columns = {name.lower() for _, row in rows if isinstance(row, dict) for name in row}
    key = next((name for name in TEXT_KEYS if name in columns), None)
    kind = "column" if path.suffix.lower() in (".csv", ".tsv") else "key"
    return [prompt_of(row, key, kind, f"{str(path)!r}, {where}") for where, row in rows]


def prompt_of(row: Any, key: str | None, kind: str, where: str) -> str:
    """Return an entry's prompt: the entry itself, or the value of `key` in any case, with the rest as metadata."""
    names = [name for name in row if name.lower() == key] if isinstance(row, dict) else []
    if len(names) > 1:
        raise DraftuneError(f"{where}: the {kind} {key!r} is there twice, as {' and '.join(map(repr, names))}")
    text = (row[names[0]] if names else None) if isinstance(row, dict) else row
    if not isinstance(text, str):
        if not isinstance(row, dict):
            given = type(row).__name__
            raise DraftuneError(f"{where}: text or an object with a prompt is wanted, not {given}; put text in quotes")
        more = "" if key else f" (nor {' or '.join(map(repr, TEXT_KEYS[1:]))})"
        raise DraftuneError(f"{where}: no {kind} {key or TEXT_KEYS[0]!r} that holds text{more}")
    if not is_text(text):
        raise DraftuneError(f"{where}: the prompt contains a control character or a lone surrogate; remove it")
    if not isinstance(row, dict):
        return text.strip()
    return Prompt(text.strip(), {str(k): as_text(v) for k, v in row.items() if k not in names and v not in (None, "")})


def as_text(value: Any) -> str:
    """Write a value of a row as text; lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises DraftuneError for any other."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DraftuneError(f"cannot read the prompt file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DraftuneError(f"{str(path)!r} is not a text file in UTF-8: save it as UTF-8") from error
    if not is_text(text):
        raise DraftuneError(f"{str(path)!r} is a binary file: it contains control characters; a text file is needed")
    return text


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r alone: prompts may hold what `str.splitlines` splits at besides, such as U+2028."""
    return re.split(r"\r\n|\n|\r", text)


def read_lines(text: str, path: Path) -> Rows:
    if problem := other_kind(text, ""):
        raise DraftuneError(f"{str(path)!r} is no list of one prompt a line{problem}")
    return [(f"line {number}", line) for number, line in enumerate(split_lines(text), 1)]


def read_table(text: str, path: Path, delimiter: str) -> Rows:
    """Read a table with a header. Raises DraftuneError for cells that belong to no column, and for open quotes."""
    ending = path.suffix.lower()
    # Without strict=True, csv reads all rows after an unclosed quote as one cell, and misreads quotes inside a cell.
    options: Any = {"delimiter": delimiter, "skipinitialspace": delimiter != "\t", "strict": True}
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
    rows: Rows = []
    try:
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise DraftuneError(f"{str(path)!r} has the column {twice[0]!r} twice")
        if not {name.lower() for name in names}.intersection(TEXT_KEYS) and (problem := other_kind(text, ending)):
            raise DraftuneError(f"{str(path)!r} has no column {TEXT_KEYS[0]!r}{problem}")
        for row in reader:
            beyond = row.pop(None, [])
            if not any(cell and cell.strip() for cell in (*row.values(), *beyond)):
                continue
            where = f"line {reader.line_num}"
            if any(cell.strip() for cell in beyond):
                count, part = len(names) + len(beyond), "a tab" if delimiter == "\t" else "commas"
                raise DraftuneError(
                    f"{str(path)!r}, {where}: {count} cells, and the header has {len(names)}: put a cell with {part} "
                    "in it in double quotes"
                )
            rows.append((where, {name: cell for name, cell in row.items() if name}))
    except csv.Error as error:
        raise DraftuneError(f"{str(path)!r}, line {reader.reader.line_num}: {error}") from error
    return rows


def read_jsonl(text: str, path: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            problem = other_kind(text, ".jsonl")
            raise DraftuneError(f"{str(path)!r}, line {number} is not JSON: {error}{problem}") from error
        if not isinstance(row, dict):
            problem = other_kind(text, ".jsonl")
            raise DraftuneError(f'{str(path)!r}, line {number}: an object such as {{"prompt": …}} is wanted{problem}')
        rows.append((f"line {number}", row))
    return rows


def read_json(text: str, path: Path) -> Rows:
    try:
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        if not text.strip():
            return []
        raise DraftuneError(f"{str(path)!r} is not JSON: {error}{other_kind(text, '.json')}") from error
    return entries(rows, path, 'an array such as ["a cat", "a dog"]')


def read_yaml(text: str, path: Path) -> Rows:
    import yaml

    if isinstance(json_of(text), list):
        return read_json(text, path)  # every JSON is YAML, but this reader takes no pairs of surrogates
    try:
        # This loader takes every value for the text that it is: with the others, `- no` is no text but false.
        rows, node = yaml.load(text, yaml.BaseLoader), yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DraftuneError(f"{str(path)!r} is not YAML{line}: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise DraftuneError(f"{str(path)!r} is nested too deeply") from error
    if not rows or node is None:
        return []
    found = entries(rows, path, "a list such as '- a cat'")
    for (where, row), part in zip(found, node.value, strict=True):
        if not isinstance(row, dict):
            continue
        names = [key.value for key, _ in part.value]
        # YAML lets the last one win without a word, and a nested value may be endless by its own references.
        if twice := [name for name in names if names.count(name) > 1]:
            raise DraftuneError(f"{str(path)!r}, {where} says {twice[0]!r} twice")
        if nested := [name for name, value in row.items() if not isinstance(value, str)]:
            raise DraftuneError(f"{str(path)!r}, {where}: {nested[0]!r} must be one value, such as text")
    return found


def entries(rows: Any, path: Path, wanted: str) -> Rows:
    if not isinstance(rows, list):
        raise DraftuneError(f"{str(path)!r} must hold {wanted}, not one {type(rows).__name__}")
    return [(f"entry {number}", row) for number, row in enumerate(rows, 1)]


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for an object that has a key twice, of which the last would win without a word."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
        return found

    return json.loads(text, object_pairs_hook=table)


def other_kind(text: str, ending: str) -> str:
    """Return a hint if the content has another format than the file's ending says; else ""."""
    kind = plain_kind(text)
    if kind is None or kind == ending:
        return ""
    if kind == ";":
        return ": its columns are parted by semicolons; write commas (.csv) or tabs (.tsv)"
    return f": it is {PLAIN[kind]}; let its name end in {kind}"


PLAIN = {
    ".json": "JSON",
    ".jsonl": "an object of JSON a line",
    ".yaml": "a list of YAML",
    ".csv": "a table with commas",
    ".tsv": "a table with tabs",
}


def plain_kind(text: str) -> str | None:
    """Return the ending that fits the format of a text; ";" for a table with semicolons, None for plain lines."""
    lines = [line.rstrip() for line in split_lines(text) if line.strip()]
    if not lines:
        return None
    if all(isinstance(json_of(line), dict) for line in lines):
        return ".jsonl"
    # Whole, or broken further below; weights and choices of prompts, such as [dog] and {red|blue}, have no quotes.
    if isinstance(json_of(text), (list, dict)) or re.match(r'\s*[\[{]\s*("|$)', lines[0]):
        return ".json"
    if lines[0].startswith("- ") and all(re.match(r"- |-$|\s|#", line) for line in lines):
        return ".yaml"
    for delimiter, ending in ((",", ".csv"), ("\t", ".tsv"), (";", ";")):
        names = [name.strip().strip('"').lower() for name in lines[0].split(delimiter)]
        if TEXT_KEYS[0] in names and all(re.fullmatch(r"\w[\w-]*", name) for name in names):
            return ending
    return None


def json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


READERS: dict[str, Callable[[str, Path], Rows]] = {
    "": read_lines,
    ".txt": read_lines,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".yaml": read_yaml,
    ".yml": read_yaml,
}
"""How a prompt file is read, by the ending of its name."""
