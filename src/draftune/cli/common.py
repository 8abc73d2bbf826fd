"""Arguments and helpers that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draftune.errors import DraftuneError
from draftune.settings import DEVICE, PRECISIONS, QUANTIZATIONS, REWARD_PRECISIONS, Settings
from draftune.settings.field_checks import MOST
from draftune.utils.model_options import ModelOptions
from draftune.utils.paths import check_writable, names_folder, user_path

if TYPE_CHECKING:
    from draftune.models import DiffusionModel


MOST_IMAGES = 10**6
"""Maximum number of images of one prompt: all of them are in memory at once."""


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: The name.
        help: One line for the list of commands.
        description: Description above the command's options.
        example: An example command line.
        arguments: Adds the arguments to a parser.
        run: Runs the command and returns its exit code, None for 0.
    """

    name: str
    """One word, or two for a command of a group: "experimental distill"."""
    help: str
    description: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def filled(text: str) -> str:
    """Return the argument. Raises ArgumentTypeError if it is empty, as an unset shell variable is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


Arguments = argparse._ActionsContainer
"""A parser or one of its groups."""


def add_number(parser: Arguments, flag: str, default: float, metavar: str, text: str) -> None:
    """Add a number of the default's type, with the default at the end of its help."""
    help_text = f"{text} (default: {default:g})"
    parser.add_argument(flag, type=type(default), default=default, metavar=metavar, help=help_text)


def device_name(text: str) -> str:
    """Return the argument. Raises ArgumentTypeError if it is no device's name."""
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N, not {text!r}")
    return text


def add_lora(parser: Arguments, name: str = "source", metavar: str = "RUN_OR_LORA", also: str = "") -> None:
    """Add the positional argument of a LoRA. `also` names what else the command accepts."""
    text = "run folder, LoRA file, or folder of a LoRA file" + also
    parser.add_argument(name, type=filled, metavar=metavar, help=text)


def add_weighted_loras(parser: Arguments, nargs: str) -> None:
    """Add the positional argument of LoRAs with weights, which `draftune.runs.merge.weighted` splits."""
    text = "run folder, LoRA file, or folder of a LoRA file, with a weight, any number (default: 1)"
    parser.add_argument("loras", type=filled, nargs=nargs, metavar="LORA@WEIGHT", help=text)


def add_base_model(parser: Arguments) -> None:
    """Add --model and --skip-text-encoder-lora, which say how a LoRA is loaded."""
    parser.add_argument(
        "--model", type=filled, metavar="MODEL", help="base model (default: the one named in the LoRA's file or run)"
    )
    add_model_options(parser)
    add_skip_text_encoder(parser)


def add_model_options(parser: Arguments) -> None:
    """Add the options of `ModelOptions`, which say where the model's files come from."""
    parser.add_argument(
        "--base-pipeline",
        type=filled,
        metavar="MODEL",
        help="pipeline that completes a checkpoint file (default: that of the LoRA's run, or implied by the file)",
    )
    parser.add_argument("--revision", type=filled, metavar="NAME", help="branch, tag or commit of the model's hub id")
    parser.add_argument("--variant", type=filled, metavar="NAME", help="variant of the model's weights, such as fp16")


def add_drawing(parser: argparse.ArgumentParser, scale: bool = True) -> None:
    """Add the groups of options that `load_source` reads."""
    group = parser.add_argument_group("model")
    add_base_model(group)
    if scale:
        add_number(group, "--lora-scale", 1.0, "A", "LoRA scale, any number; 0 is the base model")
    add_device(group)
    group = parser.add_argument_group("sampling")
    of_run = "(default: that of the run)"
    group.add_argument("--num-inference-steps", type=int, metavar="T", help=f"sampling steps, 1 or more {of_run}")
    group.add_argument("--guidance-scale", type=float, metavar="W", help=f"guidance scale, 0 or more {of_run}")
    group.add_argument("--negative-prompt", metavar="TEXT", help=f"negative prompt {of_run}")


def add_skip_text_encoder(parser: Arguments) -> None:
    """Add --skip-text-encoder-lora."""
    parser.add_argument(
        "--skip-text-encoder-lora",
        action="store_true",
        help="ignore the LoRA's layers of text encoders (default: they are applied)",
    )


