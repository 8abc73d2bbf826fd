"""Scores of picture files: finding them, scoring them, the table."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.evaluation.metrics import score_batches
from draftune.prompts import metadata, read_prompts
from draftune.rewards import Reward
from draftune.utils.images import image_endings, is_hidden, open_image
from draftune.utils.paths import user_path
from draftune.utils.tables import write_csv, write_json


@dataclass
class Scores:
    """One row for each picture that could be read, in the order given, and what was wrong with the others."""

    rows: dict[Path, dict[str, float]]
    broken: dict[Path, str]

    @property
    def columns(self) -> list[str]:
        return ["image", *next(iter(self.rows.values()))]

    def table(self) -> str:
        width = max(map(len, map(str, self.rows)))
        lines = [f"{'image':{width}}  " + "  ".join(f"{label:>10}" for label in self.columns[1:])]
        for path, row in self.rows.items():
            cells = (f"{value:{max(10, len(label))}.4f}" for label, value in row.items())
            lines.append(f"{path!s:{width}}  " + "  ".join(cells))
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes the table as .csv or .json, whole or not at all."""
        records = [{"image": str(image), **row} for image, row in self.rows.items()]
        (write_json if path.suffix.lower() == ".json" else write_csv)(path, records)


def find_images(sources: Sequence[str]) -> list[Path]:
    """Return the files that are named or fit the patterns, and the images in the named folders; each once.

    A folder's images are those whose ending is one of an image file, whether it can be read or not; hidden files and
    folders are left out.

    Raises:
        DraftuneError: for a name that is no file, folder or pattern that fits one.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = user_path(source)
        if path.is_dir():
            named = (p for p in path.rglob("*") if p.suffix.lower() in image_endings())
            paths = sorted(p for p in named if not is_hidden(p.relative_to(path)) and p.is_file())
        elif path.exists():
            paths = [path]
        else:
            paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not paths:
            raise DraftuneError(
                f"no picture at {source!r}: a file, a folder or a pattern such as 'out/*.png' is wanted"
            )
        known = {path.resolve() for path in found}
        found |= dict.fromkeys(path for path in paths if path.resolve() not in known)
    return list(found)


def prompts_of(images: Sequence[Path], table: str) -> list[str]:
    """Return each image's prompt from a prompt file with a column "image" (a name, or a path from the file's folder).

    Raises:
        DraftuneError: for an image that the file does not name, or names with two prompts.
    """
    path = user_path(table)
    rows = read_prompts(path)
    if not any("image" in metadata(prompt) for prompt in rows):
        raise DraftuneError(f"{table!r} does not say which prompt is whose: give a table with 'image' and 'prompt'")
    named: dict[str, str] = {}
    for row in rows:
        name = metadata(row).get("image", "")
        first = named.setdefault(name, row)
        if name and (first, metadata(first)) != (row, metadata(row)):
            raise DraftuneError(f"{table!r} has two prompts for {name!r}")
    by_path = {(path.parent / name).resolve(): prompt for name, prompt in named.items()}
    prompts = []
    for image in images:
        prompt = by_path.get(image.resolve(), named.get(image.name))
        if prompt is None:
            raise DraftuneError(f"{table!r} has no prompt for {str(image)!r}")
        prompts.append(prompt)
    return prompts


def score_files(reward: Reward, images: Sequence[Path], prompts: Sequence[str], device: torch.device | str) -> Scores:
    """Scores pictures of any size; those that can't be read are left out and named in `broken`."""
    scores = Scores({}, {})
    with tqdm(total=len(images), desc="scoring", unit="picture", leave=False, disable=None) as progress:
        for batch in batches(zip(images, prompts, strict=True), scores.broken, reward.chunk_size):
            pictures = torch.cat([picture for *_, picture in batch])
            total, parts = score_batches(reward, pictures, [prompt for _, prompt, _ in batch], device)
            for i, (path, *_) in enumerate(batch):
                row = {label: float(values[i]) for label, values in parts.items()}
                scores.rows[path] = {**row, "total": float(total[i])}
            progress.n = len(scores.rows) + len(scores.broken)
            progress.refresh()
    if all(len(row) == 2 and len(set(row.values())) == 1 for row in scores.rows.values()):
        # The only part says it all.
        for row in scores.rows.values():
            del row["total"]
    return scores


def batches(
    pairs: Iterator[tuple[Path, str]], broken: dict[Path, str], size: int
) -> Iterator[list[tuple[Path, str, Tensor]]]:
    """Pictures of one size that follow each other, read as they are needed."""

    def read() -> Iterator[tuple[Path, str, Tensor]]:
        for path, prompt in pairs:
            try:
                yield path, prompt, open_image(path)
            except DraftuneError as error:
                broken[path] = str(error)

    for _, group in itertools.groupby(read(), key=lambda item: item[2].shape):
        while batch := list(itertools.islice(group, size)):
            yield batch
