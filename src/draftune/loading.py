"""Loading saved networks, and refusing those that are not all there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError
from draftune.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor


def load_part(cls: Any, folder: Path) -> Any:
    """A network of diffusers or transformers from a folder's safetensors, as float32.

    Raises DraftuneError if weights are missing: the libraries would draw them at random and say so in a warning.
    """
    with quiet():
        network, found = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise DraftuneError(f"the weights in {str(folder)!r} lack {len(missing)} tensors, such as {missing[0]}")
    return network.float()


def build_part(cls: Any, config: Any, state: dict[str, Tensor], **options: Any) -> Any:
    """A network of transformers from a config and all its tensors, as float32 and in evaluation mode."""
    with quiet():
        return cls.from_pretrained(None, config=config, state_dict=state, **options).float()
