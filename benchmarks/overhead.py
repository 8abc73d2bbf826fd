"""An update against its floor: the bare calls of denoiser, decoder and reward that it needs.

    python benchmarks/overhead.py [--model emoji] [--reward emoji_aesthetic] [--rounds 7]

Both are timed in turn in one process, so that the machine's mood falls on both; the medians and their ratio are
printed. The floor does what an update must do and nothing else: the guided calls without a graph before the cut; then,
for every term of the gradient, its calls with a graph, one call of decoder and reward and the backward pass; and the
optimiser's step. What checkpointing computes again is part of the floor: blocks of a single call by the network's own
checkpointing, or, where a graph spans several calls, one more call without a graph for each.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch

from draftune.training.train import prepare
from draftune.training.trainer import Trainer


def floor(trainer: Trainer, calls: int, terms: int) -> Callable[[], None]:
    """The bare network calls of one update whose gradient has `terms` terms of `calls` calls each."""
    model, s = trainer.model, trainer.settings
    prompts = trainer.prompts[: s.batch_size]
    with torch.no_grad():
        condition = model.encode(prompts, "", s.guidance_scale > 1)
    x = model.noise(torch.Generator().manual_seed(0), len(prompts))
    parameters = list(trainer.updates.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    timesteps = [step.timestep for step in trainer.schedule.steps]

    def call(timestep: float, inside: bool = False) -> torch.Tensor:
        # Inside a chain, the backward pass goes on to what comes before.
        return model.predict(x.detach().requires_grad_(inside), timestep, condition, s.guidance_scale)

    def run() -> None:
        with torch.no_grad():
            for timestep in timesteps[:-calls]:
                call(timestep)
        for _ in range(terms):
            for i in range(calls):
                if s.gradient_checkpointing in ("calls", "both"):
                    with torch.no_grad():
                        call(timesteps[i - calls])
                predicted = call(timesteps[i - calls], i > 0)
                if i < calls - 1:
                    predicted.mean().backward()
            for picture, prompt in zip(predicted.split(s.reward_batch_size), prompts, strict=True):
                # The decoder's graph ends at the latent; what follows is the network's.
                latent = picture.detach().requires_grad_()
                trainer.reward(model.decode_raw(latent), [prompt]).mean().backward()
            predicted.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--reward", default="emoji_aesthetic")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for method, mode, calls, terms in (
        ("draft_k(k=1)", "blocks", 1, 1),
        ("draft_lv(n=2)", "blocks", 1, 3),
        ("draft_lv(n=2)", "no", 1, 3),
        ("draft_k(k=10)", "calls", 10, 1),
        ("draft_k(k=10)", "both", 10, 1),
    ):
        with TemporaryDirectory() as folder:
            settings = {"method": method, "gradient_checkpointing": mode, "prefix_reuse": 1, "output": f"{folder}/run"}
            trainer = prepare(args.model, args.reward, held_out="", eval_prompts="", **settings)
            bare, steps = floor(trainer, calls, terms), itertools.count(1)
            bare()
            trainer.updates.update(next(steps))
            pairs = [(seconds(lambda: trainer.updates.update(next(steps))), seconds(bare)) for _ in range(args.rounds)]  # noqa: B023
        update, least = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{method:14} {mode:7} update {update:.3f} s  floor {least:.3f} s  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
