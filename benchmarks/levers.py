"""Measure what makes a denoiser call and the prefix cheaper, and how that changes gradient and reward.

    python benchmarks/levers.py [--model emoji] [--reward emoji_aesthetic] [--rounds 9] [--compile] [--tables calls]

Tables:
- calls: a guided call without gradient, and a call with its backward pass, for several variants in turn: medians, and
  the median ratio to the plain variant.
- reuse: trains with DRaFT-1. For a prefix that is j updates old, it shows how far the latent before the last step and
  the gradient differ from those of a new prefix with the same noise, and the cosine of the gradients of two batches.
- prefix: cheaper prefixes against the exact one: time, latent, gradient.
- signal: the signal-to-noise ratio of the gradient for DRaFT-LV's n and the batch size, after five updates with the
  same settings, and the ratio per second.
- race: trains with cheaper prefixes for an equal time, several seeds. Only on request.
"""

from __future__ import annotations

import openmp  # isort: skip  # noqa: F401 - before torch

import argparse
import statistics
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from draftune.lora import add_lora
from draftune.models import DiffusionModel, load_model
from draftune.sampling.sampler import PrefixCache
from draftune.training.trainer import Trainer
from embedded import settings_for
from overhead import seconds
from prefixes import cosine, gradient, prefix, race

GUIDANCE = 3.0
SHARED = (1, 2, 4, 8, 16)
GRAPHS = ("CUDA graph", "CUDA graph, timestep on the GPU")


def prepared(model: DiffusionModel, layout: torch.memory_format = torch.channels_last) -> DiffusionModel:
    """Add a new LoRA to a model and set its memory layout."""
    add_lora(model, 8)
    for part in model.modules:
        part.to(memory_format=layout)  # type: ignore[call-overload]
    return model


def adapted(name: str, precision: str = "no", layout: torch.memory_format = torch.channels_last) -> DiffusionModel:
    """Load the model with a new LoRA."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return prepared(load_model(name).to(device, precision), layout)


def calls(
    models: dict[str, DiffusionModel], prompts: Sequence[str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Callable[[], object]]]:
    """Return a guided call without gradient and one with its backward pass, both by the names of the variants."""
    free: dict[str, Callable[[], Tensor]] = {}
    graph: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        with torch.no_grad():
            condition = model.encode(prompts, "", True)
        x = model.noise(torch.Generator().manual_seed(0), len(prompts))

        def call(
            name: str = name, model: DiffusionModel = model, condition: Tensor = condition, x: Tensor = x
        ) -> Tensor:
            with model.autocast():
                if name == "guidance in two calls":
                    negative, positive = (model.predict(x, 500, half, 1.0) for half in condition.chunk(2))
                    return negative + GUIDANCE * (positive - negative)
                return model.predict(x, 500, condition, GUIDANCE)

        def without(name: str = name, call: Callable[[], Tensor] = call) -> Tensor:
            with torch.inference_mode() if name == "inference mode" else torch.no_grad():
                return call()

        free[name] = without
        if name != "inference mode":
            graph[name] = lambda call=call: call().float().mean().backward()  # type: ignore[misc]
    return free, graph


def graphed(model: DiffusionModel, prompts: Sequence[str], tensor_timestep: bool = False) -> Callable[[], Tensor]:
    """Capture a guided call without gradient in a CUDA graph, and return a function that replays it.

    Args:
        model: The model, on a GPU.
        prompts: The prompts of the call.
        tensor_timestep: Whether the timestep is a tensor on the GPU instead of a number.

    Raises:
        RuntimeError: The call can't be captured, or this torch has no CUDA.
    """
    timestep: Any = torch.tensor(500, device=model.device) if tensor_timestep else 500
    with torch.no_grad():
        condition = model.encode(prompts, "", True)
    x = model.noise(torch.Generator().manual_seed(0), len(prompts))

    @torch.no_grad()
    def call() -> Tensor:
        with model.autocast():
            return model.predict(x, timestep, condition, GUIDANCE)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def time_calls(args: argparse.Namespace) -> None:
    """Print times and ratios to the plain variant: channels last, float32, both guidance branches in one call."""
    prompts = ["cat face", "pizza", "red apple", "rocket"]
    models = {
        "plain": adapted(args.model),
        "channels first": adapted(args.model, layout=torch.contiguous_format),
        "bf16": adapted(args.model, "bf16"),
        "inference mode": adapted(args.model),
        "guidance in two calls": adapted(args.model),
    }
    if args.compile:
        models["compiled"] = adapted(args.model)
        models["compiled"].denoiser.compile()
    without, graph = calls(models, prompts)
    free: dict[str, Callable[[], object]] = {**without}
    model = models["plain"]
    free["encoding the prompts"] = torch.no_grad()(lambda: model.encode(prompts, "", True))
    print(f"| a call for {len(prompts)} prompts | without a graph | of plain | with, and backward | of plain |")
    print("|---|---|---|---|---|")
    times = {kind: measured(variants, args.rounds) for kind, variants in (("free", free), ("graph", graph))}
    for name in free:
        cells = []
        for kind in ("free", "graph"):
            if name in times[kind]:
                ratio = statistics.median(a / b for a, b in zip(times[kind][name], times[kind]["plain"], strict=True))
                cells += [f"{statistics.median(times[kind][name]):.4f} s", f"{ratio:.2f}"]
            else:
                cells += ["", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measured(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each variant once in each round, after two warm-up calls; return the seconds by name."""
    for variant in variants.values():
        for _ in range(2):
            variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(seconds(variant))
    return times


