"""Compare a saved run with the settings that resume it: by what is computed, not by how it is written."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.registry.expression import Call, Sum, Value, parse
from draftune.registry.factories import is_in_file, load_from_file, signature_of
from draftune.runs.fingerprint import Source, find_source
from draftune.sampling.step_range import StepRange
from draftune.settings import Settings
from draftune.utils.model_options import NO_OPTIONS, ModelOptions


def settings_that_are(resume: str) -> tuple[str, ...]:
    """Return the names of the settings with this value of `resume`, see `draftune.settings.field_checks.setting`."""
    return tuple(f.name for f in fields(Settings) if f.metadata["resume"] == resume)


RESUMABLE_CHANGES, ROUNDING, COMPUTED, FIXED = map(settings_that_are, ("free", "rounding", "computed", "fixed"))
"""Settings by what their difference means when a run is resumed."""

CONTENTS = ("prompts", "eval_prompts", "retain_prompts", "init_lora")
"""Settings that are compared by a digest of their contents: prompts, and the weights of a LoRA."""
SOURCES = ("model", "base_pipeline", "tiny_decoder")
"""Settings that name a model. They are compared by the model's files."""
CONSTANT = ("constant", "constant_with_warmup")
"""Learning-rate schedules that do not depend on the number of steps."""
EXPRESSIONS = {"reward": "reward", "eval_rewards": "reward", "method": "method", "optimizer": "optimizer"}
EXPRESSIONS |= {"gradient_filter": "gradient filter", "prefix_cache": "prefix cache"}
"""Settings that are expressions, and the kind of their names."""
PATHS = ("model", "head", "weights", "tokenizer", "folder", "critic", "image", "mask", "ratings", "file", "path")
"""Arguments in expressions whose values are files, folders or models."""


def changeable(text: str) -> set[str]:
    """Parse the names in `allow_changes`. Raises DraftuneError for unknown names and for settings in FIXED."""
    names = {name.strip().replace("-", "_") for name in text.split(",") if name.strip()}
    for name in sorted(names):
        if name not in (known := [f.name for f in fields(Settings)]):
            raise unknown("setting in allow_changes", name, known)
        if name in FIXED:
            raise DraftuneError(
                f"allow_changes={name} is not possible: {name} must be the same when a run is resumed; train another "
                "LoRA on top of the run's (--init-lora)"
            )
    return names


