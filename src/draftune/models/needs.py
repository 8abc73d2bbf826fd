"""What a model family needs of a pipeline's parts, checked when the pipeline is loaded and before it is changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draftune.errors import DraftuneError
from draftune.utils.loading import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline

    from draftune.sampling.schedule import Schedule

SAME = 1e-4
"""How far two schedulers' alphas_cumprod may be apart: some write 2^-24 for the 0 of zero terminal SNR."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW = "FlowMatchEulerDiscreteScheduler"
AUTOENCODERS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Need:
    """One condition on a pipeline: the config's key, its value, whether it will do, what is allowed and why."""

    key: str
    found: Any
    ok: bool
    allowed: str
    why: str = ""


def check_needs(name: str, needs: Iterable[Need]) -> None:
    """Raise DraftuneError for the first need that is not met."""
    for need in needs:
        if not need.ok:
            why = f": {need.why}" if need.why else ""
            raise DraftuneError(f"{name!r} can't be used: its {need.key} is {need.found!r}, not {need.allowed}{why}")


def check_parts(pipeline: DiffusionPipeline, name: str, parts: Iterable[str]) -> None:
    """Raise DraftuneError for a pipeline that lacks one of these parts."""
    for part in parts:
        if getattr(pipeline, part, None) is None:
            raise DraftuneError(f"{name!r} lacks its {part}, without which nothing can be drawn")


def equal(key: str, found: Any, wanted: Any, why: str = "") -> Need:
    """Return the need of one value."""
    return one_of(key, found, (wanted,), why)


def one_of(key: str, found: Any, wanted: Sequence[Any], why: str = "") -> Need:
    """Return the need of one of several values."""
    return Need(key, found, found in wanted, " or ".join(dict.fromkeys(map(repr, wanted))), why)


def number(key: str, found: Any, zero: bool = False) -> Need:
    """Return the need of a finite number, which may be 0 where `zero` is true."""
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    return Need(key, found, is_number and (zero or found != 0), "a number" if zero else "a number other than 0")


def multiple(key: str, found: Any, of: int, why: str = "") -> Need:
    """Return the need of a positive multiple of a whole number."""
    ok = isinstance(found, int) and not isinstance(found, bool) and found > 0 and found % of == 0
    return Need(key, found, ok, f"a positive multiple of {of}" if of > 1 else "a positive whole number", why)


def of_class(part: str, network: object, classes: Sequence[str]) -> Need:
    """Return the need of one of several classes, or of a class derived from one of them."""
    names = [kind.__name__ for kind in type(network).__mro__]
    return Need(part, names[0], any(name in classes for name in names), " or ".join(classes))


def autoencoder_needs(vae: Any, shifted: bool = False) -> Iterator[Need]:
    """Yield what every family needs of the autoencoder; `shifted`: a shift_factor too, which flow models subtract."""
    yield of_class("vae", vae, AUTOENCODERS)
    yield equal("vae.out_channels", vae.config.out_channels, 3, "rewards score images in colour")
    yield number("vae.scaling_factor", vae.config.scaling_factor)
    if shifted:
        yield number("vae.shift_factor", vae.config.shift_factor, zero=True)


def moments_needs(vae: Any) -> Iterator[Need]:
    """Yield the needs of an autoencoder that may say the mean and standard deviation of each latent channel."""
    channels = vae.config.latent_channels
    for key in ("latents_mean", "latents_std"):
        found = getattr(vae.config, key, None)
        each = found is not None and isinstance(found, (list, tuple)) and len(found) == channels
        ok = found is None or (each and all(number(key, value, zero=True).ok for value in found))
        yield Need(f"vae.{key}", found, ok, f"{channels} numbers, one for each latent channel")


def reader_needs(part: str, tokenizer: Any, encoder: Any, length: int | None = None) -> Iterator[Need]:
    """Yield the needs of a tokenizer: its vocabulary and its length must not exceed the encoder's embeddings.

    Args:
        part: The encoder's name in the pipeline.
        tokenizer: The tokenizer.
        encoder: The text encoder.
        length: The number of tokens of a prompt; None for the tokenizer's own `model_max_length`.
    """
    name = part.replace("text_encoder", "tokenizer")
    rows, found = encoder.get_input_embeddings().num_embeddings, len(tokenizer)
    yield Need(f"{name}'s vocabulary", found, found <= rows, f"at most {rows}", f"{part} embeds no more tokens")
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None:
        length = tokenizer.model_max_length if length is None else length
        key, why = f"{name}'s model_max_length", f"{part} has no more positions"
        yield Need(key, length, 0 < length <= positions, f"from 1 to {positions}", why)


