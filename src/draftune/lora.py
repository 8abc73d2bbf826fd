"""LoRA: adding it to a model, saving it as other tools read it, loading it back."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from draftune.adapters import KEPT
from draftune.errors import DraftuneError, out_of_memory
from draftune.loading import first_line
from draftune.models.base import GRID, Model
from draftune.models.single_file import single_file_error
from draftune.paths import user_path, written_whole
from draftune.processes import tell
from draftune.quiet import quiet
from draftune.tensors import save_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
CONFIG = "lora_adapter_metadata"
"""Where a file's metadata says rank and alpha, as diffusers and peft read them."""
GRID_SAID = "sampler_grid"
"""Where it says the sampler's grid that it was trained on, as JSON of what `Model.set_grid` takes."""
ADAPTER = "default"
# As diffusers, peft and kohya name the two matrices of a layer, and what is not the denoiser.
HALF = re.compile(r"lora[._](linear_layer\.)?(A|B|down|up)\.")
ENCODERS = ("text_encoder", "lora_te")
LAYERS = (nn.Linear, nn.Conv2d)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(model: Model, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION) -> None:
    """Adds a trainable LoRA to the model's denoiser: A Gaussian, B zero, so that nothing changes yet.

    `targets` are the ends of the names of the layers to adapt. The LoRA's weights are float32 whatever the model's
    precision. Raises DraftuneError if no layer has such a name.
    """
    from peft import LoraConfig

    if ADAPTER in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries a LoRA already: load the model anew to train another")
    targets = [target.strip() for target in targets]
    targets = used_targets(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    with quiet():
        model.denoiser.add_adapter(config, adapter_name=ADAPTER)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if model.kept is not None:
        set_lora_scale(model, 1.0)  # or the new one would be active alone


def used_targets(model: Model, targets: Sequence[str]) -> list[str]:
    """Return the targets, or, if some of their layers never reach the image, the full names of the others.

    Raises DraftuneError for a target that ends no layer's name, and where no layer is left.
    """
    modules = model.denoiser.named_modules()
    # A layer that carries another LoRA lies one deeper.
    layers = [name.removesuffix(".base_layer") for name, layer in modules if isinstance(layer, LAYERS)]
    chosen: dict[str, None] = {}
    for target in targets:
        found = [name for name in layers if name == target or name.endswith("." + target)]
        if not found:
            raise DraftuneError(f"no linear or convolution layer of {model.name!r} ends in {target!r} (lora_targets)")
        chosen |= dict.fromkeys(found)
    unused = sorted(chosen.keys() & model.unused_layers())
    if not unused:
        return list(targets)
    if len(unused) == len(chosen):
        raise DraftuneError(
            f"no layer that lora_targets names changes what {model.name!r} draws: the output of {unused[0]} is not used"
        )
    tell(
        f"{len(unused)} of the {len(chosen)} layers that lora_targets names get no LoRA, such as {unused[0]}: their "
        "output never reaches the image"
    )
    return [name for name in chosen if name not in unused]


def lora_parameters(model: Model) -> dict[str, nn.Parameter]:
    """The trainable tensors by name."""
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


def set_lora_scale(model: Model, scale: float) -> None:
    """The LoRA's strength: 0 is the base model, 1 is as trained."""
    set_lora_scales(model, {ADAPTER: scale} if model.kept is None else {KEPT: 1.0, ADAPTER: scale})


def set_lora_scales(model: Model, scales: Mapping[str, float]) -> None:
    """The strength of each LoRA by the name it was loaded under; the weights are W_0 + sum_i scale_i dW_i."""
    from diffusers.utils import set_weights_and_activate_adapters

    # The network's own set_adapters does the same, but in some versions of diffusers not for every network.
    set_weights_and_activate_adapters(model.denoiser, list(scales), list(scales.values()))
    for name, parameter in model.denoiser.named_parameters():
        if f".{KEPT}." in name:
            parameter.requires_grad_(False)  # peft makes all that is active trainable


def save_lora(model: Model, folder: Path | str) -> Path:
    """Writes the LoRA in diffusers' format, with its alpha, the base model's name and grid; returns the file's path.

    With a LoRA that belongs to the base it is the sum of both, so that it is one of the model itself.
    """
    from peft.utils import get_peft_model_state_dict

    if ADAPTER not in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries no LoRA to save")
    tensors = get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER)
    config = model.denoiser.peft_config[ADAPTER]
    targets = sorted(config.target_modules)
    said = {"base_model": model.name, GRID_SAID: json.dumps(model.grid)}
    if model.kept is not None:
        both = model.kept.plus(tensors, config.lora_alpha / config.r)
        both.base_model, both.grid = model.name, json.dumps(model.grid)
        return both.write(Path(folder))
    return write_lora(Path(folder), model.lora_prefix, tensors, config.r, config.lora_alpha, targets, said)