def add_device(parser: Arguments, precision: bool = True) -> None:
    """Add the device and, with `precision`, the precision and the quantization of the model."""
    parser.add_argument(
        "--device",
        default="auto",
        type=device_name,
        metavar="DEVICE",
        help="auto, cpu, mps, cuda or cuda:N (default: auto, a GPU if there is one)",
    )
    if precision:
        parser.add_argument(
            "--mixed-precision",
            choices=PRECISIONS,
            help="precision of the model (default: that of the run; without a run, that in which the model is trained)",
        )
        parser.add_argument(
            "--quantization",
            choices=QUANTIZATIONS,
            help="backend that stores the denoiser's linear layers in 8 or 4 bits (default: that of the run, or none)",
        )


def add_reward_precision(parser: Arguments, default: str = "that of the reward") -> None:
    """Add --reward-precision; `default` says what holds without it."""
    parser.add_argument(
        "--reward-precision",
        choices=REWARD_PRECISIONS,
        help=f"precision in which the linear layers of rewards are stored (default: {default})",
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the group of options that `resolve_eval_spec` reads."""
    group = parser.add_argument_group("evaluation")
    of_run = "(default: those of the run's evaluations)"
    group.add_argument("--prompts", type=filled, metavar="FILE_OR_SET", help=f"prompt file or set {of_run}")
    group.add_argument(
        "--reward", type=filled, metavar="EXPR", help="reward, see 'draftune list rewards' (default: that of the run)"
    )
    group.add_argument("--eval-rewards", metavar="EXPR", help=f"evaluation rewards; '' for none {of_run}")
    add_reward_precision(group, "that of the run")
    add_number(group, "--num-images", 2, "N", "images of each prompt, 1 or more")


def check_numbers(args: argparse.Namespace, **lowest: float) -> None:
    """Check the range of numeric options before anything is loaded.

    Args:
        args: The parsed arguments.
        lowest: Minimum by option, besides those of the options that several commands share.

    Raises:
        DraftuneError: a value is out of range.
    """
    for name, low in {**lowest, "num_inference_steps": 1, "guidance_scale": 0, "seed": 0}.items():
        value = getattr(args, name, None)
        flag, most = f"--{name.replace('_', '-')}", MOST_IMAGES if name == "num_images" else MOST
        if value is not None and not low <= value < math.inf:
            raise DraftuneError(f"{flag} must be at least {low} and finite, not {value}")
        if value is not None and value > most:
            raise DraftuneError(f"{flag} must be at most {most}, not {value}")
    if not math.isfinite(getattr(args, "lora_scale", 1.0)):
        raise DraftuneError(f"--lora-scale must be finite, not {args.lora_scale}")


def table_output(text: str | None, *read: str | None) -> Path | None:
    """Check the path of a table to write.

    Args:
        text: The value of --output, None if it was not given.
        read: Files that the command reads, which must not be overwritten.

    Returns:
        The path, None without --output.

    Raises:
        DraftuneError: the path is no .csv or .json file, cannot be written, or is one of `read`.
    """
    if text is None:
        return None
    output = user_path(text)
    if names_folder(text):
        raise DraftuneError(f"--output must be a .csv or .json file, {text!r} is a folder")
    if output.suffix.lower() not in (".csv", ".json"):
        raise DraftuneError(f"--output must be a .csv or .json file, not {text!r}")
    if output.exists() and any(path and user_path(path).exists() and output.samefile(user_path(path)) for path in read):
        raise DraftuneError(f"--output {text!r} is an input of this command; give another file")
    check_writable(output)
    return output


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Turn an OSError in the block into a DraftuneError that names the output."""
    try:
        yield
    except OSError as error:
        raise DraftuneError(f"cannot write to {str(output)!r}: {error.strerror or error}") from error


def load_source(args: argparse.Namespace) -> tuple[DiffusionModel, Settings]:
    """Load the model of `args.source`, a model's name, a run or a LoRA.

    Returns:
        The model on its device, and the run's settings with those changed that the options give.
    """
    from draftune.runs.load import load_for_sampling

    model, settings = load_for_sampling(
        args.source,
        args.model,
        args.lora_scale,
        args.device,
        args.mixed_precision,
        args.skip_text_encoder_lora,
        args.quantization,
        ModelOptions.of(args),
    )
    return model, with_drawing(settings, args)


def with_drawing(settings: Settings, args: argparse.Namespace) -> Settings:
    """Return the settings with those of sampling and of the weights' storage that were given to `add_drawing`."""
    from draftune.runs.load import override

    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "mixed_precision", "quantization")
    return override(settings, **{name: getattr(args, name) for name in names})
