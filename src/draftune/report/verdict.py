"""A run in words: what was asked, what was reached, and whether the reward is to be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftune.errors import DraftuneError
from draftune.evaluation.criterion import DIVERSITY, HELD_OUT
from draftune.evaluation.metrics import KEPT_COLUMN
from draftune.registry.expression import Call, parse
from draftune.settings import Settings
from draftune.training.early_stopping import Guard, spread

Rows = Sequence[Mapping[str, Any]]
ENDS = 10
"""Updates at each end of a run whose mean is told, since one batch's reward says little."""


def facts(settings: Settings, metrics: Rows, device: str | None) -> list[list[str]]:
    """What was asked and what it took, as pairs of a name and a value."""
    last = metrics[-1] if metrics else {"step": 0, "train_seconds": 0, "reward_queries": 0}
    found = {
        "Reward": settings.reward,
        "Held out": settings.held_out,
        "Method": settings.method,
        "Model": settings.model,
        "Prompts": settings.prompts,
        "Continued from": settings.continue_from,
        "Kept on": settings.keep,
        "Compared on": settings.eval_prompts,
        "Updates": f"{last['step']:,} of {settings.steps:,}",
        "Scored pictures": f"{last['reward_queries']:,}",
        "Training time": duration(last["train_seconds"]),
        "Device": device,
    }
    return [[name, value] for name, value in found.items() if value]


def verdict(settings: Settings, metrics: Rows, evaluations: Rows, reward: str | None) -> str:
    """One paragraph; `reward` is its column in the evaluations."""
    if not metrics:
        return "No update has been made yet."
    done, count = metrics[-1]["step"], min(ENDS, (len(metrics) + 1) // 2)
    first, last = (mean([row.get("reward") for row in rows]) for rows in (metrics[:count], metrics[-count:]))
    start = f"In {done:,} updates" if done >= settings.steps else f"In {done:,} of {settings.steps:,} updates"
    mean_of = "" if count == 1 else f", as means of {count} updates"
    said = [f"{start} the reward of the training pictures {moved(first, last)}{mean_of}."]
    if reward is not None and len(evaluations) > 1:
        said[0] = f"{start} the reward {course(evaluations, reward)}."
        held_out = [key for key in evaluations[0] if key.startswith(HELD_OUT) and key != DIVERSITY]
        for key in held_out:
            said.append(f"Held out, {key.removeprefix(HELD_OUT)} {course(evaluations, key)}.")
        for key in evaluations[0]:
            if key.startswith(KEPT_COLUMN):
                said.append(f"Of the training before, {key.removeprefix(KEPT_COLUMN)} {course(evaluations, key)}.")
        if DIVERSITY in evaluations[0]:
            said.append(f"Diversity {course(evaluations, DIVERSITY)}.")
    best = best_step(evaluations)
    if best is not None:
        said.append(f"The LoRA in best/ is that of update {best:,}{known_of(evaluations, best, reward)}.")
        since = sum(row["step"] > best for row in evaluations)
        if done < settings.steps and settings.patience and since >= settings.patience:
            said.append(f"The run ended since {since} evaluations after it were no better.")
    if skipped := metrics[-1].get("nonfinite_steps"):
        said.append(f"{skipped:,} updates were left out, since a reward or a gradient was not finite.")
    return " ".join(said)


def known_of(evaluations: Rows, step: int, reward: str | None) -> str:
    """The scores of one evaluation, in brackets."""
    row = next(row for row in evaluations if row["step"] == step)
    columns = [key for key in row if key == reward or key.startswith(HELD_OUT)]
    told = [f"{key.removeprefix(HELD_OUT)} {number(row[key])}" for key in columns if row[key] is not None]
    return f" ({', '.join(told)})" if told else ""


def course(rows: Rows, key: str) -> str:
    """How a column went from the first evaluation to the last, and its highest value where that lies between."""
    known = [row for row in rows if row.get(key) is not None]
    if not known:
        return "was never finite"
    first, last, top = known[0], known[-1], max(known, key=lambda row: row[key])
    words = moved(first[key], last[key], spread(key, first, last))
    if top[key] > max(first[key], last[key]):
        words += f" and was highest, {number(top[key])}, at update {top['step']:,}"
    return words


def moved(first: float | None, last: float | None, error: float = 0.0) -> str:
    """From one number to another; a difference of at most two standard errors is called that."""
    if first is None or last is None:
        return "is not known"
    if first == last:
        return f"stayed at {number(first)}"
    if abs(last - first) <= 2 * error:
        return f"went from {number(first)} to {number(last)} (within its error)"
    return f"{'rose' if last > first else 'fell'} from {number(first)} to {number(last)}"


def warning(settings: Settings, evaluations: Rows, reward: str | None) -> str | None:
    """The guard's warning after the last evaluation, and the update at which it was first given."""
    if reward is None:
        return None
    weights = {key: weight for key, weight in held_out_weights(settings).items() if all(key in r for r in evaluations)}
    guard, since, said = Guard(weights, 0, reward), None, None
    for row in evaluations:
        guard.see(row)
        said = guard.warning()
        since = (since or row["step"]) if said else None
    return f"{said[0].upper()}{said[1:]}. This was first seen at update {since:,}." if said else None


def held_out_weights(settings: Settings) -> dict[str, float]:
    """The held-out columns by their weights, as far as the settings' words tell them."""
    try:
        tree = parse(settings.held_out or "")
    except DraftuneError:
        return {}  # rewards that were given in Python
    terms = [(1.0, tree)] if isinstance(tree, Call) else tree.terms
    return {f"{HELD_OUT}{call.name}": weight for weight, call in terms}


def best_step(evaluations: Rows) -> int | None:
    """The update that the best LoRA is from."""
    return next((row["step"] for row in reversed(evaluations) if row.get("best") is True), None)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float) -> str:
    """Four digits that count, and never an exponent above 1."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h, 3 d 4 h: the two largest units."""
    left, parts = round(seconds), list[tuple[int, str]]()
    for unit, size in {"d": 86400, "h": 3600, "min": 60, "s": 1}.items():
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"
