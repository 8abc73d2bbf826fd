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
    1 is in "at least 1.0", and not in 10.

    Args:
        text: A message, or all that was printed.
        words: Words or values. A string with spaces gives several words.
    """
    plain, numbers = normalized(text), {float(number) for number in NUMBER.findall(text)}
    parts = [part for item in words for part in str(item).split()]
    return all(float(part) in numbers if NUMBER.fullmatch(part) else normalized(part) in plain for part in parts)


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
