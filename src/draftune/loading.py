"""Loading saved networks, and refusing those that are not all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError
from draftune.quiet import quiet


def load_part(cls: Any, folder: Path) -> Any:
    """A network of diffusers or transformers from a folder's safetensors, as float32.

    Raises DraftuneError if weights are missing: the libraries would draw them at random and say so in a warning.
    """
    with quiet():
        network, found = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise DraftuneError(f"the weights in {str(folder)!r} lack {len(missing)} tensors, such as {missing[0]}")
    return network.float()
