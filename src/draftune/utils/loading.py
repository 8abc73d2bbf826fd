"""Load networks and tokenizers from folders, and raise errors for incomplete ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftune.errors import DraftuneError, first_line, out_of_memory
from draftune.utils.quiet import silence_libraries
from draftune.utils.weightless import fake_mode, from_config

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""The possible vocabulary files of a tokenizer. Without any, transformers silently makes an empty tokenizer."""
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""The half precisions by their names in safetensors."""
WHOLE = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
"""The integer types in safetensors."""
WEIGHTS = ("diffusion_pytorch_model", "model")
"""The file names of a network's weights in diffusers and transformers."""
VARIANTS = ("fp16", "bf16")
"""The variants of diffusers and transformers, for weights saved in half precision."""


def has_variant(folder: Path, variant: str | None) -> bool:
    """Return whether a folder has weights of a variant; None stands for plain weights.

    A variant is one file, such as diffusion_pytorch_model.fp16.safetensors, or several files with an index.
    """
    dot = f".{variant}" if variant else ""
    names = [f"{stem}{end}" for stem in WEIGHTS for end in (f"{dot}.safetensors", f".safetensors.index{dot}.json")]
    return any((folder / name).is_file() for name in names)


def weights_variant(folder: Path, wanted: str | None = None) -> str | None:
    """Return the variant to load from a folder, None for plain weights.

    It is `wanted` if the folder has it, else none, else a half-precision variant if there are no plain weights.
    """
    variants = (*([wanted] if wanted else []), None, *VARIANTS)
    return next((variant for variant in variants if has_variant(folder, variant)), None)


def weights_files(folder: Path, wanted: str | None = None) -> list[Path]:
    """Return the safetensors files that are loaded from a folder: the plain ones, or those of its variant."""
    known = [*([wanted] if wanted else []), *VARIANTS]
    files = {path: next((v for v in known if f".{v}" in path.name), None) for path in folder.glob("*.safetensors")}
    variant = weights_variant(folder, wanted)
    return [path for path, of_file in files.items() if of_file == variant] or list(files)


def load_part(
    cls: Any, folder: Path, dtype: torch.dtype = torch.float32, wanted: str | None = None, **options: Any
) -> Any:
    """Load a network of diffusers or transformers from a folder's safetensors.

    Inside `without_weights` it is built from its config.

    Args:
        cls: The network's class.
        folder: The folder; if it has only a half-precision variant, that is loaded.
        dtype: The network's precision.
        wanted: The variant to load if the folder has it.
        options: More arguments of `cls.from_pretrained`.

    Raises:
        DraftuneError: The network can't be loaded, or weights are missing or have another shape. The libraries only
            warn about these weights and initialize them at random.
    """
    if (mode := fake_mode()) is not None:
        return config_only(cls, folder, dtype, mode)
    if (variant := weights_variant(folder, wanted)) is not None:
        options["variant"] = variant
    options = {"ignore_mismatched_sizes": True, **options, "use_safetensors": True, "output_loading_info": True}
    try:
        with silence_libraries():
            # `torch_dtype` is the name that all versions of both libraries accept.
            network, info = cls.from_pretrained(folder, torch_dtype=dtype, **options)
            if not getattr(network, "is_quantized", False):
                cast(network, dtype=dtype)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"no {cls.__name__} in {str(folder)!r}: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise DraftuneError(f"the weights in {str(folder)!r} lack {len(missing)} tensors, such as {missing[0]}")
    if misshapen := list(info["mismatched_keys"]):
        # A name, or in some versions a tuple of the name and both shapes.
        name = misshapen[0] if isinstance(misshapen[0], str) else misshapen[0][0]
        raise DraftuneError(f"the weights in {str(folder)!r} have another shape than in their config: {name}")
    return network


