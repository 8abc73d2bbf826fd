"""FOSTER itself (arXiv 2204.04662) on a toy: ten classes in two tasks, the seeds side by side in one batch of nets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from draftune.experimental.distill import balanced_weights

SEEDS, SIZE, HIDDEN, OLD, CLASSES = 4, 20, 24, 5, 10
EXEMPLARS, FRESH, TESTED, EPOCHS, BATCH, RATE = 20, 300, 200, 30, 32, 0.05
BETA, HEAT = 0.97, 2.0
Weights = dict[str, Tensor]


def data(count: int, centres: Tensor, classes: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [S, N, 20] and labels [N]: `count` of each class, of three Gaussian clusters each."""
    labels = torch.arange(classes.start, classes.stop).repeat_interleave(count)
    cluster = torch.randint(3, (SEEDS, len(labels)), generator=generator)
    means = centres[torch.arange(SEEDS)[:, None], labels, cluster]
    return means + 0.8 * torch.randn(means.shape, generator=generator), labels


def layer(inputs: int, outputs: int, generator: torch.Generator) -> Tensor:
    """A layer's weights with its biases in the last row."""
    weights = torch.randn(SEEDS, inputs + 1, outputs, generator=generator) * inputs**-0.5
    return torch.cat([weights[:, :-1], torch.zeros(SEEDS, 1, outputs)], 1)


def applied(weights: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(weights[:, -1:], x, weights[:, :-1])


def features(weights: Tensor, x: Tensor) -> Tensor:
    return applied(weights, x).relu()


def trained(
    weights: Weights,
    loss: Callable[[Weights, Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> Weights:
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), RATE, momentum=0.9)
    steps = EPOCHS * (len(y) // BATCH)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(y), generator=generator).split(BATCH)[: len(y) // BATCH]:
            optimizer.zero_grad()
            loss(weights, x[:, some], y[some]).backward()
            optimizer.step()
            falling.step()
    return {name: w.detach() for name, w in weights.items()}


def classified(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy of logits [S, N, C], summed over the seeds."""
    return SEEDS * cross_entropy(logits.flatten(0, 1), y.repeat(SEEDS))


def plain(weights: Weights, x: Tensor) -> Tensor:
    return applied(weights["head"], features(weights["net"], x))


def distilled(student: Tensor, teacher: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Knowledge distillation, balanced by the classes' weights."""
    target = (teacher / HEAT).softmax(-1) * weights
    target = target / target.sum(-1, keepdim=True)
    return -(target * (student / HEAT).log_softmax(-1)).sum(-1).mean(1).sum()


def outcomes() -> dict[str, tuple[float, float]]:
    """Accuracies on old and new classes, by the way of learning the second task; means over the seeds."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(SEEDS, CLASSES, 3, SIZE, generator=g)
    x_old, y_old = data(FRESH, centres, range(OLD), g)
    x_new, y_new = data(FRESH, centres, range(OLD, CLASSES), g)
    x_test, y_test = data(TESTED, centres, range(CLASSES), g)
    old = trained(
        {"net": layer(SIZE, HIDDEN, g), "head": layer(HIDDEN, OLD, g)},
        lambda w, x, y: classified(plain(w, x), y),
        x_old,
        y_old,
        g,
    )
    kept = torch.cat([torch.nonzero(y_old == c)[:EXEMPLARS, 0] for c in range(OLD)])
    x, y = torch.cat([x_old[:, kept], x_new], 1), torch.cat([y_old[kept], y_new])
    weights = torch.tensor(balanced_weights([EXEMPLARS] * OLD + [FRESH] * (CLASSES - OLD), BETA))

    grown = {"net": old["net"], "head": torch.cat([old["head"], layer(HIDDEN, CLASSES - OLD, g)], -1)}
    tuned = trained(grown, lambda w, x, y: classified(plain(w, x), y), x, y, g)

    def boosted_logits(w: Weights, x: Tensor) -> Tensor:
        return applied(w["head"], torch.cat([features(old["net"], x), features(w["net"], x)], -1))

    def boosting(w: Weights, x: Tensor, y: Tensor) -> Tensor:
        logits = boosted_logits(w, x)
        apart = applied(w["auxiliary"], features(w["net"], x))
        before = distilled(logits[..., :OLD], plain(old, x))
        return classified(logits / weights, y) + classified(apart, y) + before

    head = layer(2 * HIDDEN, CLASSES, g)
    head[:, :HIDDEN, :OLD], head[:, -1, :OLD] = old["head"][:, :-1], old["head"][:, -1]
    start = {"net": old["net"], "head": head, "auxiliary": layer(HIDDEN, CLASSES, g)}
    boosted = trained(start, boosting, x, y, g)

    def small(balance: Tensor | float) -> Weights:
        return trained(grown, lambda w, x, _: distilled(plain(w, x), boosted_logits(boosted, x), balance), x, y, g)

    def accuracies(logits: Tensor) -> tuple[float, float]:
        right = (logits.argmax(-1) == y_test).double()
        return float(right[:, y_test < OLD].mean()), float(right[:, y_test >= OLD].mean())

    return {
        "fine-tuned": accuracies(plain(tuned, x_test)),
        "boosted": accuracies(boosted_logits(boosted, x_test)),
        "compressed": accuracies(plain(small(weights), x_test)),
        "compressed plainly": accuracies(plain(small(1.0), x_test)),
    }
