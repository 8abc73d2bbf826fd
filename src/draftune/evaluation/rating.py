"""Pairs of images for a person to compare: which ones, how they are sampled, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL.Image import Image
from torch import Tensor

from draftune.errors import DraftuneError
from draftune.models import DiffusionModel
from draftune.rewards.comparisons import SKIP, Comparison, image_path, missing_images, read_comparisons, reduced
from draftune.runs.load import DRAWING, load_for_sampling
from draftune.settings import Settings
from draftune.utils.images import save_image, to_pil
from draftune.utils.model_options import ModelOptions

LOADING: dict[str, Any] = {
    "base": None,
    "lora_scale": 1.0,
    "precision": None,
    "skip_text_encoder": False,
    "quantization": None,
}
"""Arguments of `load_for_sampling` that images depend on, and their defaults."""


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, by their seeds."""

    prompt: str
    seeds: tuple[int, int]


def pairs(prompts: Sequence[str], count: int, seed: int = 0) -> list[Pair]:
    """Return `count` pairs, one of each prompt before the second of any. No image is in two pairs.

    A larger `count` adds pairs at the end.
    """
    texts = shuffled(prompts, seed)
    rounds = [(texts[i % len(texts)], seed + 2 * (i // len(texts))) for i in range(count)]
    return [Pair(prompt, (first, first + 1)) for prompt, first in rounds]


def shuffled(prompts: Sequence[str], seed: int) -> list[str]:
    """Return each prompt once, in a random order: files are often sorted, and a person may rate only some of them."""
    texts = list(dict.fromkeys(prompts))
    Random(seed).shuffle(texts)
    return texts


def pair_settings(settings: Settings, options: ModelOptions | None = None, **loading: Any) -> dict[str, Any]:
    """Return the settings that images depend on, for a row of comparisons: those of `DRAWING`, and what is not default.

    Args:
        settings: The sampling settings.
        options: Where the model's files come from.
        loading: Arguments of `load_for_sampling`, of those in LOADING.
    """
    known = {name: getattr(settings, name) for name in DRAWING if getattr(settings, name) not in (None, "")}
    known |= {name: value for name, value in loading.items() if value != LOADING[name]}
    return known | {name: value for name, value in (options._asdict() if options else {}).items() if value is not None}


Sampler = Callable[[str, Sequence[int]], Tensor]
"""Samples images [B, 3, H, W] of one prompt, one for each seed."""


def sampler(model: DiffusionModel, settings: Settings, prompts: Sequence[str]) -> Sampler:
    """Return the function that samples images of one of these prompts with the settings, one at a time.

    An image then has the same bits whatever other image it is compared with. All prompts are encoded at once, so that
    the text encoders are moved to the device and back only once.
    """
    schedule = model.schedule(settings.num_inference_steps)
    scale, negative = settings.guidance_scale, settings.negative_prompt
    model.cache_prompts(prompts, negative, scale)
    return lambda prompt, seeds: model.sample_tensors(
        [prompt] * len(seeds), seeds, schedule, scale, negative, batch_size=1
    )


def stored(image: Tensor | Image, path: Path) -> Path:
    """Write an image [3, H, W] in [0, 1], or a PIL image, reduced if it is large, unless it is there; return `path`."""
    if not path.is_file():
        save_image(reduced(to_pil(image[None])[0] if isinstance(image, Tensor) else image), path)
    return path


def restore_images(path: Path, device: str = "auto") -> str:
    """Sample the missing images of a file of comparisons again.

    Images that were sampled during training cannot be restored: the weights of that update are lost.

    Returns:
        One line for the user.

    Raises:
        DraftuneError: the file or a model cannot be read.
    """
    comparisons = [row for row in read_comparisons(path) if missing_images(path, [row]) and row.choice != SKIP]
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in comparisons:
        if row.model and row.settings and not row.update:
            groups.setdefault((row.model, row.settings), []).append(row)
    for (name, text), rows in groups.items():
        known = read_settings(path, text)
        loading = {key: known.pop(key) for key in LOADING if key in known}
        options = ModelOptions(**{key: known.pop(key) for key in ModelOptions._fields if key in known})
        model, settings = load_for_sampling(name, device=device, options=options, **loading)
        model.set_size(known.get("height"), known.get("width"))
        sample = sampler(model, Settings(**asdict(settings) | known), [row.prompt for row in rows])
        for row in rows:
            seeds = row.left_seed, row.right_seed
            if not all(seed.isdecimal() for seed in seeds):
                raise DraftuneError(f"{str(path)!r} has the seeds {seeds} of {row.left_image!r}: both must be numbers")
            images = sample(row.prompt, (int(row.left_seed), int(row.right_seed)))
            for file, image in zip((row.left_image, row.right_image), images, strict=True):
                stored(image, image_path(path, file))
        del model, sample  # before the next one is loaded
    missing = missing_images(path, comparisons)
    advice = f"; {len(missing)} cannot be sampled again, such as {missing[0]!r}" if missing else ""
    return f"{path}  {sum(map(len, groups.values()))} pairs sampled again{advice}"


def read_settings(path: Path, text: str) -> dict[str, Any]:
    """Return the settings of a row. Raises DraftuneError for anything but a JSON object of known ones."""
    try:
        known = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DraftuneError(f"{str(path)!r}: settings must be a JSON object, not {text!r}") from error
    names = {*DRAWING, *LOADING, *ModelOptions._fields}
    if unknown_names := known.keys() - names:
        raise DraftuneError(f"{str(path)!r}: unknown settings {sorted(unknown_names)}; known are {sorted(names)}")
    return known
