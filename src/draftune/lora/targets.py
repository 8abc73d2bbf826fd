"""Which layers of a model's denoiser get a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from draftune.errors import DraftuneError
from draftune.lora.deltas import LoRADeltas
from draftune.lora.names import LAYERS
from draftune.sampling.step_range import StepRange
from draftune.utils.logging import logger
from draftune.utils.model_options import ModelOptions

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The default target modules: the attention layers."""


class LoRATarget(Protocol):
    """The members of `draftune.models.DiffusionModel` that LoRA functions use."""

    name: str
    lora_prefix: str
    frozen_lora: LoRADeltas | None
    lora_steps: StepRange
    options: ModelOptions

    @property
    def denoiser(self) -> Any: ...

    @property
    def lora_networks(self) -> dict[str, Any]: ...

    @property
    def sampler_metadata(self) -> dict[str, Any]: ...

    def unused_layers(self) -> frozenset[str]: ...

    def load_text_encoders(self) -> None: ...


def used_targets(model: LoRATarget, targets: Sequence[str]) -> list[str]:
    """Return the targets, or the full names of their layers.

    Full names are needed if some of these layers do not affect the image, or if a module that can have no LoRA has such
    a name. For example, "attn.to_out" is a layer in FLUX.2's single blocks and a list in its double blocks.

    Raises:
        DraftuneError: A target matches no layer, or no matching layer affects the image.
    """
    # peft moves a layer that has a LoRA to LAYER.base_layer.
    modules = [(name.removesuffix(".base_layer"), module) for name, module in model.denoiser.named_modules()]
    layers = [name for name, module in modules if isinstance(module, LAYERS)]
    chosen: dict[str, None] = {}
    for target in targets:
        matches = [name for name in layers if ends_in(name, target)]
        if not matches:
            raise DraftuneError(f"lora_target_modules: no linear or convolution layer ends in {target!r}")
        chosen |= dict.fromkeys(matches)
    unused = sorted(chosen.keys() & model.unused_layers())
    others = [name for name, _ in modules if name not in chosen and any(ends_in(name, target) for target in targets)]
    if not unused:
        return list(chosen if others else targets)
    if len(unused) == len(chosen):
        raise DraftuneError(
            f"no layer of lora_target_modules affects the images of {model.name!r}: the output of {unused[0]}, for "
            "example, is not used"
        )
    logger.warning(
        f"{len(unused)} of the {len(chosen)} layers of lora_target_modules get no LoRA, such as {unused[0]}: their "
        "output never reaches the image"
    )
    return [name for name in chosen if name not in unused]


def ends_in(name: str, target: str) -> bool:
    """Return whether a layer's name is a target or ends in it, as peft matches them."""
    return name == target or name.endswith(f".{target}")
