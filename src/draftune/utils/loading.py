"""Loading saved networks and tokenizers, and refusing those that are not all there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftune.errors import DraftuneError, out_of_memory
from draftune.utils.quiet import quiet

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""One of these holds a tokenizer's words; without any, the library makes one that knows none, without a word."""
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
"""As safetensors calls the precisions, and what has none."""


WEIGHTS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call a part's weights."""
VARIANTS = ("fp16", "bf16")
"""What stands in the names of weights that were saved a second time, or only, in half precision."""


def weights_variant(folder: Path) -> str | None:
    """Return the variant to read from a folder that has no plain weights, as "fp16"; None where there are plain ones.

    A variant is one file, diffusion_pytorch_model.fp16.safetensors, or several with an index of that name.
    """
    for variant in (None, *VARIANTS):
        dot = f".{variant}" if variant else ""
        for stem in WEIGHTS:
            if (folder / f"{stem}{dot}.safetensors").is_file():
                return variant
            if (folder / f"{stem}.safetensors.index{dot}.json").is_file():
                return variant
    return None


def weights_files(folder: Path) -> list[Path]:
    """Return the safetensors that are read of a folder: those of its variant, or the plain ones."""
    found = {path: next((v for v in VARIANTS if f".{v}" in path.name), None) for path in folder.glob("*.safetensors")}
    variant = weights_variant(folder)
    return [path for path, its in found.items() if its == variant] or list(found)


def load_part(cls: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A network of diffusers or transformers from a folder's safetensors, in this precision.

    Raises DraftuneError if it can't be loaded, or weights are missing or of another shape: the libraries would draw
    these at random and say so in a warning. Where a folder has only a variant in half precision, that is read.
    """
    if (variant := weights_variant(folder)) is not None:
        options["variant"] = variant
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            # By the name that all versions of both libraries know.
            network, found = cls.from_pretrained(folder, torch_dtype=dtype, **options)
            network = network.to(dtype)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftuneError(f"no {cls.__name__} in {str(folder)!r}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise DraftuneError(f"the weights in {str(folder)!r} lack {len(missing)} tensors, such as {missing[0]}")
    if misshapen := list(found["mismatched_keys"]):
        # Some versions name the tensors, others give their two shapes as well.
        name = misshapen[0] if isinstance(misshapen[0], str) else misshapen[0][0]
        raise DraftuneError(f"the weights in {str(folder)!r} have another shape than their config says: {name}")
    return network


def saved_dtype(folder: Path) -> torch.dtype:
    """The precision of a folder's safetensors: a half one where all of them are of that one, else float32."""
    try:
        found = set()
        for path in weights_files(folder):
            with safe_open(path, "pt") as file:
                found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return torch.float32  # loading them says what is wrong
    return HALVES.get("".join(found - WHOLE), torch.float32)


def build_part(cls: Any, config: Any, state: dict[str, Tensor], **options: Any) -> Any:
    """A network of transformers from a config and all its tensors, as float32 and in evaluation mode."""
    with quiet():
        return cls.from_pretrained(None, config=config, state_dict=state, **options).float()


def load_tokenizer(cls: Any, folder: Path, vocabulary: int, at_least: int = 1) -> Any:
    """A tokenizer of transformers from a folder.

    Raises DraftuneError if it can't be loaded, or has more tokens than the network's vocabulary, or less than
    `at_least`: it would be another network's, and its scores wrong without a word.
    """
    try:
        with quiet():
            tokenizer = cls.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise DraftuneError(f"the tokenizer in {str(folder)!r} wants: pip install sentencepiece protobuf") from error
    except Exception as error:
        raise DraftuneError(f"no tokenizer in {str(folder)!r}: {first_line(error)}") from error
    if not at_least <= len(tokenizer) <= vocabulary:
        raise DraftuneError(
            f"the tokenizer in {str(folder)!r} is another network's: it has {len(tokenizer)} tokens, not {vocabulary}"
        )
    return tokenizer


def tokenized(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    """Token ids and mask [B, length] of texts: the shorter padded, the longer cut."""
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")


class Truncation(NamedTuple):
    """How many texts are longer than what a text encoder reads of each; it does not see the rest of them."""

    reader: str
    """The encoder or the reward, as a message names it."""
    limit: int
    """Tokens, the special ones included."""
    cut: int


def truncation(reader: str, tokenizer: Any, texts: Sequence[str], limit: int) -> Truncation:
    """Count the texts with more tokens than an encoder's limit."""
    with quiet():  # which warns of the first long text, whatever the encoder reads
        tokens = tokenizer(list(texts)).input_ids if texts else []
    return Truncation(reader, limit, sum(len(ids) > limit for ids in tokens))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
