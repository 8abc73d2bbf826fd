"""A summary of a run in sentences: its settings, its results, and a warning of over-optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftune.errors import DraftuneError
from draftune.evaluation.criterion import DIVERSITY, EVAL_PREFIX
from draftune.evaluation.metrics import RETAINED_PREFIX
from draftune.registry.expression import Call, parse
from draftune.runs.logs import TEMPLATE
from draftune.settings import Settings
from draftune.training.early_stopping import EarlyStopping, spread
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
    return [[name, value] for name, value in values.items() if value]


def summary(settings: Settings, metrics: Rows, evaluations: Rows, reward: str | None) -> str:
    """Return a paragraph on the results. `reward` is the reward's column in the evaluations."""
    if not metrics:
        return "No update has been made yet."
    done, count = metrics[-1]["step"], min(ENDS, (len(metrics) + 1) // 2)
    first, last = (mean([row.get("reward") for row in rows]) for rows in (metrics[:count], metrics[-count:]))
    start = f"In {done:,} updates" if done >= settings.steps else f"In {done:,} of {settings.steps:,} updates"
    mean_of = "" if count == 1 else f", as means of {count} updates"
    sentences = [f"{start} the reward of the training images {moved(first, last)}{mean_of}."]
    if reward is not None and len(evaluations) > 1:
        sentences[0] = f"{start} the reward {course(evaluations, reward)}."
        eval_rewards = [key for key in evaluations[0] if key.startswith(EVAL_PREFIX) and key != DIVERSITY]
        for key in eval_rewards:
            sentences.append(f"The evaluation reward {key.removeprefix(EVAL_PREFIX)} {course(evaluations, key)}.")
        for key in evaluations[0]:
            if key.startswith(RETAINED_PREFIX):
                sentences.append(f"The earlier reward {key.removeprefix(RETAINED_PREFIX)} {course(evaluations, key)}.")
        if DIVERSITY in evaluations[0]:
            sentences.append(f"Diversity {course(evaluations, DIVERSITY)}.")
        if scores := known_scores(evaluations[0].get(TEMPLATE, {}), reward):
            sentences.append(f"The base model has {scores} with the prompts {settings.eval_prompt_template!r}.")
    best = best_step(evaluations)
    if best is not None:
        scores = known_scores(next(row for row in evaluations if row["step"] == best), reward)
        known = f" ({scores})" if scores else ""
        sentences.append(f"The LoRA in best/ is from update {best:,}{known}.")
        since = sum(row["step"] > best for row in evaluations)
        if done < settings.steps and settings.early_stopping_patience and since >= settings.early_stopping_patience:
            sentences.append(f"The run stopped early: {since} evaluations after it were not better.")
    if skipped := metrics[-1].get("nonfinite_steps"):
        sentences.append(f"{skipped:,} updates were skipped, since a reward or a gradient was not finite.")
    return " ".join(sentences)


def known_scores(row: Mapping[str, Any], reward: str | None) -> str:
    """Return the scores of an evaluation, separated by commas."""
    columns = [key for key in row if key == reward or key.startswith(EVAL_PREFIX)]
    return ", ".join(f"{key.removeprefix(EVAL_PREFIX)} {number(row[key])}" for key in columns if row[key] is not None)


def course(rows: Rows, key: str) -> str:
    """Describe how a column changed from the first evaluation to the last, and its maximum if that lies between."""
    known = [row for row in rows if row.get(key) is not None]
    if not known:
        return "was never finite"
    first, last, top = known[0], known[-1], max(known, key=lambda row: row[key])
    words = moved(first[key], last[key], spread(key, first, last))
    if top[key] > max(first[key], last[key]):
        words += f" and was highest, {number(top[key])}, at update {top['step']:,}"
    return words


def moved(first: float | None, last: float | None, error: float = 0.0) -> str:
    """Describe a change. `error` is the standard error of the difference; up to two of them are marked as noise."""
    if first is None or last is None:
        return "is unknown"
    if first == last:
        return f"stayed at {number(first)}"
    if abs(last - first) <= 2 * error:
        return f"went from {number(first)} to {number(last)} (within its error)"
    return f"{'rose' if last > first else 'fell'} from {number(first)} to {number(last)}"


def warning(settings: Settings, evaluations: Rows, reward: str | None) -> str | None:
    """Return the over-optimization warning after the last evaluation, with the update of its first occurrence."""
    if reward is None:
        return None
    weights = {key: weight for key, weight in held_out_weights(settings).items() if all(key in r for r in evaluations)}
    guard, since, text = EarlyStopping(weights, 0, reward), None, None
    for row in evaluations:
        guard.update(row)
        text = guard.warning()
        since = (since or row["step"]) if text else None
    return f"{text[0].upper()}{text[1:]}. This was first seen at update {since:,}." if text else None


def held_out_weights(settings: Settings) -> dict[str, float]:
    """Return the weights of the evaluation rewards by column, as far as the settings contain them."""
    try:
        tree = parse(settings.eval_rewards or "")
    except DraftuneError:
        return {}  # rewards that were passed as Python objects
    terms = [(1.0, tree)] if isinstance(tree, Call) else tree.terms
    return {f"{EVAL_PREFIX}{call.name}": weight for weight, call in terms}


def best_step(evaluations: Rows) -> int | None:
    """Return the update of the best evaluation, None without evaluations."""
    return next((row["step"] for row in reversed(evaluations) if row.get("best") is True), None)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float) -> str:
    """Format a number with four significant digits, or without decimals from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
