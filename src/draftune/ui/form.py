"""The form of a run's settings: its fields, and the settings as they are typed into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from draftune.errors import DraftuneError
from draftune.settings import GROUPS, Settings
from draftune.settings.field_checks import kind, optional
from draftune.utils.model_options import ModelOptions

FIRST = {
    "Model and reward": ("model", "reward"),
    "Training": ("method", "steps", "batch_size", "learning_rate"),
    "Over-optimization": ("eval_rewards", "eval_prompts", "validation_steps", "early_stopping_patience"),
}
"""The fields that are not folded, by their headings. The prompts have fields of their own."""
LEFT_OUT = ("prompts", "output", "resume", "allow_changes", "rate_every", "rate_comparisons")
"""Settings that the page sets itself, or that ask for a page of their own."""
WITHOUT = {"timestep_spacing": "as in the model's scheduler"}
"""What settings without a value and without a default in their help mean."""
SWITCH = {"": None, "on": True, "off": False}
EMPTY = "none"
"""What stands in a field for an empty text that differs from the default."""
LABELS = {
    "model": "Base model",
    "steps": "Number of updates",
    "batch_size": "Images of a batch",
    "validation_steps": "Updates between evaluations",
    "early_stopping_patience": "Evaluations before it stops early",
}
"""Labels that are not the settings' names."""
HELPS = {
    "model": "What generates the images and is fine-tuned: emoji, which comes with draftune; a model of the Hugging "
    "Face hub by its name, such as CompVis/stable-diffusion-v1-4, which is downloaded; or a folder or file on this "
    "machine.",
    "reward": "What scores the images: training raises this score. The list below describes each reward; several are "
    "added, as in clip + 0.1*jpeg_compressibility.",
    "method": "How the score changes the model. The default is a good start.",
    "steps": "How often the model is changed a little. More updates change its images more, and take longer.",
    "batch_size": "Images that one update is computed from. More of them need more memory.",
    "learning_rate": "How much one update changes the model, at most.",
    "eval_rewards": "Rewards that are measured and not trained on: they show when images become worse although the "
    "reward rises. Write none to have none.",
    "eval_prompts": "Prompts that are only evaluated: a set, a file on this machine, or a number of the prompts above, "
    "which are then not trained on. Write none to evaluate nothing.",
    "validation_steps": "Number of updates from one evaluation to the next. With 0, the run evaluates before and after "
    "training only.",
    "early_stopping_patience": "The run ends by itself after so many evaluations without a better one. With 0, it "
    "makes all updates.",
}
"""Helps of the fields that are not folded, for people who do not type commands."""
DECIDING = ("model", *ModelOptions._fields, "num_inference_steps", "method", "reward")
"""Settings that defaults of others depend on."""
DEFAULT = re.compile(r" ?\(default: ([^()]*)\)")
"""The part of a help text that says in words what the run takes."""
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
    defaults, by_name = default_texts(values), {f.name: f for f in fields(Settings)}
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
    help = HELPS.get(f.name) or readable(f.metadata["help"])
    return FormField(f.name, label(f.name), help, choices, kind(f) in (int, float), value,
                     default, error)  # fmt: skip


def label(name: str) -> str:
    """Return the label of a setting."""
    if name in LABELS:
        return LABELS[name]
    words = " ".join(ACRONYMS.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:]


def readable(text: str) -> str:
    """Return a help text for people who do not type commands: labels instead of flags, and no commands."""
    text = re.sub(r" \(see 'draftune [^)]*\)", "", DEFAULT.sub("", text)).replace("the same command", "the run")
    text = text.replace("'' for none", "none to have none").replace("'' for", "none for")
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda match: f"“{label(match[1].replace('-', '_'))}”", text)


def worded(message: str) -> str:
    """Return an error with the labels of the settings that it names, instead of their names and flags."""
    names = "|".join(sorted((f.name for f in fields(Settings)), key=len, reverse=True))
    compound = "|".join(name for name in names.split("|") if "_" in name)
    flag = names.replace("_", "-")
    # A name of one word is also a word of English: it is replaced where a sentence is on the setting.
    pattern = rf"--({flag})(?![\w-])|(?<![\w./'-])({compound})(?!\w)|^({names})(?= must )"

    def quoted(match: re.Match[str]) -> str:
        return f"“{label((match[1] or match[2] or match[3]).replace('-', '_'))}”"

    return re.sub(pattern, quoted, message)


def defaults_with(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of each setting, given the typed ones that defaults depend on."""
    first = {name: values[name] for name in DECIDING if values.get(name) is not None}
    for known in (first, {name: first[name] for name in ("model",) if name in first}):
        try:
            defaults = asdict(Settings(**known))
            # What is typed is no default: that is what an empty field means.
            empty = {name: Settings(**{key: known[key] for key in known if key != name}) for name in known}
        except DraftuneError:
            continue
        return defaults | {name: getattr(settings, name) for name, settings in empty.items()}
    return asdict(Settings())


def default_texts(values: Mapping[str, str]) -> dict[str, str]:
    """Return the default of each setting, given what was typed, as it is written; in words where the run decides."""
    defaults = defaults_with(given(values))
    in_words = {f.name: DEFAULT.search(f.metadata["help"]) for f in fields(Settings)}
    return {
        name: written(value) or (readable(match[1]) if (match := in_words[name]) else WITHOUT.get(name, EMPTY))
        for name, value in defaults.items()
    }


def written(value: Any) -> str:
    """Return a value as it is typed into a field."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "" if value is None else str(value)


def typed(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as the form's values: empty where they are the defaults."""
    defaults = defaults_with(settings)
    return {
        name: "" if value is None or value == defaults[name] else written(value) or EMPTY
        for name, value in settings.items()
        if name not in LEFT_OUT
    }


def takes_nothing(f: Field[Any]) -> bool:
    """Return whether the word for nothing is an empty text in a setting: it may be empty and has no value so named."""
    return (f.default == "" or optional(f)) and not f.metadata["choices"] and f.name != "report_to"


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
            result[f.name] = "" if text == EMPTY and takes_nothing(f) else text
        else:
            try:
                result[f.name] = kind(f)(text)
            except ValueError:
                result[f.name] = text
    return result
