"""How the sampling steps without gradient are computed: their cache and their precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from draftune.errors import DraftuneError
from draftune.methods import Method
from draftune.models import DiffusionModel
from draftune.sampling.call_cache import load_call_cache
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Schedule
from draftune.settings import Settings
from draftune.utils.devices import DTYPES


class PrefixMode:
    """The context of the denoiser calls of a prefix, with `prefix_cache` and `prefix_precision`."""

    def __init__(self, settings: Settings, model: DiffusionModel) -> None:
        self.model = model
        self.cache = load_call_cache(settings.prefix_cache) if settings.prefix_cache else None
        self.precision = settings.prefix_precision

    @contextmanager
    def __call__(self, denoise: Denoiser, schedule: Schedule) -> Iterator[Denoiser]:
        """Return the context of one prefix, whose value replaces `denoise`."""
        model, dtype = self.model, self.model.autocast_dtype
        applied = nullcontext(denoise) if self.cache is None else self.cache.applied(model.denoiser, denoise, schedule)
        with applied as cached:
            if self.precision != "same":
                model.autocast_dtype = DTYPES[self.precision]
            try:
                yield cached
            finally:
                model.autocast_dtype = dtype


def check_prefix(s: Settings, method: Method) -> None:
    """Raise DraftuneError for settings of the prefix that do not fit the method or each other."""
    name = f"the method {s.method!r}"
    plain = {"prefix_reuse_steps": 1, "prefix_stride": 1, "prefix_cache": "", "prefix_precision": "same"}
    for setting, value in plain.items():
        if getattr(s, setting) != value and not method.starts_without_grad():
            raise DraftuneError(f"{name} has no sampling steps without gradient: {setting} must be {value or 'empty'}")
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
        if s.compile:
            raise DraftuneError("prefix_cache does not work with --compile: leave one of them out")


def check_prefix_sampler(s: Settings, model: DiffusionModel, schedule: Schedule) -> None:
    """Raise DraftuneError for settings of the prefix that do not fit the network or its sampler."""
    if s.prefix_stride > 1 and schedule.num_noises:
        raise DraftuneError(
            f"prefix_stride={s.prefix_stride} does not work with the sampler of {model.name!r}, which adds noise in "
            "each step: prefix_stride must be 1"
        )
    if s.prefix_cache:
        load_call_cache(s.prefix_cache).check(model.denoiser, schedule)
        if len({model.guidance_at(step, schedule, s.guidance_scale) for step in schedule.steps}) > 1:
            raise DraftuneError(f"prefix_cache does not work with {model.name!r}, which guides some steps only")
