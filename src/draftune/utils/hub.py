"""Hub ids, downloads from the Hugging Face hub, and lookups in its cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError

local: ContextVar[bool] = ContextVar("local", default=False)


class NotLocalError(DraftuneError):
    """The files of a hub id are not in the hub's cache, and could not be downloaded."""


@contextmanager
def local_files_only() -> Iterator[None]:
    """Make no request to the hub inside the block: `fetch` returns what is in the cache, or fails."""
    token = local.set(True)
    try:
        yield
    finally:
        local.reset(token)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form owner/name and is not a path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def offline() -> bool:
    """Return whether the environment variable HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_folder(name: str, *files: str, revision: str | None = None) -> Path | None:
    """Return the folder of a hub id in the hub's cache that contains one of these files; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        paths = [try_to_load_from_cache(name, file, revision=revision) for file in files] if is_hub_id(name) else []
    except HFValidationError:
        return None
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


def reachable(name: str, repo_type: str = "model") -> bool:
    """Return whether the hub responds to one request for the metadata of a model's or data set's repository.

    The request takes at most HF_HUB_ETAG_TIMEOUT seconds (an environment variable of huggingface_hub, default 10). With
    HF_HUB_OFFLINE set, and inside `local_files_only`, no request is made.

    Raises:
        RepositoryNotFoundError: The hub responds that the repository does not exist, or that access is denied.
    """
    if local.get():
        return False
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RepositoryNotFoundError:
        raise
    except Exception:  # the HTTP library behind huggingface_hub, and so its exceptions, depend on the version
        return False
    return True


def fetch(download: Callable[..., str], name: str, *args: Any, **options: Any) -> Path:
    """Download from the hub, or return the cached copy if the hub can't be reached.

    Without the check by `reachable`, huggingface_hub retries a missing file for half a minute or more.

    Args:
        download: A function of huggingface_hub or diffusers with an argument `local_files_only`.
        name: The hub id, the function's first argument.
        args: More of its arguments.
        options: Its keyword arguments.

    Returns:
        The downloaded file or folder.
    """
    log = logging.getLogger("huggingface_hub")
    level = log.level
    # Warnings about retries would hide the error message that follows.
    log.setLevel(logging.ERROR)
    try:
        online = reachable(name, options.get("repo_type", "model"))
        return Path(download(name, *args, local_files_only=not online, **options))
    finally:
        log.setLevel(level)


def why_not_fetched() -> str:
    """Return the part of an error that says why a file was not downloaded; empty where no request may be made."""
    if offline():
        return " and HF_HUB_OFFLINE forbids its download"
    return "" if local.get() else " and could not be fetched from the hub"


def unreachable(
    name: str, option: str, file: str = "", error: Exception | None = None, selected: str = ""
) -> DraftuneError:
    """Return the error for a model that is neither on this machine nor can be downloaded.

    Args:
        name: The hub id.
        option: The command line option that takes the model's folder or file.
        file: The one file that is needed; empty for the whole repository.
        error: The exception of huggingface_hub, which can mean that the repository or file does not exist.
        selected: The selected revision and variant, to be appended to the name.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what, kind = (f"{file!r} of {name!r}", "path") if file else (f"{name!r}{selected}", "folder")
    # LocalEntryNotFoundError, raised without a network, is a subclass of EntryNotFoundError.
    if isinstance(error, (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)) and not isinstance(
        error, LocalEntryNotFoundError
    ):
        return DraftuneError(f"there is no {what} on the hub, or none that you may read ({option})")
    return NotLocalError(
        f"{what} is not on this machine{why_not_fetched()}: download it where there is a network "
        f"({' '.join(['hf download', name, file]).strip()}) and give the {kind} to {option}"
    )
