"""The check of what was typed into the form, by the code of the command line, without a download."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from draftune.errors import DraftuneError
from draftune.prompts import load_prompts, split_prompts
from draftune.registry.expression import Call, Sum, parse
from draftune.registry.factories import is_in_file
from draftune.settings import Settings
from draftune.settings.field_checks import checked
from draftune.ui.form import LEFT_OUT
from draftune.utils.hub import NotLocalError, is_hub_id, local_files_only
from draftune.utils.model_configs import model_folder
from draftune.utils.paths import user_path


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
    # The other values are checked with defaults in place of the wrong ones, so that all errors are found at once.
    settings = Settings()
    while True:
        right = {name: value for name, value in values.items() if name not in errors}
        try:
            settings = Settings.from_mapping(right)
            break
        except DraftuneError as error:
            name = named_in(str(error))
            errors[name] = str(error)
            if name not in right:
                return None, errors
    checks: dict[str, Callable[[], object]] = {
        "model": lambda: check_model(settings.model),
        "prompts": lambda: load_prompts(settings.prompts),
        "reward": lambda: missing_weights(settings.reward),
        "eval_rewards": lambda: missing_weights(settings.eval_rewards or ""),
        "method": lambda: own_file(settings.method) or methods(settings.method),
    }
    errors |= {name: problem for name, check in checks.items() if name not in errors and (problem := problem_of(check))}
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
        from draftune.training.setting_checks import check_settings

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
            except DraftuneError as error:
                # What a start downloads is no error; a file that nothing downloads is one.
                wrong = [one for one in error.gathered or (error,) if not isinstance(one, NotLocalError)]
                if wrong:
                    raise DraftuneError(*(problem for one in wrong for problem in one.args)) from error
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
