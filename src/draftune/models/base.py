"""What the engine needs of a text-to-image model, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.lora import KEPT, LoRADeltas, adapted_by
from draftune.models.clamp import clamp_unit
from draftune.models.needs import Need, check_diffusion, check_needs, check_parts
from draftune.models.tiny_decoder import decode_small
from draftune.recommended import sampling_of
from draftune.sampling.checkpointing import recomputed
from draftune.sampling.sampler import Denoiser, rollout
from draftune.sampling.schedule import GRID, Prediction, Schedule, Step, ddim_schedule
from draftune.utils.loading import Truncation, truncation
from draftune.utils.processes import tell
from draftune.utils.quiet import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE, BLOCKS = ("calls", "both"), ("blocks", "both")

# No network here draws random numbers.
block_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def default_device(cpu: bool = False) -> torch.device:
    """The GPU where there is one and it is wanted, else the CPU."""
    if not cpu and torch.cuda.is_available():
        return torch.device("cuda")
    if not cpu and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def checkpoint_blocks(network: nn.Module, wanted: bool) -> None:
    """Whether the backward pass computes the blocks of a network of diffusers again."""
    from diffusers import ModelMixin

    if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
        network.enable_gradient_checkpointing(block_again) if wanted else network.disable_gradient_checkpointing()


def let_adapt(network: nn.Module) -> None:
    """Gives a network diffusers' methods for adapters, in place, where its class lacks them."""
    from diffusers.loaders import PeftAdapterMixin

    kind = type(network)
    if not issubclass(kind, PeftAdapterMixin):
        # By the same name, which diffusers saves a network under.
        network.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})


