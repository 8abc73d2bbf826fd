"""Run experiments on the embedded model and write their tables, their figures and RESULTS.md."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from draftune.assets import EMBEDDED
from draftune.errors import DraftuneError, unknown
from draftune.prompts import load_prompts
from draftune.utils.images import save_image
from draftune.utils.paths import atomic_write, folder_output, user_path
from draftune.utils.tables import duration
from experiments.budget import FULL, TINY, Budget
from experiments.examples import example_images
from experiments.experiment import Experiment, Job, estimate, work
from experiments.report import read_csv, write_figure, write_results, write_rows
from experiments.runner import ExperimentRunner

NAMES = (
    "sample_efficiency",
    "truncation_depth",
    "lv_samples",
    "over_optimization",
    "methods",
    "lora_merging",
    "symmetry",
    "guidance",
    "second_reward",
    "few_steps",
    "taste",
)
EXPERIMENTS: dict[str, Experiment] = {name: importlib.import_module(f"experiments.{name}").EXPERIMENT for name in NAMES}
IDENTITY = "identity.json"


def identity(budget: Budget) -> dict[str, object]:
    """Return what all results of a folder have in common: the embedded weights and the sizes, without the seeds."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in EMBEDDED.values() for path in Path(folder).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    sizes = {key: value for key, value in asdict(budget).items() if "seeds" not in key}
    return json.loads(json.dumps({"weights": digest.hexdigest()[:16], **sizes}))


def check_identity(folder: Path, budget: Budget) -> None:
    """Raise DraftuneError if the folder's results are of other weights or sizes; else note the present ones."""
    path, own = folder / IDENTITY, identity(budget)
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if changed := [key for key in own if own[key] != earlier.get(key)]:
            raise DraftuneError(
                f"--output: the results in {str(folder)!r} have other {', '.join(changed)}; choose another folder"
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(own), encoding="utf-8")


def chosen_experiments(args: argparse.Namespace) -> dict[str, Experiment]:
    """Return the experiments of the command line, without those that lack the images they need."""
    for name in args.names:
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
    chosen = {name: EXPERIMENTS[name] for name in args.names or NAMES}
    for name in [name for name, experiment in chosen.items() if experiment.needs_examples and not args.examples]:
        if name in args.names and not args.report:
            raise DraftuneError(f"the experiment {name} needs a folder of real images: add --examples DIR")
        if not args.report:
            print(f"skipping {name}: it needs a folder of real images (--examples DIR)", file=sys.stderr)
            del chosen[name]
    return chosen


def print_estimates(jobs: dict[str, list[Job]], runner: ExperimentRunner) -> None:
    """Print the hours of each experiment on one core; runs that two share count for the first."""
    known: set[str] = set()
    seconds = {name: estimate(own, runner, known) for name, own in jobs.items()}
    for name, value in seconds.items():
        left = [job for job in jobs[name] if not job.is_done(runner)]
        print(f"{name:18} {len(left):4} of {len(jobs[name]):4} jobs left, at most {duration(value)}")
    print(f"{'all':18} at most {duration(sum(seconds.values()))} of one process")


def write_report(folder: Path, names: Sequence[str]) -> None:
    """Write the figures of some experiments, and RESULTS.md of all that have a csv file."""
    rows = {name: read_csv(path) for name in NAMES if (path := folder / "results" / f"{name}.csv").is_file()}
    for name in names:
        if name not in rows:
            raise DraftuneError(f"--report: no {name}.csv in {str(folder / 'results')!r}; run the experiment first")
        write_figure(folder / "results" / f"{name}.png", EXPERIMENTS[name], rows[name])
    write_results(folder / "RESULTS.md", EXPERIMENTS, rows)
    print(folder / "RESULTS.md")


def run(args: argparse.Namespace) -> None:
    """Do the jobs of the chosen experiments, then write each experiment's files and RESULTS.md."""
    if args.seeds is not None and args.seeds < 2:
        raise DraftuneError(f"--seeds must be at least 2, since one seed has no interval, got {args.seeds}")
    if args.images is not None and args.images < 2:
        raise DraftuneError(f"--images must be at least 2, since diversity is between two images, got {args.images}")
    chosen = chosen_experiments(args)
    # Quick results are never mixed with full ones.
    folder = folder_output(args.output, "--output") / ("quick" if args.quick else "")
    if args.report:
        known = [name for name in chosen if name in args.names or (folder / "results" / f"{name}.csv").is_file()]
        write_report(folder, known)
        return
    examples = user_path(args.examples) if args.examples else None
    if examples is not None:
        for prompts in ("emoji", "emoji-common"):
            example_images(examples, load_prompts(prompts))
    budget = TINY if args.quick else FULL
    if args.seeds:
        budget = replace(budget, seeds=args.seeds, few_seeds=args.seeds)
    budget = replace(budget, images_per_prompt=args.images or budget.images_per_prompt)
    runner = ExperimentRunner(folder / "runs", budget, examples)
    runner.folder.mkdir(parents=True, exist_ok=True)
    check_identity(runner.folder, budget)
    jobs = {name: experiment.jobs(budget) for name, experiment in chosen.items()}
    if args.dry_run or not args.quick:
        print_estimates(jobs, runner)
    if args.dry_run:
        return
    for name in chosen:
        work(jobs[name], runner)
        rows = [row for job in jobs[name] for row in job.rows(runner)]
        write_rows(folder / "results" / f"{name}.csv", rows)

        if image := chosen[name].image:
            save_image(image(runner), folder / "results" / f"{name}_images.png")
        write_report(folder, [name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a wrong argument, or 130 after Ctrl-C."""
    listing = "\n".join(f"  {name:18} {experiment.question}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Run experiments on the embedded model. Writes DIR/results/NAME.csv and .png, and DIR/RESULTS.md. "
        "Finished jobs are skipped and interrupted runs resumed. Several processes with one DIR share the work.",
        epilog=f"experiments:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the experiments and their questions")
    parser.add_argument("--output", default="runs/experiments", metavar="DIR", help="default: runs/experiments")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each compared run (default: 5, or 3)")
    parser.add_argument("--images", type=int, metavar="N", help="images of each name in an evaluation (default: 4)")
    parser.add_argument("--dry-run", action="store_true", help="print how long the jobs take here, and end")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into DIR/quick, as a test")
    parser.add_argument("--examples", metavar="DIR", help="folder of real images NAME.png, for few_steps")
    parser.add_argument("--report", action="store_true", help="write figures and RESULTS.md again from the csv files")
    args = parser.parse_args(argv)
    if args.list:
        print(listing)
        return 0
    try:
        run(args)
    except (DraftuneError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
