"""The fields of `Settings`: their help, their choices or ranges, and the check of a value."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import MISSING, Field, field
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.prompts.files import is_text
from draftune.registry.factories import TYPE_NAMES

NONE = " | None"
MOST = 2**63 - 1
"""Largest value of an integer setting."""


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    resume: str = "computed",
) -> Any:
    """Return a dataclass field of a setting.

    Args:
        default: The default.
        help: The help text.
        choices: The allowed values; empty for all.
        low, high: The range of a number, with its ends.
        resume: Whether it may differ when a run is resumed. "computed": only if `allow_changes` names it, since results
            depend on it. "rounding": yes; memory, speed and device change results by rounding only. "free": yes; the
            run's length, and what is evaluated, logged or saved. "fixed": never; the LoRA's shape and start, and how
            the best LoRA is chosen.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "resume": resume}
    return field(default=default, metadata=metadata)


def optional(f: Field[Any]) -> bool:
    """Return whether a setting's type allows None; its empty text then means none."""
    return str(f.type).endswith(NONE)


def kind(f: Field[Any]) -> type:
    """Return the type of a setting's values other than None: str, int, float or bool."""
    return {"str": str, "int": int, "float": float, "bool": bool}[str(f.type).removesuffix(NONE)]


def checked(f: Field[Any], value: Any) -> Any:
    """Return the value converted to the setting's type. Raises DraftuneError for a wrong type or range."""
    if value is None:
        if f.default is None or f.default is MISSING:
            return None
        raise DraftuneError(f"{f.name} must have a value")
    expected = kind(f)
    if value is False and "no" in f.metadata["choices"]:
        value = "no"  # YAML 1.1 reads no as false
    if expected is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise DraftuneError(f"{f.name} must be {TYPE_NAMES[expected]}, not {value!r}")
    if isinstance(value, str) and not (value.strip() or f.default == "" or optional(f)):
        raise DraftuneError(f"{f.name} must not be empty")
    if isinstance(value, str) and ("\0" in value or not is_text(value)):
        raise DraftuneError(f"{f.name} must be text without control characters, not {value!r}")
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if high is None and expected is int:
        high = MOST
    if low is not None and not value >= low:
        raise DraftuneError(f"{f.name} must be at least {low:g}, not {value!r}")
    if high is not None and not value <= high:
        raise DraftuneError(f"{f.name} must be at most {high:.10g}, not {value!r}")
    if isinstance(value, float) and math.isinf(value):
        raise DraftuneError(f"{f.name} must be finite")
    if choices and value not in choices:
        raise unknown(f.name, str(value), choices)
    return value
