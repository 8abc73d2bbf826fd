"""The command line: parse, call, print. Imports torch only once a command runs."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from draftune.errors import DraftuneError, unknown
from draftune.paths import user_path
from draftune.recommended import PAPER
from draftune.settings import PRECISIONS, Settings, kind, read_yaml

if TYPE_CHECKING:
    from draftune.models import Model


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise DraftuneError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="draftune", description="Fine-tunes diffusion and flow image models on a reward.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", parser_class=Parser, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="fine-tune a LoRA on a reward",
        description="Fine-tunes a LoRA on a reward. Without flags the embedded model learns to draw glossy 3D emoji.",
        epilog="example: draftune train --model emoji --reward emoji-aesthetic --output runs/first",
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", help="a YAML file of these settings, key: value; flags win over it")
    for f in fields(Settings):
        flag = "--" + f.name.replace("_", "-")
        default = f.default if f.default is not None else "as fits the model" if f.name in PAPER else ""
        text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
        if kind(f) is bool:
            train.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else None
            train.add_argument(flag, type=kind(f), metavar=choices or kind(f).__name__.upper(), help=text)
    train.set_defaults(run=run_train)

    sample = commands.add_parser(
        "sample",
        help="draw pictures with a trained LoRA",
        description="Draws pictures with a run's LoRA, a LoRA file, or a model as it is.",
        epilog='example: draftune sample runs/first --prompt "cat face" "pizza" --lora-scale 0.7 --output cats.png',
        allow_abbrev=False,
    )
    sample.add_argument("source", metavar="RUN_OR_LORA", help="a run's folder, a LoRA file or its folder, or a model")
    sample.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="what to draw")
    sample.add_argument("--output", required=True, metavar="FILE_OR_DIR", help="a .png (a grid if several) or a folder")
    sample.add_argument("--model", help="the base model, where the LoRA does not say it or it lies elsewhere")
    sample.add_argument("--lora-scale", type=float, default=1.0, metavar="A", help="0: base model, 1: as trained")
    sample.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture of each prompt")
    sample.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt")
    sample.add_argument("--num-inference-steps", type=int, metavar="T", help="sampling steps; as in the run unless set")
    sample.add_argument("--guidance-scale", type=float, metavar="W", help="as in the run unless set")
    sample.add_argument("--negative-prompt", metavar="TEXT", help="as in the run unless set")
    add_device(sample)
    sample.set_defaults(run=run_sample)

    score = commands.add_parser(
        "score",
        help="score pictures",
        description="Scores picture files with a reward. Exit code 1: some could not be read and were skipped.",
        epilog="example: draftune score out/ 'more/*.jpg' --reward 'emoji-clip + 0.1*emoji-aesthetic' --prompt cat",
        allow_abbrev=False,
    )
    score.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, folders of them, or patterns")
    score.add_argument("--reward", required=True, metavar="EXPR", help="see 'draftune list rewards'")
    prompt = score.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="what all the pictures should show")
    prompt.add_argument("--prompts", metavar="FILE", help="a .csv or .jsonl with an image and its prompt in each row")
    score.add_argument("--output", metavar="FILE", help="also writes the table there, as .csv or .json")
    add_device(score, precision=False)
    score.set_defaults(run=run_score)

    listing = commands.add_parser(
        "list",
        help="what there is: models, rewards, methods, prompts",
        description="Lists what there is, or says everything about one reward or method.",
        epilog="example: draftune list rewards; draftune list hpsv2",
    )
    listing.add_argument("what", nargs="?", help="models, rewards, methods, prompts, or the name of a reward or method")
    listing.set_defaults(run=run_list)
    return parser


def add_device(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    if precision:
        parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="of the model (default: no)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 where it worked, 2 for a mistake of the user's, with one line that says which."""
    argv = expressions_joined(sys.argv[1:] if argv is None else list(argv))
    parser = build_parser()
    try:
        args, extra = parser.parse_known_args(argv)
        if extra:
            raise unrecognized(parser, args, extra[0])
        if args.version:
            from draftune import __version__

            print(__version__)
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        # Torch's and tokenizers' advice about their own innards is not for the user's screen.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        return args.run(args) or 0
    except DraftuneError as error:
        print(f"draftune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        advice = "try smaller pictures; in training --mixed-precision bf16, and a smaller --batch-size (with "
        advice += "--gradient-accumulation-steps) and --reward-batch-size"
        print(f"draftune: out of memory: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("draftune: interrupted", file=sys.stderr)
        return 130


def expressions_joined(argv: Sequence[str]) -> list[str]:
    """The arguments with an expression that starts with a minus joined to its flag: argparse would take it for one."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--reward", "--held-out") and argument[:1] == "-" and argument[:2] != "--":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def unrecognized(parser: argparse.ArgumentParser, args: argparse.Namespace, argument: str) -> DraftuneError:
    if not argument.startswith("--"):
        return DraftuneError(f"unexpected argument {argument!r} (see {parser.prog} --help)")
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    chosen = commands[args.command] if args.command else parser  # type: ignore[index]
    return unknown("flag", argument.partition("=")[0], chosen._option_string_actions)


def train_settings(args: argparse.Namespace) -> Settings:
    """What `draftune train` was told, by the file and by the flags, which win."""
    values: dict[str, Any] = read_yaml(args.config) if args.config else {}
    flags = {f.name: getattr(args, f.name) for f in fields(Settings)}
    return Settings.from_mapping(values | {key: value for key, value in flags.items() if value is not None})


def run_train(args: argparse.Namespace) -> None:
    settings = train_settings(args)
    from draftune.training import train

    run = train(settings=settings)
    if run.comparison:
        count = len(run.comparison.prompts)
        print(f"\nbase → tuned, {count} pictures of {len(set(run.comparison.prompts))} prompts, the same seeds")
        print(run.comparison.table())
    print(f"\npictures  {run.folder / 'before_after.png'}\nLoRA      {run.folder / 'lora'}")


def run_sample(args: argparse.Namespace) -> None:
    for flag, value, low in (
        ("--num-images", args.num_images, 1),
        ("--num-inference-steps", args.num_inference_steps, 1),
        ("--guidance-scale", args.guidance_scale, 0),
        ("--seed", args.seed, 0),
    ):
        if value is not None and not low <= value < 2**63:
            raise DraftuneError(f"{flag} must be at least {low} and finite, not {value}")
    if not math.isfinite(args.lora_scale):
        raise DraftuneError(f"--lora-scale must be a number, not {args.lora_scale}")
    output = user_path(args.output)
    if output.suffix and output.suffix.lower() != ".png" and not output.is_dir():
        raise DraftuneError(f"--output takes a .png file or a folder, not {args.output!r}")
    from draftune.images import grid, save_image, to_pil
    from draftune.models import MODELS, load_model
    from draftune.models.base import default_device

    settings = None
    if args.source in MODELS or (user_path(args.source) / "model_index.json").exists():
        model = load_model(args.source)
    else:
        model, settings = load_tuned(args.source, args.model, args.lora_scale)
    model.to(default_device(args.cpu), args.mixed_precision)
    if settings:
        model.set_grid(settings.timestep_spacing, settings.set_alpha_to_one)
    settings = settings or Settings(model=model.name)
    model.set_size(settings.height, settings.width)
    schedule = model.schedule(args.num_inference_steps or settings.num_inference_steps)
    guidance = settings.guidance_scale if args.guidance_scale is None else args.guidance_scale
    negative = settings.negative_prompt if args.negative_prompt is None else args.negative_prompt
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.num_images)]
    pictures = model.generate(prompts, seeds, schedule, guidance, negative, progress=True)

    try:
        if output.suffix and len(pictures) == 1:
            save_image(to_pil(pictures)[0], output)
        elif output.suffix:
            rows = list(pictures.split(args.num_images))
            seed_labels = [f"seed {seed}" for seed in seeds[: args.num_images]]
            save_image(grid(rows, args.prompt, seed_labels), output)
        else:
            for i, (picture, seed) in enumerate(zip(to_pil(pictures), seeds, strict=True)):
                words = "".join(c if c.isalnum() else "-" for c in prompts[i])[:60]
                save_image(picture, output / f"{i:03d}-{words}-seed{seed}.png")
    except OSError as error:
        raise DraftuneError(f"cannot write to {str(output)!r}: {error.strerror}") from error
    print(output)


def load_tuned(source: str, base: str | None, lora_scale: float) -> tuple[Model, Settings | None]:
    """The base model of a run or LoRA file with the LoRA on it, and the run's settings where it is one."""
    from draftune.lora import base_model, load_lora, lora_file, set_lora_scale
    from draftune.models import load_model
    from draftune.training.run import run_settings

    base = base or base_model(source)
    if base is None:
        raise DraftuneError(f"the LoRA {source!r} does not say which model it belongs to: give --model")
    model = load_model(base)
    load_lora(model, source)
    set_lora_scale(model, lora_scale)
    return model, run_settings(lora_file(source))


def run_score(args: argparse.Namespace) -> int:
    output = user_path(args.output) if args.output else None
    if output and output.suffix not in (".csv", ".json"):
        raise DraftuneError(f"--output takes a .csv or a .json file, not {args.output!r}")
    from draftune.models.base import default_device
    from draftune.rewards import load_reward
    from draftune.scores import find_images, prompts_of, score_files

    images = find_images(args.images)
    prompts = prompts_of(images, args.prompts) if args.prompts else [args.prompt] * len(images)
    device = default_device(args.cpu)
    scores = score_files(load_reward(args.reward).to(device), images, prompts, device)
    problems = list(scores.broken.values())
    if not scores.rows:
        raise DraftuneError(f"none of the {len(images)} pictures can be read: {problems[0]}")
    for problem in problems:
        print(f"draftune: skipped: {problem}", file=sys.stderr)
    print(scores.table())
    if output:
        try:
            scores.write(output)
        except OSError as error:
            raise DraftuneError(f"cannot write to {args.output!r}: {error.strerror}") from error
    return 1 if scores.broken else 0


def run_list(args: argparse.Namespace) -> None:
    from draftune.methods import METHODS
    from draftune.models import MODELS
    from draftune.prompts import PROMPT_SETS
    from draftune.rewards import REWARDS

    described: dict[str, Callable[..., Any]] = {**REWARDS, **METHODS}
    tables = {
        "models": MODELS,
        "rewards": {name: first_sentence(factory.__doc__) for name, factory in REWARDS.items()},
        "methods": {name: first_sentence(method.__doc__) for name, method in METHODS.items()},
        "prompts": {name: text for name, (text, _) in PROMPT_SETS.items()},
    }
    if args.what in described:
        print(description(args.what, described[args.what]))
        return
    if args.what is not None and args.what not in tables:
        raise unknown("list or name", args.what, [*tables, *described])
    for what in [args.what] if args.what else tables:
        print(what)
        width = max(map(len, tables[what]))
        for name, text in tables[what].items():
            print(f"  {name:{width}}  {text}")


def description(name: str, described: Callable[..., Any]) -> str:
    """All that is said of a reward or a method, and its settings with their defaults."""
    signature = inspect.signature(described, eval_str=True)
    settings = ", ".join(str(parameter) for parameter in signature.parameters.values())
    return f"{name}({settings})\n\n{inspect.getdoc(described)}"


def first_sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())