def bias(args: argparse.Namespace) -> None:
    """Print how far the latent and the gradient differ for a prefix that is j updates old."""
    with TemporaryDirectory() as folder:
        settings = settings_for(args.model) | {"method": "draft_k(k=1)", "eval_rewards": "", "eval_prompts": ""}
        trainer = Trainer(args.model, args.reward, output=f"{folder}/run", **settings)
    model, last = trainer.model, len(trainer.schedule) - 1
    rows: dict[int, list[tuple[float, float, float, float]]] = {j: [] for j in SHARED}
    step = 0
    for start in args.starts:
        while step < start:
            trainer.train_step.run(step := step + 1)
        batches = []
        for i in range(args.batches):
            prompts = trainer.prompts[4 * i : 4 * i + 4]
            latents = PrefixCache(model.noise(torch.Generator().manual_seed(i), len(prompts)))
            gradient(trainer, prompts, latents)  # samples the prefix into `latents`
            batches.append((prompts, latents))
        for j in SHARED:
            while step < start + j:
                trainer.train_step.run(step := step + 1)
            fresh = [(prompts, PrefixCache(latents.latents[0])) for prompts, latents in batches]
            new = [gradient(trainer, *batch) for batch in fresh]
            for i, ((prompts, latents), (_, renewed)) in enumerate(zip(batches, fresh, strict=True)):
                moved = renewed.latents[last] - latents.latents[last]
                old = gradient(trainer, prompts, latents)
                distance = float(moved.norm() / renewed.latents[last].norm())
                other = cosine(new[i], new[(i + 1) % len(new)])
                rows[j].append((distance, cosine(old, new[i]), float(old.norm() / new[i].norm()), other))
    print(f"\nAfter updates {args.starts}, {args.batches} batches; medians\n")
    print("| updates since | latent moved by | cosine of gradients | ratio of norms | cosine of two batches |")
    print("|---|---|---|---|---|")
    for j, row in rows.items():
        distance, along, norms, other = (statistics.median(column) for column in zip(*row, strict=True))
        print(f"| {j} | {distance:.1%} | {along:.3f} | {norms:.2f} | {other:.3f} |", flush=True)


def signal(args: argparse.Namespace) -> None:
    """Print the signal-to-noise ratio of the gradient, in total and per second, for DRaFT-LV's n and the batch size."""
    print("\nSignal: squared norm of the mean gradient / variance, of 16 batches, after 5 updates\n")
    print("| n | batch | signal | seconds, prefix / terms | signal per second | with the prefix shared by 4 |")
    print("|---|---|---|---|---|---|")
    for n, size in ((0, 4), (1, 4), (2, 4), (4, 4), (0, 2), (0, 8), (2, 8)):
        with TemporaryDirectory() as folder:
            settings = settings_for(args.model) | {"method": f"draft_lv(n={n})", "batch_size": size}
            settings |= {"eval_rewards": "", "eval_prompts": "", "output": f"{folder}/run"}
            trainer = Trainer(args.model, args.reward, **settings)
        for step in range(5):
            trainer.train_step.run(step + 1)
        samples: list[Tensor] = []
        times: list[tuple[float, float]] = []
        for i in range(16):
            prompts = [trainer.prompts[(size * i + j) % len(trainer.prompts)] for j in range(size)]
            latents = PrefixCache(trainer.model.noise(torch.Generator().manual_seed(i), size))
            denoise = trainer.model.denoiser_for(prompts, trainer.schedule, trainer.settings.guidance_scale)
            last = len(trainer.schedule) - 1
            path = seconds(lambda: latents.get(last, denoise, trainer.schedule.steps))  # noqa: B023
            times.append((path, seconds(lambda: samples.append(gradient(trainer, prompts, latents)))))  # noqa: B023
        gradients = torch.stack(samples)
        spread = float(gradients.var(0).sum())
        # Subtract the contribution of the variance to the squared norm of the mean.
        share = max(0.0, float(gradients.mean(0).square().sum()) - spread / len(samples)) / spread
        path, terms = (statistics.median(column) for column in zip(*times, strict=True))
        alone, shared = share / (path + terms), share / (path / 4 + terms)
        print(f"| {n} | {size} | {share:.3f} | {path:.2f} / {terms:.2f} | {alone:.3f} | {shared:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--reward", default="emoji_aesthetic")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also time the compiled network; needs a C++ compiler")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--starts", type=int, nargs="*", default=[5, 25], help="updates before sampling the prefixes")
    parser.add_argument("--tables", nargs="*", default=["calls", "reuse", "prefix", "signal"], choices=TABLES)
    parser.add_argument("--height", type=int, help="height and width of the images of the table `prefix`")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the runs of the table `race`")
    parser.add_argument("--seconds", type=float, default=20, help="CPU time of each run of the table `race`")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for name in args.tables:
        TABLES[name](args)


TABLES = {"calls": time_calls, "reuse": bias, "prefix": prefix, "signal": signal, "race": race}

if __name__ == "__main__":
    main()
