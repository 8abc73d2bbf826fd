"""Load the networks of a checkpoint in one file: safetensors with one or all networks, or a GGUF denoiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from draftune.errors import DraftuneError, first_line, out_of_memory
from draftune.utils.loading import HALVES, WHOLE
from draftune.utils.model_configs import read_config
from draftune.utils.model_options import ModelOptions, is_checkpoint
from draftune.utils.paths import user_path
from draftune.utils.quiet import silence_libraries
from draftune.utils.single_file import Header, check_checkpoint, infer_pipeline, read_header
from draftune.utils.tensors import is_quantized_weight

DENOISERS = ("unet", "transformer")
VAE = ("first_stage_model.", "vae.")
CLIP = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
T5 = ("text_encoders.t5xxl.",)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MOST_IGNORED = 0.01
"""The largest fraction of the denoiser's weights in a file that may be unused: position tables that are computed."""


class Checkpoint(NamedTuple):
    """A checkpoint file and the pipeline that gives what is not in it.

    Attributes:
        header: The file's header.
        base: The folder or hub id of the pipeline.
        kind: The class of the pipeline that the file's tensors imply; None if it is unknown.
    """

    header: Header
    base: str
    kind: str | None

    def keys_of(self, part: str, class_name: str) -> list[str]:
        """Return the keys of a network of the pipeline; [] if it is not in the file, or in a format not supported."""
        if part in DENOISERS:
            return self.header.denoiser
        starts: tuple[str, ...] = ()
        if class_name == "AutoencoderKL":
            starts = VAE
        elif class_name == "T5EncoderModel":
            starts = T5
        elif class_name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            starts = CLIP.get(part, ())
        return [key for key in self.header.shapes if starts and key.startswith(starts)]

    def parts(self, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Return library and class of the networks that are read from the file, by their names in the pipeline."""
        networks = {part: entry for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
        return {part: (lib, name) for part, (lib, name) in networks.items() if name and self.keys_of(part, name)}

    def check(self, index: Mapping[str, Any], source: Path) -> None:
        """Raise DraftuneError if the file belongs to another family than the pipeline in the folder `source`."""
        if self.kind is not None and self.kind != index["_class_name"]:
            raise DraftuneError(
                f"{str(self.header.path)!r} is a checkpoint of a {self.kind}, and {self.base!r} is a "
                f"{index['_class_name']}: give a pipeline of its family (--base-pipeline)"
            )
        scheduler = read_config(source / "scheduler" / "scheduler_config.json")
        if "v_pred" in self.header.shapes and scheduler.get("prediction_type") != "v_prediction":
            raise DraftuneError(
                f"{str(self.header.path)!r} predicts v, and the scheduler of {self.base!r} does not: give a pipeline "
                "whose scheduler has prediction_type v_prediction (--base-pipeline)"
            )

    def dtype_of(self, part: str, class_name: str, precision: torch.dtype | None) -> torch.dtype:
        """Return the precision in which a network is loaded; see `draftune.models.load_model`."""
        if precision is None or part in DENOISERS:
            return precision or torch.float32
        types = {self.header.types[key] for key in self.keys_of(part, class_name)} - WHOLE
        if types and all(kind.startswith("F8") for kind in types):
            return torch.bfloat16  # has every value of both float8 types
        return HALVES.get("".join(types), torch.float32)


def open_checkpoint(model: str, options: ModelOptions) -> Checkpoint | None:
    """Read the header of a checkpoint file; None if the model is no file.

    Raises:
        DraftuneError: The file is not a checkpoint, or its pipeline is unknown and not given.
    """
    if not is_checkpoint(model):
        return None
    header = read_header(user_path(model))
    check_checkpoint(header)
    known = infer_pipeline(header)
    if not header.denoiser:
        raise DraftuneError(f"{model!r} holds no denoiser: it has {len(header.shapes)} tensors")
    if known is None and not options.base_pipeline:
        example = next(iter(header.shapes), "no tensors")
        raise DraftuneError(
            f"the architecture of {model!r} is unknown (it holds {example}): give a pipeline of its family "
            "(--base-pipeline)"
        )
    return Checkpoint(header, options.base_pipeline or (known or ("", ""))[1], known[0] if known else None)


def load_networks(
    checkpoint: Checkpoint, source: Path, index: Mapping[str, Any], precision: torch.dtype | None
) -> dict[str, Any]:
    """Load the networks in a checkpoint file.

    Args:
        checkpoint: The file.
        source: The folder of the pipeline with the configs.
        index: The pipeline's model_index.json.
        precision: The denoiser's precision; None for float32.

    Returns:
        The networks by their names in the pipeline.

    Raises:
        DraftuneError: The file does not fit the configs.
    """
    networks = {}
    for part, (library, class_name) in checkpoint.parts(index).items():
        kind = getattr(import_module(library), class_name)
        dtype = checkpoint.dtype_of(part, class_name, precision)
        name = f"the {part} in {str(checkpoint.header.path)!r}"
        try:
            with silence_libraries():
                networks[part] = load_network(checkpoint, kind, part, source, dtype)
        except Exception as error:
            if out_of_memory(error):
                raise
            reason = first_line(error)
            if isinstance(error, KeyError):
                reason = f"it lacks {error.args[0]}"
            elif isinstance(error, NotImplementedError):  # a tensor that is still on the device "meta" can't be moved
                reason = "it lacks tensors"
            raise DraftuneError(
                f"{name} does not fit the config in {checkpoint.base!r} (--base-pipeline): {reason}"
            ) from error
        check_complete(networks[part], name, checkpoint.base)
        if part in DENOISERS:
            check_used(checkpoint, networks[part], name)
    return networks


def load_network(checkpoint: Checkpoint, kind: Any, part: str, source: Path, dtype: torch.dtype) -> Any:
    """Load one network by diffusers' conversion of the original layout."""
    options = {"config": str(source), "subfolder": part, "torch_dtype": dtype, "local_files_only": True}
    if checkpoint.header.is_gguf:
        return load_gguf(checkpoint.header.path, kind, options, dtype)
    tensors = read_tensors(checkpoint.header.path, checkpoint.keys_of(part, kind.__name__), dtype)
    if hasattr(kind, "from_single_file"):
        return kind.from_single_file(tensors, **options)
    from diffusers.loaders import single_file_utils as conversion

    is_t5 = kind.__name__ == "T5EncoderModel"
    convert = getattr(conversion, f"create_diffusers_{'t5_model_from_checkpoint' if is_t5 else 'clip_model_from_ldm'}")
    network = convert(kind, tensors, **options)
    network.tie_weights()
    return network.to(dtype)


def read_tensors(path: Path, keys: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Read tensors from a safetensors file. float8 is cast to `dtype`, without loss; conversions compute with it."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in keys}
    return {key: tensor.to(dtype) if tensor.dtype in FLOAT8 else tensor for key, tensor in tensors.items()}


def load_gguf(path: Path, kind: Any, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Load a GGUF denoiser. Its linear layers keep their quantized weights, and compute in `dtype`."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    network = kind.from_single_file(str(path), **options, quantization_config=GGUFQuantizationConfig(dtype))
    for module in network.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            # Only the weights of linear layers are dequantized by diffusers when they are used.
            if isinstance(tensor, GGUFParameter) and not (isinstance(module, GGUFLinear) and name == "weight"):
                plain = dequantize_gguf_tensor(tensor).to(dtype)
                setattr(module, name, nn.Parameter(plain, requires_grad=False))
    return network


def check_others(checkpoint: Checkpoint, index: Mapping[str, Any], networks: Collection[str]) -> None:
    """Raise DraftuneError if a network is neither in a checkpoint file nor in the folder of its pipeline."""
    for part, entry in index.items():
        if part.startswith(("vae", "text_encoder")) and entry != [None, None] and part not in networks:
            raise DraftuneError(
                f"neither {str(checkpoint.header.path)!r} nor {checkpoint.base!r} (--base-pipeline) has the weights of "
                f"the {part}"
            )


def check_complete(network: nn.Module, name: str, base: str) -> None:
    """Raise DraftuneError if weights of a network are missing: they are still on the device "meta"."""
    missing = [key for key, tensor in network.state_dict().items() if tensor.is_meta]
    if missing:
        raise DraftuneError(
            f"{name} does not fit the config in {base!r} (--base-pipeline): it lacks {len(missing)} tensors, such as "
            f"{missing[0]}"
        )


def check_used(checkpoint: Checkpoint, network: nn.Module, name: str) -> None:
    """Raise DraftuneError if the denoiser in the file has weights that the network lacks, such as more blocks."""
    used = sum(tensor.numel() for tensor in network.state_dict().values())
    for module in network.modules():
        if isinstance(module, nn.Linear) and is_quantized_weight(module.weight):
            used += module.in_features * module.out_features - module.weight.numel()
    if (given := checkpoint.header.elements(checkpoint.header.denoiser)) > used * (1 + MOST_IGNORED):
        raise DraftuneError(
            f"{name} does not fit the config in {checkpoint.base!r} (--base-pipeline): it has {given:,} weights, and "
            f"the network {used:,}"
        )
