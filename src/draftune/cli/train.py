"""Fine-tuning a LoRA on a reward."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from draftune.cli.common import Command
from draftune.presets import config_path
from draftune.recommended import PAPER
from draftune.settings import Settings, kind, read_yaml
from draftune.utils.processes import launched, leave


def arguments(parser: argparse.ArgumentParser) -> None:
    """Every setting is a flag."""
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of these settings, or a preset's name; flags win over it"
    )
    for f in fields(Settings):
        flag = "--" + f.name.replace("_", "-")
        default = f.default if f.default is not None else "as fits the model" if f.name in PAPER else ""
        text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
        if kind(f) is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else None
            parser.add_argument(flag, type=kind(f), metavar=choices or kind(f).__name__.upper(), help=text)


def train_settings(args: argparse.Namespace) -> Settings:
    """What `draftune train` was told, by the file and by the flags, which win."""
    values: dict[str, Any] = read_yaml(config_path(args.config)) if args.config else {}
    flags = {f.name: getattr(args, f.name) for f in fields(Settings)}
    return Settings.from_mapping(values | {key: value for key, value in flags.items() if value is not None})


def run(args: argparse.Namespace) -> None:
    settings = train_settings(args)
    from draftune.training import train

    made = train(settings=settings)
    if launched()[0] == 0:
        if made.comparison:
            count = len(made.comparison.prompts)
            print(f"\nbase → tuned, {count} pictures of {len(set(made.comparison.prompts))} prompts, the same seeds")
            print(made.comparison.table())
        print(f"\npictures  {made.folder / 'before_after.png'}\nLoRA      {made.folder / 'lora'}")
    leave()


COMMAND = Command(
    "train",
    "fine-tune a LoRA on a reward",
    "Fine-tunes a LoRA on a reward. Without flags the embedded model learns to draw glossy 3D emoji.",
    "draftune train --model emoji --reward emoji-aesthetic --output runs/first",
    arguments,
    run,
)
