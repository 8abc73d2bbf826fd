"""Run experiments on the embedded model and write their tables and figures."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from draftune.errors import DraftuneError, unknown
from draftune.prompts import load_prompts
from draftune.utils.paths import folder_output, user_path
from experiments.budget import FULL, QUICK, Budget
from experiments.examples import example_images
from experiments.report import Experiment, write_experiment, write_report
from experiments.runner import ExperimentRunner, RunSpec

NAMES = (
    "sample_efficiency",
    "truncation_depth",
    "lv_samples",
    "lora_scale",
    "lora_merging",
    "reward_hacking",
    "timestep_spacing",
    "symmetry",
    "black_box",
    "guidance",
    "optimizers",
    "second_reward",
    "few_steps",
    "taste",
)
EXPERIMENTS: dict[str, Experiment] = {name: importlib.import_module(f"experiments.{name}").EXPERIMENT for name in NAMES}


def shard_of(text: str) -> tuple[int, int]:
    """Parse `I/N`, with 1 <= I <= N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise DraftuneError(f"--shard must be I/N with 1 <= I <= N, such as 1/2, got {text!r}")
    return int(index), int(count)


def shard_runs(experiments: Sequence[Experiment], budget: Budget, index: int = 1, count: int = 1) -> list[RunSpec]:
    """Return every `count`-th of the experiments' distinct runs from the `index`-th; of equal runs the longest."""
    longest: dict[str, RunSpec] = {}
    for spec in (spec for experiment in experiments for spec in experiment.runs(budget)):
        if spec.name not in longest or longest[spec.name].steps < spec.steps:
            longest[spec.name] = spec
    return list(longest.values())[index - 1 :: count]


def environment(name: str, args: argparse.Namespace, budget: Budget) -> str:
    """Return one line with the command, the device, the version of torch, the number of seeds and the date."""
    experiment = EXPERIMENTS[name]
    flags = ["--quick"] * args.quick + ([f"--seeds {args.seeds}"] if args.seeds else [])
    flags += ["--examples DIR"] * experiment.needs_examples
    cpu = f"CPU, {os.cpu_count()} cores ({platform.machine()})"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    seeds = budget.seeds if experiment.repeated else 1
    versions = f"{device}; torch {torch.__version__}; {seeds} seed{'s' if seeds > 1 else ''}"
    return f"`{' '.join(['python -m experiments', name, *flags])}`; {versions}; {datetime.date.today().isoformat()}"


def run(args: argparse.Namespace) -> None:
    """Train the runs of the chosen experiments, then measure each experiment and write its files."""
    for name in args.names:
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
    if args.seeds is not None and args.seeds < 1:
        raise DraftuneError(f"--seeds must be at least 1, got {args.seeds}")
    shard = shard_of(args.shard) if args.shard is not None else None
    chosen = {name: EXPERIMENTS[name] for name in args.names or NAMES}
    # Quick results are never mixed with full ones.
    folder = folder_output(args.output, "--output") / ("quick" if args.quick else "")
    if args.redraw:
        for name, experiment in chosen.items():
            environment_line = (folder / f"{name}.md").read_text(encoding="utf-8").splitlines()[-1]
            write_report(name, experiment, folder, environment_line)
        return
    examples = user_path(args.examples) if args.examples else None
    if examples is not None:
        for prompts in ("emoji", "emoji-common"):
            example_images(examples, load_prompts(prompts))
    for name in [name for name, experiment in chosen.items() if experiment.needs_examples and examples is None]:
        if name in args.names:
            raise DraftuneError(f"the experiment {name} needs a folder of real images: add --examples DIR")
        print(f"skipping {name}: it needs a folder of real images (--examples DIR)", file=sys.stderr)
        del chosen[name]
    budget = QUICK if args.quick else FULL
    budget = replace(budget, seeds=args.seeds or budget.seeds)
    runner = ExperimentRunner(folder / "runs", budget, examples)
    specs = shard_runs(list(chosen.values()), budget, *(shard or (1, 1)))
    for i, spec in enumerate(specs, 1):
        print(f"run {i} of {len(specs)}: {spec.name}, {spec.steps} updates", file=sys.stderr)
        runner.run(spec)
    for name, experiment in {} if shard else chosen.items():
        print(f"experiment {name}", file=sys.stderr)
        write_experiment(name, experiment, runner, folder, environment(name, args, budget))
        print(folder / f"{name}.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a wrong argument, or 130 after Ctrl-C."""
    listing = "\n".join(f"  {name:18} {experiment.question}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Run experiments on the embedded model and write a table (CSV, Markdown) and a figure of each. "
        "Finished runs are skipped and interrupted ones resumed.",
        epilog=f"experiments:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments to run (default: all)")
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of the results (default: results)")
    parser.add_argument("--quick", action="store_true", help="a few updates of each run, into DIR/quick, as a test")
    parser.add_argument("--seeds", type=int, metavar="N", help="repetitions of each compared run (default: 3)")
    parser.add_argument("--shard", metavar="I/N", help="train only the I-th of N parts of the runs, without tables")
    parser.add_argument("--examples", metavar="DIR", help="folder of real images NAME.png, for few_steps")
    parser.add_argument("--redraw", action="store_true", help="write tables and figures again from DIR/NAME.csv")
    try:
        run(parser.parse_args(argv))
    except (DraftuneError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
