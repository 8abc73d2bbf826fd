"""What the families of flow matching share: a transformer, Euler's steps along its velocity, a shifted grid."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.base import Model
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
from draftune.utils.quiet import quiet


def keep_wide(t5: nn.Module) -> None:
    """Keeps in float32 the layers of T5 whose outputs go past half precision, as transformers does too."""
    with quiet():
        for name, layer in t5.named_modules():
            if name.endswith(".wo"):
                layer.float()


def unused_context_layers(blocks: Sequence[nn.Module], name: str) -> frozenset[str]:
    """Return the layers of the last block that make the text tokens of a next block, given that none reads them.

    The text's keys and values are not among them: the image tokens attend to them in the last block too.
    """
    last = len(blocks) - 1
    unused = ("attn.add_q_proj", "attn.to_add_out", "ff_context.")
    layers = dict(blocks[last].named_modules()) if blocks else {}
    # A layer that carries a LoRA lies one deeper.
    found = (layer.removesuffix(".base_layer") for layer, module in layers.items() if isinstance(module, nn.Linear))
    return frozenset(f"{name}.{last}.{layer}" for layer in found if layer.startswith(unused))


class Flow(Model):
    """A pipeline of transformer, text encoders and autoencoder with a FlowMatchEulerDiscreteScheduler."""

    lora_prefix = "transformer"
    encoders: tuple[str, ...]
    """The text encoders without which no prompt can be read."""
    t5: str
    """The name of the T5 text encoder."""
    network: str
    """The class of the transformer."""

    @property
    def required(self) -> Sequence[str]:  # type: ignore[override]
        tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in self.encoders]
        return ("transformer", *self.encoders, *tokenizers, "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        transformer, vae = self.denoiser, self.pipeline.vae
        yield from autoencoder_needs(vae, shifted=True)
        yield of_class("transformer", transformer, (self.network,))
        channels, read = vae.config.latent_channels, self.read_channels(vae.config.latent_channels)
        why = f"what the transformer reads of {channels} latent channels"
        yield equal("transformer.in_channels", transformer.config.in_channels, read, why)
        given = transformer.config.out_channels
        yield one_of("transformer.out_channels", given, (read, None), "it gives what it reads")
        t5, width = getattr(self.pipeline, self.t5), transformer.config.joint_attention_dim
        if t5 is not None:
            part = self.t5.replace("text_encoder", "tokenizer")
            check_parts(self.pipeline, self.name, [part])
            yield from reader_needs(self.t5, getattr(self.pipeline, part), t5)
            yield equal("transformer.joint_attention_dim", width, t5.config.d_model, f"the width of {self.t5}")

    def read_channels(self, latent_channels: int) -> int:
        """Return how many channels the transformer reads of a latent of this many."""
        return latent_channels

    def check_scheduler(self) -> None:
        check_flow(self.pipeline, self.name)

    def check_schedule(self) -> None:
        check_levels(self.schedule(min(10, int(self.scheduler_config["num_train_timesteps"]))), self.name)

    @property
    def denoiser(self) -> Any:
        return self.pipeline.transformer

    @property
    def parts(self) -> Sequence[nn.Module]:
        names = dict.fromkeys(("transformer", *self.encoders, self.t5, "vae"))
        return [part for name in names if (part := getattr(self.pipeline, name)) is not None]

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of a latent."""

    @property
    def patch_size(self) -> int:
        """The side in latents of what the transformer takes for one token."""
        return 2

    @property
    def largest(self) -> int | None:
        """The longest side in latents, where there is one."""
        return None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.latent_size

    @property
    def latent_size(self) -> tuple[int, int]:
        own = self.pipeline.default_sample_size
        return getattr(self, "_latent_size", (own, own))

    def set_size(self, height: int | None, width: int | None) -> None:
        scale, own = self.pipeline.vae_scale_factor, self.pipeline.default_sample_size
        multiple = scale * self.patch_size
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < multiple or value % multiple):
                raise DraftuneError(f"{name} must be a multiple of {multiple} for this model, not {value}")
            if value is not None and self.largest and value > self.largest * scale:
                raise DraftuneError(f"{name} must be at most {self.largest * scale} for this model, not {value}")
        self._latent_size = ((height or own * scale) // scale, (width or own * scale) // scale)

    def set_grid(self, timestep_spacing: str | None = None, set_alpha_to_one: bool | None = None) -> None:
        """Changes nothing: these are DDIM's, and a flow's grid is that of its own scheduler."""

    def schedule(self, num_inference_steps: int) -> Schedule:
        return flow_schedule(self.scheduler_config, num_inference_steps, self.sigmas(num_inference_steps), self.mu)

    def sigmas(self, num_inference_steps: int) -> Sequence[float] | None:
        """The grid before it is shifted; None leaves it to the scheduler."""
        return None

    @property
    def mu(self) -> float | None:
        """How far the grid is shifted towards noise by the image's size; None in pipelines that don't do so."""
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

    def to(self, device: torch.device | str, precision: str = "no") -> Model:
        super().to(device, precision)
        t5 = getattr(self.pipeline, self.t5)
        if precision == "fp16" and t5 is not None:
            keep_wide(t5)
        return self

    @property
    @abstractmethod
    def t5_tokens(self) -> int:
        """How many tokens of a prompt T5 is given."""

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        names = [name for name in dict.fromkeys((*self.encoders, self.t5)) if getattr(self.pipeline, name) is not None]
        limits = dict.fromkeys(names, self.pipeline.tokenizer_max_length) | {self.t5: self.t5_tokens}
        return [(name.replace("text_encoder", "tokenizer"), limits[name], prompts) for name in names]

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        # Without autocast, which would take every layer of T5 to half precision. A prompt that is cut to what the
        # encoders read is announced at every call.
        with quiet(), torch.autocast(self.device.type, enabled=False):
            return self.encode_prompts(list(prompts), negative_prompt, guided)

    @abstractmethod
    def encode_prompts(self, prompts: list[str], negative_prompt: str, guided: bool) -> Any:
        """As `encode`."""

    def decode_raw(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.dtype)).sample / 2 + 0.5
