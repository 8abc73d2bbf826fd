"""Add, load, scale and save LoRAs on a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftune.errors import DraftuneError
from draftune.lora.deltas import LoRADelta, LoRADeltas, deltas_of_peft
from draftune.lora.files import AdapterConfig, write_lora
from draftune.lora.metadata import SAMPLER_METADATA, saved_sampler, steps_metadata
from draftune.lora.names import canonical, in_network
from draftune.lora.reader import read_for
from draftune.lora.targets import ATTENTION, LoRATarget, used_targets
from draftune.utils.logging import logger
from draftune.utils.quiet import silence_libraries

ADAPTER = "default"
"""The adapter name of the LoRA that is trained, or of a single loaded LoRA."""
FROZEN_ADAPTER = "kept"
"""The adapter name of a frozen LoRA that belongs to the base model of a training run."""


def add_lora(model: LoRATarget, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION) -> None:
    """Add a trainable LoRA to the model's denoiser (Hu et al., 2021, arXiv:2106.09685).

    W = W_0 + (alpha / rank) * B @ A, with A Gaussian and B zero, so that the model's output does not change yet.
    A and B are float32 whatever the model's precision.

    Args:
        model: A model without a trainable LoRA.
        rank: The rank of every layer.
        alpha: The numerator of the scale alpha / rank; None for `rank`, that is a scale of 1.
        targets: The ends of the names of the layers to adapt (`target_modules` in peft).

    Raises:
        DraftuneError: No layer has such a name, no such layer affects the image, or the model already has a LoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if ADAPTER in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} already has a LoRA: load the model again to train another one")
    targets = used_targets(model, [target.strip() for target in targets])
    alpha = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    with silence_libraries():
        # The method `add_adapter` of diffusers exists only for some classes of networks.
        inject_adapter_in_model(config, model.denoiser, ADAPTER)
    model.denoiser._hf_peft_config_loaded = True
    set_lora_scale(model, 1.0)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def remove_lora(model: LoRATarget) -> None:
    """Remove the LoRAs of `add_lora` and `freeze_lora`, after which both can be called again."""
    from diffusers.utils.peft_utils import delete_adapter_layers

    for network in model.lora_networks.values():
        for name in (ADAPTER, FROZEN_ADAPTER):
            if name in getattr(network, "peft_config", {}):
                delete_adapter_layers(network, name)
    model.frozen_lora = None


def lora_parameters(model: LoRATarget) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of the denoiser by name."""
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


def set_lora_scale(model: LoRATarget, scale: float) -> None:
    """Set the LoRA's scale: 0 gives the base model, 1 the fine-tuned model."""
    set_lora_scales(model, {ADAPTER: scale} if model.frozen_lora is None else {FROZEN_ADAPTER: 1.0, ADAPTER: scale})


def set_lora_scales(model: LoRATarget, scales: Mapping[str, float]) -> None:
    """Set the scale of each LoRA by its adapter name: W = W_0 + sum_i scale_i * dW_i. All others are deactivated.

    Raises:
        DraftuneError: The model has no LoRA of this name.
    """
    from diffusers.utils import set_weights_and_activate_adapters

    known = {name for network in model.lora_networks.values() for name in getattr(network, "peft_config", {})}
    if missing := set(scales) - known:
        raise DraftuneError(f"{model.name!r} has no LoRA {min(missing)!r}, only {sorted(known)}")
    for network in model.lora_networks.values():
        # The method `set_adapters` does the same, but some versions of diffusers lack it for some networks.
        set_weights_and_activate_adapters(network, list(scales), list(scales.values()))
    freeze_loaded(model)


def freeze_loaded(model: LoRATarget) -> None:
    """Freeze all loaded LoRAs: peft makes every active LoRA trainable."""
    for network in model.lora_networks.values():
        configs = getattr(network, "peft_config", {})
        loaded = [f".{name}." for name, config in configs.items() if is_loaded(config)]
        for name, parameter in network.named_parameters():
            if any(adapter in name for adapter in loaded):
                parameter.requires_grad_(False)


def is_loaded(config: Any) -> bool:
    """Return whether an adapter's config comes from `attach`, whose `target_modules` is a regular expression."""
    return isinstance(config.target_modules, str)


