"""Ctrl-C and TERM end a run after the present update, with everything saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from draftune.utils.logging import logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def graceful_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets. A second signal acts as it did before the block."""
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested  # Python allows signal handlers in the main thread only
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop_requested.set()
        restore()
        logger.warning("finishing this update; press Ctrl-C again to stop at once")

    for number in SIGNALS:
        signal.signal(number, request_stop)
    try:
        yield stop_requested
    finally:
        restore()
