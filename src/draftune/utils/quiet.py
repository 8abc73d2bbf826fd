"""Silence warnings and progress bars of diffusers, transformers and huggingface_hub."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Suppress warnings, log lines and progress bars of these libraries inside the block."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    saved = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    try:
        for module, _ in saved:
            module.set_verbosity(logging.CRITICAL)
            module.disable_progress_bar()
        hub.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.setLevel(hub_level)
        for (module, level), bar in zip(saved, bars, strict=True):
            module.set_verbosity(level)
            if bar:
                module.enable_progress_bar()
