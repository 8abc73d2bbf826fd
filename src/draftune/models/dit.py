"""DiT: class-conditional models of ImageNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftune.errors import DraftuneError, unknown
from draftune.models.base import DiffusionModel
from draftune.models.common import apply_cfg
from draftune.models.needs import Need, multiple, patch_needs


class DiT(DiffusionModel):
    """A DiTPipeline: a class-conditional transformer and an autoencoder.

    A prompt is a class: its name in `pipeline.labels` or its number. Guidance uses the null class, so that there is no
    negative prompt.
    """

    lora_prefix = "transformer"
    few_step_samplers = False  # the pipeline passes them no generator
    no_negative_prompt = "a class-conditional model has no negative prompt"
    required = ("transformer", "vae", "scheduler")

    def needs(self) -> Iterator[Need]:
        yield from patch_needs(self.pipeline, ("DiTTransformer2DModel", "Transformer2DModel"))
        yield multiple("transformer.num_embeds_ada_norm", self.num_classes, 1)
        highest = max(self.pipeline.labels.values(), default=0)
        yield Need("id2label", highest, highest < self.num_classes, f"below {self.num_classes}, the number of classes")

    @property
    def num_classes(self) -> int:
        """The number of classes; also the index of the null class's embedding."""
        count: int = self.denoiser.config.num_embeds_ada_norm
        return count

    def complete_config(self) -> None:
        # diffusers reads the names of the classes from the config but does not save them.
        names: dict[int, list[str]] = {}
        for label, number in self.pipeline.labels.items():
            names.setdefault(number, []).append(label)
        id2label = {number: ", ".join(labels) for number, labels in sorted(names.items())}
        self.pipeline.register_to_config(id2label=id2label)

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        return self.pixels_per_latent * self.own_size[0]

    def set_size(self, height: int | None, width: int | None) -> None:
        for name, value in (("height", height), ("width", width)):
            if value not in (None, self.size_multiple):
                raise DraftuneError(
                    f"{name} must be {self.size_multiple}, the only size of images of this model, not {value}"
                )

    def check_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> None:
        for prompt in prompts:
            self.class_of(prompt)
        super().check_prompts(prompts, negative_prompt)

    def class_of(self, prompt: str) -> int:
        """Return the number of a class. Raises DraftuneError for an unknown one."""
        name, labels = prompt.strip(), self.pipeline.labels
        if name in map(str, range(self.num_classes)):
            return int(name)
        if name not in labels:
            raise unknown("class", name, [*labels, f"a number from 0 to {self.num_classes - 1}"])
        return int(labels[name])

    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Tensor:
        classes = [self.class_of(prompt) for prompt in prompts]
        null = [self.num_classes] * len(classes) if guided else []
        return torch.tensor(null + classes, device=self.device)

    def predict(self, x: Tensor, timestep: float, condition: Tensor, guidance_scale: float) -> Tensor:
        t = torch.full((len(condition),), timestep, device=x.device)

        def network(x: Tensor) -> Tensor:
            output: Tensor = self.denoiser(x, timestep=t, class_labels=condition).sample
            return output[:, : x.shape[1]]  # without the learned variance, which DDIM does not use

        return apply_cfg(network, x, len(condition), guidance_scale)
