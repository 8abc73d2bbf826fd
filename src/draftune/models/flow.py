"""What flow-matching families share: a transformer that predicts the velocity, Euler steps, a shifted schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.models.base import DiffusionModel
from draftune.models.common import decode_vae
from draftune.models.needs import (
    Need,
    autoencoder_needs,
    check_flow,
    check_levels,
    check_parts,
    equal,
    of_class,
    one_of,
    reader_needs,
)
from draftune.sampling.schedule import Schedule, flow_schedule
from draftune.utils.quiet import silence_libraries


def keep_wide(t5: nn.Module) -> None:
    """Convert to float32 the layers of T5 whose outputs overflow in float16, as transformers does."""
    with silence_libraries():
        for name, layer in t5.named_modules():
            if name.endswith(".wo"):
                layer.float()


def unused_context_layers(blocks: Sequence[nn.Module], name: str) -> frozenset[str]:
    """Return the layers of the last block that compute the text tokens for a next block, which does not exist.

    The text's keys and values do not belong to them: image tokens attend to these in the last block too.
    """
    last = len(blocks) - 1
    unused = ("attn.add_q_proj", "attn.to_add_out", "ff_context.")
    layers = dict(blocks[last].named_modules()) if blocks else {}
    # peft moves a layer that has a LoRA to LAYER.base_layer.
    linear = (layer.removesuffix(".base_layer") for layer, module in layers.items() if isinstance(module, nn.Linear))
    return frozenset(f"{name}.{last}.{layer}" for layer in linear if layer.startswith(unused))


class Flow(DiffusionModel):
    """A pipeline with transformer, text encoders, autoencoder and a FlowMatchEulerDiscreteScheduler."""

    lora_prefix = "transformer"
    encoders: tuple[str, ...]
    """The text encoders that the pipeline must have."""
    t5 = ""
    """The name of the T5 text encoder, which the pipeline may lack unless it is one of `encoders`; empty without T5."""
    network: str
    """The class name of the transformer."""

    @property
    def required(self) -> Sequence[str]:  # type: ignore[override]
        tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in self.encoders]
        return ("transformer", *self.encoders, *tokenizers, "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        transformer, vae = self.denoiser, self.pipeline.vae
        yield from autoencoder_needs(vae, shifted=True)
        yield of_class("transformer", transformer, (self.network,))
        channels = vae.config.latent_channels
        inputs, outputs = self.read_channels(channels), transformer.config.out_channels
        why = f"the transformer's input channels for {channels} latent channels"
        yield equal("transformer.in_channels", transformer.config.in_channels, inputs, why)
        yield one_of("transformer.out_channels", outputs, (inputs, None), "equal to its in_channels")
        t5, width = getattr(self.pipeline, self.t5), transformer.config.joint_attention_dim
        if t5 is not None:
            part = self.t5.replace("text_encoder", "tokenizer")
            check_parts(self.pipeline, self.name, [part])
            yield from reader_needs(self.t5, getattr(self.pipeline, part), t5)
            yield equal("transformer.joint_attention_dim", width, t5.config.d_model, f"the width of {self.t5}")

    def read_channels(self, latent_channels: int) -> int:
        """Return the number of the transformer's input channels for latents with this many channels."""
        return latent_channels

    def check_scheduler(self) -> None:
        check_flow(self.pipeline, self.name)

    def check_schedule(self) -> None:
        check_levels(self.schedule(min(10, int(self.scheduler_config["num_train_timesteps"]))), self.name)

    @property
    def optional(self) -> Sequence[str]:  # type: ignore[override]
        return (self.t5,) if self.t5 else ()

    @property
    def patch_size(self) -> int:
        """The side of an image token in latents."""
        return 2

    @property
    def own_size(self) -> tuple[int, int]:
        size: int = self.pipeline.default_sample_size
        return size, size

    @property
    def size_multiple(self) -> int:
        return self.pixels_per_latent * self.patch_size

    def set_sampler_options(self, timestep_spacing: str | None = None, set_alpha_to_one: bool | None = None) -> None:
        """Do nothing: these settings of DDIM do not apply to flow models."""

    def schedule(self, num_inference_steps: int) -> Schedule:
        return flow_schedule(self.scheduler_config, num_inference_steps, self.sigmas(num_inference_steps), self.mu)

    def sigmas(self, num_inference_steps: int) -> Sequence[float] | None:
        """Return the noise levels before the shift; None for the scheduler's own."""
        return None

    @property
    def mu(self) -> float | None:
        """The resolution-dependent shift of the noise levels; None without `use_dynamic_shifting`.

        It is linear in the number of image tokens, as `calculate_shift` in diffusers.
        """
        config = self.scheduler_config
        if not config["use_dynamic_shifting"]:
            return None
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        height, width = self.latent_size
        tokens = (height // self.patch_size) * (width // self.patch_size)
        slope: float = (config["max_shift"] - config["base_shift"]) / (many - few)
        shift: float = config["base_shift"] + slope * (tokens - few)
        return shift

    def sampler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config({**self.scheduler_config, "stochastic_sampling": False})

    def to(self, device: torch.device | str, precision: str = "no", offload: bool = False) -> DiffusionModel:
        super().to(device, precision, offload)
        t5 = getattr(self.pipeline, self.t5) if self.t5 else None
        if precision == "fp16" and t5 is not None:
            keep_wide(t5)
        return self

    @property
    def t5_tokens(self) -> int:
        """The number of T5 tokens per prompt."""
        raise NotImplementedError

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        names = [name for name in dict.fromkeys((*self.encoders, self.t5)) if getattr(self.pipeline, name) is not None]
        limits = dict.fromkeys(names, self.pipeline.tokenizer_max_length) | {self.t5: self.t5_tokens}
        return [(name.replace("text_encoder", "tokenizer"), limits[name], prompts) for name in names]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        # Without autocast, which would run every layer of T5 in half precision, also those of `keep_wide`.
        # Quiet, since diffusers warns about each truncated prompt at every call.
        with silence_libraries(), torch.autocast(self.device.type, enabled=False):
            return self.encode_prompts(list(prompts), negative_prompt, guided)

    @abstractmethod
    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Any:
        """Encode as `encode` does; called without autocast and warnings."""

    def _decode(self, latents: Tensor) -> Tensor:
        return decode_vae(self.pipeline.vae, latents, mean=self.pipeline.vae.config.shift_factor)
