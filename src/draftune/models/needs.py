"""Checks of a pipeline's configs against the needs of its family, before the pipeline is changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

    from draftune.sampling.schedule import Schedule

SAME = 1e-4
"""The tolerance between two schedulers' alphas_cumprod. Some store 2^-24 instead of 0 for zero terminal SNR."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "FlowMatchEulerDiscreteScheduler"
AUTOENCODERS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Need:
    """One condition on a pipeline.

    Attributes:
        key: The config's key, such as "unet.in_channels".
        value: Its value.
        ok: Whether the value is allowed.
        allowed: The allowed values, for the error message.
        why: The reason, for the error message.
    """

    key: str
    value: Any
    ok: bool
    allowed: str
    why: str = ""


def check_needs(name: str, needs: Iterable[Need]) -> None:
    """Raise DraftuneError for the first need that is not satisfied."""
    for need in needs:
        if not need.ok:
            why = f": {need.why}" if need.why else ""
            raise DraftuneError(f"{name!r} can't be used: its {need.key} is {need.value!r}, not {need.allowed}{why}")


def check_parts(pipeline: DiffusionPipeline, name: str, parts: Iterable[str]) -> None:
    """Raise DraftuneError if the pipeline lacks one of these components."""
    for part in parts:
        if getattr(pipeline, part, None) is None:
            raise DraftuneError(f"{name!r} lacks its {part}, which sampling needs")


def equal(key: str, value: Any, expected: Any, why: str = "") -> Need:
    """Need one value."""
    return one_of(key, value, (expected,), why)


def one_of(key: str, value: Any, allowed: Sequence[Any], why: str = "") -> Need:
    """Need one of several values."""
    return Need(key, value, value in allowed, " or ".join(dict.fromkeys(map(repr, allowed))), why)


def number(key: str, value: Any, zero: bool = False) -> Need:
    """Need a finite number; `zero`: whether it may be 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return Need(key, value, is_number and (zero or value != 0), "a number" if zero else "a number other than 0")


def multiple(key: str, value: Any, of: int, why: str = "") -> Need:
    """Need a positive multiple of an integer."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % of == 0
    return Need(key, value, ok, f"a positive multiple of {of}" if of > 1 else "a positive whole number", why)


def of_class(part: str, network: object, classes: Sequence[str]) -> Need:
    """Need one of several classes or a subclass, by name."""
    names = [kind.__name__ for kind in type(network).__mro__]
    return Need(part, names[0], any(name in classes for name in names), " or ".join(classes))


def autoencoder_needs(vae: Any, shifted: bool = False) -> Iterator[Need]:
    """Yield the needs of the autoencoder in every family; `shifted`: flow models also need a `shift_factor`."""
    yield of_class("vae", vae, AUTOENCODERS)
    yield equal("vae.out_channels", vae.config.out_channels, 3, "rewards take color images")
    yield number("vae.scaling_factor", vae.config.scaling_factor)
    if shifted:
        yield number("vae.shift_factor", vae.config.shift_factor, zero=True)


def moments_needs(vae: Any, channels: int, optional: bool = True) -> Iterator[Need]:
    """Yield the needs of an autoencoder with a mean and standard deviation per latent channel; `optional`: or none."""
    for key in ("latents_mean", "latents_std"):
        values = getattr(vae.config, key, None)
        complete = isinstance(values, (list, tuple)) and len(values) == channels
        finite = complete and all(number(key, value, zero=True).ok for value in values or ())
        ok = finite or (optional and values is None)
        yield Need(f"vae.{key}", values, ok, f"{channels} numbers, one for each latent channel")


def reader_needs(part: str, tokenizer: Any, encoder: Any, length: int | None = None) -> Iterator[Need]:
    """Yield the needs of a tokenizer: its vocabulary and length must not exceed the text encoder's embeddings.

    Args:
        part: The text encoder's name in the pipeline.
        tokenizer: The tokenizer.
        encoder: The text encoder.
        length: The number of tokens per prompt; None for the tokenizer's `model_max_length`.
    """
    name = part.replace("text_encoder", "tokenizer")
    rows, vocabulary = encoder.get_input_embeddings().num_embeddings, len(tokenizer)
    yield Need(f"{name}'s vocabulary", vocabulary, vocabulary <= rows, f"at most {rows}, the embeddings of {part}")
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None:
        length = tokenizer.model_max_length if length is None else length
        key, allowed = f"{name}'s model_max_length", f"from 1 to {positions}, the positions of {part}"
        yield Need(key, length, 0 < length <= positions, allowed)


def chat_need(tokenizer: Any) -> Need:
    """Need a chat template, of a tokenizer or of a processor."""
    template = getattr(tokenizer, "chat_template", None)
    return Need("tokenizer's chat_template", template, bool(template), "a template, which every prompt is put into")


def unet_needs(unet: nn.Module, network: str = "UNet2DConditionModel") -> Iterator[Need]:
    """Yield the needs of a UNet without class input."""
    yield of_class("unet", unet, (network,))
    config: Any = unet.config
    for key in ("class_embed_type", "num_class_embeds"):
        yield equal(f"unet.{key}", config.get(key), None, "UNets with class input belong to other pipelines")