def unet_needs(unet: nn.Module, network: str = "UNet2DConditionModel") -> Iterator[Need]:
    """Yield what is needed of a UNet that is told the noise level and the prompt, and nothing else."""
    yield of_class("unet", unet, (network,))
    config: Any = unet.config
    for key in ("class_embed_type", "num_class_embeds"):
        yield equal(f"unet.{key}", config.get(key), None, "UNets that take a class belong to other pipelines")


def patch_needs(pipeline: DiffusionPipeline, classes: Sequence[str]) -> Iterator[Need]:
    """Yield what DiT and PixArt need of the transformer, which may predict a variance too, and of the autoencoder."""
    yield from autoencoder_needs(pipeline.vae)
    yield of_class("transformer", pipeline.transformer, classes)
    config, channels = pipeline.transformer.config, pipeline.vae.config.latent_channels
    why = "the autoencoder's latent_channels"
    yield equal("transformer.in_channels", config.in_channels, channels, why)
    variance = "or twice as many with a learned variance"
    yield one_of("transformer.out_channels", config.out_channels, (channels, 2 * channels, None), f"{why}, {variance}")
    yield multiple("transformer.sample_size", config.sample_size, config.patch_size, "its patch_size")


def pair(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of a config's size, one number or two; None where it is neither."""
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    return (sides[0], sides[1]) if len(sides) == 2 and whole else None


def size_need(key: str, found: Any) -> Need:
    """Return the need of a size, one number or two."""
    return Need(key, found, pair(found) is not None, "a positive whole number, or two of them")


def check_diffusion(pipeline: DiffusionPipeline, name: str) -> None:
    """Check that DDIM can take the place of a pipeline's scheduler.

    By the scheduler's class and its own noise levels: its config may hold keys that a scheduler of another class left
    there, and DDIM would read them. Raises DraftuneError.
    """
    from diffusers import DDIMScheduler

    scheduler = pipeline.scheduler
    kind = type(scheduler).__name__
    config: Mapping[str, Any] = scheduler.config
    own = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(own, Tensor) or not own.numel():
        raise DraftuneError(f"{name!r} is drawn by {kind}, whose noise levels are not made of betas: not supported")
    if config.get("use_flow_sigmas") and "use_flow_sigmas" in inspect.signature(type(scheduler)).parameters:
        raise DraftuneError(f"{name!r} is drawn by {kind} with use_flow_sigmas, a flow's noise levels: not supported")
    try:
        ddim = DDIMScheduler.from_config(dict(config))
    except Exception as error:
        raise DraftuneError(f"DDIM can't draw {name!r} in the place of its {kind}: {first_line(error)}") from error
    levels, read = own.cpu().double(), ddim.alphas_cumprod.double()
    falling = levels.isfinite().all() and (levels[1:] <= levels[:-1]).all()
    if not (falling and levels[0] < 1 and (levels[:-1] > 0).all() and levels[-1] >= 0):
        raise DraftuneError(
            f"the noise levels of {name!r} do not rise from step to step: look at the betas of its {kind}"
        )
    if levels.shape != read.shape or not torch.allclose(levels, read, rtol=0, atol=SAME):
        raise DraftuneError(
            f"{name!r} can't be used: alphas_cumprod of its {kind} differ from DDIMScheduler's for the same config "
            "(often rescale_betas_zero_snr); use the scheduler that the model was trained with"
        )
    count, predicted = ddim.config.num_train_timesteps, ddim.config.prediction_type
    if len(read) != count:
        raise DraftuneError(f"the {kind} of {name!r} has {len(read)} trained_betas, not num_train_timesteps={count}")
    if predicted not in PREDICTIONS:
        raise DraftuneError(
            f"the prediction_type of {name!r} is {predicted!r}, not {' or '.join(map(repr, PREDICTIONS))}"
        )
    if predicted == "epsilon" and read[-1] == 0:
        raise DraftuneError(
            f"{name!r} can't be used: prediction_type='epsilon' can't be combined with rescale_betas_zero_snr=True, "
            "since at zero signal-to-noise ratio the noise does not determine x_0; correct the scheduler's config"
        )


def check_flow(pipeline: DiffusionPipeline, name: str) -> None:
    """Check that a pipeline's scheduler is that of a flow, by its class. Raises DraftuneError."""
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
    """Check that a flow's grid falls from noise to the image. Raises DraftuneError."""
    levels = [step.sigma for step in schedule.steps] + [schedule.steps[-1].sigma_next]
    falling = all(math.isfinite(level) for level in levels) and all(a >= b for a, b in pairwise(levels))
    if not (falling and 1 + SAME > levels[0] > levels[-1] >= 0):
        raise DraftuneError(
            f"the noise levels of {name!r} do not fall from 1 to 0: look at shift and invert_sigmas of its scheduler"
        )
