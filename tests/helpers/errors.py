"""Checks of error messages by the words that matter: the setting, its value, the file. The wording stays free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NUMBER = re.compile(r"(?:(?<![\w.])-)?(?<![\d.])\d+(?:\.\d+)?")


def mentions(text: str, *words: object) -> bool:
    """Return whether each word stands in the text.

    Upper and lower case count as one, and so do `learning_rate` and `--learning-rate`. Numbers count by their value:
    1 is in "at least 1.0", and not in 10. A word in single quotes must not be a part of a longer one, whatever quotes
    the text has: 'clip' is not in "clipp".

    Args:
        text: A message, or all that was printed.
        words: Words or values. A string with spaces gives several words.
    """
    return all(stands_in(text, word) for item in words for word in str(item).split())


def stands_in(text: str, word: str) -> bool:
    """Return whether one word stands in the text, as `mentions` describes."""
    if NUMBER.fullmatch(word):
        return float(word) in map(float, NUMBER.findall(text))
    inner = normalized(word).strip("'") or word
    if word == f"'{word[1:-1]}'" and inner != word:
        return re.search(rf"(?<![\w/]){re.escape(inner)}(?![\w/])", normalized(text)) is not None
    return inner in normalized(text)


def normalized(text: str) -> str:
    """Return the text in lower case, with an underscore for each hyphen."""
    return text.lower().replace("-", "_")


@contextmanager
def raises(error: type[BaseException], *words: object) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Check that the block raises this error and that each of the words stands in its message, as in `mentions`."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert mentions(message, *words), f"{words} are not all in {message!r}"
