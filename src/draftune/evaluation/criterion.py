"""Columns of the evaluations, and the criterion by which the best evaluation is chosen: a weighted sum of columns."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from draftune.errors import DraftuneError, unknown

if TYPE_CHECKING:
    from draftune.rewards import Reward

EVAL_PREFIX = "eval/"
"""Prefix of the columns of the evaluation rewards."""
DIVERSITY = f"{EVAL_PREFIX}diversity"
"""Column of `draftune.evaluation.metrics.diversity`."""
PIXEL_L1 = "pixel_l1_from_base"
"""Column of the mean absolute difference of the images from the base model's, pixels in [0, 1]."""
DENOISER_MSE = "denoiser_mse_from_base"
"""Column of `draftune.evaluation.metrics.denoiser_mse_from_base`."""
COLUMN = re.compile(r"""(?!-)[^\s"'*+]*/[^\s"'*+]*""")
"""A single column, which may have any name without spaces, quotes and signs."""
TERM = re.compile(r"""(?:(\d+\.?\d*(?:[eE][-+]?\d+)?)\s*\*\s*)?("[^"]+"|'[^']+'|[^*]+)""")
"""A column with an optional factor."""
T = TypeVar("T", bound=Any)


def parse_criterion(rule: str) -> dict[str, float]:
    """Parse a weighted sum of columns, such as `eval/clip - 0.5*pixel_l1_from_base`.

    In a sum, a column whose name is no Python expression stands in quotes: `eval/aesthetic + 0.1*"eval/clip-2"`.

    Returns:
        The weights by column.

    Raises:
        DraftuneError: the text is no such sum.
    """
    weights: dict[str, float] = {}
    if COLUMN.fullmatch(rule):
        return {rule: 1.0}
    try:
        terms = list(signed_terms(ast.parse(rule.strip(), mode="eval").body))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        terms = []
    for sign, node in terms:
        match = TERM.fullmatch(ast.get_source_segment(rule.strip(), node) or "")
        if match is None or re.fullmatch(r"[\d.]*", match[2]):
            terms = []
            break
        quoted = re.fullmatch(r"""(["'])(.*)\1""", match[2])
        column = quoted[2] if quoted else match[2]
        weights[column] = weights.get(column, 0.0) + sign * float(match[1] or 1)
    if not terms:
        example = "eval/clip + 0.5*reward"
        raise DraftuneError(f"metric_for_best_model must be a sum of columns such as {example!r}, not {rule!r}")
    return weights


def signed_terms(node: ast.expr, sign: float = 1.0) -> Iterator[tuple[float, ast.expr]]:
    """Yield the terms of a sum with their signs."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        yield from signed_terms(node.left, sign)
        yield from signed_terms(node.right, sign if isinstance(node.op, ast.Add) else -sign)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield from signed_terms(node.operand, -sign)
    else:
        yield sign, node


def default_criterion(metric_for_best_model: str, eval_rewards: Reward | None) -> dict[str, float]:
    """Return the weights of `metric_for_best_model`, else those of the evaluation rewards; empty without both."""
    if metric_for_best_model or eval_rewards is None:
        return parse_criterion(metric_for_best_model) if metric_for_best_model else {}
    return {f"{EVAL_PREFIX}{label}": weight for label, (weight, _) in eval_rewards.named_terms.items()}


def weighted_sum(weights: Mapping[str, float], row: Mapping[str, T]) -> T:
    """Return the weighted sum of a row's columns, numbers or tensors. Raises DraftuneError for an unknown column."""
    for column in weights:
        if column not in row:
            raise unknown("column of the evaluations", column, row)
    total: Any = sum(weight * row[column] for column, weight in weights.items())
    return total
