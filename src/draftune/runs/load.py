"""Load models for sampling from a run, a LoRA file or a model's name, with the sampling settings of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError, gather
from draftune.lora import (
    ADAPTER,
    SAMPLER_METADATA,
    LoRADeltas,
    base_model,
    check_sampler,
    load_lora,
    lora_file,
    open_safetensors,
    read_file,
    saved_grid,
    saved_steps,
    set_lora_scale,
)
from draftune.lora.reader import fit
from draftune.models import DiffusionModel, load_model
from draftune.models.layout import load_layout
from draftune.published import MODELS
from draftune.runs.logs import METRICS
from draftune.runs.run_dir import run_settings
from draftune.sampling.schedule import SAMPLER_OPTIONS
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.utils.devices import default_device
from draftune.utils.hub import cached_folder, is_hub_id
from draftune.utils.logging import logger
from draftune.utils.model_options import NO_OPTIONS, ModelOptions, is_checkpoint
from draftune.utils.paths import user_path
from draftune.utils.single_file import single_file_error

if TYPE_CHECKING:
    import torch

DRAWING = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")
STORAGE = ("mixed_precision", "quantization")
"""Settings of how the base model's weights are stored."""


@dataclass(frozen=True)
class LoRASource:
    """A LoRA and how to sample with it.

    Attributes:
        source: What the user gave: a run's folder, a LoRA file or its folder.
        lora: The LoRA file.
        base: The base model.
        settings: The settings of its run; outside of a run the recommended settings of its model.
        in_run: Whether the LoRA belongs to a run.
        skip_text_encoder: Whether its layers of text encoders are ignored.
        options: Where the base model's files come from.
    """

    source: str
    lora: Path
    base: str
    settings: Settings
    in_run: bool
    skip_text_encoder: bool = False
    options: ModelOptions = NO_OPTIONS

    @property
    def grid(self) -> dict[str, Any]:
        """Return the sampler options (see `sampler_options`)."""
        return sampler_options(self.lora, self.settings if self.in_run else None)

    @property
    def lora_steps(self) -> StepRange:
        """Return the sampling steps on which the LoRA is active, from its file."""
        return saved_steps(self.lora)

    @property
    def drawing(self) -> dict[str, Any]:
        """Return everything that images of the base model depend on, besides prompts and seeds."""
        return {
            "model": self.base,
            **self.options._asdict(),
            **{name: getattr(self.settings, name) for name in (*DRAWING, *STORAGE)},
            **self.grid,
        }


def sampler_options(lora: Path, settings: Settings | None) -> dict[str, Any]:
    """Return the timestep spacing and the last step that a LoRA was trained with: keywords of `set_sampler_options`.

    Args:
        lora: The LoRA file.
        settings: The settings of its run. Outside of a run, the file's metadata are read.

    Returns:
        The options that are known; empty for flow models, which have none.
    """
    with open_safetensors(lora) as file:
        if (file.metadata() or {}).get(SAMPLER_METADATA) == "{}":
            return {}  # a flow model: the run's settings have no effect
    options = {name: getattr(settings, name) for name in SAMPLER_OPTIONS} if settings else saved_grid(lora)
    return {name: value for name, value in options.items() if value is not None}


def base_options(source: str) -> ModelOptions:
    """Return where the files of a LoRA's base model come from, by the file's metadata."""
    with open_safetensors(lora_file(source)) as file:
        return ModelOptions.from_metadata(file.metadata() or {})


def resolve_lora(
    source: str, base: str | None = None, skip_text_encoder: bool = False, options: ModelOptions = NO_OPTIONS
) -> LoRASource:
    """Find a LoRA and its base model. No weights are loaded.

    Args:
        source: A run's folder, a LoRA file or its folder.
        base: The base model; the one named in the LoRA's metadata or run by default.
        skip_text_encoder: Whether to ignore the LoRA's layers of text encoders.
        options: Where the base model's files come from. Without `base`, the LoRA's metadata have the default.

    Raises:
        DraftuneError: there is no LoRA, or its base model is unknown.
    """
    path = lora_file(source)
    if base is None:
        options = options.over(base_options(source))
    base = base or base_model(source)
    if base is None:
        raise DraftuneError(f"the LoRA {source!r} does not name its base model: give --model")
    options.check(base)
    run = run_settings(path)
    if run is None and (path.absolute().parent.parent / METRICS).is_file():
        logger.warning(f"the run of {str(path)!r} has lost its config.yaml: its sampling settings are not known")
    settings = run or Settings(model=base, **options._asdict())
    return LoRASource(source, path, base, settings, run is not None, skip_text_encoder, options)


def read_deltas(
    source: Path | str, base: str | None = None, skip_text_encoder: bool = False, options: ModelOptions = NO_OPTIONS
) -> LoRADeltas:
    """Read the weight differences of a LoRA, by layer of its base model.

    Of the base model only configs are read; its weights only for DoRA, which depends on them.

    Args:
        source: A run's folder, a LoRA file or its folder.
        base: The base model; the one named in the LoRA's metadata or run by default.
        skip_text_encoder: Whether to ignore the LoRA's layers of text encoders.
        options: Where the base model's files come from.

    Raises:
        DraftuneError: the file cannot be read or does not fit, or the base model cannot be loaded.
    """
    tuned = resolve_lora(str(source), base, options=options)
    file = read_file(tuned.lora)
    if file.is_dora:
        networks: Mapping[str, Any] = load_model(tuned.base, **tuned.options._asdict()).lora_networks
    else:
        networks = load_layout(tuned.base, tuned.options)
    return replace(fit(file, networks, tuned.base, skip_text_encoder), base_options=tuned.options)


