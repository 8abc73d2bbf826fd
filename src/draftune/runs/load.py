"""From what a user points at, a run, a LoRA or a model, to a model that draws as it did there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, gather
from draftune.lora import (
    ADAPTER,
    LoRADeltas,
    base_model,
    load_lora,
    lora_file,
    read_file,
    saved_grid,
    set_lora_scale,
)
from draftune.lora.reader import fit
from draftune.models import MODELS, Model, load_model
from draftune.models.base import default_device
from draftune.models.layout import load_layout
from draftune.runs.run_dir import run_settings
from draftune.sampling.schedule import GRID
from draftune.settings import Settings
from draftune.utils.paths import user_path

DRAWING = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")


@dataclass(frozen=True)
class Tuned:
    """A LoRA: what was pointed at, its file, its base model, and how to draw with it.

    The settings are those of its run, or where it lies in none, `in_run` False, those that its model is recommended.
    """

    source: str
    lora: Path
    base: str
    settings: Settings
    in_run: bool
    skip_text_encoder: bool = False
    """Whether its layers of text encoders are left out."""

    @property
    def grid(self) -> dict[str, Any]:
        """The sampler's grid: the run's, outside of a run what the file says, else the model's own, which is empty."""
        return {name: getattr(self.settings, name) for name in GRID} if self.in_run else saved_grid(self.lora)

    @property
    def drawing(self) -> dict[str, Any]:
        """What its base model's pictures depend on."""
        return {"model": self.base, **{name: getattr(self.settings, name) for name in DRAWING}, **self.grid}


def find_tuned(source: str, base: str | None = None, skip_text_encoder: bool = False) -> Tuned:
    """The LoRA of a run's folder, a LoRA file or its folder; nothing is loaded yet.

    `base` is the base model where the LoRA does not say it or it lies elsewhere. Raises DraftuneError.
    """
    path = lora_file(source)
    base = base or base_model(source)
    if base is None:
        raise DraftuneError(f"the LoRA {source!r} does not say which model it belongs to: give --model")
    settings = run_settings(path)
    return Tuned(source, path, base, settings or Settings(model=base), settings is not None, skip_text_encoder)


def read_deltas(source: Path | str, base: str | None = None, skip_text_encoder: bool = False) -> LoRADeltas:
    """Read what a LoRA adds to each layer of its base model.

    Only the base's configs are read, but for DoRA, whose change of a weight depends on it.

    Args:
        source: a run's folder, a LoRA file or its folder.
        base: the base model, where the LoRA does not say it or it lies elsewhere.
        skip_text_encoder: whether layers of text encoders are left out.

    Raises:
        DraftuneError: the file can't be read or does not fit, or the base can't be had.
    """
    tuned = find_tuned(str(source), base)
    file = read_file(tuned.lora)
    networks = load_model(tuned.base).lora_networks if file.is_dora else load_layout(tuned.base)
    return fit(file, networks, tuned.base, skip_text_encoder)


def find_all(sources: Sequence[str], base: str | None = None, skip_text_encoder: bool = False) -> list[Tuned]:
    """Each of several LoRAs once; one that lies in no run draws as the first run of its model does.

    Raises one DraftuneError that says all that is wrong.
    """
    found = gather(*(partial(find_tuned, source, base, skip_text_encoder) for source in dict.fromkeys(sources)))
    runs = {tuned.base: tuned for tuned in reversed(found) if tuned.in_run}
    return [
        replace(tuned, settings=runs[tuned.base].settings, in_run=True)
        if tuned.base in runs and not tuned.in_run
        else tuned
        for tuned in found
    ]


def open_source(
    source: str,
    base: str | None = None,
    lora_scale: float = 1.0,
    device: str = "auto",
    precision: str = "no",
    skip_text_encoder: bool = False,
) -> tuple[Model, Settings]:
    """The model of a run's folder, a LoRA or a model's name, on its device, and the settings to draw with.

    `base` is the base model where the LoRA does not say it or it lies elsewhere; precision "no", "bf16" or "fp16".
    Raises DraftuneError.
    """
    if source in MODELS or (user_path(source) / "model_index.json").exists():
        model = load_model(source, precision).to(default_device(device), precision)
        return model, Settings(model=model.name)
    tuned = find_tuned(source, base, skip_text_encoder)
    model = open_loras({ADAPTER: tuned}, device, precision)
    set_lora_scale(model, lora_scale)
    return model, tuned.settings


def open_loras(loras: Mapping[str, Tuned], device: str = "auto", precision: str = "no") -> Model:
    """The base model that LoRAs share, set to draw as they do, with each of them loaded under its name.

    `lora.set_lora_scales` chooses among them. Raises DraftuneError if one does not fit.
    """
    first = next(iter(loras.values()))
    model = load_model(first.base, precision)
    for name, tuned in loras.items():
        load_lora(model, tuned.lora, name, tuned.skip_text_encoder)
    # After the LoRAs, which take the same precision.
    model.to(default_device(device), precision)
    model.set_grid(**first.grid)
    model.set_size(first.settings.height, first.settings.width)
    return model
