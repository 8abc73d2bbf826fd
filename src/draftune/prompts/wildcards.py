"""Alternatives in prompts: "a {red|blue} car" stands for two prompts."""

from __future__ import annotations

from itertools import product

from draftune.errors import DraftuneError

LIMIT = 10_000
"""Largest number of prompts that one entry may stand for."""


def expand(text: str) -> list[str]:
    r"""Return the prompts that a text with alternatives stands for, in order; the last braces vary fastest.

    "{a|b}" stands for a and for b, "{a|}" for a and for nothing, and braces may contain braces. Braces without "|" are
    text, and so are unpaired ones.

    Raises:
        DraftuneError: It stands for more than `LIMIT` prompts.
    """
    found: list[str] = []
    for parts in product(*(choices_of(part) for part in split(text))):
        if len(found) == LIMIT:
            raise DraftuneError(
                f"the prompt {text[:60]!r} stands for more than {LIMIT} prompts: use fewer alternatives in {{a|b}}"
            )
        found.append("".join(parts))
    return found


def choices_of(part: str) -> list[str]:
    """Return the alternatives of a part from `split`."""
    if 0 not in paired(part):
        return [part]
    alternatives = split(part[1:-1], "|")
    if len(alternatives) == 1:
        return [f"{{{choice}}}" for choice in expand(alternatives[0])]
    return [choice for alternative in alternatives for choice in expand(alternative)]


def split(text: str, separator: str = "") -> list[str]:
    """Split a text at a separator outside braces; without one, into its outermost braces and the text between."""
    closing = paired(text)
    parts, start, i = [], 0, 0
    while i < len(text):
        end = closing.get(i)
        if end is not None and not separator:
            parts += [text[start:i], text[i : end + 1]]
            start = end + 1
        elif separator and text[i] == separator:
            parts.append(text[start:i])
            start = i + 1
        i = i + 1 if end is None else end + 1
    parts.append(text[start:])
    return parts if separator else [part for part in parts if part]


def paired(text: str) -> dict[int, int]:
    """Return the positions of paired braces: that of the closing brace by that of the opening one."""
    pairs, opened = {}, []
    for i, character in enumerate(text):
        if character == "{":
            opened.append(i)
        elif character == "}" and opened:
            pairs[opened.pop()] = i
    return pairs
