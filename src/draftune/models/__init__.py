"""Text-to-image models: one class per family of diffusers pipelines, and `load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftune.errors import DraftuneError, out_of_memory
from draftune.models.base import DiffusionModel
from draftune.models.chroma import Chroma
from draftune.models.dit import DiT
from draftune.models.flux import Flux
from draftune.models.flux2 import Flux2, Flux2Klein
from draftune.models.krea2 import Krea2
from draftune.models.loading import (
    LoadOptions,
    encoder_loaders,
    fetch_pipeline,
    pipeline_folder,
    read_index,
    read_pipeline,
)
from draftune.models.lumina2 import Lumina2
from draftune.models.pixart import PixArt
from draftune.models.prompt_embeddings import PromptEmbeddings
from draftune.models.quantization import check_quantization
from draftune.models.qwen_image import QwenImage
from draftune.models.sana import Sana
from draftune.models.sana_sprint import SanaSprint
from draftune.models.stable_diffusion import StableDiffusion
from draftune.models.stable_diffusion_3 import StableDiffusion3
from draftune.models.stable_diffusion_xl import StableDiffusionXL
from draftune.models.unconditional import Pixels
from draftune.models.z_image import ZImage
from draftune.utils.loading import first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FAMILIES", "MODELS", "DiffusionModel", "StableDiffusion", "load_model"]

FAMILIES: dict[str, type[DiffusionModel]] = {
    "DDIMPipeline": Pixels,
    "DDPMPipeline": Pixels,
    "DiTPipeline": DiT,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "SanaSprintPipeline": SanaSprint,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
    "ChromaPipeline": Chroma,
    "Krea2Pipeline": Krea2,
    "Lumina2Pipeline": Lumina2,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
}
"""The family of each supported pipeline class. An added entry makes its pipelines loadable."""
MODELS = {
    "emoji": "emoji at 64x64 from their names, shipped with this package",
    "CompVis/stable-diffusion-v1-4": "Stable Diffusion 1.4, the paper's model (from the hub)",
}


def load_model(
    model: str | Path | DiffusionPipeline,
    precision: str = "no",
    quantization: str = "none",
    device: torch.device | str = "cpu",
    text_encoders: bool = True,
) -> DiffusionModel:
    """Load a model.

    A pipeline object is used in place, not copied. Loading and training change its networks as follows:

    - evaluation mode, `requires_grad=False`, and channels-last memory layout;
    - gradient checkpointing of their blocks is enabled or disabled, see `DiffusionModel.set_checkpointing`;
    - `DiffusionModel.to` moves and casts them;
    - a LoRA adds its layers and the attribute `peft_config` to the denoiser.

    The pipeline's config, its scheduler, the classes of its networks and the values of their weights do not change.
    To keep a pipeline unchanged, pass a copy (`copy.deepcopy(pipeline)`) or its folder.

    Args:
        model: "emoji", the folder of a saved pipeline, a hub id, or a diffusers pipeline.
        precision: "no", "bf16" or "fp16". Only for weights that are read from files (always safetensors): the precision
            of the denoiser. All other networks have their saved precision with "bf16" and "fp16", and float32 with
            "no". Pass the same precision to `DiffusionModel.to`.
        quantization: "none" or a name in `draftune.models.quantization.BACKENDS`: how the linear layers of a denoiser
            that is read from files are stored. A pipeline object may be quantized already.
        device: The device of quantized weights. Pass the same device to `DiffusionModel.to`.
        text_encoders: Whether to load the text encoders of a pipeline that is read from files. Otherwise they are
            loaded when a prompt has to be encoded, and freed afterwards (`draftune.models.prompt_embeddings`).

    Raises:
        DraftuneError: The model does not exist, its pipeline class is not supported, or its components do not fit each
            other. A pipeline that is refused is not changed.
    """
    check_quantization(quantization, precision, not isinstance(model, (str, Path)))
    if not isinstance(model, (str, Path)):
        return adapted(model, str(getattr(model.config, "_name_or_path", None) or "pipeline"))
    name = str(model)
    folder = pipeline_folder(name, fetch_pipeline)
    adapter(read_index(folder, name)["_class_name"])  # refuses an unsupported class before its weights are read
    options = LoadOptions(precision, quantization, device, text_encoders)
    loaded = adapted(read_pipeline(folder, name, options), name)
    if not text_encoders and (loaders := encoder_loaders(folder, name, options)):
        loaded.embeddings = PromptEmbeddings(loaded, loaders, folder)
    return loaded


def adapter(pipeline_class: str) -> type[DiffusionModel]:
    """Return the family of a pipeline class. Raises DraftuneError if it is not supported."""
    if pipeline_class not in FAMILIES:
        raise DraftuneError(f"{pipeline_class} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]


def adapted(pipeline: DiffusionPipeline, name: str) -> DiffusionModel:
    """Return the model of a loaded pipeline. Raises DraftuneError if the pipeline does not fit its family."""
    family = adapter(type(pipeline).__name__)
    try:
        return family(pipeline, name)
    except DraftuneError:
        raise
    except Exception as error:
        # An edited or damaged config can cause any kind of exception.
        if out_of_memory(error):
            raise
        raise DraftuneError(f"{name!r} can't be used: {type(error).__name__}: {first_line(error)}") from error
