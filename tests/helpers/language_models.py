"""Small random language models that read prompts, with tokenizers of letters and the published chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# What the published template of Qwen 3 does for one message of a user.
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_qwen(folder: Path, layers: int = 2) -> tuple[Any, Qwen3ForCausalLM]:
    """A Qwen3 whose tokens are letters, and its tokenizer."""
    folder.mkdir(parents=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz.,", "Ġ", "Ċ", *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, pad_token=SPECIAL[0], eos_token=SPECIAL[2], unk_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = QWEN
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return tokenizer, Qwen3ForCausalLM(config)


# The published template of Mistral 3 for texts: it starts with the tokenizer's start token.
MISTRAL = "{{ bos_token }}{% for message in messages %}{{ message.role }} {{ message.content[0].text }}{% endfor %}"


def tiny_mistral(layers: int) -> tuple[Any, Mistral3ForConditionalGeneration]:
    """A Mistral 3 whose tokens are letters, and its tokenizer, which stands for the published processor."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces = [(token, 0.0) for token in special] + [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    letters = Tokenizer(Unigram(pieces, unk_id=0))
    letters.pre_tokenizer = Metaspace()
    letters.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **names)
    tokenizer.chat_template = MISTRAL
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**shared, "num_hidden_layers": layers, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}
    vision = {**shared, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "max_position_embeddings": 1024, **text},
        vision_config={"model_type": "pixtral", **vision},
        image_token_index=39,
    )
    return tokenizer, Mistral3ForConditionalGeneration(config)
