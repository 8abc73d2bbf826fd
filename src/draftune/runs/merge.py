"""Merge LoRAs of one base model into one LoRA, exactly: the ranks add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME, LoRADeltas, base_model, open_safetensors
from draftune.runs.load import base_options, check_same_steps, read_deltas
from draftune.utils.model_options import NO_OPTIONS, ModelOptions
from draftune.utils.paths import check_writable, user_path


def merge_loras(
    sources: Sequence[tuple[Path | str, float]],
    output: Path | str,
    model: str | None = None,
    skip_text_encoder: bool = False,
    options: ModelOptions = NO_OPTIONS,
) -> Path:
    """Write the weighted sum of LoRAs as one LoRA.

    dW = sum_i weight_i dW_i

    Args:
        sources: Runs, LoRA files or their folders, and their weights.
        output: The folder to write. It must be empty, or hold the result of the same merge.
        model: The base model; by default the one that all LoRAs name.
        skip_text_encoder: Whether to ignore the LoRAs' layers of text encoders.
        options: Where the base model's files come from, besides its name.

    Returns:
        The path of the LoRA file.

    Raises:
        DraftuneError: the LoRAs do not fit together, their `lora_steps` differ, or `output` holds other files.
    """
    folder = user_path(output)
    merged_from = " + ".join(f"{source}@{weight}" for source, weight in sources)
    merged_from += " without text encoders" if skip_text_encoder else ""
    check_weights(sources)
    check_folder(folder, merged_from=merged_from)
    if model is None:
        options = options.over(base_options(str(sources[0][0])))
    base = model or common_base([str(source) for source, _ in sources])
    check_same_steps([source for source, _ in sources])
    loras = [read_deltas(source, base, skip_text_encoder, options).scaled(weight) for source, weight in sources]
    merged: LoRADeltas = loras[0]
    others = loras[1:]
    for other in others:
        merged = merged.add(other.layers)
        merged.grid = merged.grid if merged.grid == other.grid else ""
    return merged.write(folder, merged_from=merged_from)


def weighted(text: str) -> tuple[str, float]:
    """Split "runs/a@0.7" at the last @ into source and weight; the weight is 1 if no number follows.

    Raises:
        DraftuneError: a LoRA's path is followed by @ and something that is no number.
    """
    source, _, number = text.rpartition("@")
    try:
        return (source, float(number)) if source else (text, 1.0)
    except ValueError:
        if user_path(source).exists() and not user_path(text).exists():
            raise DraftuneError(f"the weight of {source!r} must be a number, not {number!r}") from None
        return text, 1.0


def common_base(sources: Sequence[str]) -> str:
    """Return the base model that LoRAs name. Raises DraftuneError if they name several or none."""
    named = {source: base for source in sources if (base := base_model(source))}
    if not named:
        raise DraftuneError(f"the LoRA {sources[0]!r} does not name its base model: give --model")
    (first, base), *others = named.items()
    for source, other in others:
        if other != base:
            raise DraftuneError(
                f"{first!r} is a LoRA of {base!r}, but {source!r} is a LoRA of {other!r}; if these are the same model, "
                "give its name (--model)"
            )
    return base


def check_weights(sources: Sequence[tuple[Path | str, float]]) -> None:
    """Raise DraftuneError if there are no LoRAs, or a weight is not finite."""
    if not sources:
        raise DraftuneError("give at least one LoRA to merge")
    for source, weight in sources:
        if not math.isfinite(weight):
            raise DraftuneError(f"the weight of {str(source)!r} must be finite, not {weight}")


def check_folder(folder: Path, **metadata: str) -> None:
    """Raise DraftuneError if the folder holds anything but a LoRA with this metadata."""
    if folder.exists() and not folder.is_dir():
        raise DraftuneError(f"the output {str(folder)!r} is a file; give a folder")
    check_writable(folder)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if names == [FILE_NAME]:
        with open_safetensors(folder / FILE_NAME) as file:
            names = [] if metadata.items() <= (file.metadata() or {}).items() else names
    if names:
        raise DraftuneError(f"the output folder {str(folder)!r} contains other files; give another (--output)")
