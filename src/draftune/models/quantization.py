"""Load frozen networks in 8 or 4 bits by the quantization backends of diffusers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from draftune.errors import DraftuneError, require, unknown
from draftune.models.packed import PackedLinear, pack
from draftune.utils.loading import cast, load_part
from draftune.utils.quiet import silence_libraries
from draftune.utils.tensors import is_quantized_weight
from draftune.utils.weightless import fake_mode


def bitsandbytes(**options: Any) -> Callable[[torch.dtype], Any]:
    """Return a function of the precision of the computation that makes a `BitsAndBytesConfig` with these options."""

    def config(dtype: torch.dtype) -> Any:
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **options)

    return config


def torchao(kind: str) -> Callable[[torch.dtype], Any]:
    """Return a function of the precision of the computation that makes a `TorchAoConfig` of a class of torchao."""

    def config(dtype: torch.dtype) -> Any:
        from diffusers import TorchAoConfig

        return TorchAoConfig(getattr(import_module("torchao.quantization"), kind)())

    return config


class Backend(NamedTuple):
    """A way to store weights in few bits.

    Attributes:
        package: The package that it needs.
        config: Makes diffusers' config of it, given the precision of the computation.
    """

    package: str
    config: Callable[[torch.dtype], Any]


# The 4-bit NormalFloat with quantized scales is that of QLoRA (Dettmers et al., 2023, arXiv:2305.14314).
QLORA = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BACKENDS = {
    "bnb_4bit": Backend("bitsandbytes", bitsandbytes(**QLORA)),
    "bnb_8bit": Backend("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "torchao_int8": Backend("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao_float8": Backend("torchao", torchao("Float8WeightOnlyConfig")),
}
"""The values of the setting `quantization`, except "none"."""
LEAST_SHARE = 0.2
"""The smallest share of a network's weights that is worth their rounding; of Stable Diffusion 1.4's UNet it is 31 %."""


def check_quantization(quantization: str, precision: str, loaded: bool = False, name: str = "quantization") -> None:
    """Check the setting before anything is loaded.

    Args:
        quantization: "none" or a name in BACKENDS.
        precision: "no", "bf16" or "fp16".
        loaded: Whether the model is an object in memory.
        name: The setting, for error messages.

    Raises:
        DraftuneError: The name is unknown, the model is loaded already, the precision is fp16, or the backend's package
            is not installed.
    """
    if quantization == "none":
        return
    if quantization not in BACKENDS:
        raise unknown(name, quantization, ["none", *BACKENDS])
    if loaded:
        raise DraftuneError(
            f"quantization={quantization} is for models that are read from files: load the pipeline with quantized "
            "weights, or give its folder"
        )
    if precision == "fp16":
        raise DraftuneError(f"quantization={quantization} does not work with mixed_precision=fp16: use bf16 or no")
    if fake_mode() is not None:
        return  # counting needs no backend
    with silence_libraries():
        require(BACKENDS[quantization].package, f"{name}={quantization}", "quant")


def load_denoiser(
    cls: Any, folder: Path, dtype: torch.dtype, quantization: str, device: torch.device, variant: str | None = None
) -> Any:
    """Load a network of diffusers. Linear layers are quantized while they are read, or were saved quantized.

    Args:
        cls: The network's class.
        folder: Its folder.
        dtype: The precision of all other weights and of the computation.
        quantization: "none" or a name in BACKENDS.
        device: Where the weights are quantized.
        variant: The variant of the weights to load if the folder has it.

    Raises:
        DraftuneError: The network can't be loaded, is quantized already or consists of convolutions.
    """
    saved = saved_quantization(folder)
    if quantization == "none" and not saved:
        return load_part(cls, folder, dtype, variant)
    if quantization != "none" and saved:
        raise DraftuneError(f"the weights in {str(folder)!r} are saved in {saved} already: leave out --quantization")
    if (mode := fake_mode()) is not None:
        if saved:
            raise DraftuneError(f"the weights in {str(folder)!r} are saved in {saved}: their memory can't be counted")
        network = load_part(cls, folder, dtype, variant)
        with mode:
            pack(network, quantization, dtype)
        check_share(network, folder, quantization)
        follow_autocast(network)
        keep_dtype(network)
        return network
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # Packed weights do not have the shapes of the config's layers.
    options: dict[str, Any] = {"ignore_mismatched_sizes": False} if saved else {}
    package = saved or BACKENDS[quantization].package
    if not saved:
        options["quantization_config"] = BACKENDS[quantization].config(dtype)
    # diffusers takes a CPU in the device map for weights to offload, which torchao then does not quantize.
    if device.type != "cpu" or package == "bitsandbytes":
        options["device_map"] = {"": str(device)}
    with bitsandbytes_on_cpu() if device.type == "cpu" else nullcontext():
        network = load_part(cls, folder, dtype, variant, **options)
    check_share(network, folder, quantization)
    follow_autocast(network)
    keep_dtype(network)
    # Its 8-bit layers warn at every call that they convert their input to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in network.modules():
        # With it, the first call without gradient stores the weights in another layout and rounds all later results.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return network


def quantize_linear(
    network: nn.Module, quantization: str, dtype: torch.dtype, left_out: Collection[nn.Module] = ()
) -> None:
    """Replace the linear layers of a loaded network by those of bitsandbytes in 4 bits, with the same weights.

    Args:
        network: A frozen network on the CPU.
        quantization: "bnb_4bit".
        dtype: The precision of the computation.
        left_out: Modules that are not replaced.
    """
    if (mode := fake_mode()) is not None:
        with mode:
            pack(network, quantization, dtype, left_out)
        return
    bnb: Any = import_module("bitsandbytes.nn")
    config = BACKENDS[quantization].config(dtype)
    options = {
        "quant_type": config.bnb_4bit_quant_type,
        "compress_statistics": config.bnb_4bit_use_double_quant,
    }
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer in left_out:
                continue
            packed = bnb.Linear4bit(1, 1, bias=False, compute_dtype=dtype, **options)
            packed.in_features, packed.out_features, packed.bias = layer.in_features, layer.out_features, layer.bias
            packed.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, **options).to(layer.weight.device)
            packed.support_avx512bf16_for_cpu = False  # see `load_denoiser`
            setattr(parent, name, packed.eval())


def check_share(network: nn.Module, folder: Path, quantization: str) -> None:
    """Raise DraftuneError if too small a share of a network's weights is quantized."""
    if (share := quantized_share(network)) < LEAST_SHARE:
        raise DraftuneError(
            f"quantization={quantization} is for linear layers, and only {share:.0%} of the weights of {str(folder)!r} "
            "belong to some: leave it out"
        )


