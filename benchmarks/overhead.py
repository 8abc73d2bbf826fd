"""Compare an update with its floor, a lower bound: only the calls of denoiser, decoder and reward that it needs.

    python benchmarks/overhead.py [--model emoji] [--reward emoji_aesthetic] [--rounds 7]
    python benchmarks/overhead.py --families [NAME ...] [--rounds 7]

Both are timed alternately in one process, so that other load on the machine affects both. The medians, the median ratio
and its range are printed. --families takes a small random pipeline of each family from the tests, DRaFT-1 with 10
steps and batches of 16, and CPU seconds of one thread: calls of some milliseconds are short against other load.

The lower bound consists of the prefix (guided calls without gradient), then for each term of the gradient its calls
with gradient, one call of decoder and reward and the backward pass, and the optimizer step. It includes the
recomputation of gradient checkpointing: blocks within a call, or one more call without gradient for each call of a
graph.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from draftune.sampling.schedule import Step
from draftune.training.trainer import Trainer
from embedded import settings_for


def floor(trainer: Trainer, calls: int, terms: int) -> Callable[[], None]:
    """Return a function that runs the network calls of an update with `terms` gradient terms of `calls` calls each."""
    model, s = trainer.model, trainer.settings
    prompts = trainer.prompts[: s.batch_size]
    assert model.embeddings is not None  # a trainer has encoded its prompts
    condition = model.embeddings.condition(prompts, "", s.guidance_scale > 1)
    x = model.noise(torch.Generator().manual_seed(0), len(prompts))
    parameters = list(trainer.train_step.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    path = trainer.schedule.steps

    def call(step: Step, inside: bool = False) -> torch.Tensor:
        # Inside a chain of calls, the backward pass continues to the previous call.
        scale = model.guidance_at(step, trainer.schedule, s.guidance_scale)
        return model.predict(x.detach().requires_grad_(inside), step.timestep, condition, scale)

    def run() -> None:
        with torch.no_grad():
            for step in path[:-calls]:
                call(step)
        for _ in range(terms):
            for i in range(calls):
                if s.gradient_checkpointing in ("denoiser", "both"):
                    with torch.no_grad():
                        call(path[i - calls])
                predicted = call(path[i - calls], i > 0)
                if i < calls - 1:
                    predicted.mean().backward()
            for part, prompt in zip(predicted.split(s.reward_batch_size), prompts, strict=True):
                # The decoder's graph ends at the latent; the denoiser's backward pass follows below.
                latent = part.detach().requires_grad_()
                trainer.reward(model._decode(latent), [prompt]).mean().backward()
            predicted.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of a call in seconds."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


ROWS = (
    ("draft_k(k=1)", "blocks", 1, 1),
    ("draft_lv(n=2)", "blocks", 1, 3),
    ("draft_lv(n=2)", "none", 1, 3),
    ("draft_k(k=10)", "denoiser", 10, 1),
    ("draft_k(k=10)", "both", 10, 1),
)
"""Method, gradient checkpointing, calls of a term with gradient, and terms."""


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time of a call in seconds."""
    start = time.process_time()
    function()
    return time.process_time() - start


def row(trainer: Trainer, calls: int, terms: int, rounds: int, clock: Callable[[Callable[[], object]], float]) -> str:
    """Return cells with the medians of update and floor, and the median, minimum and maximum of their ratio."""
    bare, steps = floor(trainer, calls, terms), itertools.count(1)
    bare()
    trainer.train_step.run(next(steps))
    pairs = [(clock(lambda: trainer.train_step.run(next(steps))), clock(bare)) for _ in range(rounds)]
    update, least = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return f"{update:.3f} | {least:.3f} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"


def family_trainers(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Trainer]]:
    """Yield a trainer for a small random pipeline of each family, as the tests build it; of all without names."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from helpers.every_family import TEXT_FAMILIES, every_family

    folders = every_family(folder)
    settings: dict[str, Any] = {"method": "draft_k(k=1)", "gradient_checkpointing": "blocks", "mixed_precision": "no"}
    settings |= {"num_inference_steps": 10, "batch_size": 16, "prefix_reuse_steps": 1}
    for name in names or TEXT_FAMILIES:
        if name not in ("sd", "sdxl", "sd3"):
            settings |= {"height": 64, "width": 64}  # their own size is that of the published models
        yield name, Trainer(str(folders[name]), "brightness", ["a cat"] * 16, output=f"{folder}/{name}-run", **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--reward", default="emoji_aesthetic")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="*", metavar="NAME")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    numbers = "network calls, seconds | ratio | from | to |\n|---"
    with TemporaryDirectory() as folder:
        if args.families is not None:
            torch.set_num_threads(1)
            print(f"| family | update, seconds | {numbers}{'|---' * 5}|")
            for name, trainer in family_trainers(args.families, Path(folder)):
                print(f"| {name} | {row(trainer, 1, 1, args.rounds, cpu_seconds)}", flush=True)
            return
        print(f"| method | `--gradient-checkpointing` | update, seconds | {numbers}{'|---' * 6}|")
        for i, (method, mode, calls, terms) in enumerate(ROWS):
            settings = settings_for(args.model) | {"method": method, "gradient_checkpointing": mode}
            settings |= {"prefix_reuse_steps": 1}
            settings |= {"eval_rewards": "", "eval_prompts": "", "output": f"{folder}/run-{i}"}
            trainer = Trainer(args.model, args.reward, **settings)
            print(f"| `{method}` | `{mode}` | {row(trainer, calls, terms, args.rounds, seconds)}", flush=True)


if __name__ == "__main__":
    main()