def resolve_loras(
    sources: Sequence[str],
    base: str | None = None,
    skip_text_encoder: bool = False,
    options: ModelOptions = NO_OPTIONS,
) -> list[LoRASource]:
    """Find several LoRAs, each once. A LoRA outside of a run gets the settings of the first run of its model.

    Raises:
        DraftuneError: one error that lists everything that is wrong.
    """
    loras = gather(
        *(partial(resolve_lora, source, base, skip_text_encoder, options) for source in dict.fromkeys(sources))
    )
    runs = {tuned.base: tuned for tuned in reversed(loras) if tuned.in_run}
    return [
        replace(tuned, settings=runs[tuned.base].settings, in_run=True)
        if tuned.base in runs and not tuned.in_run
        else tuned
        for tuned in loras
    ]


def check_same_steps(sources: Sequence[Path | str]) -> None:
    """Raise DraftuneError if LoRAs that are to be active together have different ranges of steps (`lora_steps`)."""
    ranges = {str(source): saved_steps(source) for source in sources}
    for source, steps in ranges.items():
        if steps != ranges[str(sources[0])]:
            raise DraftuneError(
                f"{str(sources[0])!r} is active on the steps {ranges[str(sources[0])]} (lora_steps), but {source!r} on "
                f"{steps}: LoRAs of different ranges cannot be combined"
            )


def load_for_sampling(
    source: str,
    base: str | None = None,
    lora_scale: float = 1.0,
    device: str = "auto",
    precision: str | None = None,
    skip_text_encoder: bool = False,
    quantization: str | None = None,
    options: ModelOptions = NO_OPTIONS,
) -> tuple[DiffusionModel, Settings]:
    """Load a model for sampling.

    Args:
        source: A model's name, a pipeline's folder, a checkpoint file, a run's folder, a LoRA file or its folder.
        base: The base model of the LoRA; the one named in its metadata or run by default.
        lora_scale: Scale of the LoRA.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".
        precision: "no", "bf16" or "fp16". Default: that of the LoRA's run, else the one in which the model is trained.
        skip_text_encoder: Whether to ignore the LoRA's layers of text encoders.
        quantization: "none" or a quantization of the base model, see `draftune.models.load_model`. Default: that of
            the LoRA's run, else "none".
        options: Where the model's files come from.

    Returns:
        The model on its device, and the settings to sample with.

    Raises:
        DraftuneError: the model or the LoRA cannot be loaded.
    """
    storage = {"mixed_precision": precision, "quantization": quantization}
    if is_model(source, options) and not (base and is_checkpoint(source)):
        settings = override(Settings(model=source, **options._asdict()), **storage)
        model, place = load_base(settings, device)
        return model.to(place, settings.mixed_precision), replace(settings, model=model.name)
    if not user_path(source).exists() and not is_hub_id(source):
        near = get_close_matches(source, MODELS, 1)
        advice = "give a run's folder, a LoRA file, a model's folder or 'emoji'"
        if near:
            advice = f"did you mean {near[0]!r}?"
        raise DraftuneError(f"no model and no LoRA at {source!r}: {advice}")
    tuned = resolve_lora(source, base, skip_text_encoder, options)
    tuned = replace(tuned, settings=override(tuned.settings, **storage))
    model = load_base_with_loras({ADAPTER: tuned}, device)
    set_lora_scale(model, lora_scale)
    return model, tuned.settings


def override(settings: Settings, **values: Any) -> Settings:
    """Return the settings with those of the values that are not None."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def load_base(settings: Settings, device: str) -> tuple[DiffusionModel, torch.device]:
    """Load the model of settings, in their precision and quantization, without its text encoders, for a device."""
    place, options = default_device(device), ModelOptions.of(settings)._asdict()
    precision, quantization = settings.mixed_precision, settings.quantization
    return load_model(settings.model, precision, quantization, place, text_encoders=False, **options), place


def load_base_with_loras(loras: Mapping[str, LoRASource], device: str = "auto") -> DiffusionModel:
    """Load a base model with several LoRAs as adapters, which `lora.set_lora_scales` switches.

    Args:
        loras: LoRAs of one base model with the same sampling settings, by adapter name. The base model has the
            precision and the quantization of the first one's settings.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".

    Raises:
        DraftuneError: a LoRA does not fit.
    """
    first = next(iter(loras.values()))
    model, place = load_base(replace(first.settings, model=first.base, **first.options._asdict()), device)
    for name, tuned in loras.items():
        load_lora(model, tuned.lora, name, tuned.skip_text_encoder)
        check_sampler(model, tuned.lora)
    # After loading the LoRAs, which are converted too.
    model.to(place, first.settings.mixed_precision)
    model.set_sampler_options(**first.grid)
    model.lora_steps = first.lora_steps
    model.set_size(first.settings.height, first.settings.width)
    return model


def is_model(source: str, options: ModelOptions) -> bool:
    """Return whether a text names a model, not a LoRA: a pipeline's folder, a checkpoint file or a hub id."""
    path = user_path(source)
    if is_checkpoint(source):
        return single_file_error(path, unknown=options.base_pipeline is not None) is not None
    known = source in MODELS or (path / "model_index.json").exists()
    # A text of this form that is neither on this machine nor in the cache is more likely a mistyped folder.
    on_hub = is_hub_id(source) and not path.exists()
    return known or (on_hub and (any(options) or cached_folder(source, "model_index.json") is not None))
