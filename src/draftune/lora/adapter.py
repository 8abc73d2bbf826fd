"""LoRAs on a model: adding one to train, attaching those of files, their strengths, saving."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from draftune.errors import DraftuneError
from draftune.lora.deltas import LoRADelta, LoRADeltas, deltas_of_peft
from draftune.lora.files import GRID_SAID, AdapterConfig, write_lora
from draftune.lora.names import LAYERS, canonical, in_network
from draftune.lora.reader import read_lora
from draftune.utils.logging import logger
from draftune.utils.quiet import quiet

if TYPE_CHECKING:
    from draftune.models import Model

ADAPTER = "default"
"""The name of the LoRA that is trained, or loaded alone."""
KEPT = "kept"
"""The name of a frozen LoRA that belongs to the base of a training, where there is one."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(model: Model, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION) -> None:
    """Add a trainable LoRA to the model's denoiser: A Gaussian, B zero, so that nothing changes yet.

    The LoRA's weights are float32 whatever the model's precision.

    Args:
        model: carries no LoRA of this name yet.
        rank: of every layer.
        alpha: the LoRA acts at alpha / rank; the rank where None.
        targets: ends of the names of the layers to adapt.

    Raises:
        DraftuneError: no layer has such a name or reaches the image, or the model carries a LoRA already.
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

    Raises:
        DraftuneError: a target ends no layer's name, or no layer is left.
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
    logger.warning(
        f"{len(unused)} of the {len(chosen)} layers that lora_targets names get no LoRA, such as {unused[0]}: their "
        "output never reaches the image"
    )
    return [name for name in chosen if name not in unused]


def lora_parameters(model: Model) -> dict[str, nn.Parameter]:
    """Return the trainable tensors by name."""
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


def set_lora_scale(model: Model, scale: float) -> None:
    """Set the LoRA's strength: 0 is the base model, 1 is as trained."""
    set_lora_scales(model, {ADAPTER: scale} if model.kept is None else {KEPT: 1.0, ADAPTER: scale})


def set_lora_scales(model: Model, scales: Mapping[str, float]) -> None:
    """Set the strength of each LoRA by the name it was loaded under: the weights are W_0 + sum_i scale_i dW_i.

    A LoRA of which nothing is said is not active.
    """
    from diffusers.utils import set_weights_and_activate_adapters

    known = {name for network in model.lora_networks.values() for name in getattr(network, "peft_config", {})}
    if missing := set(scales) - known:
        raise DraftuneError(f"{model.name!r} carries no LoRA {min(missing)!r}, only {sorted(known)}")
    for network in model.lora_networks.values():
        # The network's own set_adapters does the same, but in some versions of diffusers not for every network.
        set_weights_and_activate_adapters(network, list(scales), list(scales.values()))
    freeze_loaded(model)


def freeze_loaded(model: Model) -> None:
    """Freeze all LoRAs but the denoiser's that is trained: peft makes all that is active trainable."""
    for network in model.lora_networks.values():
        configs = getattr(network, "peft_config", {})
        loaded = [f".{name}." for name, config in configs.items() if is_loaded(config)]
        for name, parameter in network.named_parameters():
            if any(adapter in name for adapter in loaded):
                parameter.requires_grad_(False)


def is_loaded(config: Any) -> bool:
    """Return whether an adapter's config is one of `attach`, which names its layers by an expression."""
    return isinstance(config.target_modules, str)


