"""Small random vision-language models in the published formats, with tokenizers of bytes and chat templates."""

from __future__ import annotations

import json
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from helpers.published_weights import published_tensors, randomise

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
except ImportError:  # transformers 4
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor as Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor as SmolVLMImageProcessorPil

# What the published templates do for one message of a user with an image and a text.
QWEN_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|Reward|>"]
SMOL_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"]
SMOL_SPECIAL += [f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)] + ["<image>"]
QWEN_PIXELS = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
QWEN_PROCESSOR: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, **QWEN_PIXELS}
SMOL_PROCESSOR: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3")


def byte_tokenizer(folder: Path, special: list[str], chat: str) -> Any:
    """A tokenizer whose tokens are bytes, but for two of a space and a letter, saved with its chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120Y", "\u0120N"]  # a space and a letter
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n\u0120 Y\n\u0120 N\n")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, pad_token=special[0], eos_token=special[2], unk_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_config(vocabulary: int, **more: Any) -> dict[str, Any]:
    config = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {
        "bos_token_id": 256,
        "eos_token_id": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "head_dim": 16,
    }
    return config | more


# So do some versions between 4.57 and 5.23, by mistake: Idefics3, of which SmolVLM is a copy, takes any number.
MERGER = getattr(SmolVLMModel, "inputs_merger", None)
MERGES_BY_PATCH_SIZE = MERGER is not None and "vision_config.patch_size" in getsource(MERGER)


def save_vlm(folder: Path, family: str, seed: int = 0) -> Path:
    """Save a small random model of a family as its publishers do. The test is skipped where it cannot run."""
    if family == "smolvlm" and MERGES_BY_PATCH_SIZE:
        pytest.skip("this transformers needs a multiple of the patch size as SmolVLM's number of image tokens")
    torch.manual_seed(seed)
    if family in ("smolvlm", "idefics3"):
        tokenizer = byte_tokenizer(folder, SMOL_SPECIAL, SMOL_CHAT)
        text = text_config(len(tokenizer), model_type="llama", pad_token_id=0)
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 32, "patch_size": 8}
        image = tokenizer.convert_tokens_to_ids("<image>")
        smol = family == "smolvlm"
        config: Any = (SmolVLMConfig if smol else Idefics3Config)(
            text_config=text, vision_config=vision, scale_factor=2, image_token_id=image, pad_token_id=0
        )
        network: Any = (SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration)(config)
        processor = {"image_processor_type": "SmolVLMImageProcessor", **SMOL_PROCESSOR}
    else:
        tokenizer = byte_tokenizer(folder, QWEN_SPECIAL, QWEN_CHAT)
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        text = text_config(len(tokenizer), rope_scaling=rope, rope_theta=1e4)
        ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
        ids |= {f"vision_{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{k}|>") for k in ("start", "end")}
        vision = {"depth": 3, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
        if family == "qwen2_vl":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
            network = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
        elif family == "qwen2_5_vl":
            vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 32}
            vision |= {"fullatt_block_indexes": [1]}
            network = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
            )
        else:
            vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
            vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
            network = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
        processor = {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PROCESSOR}
    randomise(network, seed).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def official_inputs(folder: Path, image: Image.Image, text: str, **changes: Any) -> dict[str, Tensor]:
    """What transformers' processor makes of an image and a chat with one placeholder."""
    # transformers' processors need packages for videos that are not installed here; these are their steps for images.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "preprocessor_config.json").read_text()) | changes
    if config.pop("image_processor_type") == "Qwen2VLImageProcessor":
        pixels = Qwen2VLImageProcessorPil(**config)([image], return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod()) // config["merge_size"] ** 2
        words = tokenizer([text.replace("<|image_pad|>", "<|image_pad|>" * count)], return_tensors="pt")
        kinds = (words["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        return {**words, **pixels, "mm_token_type_ids": kinds}
    pixels = SmolVLMImageProcessorPil(**config)([[image]], return_tensors="pt", return_row_col_info=True)
    rows, columns = pixels.pop("rows")[0][0], pixels.pop("cols")[0][0]
    tokens = get_image_prompt_string(rows, columns, 4, "<fake_token_around_image>", "<image>", "<global-img>")
    return {**tokenizer([text.replace("<image>", tokens)], return_tensors="pt"), **pixels}


def save_hpsv3(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """A small random HPSv3 in one file with the names of transformers 4.45, and the folder of its tokenizer."""
    with torch.device("meta"):
        network = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
    old = {"model.visual.": "visual.", "model.language_model.": "model."}
    layout = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for new, published in old.items():
        layout = {published + n.removeprefix(new) if n.startswith(new) else n: shape for n, shape in layout.items()}
    width = config["text_config"]["hidden_size"]
    layout |= {"rm_head.0.weight": (1024, width), "rm_head.0.bias": (1024,), "rm_head.3.weight": (16, 1024)}
    layout |= {"rm_head.3.bias": (16,), "rm_head.5.weight": (2, 16), "rm_head.5.bias": (2,)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(published_tensors(layout), folder / "HPSv3.safetensors")
    byte_tokenizer(folder / "tokenizer", QWEN_SPECIAL[:-1], QWEN_CHAT)
    return folder / "HPSv3.safetensors", folder / "tokenizer"


def hpsv3_output(
    tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, image: Image.Image, text: str
) -> Tensor:
    """What the package hpsv3 computes from the published tensors: mean and log deviation at its own token [2]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    # qwen_vl_utils resizes to 256 tokens; the processor with its own bounds then leaves the size.
    height, width = smart_resize(image.height, image.width, 28, 256 * 28 * 28, 256 * 28 * 28)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 4096)([resized], return_tensors="pt")
    tokens = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
    chat = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    chat += f"{tokens}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer([chat], return_tensors="pt").input_ids
    network = Qwen2VLModel(Qwen2VLConfig(**config)).eval()
    names = {"visual.": "visual.", "language_model.": "model."}
    network.load_state_dict(
        {
            name: tensors[old + name.removeprefix(new)]
            for new, old in names.items()
            for name in network.state_dict()
            if name.startswith(new)
        }
    )
    # transformers 4.45, which the package needs, numbers the tokens from 0 on if no positions are given.
    states = network(
        input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1), **pixels
    ).last_hidden_state[0]
    x = states[ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")][0]
    for layer in (0, 3, 5):
        x = linear(x if layer == 0 else x.relu(), tensors[f"rm_head.{layer}.weight"], tensors[f"rm_head.{layer}.bias"])
    return x
