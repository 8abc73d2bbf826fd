"""An experiment on what makes a step of a gradient, each at the learning rate that suits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from draftune.experimental.optimizers import MEKA
from draftune.figures import band, figure
from draftune.lora import add_lora, lora_parameters
from draftune.models import Model
from draftune.reproduce.lab import GUIDANCE, ONE, Lab, Scale, Work, slug, tidy
from draftune.reproduce.report import Claim, Experiment, Report, compared, spread
from draftune.sampling.sampler import rollout
from draftune.sampling.schedule import Schedule
from draftune.training.data import PromptOrder

FACTOR = 3.0
"""Between two learning rates that are tried."""
WIDENED = 3
"""How often a search goes on where its best learning rate is its first or its last."""
READ = 0.9
"""The share of names that the judge must still read."""
LOST = 100.0
"""What a run is set back by that is worse; more than any reward."""
WIDTH = 10
"""Updates whose mean the figure shows."""
SCORES = ("reward", "judge_3d", "judge_name", "diversity")
Curve = dict[str, Any]
"""`training`: rewards of the updates; `queries`: pictures scored for each; what `tidy` names: the evaluation."""


@dataclass(frozen=True)
class Rival:
    """An optimiser and the learning rates that are tried first, the middle one the likeliest."""

    name: str
    rates: tuple[float, ...]
    optimizer: str = ""
    """As `--optimizer` has it; "" for AdaMEKA, which training does not offer."""
    gradients: int = 1
    """Of one batch, for one update."""


RIVALS = (
    Rival("AdamW", (3e-4, 1e-3, 3e-3), "adamw"),
    Rival("SGD, momentum 0.9", (0.03, 0.1, 0.3), "sgd(momentum=0.9)"),
    Rival("Step-Tuned SGD", (0.3, 1.0, 3.0), "step_tuned_sgd", 2),
    Rival("EXTRAP + AdamW", (3e-4, 1e-3, 3e-3), "extrapolate(adamw, rate=0.1)"),
    Rival("AdaMEKA", (1e-3, 3e-3)),
)
SIZE = 4
"""Pictures of a batch."""
OWN = 0.0
"""The learning rate that stands for AdaMEKA's own steps."""


