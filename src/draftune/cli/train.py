"""`draftune train`: fine-tune a LoRA on a reward."""

from __future__ import annotations

import argparse
import signal
import threading
from dataclasses import Field, fields
from typing import Any

from draftune.cli.common import Command, filled
from draftune.presets import config_path, read_yaml
from draftune.recommended import PAPER
from draftune.settings import GROUPS, Settings
from draftune.settings.field_checks import kind
from draftune.utils.processes import rank_and_world_size, shutdown


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, in groups."""
    parser.add_argument(
        "--config",
        type=filled,
        metavar="FILE",
        help="YAML file of these settings, or a preset's name; flags override it.",
    )
    group: argparse._ActionsContainer = parser
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"] + limits(f)
        if kind(f) is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else None
            group.add_argument(flag, type=kind(f), metavar=choices or kind(f).__name__.upper(), help=text)


def limits(f: Field[Any]) -> str:
    """Return a setting's range and default in parentheses, as its help text ends."""
    low, high = f.metadata["low"], f.metadata["high"]
    parts = [f"{low:g} to {high:.10g}"] if high is not None else [f"at least {low:g}"] if low is not None else []
    default: Any = f.default
    if default is not None and default != "":
        parts.append(f"default: {('off', 'on')[default] if kind(f) is bool else default}")
    elif f.name in PAPER:
        parts.append("default: recommended for the model")
    return f" ({'; '.join(parts)})" if parts else ""


def train_settings(args: argparse.Namespace) -> Settings:
    """Return the settings of the config file and the flags; flags override the file."""
    values: dict[str, Any] = read_yaml(config_path(args.config)) if args.config else {}
    flags = {f.name: getattr(args, f.name) for f in fields(Settings)}
    return Settings.from_mapping(values | {key: value for key, value in flags.items() if value is not None})


def run(args: argparse.Namespace) -> None:
    """Train, and print the comparison of base and fine-tuned model."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # before the first update it ends like Ctrl-C
    settings = train_settings(args)
    from draftune.training import train

    result = train(settings=settings)
    if rank_and_world_size()[0] == 0:
        if result.comparison:
            prompts = result.comparison.prompts
            said = f"{len(prompts)} images of {len(set(prompts))} prompts, the same seeds"
            other = f" | base with {settings.eval_prompt_template!r}" * bool(result.comparison.template)
            print(f"\nbase → fine-tuned, {said} (change) and its 95 % interval{other}")
            print(result.comparison.table())
        print(f"\nimages    {result.folder / 'before_after.png'}\nLoRA      {result.folder / 'lora'}")
    shutdown()


COMMAND = Command(
    "train",
    "fine-tune a LoRA on a reward",
    "Fine-tune a LoRA on a reward. Without flags, the embedded emoji model is trained toward one of its styles.",
    "draftune train --model emoji --reward emoji_aesthetic --output runs/first",
    arguments,
    run,
)