class RunIdentity:
    """The settings of a run with the contents of files that they name.

    Args:
        settings: All settings by name, resolved.
        contents: Digests of the contents of the settings in CONTENTS.
        sources: The files and folders that the settings name, from `saved_sources`; found on this machine if None.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        contents: Mapping[str, str],
        sources: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        self.contents = contents
        self.settings: dict[str, Any] = {f.name: f.default for f in fields(Settings)} | dict(settings)
        self.trees = {name: parsed(self.settings[name]) for name in EXPRESSIONS}
        known = map(self.find, self.names()) if sources is None else (Source(**source) for source in sources)
        self.sources = {source.text: source for source in known if source is not None}

    def names(self) -> list[str]:
        """Return all texts in the settings that may name a file, a folder or a model."""
        texts = [self.settings[name] for name in SOURCES]
        for name, kind in EXPRESSIONS.items():
            texts += paths_in(self.trees[name], kind)
        return list(dict.fromkeys(text for text in texts if isinstance(text, str)))

    def find(self, text: str) -> Source | None:
        """Return the file or folder on this machine that a text in the settings stands for."""
        base = text == self.settings["base_pipeline"]
        return find_source(
            text, ModelOptions.of(self.settings) if base or text == self.settings["model"] else NO_OPTIONS, base
        )

    def saved_sources(self, earlier: RunIdentity | None) -> list[dict[str, Any]]:
        """Return the sources for JSON. Hashes of files that did not change are taken from the earlier run."""
        before = {(s.path, s.stamp): s.known for s in earlier.sources.values()} if earlier is not None else {}
        return [replace(s, known=before.get((s.path, s.stamp), {})).saved() for s in self.sources.values()]

    def differences(self, earlier: RunIdentity) -> list[str]:
        """Return the names of the settings that differ from an earlier run's, except those in RESUMABLE_CHANGES."""
        names = [f.name for f in fields(Settings) if f.name not in RESUMABLE_CHANGES]
        if any(run.settings["lr_scheduler"] not in CONSTANT for run in (self, earlier)):
            names.append("steps")  # the learning rate decays over all of them
        # Settings that this version does not know.
        names += sorted(earlier.settings.keys() - self.settings.keys())
        return [name for name in names if not self.same(name, earlier)]

    def same(self, name: str, earlier: RunIdentity) -> bool:
        """Return whether a setting has the same meaning in both runs."""
        now, was = self.settings.get(name), earlier.settings.get(name)
        if name in CONTENTS and name in self.contents and name in earlier.contents:
            return self.contents[name] == earlier.contents[name]
        if name in EXPRESSIONS:
            return self.same_tree(self.trees[name], earlier.trees[name], earlier, EXPRESSIONS[name])
        if name in SOURCES:
            return self.same_value(now or "", was or "", earlier)
        if name == "lora_alpha":
            now, was = (run.settings[name] or run.settings["lora_rank"] for run in (self, earlier))
        if name == "lora_steps":
            now, was = (StepRange.parse(value or "") for value in (now, was))
        if name == "lora_target_modules":
            now, was = (sorted(target.strip() for target in str(value).split(",")) for value in (now, was))
        return bool(now == was)

    def same_tree(self, now: Tree, was: Tree, earlier: RunIdentity, kind: str) -> bool:
        """Return whether two expressions are equal, apart from written defaults and the paths of equal files."""
        if isinstance(now, Sum) and isinstance(was, Sum):
            # The order counts: checkpoints store weights and state of the terms by index.
            return len(now.terms) == len(was.terms) and all(
                a == b and self.same_tree(first, second, earlier, kind)
                for (a, first), (b, second) in zip(now.terms, was.terms, strict=True)
            )
        if isinstance(now, Call) and isinstance(was, Call):
            (file, _, name), (other, _, second) = now.name.rpartition(":"), was.name.rpartition(":")
            custom = is_in_file(now.name) and is_in_file(was.name)
            called = name == second and self.same_value(file, other, earlier) if custom else now.name == was.name
            # The file of the earlier run may no longer exist, so its defaults are not looked up.
            default = defaults(now, kind)
            mine, its = default | now.settings, default | was.settings
            return (
                called
                and self.same_tree(now.inner, was.inner, earlier, kind)
                and mine.keys() == its.keys()
                and all(self.same_value(value, its[key], earlier) for key, value in mine.items())
            )
        return now == was

    def same_value(self, now: Value, was: Value, earlier: RunIdentity) -> bool:
        """Return whether two values, or the contents of the files or folders that they name, are equal."""
        if isinstance(now, str) and isinstance(was, str):
            first, second = self.sources.get(now), earlier.sources.get(was)
            if first is not None and second is not None:
                return first.holds(second)
        return now == was

    def describe_difference(self, name: str, earlier: RunIdentity) -> str:
        """Describe how a setting differs from an earlier run's."""
        now, was = self.settings.get(name), earlier.settings.get(name)
        if name in CONTENTS and name != "init_lora":
            return (
                f"its {name} is {was!r}, not {now!r}" if now != was else f"the contents of its {name} {was!r} changed"
            )
        if now == was:
            return f"the files of its {name} {was!r} changed"
        return f"its {name} is {was!r}, not {now!r}"

    def refusal(self, names: Sequence[str], earlier: RunIdentity, folder: Path) -> DraftuneError:
        """Return the error for settings that may not differ from those of the run in a folder, with what to do."""
        run = f"the output folder {str(folder)!r} contains another run"
        if unknown_names := [name for name in names if name not in self.settings]:
            return DraftuneError(
                f"{run}, of a version of draftune with the settings {', '.join(unknown_names)}: resume it with that "
                "version, or give another (--output)"
            )
        differences = [self.describe_difference(name, earlier) for name in names]
        if "steps" in names:
            schedule = self.settings["lr_scheduler"]
            differences.append(f"the learning rate of each update depends on steps (lr_scheduler={schedule})")
        differences[0] = f"{run}: {differences[0]}"
        options = ["give another (--output)"]
        if fixed := [name for name in names if name not in {*COMPUTED, "steps"}]:
            texts = {name: "" if (kept := earlier.settings[name]) is None else str(kept) for name in fixed}
            flags = [f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in texts.items()]
            options.append(f"keep what cannot change ({' '.join(flags)})")
        else:
            options.append(f"allow the change (--allow-changes {','.join(names)})")
        options.append(f"train another LoRA on top of that run's (--init-lora {folder})")
        return DraftuneError(*differences, f"{', '.join(options[:-1])}, or {options[-1]}")


Tree = Call | Sum | str | None
"""An expression, or its text if it cannot be parsed, such as the name of a Python object."""


def parsed(text: Any) -> Tree:
    """Parse an expression; return its text if that fails, and None for an empty one."""
    try:
        return parse(str(text)) if text else None
    except DraftuneError:
        return str(text)


def defaults(call: Call, kind: str) -> dict[str, Value]:
    """Return the default arguments of a call's factory; none if it cannot be imported, which loading it reports."""
    if (kind, call.name) == ("optimizer", "adamw"):
        return {}  # its arguments are settings of the run
    try:
        factory = load_from_file(call.name, kind) if is_in_file(call.name) else tables()[kind].get(call.name)
        parameters = signature_of(factory).parameters.values() if factory is not None else ()
    except (DraftuneError, TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def tables() -> dict[str, Mapping[str, Callable[..., Any]]]:
    """Return the factories of all names in expressions, by kind."""
    from draftune.methods import all_methods
    from draftune.rewards import REWARDS
    from draftune.sampling.call_cache import CALL_CACHES
    from draftune.training.optim import gradient_filters, optimizers

    return {
        "reward": REWARDS,
        "method": all_methods(),
        "optimizer": optimizers(),
        "gradient filter": gradient_filters(),
        "prefix cache": CALL_CACHES,
    }


def paths_in(tree: Tree, kind: str) -> Iterator[str]:
    """Yield the texts in an expression that may be paths: arguments, and files of user code."""
    if isinstance(tree, Sum):
        for _, call in tree.terms:
            yield from paths_in(call, kind)
    elif isinstance(tree, Call):
        if is_in_file(tree.name):
            yield tree.name.rpartition(":")[0]
        for key, value in (defaults(tree, kind) | tree.settings).items():
            # Any text with a file ending may be a path for user code.
            is_path = key in PATHS or (is_in_file(tree.name) and isinstance(value, str) and bool(Path(value).suffix))
            if isinstance(value, str) and is_path:
                yield value
        yield from paths_in(tree.inner, kind)