@contextmanager
def adapted_by(network: nn.Module, name: str) -> Iterator[None]:
    """Activate a network's adapter of this name alone, or none where it has no such adapter, inside this block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    active = [layer._active_adapter for layer in layers]
    # peft's own way to choose would also turn on and off what is trained.
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names


def load_lora(model: Model, source: Path | str, name: str = ADAPTER, skip_text_encoder: bool = False) -> LoRADeltas:
    """Load a LoRA of any tool onto the model, frozen.

    Args:
        model: any.
        source: a LoRA file, its folder or a run's folder.
        name: under which it is loaded, where there are several.
        skip_text_encoder: whether its layers of text encoders are left out.

    Returns:
        What it adds to each layer.

    Raises:
        DraftuneError: the file can't be read, or does not fit the model.
    """
    deltas = read_lora(source, model.lora_networks, model.name, skip_text_encoder)
    attach(model, deltas, name)
    return deltas


def attach(model: Model, deltas: LoRADeltas, name: str = ADAPTER) -> None:
    """Attach a LoRA that was read for this model, at strength 1 and frozen; no random number is drawn."""
    from peft import LoraConfig, inject_adapter_in_model

    if any(name in getattr(network, "peft_config", {}) for network in model.lora_networks.values()):
        raise DraftuneError(
            f"{model.name!r} carries a LoRA {name!r} already: give another name, or load the model anew"
        )
    for part, network in model.lora_networks.items():
        layers = {in_network(part, layer, network): delta for layer, delta in deltas.of_part(part).items()}
        if not layers:
            continue
        ranks = Counter(delta.rank for delta in layers.values())
        (most, _), *_ = ranks.most_common(1)
        # Names as regular expressions, since peft takes a plain one for the end of any name as well.
        patterns = {f"^{exactly([n for n, d in layers.items() if d.rank == r])}": r for r in ranks if r != most}
        config = LoraConfig(
            r=most,
            lora_alpha=most,
            target_modules=exactly(list(layers)),
            rank_pattern=dict(patterns),
            alpha_pattern=dict(patterns),
        )
        with quiet():
            inject_adapter_in_model(config, network, name, low_cpu_mem_usage=True)
        network._hf_peft_config_loaded = True
        fill(network, layers, name)
        network.requires_grad_(False)


def exactly(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, sorted(names)))})"


def fill(network: nn.Module, layers: Mapping[str, LoRADelta], name: str) -> None:
    """Put the changes into a network's adapter of the same layers and ranks, whose strength is 1."""
    modules = dict(network.named_modules())
    for layer, delta in layers.items():
        wrapped = modules[layer]
        for halves, tensor in ((wrapped.lora_A, delta.down), (wrapped.lora_B, delta.up)):
            weight: torch.Tensor = wrapped.get_base_layer().weight
            stored = tensor.to(weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True)
            halves[name].weight = nn.Parameter(stored, requires_grad=False)


def attached(model: Model, name: str = ADAPTER) -> dict[str, LoRADelta]:
    """Return the changes that a model's LoRA of this name makes at strength 1, by PART.LAYER."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for part, network in model.lora_networks.items():
        for layer, module in network.named_modules():
            if isinstance(module, BaseTunerLayer) and name in module.lora_A:
                down, up = (half[name].weight.detach().float().cpu() for half in (module.lora_A, module.lora_B))
                strength = module.lora_alpha[name] / module.r[name]
                found[f"{part}.{canonical(part, layer)}"] = LoRADelta(down, up).scaled(strength)
    return found


def freeze_lora(model: Model, source: Path | str, skip_text_encoder: bool = False) -> None:
    """Make a LoRA part of the base before another is added: frozen, active, and saved with that one as their sum.

    It is never added to the weights, whose precision may be too coarse to hold it. Raises DraftuneError if it does not
    fit the model, can't be saved again, or the model carries a LoRA already.
    """
    if getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries a LoRA already: load the model anew to go on from another")
    deltas = read_lora(source, model.lora_networks, model.name, skip_text_encoder)
    deltas.tensors()
    attach(model, deltas, KEPT)
    model.kept = deltas


def save_lora(model: Model, folder: Path | str) -> Path:
    """Write the LoRA in diffusers' format, with its alpha, the base model's name and the sampler's settings.

    With a LoRA that belongs to the base the file holds the sum of both, so that it is one of the model itself.

    Returns:
        The file's path.
    """
    from peft.utils import get_peft_model_state_dict

    if ADAPTER not in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} carries no LoRA to save")
    part, config = model.lora_prefix, model.denoiser.peft_config[ADAPTER]
    if is_loaded(config):
        # It was loaded: its ranks may differ, and it may adapt text encoders.
        return LoRADeltas(attached(model), model.name, json.dumps(model.grid)).write(Path(folder))
    own = get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER)
    tensors = {f"{part}.{name}": tensor for name, tensor in own.items()}
    metadata = {"base_model": model.name, GRID_SAID: json.dumps(model.grid)}
    if model.kept is not None:
        both = model.kept.plus(deltas_of_peft(tensors, config.lora_alpha / config.r))
        both.base_model, both.grid = model.name, json.dumps(model.grid)
        return both.write(Path(folder))
    targets = sorted(config.target_modules)
    return write_lora(Path(folder), tensors, {part: AdapterConfig(config.r, config.lora_alpha, targets)}, metadata)
