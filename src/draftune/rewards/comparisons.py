"""Comparisons of two images by a person: a CSV file and, beside it, a folder of small images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from draftune.errors import DraftuneError
from draftune.prompts.files import read_table, read_text
from draftune.utils.paths import user_path
from draftune.utils.tables import write_csv

if TYPE_CHECKING:
    from PIL.Image import Image

LEFT, RIGHT, SKIP = CHOICES = ("left", "right", "skip")
LOCKED = 10.0
"""Seconds to wait for another process that changes the file."""
MAX_SIDE = 512
"""Longest side of a stored image in pixels; larger images are reduced."""


@dataclass(frozen=True)
class Comparison:
    """One row of a file of comparisons: two images of one prompt, and which of them the person prefers.

    `model`, `update`, `prompt`, a seed and `settings` determine an image, so that it can be sampled again.
    """

    prompt: str
    choice: str
    """left, right or skip."""
    model: str
    """The model, run or LoRA that the images are of; empty for images of unknown origin."""
    update: str
    """The update of the run that the images were sampled after, if they were sampled during training."""
    left_seed: str
    right_seed: str
    settings: str
    """The sampling settings, a JSON object."""
    left_image: str
    """The file of the left image, relative to the folder of the CSV file."""
    right_image: str

    @property
    def pair(self) -> tuple[str, ...]:
        """Return what determines the two images: equal for two answers about one pair."""
        return (self.model, self.update, self.prompt, self.left_seed, self.right_seed, self.settings)

    @property
    def images(self) -> tuple[str, str]:
        """Return the files of the preferred and of the other image; of a skipped pair the left and the right one."""
        files = (self.left_image, self.right_image)
        return files[::-1] if self.choice == RIGHT else files


COLUMNS = [f.name for f in fields(Comparison)]
REQUIRED = ("prompt", "choice", "left_image", "right_image")
"""Columns without which there is no comparison; the others may be left out of a file of another origin."""


def comparison(
    prompt: str, choice: str, model: str, update: int | None, seeds: tuple[int, int], settings: dict[str, object]
) -> Comparison:
    """Return the comparison of two images that the model can sample again. Their files are named by a digest."""
    known, prompt = json.dumps(settings, sort_keys=True, ensure_ascii=False), prompt.strip()
    step = "" if update is None else str(update)
    left, right = (digest(model, step, prompt, str(seed), known) for seed in seeds)
    return Comparison(prompt, choice, model, step, str(seeds[0]), str(seeds[1]), known, left, right)


def digest(*identity: str) -> str:
    """Return the name of an image's file."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20] + ".png"


def image_folder(path: Path) -> Path:
    """Return the folder of the images of a file of comparisons: `taste-images` beside `taste.csv`."""
    return path.with_name(f"{path.stem}-images")


def placed(comparison: Comparison, path: Path) -> Comparison:
    """Return the comparison with its images in `image_folder`."""
    folder = image_folder(path).name
    left, right = (f"{folder}/{Path(name).name}" for name in (comparison.left_image, comparison.right_image))
    return replace(comparison, left_image=left, right_image=right)


def read_comparisons(path: Path) -> list[Comparison]:
    """Read a file of comparisons.

    Raises:
        DraftuneError: there is no such file, it lacks a column, or a choice is not left, right or skip.
    """
    if not path.is_file():
        raise DraftuneError(f"no file of comparisons at {str(path)!r}: 'draftune rate' writes one")
    comparisons = []
    for place, row in read_table(read_text(path), path, ","):
        if missing := [name for name in REQUIRED if not (row.get(name) or "").strip()]:
            raise DraftuneError(f"{str(path)!r}, {place}: no {missing[0]}; needed are {', '.join(REQUIRED)}")
        if row["choice"] not in CHOICES:
            raise DraftuneError(f"{str(path)!r}, {place}: choice must be {', '.join(CHOICES)}, not {row['choice']!r}")
        comparisons.append(Comparison(**{name: row.get(name) or "" for name in COLUMNS}))
    return comparisons


def write_comparisons(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write a file of comparisons atomically; without any, remove the file."""
    if comparisons:
        write_csv(path, [asdict(comparison) for comparison in comparisons])
    else:
        path.unlink(missing_ok=True)


@contextmanager
def changed_comparisons(path: Path) -> Iterator[list[Comparison]]:
    """Yield the rows of a file to change in place, and write them after the block. Other processes wait meanwhile.

    Raises:
        OSError: the file cannot be written, or another process holds it for too long.
        DraftuneError: the file is not one of comparisons.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCKED)
    try:
        with suppress(NotImplementedError):  # the file system has no locks
            lock.acquire()
        comparisons = read_comparisons(path) if path.is_file() else []
        yield comparisons
        write_comparisons(path, comparisons)
    finally:
        lock.release()


def moved(comparisons: Iterable[Comparison], old: Path, new: Path) -> list[Comparison]:
    """Return comparisons of the file `old` with their images relative to the folder of the file `new`."""

    def relative(image: str) -> str:
        return Path(os.path.relpath(image_path(old, image), new.parent.absolute())).as_posix()

    return [replace(c, left_image=relative(c.left_image), right_image=relative(c.right_image)) for c in comparisons]


def image_path(path: Path, image: str) -> Path:
    """Return the path of an image that a file of comparisons names."""
    return path.absolute().parent / user_path(image)


def missing_images(path: Path, comparisons: Iterable[Comparison]) -> list[str]:
    """Return the images that a file of comparisons names and that are not there."""
    names = dict.fromkeys(name for comparison in comparisons for name in comparison.images)
    return [name for name in names if not image_path(path, name).is_file()]


def reduced(image: Image) -> Image:
    """Return the image, reduced to MAX_SIDE pixels if it is larger."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return small
