"""Encode each prompt once, and free the text encoders while the other networks work.

The condition of a batch is built of rows, one for each prompt and one for the negative prompt. Every prompt is encoded
alone, so that its row depends on no other prompt. Rows are stored in main memory and, for models that were loaded from
a folder, on disk (`EmbeddingCache`).

Text encoders are on the device only while prompts are encoded. Those that can be read from files again are then
dropped: a network without weights, on the device "meta", takes their place in the pipeline. If the disk has the rows of
all prompts, they are never read. Text encoders of a user's pipeline are moved to main memory instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from draftune.errors import DraftuneError, out_of_memory
from draftune.models.embedding_cache import NEGATIVE, PROMPT, EmbeddingCache, cache_folder, encoder_identity
from draftune.utils.logging import logger

if TYPE_CHECKING:
    from draftune.models.base import DiffusionModel

Loaders = Mapping[str, Callable[[], nn.Module]]
"""Functions that read a text encoder from its files, by its name in the pipeline."""


def split(condition: Any) -> list[Any]:
    """Split a condition into its rows. Tensors have one row per prompt, and lists one tensor per prompt."""
    if isinstance(condition, Tensor):
        return list(condition.split(1))
    if isinstance(condition, list):
        return [[item] for item in condition]
    return [condition._make(row) for row in zip(*map(split, condition), strict=True)]


def stack(rows: Sequence[Any], masked: bool = False) -> Any:
    """Join rows into a condition, the inverse of `split`.

    Args:
        rows: Tensors `[1, ...]`, lists of a tensor, or named tuples of them.
        masked: Whether tensors with fewer tokens, `[1, tokens, ...]`, are padded with zeros at the end. A named tuple
            with a field `mask` sets it, since its mask then excludes the added tokens.

    Raises:
        ValueError: The rows differ in their number of tokens and have no mask.
    """
    first = rows[0]
    if isinstance(first, list):
        return [item for row in rows for item in row]
    if isinstance(first, tuple):
        masked = "mask" in type(first)._fields  # type: ignore[attr-defined]
        columns = zip(*rows, strict=True)
        return type(first)._make([stack(column, masked) for column in columns])  # type: ignore[attr-defined]
    if len({row.shape for row in rows}) > 1:
        if not masked:
            raise ValueError("prompt embeddings of different length need a mask: name a field of the condition 'mask'")
        most = max(row.shape[1] for row in rows)
        padded = [row.new_zeros(1, most, *row.shape[2:]) for row in rows]
        for target, row in zip(padded, rows, strict=True):
            target[:, : row.shape[1]] = row
        rows = padded
    return torch.cat(list(rows))


def mapped(function: Callable[[Tensor], Tensor], condition: Any) -> Any:
    """Return a condition with the function applied to its tensors."""
    if isinstance(condition, Tensor):
        return function(condition)
    if isinstance(condition, list):
        return [mapped(function, item) for item in condition]
    return condition._make([mapped(function, field) for field in condition])


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return the text encoders of a pipeline, loaded or not, by their names in it."""
    parts = sorted(pipeline.components.items())
    return {name: part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)}


def stored(row: Any) -> Any:
    """Copy a row to main memory, since a slice would hold the memory of all rows."""
    return mapped(lambda tensor: tensor.detach().to("cpu", copy=True).contiguous(), row)


