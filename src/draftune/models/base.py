"""The interface of a text-to-image model that methods, training and sampling use, independent of the model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from draftune.errors import DraftuneError
from draftune.lora import FROZEN_ADAPTER, LoRADeltas, adapted_by
from draftune.models.common import clamp_unit, decode_vae
from draftune.models.family import Family
from draftune.models.needs import check_needs, check_parts
from draftune.models.quantization import is_quantized, move
from draftune.recommended import recommended_of
from draftune.sampling.checkpointing import checkpoint_block, checkpoint_call, without_block_checkpointing
from draftune.sampling.sampler import Denoiser, rollout
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.utils.images import to_pil
from draftune.utils.model_options import NO_OPTIONS
from draftune.utils.quiet import silence_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE_CALLS, BLOCKS = ("denoiser", "both"), ("blocks", "both")


def default_device(device: str = "auto") -> torch.device:
    """Return the torch device of a `device` setting: "auto", "cpu", "mps", "cuda" or "cuda:1".

    "auto" is the CUDA (or ROCm) GPU if there is one, else MPS, else the CPU.

    Raises:
        DraftuneError: this machine has no such device.
    """
    count, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if count else "mps" if mps else "cpu")
    chosen = torch.device(device)
    if {"cuda": (chosen.index or 0) < count, "mps": mps}.get(chosen.type, True):
        return chosen
    raise DraftuneError(f"device={device} is not available (CUDA devices: {count}, MPS: {mps}); use auto or cpu")


def checkpoint_blocks(network: nn.Module, enabled: bool) -> None:
    """Enable or disable gradient checkpointing of the blocks of a diffusers network; others are left unchanged."""
    from diffusers import ModelMixin

    if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
        network.enable_gradient_checkpointing(checkpoint_block) if enabled else network.disable_gradient_checkpointing()


class DiffusionModel(Family):
    """A frozen diffusers pipeline whose denoiser can carry a LoRA.

    Each model family is a subclass, which defines the members of `Family`. Latents are float32, or float64 if the
    weights are, whatever precision the networks compute in.
    """

    tiny_decoder: Any = None
    """An AutoencoderTiny that decodes latents with gradient during training; None for the model's own decoder."""
    pixel_clamp = "straight_through"
    """The gradient of `decode` at pixels outside [0, 1]: "straight_through" or "hard", see `clamp_unit`."""
    frozen_lora: LoRADeltas | None = None
    """A frozen LoRA that belongs to the base model. It is added to the trained LoRA when that is saved."""

    options = NO_OPTIONS
    """Where the model's files came from, besides its name."""

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        """Check the pipeline, then prepare its networks.

        The networks are changed in place: see `load_model`. A pipeline that is refused is not changed.

        Raises:
            DraftuneError: The pipeline does not meet the family's needs.
        """
        self.pipeline = pipeline
        self.name = name
        check_parts(pipeline, name, self.required)
        check_needs(name, self.needs())
        self.check_scheduler()
        self.latent_size = self.own_size
        self.scheduler_config: dict[str, Any] = dict(pipeline.scheduler.config)
        self.check_schedule()
        self.autocast_dtype: torch.dtype | None = None
        for part in self.modules:
            # Convolutions are faster with channels last (docs/explanation/memory-and-time.md).
            part.eval().requires_grad_(False)
            if not is_quantized(part):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.set_checkpointing("denoiser")
        # Latents, images and the LoRA are float32 even if the pipeline was loaded in half precision.
        self.dtype = torch.promote_types(self.denoiser.dtype, torch.float32)

    def dtype_of(self, part: nn.Module) -> torch.dtype:
        """Return the precision in which a network is stored."""
        return self.autocast_dtype or self.dtype

    @property
    def all_modules(self) -> Sequence[nn.Module]:
        """The networks of the pipeline, and `tiny_decoder` if it is set."""
        return [*self.modules, *([] if self.tiny_decoder is None else [self.tiny_decoder])]

    @property
    def lora_networks(self) -> dict[str, Any]:
        """The networks that a LoRA file can adapt, by their names in its keys: the denoiser, then text encoders."""
        encoders = {name: part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")}
        return {self.lora_prefix: self.denoiser} | {n: part for n, part in sorted(encoders.items()) if part is not None}

    def to(self, device: torch.device | str, precision: str = "no") -> DiffusionModel:
        """Move the model to a device; with "bf16" or "fp16", store and run the frozen weights in that precision.

        Quantized weights keep theirs.
        """
        self.autocast_dtype = DTYPES[precision]
        # Channels last was not tried on MPS.
        layout = torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last
        with silence_libraries():
            for part in self.all_modules:
                move(part, torch.device(device), self.dtype_of(part), layout)
        return self

    def set_checkpointing(self, mode: str) -> None:
        """Choose what gradient checkpointing recomputes in the backward pass.

        Args:
            mode: "none": nothing. "blocks": the blocks of the denoiser; the graph stores the input of each block of
                each call. "denoiser": whole denoiser calls; the graph stores only the input of each call. "both":
                whole calls, and their blocks while a call is recomputed. This needs the least memory and computes
                each call two more times. In every mode but "none" the blocks of the decoder are recomputed.
        """
        self.checkpointing = mode
        for part in self.all_modules:
            checkpoint_blocks(part, mode in BLOCKS if part is self.denoiser else mode != "none")

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the model's precision."""
        # No cache: in an outer autocast context, casts of the LoRA's weights made without gradient would be reused,
        # detached, in calls with gradient (PyTorch issue 112583).
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled, cache_enabled=False)

    @property
    def recommended(self) -> dict[str, Any]:
        """The default settings of the model, by name: those that it was published with."""
        return recommended_of(self.pipeline, self.name)

    def noise(self, generators: torch.Generator | Sequence[torch.Generator], count: int) -> Tensor:
        """Sample N(0, I) noise `[count, C, H, W]` from one CPU generator, or from one generator per latent."""
        if isinstance(generators, torch.Generator):
            noise = torch.randn((count, *self.latent_shape), generator=generators, dtype=self.dtype)
        else:
            noise = torch.cat([torch.randn((1, *self.latent_shape), generator=g, dtype=self.dtype) for g in generators])
        return noise.to(self.device)

    def denoiser_for(
        self, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
    ) -> Denoiser:
        """Return the guided denoiser for these prompts. As in diffusers, a guidance scale <= 1 disables guidance."""
        return self.denoisers_for(prompts, schedule, guidance_scale, negative_prompt)[0]

    def denoisers_for(
        self, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
    ) -> tuple[Denoiser, Denoiser]:
        """Return the guided denoiser for these prompts, and that of the base model, without the trained LoRA."""
        self.check_negative_prompt(negative_prompt, guidance_scale)
        with torch.no_grad(), self.autocast():
            condition = self.encode(prompts, negative_prompt, guidance_scale > 1)
        trained = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

        def denoiser(predict: Callable[..., Tensor], trained: Sequence[Tensor], whole: Sequence[str]) -> Denoiser:
            def predict_at(x: Tensor, timestep: float) -> Tensor:
                with self.autocast():
                    return predict(x, timestep, condition, guidance_scale)

            def denoise(x: Tensor, step: Step) -> Prediction:
                call = partial(predict_at, timestep=step.timestep)
                checkpointed = self.checkpointing in whole and torch.is_grad_enabled()
                output = checkpoint_call(call, x, trained) if checkpointed else call(x)
                return schedule.to_prediction(output.to(x.dtype), x, step)

            return denoise

        # `predict_base` disables block checkpointing, so mode "blocks" checkpoints the whole base call.
        return denoiser(self.predict, trained, WHOLE_CALLS), denoiser(self.predict_base, (), ("blocks", *WHOLE_CALLS))

    def predict_base(self, *args: Any) -> Tensor:
        """Call `predict` without the trained LoRA."""
        with without_block_checkpointing(), adapted_by(self.denoiser, FROZEN_ADAPTER):
            return self.predict(*args)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents into images `[B, 3, H, W]`, clamped to [0, 1] (gradient: see `pixel_clamp`).

        Latents with gradient are decoded by `tiny_decoder` if it is set, and in one batch. Latents without gradient
        are decoded one by one, which needs less memory.
        """
        with_gradient = torch.is_grad_enabled() and latents.requires_grad
        decode, small = self._decode, self.tiny_decoder
        if with_gradient and small is not None:
            decode = partial(decode_vae, small, mean=small.config.shift_factor)
        with self.autocast():
            images = decode(latents) if with_gradient else torch.cat([decode(latent) for latent in latents.split(1)])
        return clamp_unit(images.to(self.dtype), self.pixel_clamp)

    @torch.no_grad()
    def sample_tensors(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        schedule: Schedule,
        guidance_scale: float,
        negative_prompt: str = "",
        batch_size: int = 8,
        progress: bool = False,
    ) -> Tensor:
        """Sample one image per prompt.

        The initial noise of each image depends only on its own seed, not on its batch.

        Args:
            prompts: One for each image.
            seeds: One for each image.
            schedule: The sampling schedule.
            guidance_scale: Disables guidance if <= 1.
            negative_prompt: The same for all images.
            batch_size: How many images are sampled at once.
            progress: Whether to show a progress bar.

        Returns:
            Images `[B, 3, H, W]` in [0, 1], float32 on the CPU.
        """
        self.check_prompts(prompts, negative_prompt)
        images = []
        bar = tqdm(total=len(prompts), desc="sampling", leave=False, disable=not progress)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            denoise = self.denoiser_for(batch, schedule, guidance_scale, negative_prompt)
            images.append(self.decode(rollout(denoise, schedule.steps, self.noise(generators, len(batch)))).cpu())
            bar.update(len(batch))
        bar.close()
        return torch.cat(images).float()

    def sample(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> list[Image]:
        """Sample `num_images` images per prompt as PIL images, with the seeds `seed`, `seed` + 1, ...

        `num_inference_steps` and `guidance_scale` default to the values that the model was published with.
        """
        defaults = self.recommended
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = self.sample_tensors(
            [prompt for prompt in prompts for _ in range(num_images)],
            [seed + i for _ in prompts for i in range(num_images)],
            self.schedule(num_inference_steps or defaults["num_inference_steps"]),
            defaults["guidance_scale"] if guidance_scale is None else guidance_scale,
            negative_prompt,
        )
        return to_pil(images)
