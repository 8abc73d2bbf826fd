"""Find image files, score them with a reward, and format the scores as a table."""

from __future__ import annotations

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
from draftune.utils.images import open_image
from draftune.utils.paths import user_path
from draftune.utils.tables import write_csv, write_json


@dataclass
class Scores:
    """Scores of image files.

    Attributes:
        rows: Scores by column, of each image that could be read, in the given order.
        broken: Error of each image that could not be read.
    """

    rows: dict[Path, dict[str, float]]
    broken: dict[Path, str]

    @property
    def columns(self) -> list[str]:
        """Return the column names: "image", then the labels of the reward."""
        return ["image", *next(iter(self.rows.values()))]

    def table(self) -> str:
        """Format the scores as a table, a line for each image."""
        width = max(map(len, map(str, self.rows)))
        lines = [f"{'image':{width}}  " + "  ".join(f"{label:>10}" for label in self.columns[1:])]
        for path, row in self.rows.items():
            cells = (f"{value:{max(10, len(label))}.4f}" for label, value in row.items())
            lines.append(f"{path!s:{width}}  " + "  ".join(cells))
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the table as .csv or .json, atomically."""
        records = [{"image": str(image), **row} for image, row in self.rows.items()]
        (write_json if path.suffix.lower() == ".json" else write_csv)(path, records)


def prompts_of(images: Sequence[Path], table: str) -> list[str]:
    """Read the prompt of each image from a prompt file.

    Args:
        images: The images.
        table: A prompt file with a column "image": a file name, or a path relative to the prompt file's folder.

    Raises:
        DraftuneError: the file has no prompt for an image, or two different ones.
    """
    path = user_path(table)
    rows = read_prompts(path)
    if not any("image" in metadata(prompt) for prompt in rows):
        raise DraftuneError(f"{table!r} has no column 'image': give a table with the columns 'image' and 'prompt'")
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
    """Score images of any size, in batches of one size. Images that cannot be read are left out."""
    scores = Scores({}, {})
    with tqdm(total=len(images), desc="scoring", unit="image", leave=False, disable=None) as progress:
        for batch in batches(zip(images, prompts, strict=True), scores.broken, reward.chunk_size):
            pixels = torch.cat([image for *_, image in batch])
            total, parts = score_batches(reward, pixels, [prompt for _, prompt, _ in batch], device)
            for i, (path, *_) in enumerate(batch):
                row = {label: float(values[i]) for label, values in parts.items()}
                scores.rows[path] = {**row, "total": float(total[i])}
            progress.n = len(scores.rows) + len(scores.broken)
            progress.refresh()
    if all(len(row) == 2 and len(set(row.values())) == 1 for row in scores.rows.values()):
        # With a single term, the total repeats it.
        for row in scores.rows.values():
            del row["total"]
    return scores


def batches(
    pairs: Iterator[tuple[Path, str]], broken: dict[Path, str], size: int
) -> Iterator[list[tuple[Path, str, Tensor]]]:
    """Read images lazily and yield batches of consecutive (path, prompt, image) of one size.

    Errors of images that cannot be read are added to `broken`.
    """

    def read() -> Iterator[tuple[Path, str, Tensor]]:
        for path, prompt in pairs:
            try:
                yield path, prompt, open_image(path)
            except DraftuneError as error:
                broken[path] = str(error)

    for _, group in itertools.groupby(read(), key=lambda item: item[2].shape):
        while batch := list(itertools.islice(group, size)):
            yield batch
