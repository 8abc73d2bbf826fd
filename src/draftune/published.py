"""The default settings of each model family: those it was published with. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from draftune.errors import DraftuneError
from draftune.utils.model_configs import PIPELINE, ConfigOf, config_reader, model_folder, read_config
from draftune.utils.model_options import NO_OPTIONS, ModelOptions, is_checkpoint
from draftune.utils.paths import user_path
from draftune.utils.single_file import infer_pipeline, read_header

MODELS = {
    "emoji": "emoji at 128x128 from their names, shipped with this package",
    "CompVis/stable-diffusion-v1-4": "Stable Diffusion 1.4, the paper's model (from the hub)",
}
"""Models that `draftune list` names, each with a description."""
ATTENTION = "to_q,to_k,to_v,to_out.0"
"""The attention layers of every family; with TEXT_ATTENTION those of the text stream in joint attention."""
TEXT_ATTENTION = "add_q_proj,add_k_proj,add_v_proj,to_add_out"


class Defaults(NamedTuple):
    """The default settings of a model family.

    Those without a source in PUBLISHED are those of the paper's runs on Stable Diffusion 1.4 (`recommended.PAPER`).

    Attributes:
        num_inference_steps: Sampling steps.
        guidance_scale: A scale of at most 1 turns guidance off.
        method: The training method.
        learning_rate: The peak learning rate.
        lora_target_modules: The layers that get a LoRA.
        mixed_precision: The precision in which the weights were published, if one GPU can't train them in float32.
    """

    num_inference_steps: int
    guidance_scale: float
    method: str = "draft_lv"
    learning_rate: float = 4e-4
    lora_target_modules: str = ATTENTION
    mixed_precision: str = "no"


LARGE: dict[str, Any] = {"learning_rate": 1e-4, "mixed_precision": "bf16"}
"""Large models: the learning rate of the LoRA scripts in diffusers' examples/dreambooth, in bf16."""
# The last denoiser call of a shifted flow schedule hardly changes the image, and DRaFT-LV trains only that call. Of the
# methods older than FlowBP, its authors measured the highest HPSv2.1 with ReFL (arXiv:2606.11075, FLUX.2-klein-base).
FLOW = LARGE | {"method": "refl(m=10)"}
# The gradient through 8 or fewer calls is cheap, and it reaches the layout.
FEW_STEPS = LARGE | {"method": "draft"}
# The layers of diffusers' train_dreambooth_lora_sd3.py and train_dreambooth_lora_flux.py.
SD3 = FLOW | {"lora_target_modules": f"{ATTENTION},{TEXT_ATTENTION}"}
FEED_FORWARD = "ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2"
FLUX = FLOW | {"lora_target_modules": f"{ATTENTION},{TEXT_ATTENTION},{FEED_FORWARD}"}
# The layers of train_dreambooth_lora_flux2.py and train_dreambooth_lora_flux2_klein.py. The last two are those of the
# single blocks, which fuse attention and feed-forward layers.
FLUX2 = FLOW | {"lora_target_modules": f"{ATTENTION},to_qkv_mlp_proj,attn.to_out"}
# The layers and the learning rate of train_dreambooth_lora_krea2.py, which the authors of Krea 2 recommend.
KREA2_LAYERS = (
    "img_in,final_layer.linear,to_q,to_k,to_v,to_out.0,to_gate,ff.up,ff.down,text_fusion.projector,txt_in.linear_1,"
    "txt_in.linear_2,time_embed.linear_1,time_embed.linear_2,time_mod_proj"
)
KREA2 = FLOW | {"learning_rate": 3e-4, "lora_target_modules": KREA2_LAYERS}

