"""The cache of prompt embeddings on disk: one safetensors file for each text, in one folder for each text encoder.

The folder is that of the environment variable DRAFTUNE_PROMPT_CACHE; "off" disables the cache. The default is
draftune/prompts in $XDG_CACHE_HOME or ~/.cache. It may be deleted at any time. Above `LIMIT` bytes, the files that were
not used for the longest time are deleted.

The key is a SHA-256 digest of the text and of all that its embedding depends on (`encoder_identity`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftune import __version__
from draftune.utils.loading import weights_files
from draftune.utils.logging import logger
from draftune.utils.paths import atomic_write, user_path
from draftune.utils.tensors import save_tensors

if TYPE_CHECKING:
    from draftune.models.base import DiffusionModel

VARIABLE = "DRAFTUNE_PROMPT_CACHE"
PROMPT, NEGATIVE = "prompt", "negative prompt"
LIMIT = 20 * 10**9
"""Bytes that the cache may take."""
LIBRARIES = ("torch", "transformers", "diffusers", "tokenizers")
SLICES, SLICE = 64, 2**16
"""Number of slices of a weight file that are read for its digest, and their bytes."""


def cache_folder() -> Path | None:
    """Return the folder of the cache, None if it is disabled."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "off":
        return None
    caches = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return user_path(chosen) if chosen else caches / "draftune" / "prompts"


def encoder_identity(model: DiffusionModel, folder: Path, device: torch.device) -> str | None:
    """Return a digest of all that embeddings depend on, besides the text.

    These are the weights of the text encoders (see `weights_digest`), the contents of their configs, of the tokenizers'
    files, of model_index.json and of the denoiser's config, the family and its precision, the kind of device, and the
    versions of draftune and of the libraries that encode. None if there are no weights, or a file can't be read.
    """
    parts = [name for name in model.pipeline.components if name.startswith(("text_encoder", "tokenizer"))]
    files = [folder / "model_index.json", folder / model.lora_prefix / "config.json"]
    weights = []
    for part in sorted(parts):
        if part.startswith("text_encoder"):
            files += sorted((folder / part).glob("*.json"))
            weights += sorted(weights_files(folder / part, model.options.variant))
        else:
            files += sorted(path for path in (folder / part).glob("*") if path.is_file())
    kind = type(model)
    facts = {
        "family": f"{kind.__module__}.{kind.__qualname__}",
        "precision": [str(model.autocast_dtype), str(model.denoiser.dtype), str(model.dtype)],
        "device": device.type,
        "versions": {"draftune": __version__, **{name: version(name) for name in LIBRARIES}},
    }
    try:
        facts["weights"] = {str(path.relative_to(folder)): weights_digest(path) for path in weights}
        facts["files"] = {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in files}
    except OSError:
        return None
    return sha256(json.dumps(facts, sort_keys=True).encode()) if weights else None


def weights_digest(path: Path) -> str:
    """Return a digest of a weight file: its size, time of change, header, and evenly spaced slices of its data.

    Reading all of a file of 10 GB would take as long as loading it.
    """
    status = path.stat()
    digest = hashlib.sha256(json.dumps([status.st_size, status.st_mtime_ns]).encode())
    with path.open("rb") as file:
        length = int.from_bytes(start := file.read(8), "little")
        digest.update(start + file.read(min(length, status.st_size)))
        first = file.tell()
        for i in range(SLICES):
            file.seek(first + max(0, status.st_size - first - SLICE) * i // (SLICES - 1))
            digest.update(file.read(SLICE))
    return digest.hexdigest()


def sha256(data: bytes) -> str:
    """Return the SHA-256 digest of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class EmbeddingCache:
    """The embeddings of one text encoder on disk.

    Args:
        folder: The folder of the cache, see `cache_folder`.
        identity: The digest of the text encoder, see `encoder_identity`.
        family: The model's class. Its module defines the named tuples of its conditions.
    """

    def __init__(self, folder: Path, identity: str, family: type) -> None:
        self.root, self.folder, self.family = folder, folder / identity[:32], family

    def path(self, kind: str, text: str) -> Path:
        """Return the file of a text."""
        return self.folder / f"{sha256(json.dumps([kind, text]).encode())}.safetensors"

    def read(self, kind: str, text: str) -> list[Any]:
        """Return a list with the row of a text, empty if the cache does not have it or its file is damaged."""
        path = self.path(kind, text)
        if not path.is_file():
            return []
        try:
            with safe_open(path, "pt") as file:
                tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
                metadata = file.metadata() or {}
            if metadata["sha256"] != tensors_digest(tensors):
                raise ValueError("its checksum is wrong")
            row = built(json.loads(metadata["structure"]), tensors, self.family)
            with suppress(OSError):
                os.utime(path)  # a cache that may only be read serves too
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning(f"the prompt embedding {str(path)!r} is damaged and will be made again: {error}")
            return []
        return [row]

    def write(self, rows: Iterable[tuple[tuple[str, str], Any]]) -> None:
        """Write rows by kind and text. If that fails, log a warning: the cache only saves time."""
        try:
            for item, row in rows:
                tensors: list[Tensor] = []
                structure = json.dumps(flat(row, tensors))
                metadata = {"structure": structure, "sha256": tensors_digest(tensors)}
                with atomic_write(self.path(*item)) as path:
                    save_tensors(path, {str(i): tensor for i, tensor in enumerate(tensors)}, metadata)
            self.trim()
        except OSError as error:
            logger.warning(f"prompt embeddings are not cached in {str(self.root)!r}: {error.strerror or error}")

    def trim(self) -> None:
        """Delete the files that were not used for the longest time, until the cache has at most `LIMIT` bytes."""
        paths = self.root.glob("*/*.safetensors")
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in paths)
        excess = sum(size for _, size, _ in files) - LIMIT
        for _, size, path in files:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the values of tensors on the CPU."""
    return sha256(b"".join(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors))


def flat(row: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors of a row to `tensors`, and return the row's structure as a JSON value.

    A tensor becomes its index, a list a list, and a named tuple a mapping from its name to its fields.
    """
    if row is None:
        return None
    if isinstance(row, Tensor):
        tensors.append(row)
        return len(tensors) - 1
    fields = [flat(item, tensors) for item in row]
    return fields if isinstance(row, list) else {type(row).__name__: fields}


def built(structure: Any, tensors: list[Tensor], family: type) -> Any:
    """Build the row that `flat` took apart; a named tuple is one that the modules of the model's classes define."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return tensors[structure]
    if isinstance(structure, list):
        return [built(item, tensors, family) for item in structure]
    ((name, fields),) = structure.items()
    modules = [sys.modules[kind.__module__] for kind in family.__mro__]
    kinds = [kind for module in modules if isinstance(kind := getattr(module, name, None), type)]
    for kind in kinds:
        if issubclass(kind, tuple) and hasattr(kind, "_make"):
            return kind._make(built(item, tensors, family) for item in fields)
    raise LookupError(f"{family.__name__} has no condition {name!r}")
