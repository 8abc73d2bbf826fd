"""Vision-language models of transformers that read an image with a gradient and answer a question about it."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draftune.errors import DraftuneError
from draftune.models.quantization import BACKENDS, quantize_linear
from draftune.rewards.clip import model_type
from draftune.rewards.vlm_images import QwenImages, SmolImages, read_images
from draftune.rewards.weights import find_network
from draftune.utils.converted_linear import ConvertedLinear
from draftune.utils.loading import load_part, load_tokenizer

FAMILIES = {
    "qwen2_vl": ("qwen", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("qwen", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("qwen", "Qwen3VLForConditionalGeneration"),
    "smolvlm": ("smol", "SmolVLMForConditionalGeneration"),
    "idefics3": ("smol", "Idefics3ForConditionalGeneration"),
}
"""The image preprocessing and the class in transformers by the `model_type` of the configs."""


def dtype_of(precision: str | None) -> torch.dtype:
    """Return the dtype that a network is loaded in: bfloat16 also for quantized weights."""
    return torch.float32 if precision in (None, "no") else torch.bfloat16


def find_model(model: str, option: str = "the reward's model=") -> Path:
    """Return the folder of a vision-language model.

    Raises:
        DraftuneError: There is none, or it is of another kind.
    """
    folder = find_network(model, option)
    if (kind := model_type(folder)) not in FAMILIES:
        raise DraftuneError(f"{str(folder)!r} is a {kind} model; {option} takes {', '.join(FAMILIES)}")
    return folder


class VisionLanguageModel(nn.Module):
    """A vision-language model with its tokenizer, chat template and a differentiable preprocessing.

    If a gradient is needed, the blocks of both transformers are checkpointed: their activations are computed again in
    the backward pass.
    """

    def __init__(
        self, model: Any, tokenizer: Any, images: QwenImages | SmolImages, precision: str | None = None
    ) -> None:
        super().__init__()
        if precision in BACKENDS:
            # The output layer is read in parts.
            quantize_linear(model, precision, torch.bfloat16, [model.lm_head])
        self.model = model
        self.tokenizer = tokenizer
        self.images = images
        self.blocks: list[Any] = [block for block in model.modules() if is_block(block)]
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    @classmethod
    def from_folder(cls, folder: Path, precision: str | None = None, max_side: int = 0) -> VisionLanguageModel:
        """Load a saved model.

        Args:
            folder: Its folder.
            precision: See `load_in_precision`.
            max_side: See `read_images`.

        Raises:
            DraftuneError: It can't be read, or has no chat template.
        """
        import transformers

        family, name = FAMILIES[model_type(folder)]
        images = read_images(folder, family, max_side)
        model = load_part(getattr(transformers, name), folder, dtype_of(precision)).eval()
        return cls(model, read_tokenizer(folder, model.config.text_config.vocab_size), images, precision)

    def prompt(self, question: str) -> str:
        """Return the chat of an image and a question, up to where the answer begins, with one placeholder."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text

    def placeholders(self, grid: tuple[int, int]) -> str:
        """Return what replaces the placeholder of an image whose preprocessing returned these rows and columns."""
        rows, columns = grid
        token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        if isinstance(self.images, QwenImages):
            return token * (rows * columns // self.images.merge**2)
        vision, around = self.model.config.vision_config, "<fake_token_around_image>"
        # The connector joins squares of scale_factor x scale_factor patches to one token.
        tokens = token * ((vision.image_size // vision.patch_size) ** 2 // self.model.config.scale_factor**2)
        whole = f"{around}<global-img>{tokens}{around}"
        if rows == 0:
            return whole
        lines = (
            "".join(f"{around}<row_{row + 1}_col_{column + 1}>{tokens}" for column in range(columns))
            for row in range(rows)
        )
        return "\n".join(lines) + f"\n\n{whole}"

    def hidden(self, image: Tensor, text: str, sequential: bool = False) -> tuple[Tensor, Tensor]:
        """Read an image and a chat.

        Args:
            image: The image [1, 3, H, W] in [0, 1].
            text: The chat, with one placeholder for the image.
            sequential: Whether the tokens are numbered 0 to L - 1, those of the image too, instead of by the positions
                of patches in the image.

        Returns:
            The token ids [L], and the last hidden states [L, D].
        """
        pixels, grid = self.images(image)
        token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        if text.count(token) != 1:
            raise DraftuneError(f"a question or prompt must not contain {token!r}, which stands for the image")
        expanded = text.replace(token, self.placeholders(grid))
        ids = torch.tensor([self.tokenizer(expanded).input_ids], device=image.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if isinstance(self.images, QwenImages):
            inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *grid]], device=image.device)}
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        else:
            inputs["pixel_values"] = pixels[None]
        if sequential:
            inputs["position_ids"] = torch.arange(ids.shape[1], device=image.device).expand(3, 1, -1)
        for block in self.blocks:
            # transformers checkpoints blocks in training mode only. The layers in them stay in evaluation mode.
            block.training = torch.is_grad_enabled() and image.requires_grad
        return ids[0], self.model.model(**inputs).last_hidden_state[0]

    def next_token(self, image: Tensor, text: str, tokens: list[int] | None = None) -> Tensor:
        """Return the logits of the token after a chat, in float32 or higher.

        Args:
            image: The image [1, 3, H, W] in [0, 1].
            text: The chat, with one placeholder for the image.
            tokens: The tokens whose logits are returned; None for the whole vocabulary.
        """
        state = self.hidden(image, text)[1][-1:]
        state = state.to(torch.promote_types(state.dtype, torch.float32))
        weight = self.model.lm_head.weight
        rows = [weight[tokens]] if tokens else weight.split(2**14)  # each part is converted to float32 for its product
        return torch.cat([ConvertedLinear.apply(state, part, None) for part in rows], -1)[0]  # type: ignore[no-untyped-call]

    def first_token(self, text: str, answer: str) -> int:
        """Return the first token of an answer after a text.

        Raises:
            DraftuneError: The answer is empty, or its beginning and the end of the text are one token.
        """
        before, after = self.tokenizer(text).input_ids, self.tokenizer(text + answer).input_ids
        if len(after) <= len(before) or after[: len(before)] != before:
            raise DraftuneError(f"the answer {answer!r} has no token of its own for this model's tokenizer")
        return int(after[len(before)])


def is_block(module: nn.Module) -> bool:
    """Return whether transformers can checkpoint a module as a whole."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Load the tokenizer in a folder, with the chat template of the folder's processor if it has none of its own."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(AutoTokenizer, folder, vocabulary)
    if not tokenizer.chat_template:
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))
            tokenizer.chat_template = saved["chat_template"]
    if not tokenizer.chat_template:
        raise DraftuneError(f"{str(folder)!r} has no chat template: it needs chat_template.jinja or chat_template.json")
    return tokenizer
