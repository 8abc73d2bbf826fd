"""How each family of models is drawn as it was published: sampling steps and guidance. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from draftune.errors import DraftuneError
from draftune.utils.hub import cached_folder
from draftune.utils.paths import user_path


class Sampling(NamedTuple):
    """Sampling steps and guidance scale; a scale of at most 1 means no guidance."""

    num_inference_steps: int
    guidance_scale: float


PUBLISHED: dict[str, Sampling] = {
    # The defaults of diffusers' StableDiffusionPipeline, and those of Clark et al., arXiv 2309.17400.
    "stable-diffusion": Sampling(50, 7.5),
    # The defaults of diffusers' StableDiffusionXLPipeline.
    "stable-diffusion-xl": Sampling(50, 5.0),
    # SD-Turbo and SDXL-Turbo: one to four steps without guidance (diffusers' page on SDXL Turbo; Sauer et al., arXiv
    # 2311.17042, at four). Latent consistency models: two to four (Luo et al., arXiv 2310.04378).
    "few-step": Sampling(4, 0.0),
    # The defaults of diffusers' StableDiffusion3Pipeline, and the model card of stable-diffusion-3-medium.
    "stable-diffusion-3": Sampling(28, 7.0),
    # The model card of stabilityai/stable-diffusion-3.5-medium.
    "stable-diffusion-3.5-medium": Sampling(40, 4.5),
    # The model card of stabilityai/stable-diffusion-3.5-large.
    "stable-diffusion-3.5-large": Sampling(28, 3.5),
    # The model card of stabilityai/stable-diffusion-3.5-large-turbo.
    "stable-diffusion-3.5-turbo": Sampling(4, 0.0),
    # The defaults of diffusers' FluxPipeline; the model card draws with the same guidance in 50 steps.
    "flux-dev": Sampling(28, 3.5),
    # The model card of black-forest-labs/FLUX.1-schnell.
    "flux-schnell": Sampling(4, 0.0),
    # The defaults of diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline.
    "pixart": Sampling(20, 4.5),
    # The defaults of diffusers' DiTPipeline; Peebles and Xie, arXiv 2212.09748, draw by 250 steps of DDPM.
    "dit": Sampling(50, 4.0),
    # The steps of diffusers' DDIMPipeline, which draws by the same sampler; nothing to guide by.
    "unconditional": Sampling(50, 1.0),
}

WELL_KNOWN: tuple[tuple[str, str], ...] = (
    (r"black-forest-labs/flux\.1-dev", "flux-dev"),
    (r"black-forest-labs/flux\.1-schnell", "flux-schnell"),
    (r"stabilityai/stable-diffusion-3\.5-large-turbo", "stable-diffusion-3.5-turbo"),
    (r"stabilityai/stable-diffusion-3\.5-large", "stable-diffusion-3.5-large"),
    (r"stabilityai/stable-diffusion-3\.5-medium", "stable-diffusion-3.5-medium"),
    (r"stabilityai/stable-diffusion-3-medium-diffusers", "stable-diffusion-3"),
    (r"stabilityai/sdx?l?-turbo", "few-step"),
    (r"stabilityai/stable-diffusion-xl-base-(0\.9|1\.0)", "stable-diffusion-xl"),
    (r"(compvis|runwayml|stable-diffusion-v1-5)/stable-diffusion-v1-[1-5]", "stable-diffusion"),
    (r"(stabilityai|sd2-community)/stable-diffusion-2(-1)?(-base)?", "stable-diffusion"),
    (r"pixart-alpha/pixart-(xl|sigma).*", "pixart"),
    (r"facebook/dit-xl-2-(256|512)", "dit"),
    (r"google/ddpm-.*", "unconditional"),
)
"""Ids on the hub, in lower case, whose family is known before anything is downloaded."""

CONSISTENCY = ("LCMScheduler", "TCDScheduler")
ConfigOf = Callable[[str], Mapping[str, Any]]
"""The config of a part of a pipeline by its name, with its `_class_name`; empty where it can't be read."""