def config_only(cls: Any, folder: Path, dtype: torch.dtype, mode: Any) -> Any:
    """Build a network from the config in a folder, with fake tensors. Raises DraftuneError if it can't be read."""
    try:
        with silence_libraries(), mode:
            return cast(from_config(cls, folder), dtype=dtype)
    except Exception as error:
        raise DraftuneError(f"no {cls.__name__} in {str(folder)!r}: {first_line(error)}") from error


def saved_dtype(folder: Path, wanted: str | None = None) -> torch.dtype:
    """Return the precision of a folder's safetensors: a half precision if all weights have it, or float32."""
    try:
        dtypes = set()
        for path in weights_files(folder, wanted):
            with safe_open(path, "pt") as file:
                dtypes |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return torch.float32  # loading the file raises the error
    return HALVES.get("".join(dtypes - WHOLE), torch.float32)


def cast(network: Any, **options: Any) -> Any:
    """Move or cast a network in place, as by `network.to(**options)`, and return it.

    Tables that a network of transformers computes, such as rotary frequencies, keep their precision. transformers loads
    them so too: in half precision, positions would be inexact. They are buffers that no file holds.
    """
    from transformers import PreTrainedModel

    tables = []
    if isinstance(network, PreTrainedModel):
        tables = [(m, name, m._buffers[name]) for m in network.modules() for name in m._non_persistent_buffers_set]
    network.to(**options)
    for module, name, table in tables:
        if table is not None:
            module._buffers[name] = table.to(options.get("device", table.device))
    return network


def build_part(
    cls: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Build a network of transformers from its config and state dict, in evaluation mode, parameters in `dtype`."""
    if (mode := fake_mode()) is not None:
        with silence_libraries(), mode:
            return cast(cls(config, **options).eval(), dtype=dtype)
    with silence_libraries():
        network = cls.from_pretrained(None, config=config, state_dict=state, torch_dtype=dtype, **options)
        return cast(network, dtype=dtype)


def load_tokenizer(cls: Any, folder: Path, vocabulary: int, at_least: int = 1) -> Any:
    """Load a tokenizer of transformers from a folder.

    Args:
        cls: The tokenizer's class.
        folder: The folder.
        vocabulary: The size of the network's vocabulary, the maximal number of tokens.
        at_least: The minimal number of tokens.

    Raises:
        DraftuneError: The tokenizer can't be loaded or its size is out of range. It would belong to another network,
            and scores would silently be wrong.
    """
    try:
        with silence_libraries():
            tokenizer = cls.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise DraftuneError(f"the tokenizer in {str(folder)!r} needs: pip install sentencepiece protobuf") from error
    except Exception as error:
        raise DraftuneError(f"no tokenizer in {str(folder)!r}: {first_line(error)}") from error
    if not at_least <= len(tokenizer) <= vocabulary:
        raise DraftuneError(
            f"the tokenizer in {str(folder)!r} belongs to another network: it has {len(tokenizer)} tokens, not "
            f"{vocabulary}"
        )
    return tokenizer


def tokenized(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    """Return the token ids and the mask of texts, padded or truncated to `length`, each `[B, length]`."""
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")


class Truncation(NamedTuple):
    """The number of texts that a text encoder truncates.

    Attributes:
        reader: The name of the encoder or the reward, for messages.
        limit: The encoder's maximal number of tokens, including special tokens.
        cut: The number of longer texts.
    """

    reader: str
    limit: int
    cut: int


def text_tokenizer(processor: Any) -> Any:
    """Return the tokenizer of a processor of texts and images; a tokenizer itself is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def truncation(reader: str, tokenizer: Any, texts: Sequence[str], limit: int) -> Truncation:
    """Count the texts with more tokens than an encoder's limit."""
    with silence_libraries():  # the tokenizer warns about texts longer than its own limit
        tokens = text_tokenizer(tokenizer)(list(texts)).input_ids if texts else []
    return Truncation(reader, limit, sum(len(ids) > limit for ids in tokens))
