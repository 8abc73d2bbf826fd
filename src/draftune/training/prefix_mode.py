"""How the sampling steps without gradient are computed: their cache, their precision and their compilation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from draftune.errors import DraftuneError
from draftune.methods import Method
from draftune.models import DiffusionModel
from draftune.sampling.call_cache import load_call_cache
from draftune.sampling.sampler import Denoiser, PrefixCache
from draftune.sampling.schedule import Schedule
from draftune.settings import Settings
from draftune.training import placement
from draftune.training.context import TrainContext
from draftune.training.data import BatchInput
from draftune.training.fsdp import fsdp_requested
from draftune.utils.devices import DTYPES


class PrefixMode:
    """The context of the denoiser calls of a prefix: `prefix_cache`, `prefix_precision` and `prefix_compile`."""

    def __init__(self, settings: Settings, model: DiffusionModel) -> None:
        self.model = model
        self.cache = load_call_cache(settings.prefix_cache) if settings.prefix_cache else None
        self.precision = settings.prefix_precision
        self.compiled: Any = None
        if settings.prefix_compile:
            # Compiled in place, but active in the prefix only; with dynamic=False, each shape has kernels of its own.
            model.denoiser.compile(backend=placement.COMPILE_BACKEND, dynamic=False)
            self.compiled, model.denoiser._compiled_call_impl = model.denoiser._compiled_call_impl, None

    @contextmanager
    def __call__(self, denoise: Denoiser, schedule: Schedule) -> Iterator[Denoiser]:
        """Return the context of one prefix, whose value replaces `denoise`."""
        model, dtype = self.model, self.model.autocast_dtype
        applied = nullcontext(denoise) if self.cache is None else self.cache.applied(model.denoiser, denoise, schedule)
        with applied as cached:
            if self.precision != "same":
                model.autocast_dtype = DTYPES[self.precision]
            if self.compiled is not None:
                model.denoiser._compiled_call_impl = self.compiled
            try:
                yield cached
            finally:
                model.autocast_dtype = dtype
                if self.compiled is not None:
                    model.denoiser._compiled_call_impl = None


@torch.no_grad()
def sample_prefixes(context: TrainContext, mode: PrefixMode, items: Sequence[BatchInput], count: int) -> None:
    """Run the first `count` sampling steps of several batches in calls for all their images, and cache the latents.

    Args:
        context: The run.
        mode: How a prefix is computed.
        items: The batches; each keeps its own noise.
        count: Number of steps.
    """
    s, share = context.settings, context.processes.shard
    prompts = [context.prompts[i] for item in items for i in share(item.prompt_indices)]
    denoise = context.model.denoiser_for(prompts, context.schedule, s.guidance_scale, s.negative_prompt)
    fresh = [torch.cat(noises) for noises in zip(*(item.fresh_noise for item in items), strict=True)]
    schedule = context.schedule.with_noise(fresh)
    joined = PrefixCache(torch.cat([item.prefix_cache.latents[0] for item in items]), stride=s.prefix_stride)
    with mode(denoise, schedule) as cheaper:
        latents = joined.get(count, cheaper, schedule.steps)
    for item, own in zip(items, latents.chunk(len(items)), strict=True):
        item.prefix_cache.latents[count] = own.clone()


def check_prefix(s: Settings, method: Method) -> None:
    """Raise DraftuneError for settings of the prefix that do not fit the method or each other."""
    name = f"the method {s.method!r}"
    plain: dict[str, Any] = {"prefix_reuse_steps": 1, "prefix_stride": 1, "prefix_batches": 1}
    plain |= {"prefix_cache": "", "prefix_precision": "same", "prefix_compile": False}
    for setting, value in plain.items():
        if getattr(s, setting) != value and not method.starts_without_grad:
            expected = "empty" if value == "" else str(value).lower()
            raise DraftuneError(f"{name} has no sampling steps without gradient: {setting} must be {expected}")
    if (s.prefix_reuse_steps > 1 or s.prefix_reuse_cosine) and not method.prefix_is_reusable():
        raise DraftuneError(
            f"prefix_reuse_steps={s.prefix_reuse_steps} and prefix_reuse_cosine={s.prefix_reuse_cosine:g} do not work "
            f"with {name}: updates share the sampling steps without gradient only if these end at the same step in "
            "each update (Method.prefix_is_reusable); prefix_reuse_steps must be 1, prefix_reuse_cosine 0"
        )
    if s.prefix_precision != "same" and s.mixed_precision != "no":
        raise DraftuneError(
            f"prefix_precision={s.prefix_precision} needs mixed_precision=no, not {s.mixed_precision}, in which the "
            "prefix runs anyway: leave it out"
        )
    if s.prefix_cache:
        load_call_cache(s.prefix_cache)
        if s.compile or s.prefix_compile:
            raise DraftuneError("prefix_cache does not work with --compile or --prefix-compile: leave one of them out")
    if s.prefix_compile and (s.compile or s.offload or fsdp_requested()):
        raise DraftuneError("prefix_compile does not work with --compile, --offload or FSDP: leave them out")
    if s.prefix_batches > 1:
        if not method.prefix_is_reusable():
            raise DraftuneError(
                f"prefix_batches={s.prefix_batches} does not work with {name}, whose sampling steps without gradient "
                "may end at another step in each batch: prefix_batches must be 1"
            )
        if s.gradient_accumulation_steps % s.prefix_batches:
            raise DraftuneError(
                f"prefix_batches={s.prefix_batches} must divide gradient_accumulation_steps, which is "
                f"{s.gradient_accumulation_steps}"
            )


def check_prefix_sampler(s: Settings, model: DiffusionModel, schedule: Schedule) -> None:
    """Raise DraftuneError for settings of the prefix that do not fit the network or its sampler."""
    if s.prefix_stride > 1 and schedule.num_noises:
        raise DraftuneError(
            f"prefix_stride={s.prefix_stride} does not work with the sampler of {model.name!r}, which adds noise in "
            "each step: prefix_stride must be 1"
        )
    if s.prefix_cache:
        load_call_cache(s.prefix_cache).check(model.denoiser, schedule)
    if s.prefix_cache or s.prefix_stride > 1:
        name = "prefix_cache" if s.prefix_cache else "prefix_stride"
        if len({model.guidance_at(step, schedule, s.guidance_scale) for step in schedule.steps}) > 1:
            raise DraftuneError(f"{name} does not work with {model.name!r}, which guides some steps only")