def few_steps(scheduler: Mapping[str, Any]) -> bool:
    """Return whether a pipeline was distilled to draw in a few steps, by its scheduler's config.

    SD-Turbo and SDXL-Turbo have the networks of the models they were made of. They are published with an Euler
    scheduler on trailing steps that predicts the noise; models trained down to zero SNR, which have trailing steps
    too, predict v.
    """
    kind = scheduler.get("_class_name")
    euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    trailing = scheduler.get("timestep_spacing") == "trailing"
    noise = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    return kind in CONSISTENCY or (euler and trailing and noise)


def is_turbo(name: str) -> bool:
    """Return whether a path or a hub id is that of Stable Diffusion 3.5's turbo.

    The last part of its name says so, or a part that names the model too, as in the hub's cache.
    """
    path = Path(name).expanduser()
    parts = (path.resolve() if path.exists() else path).parts
    lower = [part.lower() for part in parts]
    return any("turbo" in part and (part == lower[-1] or "3.5" in part or "sd3" in part) for part in lower)


def variant_of(pipeline_class: object, config_of: ConfigOf, name: str = "") -> str | None:
    """Return the key in PUBLISHED of a pipeline, by its class and what tells its variants apart; None for no known one.

    The name, a path or a hub id, is asked about what no config says: whether a Stable Diffusion 3.5 is its turbo.
    """
    if pipeline_class in ("DDPMPipeline", "DDIMPipeline"):
        return "unconditional"
    if pipeline_class == "DiTPipeline":
        return "dit"
    if pipeline_class == "FluxPipeline":
        return "flux-dev" if config_of("transformer").get("guidance_embeds") else "flux-schnell"
    if pipeline_class == "StableDiffusion3Pipeline":
        config = config_of("transformer")
        if is_turbo(name):
            return "stable-diffusion-3.5-turbo"
        if not config.get("qk_norm"):
            return "stable-diffusion-3"
        return "stable-diffusion-3.5-medium" if config.get("dual_attention_layers") else "stable-diffusion-3.5-large"
    plain = {
        "StableDiffusionPipeline": "stable-diffusion",
        "StableDiffusionXLPipeline": "stable-diffusion-xl",
        "PixArtAlphaPipeline": "pixart",
        "PixArtSigmaPipeline": "pixart",
    }.get(str(pipeline_class))
    return "few-step" if plain and few_steps(config_of("scheduler")) else plain


def variant(model: str) -> str | None:
    """Return the key in PUBLISHED of a model by its name, a folder or a hub id; None where that is not known yet.

    Of a model on the hub that is not on this machine, the id alone is known.
    """
    folder = model_folder(model)
    if folder is None:
        return well_known(model)
    return variant_of(read_config(folder / "model_index.json").get("_class_name"), config_reader(folder), model)


def well_known(model: str) -> str | None:
    """Return the key in PUBLISHED of a well-known id on the hub."""
    return next((key for pattern, key in WELL_KNOWN if re.fullmatch(pattern, model.lower())), None)


def variant_of_pipeline(pipeline: Any, name: str = "") -> str | None:
    """Return the key in PUBLISHED of a loaded pipeline."""

    def config_of(part: str) -> Mapping[str, Any]:
        found = getattr(pipeline, part, None)
        return {**getattr(found, "config", {}), "_class_name": type(found).__name__}

    return variant_of(type(pipeline).__name__, config_of, name)


def model_folder(model: str) -> Path | None:
    """Return the folder of a saved pipeline by its path or its hub id; None where it is not on this machine."""
    try:
        folder = user_path(model)
        if (folder / "model_index.json").is_file():
            return folder
    except (DraftuneError, OSError, ValueError):
        return None
    return cached_folder(model, "model_index.json")


def config_reader(folder: Path) -> ConfigOf:
    """Return what reads the config of a part in a saved pipeline's folder."""

    def config_of(part: str) -> Mapping[str, Any]:
        return read_config(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))

    return config_of


def read_config(path: Path) -> Mapping[str, Any]:
    """Return a JSON object; an empty one where there is none. What is wrong is said when the model is loaded."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
