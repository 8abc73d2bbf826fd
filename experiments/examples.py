"""Real images for the experiments that compare with them: a user's folder of files `NAME.png`."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.utils.images import find_images, open_image
from draftune.utils.paths import atomic_write

EXAMPLES = "EXAMPLES"
"""Placeholder, in a run's reward, for the folder of real images of the training names."""


def example_files(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the image files whose names are in `names`. Raises DraftuneError for fewer than two."""
    files = [file for file in find_images([str(folder)]) if file.stem in set(names)]
    if len(files) < 2:
        raise DraftuneError(f"{str(folder)!r} has too few images: --examples needs files such as 'cat face.png'")
    return files


def example_images(folder: Path, names: Collection[str]) -> Tensor:
    """Return real images [N, 3, H, W]. Raises DraftuneError for fewer than two, or different sizes."""
    images = [open_image(file) for file in example_files(folder, names)]
    if len(sizes := {tuple(image.shape[2:]) for image in images}) > 1:
        raise DraftuneError(f"the images in {str(folder)!r} must have one size, got {sorted(sizes)}")
    return torch.cat(images)


def copy_examples(folder: Path, target: Path, names: Collection[str]) -> Path:
    """Copy the real images whose names are in `names` to `target` and return it."""
    for file in example_files(folder, names):
        copy = target / file.relative_to(folder)
        # Another shard may be reading the copy.
        if not copy.is_file() or copy.stat().st_size != file.stat().st_size:
            with atomic_write(copy) as temporary:
                shutil.copyfile(file, temporary)
    return target
