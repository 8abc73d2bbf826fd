"""Approximate denoiser calls of the prefix from earlier ones: `taylorseer(interval=2)`, `first_block_cache`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.registry.factories import build, check_range, parse_call
from draftune.sampling.sampler import Denoiser
from draftune.sampling.schedule import Prediction, Schedule, Step


class CallCache(ABC):
    """Base class of caches that make the denoiser calls of one sampling run without gradient cheaper."""

    @abstractmethod
    def check(self, denoiser: nn.Module, schedule: Schedule) -> None:
        """Raise DraftuneError if the cache does not work with the network or the sampler."""

    @abstractmethod
    def applied(self, denoiser: nn.Module, denoise: Denoiser, schedule: Schedule) -> AbstractContextManager[Denoiser]:
        """Return a context whose value replaces `denoise` for one sampling run. The cache is empty at its start.

        Args:
            denoiser: The network that `denoise` calls. It is unchanged after the context.
            denoise: The exact denoiser.
            schedule: The schedule whose steps `denoise` gets.
        """


@dataclass(frozen=True)
class TaylorSeer(CallCache):
    """TaylorSeer: predict the output of skipped calls by a polynomial through the outputs of earlier calls.

        z_i = sum_o (i - k)^o / o! * F_o,  F_0 = z_k,  F_o = (F_{o-1}(k) - F_{o-1}(k')) / (k - k')

    Liu et al., 2025, arXiv:2503.06923, with k and k' the last two calls that were computed. It predicts the output of
    the whole guided call, as diffusers' `TaylorSeerCacheConfig(use_lite_mode=True)`. So it works with every network.

    Attributes:
        interval: Number of steps for each computed call, 1 or more; 1 computes every call. Default: 2.
        first: Number of first steps that are all computed, 1 or more. Default: 1.
        order: Order of the polynomial, 0 to 3. Default: 1.
    """

    interval: int = 2
    first: int = 1
    order: int = 1

    def __post_init__(self) -> None:
        check_range(
            "prefix cache taylorseer",
            interval=(self.interval, 1, math.inf),
            first=(self.first, 1, math.inf),
            order=(self.order, 0, 3),
        )

    def check(self, denoiser: nn.Module, schedule: Schedule) -> None:
        if schedule.num_noises or schedule.clip or schedule.timestep_scaling is not None:
            raise DraftuneError(
                "prefix_cache=taylorseer needs a deterministic sampler that does not change x_0: leave it out"
            )

    def computed(self, index: int) -> bool:
        """Return whether the call with this index, from 0, is computed."""
        return index < self.first or (index - self.first - 1) % self.interval == 0

    @contextmanager
    def applied(self, denoiser: nn.Module, denoise: Denoiser, schedule: Schedule) -> Iterator[Denoiser]:
        count, last = 0, 0
        factors: list[Tensor] = []
        tuned: bool | None = None

        def approximate(x: Tensor, step: Step) -> Prediction:
            nonlocal count, last, factors, tuned
            index, count = count, count + 1
            if step.tuned != tuned:  # the LoRA starts or ends here: other steps say nothing about this one
                factors, tuned = [], step.tuned
            if factors and not self.computed(index):
                powers = [(index - last) ** order / math.factorial(order) for order in range(len(factors))]
                output = torch.stack([power * factor for power, factor in zip(powers, factors, strict=True)]).sum(0)
                return schedule.to_prediction(output, x, step)
            prediction = denoise(x, step)
            # The network's output is the difference from the prediction of an output of 0.
            new = [schedule.output_difference(prediction, schedule.to_prediction(torch.zeros_like(x), x, step), step)]
            for factor in factors[: self.order]:
                new.append((new[-1] - factor) / (index - last))
            factors, last = new, index
            return prediction

        yield approximate


@dataclass(frozen=True)
class FirstBlockCache(CallCache):
    """First Block Cache of diffusers: skip all other blocks where the first one changes little between two steps.

        skip if mean |d_i - d_k| / mean |d_k| <= threshold,  d the output of the first block minus its input

    The change of the other blocks is then that of the last computed call k. One decision for the whole batch, in each
    process for its share. For the transformers of FLUX.1, Qwen-Image, PixArt and DiT.

    Attributes:
        threshold: Largest relative change at which blocks are skipped; 0 computes every call. Default: 0.05.
    """

    threshold: float = 0.05

    def __post_init__(self) -> None:
        check_range("prefix cache first_block_cache", threshold=(self.threshold, 0, math.inf))

    def check(self, denoiser: nn.Module, schedule: Schedule) -> None:
        name = type(denoiser).__name__
        if name not in FIRST_BLOCK_NETWORKS:
            raise DraftuneError(
                f"prefix_cache=first_block_cache does not work with {name}, only with "
                f"{', '.join(FIRST_BLOCK_NETWORKS)}: use taylorseer"
            )

    @contextmanager
    def applied(self, denoiser: nn.Module, denoise: Denoiser, schedule: Schedule) -> Iterator[Denoiser]:
        from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
        from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
        from diffusers.models.cache_utils import CacheMixin

        apply_first_block_cache(denoiser, FirstBlockCacheConfig(self.threshold))
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        registry.invalidate_child_registries_cache()
        try:
            # Guidance computes both halves in one call, so that one state suffices.
            with CacheMixin.cache_context(denoiser, "prefix"):
                yield denoise
        finally:
            for hook in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
                registry.remove_hook(hook, recurse=True)
            registry.invalidate_child_registries_cache()


FIRST_BLOCK_NETWORKS = (
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
)
"""Networks with which diffusers' First Block Cache works in 0.42.1; it fails with those of all other families."""
CALL_CACHES: dict[str, type[CallCache]] = {"taylorseer": TaylorSeer, "first_block_cache": FirstBlockCache}


def load_call_cache(text: str) -> CallCache:
    """Create a cache from an expression such as "taylorseer(interval=3)". Raises DraftuneError if it is invalid."""
    call = parse_call(text, "prefix cache", "taylorseer(interval=2)")
    return build(call, "prefix cache", CALL_CACHES, CallCache)  # type: ignore[type-abstract]
