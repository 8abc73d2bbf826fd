"""The paper's claims measured again on the embedded model: runs, tables, figures, findings."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from draftune.errors import DraftuneError, unknown
from draftune.prompts import load_prompts
from draftune.reproduce.curves import EFFICIENCY, OVEROPTIMISATION
from draftune.reproduce.cuts import COPIES_OF_LV, DEPTH, GRID, LAYOUT_REWARD
from draftune.reproduce.few_steps import FEW_STEPS
from draftune.reproduce.guidance import GUIDED
from draftune.reproduce.lab import FULL, QUICK, Lab, Scale, Work
from draftune.reproduce.loras import LORA_SCALE, MIXING
from draftune.reproduce.no_gradient import NO_GRADIENT
from draftune.reproduce.optimizers import OPTIMIZERS_COMPARED
from draftune.reproduce.real import real_pictures
from draftune.reproduce.report import Experiment, Report, findings, markdown, write
from draftune.reproduce.second import SECOND_REWARD
from draftune.utils.paths import check_writable, user_path, written_whole

__all__ = ["EXPERIMENTS", "Experiment", "Report", "reproduce"]

EXPERIMENTS: dict[str, Experiment] = {
    "efficiency": EFFICIENCY,
    "depth": DEPTH,
    "copies": COPIES_OF_LV,
    "lora-scale": LORA_SCALE,
    "mixing": MIXING,
    "over-optimisation": OVEROPTIMISATION,
    "grid": GRID,
    "layout": LAYOUT_REWARD,
    "no-gradient": NO_GRADIENT,
    "guidance": GUIDED,
    "optimizers": OPTIMIZERS_COMPARED,
    "second-reward": SECOND_REWARD,
    "few-steps": FEW_STEPS,
}
HEAD = """# Results

