"""The form of a run's settings: its fields, and the check of what was typed, by the code of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, fields
from functools import partial
from typing import Any

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts, split_prompts
from draftune.registry.expression import Call, Sum, parse
from draftune.registry.factories import is_in_file
from draftune.settings import GROUPS, Settings
from draftune.settings.field_checks import checked, kind
from draftune.utils.hub import NotLocalError, is_hub_id, local_files_only
from draftune.utils.model_configs import model_folder
from draftune.utils.paths import user_path

FIRST = {
    "Model and reward": ("model", "reward"),
    "Training": ("method", "steps", "batch_size", "learning_rate"),
    "Over-optimization": ("eval_rewards", "eval_prompts", "validation_steps", "early_stopping_patience"),
}
"""The fields that are not folded, by their headings. The prompts have fields of their own."""
LEFT_OUT = ("prompts", "output", "resume", "allow_changes", "rate_every", "rate_comparisons")
"""Settings that the page sets itself, or that ask for a page of their own."""
SWITCH = {"": None, "on": True, "off": False}
EMPTY = "''"
"""What stands in a field for an empty text that differs from the default."""
LABELS = {
    "model": "Base model",
    "steps": "Number of updates",
    "batch_size": "Images of a batch",
    "validation_steps": "Updates between evaluations",
    "early_stopping_patience": "Evaluations before it stops early",
}
"""Labels that are not the settings' names."""
ACRONYMS = {"lora": "LoRA", "ema": "EMA", "snr": "SNR", "lr": "LR", "eval": "evaluation", "num": "number of"}


@dataclass(frozen=True)
class FormField:
    """A field of the form.

    Attributes:
        name: The setting's name.
        label: Its label.
        help: What the setting does.
        choices: The values to choose from; empty for a text field.
        numeric: Whether it takes a number.
        value: What was typed; empty for the default.
        default: The default, as it is written.
        error: What is wrong with the value.
    """

    name: str
    label: str
    help: str
    choices: tuple[str, ...]
    numeric: bool
    value: str
    default: str
    error: str


def form_fields(values: Mapping[str, str], errors: Mapping[str, str]) -> dict[str, list[FormField]]:
    """Return the fields by their headings: those of FIRST, then the rest by the groups of `train --help`."""
    defaults, by_name = default_texts(values.get("model", "")), {f.name: f for f in fields(Settings)}
    made = {
        name: form_field(f, values.get(name, ""), defaults[name], errors.get(name, ""))
        for name, f in by_name.items()
        if name not in LEFT_OUT
    }
    grouped = {heading: [made.pop(name) for name in names] for heading, names in FIRST.items()}
    title = ""
    for name in by_name:
        title = GROUPS.get(name, title)
        if name in made:
            grouped.setdefault(f"More: {title}", []).append(made[name])
    return grouped


def form_field(f: Field[Any], value: str, default: str, error: str) -> FormField:
    """Return the field of a setting."""
    choices = ("on", "off") if kind(f) is bool else f.metadata["choices"]
    return FormField(f.name, label(f.name), readable(f.metadata["help"]), choices, kind(f) in (int, float), value,
                     default, error)  # fmt: skip


def label(name: str) -> str:
    """Return the label of a setting."""
    if name in LABELS:
        return LABELS[name]
    words = " ".join(ACRONYMS.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:]


def readable(text: str) -> str:
    """Return a help text for people who do not type commands: labels instead of flags, and no commands."""
    text = re.sub(r" \(see 'draftune [^)]*\)", "", text)
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda match: f"“{label(match[1].replace('-', '_'))}”", text)


def default_texts(model: str) -> dict[str, str]:
    """Return the default of each setting for a model, as it is written."""
    try:
        values = asdict(Settings(model=model.strip() or Settings.model))
    except DraftuneError:
        values = asdict(Settings())
    return {name: written(value) or "none" for name, value in values.items()}


def written(value: Any) -> str:
    """Return a value as it is typed into a field."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "" if value is None else str(value)


def typed(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as the form's values: empty where they are the defaults."""
    defaults = default_texts(str(settings.get("model", "")))
    texts = {name: written(value) for name, value in settings.items() if name not in LEFT_OUT}
    return {
        name: "" if text == defaults[name] or (not text and defaults[name] == "none") else text or EMPTY
        for name, text in texts.items()
    }


