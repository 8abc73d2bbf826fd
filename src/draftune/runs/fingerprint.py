"""Identify files and folders by their contents, so that a model has one identity under any path. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError
from draftune.utils.hub import cached_folder
from draftune.utils.model_options import NO_OPTIONS, ModelOptions
from draftune.utils.paths import user_path

INDEX = "model_index.json"
NOT_LOADED = ("feature_extractor", "image_encoder", "safety_checker")
"""Components of a pipeline that are never loaded."""
LOADED = (".json", ".model", ".safetensors", ".txt")
"""Endings of the files that a pipeline's components are loaded from."""
NOT_READ = (".bin", ".ckpt", ".h5", ".md", ".msgpack", ".onnx", ".pt", ".pth")
"""Endings of files that are never loaded from a folder: weights are loaded from safetensors only."""
VARIANT = re.compile(r"\.(fp16|bf16)(?=[.-])")
"""Part of the names of half-precision files: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors."""
CHUNK = 2**24


@dataclass(frozen=True)
class Source:
    """A file or folder that a run reads.

    Attributes:
        text: The name or path in the settings, which may be a hub id.
        path: The absolute path with links resolved.
        stamp: Digest of names, sizes and modification times: equal paths and stamps imply equal contents.
        known: The SHA-256 of each file by its name in the folder, if they were computed before.
        variant: The variant of a pipeline's weights; "" for plain weights.
        in_part: Whether only some of the files are loaded, as from the base pipeline of a checkpoint file.
    """

    text: str
    path: str
    stamp: str
    known: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""
    in_part: bool = False

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of each file by its name in the folder; slow for large weights."""
        return dict(self.known) or fingerprint(Path(self.path), self.variant)

    def holds(self, earlier: Source) -> bool:
        """Return whether the contents equal those of an earlier source.

        Files are hashed only if the path or the stamp differs. Files added to a folder since then are ignored, except
        in a pipeline's folder, from which they would be loaded.
        """
        if (self.path, self.stamp) == (earlier.path, earlier.stamp):
            return True
        if not earlier.sha256:
            return self.path == earlier.path  # no file in it can be loaded
        if INDEX in earlier.sha256 and not self.in_part:
            return self.sha256 == earlier.sha256
        return earlier.sha256.items() <= self.sha256.items()

    def saved(self) -> dict[str, Any]:
        """Return the source for JSON, with the SHA-256 of its files."""
        return {**asdict(self), "known": self.sha256}


def find_source(text: str, options: ModelOptions = NO_OPTIONS, in_part: bool = False) -> Source | None:
    """Return the file or folder on this machine that a name or path in the settings stands for, if there is one.

    Args:
        text: The name or path.
        options: The revision and the variant of a model.
        in_part: Whether the files of a pipeline are loaded in part only.
    """
    try:
        path: Path | None = EMBEDDED.get(text) or user_path(text)
        if path is not None and not path.exists():
            path = cached_folder(text, INDEX, "config.json", revision=options.revision)
        if path is None or not text.strip():
            return None
        path, variant = path.resolve(), options.variant or ""
        facts = [(name, (stat := file.stat()).st_size, stat.st_mtime_ns) for name, file in files_of(path, variant)]
        stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return Source(text, str(path), stamp, variant=variant, in_part=in_part)
    except (DraftuneError, OSError, ValueError, AttributeError):
        return None  # loading it reports the error


def same_source(first: str, second: str) -> bool:
    """Return whether two names or paths refer to the same contents."""
    a, b = find_source(first), find_source(second)
    return first == second if a is None or b is None else a.holds(b)


def fingerprint(path: Path, variant: str = "") -> dict[str, str]:
    """Return the SHA-256 of each file of a folder by its name in the folder; of a single file under the name "".

    Raises:
        DraftuneError: a file cannot be read.
    """
    try:
        return {name: sha256_of(file) for name, file in files_of(path, variant)}
    except OSError as error:
        raise DraftuneError(f"cannot read {error.filename!r}: {error.strerror}") from error


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file. In the hub cache it is the name of large files, which are not read."""
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    digest = hashlib.sha256()
    with target.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def files_of(path: Path, variant: str = "") -> list[tuple[str, Path]]:
    """Return (name in the folder, path) of the files to hash, sorted, for a file, pipeline, run or other folder."""
    if path.is_file():
        return [("", path)]
    files = pipeline_files(path, variant) if (path / INDEX).is_file() else folder_files(path)
    return sorted((file.relative_to(path).as_posix(), file) for file in files)


def pipeline_files(path: Path, variant: str = "") -> Iterator[Path]:
    """Yield the files that the components of a saved pipeline are loaded from, of a variant also the plain weights."""
    yield path / INDEX
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    for part, entry in index.items():
        if isinstance(entry, list) and entry != [None, None] and part not in NOT_LOADED:
            # The first published unconditional pipelines have their network beside the index.
            folder = path / part if (path / part).is_dir() else path
            files = {file.name: file for file in folder.iterdir() if file.suffix in LOADED and file != path / INDEX}
            # A half-precision variant is loaded if the plain file is missing.
            yield from (
                file
                for name, file in files.items()
                if variant or VARIANT.sub("", name) == name or not plain(name, files.keys())
            )


def plain(name: str, names: Set[str]) -> bool:
    """Return whether the full-precision form of a file is among these names, as one file or in shards."""
    whole = VARIANT.sub("", name)
    stem = whole.partition(".")[0].partition("-0")[0]
    return not names.isdisjoint({whole, f"{stem}.safetensors", f"{stem}.safetensors.index.json"})


def folder_files(path: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders; for a run's folder those of its checkpoints."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for file in root.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.is_file() and not hidden and file.suffix.lower() not in NOT_READ:
            yield file
