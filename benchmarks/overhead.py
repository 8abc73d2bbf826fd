"""An update against its floor: the bare calls of denoiser, decoder and reward that it needs.

    python benchmarks/overhead.py [--model emoji] [--reward emoji-aesthetic] [--rounds 7]

Both are timed in turn in one process, so that the machine's mood falls on both; the medians and their ratio are
printed. The floor does what an update must do and nothing else: T - 1 guided calls without a graph; then, for every
term of the gradient, one call of denoiser and decoder without a graph, one of each with it (the recomputation that
checkpointing asks for), the reward, and the backward pass; and the optimiser's step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch

from draftune.methods import load_method
from draftune.models import load_model
from draftune.prompts import load_prompts
from draftune.rewards import load_reward
from draftune.settings import Settings
from draftune.training.loop import Trainer
from draftune.training.run import RunFolder


def floor(trainer: Trainer, terms: int) -> Callable[[], None]:
    """The bare network calls of one update with `terms` terms of its gradient."""
    model, s = trainer.model, trainer.settings
    prompts = trainer.prompts[: s.batch_size]
    with torch.no_grad():
        condition = model.encode(prompts, "", s.guidance_scale > 1)
    x = model.noise(torch.Generator().manual_seed(0), len(prompts))
    parameters = list(trainer.updates.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    timesteps = [step.timestep for step in trainer.schedule.steps]

    def run() -> None:
        with torch.no_grad():
            for timestep in timesteps[:-1]:
                model.predict(x, timestep, condition, s.guidance_scale)
        for _ in range(terms):
            with torch.no_grad():
                model.predict(x, timesteps[-1], condition, s.guidance_scale)
                model.decode_raw(x)
            latents = model.predict(x, timesteps[-1], condition, s.guidance_scale)
            trainer.reward(model.decode_raw(latents), prompts).mean().backward()
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
    parser.add_argument("--reward", default="emoji-aesthetic")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for method, terms in (("draft-k(k=1)", 1), ("draft-lv(n=2)", 3)):
        with TemporaryDirectory() as folder:
            settings = Settings(model=args.model, reward=args.reward, method=method, output=f"{folder}/run")
            trainer = Trainer(
                settings,
                RunFolder(settings, {}),
                load_method(method),
                load_model(settings.model),
                load_reward(settings.reward),
                None,
                load_prompts(settings.prompts),
                None,
            )
            bare, steps = floor(trainer, terms), itertools.count(1)
            bare()
            trainer.updates.update(next(steps))
            pairs = [(seconds(lambda: trainer.updates.update(next(steps))), seconds(bare)) for _ in range(args.rounds)]  # noqa: B023
        update, least = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{method:14}  update {update:.3f} s  floor {least:.3f} s  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