@contextmanager
def adapted_by(network: nn.Module, name: str) -> Iterator[None]:
    """Activate only the adapter of this name inside this context, or no adapter if the network has no such adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    active = [layer._active_adapter for layer in layers]
    # `set_adapter` of peft would also change which parameters are trainable.
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names


def load_lora(
    model: LoRATarget, source: Path | str, name: str = ADAPTER, skip_text_encoder: bool = False
) -> LoRADeltas:
    """Load a LoRA file of any tool into the model, frozen, and set the model's `lora_steps` to the file's.

    Args:
        model: A model without a LoRA of this name.
        source: A LoRA file, its folder or a run's folder.
        name: The adapter name, to load several LoRAs.
        skip_text_encoder: Whether to skip layers of text encoders.

    Returns:
        The weight change of each layer.

    Raises:
        DraftuneError: The file can't be read or does not fit the model.
    """
    deltas = read_for(model, source, skip_text_encoder)
    attach_lora(model, deltas, name)
    model.lora_steps = deltas.lora_steps
    return deltas


def attach_lora(model: LoRATarget, deltas: LoRADeltas, name: str = ADAPTER) -> None:
    """Add a LoRA that was read for this model, frozen and with scale 1. No random numbers are used."""
    from peft import LoraConfig, inject_adapter_in_model

    if any(name in getattr(network, "peft_config", {}) for network in model.lora_networks.values()):
        raise DraftuneError(f"{model.name!r} already has a LoRA {name!r}: give another name, or load the model again")
    for part, network in model.lora_networks.items():
        layers = {in_network(part, layer, network): delta for layer, delta in deltas.of_part(part).items()}
        if not layers:
            continue
        ranks = Counter(delta.rank for delta in layers.values())
        (most, _), *_ = ranks.most_common(1)
        # Regular expressions, since peft matches a plain name with the end of every layer's name.
        patterns = {f"^{exact_match([n for n, d in layers.items() if d.rank == r])}": r for r in ranks if r != most}
        config = LoraConfig(
            r=most,
            lora_alpha=most,
            target_modules=exact_match(list(layers)),
            rank_pattern=dict(patterns),
            alpha_pattern=dict(patterns),
        )
        with silence_libraries():
            inject_adapter_in_model(config, network, name, low_cpu_mem_usage=True)
        network._hf_peft_config_loaded = True
        copy_factors(network, layers, name)
        network.requires_grad_(False)


def exact_match(names: Sequence[str]) -> str:
    """Return a regular expression that matches only these names."""
    return f"(?:{'|'.join(map(re.escape, sorted(names)))})"


def copy_factors(network: nn.Module, layers: Mapping[str, LoRADelta], name: str) -> None:
    """Copy weight changes into a network's adapter with the same layers and ranks and scale 1."""
    modules = dict(network.named_modules())
    for layer, delta in layers.items():
        module = modules[layer]
        for factors, tensor in ((module.lora_A, delta.down), (module.lora_B, delta.up)):
            weight: torch.Tensor = module.get_base_layer().weight
            values = tensor.to(weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True)
            factors[name].weight = nn.Parameter(values, requires_grad=False)


def attached_deltas(model: LoRATarget, name: str = ADAPTER) -> dict[str, LoRADelta]:
    """Return the weight changes of a model's LoRA at scale 1, by PART.LAYER."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    deltas = {}
    for part, network in model.lora_networks.items():
        for layer, module in network.named_modules():
            if isinstance(module, BaseTunerLayer) and name in module.lora_A:
                down, up = (half[name].weight.detach().float().cpu() for half in (module.lora_A, module.lora_B))
                scale = module.lora_alpha[name] / module.r[name]
                deltas[f"{part}.{canonical(part, layer)}"] = LoRADelta(down, up).scaled(scale)
    return deltas


def check_sampler(model: LoRATarget, lora: Path) -> None:
    """Warn if a LoRA was trained with another sampler than the model's, as with a pipeline that was changed since."""
    saved = saved_sampler(lora)  # empty for flow models and for LoRAs of other tools
    was, now = (sampler.get("scheduler", "DDIM") for sampler in (saved, model.sampler_metadata))
    if saved and was != now:
        logger.warning(
            f"the LoRA {str(lora)!r} was trained with the sampler {was}, and {model.name!r} has {now}: if its pipeline "
            "was changed after it was loaded, save that pipeline and give its folder (--model)"
        )


def freeze_lora(model: LoRATarget, source: Path | str, skip_text_encoder: bool = False) -> None:
    """Make a LoRA a frozen part of the base model, before `add_lora` adds the one to train.

    `save_lora` saves the sum of both, so both are active on the same steps: the model's `lora_steps` is set to the
    file's. The frozen LoRA is not merged into the weights, since half precision would round it.

    Raises:
        DraftuneError: The LoRA does not fit the model or can't be saved, or the model already has a LoRA.
    """
    if getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} already has a LoRA: load the model again to continue from another one")
    deltas = read_for(model, source, skip_text_encoder)
    deltas.tensors()  # raises for a LoRA that can't be saved
    attach_lora(model, deltas, FROZEN_ADAPTER)
    model.frozen_lora, model.lora_steps = deltas, deltas.lora_steps


def save_lora(model: LoRATarget, folder: Path | str) -> Path:
    """Write the LoRA in diffusers' format, with alpha, the base model's name and the sampling settings as metadata.

    If the model has a frozen LoRA (`freeze_lora`), the file contains the sum of both.

    Returns:
        The path of the file in `folder`.

    Raises:
        DraftuneError: The model has no LoRA.
    """
    from peft.utils import get_peft_model_state_dict

    if ADAPTER not in getattr(model.denoiser, "peft_config", {}):
        raise DraftuneError(f"{model.name!r} has no LoRA to save")
    part, config = model.lora_prefix, model.denoiser.peft_config[ADAPTER]
    if is_loaded(config):
        # A loaded LoRA can have layers of different ranks and adapt text encoders.
        sampler = json.dumps(model.sampler_metadata)
        own = LoRADeltas(attached_deltas(model), model.name, sampler, model.lora_steps, model.options)
        return own.write(Path(folder))
    trained = get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER)
    tensors = {f"{part}.{name}": tensor for name, tensor in trained.items()}
    sampler = json.dumps(model.sampler_metadata)
    if model.frozen_lora is not None:
        both = model.frozen_lora.add(deltas_of_peft(tensors, config.lora_alpha / config.r))
        return LoRADeltas(both.layers, model.name, sampler, model.lora_steps, model.options).write(Path(folder))
    metadata = {"base_model": model.name, SAMPLER_METADATA: sampler}
    metadata |= steps_metadata(model.lora_steps) | model.options.metadata()
    lora = AdapterConfig(config.r, config.lora_alpha, sorted(config.target_modules))
    return write_lora(Path(folder), tensors, {part: lora}, metadata)
