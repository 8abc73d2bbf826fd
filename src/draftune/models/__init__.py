"""Text-to-image models: one class per family of diffusers pipelines, and `load_model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draftune.errors import DraftuneError, first_line, out_of_memory
from draftune.models.base import DiffusionModel
from draftune.models.chroma import Chroma
from draftune.models.dit import DiT
from draftune.models.flux import Flux
from draftune.models.flux2 import Flux2, Flux2Klein
from draftune.models.krea2 import Krea2
from draftune.models.loading import (
    LoadOptions,
    encoder_loaders,
    fetch_configs,
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
from draftune.models.single_file import Checkpoint, open_checkpoint
from draftune.models.stable_diffusion import StableDiffusion
from draftune.models.stable_diffusion_3 import StableDiffusion3
from draftune.models.stable_diffusion_xl import StableDiffusionXL
from draftune.models.unconditional import Pixels
from draftune.models.z_image import ZImage
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import user_path

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FAMILIES", "DiffusionModel", "StableDiffusion", "load_model"]

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


def load_model(
    model: str | Path | DiffusionPipeline,
    precision: str = "no",
    quantization: str = "none",
    device: torch.device | str = "cpu",
    text_encoders: bool = True,
    base_pipeline: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
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
        model: "emoji", the folder of a saved pipeline, a hub id, a checkpoint file (.safetensors or .gguf), or a
            diffusers pipeline.
        precision: "no", "bf16" or "fp16". Only for weights that are read from files (always safetensors): the precision
            of the denoiser. All other networks have their saved precision with "bf16" and "fp16", and float32 with
            "no". Pass the same precision to `DiffusionModel.to`.
        quantization: "none" or a name in `draftune.models.quantization.BACKENDS`: how the linear layers of a denoiser
            that is read from a pipeline's folder are stored. A pipeline object may be quantized already.
        device: The device of quantized weights. Pass the same device to `DiffusionModel.to`.
        text_encoders: Whether to load the text encoders of a pipeline that is read from a folder. Otherwise they are
            loaded when a prompt has to be encoded, and freed afterwards (`draftune.models.prompt_embeddings`).
        base_pipeline: Only for a checkpoint file: the folder or hub id of the pipeline that gives what the file lacks.
            Default: the hub id that the file's tensors imply.
        revision: Branch, tag or commit of the hub id.
        variant: Variant of the weights, such as "fp16".

    Raises:
        DraftuneError: The model does not exist, its pipeline class is not supported, or its components do not fit each
            other. A pipeline that is refused is not changed.
    """
    check_quantization(quantization, precision, not isinstance(model, (str, Path)))
    if not isinstance(model, (str, Path)):
        return adapted(model, str(getattr(model.config, "_name_or_path", None) or "pipeline"))
    name, source = str(model), ModelOptions(base_pipeline, revision, variant)
    source.check(name)
    checkpoint = open_checkpoint(name, source)
    if checkpoint is None:
        folder = pipeline_folder(name, fetch_pipeline, source)
        adapter(read_index(folder, name)["_class_name"])  # refuses an unsupported class before its weights are read
    elif quantization != "none":
        raise DraftuneError(
            f"quantization={quantization} is for pipelines in folders or on the hub, not for the checkpoint file "
            f"{name!r}: leave it out, or give a GGUF file, whose weights are quantized"
        )
    else:
        folder = checkpoint_folder(checkpoint, source)
        source = source._replace(base_pipeline=checkpoint.base)
    # The text encoders of a checkpoint file are read with it.
    freed = checkpoint is None and not text_encoders
    options = LoadOptions(precision, quantization, device, not freed, variant)
    loaded = adapted(read_pipeline(folder, name, options, checkpoint), name)
    loaded.options = source
    if freed and (loaders := encoder_loaders(folder, name, options)):
        loaded.embeddings = PromptEmbeddings(loaded, loaders, folder)
    return loaded


def checkpoint_folder(checkpoint: Checkpoint, options: ModelOptions) -> Path:
    """Return the folder of the pipeline that gives what a checkpoint file lacks.

    Raises:
        DraftuneError: The file belongs to another family, or the pipeline can't be downloaded.
    """
    if checkpoint.kind is not None and checkpoint.kind not in FAMILIES:
        raise DraftuneError(
            f"{str(checkpoint.header.path)!r} is a checkpoint of a {checkpoint.kind}, which is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    folder = pipeline_folder(checkpoint.base, fetch_configs, options, "--base-pipeline")
    index = read_index(folder, checkpoint.base)
    adapter(index["_class_name"])
    checkpoint.check(index, folder)
    if folder == user_path(checkpoint.base):
        return folder

    def fetch_others(name: str, options: ModelOptions) -> Path:
        return fetch_pipeline(name, options, checkpoint.parts(index))

    return pipeline_folder(checkpoint.base, fetch_others, options, "--base-pipeline")


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
