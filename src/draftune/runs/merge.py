"""Several LoRAs of one base model added to one LoRA, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from draftune.errors import DraftuneError
from draftune.lora import FILE_NAME, LoRADeltas, base_model, opened
from draftune.runs.load import read_deltas
from draftune.utils.paths import check_writable, user_path


def mix_loras(
    sources: Sequence[tuple[Path | str, float]],
    output: Path | str,
    model: str | None = None,
    skip_text_encoder: bool = False,
) -> Path:
    """Add LoRAs, each at its weight, and write their sum as one LoRA in a folder.

    W_0 + sum_i weight_i dW_i: the images are those of all the LoRAs active at these weights.

    Args:
        sources: runs, LoRA files or their folders, and their weights.
        output: the folder; it may hold nothing but the same mix.
        model: the base model, where the LoRAs name it differently or not at all.
        skip_text_encoder: whether layers of text encoders are left out.

    Returns:
        The file's path.

    Raises:
        DraftuneError: the LoRAs can't be added, or `output` holds something else.
    """
    folder = user_path(output)
    mixed_from = " + ".join(f"{source}@{weight}" for source, weight in sources)
    mixed_from += " without text encoders" if skip_text_encoder else ""
    check_weights(sources)
    check_folder(folder, mixed_from=mixed_from)
    base = model or common_base([str(source) for source, _ in sources])
    first, *others = [read_deltas(source, base, skip_text_encoder).scaled(weight) for source, weight in sources]
    mixed: LoRADeltas = first
    for other in others:
        mixed = mixed.plus(other.layers)
        mixed.grid = mixed.grid if mixed.grid == other.grid else ""
    return mixed.write(folder, mixed_from=mixed_from)


def weighted(text: str) -> tuple[str, float]:
    """Split a source and its weight: "runs/a@0.7", or "runs/a" for 1. What follows the last @ is it if a number."""
    source, _, number = text.rpartition("@")
    try:
        return (source, float(number)) if source else (text, 1.0)
    except ValueError:
        return text, 1.0


def common_base(sources: Sequence[str]) -> str:
    """Return the base model that LoRAs name. Raises DraftuneError where they name several or none."""
    named = {source: base for source in sources if (base := base_model(source))}
    if not named:
        raise DraftuneError(f"the LoRA {sources[0]!r} does not say which model it belongs to: give --model")
    (first, base), *others = named.items()
    for source, other in others:
        if other != base:
            raise DraftuneError(
                f"{first!r} is a LoRA of {base!r} and {source!r} one of {other!r}; if these are one model, give its "
                "name (--model)"
            )
    return base


def check_weights(sources: Sequence[tuple[Path | str, float]]) -> None:
    if not sources:
        raise DraftuneError("a mix wants at least one LoRA")
    for source, weight in sources:
        if not math.isfinite(weight):
            raise DraftuneError(f"the weight of {str(source)!r} must be finite, not {weight}")


def check_folder(folder: Path, **metadata: str) -> None:
    """Raise DraftuneError where the folder holds anything but a LoRA with this metadata."""
    if folder.exists() and not folder.is_dir():
        raise DraftuneError(f"the output {str(folder)!r} is a file; give a folder")
    check_writable(folder)
    held = [path.name for path in folder.iterdir()] if folder.exists() else []
    if held == [FILE_NAME]:
        with opened(folder / FILE_NAME) as file:
            held = [] if metadata.items() <= (file.metadata() or {}).items() else held
    if held:
        raise DraftuneError(f"the output folder {str(folder)!r} holds other files; give another (--output)")
