"""Build a CLIPTokenizer with a small vocabulary, in the published file layout."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(names: list[str], styles: tuple[str, ...], vocab_size: int = 2304) -> CLIPTokenizer:
    """Train byte-pair merges on the names, so that most words of an emoji name are one token.

    As in CLIP, the alphabet contains all bytes, so that any text can be encoded.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        # Given here, the ends of words have the same numbers in every call, and equally frequent merges the same order.
        special_tokens=[a + "</w>" for a in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(names)) * 2 + list(styles) * 100, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m.split(" ")) for m in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    with TemporaryDirectory() as folder:
        write_files(Path(folder), vocabulary, merges)
        return CLIPTokenizer.from_pretrained(folder)


def write_files(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    """Write the files of a slow CLIPTokenizer."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def load_tokenizer(data: Path) -> CLIPTokenizer:
    """Load the tokenizer that `data.py` built."""
    return CLIPTokenizer.from_pretrained(data / "tokenizer")


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save tokenizer.json for transformers 5, and vocab.json and merges.txt for 4.x and tools based on diffusers."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    write_files(folder, model["vocab"], merges)
