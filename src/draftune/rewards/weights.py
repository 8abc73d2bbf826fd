"""Where a reward's weights come from: the package, the disk, or the hub; and whether they are all there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError, out_of_memory
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import TOKENIZER_FILES, first_line
from draftune.utils.paths import user_path

FOLDER_FILES = ["*.json", "*.txt", "*.safetensors", "*.model"]


def find_folder(model: str, option: str, patterns: Sequence[str] = FOLDER_FILES) -> Path:
    """The folder of a model: embedded in this package by name, on disk by path, or fetched from the hub by id.

    `option` is what the user would set to point elsewhere; it is named in the message of the DraftuneError that is
    raised when there is no such folder and no network to fetch it.
    """
    if model in EMBEDDED:
        return EMBEDDED[model]
    path = user_path(model)
    if path.is_dir():
        return path
    if not is_hub_id(model):
        raise DraftuneError(f"no folder {model!r}: {option} takes a folder, a hub id or one of {', '.join(EMBEDDED)}")
    from huggingface_hub import snapshot_download

    try:
        return fetch(snapshot_download, model, allow_patterns=list(patterns))
    except Exception as error:
        raise unreachable(model, option, error=error) from error


def find_network(model: str, option: str, tokenizer: bool = True) -> Path:
    """The folder of a transformers model: its config, its weights as safetensors and, where wanted, its tokenizer."""
    folder = find_folder(model, option)
    if is_hub_id(model) and folder != user_path(model) and not any(folder.glob("*.safetensors")):
        # What was fetched before, for its tokenizer perhaps, is not all of it.
        raise unreachable(model, option)
    if not (folder / "config.json").is_file():
        raise DraftuneError(f"{model!r} is not the folder of a transformers model: it has no config.json ({option})")
    if not any(folder.glob("*.safetensors")):
        raise DraftuneError(f"{model!r} holds no .safetensors file; other formats are not read ({option})")
    if tokenizer:
        has_tokenizer(folder, model, option)
    return folder


def find_tokenizer(model: str, option: str) -> Path:
    """The folder of a tokenizer; of a model on the hub, the tokenizer's files alone are fetched."""
    folder = find_folder(model, option, ["*token*", "vocab*", "merges.txt", "*.model", "config.json"])
    return has_tokenizer(folder, model, option)


def has_tokenizer(folder: Path, model: str, option: str) -> Path:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DraftuneError(f"{model!r} has no tokenizer: one of {', '.join(TOKENIZER_FILES)} is wanted ({option})")
    return folder


def find_file(source: str | Path, option: str, hub: tuple[str, str] | None = None, url: str = "") -> Path:
    """A weights file on disk or, where `source` is the name of one in `hub` (id, file name), fetched from there.

    Raises DraftuneError that says what to download, from where, and that `option` takes its path.
    """
    path = user_path(source)
    if path.is_file():
        return path
    if hub is None or str(source) != hub[1]:
        have = f": download {url}, where there is a network," if url else f": {option} takes the path of the file"
        raise DraftuneError(f"no weights at {str(source)!r}{have}" + (f" and give its path to {option}" if url else ""))
    from huggingface_hub import hf_hub_download

    try:
        return fetch(hf_hub_download, *hub)
    except Exception as error:
        raise unreachable(hub[0], option, hub[1], error) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt, .pth or .bin file that holds nothing but tensors.

    torch's weights-only loading refuses every file that would run code. Raises DraftuneError for anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        # Of a damaged pickle, nearly every kind of exception can come.
        kind = "safetensors" if path.suffix == ".safetensors" else "weights"
        raise DraftuneError(
            f"{str(path)!r} is not a readable {kind} file: a web page, half a download, or something that holds code? "
            f"Nothing in it was run ({first_line(error)})"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items()
    ):
        raise DraftuneError(f"{str(path)!r} holds no table of tensors")
    return content


class KeyMap:
    """A documented map from the tensors' names in a transformers network to those in a published file.

    Rules are (pattern of our name, published name, operation), tried in their order; what a pattern captures stands in
    the published name as \\1, \\2. Operations: "" as it is, "transposed", or "1/3" for the first third of the rows.
    """

    def __init__(self, *rules: tuple[str, str, str]) -> None:
        self.rules = [(re.compile(pattern), published, operation) for pattern, published, operation in rules]

    def find(self, name: str) -> tuple[str, str]:
        """The published name of one of our tensors, and the operation that makes it ours."""
        for pattern, published, operation in self.rules:
            if match := pattern.fullmatch(name):
                return match.expand(published), operation
        raise KeyError(name)

    def layout(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the published file whose tensors fill this network."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in network.state_dict().items():
            published, operation = self.find(name)
            shape = tuple(tensor.shape)
            if operation == "transposed":
                shape = shape[::-1]
            elif operation:
                shape = (int(operation[-1]) * shape[0], *shape[1:])
            shapes[published] = shape
        return shapes

    def read(
        self, network: nn.Module, tensors: Mapping[str, Tensor], source: Path, unused: str = r"(?!)"
    ) -> dict[str, Tensor]:
        """The network's own tensors by their names in it, from those of a published file.

        `unused`: a pattern of the names of tensors that the file may have and the network does not need. Raises
        DraftuneError that names a tensor that is missing, extra or of another shape.
        """
        kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(unused, name)}
        check_layout(self.layout(network), kept, source)
        state = {}
        for name in network.state_dict():
            published, operation = self.find(name)
            tensor = kept[published]
            if operation == "transposed":
                tensor = tensor.T
            elif operation:
                part, count = (int(n) for n in operation.split("/"))
                tensor = tensor.chunk(count)[part - 1]
            state[name] = tensor.contiguous()
        return state


def check_layout(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], source: Path) -> None:
    """Raises DraftuneError that names the first tensor that is missing, extra or of another shape."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    problem = ""
    if missing:
        problem = f"lacks {len(missing)} tensors, such as {missing[0]!r}"
    elif extra:
        problem = f"has {len(extra)} tensors too many, such as {extra[0]!r}"
    else:
        for name, shape in wanted.items():
            if tuple(found[name].shape) != tuple(shape):
                problem = f"holds {name!r} of shape {tuple(found[name].shape)} where {tuple(shape)} is wanted"
                break
    if problem:
        raise DraftuneError(f"{str(source)!r} holds other weights than the ones wanted here: it {problem}")
