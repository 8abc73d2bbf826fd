"""A summary of a run in sentences: its settings, its results, and a warning of over-optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from draftune.errors import DraftuneError
from draftune.evaluation.criterion import EVAL_PREFIX
from draftune.evaluation.verdict import (
    UNDECIDED,
    change_bounds,
    direction,
    known,
    moved,
    number,
    standard_error,
    two_errors,
    within,
)
from draftune.registry.expression import Call, Sum, parse, written_sum
from draftune.settings import Settings
from draftune.training.early_stopping import EarlyStopping
from draftune.utils.tables import duration

Rows = Sequence[Mapping[str, Any]]
ENDS = 10
"""Number of updates at each end of a run whose rewards are averaged, since single batches are noisy."""


def facts(settings: Settings, metrics: Rows, device: str | None) -> list[list[str]]:
    """Return the main settings and the cost of a run as pairs of name and value."""
    last = metrics[-1] if metrics else {"step": 0, "train_seconds": 0, "reward_queries": 0}
    values = {
        "Reward": settings.reward,
        "Evaluation rewards": settings.eval_rewards,
        "Method": settings.method,
        "Base model": settings.model,
        "Prompts": settings.prompts,
        "LoRA steps": settings.lora_steps,
        "Continued from": settings.init_lora,
        "Retained prompts": settings.retain_prompts,
        "Evaluation prompts": settings.eval_prompts,
        "Updates": f"{last['step']:,} of {settings.steps:,}",
        "Scored images": f"{last['reward_queries']:,}",
        "Training time": duration(last["train_seconds"]),
        "Device": device,
    }
    return [[name, str(value)] for name, value in values.items() if value]


def summary(settings: Settings, metrics: Rows, evaluations: Rows, reward: str | None) -> str:
    """Return a paragraph on the results. `reward` is the reward's column in the evaluations."""
    if not metrics:
        return "No update has been made yet."
    done = metrics[-1]["step"]
    start = f"in {done:,} updates" if done >= settings.steps else f"in {done:,} of {settings.steps:,} updates"
    sentences = [f"{start} the reward of the training images {in_training(metrics)}."]
    if reward is not None and len(evaluations) > 1:
        sentences[0] = f"{start} the reward {course(evaluations, reward)}."
    if UNDECIDED in sentences[0]:
        sentences[0] = f"nothing can be said of the reward yet: {sentences[0]}"
    sentences[0] = sentences[0][0].upper() + sentences[0][1:]
    best = best_step(evaluations)
    if best is not None:
        sentences.append(f"The LoRA in best/ is from update {best:,}.")
        since = sum(row["step"] > best for row in evaluations)
        if done < settings.steps and settings.early_stopping_patience and since >= settings.early_stopping_patience:
            sentences.append(f"The run stopped early: {since} evaluations after it were not better.")
    if skipped := metrics[-1].get("nonfinite_steps"):
        sentences.append(f"{skipped:,} updates were skipped, since a reward or a gradient was not finite.")
    text = " ".join(sentences)
    # The upper bound of an interval has a sign.
    if " to +" in text or " to -" in text:
        text += " Changes have their 95 % intervals in parentheses."
    return f"{text} ± is two standard errors." if "±" in text else text


def in_training(metrics: Rows) -> str:
    """Describe how the mean reward of the first updates changed to that of the last ones."""
    count = min(ENDS, (len(metrics) + 1) // 2)
    ends = [[row["reward"] for row in rows if known(row, "reward")] for rows in (metrics[:count], metrics[-count:])]
    first, last = (fmean(values) if values else None for values in ends)
    # The batches of an update differ in prompts and seeds: that spread is in the rewards of several updates.
    several = min(map(len, ends)) > 1
    error = sum(stdev(values) ** 2 / len(values) for values in ends) ** 0.5 if several else None
    bounds = two_errors((last or 0.0) - (first or 0.0), error)
    return moved(first, last, bounds) + (f", as means of {count} updates" if count > 1 else "")


def course(rows: Rows, key: str) -> str:
    """Describe how a column changed from the first evaluation to the last, and its maximum if that lies between."""
    measured = [row for row in rows if known(row, key)]
    if len(measured) < 2:
        return "was measured once only" if measured else "was never finite"
    first, last, top = measured[0], measured[-1], max(measured, key=lambda row: row[key])
    words = moved(first[key], last[key], change_bounds(key, first, last))
    above = [direction(*change_bounds(key, row, top)) for row in (first, last)]
    if min(above) > 0:
        words += f" and was highest, {within(top[key], standard_error(top, key))}, at update {top['step']:,}"
    return words


def warning(settings: Settings, evaluations: Rows, reward: str | None) -> str | None:
    """Return the over-optimization warning after the last evaluation, with the update of its first occurrence."""
    if reward is None:
        return None
    guard, since, text = EarlyStopping({}, 0, reward, held_out_weights(settings)), None, None
    for row in evaluations:
        guard.update(row)
        text = guard.warning()
        since = (since or row["step"]) if text else None
    return f"{text[0].upper()}{text[1:]}. This was first seen at update {since:,}." if text else None


def sweep_note(sweep: Mapping[str, Any]) -> str:
    """Return the sentences on the recommended scale; empty text if none is recommended."""
    if not known(sweep, "recommended"):
        return ""
    scale, criterion = sweep["recommended"], sweep.get("criterion")
    by = f", by {criterion}" if criterion else ""
    start = "The LoRA at several scales: 0 is the base model, 1 the LoRA as trained."
    if not scale:
        return f"{start} No scale is measurably better than the base model{by}."
    text = f"{start} Recommended{by}: {number(scale)}."
    try:
        low, high = (float(bound) for bound in sweep["improvement"][1:])
    except (KeyError, TypeError, ValueError):
        return text  # sweeps of earlier versions have no interval
    better = "It is better than" if direction(low, high) > 0 else f"There is {UNDECIDED} to"
    return f"{text} {better} the base model (95 % interval {number(low)} to {number(high)})."


def held_out_weights(settings: Settings) -> dict[str, float]:
    """Return the weights of the evaluation rewards by column, as far as the settings contain them.

    A reward has the column of its label, or of its expression if another one has the same label.
    """
    try:
        tree = parse(settings.eval_rewards or "")
    except DraftuneError:
        return {}  # rewards that were passed as Python objects
    terms = [(1.0, tree)] if isinstance(tree, Call) else tree.terms
    return {f"{EVAL_PREFIX}{name}": weight for weight, call in terms for name in (label_of(call), str(call))}


def label_of(tree: Call | Sum) -> str:
    """Return the label of a reward's expression, as `draftune.rewards` builds it."""
    if isinstance(tree, Sum):
        return written_sum([(weight, label_of(call)) for weight, call in tree.terms], digits=4)
    name = tree.name.rpartition(":")[2]
    return name if tree.inner is None else f"{name}({label_of(tree.inner)})"


def best_step(evaluations: Rows) -> int | None:
    """Return the update of the best evaluation, None without evaluations."""
    return next((row["step"] for row in reversed(evaluations) if row.get("best") is True), None)
