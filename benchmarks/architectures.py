"""Networks and folders of published models, without their weights: each config is checked by its parameter count.

`write_folder` writes what `draftune preflight --count` reads of a pipeline: configs, a scheduler and tokenizers, which
are small but have the published classes. `pipeline` builds a pipeline with random weights on a device.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from torch import nn
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from draftune.assets import EMBEDDED
from draftune.rewards import Reward
from draftune.rewards.clip import ClipEncoder
from draftune.rewards.hpsv2 import LongestEdge
from draftune.utils.weightless import apply_to_tables
from published_configs import MODELS, PARTS, TINY_DECODERS

LETTERS = [*"abcdefghijklmnopqrstuvwxyz.,:", "▁", "Ġ", "Ċ"]
# What the published template of Qwen 3 does for one message of a user.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}"
)
SPECIAL = {
    "t5": ("<pad>", "</s>", "<s>", "<unk>"),
    "gemma": ("<pad>", "<eos>", "<bos>", "<unk>"),
    "qwen": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
}
"""The special tokens: padding, end, start and, if there is one, the token of unknown text."""
TOKENIZERS = {"clip": "CLIPTokenizer", "t5": "T5TokenizerFast", "gemma": "GemmaTokenizerFast", "qwen": "Qwen2Tokenizer"}
"""The class of each kind of tokenizer."""
CHANGES: dict[str, dict[str, Any]] = {}
"""Arguments that replace those of PARTS, by the name of a network; its parameter count is then not the published one.

`small_configs.SHALLOW` and `TINY` are such changes.
"""


def class_of(kind: str) -> Any:
    """Return a class of diffusers or transformers."""
    return getattr(diffusers if hasattr(diffusers, kind) else transformers, kind)


def entry(kind: str) -> list[str]:
    """Return a class as an entry of model_index.json."""
    return ["diffusers" if hasattr(diffusers, kind) else "transformers", kind]


def empty(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Build a network of PARTS with parameters on the device "meta"; its buffers have their values.

    Raises:
        ValueError: Its parameter count is not the published one.
    """
    part = PARTS[name]
    kind, config = class_of(part.kind), part.config | CHANGES.get(name, {})
    with init_empty_weights():
        network = kind(**config) if entry(part.kind)[0] == "diffusers" else kind(kind.config_class(**config))
    if hasattr(network, "tie_weights"):
        network.tie_weights()  # `init_empty_weights` gives each name a tensor of its own
    count = sum(parameter.numel() for parameter in network.parameters())
    if count != part.parameters and name not in CHANGES:
        raise ValueError(f"{name} has {count:,} parameters, not {part.parameters:,}")
    return network.to(dtype)


def write_folder(model: str, folder: Path) -> Path:
    """Write the folder of a pipeline of MODELS without weights, and return it.

    Raises:
        ValueError: A network's parameter count is not the published one.
    """
    published = MODELS[model]
    scheduler, options = published.scheduler
    index = {"_class_name": published.kind, "scheduler": entry(scheduler), **(published.index_entries or {})}
    for part, name in published.networks.items():
        write_config(name, folder / part)
        index[part] = entry(PARTS[name].kind)
    for part, kind in published.tokenizers.items():
        write_tokenizer(kind, folder / part)
        index[part] = entry(TOKENIZERS[kind])
    class_of(scheduler)(**options).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_config(name: str, folder: Path) -> None:
    """Write the config of a network of PARTS."""
    network = empty(name)
    if entry(PARTS[name].kind)[0] == "diffusers":
        network.save_config(folder)
    else:
        network.config.save_pretrained(folder)


def write_tokenizer(kind: str, folder: Path) -> None:
    """Write a small tokenizer: CLIP's is the embedded model's, the tokens of all others are letters.

    A prompt has more tokens than with the published tokenizer.
    """
    if kind == "clip":
        tokenizer().save_pretrained(folder)
        return
    special = SPECIAL[kind]
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=False))
    if kind == "qwen":
        folder.mkdir(parents=True)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*special, *LETTERS])}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        letters = transformers.Qwen2Tokenizer.from_pretrained(folder, **names, unk_token=special[0])
        letters.chat_template = CHAT
    else:
        pieces = Tokenizer(
            Unigram([(token, -float(i >= len(special))) for i, token in enumerate([*special, *LETTERS])], 3)
        )
        letters = PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=512, **names)
    letters.save_pretrained(folder)


def write_clip(folder: Path) -> Path:
    """Write the folder of a reward with ViT-H/14, for `hpsv2` and `pickscore`: config, preprocessing and tokenizer.

    The vocabulary has the published size, which `hpsv2` checks.
    """
    write_config("CLIP ViT-H/14", folder)
    words = {word: i for i, word in enumerate(tokenizer().get_vocab())}
    size = PARTS["CLIP-L text"].config["vocab_size"]
    vocabulary = words | {f"word {i}": i for i in range(len(words), size)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def write_tiny_decoder(name: str, folder: Path) -> Path:
    """Write the folder of a tiny decoder of TINY_DECODERS without weights."""
    diffusers.AutoencoderTiny(latent_channels=TINY_DECODERS[name]).save_config(folder)
    return folder


def architecture(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Build a network of PARTS with random weights on a device, see `filled`.

    Raises:
        ValueError: Its parameter count is not the published one.
    """
    network = empty(name, dtype).eval()
    apply_to_tables(network, lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    return filled(network)


@torch.no_grad()
def filled(network: nn.Module) -> nn.Module:
    """Initialize weights that preserve the scale of activations: N(0, 1 / fan_in), norm weights 1, biases 0."""
    generator = None
    for name, parameter in network.named_parameters():
        generator = generator or torch.Generator(parameter.device).manual_seed(0)
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return network


def tokenizer() -> CLIPTokenizer:
    """Return the embedded model's tokenizer, with CLIP's length of 77 tokens and a smaller vocabulary."""
    return CLIPTokenizer.from_pretrained(EMBEDDED["emoji"] / "tokenizer", model_max_length=77)


def pipeline(model: str, dtype: torch.dtype, device: torch.device | str = "cpu", **networks: Any) -> DiffusionPipeline:
    """Build a pipeline of MODELS with random weights on a device.

    Args:
        model: The hub id.
        dtype: The precision of its networks.
        device: Where they are.
        **networks: Networks that are built already, by component.
    """
    published = MODELS[model]
    scheduler, options = published.scheduler
    parts = {part: name for part, name in published.networks.items() if part not in networks}
    with TemporaryDirectory() as folder:
        for part, kind in published.tokenizers.items():
            write_tokenizer(kind, Path(folder, part))
        tokenizers = {
            part: class_of(TOKENIZERS[kind]).from_pretrained(Path(folder, part))
            for part, kind in published.tokenizers.items()
        }
    made: DiffusionPipeline = class_of(published.kind)(
        **networks,
        **{part: architecture(name, dtype, device) for part, name in parts.items()},
        **tokenizers,
        **{key: None if value == [None, None] else value for key, value in (published.index_entries or {}).items()},
        scheduler=class_of(scheduler)(**options),
    )
    return made


class ViTH(Reward):
    """ViT-H/14 CLIP score in float32, the computation of `hpsv2` and `pickscore`, with random weights."""

    label = "vit-h"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        clip = architecture("CLIP ViT-H/14", torch.float32, device)
        self.clip = ClipEncoder(clip, tokenizer(), LongestEdge(224))

    def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return self.clip.cosine(images, prompts)