def work(rival: Rival, rate: float, seed: int, scale: Scale) -> Work:
    """A run of as many scored pictures as any other: half the updates where each takes two gradients."""
    settings: dict[str, Any] = {"optimizer": rival.optimizer, "learning_rate": rate, "eval_every": 0}
    if rival.gradients > 1:
        # Clipping hides the change that is measured.
        settings["max_grad_norm"] = 0.0
    return Work(ONE, max(1, scale.steps // rival.gradients), seed, settings)


def optimizer_work(scale: Scale) -> list[Work]:
    """What the searches begin with; which runs come after them depends on these."""
    return [work(rival, rate, 0, scale) for rival in RIVALS if rival.optimizer for rate in rival.rates[-scale.rates :]]


def curve(lab: Lab, rival: Rival, rate: float, seed: int) -> Curve:
    if not rival.optimizer:
        name = slug(f"adameka rate={rate} seed={seed}")
        return dict(lab.measured(name, lambda: with_adameka(lab, rate, seed)))
    record = lab.run(work(rival, rate, seed, lab.scale))
    return {
        "training": [row["reward"] for row in record.metrics],
        "queries": [row["reward_queries"] for row in record.metrics],
        **tidy(record.final),
    }


def with_adameka(lab: Lab, rate: float, seed: int) -> Curve:
    """What `draftune train --method 'draft_k(k=1)'` does, by an optimiser that wants the loss of every sample.

    A picture's second derivative comes from the same graph and is no further query.
    """
    scale, model = lab.scale, lab.model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_lora(model, 8)
    model.set_checkpointing("no")  # which takes no second derivative
    optimizer = MEKA(lora_parameters(model).values(), lr=None if rate == OWN else rate, adaptive=True)
    generator, prompts = torch.Generator().manual_seed(seed), lab.prompts
    schedule, order = model.schedule(scale.num_inference_steps), PromptOrder(len(prompts), generator)
    training: list[float] = []
    for _ in range(scale.steps):
        chosen = [prompts[i] for i in order.draw(SIZE)]
        noise = model.noise(generator, SIZE)
        with torch.no_grad():
            before = rollout(model.denoise(chosen, schedule, GUIDANCE), schedule.steps[:-1], noise)
        losses = partial(last_steps, lab, model, schedule, chosen, before)
        with sdpa_kernel(SDPBackend.MATH):
            training.append(-float(optimizer.step(losses)))
    queries = [SIZE * (i + 1) for i in range(scale.steps)]
    return {"training": training, "queries": queries, **tidy(lab.scores(model))}


def last_steps(lab: Lab, model: Model, schedule: Schedule, prompts: Sequence[str], latents: Tensor) -> Tensor:
    """The loss of each picture of DRaFT-1 in a graph of its own, which has second derivatives."""
    losses = []
    for prompt, latent in zip(prompts, latents.split(1), strict=True):
        clean = rollout(model.denoise([prompt], schedule, GUIDANCE), schedule.steps[-1:], latent)
        losses.append(-lab.reward.score(model.decode(clean), [prompt]))
    return torch.cat(losses)


def worth(run: Curve) -> float:
    """What a search wants most of: reward, as long as the judge reads the names. The highest reward is a ruin."""
    return float(run["reward"]) if run["judge_name"] >= READ else run["judge_name"] - LOST


def search(rates: Sequence[float], run: Callable[[float], Curve]) -> dict[float, Curve]:
    """The runs of some learning rates, of more where the best is the lowest or the highest, then of one above it."""
    found = {rate: run(rate) for rate in rates}

    def best() -> float:
        return max(found, key=lambda rate: worth(found[rate]))

    for _ in range(WIDENED if len(rates) > 1 else 0):
        known, rate = sorted(found.keys() - {OWN}), best()
        if rate in (OWN, *known[1:-1]):
            break
        wider = rounded(rate * FACTOR if rate == known[-1] else rate / FACTOR)
        found[wider] = run(wider)
    if len(rates) > 1 and (rate := best()) != OWN:
        # What is above the best is mostly a ruin; how far it can go is wanted more finely.
        found[rounded(rate * FACTOR**0.5)] = run(rounded(rate * FACTOR**0.5))
    return found


def rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


@dataclass
class Tuned:
    """An optimiser's search by seed 0, and its runs of all seeds at the learning rate that was best."""

    rival: Rival
    tried: dict[float, Curve]
    rate: float
    curves: list[Curve]

    @property
    def rewards(self) -> list[float]:
        return [curve["reward"] for curve in self.curves]

    @property
    def reward(self) -> float:
        return mean(self.rewards)

    @property
    def averages(self) -> list[list[float]]:
        """The running mean of the training reward of each seed."""
        return [running(run["training"], WIDTH // self.rival.gradients) for run in self.curves]

    @property
    def halfway(self) -> list[float]:
        """That after half of the scored pictures."""
        return [average[(len(average) - 1) // 2] for average in self.averages]


def said(rate: float) -> str:
    return f"{rate:g}" if rate else "its own"


def tuned(lab: Lab, rival: Rival) -> Tuned:
    rates = rival.rates[-lab.scale.rates :]
    if not rival.optimizer:
        rates = (OWN, *rates)[: lab.scale.rates]
    tried = search(rates, lambda rate: curve(lab, rival, rate, 0))
    best = max(tried, key=lambda rate: worth(tried[rate]))
    return Tuned(rival, tried, best, [curve(lab, rival, best, seed) for seed in range(lab.scale.seeds)])


def optimizers(lab: Lab) -> Report:
    found = {rival.name: tuned(lab, rival) for rival in RIVALS}
    rows, table = [], []
    drawn, axes = figure(1, 2)
    for name, best in found.items():
        runs = {(rate, 0): run for rate, run in best.tried.items()}
        runs |= {(best.rate, seed): run for seed, run in enumerate(best.curves)}
        for (rate, seed), run in sorted(runs.items()):
            row = {"optimizer": name, "learning rate": said(rate), "seed": seed}
            rows.append(row | {key: run[key] for key in SCORES})
        queries = best.curves[0]["queries"]
        line = {"optimizer": name, "learning rate": said(best.rate), "updates": len(queries), "queries": queries[-1]}
        line |= {key: mean(run[key] for run in best.curves) for key in SCORES}
        table.append(line | {"std of reward": spread(best.rewards)})
        band(axes[0, 0], queries, best.averages, name)
        tried = [best.tried[rate] for rate in sorted(best.tried)]
        axes[0, 1].plot([run["reward"] for run in tried], [run["judge_name"] for run in tried], marker=".", label=name)
    axes[0, 0].set(xlabel="scored pictures", ylabel="training reward, running mean")
    axes[0, 1].set(xlabel="reward, by learning rate", ylabel="judge: names it reads")
    axes[0, 0].legend(fontsize=8)

    first = max(found, key=lambda name: found[name].reward)
    text = (
        f"Every optimiser had {table[0]['queries']} scored pictures. A learning rate is the best of a search by seed "
        f"0, among those after which the judge reads {READ:.0%} of the names: above them the reward goes on rising "
        f"while the pictures are ruined. The highest reward is that of {first}, {found[first].reward:.3f}. All that "
        f"were tried are in the csv. Halfway is the mean training reward at the {WIDTH} gradients before half of the "
        "pictures were scored; Step-Tuned SGD's steps are larger in the beginning by its rule."
    )
    claims = [
        against(
            found, "Step-Tuned SGD", "SGD, momentum 0.9", "Step-Tuned SGD gets further than SGD early in training", True
        ),
        against(found, "EXTRAP + AdamW", "AdamW", "extrapolation helps in the first phase of training", True),
        against(found, "AdaMEKA", "AdamW", "AdaMEKA matches tuned Adam", False),
    ]
    return Report(rows, table, drawn, text, claims, lab.scale.seeds)


def running(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and as many before it as make `width`."""
    return [mean(values[max(0, i + 1 - max(1, width)) : i + 1]) for i in range(len(values))]


def against(found: Mapping[str, Tuned], name: str, other: str, paper: str, halfway: bool) -> Claim:
    """One optimiser against another, both as well tuned: ahead halfway, or where that is all that is said, no worse."""
    one, two = found[name], found[other]
    pairs = {"halfway": (one.halfway, two.halfway), "in the end": (one.rewards, two.rewards)}
    differences = {when: mean(a) - mean(b) for when, (a, b) in pairs.items()}
    noises = {when: math.hypot(spread(a), spread(b)) for when, (a, b) in pairs.items()}
    if halfway:
        word = compared(differences["halfway"], noises["halfway"])
    else:
        word = "confirmed" if differences["in the end"] >= -noises["in the end"] else "weaker"
    told = [f"{differences[when]:+.3f} {when} (noise {noises[when]:.3f})" for when in pairs]
    return Claim(paper, f"against {other} {' and '.join(told)}", word)


OPTIMIZERS_COMPARED = Experiment(
    "Optimisers", "Does another optimiser get more from the same pictures?", optimizer_work, optimizers
)
