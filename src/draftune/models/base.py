"""The interface of a text-to-image model that methods, training and sampling use, independent of the model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from draftune.lora import FROZEN_ADAPTER, LoRADeltas, adapted_by
from draftune.models.common import clamp_unit, decode_vae
from draftune.models.family import Family
from draftune.models.needs import check_needs, check_parts
from draftune.models.offloading import offload_layers
from draftune.models.prompt_embeddings import PromptEmbeddings, text_encoders
from draftune.models.quantization import is_quantized, move
from draftune.recommended import recommended_of
from draftune.sampling.checkpointing import BLOCKS, WHOLE_CALLS, checkpoint_blocks, checkpoint_call
from draftune.sampling.sampler import Denoiser, rollout
from draftune.sampling.schedule import Prediction, Schedule, Step
from draftune.sampling.step_range import StepRange
from draftune.utils.devices import DTYPES, layout_of
from draftune.utils.images import to_pil
from draftune.utils.model_options import NO_OPTIONS
from draftune.utils.quiet import silence_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


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
    lora_steps = StepRange()
    """The steps on which the LoRA is active. On the others the denoiser has no LoRA, not even a frozen one."""
    embeddings: PromptEmbeddings | None = None
    """The cached prompt embeddings, which load the text encoders when they need them; None to encode every batch."""

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
            part.eval().requires_grad_(False)
            if not is_quantized(part):
                part.to(memory_format=layout_of(part))  # type: ignore[call-overload]
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
        return {self.lora_prefix: self.denoiser} | text_encoders(self.pipeline)

    def load_text_encoders(self) -> None:
        """Have the text encoders in the pipeline, on the model's device, and encode every batch from now on.

        Call it before using `pipeline` itself, or changing a text encoder, of a model that caches its prompts.
        """
        if self.embeddings is not None:
            self.embeddings.load()
            for part in text_encoders(self.pipeline).values():
                self.place(part, self.device)
            self.embeddings = None

    def cache_prompts(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, device: Any = None
    ) -> None:
        """Encode the prompts that are not cached yet, with the text encoders on `device`, if `embeddings` is set."""
        if self.embeddings is not None:
            self.embeddings.prepare(prompts, negative_prompt, guidance_scale > 1, device)

    def to(self, device: torch.device | str, precision: str = "no", offload: bool = False) -> DiffusionModel:
        """Move the model to a device; with "bf16" or "fp16", store and run the frozen weights in that precision.

        If `embeddings` is set, the text encoders stay where they are: they are moved only to encode prompts. Quantized
        weights keep their precision. With `offload`, the denoiser's weights stay in main memory, and each layer is
        moved to the device for its calls. This can't be undone: later calls offload them too.
        """
        self.autocast_dtype = DTYPES[precision]
        offload = offload or self.onload_device is not None
        for part in self.all_modules:
            if self.embeddings is None or not self.embeddings.holds(part):
                self.place(part, "cpu" if offload and part is self.denoiser else device)
        if offload:
            self.onload_device = torch.device(device)
            offload_layers(self.denoiser, self.onload_device)
        return self

    def place(self, part: nn.Module, device: torch.device | str) -> None:
        """Move a network to a device and cast it to its precision."""
        # Channels last was not tried on MPS.
        layout = torch.contiguous_format if torch.device(device).type == "mps" else layout_of(part)
        with silence_libraries():
            move(part, torch.device(device), self.dtype_of(part), layout)

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

    def schedule(self, num_inference_steps: int) -> Schedule:
        """Build the sampling schedule with this number of steps, marked by `lora_steps`.

        Raises:
            DraftuneError: The number is out of range, or `lora_steps` holds none of so few steps.
        """
        schedule = self._schedule(num_inference_steps)
        return schedule if self.lora_steps.is_all else self.lora_steps.mark(schedule)

    def denoiser_for(
        self, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
    ) -> Denoiser:
        """Return the guided denoiser for these prompts. As in diffusers, a guidance scale <= 1 disables guidance."""
        return self.denoisers_for(prompts, schedule, guidance_scale, negative_prompt)[0]

    def denoisers_for(
        self, prompts: Sequence[str], schedule: Schedule, guidance_scale: float, negative_prompt: str = ""
    ) -> tuple[Denoiser, Denoiser]:
        """Return the guided denoiser for these prompts, and that of the base model, without the trained LoRA.

        At steps that are not `tuned`, both are the same: the denoiser without any LoRA.
        """
        self.check_negative_prompt(negative_prompt, guidance_scale)
        with torch.no_grad(), self.autocast():
            encode = self.encode if self.embeddings is None else self.embeddings.condition
            condition = encode(prompts, negative_prompt, guidance_scale > 1)
        trained = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

        def predict_at(x: Tensor, timestep: float, scale: float) -> Tensor:
            with self.autocast():
                return self.predict(x, timestep, condition, scale)

        def denoiser(
            lora: Callable[[], AbstractContextManager[None]], trained: Sequence[Tensor], whole: Sequence[str]
        ) -> Denoiser:
            def denoise(x: Tensor, step: Step) -> Prediction:
                scale = self.guidance_at(step, schedule, guidance_scale)
                call = partial(predict_at, timestep=step.timestep, scale=scale)
                if self.checkpointing in whole and torch.is_grad_enabled():
                    output = checkpoint_call(call, x, trained, lora)
                else:
                    with lora():
                        output = call(x)
                return schedule.to_prediction(output.to(x.dtype), x, step)

            return denoise

        def without_trained(adapter: str) -> Denoiser:
            # Whole calls in mode "blocks" too: a block that is repeated outside of the context would run with the LoRA.
            return denoiser(partial(adapted_by, self.denoiser, adapter), (), ("blocks", *WHOLE_CALLS))

        tuned, base = denoiser(nullcontext, trained, WHOLE_CALLS), without_trained(FROZEN_ADAPTER)
        no_lora = without_trained("")

        def by_step(denoise: Denoiser) -> Denoiser:
            return lambda x, step: denoise(x, step) if step.tuned else no_lora(x, step)

        return by_step(tuned), by_step(base)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents into images `[B, 3, H, W]`, clamped to [0, 1] (gradient: see `pixel_clamp`).

        Latents with gradient are decoded by `tiny_decoder` if it is set, and in one batch. Latents without gradient
        are decoded one by one, which needs less memory.
        """
        with_gradient = torch.is_grad_enabled() and latents.requires_grad
        decode, small = self._decode, self.tiny_decoder
        if with_gradient and small is not None:
            decode = partial(decode_vae, small, mean=small.config.shift_factor)
        # Without autocast, as in diffusers' pipelines: a decoder runs in the precision of its weights. On CUDA,
        # autocast would keep a float32 copy of the input of each normalization layer for the backward pass.
        with torch.autocast(self.device.type, enabled=False):
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

        The noise of each image depends only on its own seed, not on its batch.

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
        self.cache_prompts(prompts, negative_prompt, guidance_scale)
        images = []
        bar = tqdm(total=len(prompts), desc="sampling", leave=False, disable=None if progress else True)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            denoise = self.denoiser_for(batch, schedule, guidance_scale, negative_prompt)
            latents, noisy = self.start(generators, len(batch), schedule)
            images.append(self.decode(rollout(denoise, noisy.steps, latents)).cpu())
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
