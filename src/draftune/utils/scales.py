"""Read LoRA scales that a user typed."""

from __future__ import annotations

import math
import re

from draftune.errors import DraftuneError

COMMA = re.compile(r"(?<![\d.,])(\d+),(\d+)(?![\d.])")
"""Two whole numbers with a comma and no space between them."""
LARGE = 5
"""Whole numbers from this on are more often decimals than scales."""


def parse_scales(text: str, option: str = "--scales") -> list[float]:
    """Parse finite numbers separated by commas.

    Raises:
        DraftuneError: another text, or one with decimal commas: "0, 0,5, 1" is not read as 0, 0, 5, 1.
    """
    if decimal := decimal_comma(text):
        raise DraftuneError(f"{option} must have decimal points, not {text!r}: did you mean {decimal}?")
    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(map(math.isfinite, scales)):
        raise DraftuneError(f"{option} must be finite numbers such as 0,0.5,1, not {text!r}")
    return scales


def parse_scale(text: str, option: str) -> float:
    """Parse one finite number. Raises DraftuneError for another text."""
    if match := re.fullmatch(r"\s*([+-]?\d*),(\d+)\s*", text):
        meant = f"{match[1] or 0}.{match[2]}"
        raise DraftuneError(f"{option} must have a decimal point, not {text!r}: did you mean {meant}?")
    scales = parse_scales(text, option)
    if len(scales) != 1:
        raise DraftuneError(f"{option} must be one number such as 0.75, not {text!r}")
    return scales[0]


def decimal_comma(text: str) -> str:
    """Return what a comma seems to stand for, such as "0.5"; an empty text if commas separate numbers."""
    match = COMMA.search(text)
    if match is None or "." in text:
        return ""
    numbers = [int(word) for word in re.findall(r"-?\d+", text)]
    mixed = re.search(r"[,;]\s|;", text)
    doubtful = mixed or numbers != sorted(numbers) or max(numbers) >= LARGE
    return f"{match[1]}.{match[2]}" if doubtful else ""
