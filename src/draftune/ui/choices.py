"""What the form offers to choose from: models, rewards, methods, prompts and presets, each with a line on it."""

from __future__ import annotations

from functools import cache
from typing import Any

from draftune.errors import DraftuneError
from draftune.presets import PRESETS, first_comment, read_yaml
from draftune.prompts import PROMPT_SETS
from draftune.registry.expression import parse
from draftune.registry.factories import first_sentence, is_in_file
from draftune.ui.form import calls, missing_weights


@cache
def choices() -> dict[str, Any]:
    """Return names with their descriptions by what they are chosen for; of rewards by their groups."""
    from draftune.methods import all_methods
    from draftune.published import MODELS
    from draftune.registry.catalog import in_groups
    from draftune.rewards import REWARDS

    presets = {name: first_comment(path) for name, path in PRESETS.items()}
    models = {str(read_yaml(PRESETS[name])["model"]): text.partition(" on ")[0] for name, text in presets.items()}
    return {
        "presets": presets,
        "models": models | MODELS,
        "rewards": {
            group: {name: first_sentence(REWARDS[name].__doc__) for name in names}
            for group, names in in_groups(REWARDS).items()
        },
        "methods": {name: first_sentence(method.__doc__) for name, method in all_methods().items()},
        "prompts": {name: text for name, (text, _) in PROMPT_SETS.items()},
    }


def reward_facts(expression: str) -> dict[str, Any]:
    """Return what is known of each reward in an expression, without a network.

    Returns:
        "error", empty if the expression is valid; "rewards", a list of names with texts, and whether weights are
        missing.
    """
    from draftune.registry.catalog import facts_of

    described = {name: text for group in choices()["rewards"].values() for name, text in group.items()}
    try:
        missing = missing_weights(expression)
        names = dict.fromkeys(call.name for call in calls(parse(expression))) if expression else {}
    except DraftuneError as error:
        return {"error": str(error), "rewards": []}
    own = "Your own file: the run executes it on this machine."
    return {
        "error": "",
        "rewards": [
            {
                "name": name,
                "text": own if is_in_file(name) else f"{described.get(name, '')} {facts_of(name)}".strip(),
                "missing": name in missing,
            }
            for name in names
        ],
    }
