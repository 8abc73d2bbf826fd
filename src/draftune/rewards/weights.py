"""Locate and read a reward's weights: in this package, on disk or on the hub; check that they are complete."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError, first_line, out_of_memory
from draftune.utils.hub import fetch, is_hub_id, unreachable
from draftune.utils.loading import TOKENIZER_FILES
from draftune.utils.paths import user_path
from draftune.utils.weightless import fake_mode

CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
FOLDER_FILES = [*CONFIG_FILES, "*.safetensors"]


def find_folder(model: str, option: str, patterns: Sequence[str] = FOLDER_FILES) -> Path:
    """Return the folder of a model.

    Args:
        model: The name of a model in this package, a path, or a hub id, which is downloaded.
        option: The option that the user would change, for error messages.
        patterns: The files to download from the hub.

    Raises:
        DraftuneError: if there is no such folder, or it can't be downloaded.
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
    """Return the folder of a transformers model with config, safetensors weights and, by default, a tokenizer.

    Arguments and errors are those of `find_folder`.
    """
    if fake_mode() is not None:
        return find_folder(model, option, CONFIG_FILES)
    folder = find_folder(model, option)
    if is_hub_id(model) and folder != user_path(model) and not any(folder.glob("*.safetensors")):
        # The download cache may have only some files of it, such as the tokenizer.
        raise unreachable(model, option)
    if not (folder / "config.json").is_file():
        raise DraftuneError(f"{model!r} is not the folder of a transformers model: it has no config.json ({option})")
    if not any(folder.glob("*.safetensors")):
        raise DraftuneError(f"{model!r} has no .safetensors file; other formats are not read ({option})")
    if tokenizer:
        has_tokenizer(folder, model, option)
    return folder


def find_tokenizer(model: str, option: str) -> Path:
    """Return the folder of a tokenizer; from the hub, only the tokenizer's files are downloaded."""
    folder = find_folder(model, option, ["*token*", "vocab*", "merges.txt", "*.model", "config.json"])
    return has_tokenizer(folder, model, option)


def has_tokenizer(folder: Path, model: str, option: str) -> Path:
    """Return the folder. Raises DraftuneError if it has no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DraftuneError(f"{model!r} has no tokenizer: it needs one of {', '.join(TOKENIZER_FILES)} ({option})")
    return folder


def find_file(
    source: str | Path, option: str, hub: tuple[str, str] | None = None, url: str = "", usage: str = ""
) -> Path:
    """Return the path of a weights file.

    Args:
        source: A path, or the file name in `hub`, which is then downloaded.
        option: The option that takes the path, for error messages.
        hub: The hub id and the file's name there.
        url: Where the file is published, if it has to be downloaded by hand.
        usage: The reward as it is written with the file.

    Raises:
        DraftuneError: if there is no such file; the message names the download.
    """
    path = user_path(source)
    if path.is_file() or fake_mode() is not None:
        return path
    if hub is None or str(source) != hub[1]:
        advice = f"{option} takes the path of the file"
        if url:
            advice = f"download it yourself from {url} and give its path to {option}"
        if usage:
            advice += f", as in {usage}"
        raise DraftuneError(f"no weights at {str(source)!r}: {advice}")
    from huggingface_hub import hf_hub_download

    try:
        return fetch(hf_hub_download, *hub)
    except Exception as error:
        raise unreachable(hub[0], option, hub[1], error) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a .pt, .pth or .bin file that has nothing but tensors.

    Raises:
        DraftuneError: for any other file. torch's weights-only loading refuses files that would run code.
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
        # A damaged pickle can raise nearly any exception.
        kind = "safetensors" if path.suffix == ".safetensors" else "weights"
        raise DraftuneError(
            f"{str(path)!r} is not a readable {kind} file: it may be a web page, incomplete, or contain code. "
            f"No code in it was run ({first_line(error)})"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items()
    ):
        raise DraftuneError(f"{str(path)!r} has no table of tensors")
    return content


def load_into(network: nn.Module, path: Path) -> None:
    """Load the tensors of a weights file into a network in float32; inside `without_weights` nothing is loaded.

    Raises:
        DraftuneError: for a tensor that is missing, extra or of another shape.
    """
    if fake_mode() is None:
        tensors = load_tensors(path)
        check_layout({name: tuple(t.shape) for name, t in network.state_dict().items()}, tensors, path)
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


class KeyMap:
    """Maps the names of tensors in a transformers network to those in a published file.

    Rules are (pattern of the network's name, published name, operation); the first that matches applies. Groups of the
    pattern are \\1, \\2 in the published name. Operations: "" for none, "transposed", or "1/3" for the first third of
    the rows.
    """

    def __init__(self, *rules: tuple[str, str, str]) -> None:
        self.rules = [(re.compile(pattern), published, operation) for pattern, published, operation in rules]

    def find(self, name: str) -> tuple[str, str]:
        """Return the published name of a network's tensor, and the operation that converts it. Raises KeyError."""
        for pattern, published, operation in self.rules:
            if match := pattern.fullmatch(name):
                return match.expand(published), operation
        raise KeyError(name)

    def layout(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors that a published file must have for this network."""
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

    def read(self, network: nn.Module, source: Path, unused: str = r"(?!)") -> dict[str, Tensor]:
        """Read a published file and convert its tensors to the network's state dict.

        Inside `without_weights` the network's own tensors are returned.

        Args:
            network: The network, on any device; only names and shapes are used.
            source: The file.
            unused: Pattern of names that the file may have and the network does not need.

        Raises:
            DraftuneError: for a tensor that is missing, extra or of another shape.
        """
        if fake_mode() is not None:
            return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}
        used = {name: tensor for name, tensor in load_tensors(source).items() if not re.fullmatch(unused, name)}
        check_layout(self.layout(network), used, source)
        state = {}
        for name in network.state_dict():
            published, operation = self.find(name)
            tensor = used[published]
            if operation == "transposed":
                tensor = tensor.T
            elif operation:
                part, count = (int(n) for n in operation.split("/"))
                tensor = tensor.chunk(count)[part - 1]
            state[name] = tensor.contiguous()
        return state


def check_layout(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Check names and shapes. Raises DraftuneError that names a tensor that is missing, extra or of another shape."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    problem = ""
    if missing:
        problem = f"lacks {len(missing)} tensors, such as {missing[0]!r}"
    elif extra:
        problem = f"has {len(extra)} unexpected tensors, such as {extra[0]!r}"
    else:
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != tuple(shape):
                problem = f"has {name!r} of shape {tuple(tensors[name].shape)} instead of {tuple(shape)}"
                break
    if problem:
        raise DraftuneError(f"{str(source)!r} has other weights than this network: it {problem}")
