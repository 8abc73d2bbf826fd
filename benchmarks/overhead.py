"""Compare an update with its floor, a lower bound: only the calls of denoiser, decoder and reward that it needs.

    python benchmarks/overhead.py [--model emoji] [--reward emoji_aesthetic] [--rounds 7]

Both are timed alternately in one process, so that other load on the machine affects both. The medians and their ratio
are printed. The lower bound consists of the prefix (guided calls without gradient), then for each term of the gradient
its calls with gradient, one call of decoder and reward and the backward pass, and the optimizer step. It includes the
recomputation of gradient checkpointing: blocks within a call, or one more call without gradient for each call of a
graph.
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

from draftune.training.trainer import Trainer


def floor(trainer: Trainer, calls: int, terms: int) -> Callable[[], None]:
    """Return a function that runs the network calls of an update with `terms` gradient terms of `calls` calls each."""
    model, s = trainer.model, trainer.settings
    prompts = trainer.prompts[: s.batch_size]
    assert model.embeddings is not None  # a trainer has encoded its prompts
    condition = model.embeddings.condition(prompts, "", s.guidance_scale > 1)
    x = model.noise(torch.Generator().manual_seed(0), len(prompts))
    parameters = list(trainer.train_step.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    timesteps = [step.timestep for step in trainer.schedule.steps]

    def call(timestep: float, inside: bool = False) -> torch.Tensor:
        # Inside a chain of calls, the backward pass continues to the previous call.
        return model.predict(x.detach().requires_grad_(inside), timestep, condition, s.guidance_scale)

    def run() -> None:
        with torch.no_grad():
            for timestep in timesteps[:-calls]:
                call(timestep)
        for _ in range(terms):
            for i in range(calls):
                if s.gradient_checkpointing in ("denoiser", "both"):
                    with torch.no_grad():
                        call(timesteps[i - calls])
                predicted = call(timesteps[i - calls], i > 0)
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
        ("draft_lv(n=2)", "none", 1, 3),
        ("draft_k(k=10)", "denoiser", 10, 1),
        ("draft_k(k=10)", "both", 10, 1),
    ):
        with TemporaryDirectory() as folder:
            settings = {
                "method": method,
                "gradient_checkpointing": mode,
                "prefix_reuse_steps": 1,
                "output": f"{folder}/run",
            }
            trainer = Trainer(args.model, args.reward, eval_rewards="", eval_prompts="", **settings)
            bare, steps = floor(trainer, calls, terms), itertools.count(1)
            bare()
            trainer.train_step.run(next(steps))
            pairs = [(seconds(lambda: trainer.train_step.run(next(steps))), seconds(bare)) for _ in range(args.rounds)]  # noqa: B023
        update, least = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{method:14} {mode:7} update {update:.3f} s  floor {least:.3f} s  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