def patch_needs(pipeline: DiffusionPipeline, classes: Sequence[str]) -> Iterator[Need]:
    """Yield the needs of DiT and PixArt: the autoencoder and the transformer, which may also predict a variance."""
    yield from autoencoder_needs(pipeline.vae)
    yield of_class("transformer", pipeline.transformer, classes)
    config, channels = pipeline.transformer.config, pipeline.vae.config.latent_channels
    why = "the autoencoder's latent_channels"
    yield equal("transformer.in_channels", config.in_channels, channels, why)
    variance = "or twice as many with a learned variance"
    yield one_of("transformer.out_channels", config.out_channels, (channels, 2 * channels, None), f"{why}, {variance}")
    yield multiple("transformer.sample_size", config.sample_size, config.patch_size, "its patch_size")


def pair(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of a config's size, which is one number or two; None if it is neither."""
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    return (sides[0], sides[1]) if len(sides) == 2 and whole else None


def size_need(key: str, value: Any) -> Need:
    """Need a size: one number or two."""
    return Need(key, value, pair(value) is not None, "a positive whole number, or two of them")


def check_diffusion(pipeline: DiffusionPipeline, name: str) -> None:
    """Check that DDIM can replace a pipeline's scheduler.

    The scheduler's own noise levels are compared with DDIM's: its config may contain keys of another scheduler class,
    which only DDIM would use.

    Raises:
        DraftuneError: DDIM would use other noise levels, or the scheduler is not a diffusion scheduler.
    """
    from diffusers import DDIMScheduler

    scheduler = pipeline.scheduler
    kind = type(scheduler).__name__
    config: Mapping[str, Any] = scheduler.config
    own = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(own, Tensor) or not own.numel():
        raise DraftuneError(f"{name!r} has a {kind}, whose noise levels are not defined by betas: it is not supported")
    if config.get("use_flow_sigmas") and "use_flow_sigmas" in inspect.signature(type(scheduler)).parameters:
        raise DraftuneError(f"{name!r} has a {kind} with use_flow_sigmas=True: it is not supported")
    try:
        ddim = DDIMScheduler.from_config(dict(config))
    except Exception as error:
        raise DraftuneError(f"DDIM can't replace the {kind} of {name!r}: {first_line(error)}") from error
    levels, ddim_levels = own.cpu().double(), ddim.alphas_cumprod.double()
    falling = levels.isfinite().all() and (levels[1:] <= levels[:-1]).all()
    if not (falling and levels[0] < 1 and (levels[:-1] > 0).all() and levels[-1] >= 0):
        raise DraftuneError(
            f"the noise levels of {name!r} do not increase from step to step: correct the betas of its {kind}"
        )
    if levels.shape != ddim_levels.shape or not torch.allclose(levels, ddim_levels, rtol=0, atol=SAME):
        raise DraftuneError(
            f"{name!r} can't be used: alphas_cumprod of its {kind} differ from DDIMScheduler's for the same config "
            "(often rescale_betas_zero_snr); use the scheduler that the model was trained with"
        )
    count, predicted = ddim.config.num_train_timesteps, ddim.config.prediction_type
    if len(levels) != count:
        raise DraftuneError(f"the {kind} of {name!r} has {len(levels)} trained_betas, not num_train_timesteps={count}")
    if predicted not in PREDICTIONS:
        raise DraftuneError(
            f"the prediction_type of {name!r} is {predicted!r}, not {' or '.join(map(repr, PREDICTIONS))}"
        )
    if predicted == "epsilon" and ddim_levels[-1] == 0:
        raise DraftuneError(
            f"{name!r} can't be used: prediction_type='epsilon' can't be combined with rescale_betas_zero_snr=True, "
            "since at zero signal-to-noise ratio the noise does not determine x_0; correct the scheduler's config"
        )


def check_flow(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise DraftuneError unless the pipeline's scheduler is a flow-matching scheduler with a valid shift."""
    kinds = [kind.__name__ for kind in type(pipeline.scheduler).__mro__]
    if FLOW not in kinds:
        raise DraftuneError(f"{name!r} has a {kinds[0]}, not a {FLOW}: it is not supported")
    config = pipeline.scheduler.config
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    if config["use_dynamic_shifting"]:
        check_needs(name, (number(f"scheduler.{key}", config[key], zero=True) for key in keys))
        if config[keys[0]] == config[keys[1]]:
            raise DraftuneError(
                f"{name!r} can't be used: {keys[0]} and {keys[1]} of its scheduler are both {config[keys[0]]}; they "
                "must differ"
            )


def check_levels(schedule: Schedule, name: str) -> None:
    """Raise DraftuneError unless the noise levels of a flow schedule decrease from 1 to at least 0."""
    levels = [step.sigma for step in schedule.steps] + [schedule.steps[-1].sigma_next]
    falling = all(math.isfinite(level) for level in levels) and all(a >= b for a, b in pairwise(levels))
    if not (falling and 1 + SAME > levels[0] > levels[-1] >= 0):
        raise DraftuneError(
            f"the noise levels of {name!r} do not decrease from 1 to 0: correct shift or invert_sigmas of its scheduler"
        )