PUBLISHED: dict[str, Defaults] = {
    # The defaults of diffusers' StableDiffusionPipeline, and those of Clark et al., 2023, arXiv:2309.17400.
    "stable-diffusion": Defaults(50, 7.5),
    # The guidance of diffusers' StableDiffusionXLPipeline, and the steps of diffusers' page on accelerated inference.
    "stable-diffusion-xl": Defaults(30, 5.0, **LARGE),
    # SD-Turbo and SDXL-Turbo: one to four steps without guidance (diffusers' page on SDXL Turbo; Sauer et al., arXiv
    # 2311.17042, at four). LoRAs of TCD: four (their model cards).
    "few-step": Defaults(4, 0.0, method="draft", learning_rate=1e-4),
    "few-step-xl": Defaults(4, 0.0, **FEW_STEPS),
    # The defaults of diffusers' LatentConsistencyModelPipeline; two to four steps in Luo et al., arXiv 2310.04378.
    "latent-consistency": Defaults(4, 8.5, method="draft", learning_rate=1e-4),
    "latent-consistency-xl": Defaults(4, 8.5, **FEW_STEPS),
    # The defaults of diffusers' StableDiffusion3Pipeline, and the model card of stable-diffusion-3-medium.
    "stable-diffusion-3": Defaults(28, 7.0, **SD3),
    # The model card of stabilityai/stable-diffusion-3.5-medium.
    "stable-diffusion-3.5-medium": Defaults(40, 4.5, **SD3),
    # The model card of stabilityai/stable-diffusion-3.5-large.
    "stable-diffusion-3.5-large": Defaults(28, 3.5, **SD3),
    # The model card of stabilityai/stable-diffusion-3.5-large-turbo.
    "stable-diffusion-3.5-turbo": Defaults(4, 0.0, **SD3 | FEW_STEPS),
    # The defaults of diffusers' FluxPipeline; the model card uses the same guidance and 50 steps.
    "flux-dev": Defaults(28, 3.5, **FLUX),
    # The model card of black-forest-labs/FLUX.1-schnell.
    "flux-schnell": Defaults(4, 0.0, **FLUX | FEW_STEPS),
    # The defaults of diffusers' Flux2Pipeline, and the model card of black-forest-labs/FLUX.2-dev.
    "flux2-dev": Defaults(50, 4.0, **FLUX2),
    # The defaults of diffusers' Flux2KleinPipeline, and the model cards of black-forest-labs/FLUX.2-klein-base-4B and
    # FLUX.2-klein-base-9B.
    "flux2-klein-base": Defaults(50, 4.0, **FLUX2),
    # The model cards of black-forest-labs/FLUX.2-klein-4B and FLUX.2-klein-9B.
    "flux2-klein": Defaults(4, 1.0, **FLUX2 | FEW_STEPS),
    # The defaults of diffusers' ChromaPipeline; its page samples Chroma1-HD with 40 steps, a scale of 3 and a negative
    # prompt. Learning rate and layers are those of FLUX.1: diffusers has no LoRA script for Chroma.
    "chroma": Defaults(35, 5.0, **FLUX),
    # diffusers' page on Krea2Pipeline: 28 steps and a scale of 4.5 there, which is 5.5 here (Krea2).
    "krea-2-raw": Defaults(28, 5.5, **KREA2),
    # The same page: eight steps without guidance.
    "krea-2-turbo": Defaults(8, 0.0, **KREA2 | {"method": "draft"}),
    # The model card of Alpha-VLLM/Lumina-Image-2.0, with guidance in the first quarter of the steps (Lumina2). Learning
    # rate and layers: diffusers' train_dreambooth_lora_lumina2.py.
    "lumina-2": Defaults(50, 4.0, **FLOW),
    # The defaults of diffusers' QwenImagePipeline, and the model cards of Qwen/Qwen-Image and Qwen-Image-2512.
    "qwen-image": Defaults(50, 4.0, **FLOW),
    # The model card of Tongyi-MAI/Z-Image: 50 steps and a scale of 4 in diffusers' pipeline, which is 5 here (ZImage).
    "z-image": Defaults(50, 5.0, **FLOW),
    # The model card of Tongyi-MAI/Z-Image-Turbo: eight denoiser calls without guidance.
    "z-image-turbo": Defaults(8, 0.0, **FEW_STEPS),
    # The defaults of diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline.
    "pixart": Defaults(20, 4.5),
    # The defaults of diffusers' SanaPipeline, and the model cards of SANA and SANA 1.5.
    "sana": Defaults(20, 4.5, **FLOW),
    # The defaults of diffusers' SanaSprintPipeline, and the model cards of SANA-Sprint.
    "sana-sprint": Defaults(2, 4.5, **FEW_STEPS),
    # The defaults of diffusers' DiTPipeline; Peebles and Xie, 2022, arXiv:2212.09748, sample by 250 DDPM steps.
    "dit": Defaults(50, 4.0),
    # The steps of diffusers' DDIMPipeline, which uses the same sampler; there is no condition to guide by.
    "unconditional": Defaults(50, 1.0),
}

