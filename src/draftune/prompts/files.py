"""Readers of prompt files: text, tables, JSON and YAML, each with a hint where the content is of another format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, pip_install

TEXT_KEYS = ("prompt", "text", "caption")
"""Names of the column with the prompt's text, in any case; the first one that a file has is used."""
PARQUET = ".parquet"
Rows = list[tuple[str, Any]]
"""The place of an entry in its file ("line 3"), and the entry: text, or a dictionary of columns."""


def is_text(text: str) -> bool:
    """Return whether a text has no lone surrogates, which UTF-8 cannot encode, and no control characters."""
    return not any("\ud800" <= c <= "\udfff" or (c < " " and c not in "\t\n\v\f\r") for c in text)


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises DraftuneError if it is not UTF-8, or contains control characters."""
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
    r"""Split at \n, \r\n and \r only: `str.splitlines` also splits at characters such as U+2028 inside prompts."""
    return re.split(r"\r\n|\n|\r", text)


def read_lines(text: str, path: Path) -> Rows:
    """Read one prompt a line. Raises DraftuneError if the text is a table, JSON or YAML."""
    if problem := other_kind(text, ""):
        raise DraftuneError(f"{str(path)!r} is not a list of one prompt a line{problem}")
    return [(f"line {number}", line) for number, line in enumerate(split_lines(text), 1)]


def read_table(text: str, path: Path, delimiter: str) -> Rows:
    """Read a table with a header. Raises DraftuneError for cells beyond the header, and for unclosed quotes."""
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
                    f"{str(path)!r}, {where}: {count} cells, but the header has {len(names)}: put a cell that "
                    f"contains {part} in double quotes"
                )
            rows.append((where, {name: cell for name, cell in row.items() if name}))
    except csv.Error as error:
        raise DraftuneError(f"{str(path)!r}, line {reader.reader.line_num}: {error}") from error
    return rows


def read_jsonl(text: str, path: Path) -> Rows:
    """Read one JSON object a line. Raises DraftuneError that names the line that is not one."""
    rows: Rows = []
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            problem = "" if rows else other_kind(text, ".jsonl")
            raise DraftuneError(f"{str(path)!r}, line {number} is not JSON: {error}{problem}") from error
        if not isinstance(row, dict):
            problem = other_kind(text, ".jsonl")
            raise DraftuneError(f'{str(path)!r}, line {number} must be an object such as {{"prompt": …}}{problem}')
        rows.append((f"line {number}", row))
    return rows


def read_json(text: str, path: Path) -> Rows:
    """Read a JSON array. Raises DraftuneError if the text is not one."""
    try:
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        if not text.strip():
            return []
        raise DraftuneError(f"{str(path)!r} is not JSON: {error}{other_kind(text, '.json')}") from error
    return entries(rows, path, 'an array such as ["a cat", "a dog"]')


def read_yaml(text: str, path: Path) -> Rows:
    """Read a YAML list of texts or mappings. Raises DraftuneError if the text is not one."""
    import yaml

    if isinstance(json_of(text), list):
        return read_json(text, path)  # PyYAML does not join the surrogate pairs of JSON strings
    try:
        # BaseLoader reads every value as text; the other loaders read `- no` as false.
        rows, node = yaml.load(text, yaml.BaseLoader), yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DraftuneError(f"{str(path)!r} is not YAML{line}: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise DraftuneError(f"{str(path)!r} is nested too deeply") from error
    if not rows or node is None:
        return []
    numbered = entries(rows, path, "a list such as '- a cat'")
    for (where, row), part in zip(numbered, node.value, strict=True):
        if not isinstance(row, dict):
            continue
        names = [key.value for key, _ in part.value]
        # PyYAML silently uses the last of several values, and anchors can make a nested value infinite.
        if twice := [name for name in names if names.count(name) > 1]:
            raise DraftuneError(f"{str(path)!r}, {where} contains {twice[0]!r} twice")
        if nested := [name for name, value in row.items() if not isinstance(value, str)]:
            raise DraftuneError(f"{str(path)!r}, {where}: {nested[0]!r} must be one value, such as text")
    return numbered


def read_parquet(path: Path) -> Rows:
    """Read the columns of text and numbers of a Parquet file.

    Raises:
        DraftuneError: pyarrow is not installed, or the file is invalid.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DraftuneError(f"{str(path)!r} needs the package pyarrow: {pip_install('data')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            types = pyarrow.types
            left_out = (types.is_binary, types.is_large_binary, types.is_nested)
            columns = [field.name for field in file.schema_arrow if not any(test(field.type) for test in left_out)]
            rows = file.read(columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DraftuneError(f"{str(path)!r} is not a Parquet file: {str(error).splitlines()[0]}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def entries(rows: Any, path: Path, expected: str) -> Rows:
    """Number the entries of a list. Raises DraftuneError if it is no list."""
    if not isinstance(rows, list):
        raise DraftuneError(f"{str(path)!r} must contain {expected}, not {type(rows).__name__}")
    return [(f"entry {number}", row) for number, row in enumerate(rows, 1)]


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for a repeated key, whose last value `json.loads` silently uses."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it contains the key {next(name for name in names if names.count(name) > 1)!r} twice")
        return row

    return json.loads(text, object_pairs_hook=table)


def other_kind(text: str, ending: str) -> str:
    """Return a hint if the content has another format than the file's extension, else an empty text."""
    kind = plain_kind(text)
    if kind is None or kind == ending:
        return ""
    if kind == ";":
        return ": its columns are separated by semicolons; use commas (.csv) or tabs (.tsv)"
    return f": it is {PLAIN[kind]}; rename the file to end in {kind}"


PLAIN = {
    ".json": "JSON",
    ".jsonl": "one JSON object a line",
    ".yaml": "a YAML list",
    ".csv": "a comma-separated table",
    ".tsv": "a tab-separated table",
}


def plain_kind(text: str) -> str | None:
    """Return the extension that fits a text's format; ";" for a table with semicolons, None for plain lines."""
    lines = [line.rstrip() for line in split_lines(text) if line.strip()]
    if not lines:
        return None
    if all(isinstance(json_of(line), dict) for line in lines):
        return ".jsonl"
    # JSON may be invalid further below. Prompt syntax such as [dog] and {red|blue} has no quotes and is plain text.
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
    """Return the parsed JSON, None if it is invalid."""
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
"""Readers of prompt files by file extension."""
