"""Choose truncation, copies and batch size by the expected progress per second, measured before training.

Let G be the mean over images of the full gradient (K = T), and g the gradient of one image with a candidate's
truncation, with mean m and S the trace of its covariance. The gradient of B images has the expected square norm
|m|^2 + S / B, where S / |m|^2 is the simple noise scale (McCandlish et al., 2018, arXiv:1812.06162, Eq. 2.8).

AdamW divides the gradient by the root of its mean square. If the noise has the same share in all coordinates, an update
decreases the loss to first order by the learning rate times a number in proportion to

    progress = G . m / (|G| sqrt(|m|^2 + S / B))

This is the root of the expected squared cosine of the gradient with G, without the chance part of the noise along G.
The best candidate has the largest progress per second.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftune.methods import load_method
from draftune.training.optim import RNGReplay
from draftune.training.placement import checkpointing_of
from draftune.training.prefix_reuse import gradient_of

if TYPE_CHECKING:
    from draftune.training.step import TrainStep

METHODS = ("draft_k(k=5)", "draft_k(k=2)", "draft_k(k=1)", "draft_lv(n=1)", "draft_lv(n=2)")
"""Candidates, by falling number of steps in the graph: each prefix continues the one before."""
BATCH_SIZES = (1, 2, 4, 8)
"""Candidates for the images of a batch in each process."""
TIMED = 2
"""Batches of the largest size, for the seconds of an image; single images give the seconds of a batch."""


@dataclass
class Candidate:
    """Unbiased estimates for one truncation, from the gradients of single samples.

    A sample is the mean of `images` images; products of two different samples have the product of the means as their
    expectation.

    Attributes:
        method: The method.
        images: Images of a sample.
        times: Seconds of an update by its number of images.
    """

    method: str
    images: int = 1
    times: dict[int, list[float]] = field(default_factory=dict)
    count: int = 0
    squares: float = 0.0
    full_squares: float = 0.0
    products: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    full_total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, gradient: Tensor, full: Tensor) -> None:
        """Add the gradient of a sample [P], and its full gradient [P]."""
        self.count += 1
        self.total, self.full_total = self.total + gradient, self.full_total + full
        self.squares += float(gradient @ gradient)
        self.full_squares += float(full @ full)
        self.products += float(gradient @ full)

    def between(self, first: Tensor, second: Tensor, same: float) -> float:
        """Return the mean product of the gradients of two different samples; `same` is the sum over equal ones."""
        return (float(first @ second) - same) / (self.count * (self.count - 1))

    @property
    def signal(self) -> float:
        """Return |m|^2."""
        return self.between(self.total, self.total, self.squares)

    @property
    def noise(self) -> float:
        """Return S, the trace of the covariance of one image's gradient."""
        return self.images * (self.squares / self.count - self.signal)

    @property
    def cosine(self) -> float:
        """Return the estimated cosine of m with G: above 1 by chance, and NaN if the samples show no signal."""
        norms = self.signal * self.between(self.full_total, self.full_total, self.full_squares)
        along = self.between(self.total, self.full_total, self.products)
        return along / math.sqrt(norms) if norms > 0 else math.nan

    def progress(self, size: int) -> float:
        """Return the progress of an update of `size` images times |G|, which is the same for all candidates."""
        along = self.between(self.total, self.full_total, self.products)
        return max(0.0, along) / math.sqrt(max(self.signal, 0.0) + self.noise / size)

    def seconds(self, size: int) -> float:
        """Return the seconds of an update of `size` images, on the line through the medians of two sizes."""
        (few, fast), (many, slow) = ((images, statistics.median(self.times[images])) for images in sorted(self.times))
        return fast + (slow - fast) * (size - few) / (many - few)

    def rate(self, size: int) -> float:
        """Return the progress per second."""
        return self.progress(size) / self.seconds(size)


def measure(updates: TrainStep, samples: int, methods: Sequence[str] = METHODS) -> list[Candidate]:
    """Measure the candidates. Weights, random numbers and the order of prompts stay as they are.

    Every process must call it, and all get the same numbers.

    Args:
        updates: The update step of a run.
        samples: Images of each process whose gradients are compared, at least 2.
        methods: The candidates, by falling number of steps in the graph.
    """
    context, processes = updates.context, updates.context.processes
    before, queue = RNGReplay(updates.generator), list(updates.prompt_sampler.queue)
    shared, device = context.settings.prefix_reuse_steps, context.accelerator.device
    candidates = [Candidate(method, processes.count) for method in methods]

    def use(method: str, size: int) -> None:
        updates.context = replace(
            context, method=load_method(method), settings=replace(context.settings, method=method, batch_size=size)
        )
        context.model.set_checkpointing(checkpointing_of(context.settings, updates.context.method))

    try:
        sizes = (processes.count, BATCH_SIZES[-1] * processes.count)
        for size, number in zip(sizes, (samples, TIMED), strict=True):
            for _ in range(number):
                use(methods[0], size)
                item, replay = updates.next_input(updates.prompt_sampler), RNGReplay(updates.generator)
                if size == sizes[0]:
                    use("draft", size)
                    full = gradient_of(updates, 1, item, replay)
                path = 0.0
                for candidate in candidates:
                    use(candidate.method, size)
                    batch = updates.batch(1, item, updates.record(item))
                    known = min(updates.context.method.steps_with_gradient(context.schedule))
                    start = now(device)
                    batch.no_grad_latents(known)
                    sampled = now(device)
                    path += sampled - start
                    gradient = gradient_of(updates, 1, item, replay)
                    candidate.times.setdefault(size, []).append(path / shared + now(device) - sampled)
                    if size == sizes[0]:
                        candidate.add(gradient, full)
    finally:
        updates.context = context
        context.model.set_checkpointing(checkpointing_of(context.settings, context.method))
        updates.prompt_sampler.queue = queue
        before.rewind()
    for candidate in candidates:
        shared_times = processes.broadcast([[size, times] for size, times in candidate.times.items()])
        candidate.times = dict(shared_times)
    return candidates


def now(device: torch.device) -> float:
    """Return the time in seconds, after all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def best(candidates: Sequence[Candidate], sizes: Sequence[int] = BATCH_SIZES) -> tuple[Candidate, int]:
    """Return the candidate with the largest progress per second, and its number of images, over all processes.

    All rates are 0 if the samples show no progress along the full gradient; the first pair is returned then.
    """
    pairs = [(candidate, size * candidate.images) for candidate in candidates for size in sizes]
    return max(pairs, key=lambda pair: pair[0].rate(pair[1]))


def table(candidates: Sequence[Candidate], sizes: Sequence[int] = BATCH_SIZES) -> str:
    """Return what was measured as a Markdown table: the progress per second relative to the best pair."""
    winner, size = best(candidates, sizes)
    top, images = winner.rate(size) or math.nan, [number * winner.images for number in sizes]
    lines = [
        "| method | cosine with draft | noise scale | s, 1 image | s, 1 more | "
        + " | ".join(f"{number} images" for number in images),
        "|---" * (5 + len(images)),
    ]
    for one in candidates:
        more = one.seconds(2) - one.seconds(1)
        cells = [f"`{one.method}`", f"{one.cosine:.2f}", f"{one.noise / one.signal:.1f}"]
        cells += [f"{one.seconds(1):.2f}", f"{more:.2f}"]
        lines.append("| " + " | ".join(cells + [f"{one.rate(n) / top:.2f}" for n in images]))
    return "\n".join(f"{line} |" for line in lines)
