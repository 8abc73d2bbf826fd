"""The Bradley-Terry model with linear scores: logistic regression on differences of features, with a ridge penalty."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

FOLDS = 10
CONFIDENCE = 0.95
MAX_ITERATIONS = 100
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out comparisons that a model predicts, with its 95 % interval (Wilson, 1927).

    Attributes:
        correct: Number of pairs whose preferred image has the higher score.
        count: Number of pairs.
    """

    correct: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return the lower and upper end of the interval."""
        from scipy import stats  # takes 0.8 s to import

        found = stats.binomtest(self.correct, self.count).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)

    @property
    def above_chance(self) -> bool:
        """Return whether the interval is above one half."""
        return self.interval[0] > 0.5

    def __str__(self) -> str:
        low, high = self.interval
        share = self.correct / self.count
        return f"{self.correct} of {self.count} ({share:.0%}, 95 % interval {low:.0%} to {high:.0%})"


def loss(weight: Tensor, differences: Tensor, ridge: float) -> Tensor:
    """Return sum over n of log(1 + exp(-weight . differences[n])) + ridge / 2 |weight|^2 (Bradley and Terry, 1952)."""
    return softplus(-differences @ weight).sum() + ridge / 2 * weight.square().sum()


def fit(differences: Tensor, ridge: float) -> Tensor:
    """Return the weight [D] that minimizes `loss`, by Newton's method with step halving.

    The minimum is unique, and it is a combination of the N differences. It is therefore found in at most N dimensions.

    Args:
        differences: Features of the preferred image minus those of the other one [N, D], float64.
        ridge: Weight of the penalty, above 0.
    """
    basis = torch.linalg.qr(differences.T).Q  # [D, min(N, D)]
    x = differences @ basis
    weight = x.new_zeros(x.shape[1])
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(MAX_ITERATIONS):
        wrong = torch.sigmoid(-x @ weight)
        gradient = ridge * weight - x.T @ wrong
        if gradient.norm() <= TOLERANCE:
            break
        hessian = x.T @ (x * (wrong * (1 - wrong))[:, None]) + ridge * identity
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        now, size = loss(weight, x, ridge), 1.0
        # Armijo's condition. Near the minimum the loss is equal up to rounding.
        while loss(weight - size * step, x, ridge) > now - 1e-4 * size * gradient @ step + 1e-12 and size > 1e-6:
            size /= 2
        weight = weight - size * step
    return basis @ weight


def cross_validate(differences: Tensor, pairs: Sequence[Hashable], ridge: float, seed: int = 0) -> Accuracy:
    """Predict each comparison by a weight that was fitted without it, in FOLDS parts of equal size.

    Answers about one pair are held out together and count once, by their mean: they are not independent.

    Args:
        differences: As in `fit`.
        pairs: The pair that each comparison is of.
        ridge: As in `fit`.
        seed: Seed of the parts.
    """
    own = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    index = torch.tensor([own[pair] for pair in pairs])
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    folds = order[index] % min(FOLDS, len(own))
    margins = differences.new_zeros(len(own))
    for fold in folds.unique():
        held_out = folds == fold
        weight = fit(differences[~held_out], ridge)
        margins.index_add_(0, index[held_out], differences[held_out] @ weight)
    return Accuracy(int((margins > 0).sum()), len(own))
