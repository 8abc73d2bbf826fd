"""The logger "draftune". Python users configure it like any other; the command line prints its records as lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from draftune.utils.processes import rank_and_world_size

logger = logging.getLogger("draftune")
# The other processes of a launcher log the same.
logger.addFilter(lambda record: rank_and_world_size()[0] == 0)


class ProgressBarHandler(logging.Handler):
    """Write records to standard error with `tqdm.write`, which keeps progress bars intact."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(f"draftune: {record.getMessage()}", file=sys.stderr)


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """Print the logger's records from level INFO on, as `draftune: MESSAGE` on standard error, inside the block."""
    handler, level = ProgressBarHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
