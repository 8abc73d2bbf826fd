"""Ctrl-C and a scheduler's TERM end a run after the update that is being made, with all of it saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from draftune.utils.processes import launched

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Inside this block the first signal is a wish for the loop to see, and a second one acts as it always does."""
    wish = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wish  # signals belong to the main thread
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        wish.set()
        restore()
        if launched()[0] == 0:
            print("draftune: finishing this update; once more to stop at once", file=sys.stderr)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        restore()
