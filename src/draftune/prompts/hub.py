"""Prompts from data sets of the Hugging Face hub: hf://datasets/OWNER/NAME, or one file of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from draftune.errors import DraftuneError, first_line, pip_install
from draftune.prompts.files import Rows
from draftune.utils.hub import fetch, why_not_fetched

PREFIX = "hf://datasets/"


class HubSource(NamedTuple):
    """A data set of the hub, or one of its files.

    Attributes:
        repository: The hub id.
        file: A path inside it; empty for the whole data set.
        split: A split; empty for `train`, or for the only one.
    """

    repository: str
    file: str
    split: str

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """Parse hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME@SPLIT or hf://datasets/OWNER/NAME/FILE.

        Raises:
            DraftuneError: The text has another form.
        """
        path, _, split = text.removeprefix(PREFIX).partition("@")
        owner, name, file = (*path.split("/", 2), "", "")[:3]
        if not owner or not name or (file and split):
            raise DraftuneError(
                f"a data set of the hub is {PREFIX}OWNER/NAME, {PREFIX}OWNER/NAME@SPLIT or {PREFIX}OWNER/NAME/FILE, "
                f"each with :COLUMN if needed, not {text!r}"
            )
        return cls(f"{owner}/{name}", file, split)


def hub_file(source: HubSource) -> Path:
    """Return the path of a file of a data set, downloaded or cached. Raises DraftuneError without either."""
    from huggingface_hub import hf_hub_download

    try:
        return fetch(hf_hub_download, source.repository, source.file, repo_type="dataset")
    except Exception as error:  # the HTTP library behind huggingface_hub, and so its exceptions, depend on the version
        raise missing(source, error) from error


def hub_rows(source: HubSource) -> Rows:
    """Read a data set with the library `datasets`, which downloads and caches it; only text and numbers are kept.

    Raises:
        DraftuneError: `datasets` is not installed, the data set is neither cached nor reachable, or it has several
            splits and none is named.
    """
    try:
        import datasets
    except ImportError as error:
        raise DraftuneError(f"prompts of a data set need the package datasets: {pip_install('data')}") from error
    try:
        found: Any = datasets.load_dataset(source.repository, split=source.split or None)
    except Exception as error:
        raise missing(source, error) from error
    if not source.split:
        names = list(found)
        if "train" not in names and len(names) > 1:
            raise DraftuneError(f"the data set {source.repository!r} has the splits {', '.join(names)}: append @SPLIT")
        found = found["train" if "train" in names else names[0]]
    columns = [
        name
        for name, feature in found.features.items()
        if type(feature) is datasets.Value and feature.dtype != "binary"
    ]
    return [(f"row {number}", row) for number, row in enumerate(found.select_columns(columns), 1)]


def missing(source: HubSource, error: Exception) -> DraftuneError:
    """Return the error for a data set that is neither on this machine nor can be downloaded."""
    name = f"{source.file!r} of {source.repository!r}" if source.file else repr(source.repository)
    split = f", split {source.split!r}," if source.split else ""
    return DraftuneError(
        f"the data set {name}{split} is not on this machine{why_not_fetched()} "
        f"({first_line(error)}): download it where there is a network, and give the file to --prompts"
    )