WELL_KNOWN: tuple[tuple[str, str], ...] = (
    (r"black-forest-labs/flux\.1-dev", "flux-dev"),
    (r"black-forest-labs/flux\.1-schnell", "flux-schnell"),
    (r"black-forest-labs/flux\.2-dev", "flux2-dev"),
    (r"black-forest-labs/flux\.2-klein-base-[49]b", "flux2-klein-base"),
    (r"black-forest-labs/flux\.2-klein-[49]b", "flux2-klein"),
    (r"stabilityai/stable-diffusion-3\.5-large-turbo", "stable-diffusion-3.5-turbo"),
    (r"stabilityai/stable-diffusion-3\.5-large", "stable-diffusion-3.5-large"),
    (r"stabilityai/stable-diffusion-3\.5-medium", "stable-diffusion-3.5-medium"),
    (r"stabilityai/stable-diffusion-3-medium-diffusers", "stable-diffusion-3"),
    (r"stabilityai/sd-turbo", "few-step"),
    (r"stabilityai/sdxl-turbo", "few-step-xl"),
    (r"simianluo/lcm_dreamshaper_v7", "latent-consistency"),
    (r"stabilityai/stable-diffusion-xl-base-(0\.9|1\.0)", "stable-diffusion-xl"),
    (r"(compvis|runwayml|stable-diffusion-v1-5)/stable-diffusion-v1-[1-5]", "stable-diffusion"),
    (r"(stabilityai|sd2-community)/stable-diffusion-2(-1)?(-base)?", "stable-diffusion"),
    (r"lodestones/chroma(1-(hd|base))?", "chroma"),
    (r"krea/krea-2-raw", "krea-2-raw"),
    (r"krea/krea-2-turbo", "krea-2-turbo"),
    (r"alpha-vllm/lumina-image-2\.0", "lumina-2"),
    (r"qwen/qwen-image(-2512)?", "qwen-image"),
    (r"tongyi-mai/z-image", "z-image"),
    (r"tongyi-mai/z-image-turbo", "z-image-turbo"),
    (r"pixart-alpha/pixart-(xl|sigma).*", "pixart"),
    (r"pixart-alpha/pixart-lcm-xl-2-1024-ms", "few-step"),
    (r"efficient-large-model/sana(1\.5)?_[0-9.]+[mb]_[0-9]+k?px(_[a-z0-9]+)?_diffusers", "sana"),
    (r"efficient-large-model/sana_sprint_[0-9.]+b_1024px_diffusers", "sana-sprint"),
    (r"facebook/dit-xl-2-(256|512)", "dit"),
    (r"google/ddpm-.*", "unconditional"),
)
"""Patterns of hub ids in lower case, and their families: these are known before a download."""

ONE_VARIANT: dict[str, str] = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "LatentConsistencyModelPipeline": "latent-consistency",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana-sprint",
    "Flux2Pipeline": "flux2-dev",
    "ChromaPipeline": "chroma",
    "Lumina2Pipeline": "lumina-2",
    "QwenImagePipeline": "qwen-image",
    "DiTPipeline": "dit",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
}
"""The keys in PUBLISHED of pipeline classes that imply the family's variant, all but its distilled models."""
FEW_STEP = {
    "stable-diffusion": "few-step",
    "stable-diffusion-xl": "few-step-xl",
    "latent-consistency": "few-step",
    "pixart": "few-step",
}
"""The keys in PUBLISHED of families' distilled models."""
CONSISTENCY = ("LCMScheduler", "TCDScheduler")


