"""Prompt embeddings: the prompts of their tests, direct encoding and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftune.models import DiffusionModel
from draftune.models.prompt_embeddings import text_encoders

PROMPTS = ["a cat", "a large red bird on a stone", "a cat and a dog"]


def tensors(condition: Any) -> Iterator[Tensor]:
    if isinstance(condition, Tensor):
        yield condition
    else:
        for item in condition:
            yield from tensors(item)


def same(a: Any, b: Any) -> bool:
    one, other = list(tensors(a)), list(tensors(b))
    return type(a) is type(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, other, strict=True))


def unpadded(condition: Any) -> Any:
    """The tokens of each row that its mask includes; the condition itself if it has no mask of its tokens."""
    if "mask" not in getattr(condition, "_fields", ()) or condition.text.shape[1] != condition.mask.shape[1]:
        return condition
    return [text[mask.bool()] for text, mask in zip(condition.text, condition.mask, strict=True)]


def close(a: Any, b: Any, atol: float) -> bool:
    """Whether the tokens are equal but for rounding: batches of another size may differ in the last bits."""
    pairs = zip(tensors(unpadded(a)), tensors(unpadded(b)), strict=True)
    return all(torch.allclose(x.float(), y.float(), atol=atol) for x, y in pairs)


def direct(model: DiffusionModel, prompts: list[str], negative_prompt: str, guided: bool) -> Any:
    with torch.no_grad(), model.autocast():
        return model.encode(prompts, negative_prompt, guided)


def on_meta(model: DiffusionModel) -> bool:
    return all(p.is_meta for part in text_encoders(model.pipeline).values() for p in part.parameters())


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))