class Model(ABC):
    """A frozen diffusers pipeline, of which `denoiser` may carry a LoRA.

    A family's subclass says how a prompt becomes a condition, how the network is called, and how a clean latent
    becomes a picture. Latents are kept in the weights' precision before `to`, float32 as a rule, whatever the
    network computes in.
    """

    lora_prefix: str
    """The part's name in the keys of a LoRA file."""
    in_pixels = False
    """Whether the latents are pictures, in [-1, 1], which the sampler clips where the scheduler's config says so."""
    small_decoder: Any = None
    """An AutoencoderTiny, in training alone, by which latents that carry a gradient are decoded."""
    no_negative_prompt = ""
    """Why the family takes no negative prompt, where it takes none."""
    told = False
    """Whether it was said of this model that its negative prompt has no effect."""
    pixel_clamp = "straight_through"
    """The gradient of `decode` at pixels outside [0, 1]: "straight_through" or "hard", as in `clamp_unit`."""
    kept: LoRADeltas | None = None
    """The frozen LoRA that belongs to the base, which is saved with the one that is trained."""

    required: Sequence[str]
    """The parts of the pipeline without which nothing can be drawn."""

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        self.pipeline = pipeline
        self.name = name
        # What is refused is refused before anything of it is changed.
        check_parts(pipeline, name, self.required)
        check_needs(name, self.needs())
        self.check_scheduler()
        self.scheduler_config: dict[str, Any] = dict(pipeline.scheduler.config)
        self.check_schedule()
        self.autocast_dtype: torch.dtype | None = None
        for part in self.parts:
            # Convolutions are faster with channels last (docs/explanation/memory-and-time.md).
            part.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        let_adapt(self.denoiser)
        self.set_checkpointing("calls")
        # Latents, pictures and the LoRA are never held in half precision, whatever the pipeline came in.
        self.dtype = torch.promote_types(self.denoiser.dtype, torch.float32)

    @abstractmethod
    def needs(self) -> Iterator[Need]:
        """Yield what the family needs of the configs of its parts, of which those in `required` are there."""

    def check_scheduler(self) -> None:
        """Raise DraftuneError for a pipeline whose scheduler's noise levels the family's sampler can't follow."""
        check_diffusion(self.pipeline, self.name)

    def check_schedule(self) -> None:
        """Raise DraftuneError where the sampler can't be laid over the scheduler's config."""
        self.schedule(1)
        self.schedule(int(self.scheduler_config["num_train_timesteps"]))

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that a LoRA is added to: a diffusers model, with PeftAdapterMixin from here on."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[nn.Module]:
        """Every network of the pipeline that takes part in sampling."""

    @property
    def lora_networks(self) -> dict[str, Any]:
        """The networks that a LoRA file may adapt, by their names in its keys: the denoiser, then the text encoders."""
        encoders = {name: part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")}
        return {self.lora_prefix: self.denoiser} | {n: part for n, part in sorted(encoders.items()) if part is not None}

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The parts, and the small decoder where training has one."""
        return [*self.parts, *([] if self.small_decoder is None else [self.small_decoder])]

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the model's own resolution; `set_size` changes it."""

    @abstractmethod
    def set_size(self, height: int | None, width: int | None) -> None:
        """The size of pictures in pixels; None keeps the model's own. Raises DraftuneError for one it can't draw."""

    def complete_config(self) -> None:  # noqa: B027
        """Put into the pipeline's config what diffusers reads there but does not save; called before it is saved."""

    def unused_layers(self) -> frozenset[str]:
        """Return the names of the denoiser's layers whose output never reaches the image, by its structure."""
        return frozenset()

    def check_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> None:
        """Raises DraftuneError for what the model can't be asked to draw; most can be asked everything."""
        if negative_prompt and self.no_negative_prompt:
            raise DraftuneError(f"{self.no_negative_prompt}: leave it empty (--negative-prompt)")

    def without_effect(self, guidance_scale: float) -> str:
        """Return why a negative prompt changes nothing that is drawn with this guidance; empty where it does."""
        return (
            "" if guidance_scale > 1 else f"guidance_scale is {guidance_scale:g}, and there is guidance above 1 alone"
        )

    def check_negative_prompt(self, negative_prompt: str, guidance_scale: float) -> None:
        """Say once where a negative prompt has no effect. Raises DraftuneError where the family takes none."""
        self.check_prompts((), negative_prompt)
        if negative_prompt and not self.told and (why := self.without_effect(guidance_scale)):
            self.told = True
            tell(f"the negative prompt has no effect: {why}")

    def text_readers(self, prompts: Sequence[str]) -> list[tuple[str, int, Sequence[str]]]:
        """For each text encoder: the pipeline's name of its tokenizer, the tokens it reads, and what it is given."""
        return []

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """Count, for each text encoder, the prompts that are longer than what it reads."""
        return [
            truncation(
                f"the {name.replace('tokenizer', 'text_encoder')} of {self.name!r}",
                getattr(self.pipeline, name),
                texts,
                limit,
            )
            for name, limit, texts in self.text_readers(prompts)
        ]

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompt: str, guided: bool) -> Any:
        """What `predict` wants to know of the prompts; with the negative prompt's part where guided."""

    @abstractmethod
    def predict(self, x: Tensor, timestep: float, condition: Any, guidance_scale: float) -> Tensor:
        """The network's guided output for the noisy latents."""

    @abstractmethod
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], nominally in [0, 1], of clean latents."""

    def to(self, device: torch.device | str, precision: str = "no") -> Model:
        """Moves the model; "bf16" and "fp16" also hold and run the frozen weights in that precision."""
        self.autocast_dtype = DTYPES[precision]
        # Channels last was not tried on MPS.
        layout = torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last
        with quiet():
            for part in self.networks:
                part.to(device=device, dtype=self.dtype_of(part), memory_format=layout)  # type: ignore[call-overload]
        return self

    def set_checkpointing(self, mode: str) -> None:
        """What the backward pass computes again: "no", the "blocks" of the networks, whole "calls" of them, or "both".

        "blocks" keeps the inputs of each block of every call in a graph. "calls" keeps the input of each call of the
        denoiser alone, so that memory does not grow with their number in a graph. "both" keeps that too, and while one
        call is computed again the inputs of its blocks: the least memory, and each call is computed twice more. The
        decoder's blocks are computed again in every mode but "no".
        """
        self.checkpointing = mode
        for part in self.networks:
            checkpoint_blocks(part, mode in BLOCKS or (mode != "no" and part is not self.denoiser))

    def dtype_of(self, part: nn.Module) -> torch.dtype:
        """What a part is held in, for a family with one that can't be held in half precision."""
        return self.autocast_dtype or self.dtype

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def set_grid(self, timestep_spacing: str | None = None, set_alpha_to_one: bool | None = None) -> None:
        """Changes where the sampler's steps lie, for good; None keeps what the model's scheduler says."""
        given = {"timestep_spacing": timestep_spacing, "set_alpha_to_one": set_alpha_to_one}
        self.scheduler_config |= {key: value for key, value in given.items() if value is not None}

    @property
    def grid(self) -> dict[str, Any]:
        """What `set_grid` takes, as it is now."""
        return {name: self.scheduler_config[name] for name in GRID if name in self.scheduler_config}

    @property
    def recommended(self) -> dict[str, Any]:
        """The `num_inference_steps` and the `guidance_scale` that the model was published with."""
        return sampling_of(self.pipeline, self.name)

    def schedule(self, num_inference_steps: int) -> Schedule:
        """The sampler's grid with this many steps."""
        return ddim_schedule(self.scheduler_config, num_inference_steps, self.in_pixels)

    def sampler(self) -> Any:
        """The scheduler of diffusers that draws as `schedule` does."""
        from diffusers import DDIMScheduler

        unclipped = {} if self.in_pixels else {"clip_sample": False, "thresholding": False}
        return DDIMScheduler.from_config({**self.scheduler_config, **unclipped})

    def noise(self, generators: torch.Generator | Sequence[torch.Generator], count: int) -> Tensor:
        """N(0, I) [count, C, H, W], from one generator on the CPU or from one for each latent."""
        if isinstance(generators, torch.Generator):
            noise = torch.randn((count, *self.latent_shape), generator=generators, dtype=self.dtype)
        else:
            noise = torch.cat([torch.randn((1, *self.latent_shape), generator=g, dtype=self.dtype) for g in generators])
        return noise.to(self.device)

    def denoise(
        self, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
    ) -> Denoiser:
        """The guided network for these prompts. As in diffusers, a guidance scale of at most 1 means none."""
        return self.denoisers(prompts, schedule, guidance_scale, negative_prompt)[0]

    def denoisers(
        self, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
    ) -> tuple[Denoiser, Denoiser]:
        """The guided network for these prompts, and the same without the LoRA that is trained."""
        self.check_negative_prompt(negative_prompt, guidance_scale)
        with torch.no_grad(), self.autocast():
            condition = self.encode(prompts, negative_prompt, guidance_scale > 1)
        trained = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

        def through(predict: Callable[..., Tensor], trained: Sequence[Tensor], whole: Sequence[str]) -> Denoiser:
            def predicted(x: Tensor, timestep: float) -> Tensor:
                with self.autocast():
                    return predict(x, timestep, condition, guidance_scale)

            def call(x: Tensor, step: Step) -> Prediction:
                recompute = self.checkpointing in whole and torch.is_grad_enabled()
                at_step = partial(predicted, timestep=step.timestep)
                output = recomputed(at_step, x, trained) if recompute else at_step(x)
                return schedule.read(output.to(x.dtype), x, step)

            return call

        # Blocks of the base would be computed again with the LoRA; whole calls are computed again without it.
        return through(self.predict, trained, WHOLE), through(self.predict_base, (), ("blocks", *WHOLE))

    def predict_base(self, *args: Any) -> Tensor:
        """`predict` without the LoRA that is trained."""
        checkpoint_blocks(self.denoiser, False)
        try:
            with adapted_by(self.denoiser, KEPT):
                return self.predict(*args)
        finally:
            checkpoint_blocks(self.denoiser, self.checkpointing in BLOCKS)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents into images [B, 3, H, W], clamped to [0, 1] as `pixel_clamp` says.

        Where the latents carry a gradient and training has a small decoder, that one decodes them.
        """
        small = self.small_decoder is not None and torch.is_grad_enabled() and latents.requires_grad
        raw = partial(decode_small, self.small_decoder) if small else self.decode_raw
        # Without a graph one picture at a time; with one as many as are asked for, of whom `at_once` gives few.
        alone = not (torch.is_grad_enabled() and latents.requires_grad)
        with self.autocast():
            pictures = torch.cat([raw(latent) for latent in latents.split(1)]) if alone else raw(latents)
        return clamp_unit(pictures.to(self.dtype), self.pixel_clamp)

    def autocast(self) -> torch.autocast:
        # Without its cache: inside somebody else's autocast, copies of the LoRA's weights made where there is no graph
        # would be used again, detached, where there is one, and nothing would be learned (PyTorch issue 112583).
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled, cache_enabled=False)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        schedule: Schedule,
        guidance_scale: float,
        negative_prompt: str = "",
        batch_size: int = 8,
        progress: bool = False,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] on the CPU, one for each prompt with its seed.

        Every picture's noise is drawn from its own seed, so it does not depend on the batch it is drawn in, nor on
        any other random number.
        """
        self.check_prompts(prompts, negative_prompt)
        pictures = []
        bar = tqdm(total=len(prompts), desc="sampling", leave=False, disable=not progress)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            denoise = self.denoise(batch, schedule, guidance_scale, negative_prompt)
            pictures.append(self.decode(rollout(denoise, schedule.steps, self.noise(generators, len(batch)))).cpu())
            bar.update(len(batch))
        bar.close()
        return torch.cat(pictures).float()

    def sample(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> list[Image]:
        """Draws `num_images` pictures of each prompt, with the seeds `seed`, `seed` + 1, …

        Steps and guidance default to what is recommended for the model.
        """
        from draftune.utils.images import to_pil

        defaults = self.recommended
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = self.generate(
            [prompt for prompt in prompts for _ in range(num_images)],
            [seed + i for _ in prompts for i in range(num_images)],
            self.schedule(num_inference_steps or defaults["num_inference_steps"]),
            defaults["guidance_scale"] if guidance_scale is None else guidance_scale,
            negative_prompt,
        )
        return to_pil(images)