def few_steps(scheduler: Mapping[str, Any]) -> bool:
    """Return whether a pipeline was distilled to sample in a few steps, by its scheduler's config.

    SD-Turbo and SDXL-Turbo have the same networks as their teachers. They are published with an Euler scheduler with
    trailing timesteps and noise prediction. Zero-SNR models have trailing timesteps too, but predict v.
    """
    kind = scheduler.get("_class_name")
    euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    trailing = scheduler.get("timestep_spacing") == "trailing"
    noise = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    return kind in CONSISTENCY or (euler and trailing and noise)


def is_turbo(name: str) -> bool:
    """Return whether a path or hub id names Stable Diffusion 3.5 Large Turbo.

    "turbo" must be in the last part of the path, or in a part that names the model too, as in the hub's cache.
    """
    path = Path(name).expanduser()
    parts = (path.resolve() if path.exists() else path).parts
    lower = [part.lower() for part in parts]
    return any("turbo" in part and (part == lower[-1] or "3.5" in part or "sd3" in part) for part in lower)


def variant_of(pipeline_class: object, config_of: ConfigOf, name: str = "") -> str | None:
    """Return a pipeline's key in PUBLISHED; None if its family is unknown.

    Args:
        pipeline_class: Name of the pipeline's class.
        config_of: Reads the config of a component, which distinguishes variants of a family.
        name: Path or hub id. Only it distinguishes Stable Diffusion 3.5 Large from its turbo.
    """
    if pipeline_class == "FluxPipeline":
        return "flux-dev" if config_of("transformer").get("guidance_embeds") else "flux-schnell"
    if pipeline_class == "Flux2KleinPipeline":
        return "flux2-klein" if config_of(PIPELINE).get("is_distilled") else "flux2-klein-base"
    if pipeline_class == "Krea2Pipeline":
        return "krea-2-turbo" if config_of(PIPELINE).get("is_distilled") else "krea-2-raw"
    if pipeline_class == "ZImagePipeline":
        # The networks have equal configs; Turbo's noise levels are shifted by 3, the base model's by 6.
        return "z-image-turbo" if config_of("scheduler").get("shift") == 3 else "z-image"
    if pipeline_class == "StableDiffusion3Pipeline":
        config = config_of("transformer")
        if is_turbo(name):
            return "stable-diffusion-3.5-turbo"
        if not config.get("qk_norm"):
            return "stable-diffusion-3"
        return "stable-diffusion-3.5-medium" if config.get("dual_attention_layers") else "stable-diffusion-3.5-large"
    key = ONE_VARIANT.get(str(pipeline_class))
    if key not in FEW_STEP:
        return key
    if config_of("unet").get("time_cond_proj_dim"):
        return "latent-consistency-xl" if key == "stable-diffusion-xl" else "latent-consistency"
    return FEW_STEP[key] if few_steps(config_of("scheduler")) else key


def variant(model: str, options: ModelOptions = NO_OPTIONS) -> str | None:
    """Return the key in PUBLISHED of a model's name; None if its family is unknown before a download.

    A checkpoint file has the key of its pipeline.
    """
    if is_checkpoint(model):
        return variant(base, options) if (base := options.base_pipeline or implied_pipeline(model)) else None
    folder = model_folder(model, options.revision)
    if folder is None:
        return well_known(model)
    return variant_of(read_config(folder / "model_index.json").get("_class_name"), config_reader(folder), model)


def implied_pipeline(model: str) -> str | None:
    """Return the hub id that the tensors of a checkpoint file imply; None if the file can't be read."""
    try:
        known = infer_pipeline(read_header(user_path(model)))
    except DraftuneError:
        return None  # loading the model reports what is wrong with it
    return known[1] if known else None


def well_known(model: str) -> str | None:
    """Return the key in PUBLISHED of a well-known hub id; None for others."""
    return next((key for pattern, key in WELL_KNOWN if re.fullmatch(pattern, model.lower())), None)


def variant_of_pipeline(pipeline: Any, name: str = "") -> str | None:
    """Return the key in PUBLISHED of a loaded pipeline."""

    def config_of(part: str) -> Mapping[str, Any]:
        component = pipeline if part == PIPELINE else getattr(pipeline, part, None)
        return {**getattr(component, "config", {}), "_class_name": type(component).__name__}

    return variant_of(type(pipeline).__name__, config_of, name)
