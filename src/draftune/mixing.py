"""LoRAs of one base model added to one LoRA, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from draftune.errors import DraftuneError
from draftune.layers import Layers, read_layers
from draftune.lora import FILE_NAME, opened
from draftune.paths import check_writable, user_path


def mix_loras(sources: Sequence[tuple[Path | str, float]], output: Path | str, model: str | None = None) -> Path:
    """Adds LoRAs, each at its weight, and writes their sum as one LoRA in a folder; returns the file's path.

    W_0 + sum_i weight_i dW_i: the pictures are those of all the LoRAs active at these weights. `sources` are runs,
    LoRA files or their folders; `model` names the base where the files give it several names, or none. Raises
    DraftuneError where they can't be added, or the folder holds anything but the same mix.
    """
    folder = user_path(output)
    mixed_from = " + ".join(f"{source}@{weight}" for source, weight in sources)
    check_weights(sources)
    check_folder(folder, mixed_from=mixed_from)
    mixed = add([(str(source), read_layers(source, model), weight) for source, weight in sources])
    return mixed.write(folder, mixed_from=mixed_from)


def weighted(text: str) -> tuple[str, float]:
    """A source and its weight: "runs/a@0.7", or "runs/a" for 1. What follows the last @ is the weight if a number."""
    source, _, number = text.rpartition("@")
    try:
        return (source, float(number)) if source else (text, 1.0)
    except ValueError:
        return text, 1.0


def add(terms: Sequence[tuple[str, Layers, float]]) -> Layers:
    """The sum of named LoRAs at their weights; its rank is the sum of theirs, for up · down concatenates.

    Raises DraftuneError for LoRAs of different models.
    """
    (first, mixed, weight), *others = terms
    mixed = mixed.scaled(weight)
    for name, lora, weight in others:
        if mixed.base_model and lora.base_model not in (None, mixed.base_model):
            raise DraftuneError(
                f"{first!r} is a LoRA of {mixed.base_model!r} and {name!r} one of {lora.base_model!r}; "
                "if these are one model, give its name (--model)"
            )
        if lora.prefix != mixed.prefix:
            raise DraftuneError(f"{first!r} changes a {mixed.prefix} and {name!r} a {lora.prefix}")
        layers = dict(mixed.layers)
        for at, layer in lora.scaled(weight).layers.items():
            if at in layers and layers[at].shape != layer.shape:
                raise DraftuneError(
                    f"{name!r} is of another model than {first!r}: {at} has the shape {list(layer.shape)}, "
                    f"not {list(layers[at].shape)}"
                )
            layers[at] = layers[at].joined(layer) if at in layers else layer
        if mixed.base_model is None:
            first = name
        grid = mixed.grid if mixed.grid == lora.grid else ""
        mixed = Layers(layers, mixed.prefix, mixed.base_model or lora.base_model, grid)
    return mixed


def check_weights(sources: Sequence[tuple[Path | str, float]]) -> None:
    if not sources:
        raise DraftuneError("a mix wants at least one LoRA")
    for source, weight in sources:
        if not math.isfinite(weight):
            raise DraftuneError(f"the weight of {str(source)!r} must be finite, not {weight}")


def check_folder(folder: Path, **said: str) -> None:
    """Raises DraftuneError where the folder holds anything but a LoRA whose metadata says this."""
    if folder.exists() and not folder.is_dir():
        raise DraftuneError(f"the output {str(folder)!r} is a file; give a folder")
    check_writable(folder)
    held = [path.name for path in folder.iterdir()] if folder.exists() else []
    if held == [FILE_NAME]:
        with opened(folder / FILE_NAME) as file:
            held = [] if said.items() <= (file.metadata() or {}).items() else held
    if held:
        raise DraftuneError(f"the output folder {str(folder)!r} holds other files; give another (--output)")
