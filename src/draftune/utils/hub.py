"""Names of models on the hub, fetching them, and what to say when it can't be reached."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from draftune.errors import DraftuneError


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name and not that of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def reachable() -> bool:
    """Whether the hub's name can be resolved, or a proxy would do that; the hub's client tries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(scheme != "no" for scheme in urllib.request.getproxies()):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def fetch(download: Callable[..., str], *args: Any, **options: Any) -> Path:
    """What one of the hub client's functions downloads, or has downloaded before where there is no network now."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    # Its remarks about retries would bury the one message that counts.
    log.setLevel(logging.ERROR)
    try:
        return Path(download(*args, local_files_only=not reachable(), **options))
    finally:
        log.setLevel(level)


def unreachable(name: str, option: str, file: str = "", error: Exception | None = None) -> DraftuneError:
    """The error for a model that is neither on this machine nor to be fetched; `option` takes its folder or file.

    `error`: what the hub's client raised, which may say that there is no such model.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    what, given = (f"{file!r} of {name!r}", "path") if file else (repr(name), "folder")
    # Without a network the first of these is raised too, as its subclass.
    if isinstance(error, (EntryNotFoundError, RepositoryNotFoundError)) and not isinstance(
        error, LocalEntryNotFoundError
    ):
        return DraftuneError(f"there is no {what} on the hub, or none that you may read ({option})")
    return DraftuneError(
        f"{what} is not on this machine and could not be fetched from the hub: download it where there is a network "
        f"({' '.join(['hf download', name, file]).strip()}) and give the {given} to {option}"
    )
