"""Where the files of a model come from, besides its name. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from draftune.errors import DraftuneError
from draftune.utils.paths import user_path

CHECKPOINTS = (".safetensors", ".sft", ".gguf")
"""Endings of checkpoints in one file."""
METADATA = "base_model_options"
"""The metadata key of the options in a LoRA file, as JSON."""


class ModelOptions(NamedTuple):
    """Where the files of a model come from, besides its name.

    Attributes:
        base_pipeline: The pipeline (folder or hub id) of a checkpoint file. It gives the configs, the tokenizers, the
            scheduler, and the networks that are not in the file. None: the one that the file's tensors imply.
        revision: Branch, tag or commit of the hub id; None for the default branch.
        variant: Variant of the weights, such as "fp16"; None for plain weights, or half precision if there are no
            plain ones.
    """

    base_pipeline: str | None = None
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def of(cls, settings: Any) -> ModelOptions:
        """Return the options among settings, which are a mapping or an object; "" counts as None."""
        values = settings if isinstance(settings, Mapping) else vars(settings)
        return cls(*(values.get(name) or None for name in cls._fields))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelOptions:
        """Return the options in a LoRA file's metadata. Raises DraftuneError if they are damaged."""
        try:
            return cls(**{name: str(value) for name, value in json.loads(metadata.get(METADATA, "{}")).items()})
        except (ValueError, AttributeError, TypeError) as error:
            raise DraftuneError(f"the metadata of a LoRA file is damaged: {METADATA} can't be read") from error

    def metadata(self) -> dict[str, str]:
        """Return the options for a LoRA file's metadata, {} if there are none."""
        options = {name: value for name, value in self._asdict().items() if value}
        return {METADATA: json.dumps(options)} if options else {}

    def over(self, others: ModelOptions) -> ModelOptions:
        """Return these options, and those of `others` where these are None."""
        return ModelOptions(*(mine or other for mine, other in zip(self, others, strict=True)))

    def check(self, model: str) -> None:
        """Check that the options apply to a model. Nothing is read but the kind of its path.

        Raises:
            DraftuneError: An option has no meaning for this model, or is malformed.
        """
        if not any(self):
            return
        path = user_path(model)
        is_file = path.is_file() or (not path.is_dir() and path.suffix.lower() in CHECKPOINTS)
        if self.base_pipeline and not is_file:
            raise DraftuneError(
                f"base_pipeline={self.base_pipeline!r} (--base-pipeline) needs a checkpoint file "
                f"({', '.join(CHECKPOINTS)}), and the model {model!r} is none"
            )
        if self.base_pipeline and user_path(self.base_pipeline).is_file():
            raise DraftuneError(f"base_pipeline must be a folder or a hub id, {self.base_pipeline!r} is a file")
        source = (self.base_pipeline or "") if is_file else model
        if self.revision and (source == "emoji" or (source and user_path(source).exists())):
            raise DraftuneError(
                f"revision={self.revision!r} (--revision) is for hub ids, and {source!r} is on this machine"
            )
        if self.variant and not re.fullmatch(r"\w[\w-]*", self.variant):
            raise DraftuneError(f"variant must be a part of file names such as fp16, not {self.variant!r}")


NO_OPTIONS = ModelOptions()


def is_checkpoint(model: str) -> bool:
    """Return whether a model's name is the path of an existing file, which is loaded as a checkpoint."""
    try:
        return user_path(model).is_file()
    except (DraftuneError, OSError, ValueError):
        return False


def option_text(options: ModelOptions) -> str:
    """Return the options that select files of a hub id, for error messages: "" or " (revision v2, variant fp16)"."""
    texts = [f"{name} {value}" for name in ("revision", "variant") if (value := getattr(options, name))]
    return f" ({', '.join(texts)})" if texts else ""
