"""What the form offers to choose from: models, rewards, methods, prompts and presets, each with a line on it."""

from __future__ import annotations

from functools import cache
from typing import Any

from draftune.errors import DraftuneError
from draftune.presets import PRESETS, first_comment, read_yaml
from draftune.prompts import PROMPT_SETS
from draftune.registry.expression import parse
from draftune.registry.factories import first_sentence, is_in_file
from draftune.ui.form import worded
from draftune.ui.validation import calls, missing_weights
from draftune.utils.hub import offline


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
        missing; "todo", what happens to missing weights.
    """
    from draftune.registry.catalog import facts_of

    described = {name: text for group in choices()["rewards"].values() for name, text in group.items()}
    error, names, missing = "", dict[str, None](), dict[str, str]()
    try:
        names = dict.fromkeys(call.name for call in calls(parse(expression))) if expression else {}
        missing = missing_weights(expression)
    except DraftuneError as problem:
        error = worded(str(problem))
    own = "Your own file: the run executes it on this machine."
    known = [name for name in names if is_in_file(name) or name in described]
    return {
        "error": error,
        "todo": "HF_HUB_OFFLINE forbids its download." if offline() else "the start downloads its weights.",
        "rewards": [
            {
                "name": name,
                "text": own if is_in_file(name) else f"{described[name]} {facts_of(name)}".strip(),
                "missing": name in missing,
            }
            for name in known
        ],
    }