The claims of the DRaFT paper ([Clark et al., ICLR 2024](https://arxiv.org/abs/2309.17400)), and after them those of its
neighbours, measured again on the embedded model: emoji at 64 x 64, {steps} sampling steps, guidance 3; unless said
otherwise batches of 4, a LoRA of rank 8, AdamW at 1e-3 and `emoji_aesthetic` as the training reward. No two updates
share the sampling steps before the gradient (`--prefix-reuse 1`), as they do in `make demo`. The judges are
classifiers that nothing was trained against; all scores are means over {count} pictures of {names} names that were not
trained on, the same seeds every time. It is a small model: a claim that is not seen here may hold on a large one, and
the other way round.

    {command}

makes all of it again, and goes on where it was interrupted. Four words are used for the papers' claims: confirmed,
weaker, not seen, reversed. {quick}
"""


def reproduce(
    names: Sequence[str] = (),
    *,
    output: str | Path = "reproduction",
    quick: bool = False,
    seeds: int | None = None,
    part: tuple[int, int] | None = None,
    examples: str | Path | None = None,
) -> list[Path]:
    """Runs experiments by name, all of them where none is named, and writes `results/` and RESULTS.md into `output`.

    What is there already is used again, so that an interrupted run goes on. With `part` (i, n) only every n-th of the
    training runs is made, from the i-th, and nothing is written about them: n processes share the work, and a last
    call without it does the rest. `examples`: a folder of real pictures, called NAME.png; experiments that want them
    are left out without. Returns the files that were written. Raises DraftuneError for an unknown name.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
    if part is not None and not 1 <= part[0] <= part[1]:
        raise DraftuneError(f"a part is I of N, such as 1/2, not {part[0]}/{part[1]}")
    if seeds is not None and seeds < 1:
        raise DraftuneError(f"seeds must be at least 1, not {seeds}")
    chosen = {name: EXPERIMENTS[name] for name in names or EXPERIMENTS}
    if examples is None:
        for name in [name for name, experiment in chosen.items() if experiment.wants_examples]:
            if name in names:
                raise DraftuneError(f"{name} wants a folder of real pictures: --examples DIR")
            print(f"experiment {name} is left out: it wants real pictures (--examples DIR)", file=sys.stderr)
            del chosen[name]
    elif not user_path(examples).is_dir():
        raise DraftuneError(f"no folder {str(examples)!r} with real pictures (--examples)")
    else:
        for names_of in ("emoji", "emoji-common"):
            real_pictures(user_path(examples), load_prompts(names_of))
    scale = QUICK if quick else FULL
    if seeds is not None:
        scale = replace(scale, seeds=seeds)
    folder = user_path(output)
    if folder.exists() and not folder.is_dir():
        raise DraftuneError(f"the output {str(folder)!r} is a file; give a folder")
    check_writable(folder)
    # What a quick run writes stands beside the results and is never taken for them.
    results = folder / ("results-quick" if quick else "results")
    lab = Lab(results / "runs", scale, None if examples is None else user_path(examples))
    works = share(chosen, scale, *(part or (1, 1)))
    for i, work in enumerate(works, 1):
        print(f"run {i} of {len(works)}: {work.name}, {work.steps} updates", file=sys.stderr)
        lab.run(work)
    if part is not None:
        return []
    written = []
    for name, experiment in chosen.items():
        print(f"experiment {name}", file=sys.stderr)
        report = experiment.report(lab)
        write(name, report, results)
        text = section(name, experiment, report, quick, seeds)
        path = results / f"{name}.md"
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(path)
    written.append(gathered(results, scale, quick, seeds))
    return written


def share(experiments: dict[str, Experiment], scale: Scale, i: int, n: int) -> list[Work]:
    """The i-th of n parts of the runs that experiments need, the longest of each run."""
    longest: dict[str, Work] = {}
    for experiment in experiments.values():
        for work in experiment.work(scale):
            if work.name not in longest or longest[work.name].steps < work.steps:
                longest[work.name] = work
    return list(longest.values())[i - 1 :: n]


def command(names: Sequence[str], quick: bool, seeds: int | None) -> str:
    words = ["draftune reproduce", *names, "--quick" if quick else "", f"--seeds {seeds}" if seeds else ""]
    return " ".join(word for word in words if word)


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores ({platform.machine()})"


def section(name: str, experiment: Experiment, report: Report, quick: bool, seeds: int | None) -> str:
    """An experiment's page: question, claims, figure, table, and how it was made."""
    called = command([name], quick, seeds) + (" --examples DIR" if experiment.wants_examples else "")
    made = (
        f"`{called}`; {device()}; torch {torch.__version__}; {report.seeds} "
        f"seed{'s' if report.seeds > 1 else ''}; {datetime.date.today().isoformat()}. All numbers: "
        f"[{name}.csv]({name}.csv), the figure as [svg]({name}.svg)."
    )
    parts = [
        f"## {experiment.title}\n\n*{experiment.question}*",
        findings(report),
        report.text,
        f"![{experiment.title}]({name}.png)",
        markdown(report.table),
        made,
    ]
    return "\n\n".join(parts) + "\n"


def gathered(results: Path, scale: Scale, quick: bool, seeds: int | None) -> Path:
    """RESULTS.md, or RESULTS-quick.md, of all the experiments that were written so far."""
    head = HEAD.format(
        steps=scale.num_inference_steps,
        count=scale.eval_prompts * scale.eval_images,
        names=scale.eval_prompts,
        command=command([], quick, seeds),
        quick="**These are of a quick run, which shows that everything works and measures nothing.**" if quick else "",
    )
    pages = [results / f"{name}.md" for name in EXPERIMENTS]
    texts = [head.strip() + "\n"]
    for page in pages:
        if page.is_file():
            text = page.read_text(encoding="utf-8")
            texts.append(text.replace(f"({page.stem}.", f"({results.name}/{page.stem}."))
    path = results.parent / f"{results.name.replace('results', 'RESULTS')}.md"
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(texts), encoding="utf-8")
    return path