def write_lora(
    folder: Path,
    prefix: str,
    tensors: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    targets: Sequence[str],
    said: Mapping[str, str],
) -> Path:
    """Writes tensors by their names in peft, LAYER.lora_A.weight, in diffusers' format; returns the file's path.

    All layers have this rank and alpha; `said` goes into the file's metadata.
    """
    # From the first name diffusers takes whether all are peft's, and drops those that are not without a word.
    names = {name: name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.") for name in tensors}
    # diffusers takes alpha from the metadata alone; without it, another strength is loaded silently. No more than what
    # every version of peft understands.
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}  # older versions of diffusers want them
    metadata = {
        "format": "pt",
        CONFIG: json.dumps({f"{prefix}.{key}": value for key, value in config.items()}),
        **said,
    }
    path = folder / FILE_NAME
    with written_whole(path) as temporary:
        save_tensors(temporary, {f"{prefix}.{names[name]}": tensor for name, tensor in tensors.items()}, metadata)
    return path


def lora_file(source: Path | str) -> Path:
    """The LoRA's file, given itself, its folder or a run's folder.

    Raises DraftuneError if there is none, and for a file that holds a whole model.
    """
    source = user_path(source)
    for path in (source, source / FILE_NAME, source / "lora" / FILE_NAME):
        if path.is_file():
            if error := single_file_error(path):
                raise error
            return path
    raise DraftuneError(f"no LoRA at {str(source)!r}: a run's folder or a {FILE_NAME} is wanted")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises DraftuneError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DraftuneError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def base_model(source: Path | str) -> str | None:
    """The name of the model that a LoRA was trained on, where its file says so. Raises DraftuneError."""
    with opened(lora_file(source)) as file:
        return (file.metadata() or {}).get("base_model") or None


def saved_grid(source: Path | str) -> dict[str, Any]:
    """The sampler's grid that a LoRA was trained on, as far as its file says so. Raises DraftuneError."""
    with opened(lora_file(source)) as file:
        said = (file.metadata() or {}).get(GRID_SAID, "{}")
    try:
        found = json.loads(said)
        return {name: found[name] for name in GRID if name in found}
    except (ValueError, TypeError) as error:
        raise DraftuneError(f"the metadata of {str(source)!r} is no LoRA's: {GRID_SAID} can't be read") from error


def load_lora(model: Model, source: Path | str, name: str = ADAPTER) -> None:
    """Loads a LoRA file, or that of a run, onto the model, under a name where there are several.

    Raises DraftuneError if it does not fit the model.
    """
    path = lora_file(source)
    wanted = sizes(path)
    try:
        with quiet():
            options = {"weight_name": path.name, "adapter_name": name}
            if hasattr(model.pipeline, "load_lora_weights"):
                model.pipeline.load_lora_weights(str(path.parent), **options)
            else:
                model.denoiser.load_lora_adapter(str(path.parent), prefix=model.lora_prefix, **options)
    except Exception as error:
        # Of a file that another tool wrote, or that was damaged, nearly every kind of exception can come.
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the LoRA {str(path)!r} does not fit {model.name!r}: {first_line(error)}") from error
    if name not in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{str(path)!r} holds no LoRA for the denoiser of {model.name!r}")
    model.denoiser.requires_grad_(False)
    layers = [layer for layer in model.denoiser.modules() if name in getattr(layer, "lora_A", {})]
    loaded = [half[name].weight for layer in layers for half in (layer.lora_A, layer.lora_B)]
    # diffusers drops what it has no place for, and leaves what is not there as it was drawn, without a word.
    if wanted != Counter(weight.numel() for weight in loaded) or any(p.is_meta for p in model.denoiser.parameters()):
        raise DraftuneError(
            f"the LoRA {str(path)!r} does not fit {model.name!r}: of its {wanted.total()} matrices only some have a "
            f"place in {len(layers)} layers"
        )
    if not all(weight.isfinite().all() for weight in loaded):
        raise DraftuneError(f"the LoRA {str(path)!r} holds weights that are not finite")


def sizes(path: Path) -> Counter[int]:
    """How many numbers each matrix of a LoRA file for a denoiser has. Raises DraftuneError."""
    with opened(path) as file:
        keys = [key for key in file.keys() if HALF.search(key)]  # noqa: SIM118
        if any(key.startswith(ENCODERS) for key in keys):
            # Its scale could not be turned with the denoiser's: 0 would not be the base model.
            raise DraftuneError(f"the LoRA {str(path)!r} adapts a text encoder too, which is not supported")
        return Counter(math.prod(file.get_slice(key).get_shape()) for key in keys)
