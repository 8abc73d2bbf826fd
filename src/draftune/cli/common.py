"""What the commands share: how one is described, flags that several have, and how a source becomes a model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError
from draftune.settings import DEVICE, MOST, PRECISIONS, Settings
from draftune.utils.paths import check_writable, names_folder, user_path

if TYPE_CHECKING:
    from draftune.models import Model


MOST_PICTURES = 10**6
"""Of one prompt: all of them are held in memory."""


@dataclass(frozen=True)
class Command:
    """One word of the command line: what its help says, its flags, and what it does (an exit code, or None for 0)."""

    name: str
    """One word, or two for a command of a group: "experimental distill"."""
    help: str
    description: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def filled(text: str) -> str:
    """An argument that says something; a shell variable that was never set does not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def add_number(parser: argparse.ArgumentParser, flag: str, default: float, metavar: str, text: str) -> None:
    """Add a number of the default's type, with the default at the end of its help."""
    help_text = f"{text} (default: {default:g})"
    parser.add_argument(flag, type=type(default), default=default, metavar=metavar, help=help_text)


def device_name(text: str) -> str:
    """Return the argument. Raises ArgumentTypeError if it is no device's name."""
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N, not {text!r}")
    return text


def add_drawing(parser: argparse.ArgumentParser, scale: bool = True) -> None:
    """What `load_source` reads."""
    parser.add_argument(
        "--model", type=filled, help="the base model, where the LoRA does not say it or it lies elsewhere"
    )
    if scale:
        parser.add_argument("--lora-scale", type=float, default=1.0, metavar="A", help="0: base model, 1: as trained")
    add_skip_text_encoder(parser)
    parser.add_argument("--num-inference-steps", type=int, metavar="T", help="sampling steps; as in the run unless set")
    parser.add_argument("--guidance-scale", type=float, metavar="W", help="as in the run unless set")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="as in the run unless set")
    add_device(parser)


def add_skip_text_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-text-encoder-lora",
        action="store_true",
        help="leave out a LoRA's layers of text encoders (default: they are applied)",
    )


def add_device(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        type=device_name,
        metavar="DEVICE",
        help="auto, cpu, mps, cuda or cuda:N (default: auto, a GPU if there is one)",
    )
    if precision:
        parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="of the model (default: no)")


def check_numbers(args: argparse.Namespace, **lowest: float) -> None:
    """Raises DraftuneError for a flag out of range, before anything is loaded."""
    for name, low in {**lowest, "num_inference_steps": 1, "guidance_scale": 0, "seed": 0}.items():
        value = getattr(args, name, None)
        flag, most = f"--{name.replace('_', '-')}", MOST_PICTURES if name == "num_images" else MOST
        if value is not None and not low <= value < math.inf:
            raise DraftuneError(f"{flag} must be at least {low} and finite, not {value}")
        if value is not None and value > most:
            raise DraftuneError(f"{flag} must be at most {most}, not {value}")
    if not math.isfinite(getattr(args, "lora_scale", 1.0)):
        raise DraftuneError(f"--lora-scale must be a number, not {args.lora_scale}")


def table_output(text: str | None, *read: str | None) -> Path | None:
    """A .csv or .json file, if one is asked for. Raises DraftuneError for any other, and for one of those `read`."""
    if text is None:
        return None
    output = user_path(text)
    if names_folder(text):
        raise DraftuneError(f"--output takes a file, and {text!r} is a folder")
    if output.suffix.lower() not in (".csv", ".json"):
        raise DraftuneError(f"--output takes a .csv or a .json file, not {text!r}")
    if output.exists() and any(path and user_path(path).exists() and output.samefile(path) for path in read):
        raise DraftuneError(f"--output would take the place of {text!r}, which is read; give another")
    check_writable(output)
    return output


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Says in one line that a file could not be written."""
    try:
        yield
    except OSError as error:
        raise DraftuneError(f"cannot write to {str(output)!r}: {error.strerror or error}") from error


def load_source(args: argparse.Namespace) -> tuple[Model, Settings]:
    """The model of a name, a run or a LoRA on its device, and how to draw with it: as in the run, but for the flags."""
    from draftune.runs.load import open_source

    model, settings = open_source(
        args.source, args.model, args.lora_scale, args.device, args.mixed_precision, args.skip_text_encoder_lora
    )
    return model, replace(settings, **drawing_flags(args))


def drawing_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of drawing that the flags of `add_drawing` change."""
    flags = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}
    return {name: value for name, value in flags.items() if value is not None}
