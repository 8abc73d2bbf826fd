"""From what a user points at, a run, a LoRA or a model, to a model that draws as it did there."""

from __future__ import annotations

from draftune.errors import DraftuneError
from draftune.lora import base_model, load_lora, lora_file, set_lora_scale
from draftune.models import MODELS, Model, load_model
from draftune.models.base import default_device
from draftune.paths import user_path
from draftune.settings import Settings
from draftune.training.run import run_settings


def open_source(
    source: str, base: str | None = None, lora_scale: float = 1.0, cpu: bool = False, precision: str = "no"
) -> tuple[Model, Settings]:
    """The model of a run's folder, a LoRA or a model's name, on its device, and the settings to draw with.

    `base` is the base model where the LoRA does not say it or it lies elsewhere; precision "no", "bf16" or "fp16".
    Raises DraftuneError.
    """
    settings = None
    if source in MODELS or (user_path(source) / "model_index.json").exists():
        model = load_model(source)
    else:
        base = base or base_model(source)
        if base is None:
            raise DraftuneError(f"the LoRA {source!r} does not say which model it belongs to: give --model")
        model = load_model(base)
        load_lora(model, source)
        set_lora_scale(model, lora_scale)
        settings = run_settings(lora_file(source))
    model.to(default_device(cpu), precision)
    if settings:
        model.set_grid(settings.timestep_spacing, settings.set_alpha_to_one)
    settings = settings or Settings(model=model.name)
    model.set_size(settings.height, settings.width)
    return model, settings
