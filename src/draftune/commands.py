"""What each command of the command line does. Imports torch only once a command runs."""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftune.errors import DraftuneError, unknown
from draftune.paths import user_path
from draftune.settings import Settings, read_yaml

if TYPE_CHECKING:
    from draftune.models import Model


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
    check_numbers(args, num_images=1)
    output = picture_output(args.output)
    from draftune.images import grid, save_image, to_pil

    model, settings = load_source(args)
    schedule = model.schedule(settings.num_inference_steps)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in args.prompt for i in range(args.num_images)]
    pictures = model.generate(
        prompts, seeds, schedule, settings.guidance_scale, settings.negative_prompt, progress=True
    )

    with writing_to(output):
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
    print(output)


def run_reno(args: argparse.Namespace) -> None:
    check_numbers(args, steps=1, learning_rate=0)
    output = picture_output(args.output)
    import torch

    from draftune.images import grid, save_image, to_pil
    from draftune.reno import optimize_noise
    from draftune.rewards import find_reward

    # What is missing of the reward is said before the model is read.
    reward = find_reward(args.reward)
    model, settings = load_source(args)
    found = optimize_noise(
        model,
        reward,
        args.prompt,
        seed=args.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        steps=args.steps,
        learning_rate=args.learning_rate,
        progress=True,
    )
    before, after = found.rewards[0], found.rewards[found.best_step]
    pictures = torch.cat([found.first, found.best])
    names = ["before", "after"]
    with writing_to(output):
        if output.suffix:
            save_image(grid([pictures], [args.prompt], names, [[f"{before:.3g}", f"{after:.3g}"]]), output)
        else:
            for name, picture in zip(names, to_pil(pictures), strict=True):
                save_image(picture, output / f"{name}.png")
    where = f"at step {found.best_step} of {args.steps}; {len(found.rewards)} scored pictures"
    print(f"{args.reward}  {before:.3f} → {after:.3f}  {where}\n{output}")


def check_numbers(args: argparse.Namespace, **lowest: float) -> None:
    """Raises DraftuneError for a flag out of range, before anything is loaded."""
    for name, low in {**lowest, "num_inference_steps": 1, "guidance_scale": 0, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**63:
            raise DraftuneError(f"--{name.replace('_', '-')} must be at least {low} and finite, not {value}")
    if not math.isfinite(args.lora_scale):
        raise DraftuneError(f"--lora-scale must be a number, not {args.lora_scale}")


def picture_output(text: str) -> Path:
    """A .png file or a folder. Raises DraftuneError for any other file."""
    output = user_path(text)
    if output.suffix and output.suffix.lower() != ".png" and not output.is_dir():
        raise DraftuneError(f"--output takes a .png file or a folder, not {text!r}")
    return output


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Says in one line that a file could not be written."""
    try:
        yield
    except OSError as error:
        raise DraftuneError(f"cannot write to {str(output)!r}: {error.strerror}") from error


def load_source(args: argparse.Namespace) -> tuple[Model, Settings]:
    """The model of a name, a run or a LoRA on its device, and how to draw with it: as in the run, but for the flags."""
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
    flags = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}
    return model, replace(settings, **{name: value for name, value in flags.items() if value is not None})


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
        with writing_to(output):
            scores.write(output)
    return 1 if scores.broken else 0


def run_reproduce(args: argparse.Namespace) -> None:
    part = None
    if args.part is not None:
        numbers = args.part.split("/")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise DraftuneError(f"--part takes I/N, such as 1/2, not {args.part!r}")
        part = int(numbers[0]), int(numbers[1])
    from draftune.reproduce import reproduce

    for path in reproduce(args.experiments, output=args.output, quick=args.quick, seeds=args.seeds, part=part):
        print(path)


def run_list(args: argparse.Namespace) -> None:
    from draftune.methods import METHODS
    from draftune.models import MODELS
    from draftune.prompts import PROMPT_SETS
    from draftune.reproduce import EXPERIMENTS
    from draftune.rewards import REWARDS

    described: dict[str, Callable[..., Any]] = {**REWARDS, **METHODS}
    tables: dict[str, Mapping[str, str]] = {
        "models": MODELS,
        "rewards": {name: first_sentence(factory.__doc__) for name, factory in REWARDS.items()},
        "methods": {name: first_sentence(method.__doc__) for name, method in METHODS.items()},
        "prompts": {name: text for name, (text, _) in PROMPT_SETS.items()},
        "experiments": {name: experiment.question for name, experiment in EXPERIMENTS.items()},
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
