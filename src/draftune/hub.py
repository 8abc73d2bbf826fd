"""Names of models on the hub, and what to say when it can't be reached."""

from __future__ import annotations

from draftune.errors import DraftuneError


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name and not that of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def unreachable(name: str, option: str, file: str = "") -> DraftuneError:
    """The error for a model that is neither on this machine nor to be fetched; `option` takes its folder or file."""
    what, given = (f"{file!r} of {name!r}", "path") if file else (repr(name), "folder")
    return DraftuneError(
        f"{what} is not on this machine and could not be fetched from the hub: download it where there is a network "
        f"({' '.join(['hf download', name, file]).strip()}) and give the {given} to {option}"
    )
