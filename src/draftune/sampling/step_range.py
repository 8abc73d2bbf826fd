"""A range of sampling steps: the part of the sampling path on which a LoRA is active. Imports no torch."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING

from draftune.errors import DraftuneError

if TYPE_CHECKING:
    from draftune.sampling.schedule import Schedule

RANGE = re.compile(r"(\d*\.?\d+)-(\d*\.?\d+)")


@dataclass(frozen=True)
class StepRange:
    """A range of the sampling path, as fractions of the number of steps: 0 is the noise, 1 the image.

    Step i of T, counted from 0, is in the range if start <= i / T < end. So 0.0-1.0 holds every step for each T, and
    0.0-0.4 and 0.4-1.0 together hold every step once.

    Attributes:
        start: Fraction of the first step, from 0.
        end: Fraction of the first step after the range, above `start` and at most 1.
    """

    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """Parse a range such as "0.0-0.4"; an empty text is the range of all steps.

        Raises:
            DraftuneError: The text is no such range.
        """
        if not text.strip():
            return cls()
        if match := RANGE.fullmatch(text.strip()):
            start, end = map(float, match.groups())
            if start < end <= 1:
                return cls(start, end)
        raise DraftuneError(f"lora_steps must be START-END with 0 <= START < END <= 1, such as 0.0-0.4, not {text!r}")

    def __str__(self) -> str:
        # Without an exponent, whose minus sign `parse` would not read.
        return "-".join(f"{Decimal(repr(bound)):f}" for bound in (self.start, self.end))

    @property
    def is_all(self) -> bool:
        """Whether the range holds all steps."""
        return (self.start, self.end) == (0, 1)

    def indices(self, count: int) -> range:
        """Return the indices of the steps in the range, of `count` steps.

        Raises:
            DraftuneError: The range holds no step.
        """
        first, end = (bisect_left(range(count), x, key=lambda i: i / count) for x in (self.start, self.end))
        if first == end:
            raise DraftuneError(
                f"lora_steps={self} holds none of the {count} sampling steps: step i of T is in the range if START <= "
                "i / T < END; widen the range, or raise num_inference_steps"
            )
        return range(first, end)

    def mark(self, schedule: Schedule) -> Schedule:
        """Return the schedule with `Step.tuned` set to whether each step is in the range.

        Raises:
            DraftuneError: The range holds no step.
        """
        chosen = self.indices(len(schedule))
        steps = tuple(step._replace(tuned=i in chosen) for i, step in enumerate(schedule.steps))
        return replace(schedule, steps=steps)
