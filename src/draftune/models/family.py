"""What defines a model family: encoding prompts, calling the denoiser, decoding, sizes and the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.models.common import check_size, decode_vae
from draftune.models.needs import Need, check_diffusion, pair
from draftune.published import few_steps
from draftune.sampling.few_step import GAMMA, few_step_schedule
from draftune.sampling.schedule import SAMPLER_OPTIONS, Schedule, Step, ddim_schedule
from draftune.utils.loading import Truncation, truncation
from draftune.utils.logging import logger

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Family(ABC):
    """The part of `DiffusionModel` that differs between model families.

    A family must define `lora_prefix`, `required` and the abstract members. All others have defaults, which fit a
    diffusion model with an autoencoder. docs/how-to/add-a-model-family.md has a complete example.
    """

    pipeline: DiffusionPipeline
    name: str
    """The model's name, path or hub id, for messages."""
    scheduler_config: dict[str, Any]
    """The config of the pipeline's scheduler, with the changes of `set_sampler_options`."""
    dtype: torch.dtype
    """The precision of latents and images: float32, or float64 if the weights are."""
    latent_size: tuple[int, int]
    """(height, width) of a latent; set by `set_size`."""
    lora_prefix: str
    """The denoiser's name in the pipeline and in the keys of LoRA files: "unet" or "transformer"."""
    required: Sequence[str]
    """The components that the pipeline must have."""
    optional: Sequence[str] = ()
    """More networks that are used if the pipeline has them."""
    few_step_samplers = True
    """Whether the samplers of few-step models work with the pipeline; if not, they are replaced by DDIM."""
    pixel_space = False
    """Whether the model works on pixels in [-1, 1] instead of latents. Only then may the sampler clip x_0."""
    no_negative_prompt = ""
    """Why the family takes no negative prompt; empty if it takes one."""
    largest: int | None = None
    """The largest possible height and width in pixels; None for no limit."""
    encoding_device: torch.device | None = None
    """Where the text encoders are while prompts are encoded before the denoiser is on its device."""
    onload_device: torch.device | None = None
    """The device to which the layers of an offloaded denoiser are moved for their calls; None without offloading."""
    _reported_negative_prompt = False

    @abstractmethod
    def needs(self) -> Iterator[Need]:
        """Yield the conditions on the configs of the pipeline's components. Those in `required` are present."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """The number of pixels that height and width must be a multiple of."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        """Encode the prompts, without gradient.

        Args:
            prompts: One for each latent.
            negative_prompt: The same for all latents.
            guided: Whether guidance is used. The condition then has twice as many rows, the negative ones first.

        Returns:
            The condition that `predict` takes.
        """

    @abstractmethod
    def predict(self, x: Tensor, timestep: float, condition: Any, guidance_scale: float) -> Tensor:
        """Call the denoiser with guidance.

        Args:
            x: Noisy latents, `[B, C, H, W]`.
            timestep: In units of training steps.
            condition: The result of `encode`.
            guidance_scale: The scale of classifier-free guidance, or an input of models with distilled guidance.

        Returns:
            The output of the schedule's prediction type, `[B, C, H, W]`.
        """

    def guidance_at(self, step: Step, schedule: Schedule, guidance_scale: float) -> float:
        """Return the guidance scale that `predict` gets in one step of a schedule."""
        return guidance_scale

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents into images `[B, 3, H, W]`, nominally in [0, 1]."""
        return decode_vae(self.pipeline.vae, latents)

    @property
    def own_size(self) -> tuple[int, int]:
        """The default (height, width) of a latent: `sample_size` in the denoiser's config, which `needs` must check."""
        size = pair(self.denoiser.config.sample_size)
        assert size is not None
        return size

    @property
    def channels(self) -> int:
        """The number of channels of a latent."""
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    def pixels_per_latent(self) -> int:
        """The number of pixels along one side of a latent."""
        scale: int = self.pipeline.vae_scale_factor
        return scale

    def check_scheduler(self) -> None:
        """Raise DraftuneError if the sampler can't reproduce the noise levels of the pipeline's scheduler."""
        check_diffusion(self.pipeline, self.name)

    def check_schedule(self) -> None:
        """Raise DraftuneError if no schedule can be built from the scheduler's config."""
        self._schedule(1)
        if not self.few_step_sampler:
            self._schedule(int(self.scheduler_config["num_train_timesteps"]))

    def complete_config(self) -> None:  # noqa: B027
        """Add to the pipeline's config, before it is saved, what diffusers reads but does not save."""

    def unused_layers(self) -> frozenset[str]:
        """Return the names of denoiser layers whose output never reaches the image."""
        return frozenset()

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        """Return for each text encoder: its tokenizer's name in the pipeline, its token limit, and its input texts."""
        return []

    def without_effect(self, guidance_scale: float) -> str:
        """Return why a negative prompt has no effect at this guidance scale; empty if it has one."""
        return "" if guidance_scale > 1 else f"guidance_scale is {guidance_scale:g}, and guidance needs more than 1"

    @property
    def denoiser(self) -> Any:
        """The network that a LoRA is added to."""
        return getattr(self.pipeline, self.lora_prefix)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The networks of the pipeline that sampling uses."""
        components = [getattr(self.pipeline, name, None) for name in dict.fromkeys((*self.required, *self.optional))]
        return [component for component in components if isinstance(component, nn.Module)]

    @property
    def device(self) -> torch.device:
        """The device on which the denoiser computes; `encoding_device` while it is set."""
        return self.encoding_device or self.onload_device or next(self.denoiser.parameters()).device

    # Size, schedule and prompts.

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        return self.channels, *self.latent_size

    def set_size(self, height: int | None, width: int | None) -> None:
        """Set the image size in pixels; None for the model's default. Raises DraftuneError for an impossible size."""
        check_size(height, width, self.size_multiple, self.largest)
        scale, (rows, columns) = self.pixels_per_latent, self.own_size
        self.latent_size = (height // scale if height else rows, width // scale if width else columns)

    def _schedule(self, num_inference_steps: int) -> Schedule:
        """Build the sampling schedule with this number of steps, of which `DiffusionModel.schedule` marks some."""
        if self.few_step_sampler:
            return few_step_schedule(self.sampler(), num_inference_steps)
        return ddim_schedule(self.scheduler_config, num_inference_steps, self.pixel_space)

    @property
    def few_step_sampler(self) -> bool:
        """Whether the model is sampled by its own scheduler: that of a few-step diffusion model."""
        scheduler = self.pipeline.scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        return self.few_step_samplers and few_steps(config)

    def sampler(self) -> Any:
        """Return the diffusers scheduler that samples the same images as `schedule`."""
        from diffusers import DDIMScheduler

        if self.few_step_sampler:
            return type(self.pipeline.scheduler).from_config(self.scheduler_config)
        unclipped = {} if self.pixel_space else {"clip_sample": False, "thresholding": False}
        return DDIMScheduler.from_config({**self.scheduler_config, **unclipped})

    def set_sampler_options(self, timestep_spacing: str | None = None, set_alpha_to_one: bool | None = None) -> None:
        """Change the sampling timesteps; None keeps the value of the scheduler's config."""
        values = {"timestep_spacing": timestep_spacing, "set_alpha_to_one": set_alpha_to_one}
        self.scheduler_config |= {key: value for key, value in values.items() if value is not None}

    @property
    def sampler_options(self) -> dict[str, Any]:
        """The current values of the arguments of `set_sampler_options`."""
        return {name: self.scheduler_config[name] for name in SAMPLER_OPTIONS if name in self.scheduler_config}

    @property
    def sampler_metadata(self) -> dict[str, Any]:
        """What a LoRA's metadata say of the sampler: its options, and the class of a few-step sampler."""
        if not self.few_step_sampler:
            return self.sampler_options
        kind = type(self.pipeline.scheduler).__name__
        gamma = {"eta": self.scheduler_config.get("eta", GAMMA)} if kind == "TCDScheduler" else {}
        return self.sampler_options | {"scheduler": kind} | gamma

    def noise(self, generators: torch.Generator | Sequence[torch.Generator], count: int) -> Tensor:
        """Sample N(0, I) noise `[count, C, H, W]` from one CPU generator, or from one generator per latent."""
        if isinstance(generators, torch.Generator):
            noise = torch.randn((count, *self.latent_shape), generator=generators, dtype=self.dtype)
        else:
            noise = torch.cat([torch.randn((1, *self.latent_shape), generator=g, dtype=self.dtype) for g in generators])
        return noise.to(self.device)

    def start(
        self, generators: torch.Generator | Sequence[torch.Generator], count: int, schedule: Schedule
    ) -> tuple[Tensor, Schedule]:
        """Sample the initial latents `[count, C, H, W]`, then the fresh noise of each step that adds some.

        Args:
            generators: As for `noise`. An image's noise depends only on its own generator, as in diffusers.
            count: The number of images.
            schedule: The sampling schedule.

        Returns:
            The latents, and the schedule with this batch's noise; the same schedule for a deterministic sampler.
        """
        noise = self.noise(generators, count)
        latents = noise if schedule.initial_scale == 1 else schedule.initial_scale * noise
        return latents, schedule.with_noise([self.noise(generators, count) for _ in range(schedule.num_noises)])

    def check_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> None:
        """Raise DraftuneError for prompts that the model can't take."""
        if negative_prompt and self.no_negative_prompt:
            raise DraftuneError(f"{self.no_negative_prompt}: leave it empty (--negative-prompt)")

    def check_negative_prompt(self, negative_prompt: str, guidance_scale: float) -> None:
        """Raise DraftuneError if the family takes no negative prompt; warn once if the prompt has no effect."""
        self.check_prompts((), negative_prompt)
        if negative_prompt and not self._reported_negative_prompt and (why := self.without_effect(guidance_scale)):
            self._reported_negative_prompt = True
            logger.warning(f"the negative prompt has no effect: {why}")

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """Count for each text encoder the prompts that are longer than its token limit."""
        return [
            truncation(
                f"the {name.replace('tokenizer', 'text_encoder')} of {self.name!r}",
                getattr(self.pipeline, name),
                texts,
                limit,
            )
            for name, limit, texts in self.text_readers(prompts)
        ]