class PromptEmbeddings:
    """The rows of all prompts that a model has encoded, and the text encoders that encode more.

    Args:
        model: The model. Its text encoders may be placeholders without weights if there are `loaders`.
        loaders: Read the text encoders from their files; empty for a user's pipeline.
        folder: The pipeline's folder, for the cache on disk; None for no cache on disk.
    """

    def __init__(self, model: DiffusionModel, loaders: Loaders | None = None, folder: Path | None = None) -> None:
        self.model, self.folder, self.loaders = model, folder, dict(loaders or {})
        self.placeholders = {name: text_encoders(model.pipeline)[name] for name in self.loaders}
        self.by_precision: dict[str, dict[tuple[str, str], Any]] = {}
        self.rounds = 0
        """How often the text encoders were needed."""
        self.is_fake = False
        """Whether the text encoders have fake weights, to count memory; their outputs are not written to disk then."""
        for placeholder in self.placeholders.values():
            placeholder.forward = not_loaded

    def condition(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        """Return what the model's `encode` returns for these arguments, on the model's device."""
        known = self.prepare(prompts, negative_prompt, guided)
        keys = [(PROMPT, prompt) for prompt in prompts]
        if guided:
            keys = [(NEGATIVE, negative_prompt)] * len(prompts) + keys
        # A family without classifier-free guidance has no negative rows.
        rows = [row for row in map(known.__getitem__, keys) if row is not None]
        return mapped(lambda tensor: tensor.to(self.model.device), stack(rows))

    def prepare(
        self, prompts: Sequence[str], negative_prompt: str, guided: bool, device: torch.device | str | None = None
    ) -> dict[tuple[str, str], Any]:
        """Read or encode the prompts that have no row yet, then free the text encoders.

        If the device has no room for the text encoders, they run on the CPU.

        Args:
            prompts: The prompts.
            negative_prompt: Encoded too with guidance.
            guided: Whether guidance is used.
            device: Where the text encoders run; the denoiser's device by default.

        Returns:
            All rows of the present precision.
        """
        rows = self.rows
        wanted = [(PROMPT, prompt) for prompt in dict.fromkeys(prompts)] + [(NEGATIVE, negative_prompt)] * guided
        missing = [item for item in wanted if item not in rows]
        device = torch.device(device or self.model.device)
        cache = self.cache(device) if missing else None
        if cache is not None:
            rows |= {item: row for item in missing for row in cache.read(*item)}
            missing = [item for item in missing if item not in rows]
        if not missing:
            return rows
        if not self.encode_if_they_fit(missing, device):
            # Not where the error is handled, since its traceback holds the text encoders.
            logger.warning(f"the text encoders do not fit into the memory of {device}: they run on the CPU")
            self.encode([item for item in missing if item not in rows], torch.device("cpu"))
        self.rounds += 1
        if cache is not None and not self.is_fake:
            cache.write((item, rows[item]) for item in missing)
        return rows

    def encode_if_they_fit(self, items: Sequence[tuple[str, str]], device: torch.device) -> bool:
        """Encode prompts. Return False if a device other than the CPU has no room for the text encoders."""
        try:
            self.encode(items, device)
        except RuntimeError as error:
            if device.type == "cpu" or not out_of_memory(error):
                raise
            return False
        return True

    def encode(self, items: Sequence[tuple[str, str]], device: torch.device) -> None:
        """Encode prompts one after the other, the first one together with the negative prompt if that is missing."""
        negatives = [text for kind, text in items if kind == NEGATIVE]
        prompts = [text for kind, text in items if kind == PROMPT] or [""]
        known = self.rows
        with self.loaded(device), torch.no_grad(), self.model.autocast():
            for prompt in prompts:
                rows = split(self.model.encode([prompt], "".join(negatives), bool(negatives)))
                known[PROMPT, prompt] = stored(rows[-1])
                for negative in negatives:
                    # One row alone: the family has no classifier-free guidance.
                    known[NEGATIVE, negative] = stored(rows[0]) if len(rows) > 1 else None
                negatives = []

    def holds(self, part: nn.Module) -> bool:
        """Return whether a network is one of the text encoders, which are on the device only to encode prompts."""
        return any(part is encoder for encoder in text_encoders(self.model.pipeline).values())

    def cache(self, device: torch.device) -> EmbeddingCache | None:
        """Return the cache on disk for text encoders that run on this device, if there is one."""
        place = cache_folder() if self.folder is not None else None
        identity = encoder_identity(self.model, self.folder, device) if self.folder is not None and place else None
        return EmbeddingCache(place, identity, type(self.model)) if place and identity else None

    @property
    def rows(self) -> dict[tuple[str, str], Any]:
        """Return the rows of the present precision. It is slow: the denoiser's `dtype` walks through its modules."""
        return self.by_precision.setdefault(f"{self.model.autocast_dtype} {self.model.denoiser.dtype}", {})

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[None]:
        """Have the text encoders on a device inside the block, where `Family.device` is that device."""
        model = self.model
        try:
            self.load()
            for part in text_encoders(model.pipeline).values():
                model.place(part, device)
                self.is_fake = self.is_fake or any(isinstance(weight, FakeTensor) for weight in part.parameters())
            model.encoding_device = device
            yield
        finally:
            model.encoding_device = None
            self.free()

    def load(self) -> None:
        """Read the text encoders from their files, unless they are in memory."""
        for name, load in self.loaders.items():
            if getattr(self.model.pipeline, name) is self.placeholders[name]:
                setattr(self.model.pipeline, name, load().eval().requires_grad_(False))

    def free(self) -> None:
        """Drop the text encoders, or move them to main memory if they can't be read again or were read twice."""
        for name, part in text_encoders(self.model.pipeline).items():
            # If they were needed again, they will be needed more often, and reading takes longer than moving.
            if name in self.loaders and not self.rounds:
                setattr(self.model.pipeline, name, self.placeholders[name])
            elif part is not self.placeholders.get(name):
                part.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def not_loaded(*args: Any, **options: Any) -> Any:
    """Raise the error for a call of a text encoder that has no weights."""
    raise DraftuneError("the text encoders of this pipeline are not in memory: call load_text_encoders() of its model")