def follow_autocast(network: nn.Module) -> None:
    """Let quantized linear layers cast their input to autocast's precision, as autocast does for plain ones.

    Without it a layer returns float32 for the float32 output of a norm, and so do all layers after it.
    """

    def cast(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kind = inputs[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs[0].dtype
        return (inputs[0].to(dtype), *inputs[1:])

    for layer in quantized_layers(network):
        layer.register_forward_pre_hook(cast)


def keep_dtype(network: Any) -> None:
    """Let a network's `dtype` stay that of its own weights: diffusers returns that of the first one in floating point.

    In a network whose linear layers have no bias, that would be a LoRA's.
    """
    kind = type(network)
    for name, module in network.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            # A LoRA renames linear layers.
            if parameter.is_floating_point() and not isinstance(module, nn.Linear):
                path = f"{name}.{key}".removeprefix(".")

                def dtype(network: Any, path: str = path) -> torch.dtype:
                    found: torch.dtype = network.get_parameter(path).dtype
                    return found

                members = {"dtype": property(dtype), "__module__": kind.__module__}
                network.__class__ = type(kind.__name__, (kind,), members)
                return


def quantized_share(network: nn.Module) -> float:
    """Return the share of a network's weights that are quantized."""
    layers = quantized_layers(network)
    packed = {id(layer.weight) for layer in layers}
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    return quantized / (quantized + sum(p.numel() for p in network.parameters() if id(p) not in packed))


def quantized_layers(network: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a network that are quantized, or have the sizes of quantized ones."""
    linear = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    return [layer for layer in linear if isinstance(layer, PackedLinear) or is_quantized_weight(layer.weight)]


def saved_quantization(folder: Path) -> str:
    """Return the method that the weights in a folder were quantized with when they were saved; empty for none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # loading the network raises the error of a damaged config


@contextmanager
def bitsandbytes_on_cpu() -> Iterator[None]:
    """Let diffusers load bitsandbytes' layers without a GPU, which it refuses; bitsandbytes itself has CPU kernels."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    def check(*args: Any, **kwargs: Any) -> None:
        pass

    with (
        patch.object(BnB4BitDiffusersQuantizer, "validate_environment", check),
        patch.object(BnB8BitDiffusersQuantizer, "validate_environment", check),
    ):
        yield


def is_quantized(network: nn.Module) -> bool:
    """Return whether diffusers or transformers loaded a network with quantized weights."""
    return bool(getattr(network, "is_quantized", False))


def move(network: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Move a network to a device and cast its weights; quantized weights are moved only, and keep their layout."""
    if not is_quantized(network):
        cast(network, device=device, dtype=dtype, memory_format=layout)
        return
    if next(network.parameters()).device != device:
        network.to(device=device)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point() and not is_quantized_weight(tensor):
                    tensor.data = tensor.data.to(dtype)
