"""Columns of the evaluations, and the criterion by which the best evaluation is chosen: a weighted sum of columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from draftune.errors import DraftuneError, unknown
from draftune.registry.expression import Call, parse

if TYPE_CHECKING:
    from draftune.rewards import Reward

HELD_OUT = "eval/"
"""Prefix of the columns of the evaluation rewards."""
DIVERSITY = f"{HELD_OUT}diversity"
"""Column of `draftune.evaluation.metrics.diversity`."""
PIXEL_L1 = "pixel_l1_from_base"
"""Column of the mean absolute difference of the images from the base model's, pixels in [0, 1]."""
DENOISER_MSE = "denoiser_mse_from_base"
"""Column of `draftune.evaluation.metrics.denoiser_mse_from_base`."""
COLUMN = re.compile(r"""(?!-)[^\s"'*+]*/[^\s"'*+]*""")
"""A single column, which needs no quotes."""
T = TypeVar("T", bound=Any)


def parse_criterion(rule: str) -> dict[str, float]:
    """Parse one column, as `eval/judge`, or a sum of quoted ones, as `"eval/judge" + 0.5*"eval/diversity"`.

    Returns:
        The weights by column.

    Raises:
        DraftuneError: the text is no such sum.
    """
    tree = Call(rule) if COLUMN.fullmatch(rule) else parse(rule)
    terms = [(1.0, tree)] if isinstance(tree, Call) else tree.terms
    if any(call.settings or call.inner for _, call in terms):
        raise DraftuneError(f"metric_for_best_model must be a sum of quoted columns of the evaluations, not {rule!r}")
    weights: dict[str, float] = {}
    for weight, call in terms:
        weights[call.name] = weights.get(call.name, 0.0) + weight
    return weights


def default_criterion(metric_for_best_model: str, eval_rewards: Reward | None) -> dict[str, float]:
    """Return the weights of `metric_for_best_model`, else those of the evaluation rewards; empty without both."""
    if metric_for_best_model or eval_rewards is None:
        return parse_criterion(metric_for_best_model) if metric_for_best_model else {}
    return {f"{HELD_OUT}{label}": weight for label, (weight, _) in eval_rewards.named_terms.items()}


def weighted_sum(weights: Mapping[str, float], row: Mapping[str, T]) -> T:
    """Return the weighted sum of a row's columns, numbers or tensors. Raises DraftuneError for an unknown column."""
    for column in weights:
        if column not in row:
            raise unknown("column of the evaluations", column, row)
    total: Any = sum(weight * row[column] for column, weight in weights.items())
    return total
