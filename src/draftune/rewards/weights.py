"""Where a reward's weights come from: the package, a folder, or the hub; safetensors only."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError
from draftune.hub import is_hub_id, unreachable


def find_folder(model: str, option: str) -> Path:
    """The folder of a model: embedded in this package by name, on disk by path, or fetched from the hub by id.

    `option` is what the user would set to point elsewhere; it is named in the message of the DraftuneError that is
    raised when there is no such folder and no network to fetch it.
    """
    if model in EMBEDDED:
        return EMBEDDED[model]
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not is_hub_id(model):
        raise DraftuneError(f"no folder {model!r}: {option} takes a folder, a hub id or one of {', '.join(EMBEDDED)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"]))
    except Exception as error:
        raise unreachable(model, option) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises DraftuneError for anything else."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DraftuneError(f"{path} is not a readable safetensors file: {error}") from error