def given(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that were typed, with their types. A text that is no number stays a text."""
    result: dict[str, Any] = {}
    for f in fields(Settings):
        text = values.get(f.name, "").strip()
        if f.name in LEFT_OUT or not text:
            continue
        if kind(f) is bool:
            result[f.name] = SWITCH.get(text, text)
        elif kind(f) is str:
            result[f.name] = "" if text == EMPTY else text
        else:
            try:
                result[f.name] = kind(f)(text)
            except ValueError:
                result[f.name] = text
    return result


def validated(values: Mapping[str, Any]) -> tuple[Settings | None, dict[str, str]]:
    """Check settings as `draftune train` does before it loads anything.

    No weights are downloaded and no file of the user's is run. Prompts of the hub are read as the run reads them.

    Args:
        values: The settings by name.

    Returns:
        The settings, None if something is wrong; and the errors by setting, under "" those of none.
    """
    errors: dict[str, str] = {}
    for f in fields(Settings):
        if f.name in values and (problem := problem_of(partial(checked, f, values[f.name]))):
            errors[f.name] = problem
    if errors:
        return None, errors
    try:
        settings = Settings.from_mapping(values)
    except DraftuneError as error:
        return None, {named_in(str(error)): str(error)}
    checks: dict[str, Callable[[], object]] = {
        "model": lambda: check_model(settings.model),
        "prompts": lambda: load_prompts(settings.prompts),
        "reward": lambda: missing_weights(settings.reward),
        "eval_rewards": lambda: missing_weights(settings.eval_rewards or ""),
        "method": lambda: own_file(settings.method) or methods(settings.method),
    }
    errors |= {name: problem for name, check in checks.items() if (problem := problem_of(check))}
    if not errors:
        rest = problem_of(lambda: check_together(settings))
        errors |= {named_in(rest): rest} if rest else {}
    return (None if errors else settings), errors


def problem_of(check: Callable[[], object]) -> str:
    """Return the error of a check; an empty text if there is none."""
    try:
        check()
    except DraftuneError as error:
        return str(error)
    return ""


def named_in(message: str) -> str:
    """Return the setting that an error names first, by its name or flag; an empty text if it names none."""
    names = "|".join(re.escape(f.name) for f in fields(Settings) if f.name not in LEFT_OUT)
    found = re.search(rf"(?<!\w)(?:{names})(?!\w)", message.replace("--", "  ").replace("-", "_"))
    return found[0] if found else ""


def check_model(model: str) -> None:
    """Raise DraftuneError if a model is none of the package's, no path and no hub id."""
    if model != "emoji" and not is_hub_id(model) and not user_path(model).exists():
        raise DraftuneError(f"no model {model!r}: give 'emoji', a folder, a file or a hub id (OWNER/NAME)")


def methods(text: str) -> object:
    """Return the method of an expression."""
    from draftune.methods import load_method

    return load_method(text)


def check_together(settings: Settings) -> None:
    """Check settings that depend on each other. Raises DraftuneError."""
    split_prompts(settings.prompts, settings.eval_prompts or "", settings.seed)
    if not any(map(own_file, (settings.method, settings.optimizer, settings.gradient_filter))):
        from draftune.methods import load_method
        from draftune.training.setup import check_settings

        check_settings(settings, load_method(settings.method))


def own_file(expression: str) -> bool:
    """Return whether an expression names something in a user's own file. Only the run itself runs such a file."""
    return bool(expression) and any(is_in_file(call.name) for call in calls(parse(expression)))


def calls(tree: Call | Sum) -> Iterator[Call]:
    """Yield the calls in an expression, the inner ones after the outer ones."""
    for call in [tree] if isinstance(tree, Call) else [call for _, call in tree.terms]:
        yield call
        if call.inner is not None:
            yield from calls(call.inner)


def missing_weights(expression: str) -> dict[str, str]:
    """Check a reward without a network, and without running a user's file.

    Returns:
        For each reward whose weights are not on this machine, what is missing.

    Raises:
        DraftuneError: a name or a setting is wrong, or a file does not exist.
    """
    missing: dict[str, str] = {}
    if not expression:
        return missing
    from draftune.rewards import REWARDS, check_names, parse_reward

    tree = parse(expression)
    for call in calls(tree):
        if is_in_file(call.name):
            if not user_path(call.name.rpartition(":")[0]).is_file():
                raise DraftuneError(f"no file {call.name.rpartition(':')[0]!r} with a reward in it")
        elif call.inner is None:
            try:
                with local_files_only():
                    parse_reward(str(call))
            except NotLocalError as error:
                missing[call.name] = str(error)
        elif call.name in REWARDS:
            check_names(Call(call.name, call.settings, Call(next(iter(REWARDS)))))
        else:
            check_names(Call(call.name))
    return missing


def to_download(settings: Settings) -> list[str]:
    """Return what the run will download before it trains, as far as that is known without a network."""
    from draftune.registry.catalog import CATALOG

    sizes = {name: facts.size for group in CATALOG.values() for name, facts in group.items()}
    rewards = missing_weights(settings.reward) | missing_weights(settings.eval_rewards or "")
    found = [f"the reward {name} ({sizes.get(name, 'its weights')})" for name in rewards]
    local = settings.model == "emoji" or user_path(settings.model).exists()
    if not local and model_folder(settings.model, settings.revision) is None:
        found.insert(0, f"the model {settings.model}")
    return found
