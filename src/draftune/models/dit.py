"""DiT: classes instead of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, unknown
from draftune.models.base import Model
from draftune.models.needs import Need, multiple, patch_needs


class DiT(Model):
    """A DiTPipeline: a transformer that draws ImageNet's classes, and an autoencoder.

    A prompt is the name of a class, as the pipeline knows it, or its number. Guidance leads away from the class of no
    class, so that there is no negative prompt.
    """

    lora_prefix = "transformer"
    no_negative_prompt = "a model of classes has no negative prompt"
    required = ("transformer", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        yield from patch_needs(self.pipeline, ("DiTTransformer2DModel", "Transformer2DModel"))
        classes = self.pipeline.transformer.config.num_embeds_ada_norm
        yield multiple("transformer.num_embeds_ada_norm", classes, 1)
        highest = max(self.pipeline.labels.values(), default=0)
        yield Need("id2label", highest, highest < classes, f"below {classes}, the number of classes")

    def complete_config(self) -> None:
        # diffusers reads the classes' names but forgets to save them.
        names: dict[int, list[str]] = {}
        for label, number in self.pipeline.labels.items():
            names.setdefault(number, []).append(label)
        id2label = {number: ", ".join(labels) for number, labels in sorted(names.items())}
        self.pipeline.register_to_config(id2label=id2label)

    @property
    def denoiser(self) -> Any:
        return self.pipeline.transformer

    @property
    def parts(self) -> Sequence[nn.Module]:
        return self.pipeline.transformer, self.pipeline.vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def set_size(self, height: int | None, width: int | None) -> None:
        own = self.latent_shape[-1] * 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if value not in (None, own):
                raise DraftuneError(f"{name} must be {own}, the only size that this model draws, not {value}")

    def check_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> None:
        for prompt in prompts:
            self.class_of(prompt)
        super().check_prompts(prompts, negative_prompt)

    def class_of(self, prompt: str) -> int:
        """The number of a class. Raises DraftuneError for one that is not known."""
        name, count, labels = prompt.strip(), self.pipeline.transformer.config.num_embeds_ada_norm, self.pipeline.labels
        if name in map(str, range(count)):
            return int(name)
        if name not in labels:
            raise unknown("class", name, [*labels, f"a number from 0 to {count - 1}"])
        return int(labels[name])

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Tensor:
        classes = [self.class_of(prompt) for prompt in prompts]
        # The embedding after those of the classes is that of none.
        none = [self.pipeline.transformer.config.num_embeds_ada_norm] * len(classes)
        return torch.tensor(classes + none if guided else classes, device=self.device)

    def predict(self, x: Tensor, timestep: float, condition: Tensor, guidance_scale: float) -> Tensor:
        guided = len(condition) > len(x)
        t = torch.tensor(timestep, device=x.device).expand(len(condition))
        output = self.pipeline.transformer(
            torch.cat([x, x]) if guided else x, timestep=t, class_labels=condition
        ).sample
        # What is left out is the learned variance, which DDIM has no use for.
        output = output[:, : x.shape[1]]
        if not guided:
            return output
        positive, negative = output.chunk(2)
        return negative + guidance_scale * (positive - negative)

    def decode_raw(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample / 2 + 0.5
