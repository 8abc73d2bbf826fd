"""Real pictures for experiments: a user's folder of files NAME.png, which the package does not have."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts
from draftune.utils.images import find_images, open_image
from draftune.utils.paths import written_whole

EXAMPLES = "EXAMPLES"
"""In a run's reward, the folder of real pictures of the names that it is trained on."""


def real_files(folder: Path, names: Collection[str]) -> list[Path]:
    """The pictures in a folder that are called as these names are. Raises DraftuneError where there are too few."""
    files = [file for file in find_images([str(folder)]) if file.stem in names]
    if len(files) < 2:
        raise DraftuneError(f"{str(folder)!r} has too few pictures of these names: files such as 'cat face.png'")
    return files


def real_pictures(folder: Path, names: Collection[str]) -> Tensor:
    """[N, 3, H, W], of one size. Raises DraftuneError where there are too few, or they differ."""
    pictures = [open_image(file) for file in real_files(folder, names)]
    if len({picture.shape for picture in pictures}) > 1:
        raise DraftuneError(f"the pictures in {str(folder)!r} are to be of one size")
    return torch.cat(pictures)


def with_examples(reward: str, folder: Path | None, here: Path) -> str:
    """The reward with its examples: a copy, under `here`, of the real pictures of all names that are trained on."""
    if EXAMPLES not in reward:
        return reward
    assert folder is not None
    target = here / "examples"
    for file in real_files(folder, set(load_prompts("emoji"))):
        copied = target / file.relative_to(folder)
        # Another part of the same work may be reading it.
        if not copied.is_file() or copied.stat().st_size != file.stat().st_size:
            with written_whole(copied) as temporary:
                shutil.copyfile(file, temporary)
    return reward.replace(EXAMPLES, f"'{target}'")
