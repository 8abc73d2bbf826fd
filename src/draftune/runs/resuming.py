"""Compare the run in a folder with the run that is asked for: by what is computed, not by how it is spelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.registry.expression import Call, Sum, Value, parse
from draftune.registry.factories import is_in_file, load_from_file, signature_of
from draftune.runs.fingerprint import Source, find_source
from draftune.settings import Settings

FREE = (
    "steps",
    "output",
    "resume",
    "allow_changes",
    "on_nonfinite",
    "signal_to_noise",
    "sample_every",
    "sample_prompts",
    "save_every",
    "eval_every",
    "patience",
)
"""Settings that may change while a run goes on: how far it goes, and what is only measured, logged or saved."""
ROUNDING = ("reward_batch_size", "gradient_checkpointing", "cpu")
"""Settings that may change too: memory, speed and device. The same is computed, with other rounding."""
COMPUTED = (
    "model",
    "reward",
    "normalize_reward",
    "method",
    "prompts",
    "keep",
    "keep_weight",
    "batch_size",
    "prefix_reuse",
    "prefix_stride",
    "gradient_accumulation_steps",
    "optimizer",
    "gradient_filter",
    "learning_rate",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "timestep_spacing",
    "set_alpha_to_one",
    "height",
    "width",
    "lora_alpha",
    "mixed_precision",
    "gradient_decoder",
    "pixel_clamp",
)
"""Settings that are part of what is computed: they change only where `allow_changes` names them."""
FIXED = (
    "continue_from",
    "skip_text_encoder_lora",
    "seed",
    "lora_rank",
    "lora_targets",
    "eval_prompts",
    "eval_images",
    "held_out",
    "best_by",
)
"""Settings that cannot change while a run goes on: the LoRA's own shape and start, and what its best is chosen by."""

CONTENTS = ("prompts", "eval_prompts", "keep", "continue_from")
"""Settings that are compared by the digest of what they hold: prompts, and the weights of a LoRA."""
SOURCES = ("model", "gradient_decoder")
"""Settings that name a model, which is compared by its files."""
EXPRESSIONS = {"reward": "reward", "held_out": "reward", "method": "method", "optimizer": "optimizer"}
EXPRESSIONS |= {"gradient_filter": "gradient filter"}
"""Settings that are expressions, and the kind of what these name."""
PATHS = ("model", "head", "weights", "tokenizer", "folder", "critic", "image", "mask", "file", "path")
"""Settings inside expressions whose values are files, folders or models."""


def changeable(text: str) -> set[str]:
    """Read the names of `allow_changes`. Raises DraftuneError for a name that is no setting, or that is fixed."""
    names = {name.strip().replace("-", "_") for name in text.split(",") if name.strip()}
    for name in sorted(names):
        if name not in (known := [f.name for f in fields(Settings)]):
            raise unknown("setting in allow_changes", name, known)
        if name in FIXED:
            raise DraftuneError(
                f"allow_changes={name} is not possible: {name} cannot change while a run goes on; train another LoRA "
                "on top of the run's (--continue-from)"
            )
    return names


class Asked:
    """What a run is asked to compute.

    Args:
        settings: All settings by name, resolved.
        contents: Digests of what the settings of CONTENTS hold.
        sources: The files and folders that the settings name, as `saved_sources` gave them; looked for unless given.
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
        found = map(find_source, self.names()) if sources is None else (Source(**source) for source in sources)
        self.sources = {source.text: source for source in found if source is not None}

    def names(self) -> list[str]:
        """Return all names in the settings that may be a file's, a folder's or a model's."""
        texts = [self.settings[name] for name in SOURCES]
        for name, kind in EXPRESSIONS.items():
            texts += paths_in(self.trees[name], kind)
        return list(dict.fromkeys(text for text in texts if isinstance(text, str)))

    def saved_sources(self, earlier: Asked | None) -> list[dict[str, Any]]:
        """Return the sources for JSON; the SHA-256 of unchanged paths and stamps are those of the earlier run."""
        before = {(s.path, s.stamp): s.known for s in earlier.sources.values()} if earlier is not None else {}
        return [replace(s, known=before.get((s.path, s.stamp), {})).saved() for s in self.sources.values()]

    def differences(self, earlier: Asked) -> list[str]:
        """Return the names of the settings that differ from an earlier run's, except those that are free."""
        names = [f.name for f in fields(Settings) if f.name not in FREE]
        # Settings of another version: what they did is not known.
        names += sorted(earlier.settings.keys() - self.settings.keys())
        return [name for name in names if not self.same(name, earlier)]

    def same(self, name: str, earlier: Asked) -> bool:
        """Return whether a setting computes the same in both."""
        now, was = self.settings.get(name), earlier.settings.get(name)
        if name in CONTENTS and name in self.contents and name in earlier.contents:
            return self.contents[name] == earlier.contents[name]
        if name in EXPRESSIONS:
            return self.same_tree(self.trees[name], earlier.trees[name], earlier, EXPRESSIONS[name])
        if name in SOURCES:
            return self.same_value(now or "", was or "", earlier)
        if name == "lora_alpha":
            now, was = (run.settings[name] or run.settings["lora_rank"] for run in (self, earlier))
        if name == "lora_targets":
            now, was = (sorted(target.strip() for target in str(value).split(",")) for value in (now, was))
        return bool(now == was)

    def same_tree(self, now: Tree, was: Tree, earlier: Asked, kind: str) -> bool:
        """Return whether two expressions are the same, up to defaults and to where the files that they name lie."""
        if isinstance(now, Sum) and isinstance(was, Sum):
            # In the same order: a checkpoint holds the weights and the state of the parts by their places.
            return len(now.terms) == len(was.terms) and all(
                a == b and self.same_tree(first, second, earlier, kind)
                for (a, first), (b, second) in zip(now.terms, was.terms, strict=True)
            )
        if isinstance(now, Call) and isinstance(was, Call):
            (file, _, name), (other, _, second) = now.name.rpartition(":"), was.name.rpartition(":")
            custom = is_in_file(now.name) and is_in_file(was.name)
            called = name == second and self.same_value(file, other, earlier) if custom else now.name == was.name
            # The earlier run's own file may be gone.
            usual = defaults(now, kind)
            mine, its = usual | now.settings, usual | was.settings
            return (
                called
                and self.same_tree(now.inner, was.inner, earlier, kind)
                and mine.keys() == its.keys()
                and all(self.same_value(value, its[key], earlier) for key, value in mine.items())
            )
        return now == was

    def same_value(self, now: Value, was: Value, earlier: Asked) -> bool:
        """Return whether two values are equal or, where both are files or folders, whether their contents are."""
        if isinstance(now, str) and isinstance(was, str):
            first, second = self.sources.get(now), earlier.sources.get(was)
            if first is not None and second is not None:
                return first.holds(second)
        return now == was

    def said(self, name: str, earlier: Asked) -> str:
        """Say how a setting differs from an earlier run's."""
        now, was = self.settings.get(name), earlier.settings.get(name)
        if name in CONTENTS and name != "continue_from":
            return (
                f"its {name} are {was!r}, not {now!r}" if now != was else f"the contents of its {name} {was!r} changed"
            )
        if now == was:
            return f"the files that its {name} {was!r} names have changed"
        return f"its {name} is {was!r}, not {now!r}"


Tree = Call | Sum | str | None
"""An expression; as text where it can't be parsed, such as the name of a Python object."""


def parsed(text: Any) -> Tree:
    """Parse an expression, where there is one and it can be."""
    try:
        return parse(str(text)) if text else None
    except DraftuneError:
        return str(text)


def defaults(call: Call, kind: str) -> dict[str, Value]:
    """Return the default settings of what a call names; none where it can't be imported: loading it says why."""
    if (kind, call.name) == ("optimizer", "adamw"):
        return {}  # its defaults are settings of the run
    try:
        factory = load_from_file(call.name, kind) if is_in_file(call.name) else tables()[kind].get(call.name)
        parameters = signature_of(factory).parameters.values() if factory is not None else ()
    except (DraftuneError, TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def tables() -> dict[str, Mapping[str, Callable[..., Any]]]:
    """Return the factories of everything that an expression can name, by kind."""
    from draftune.experimental.optimizers import FILTERS, OPTIMIZERS
    from draftune.methods import METHODS
    from draftune.rewards import REWARDS

    return {"reward": REWARDS, "method": METHODS, "optimizer": OPTIMIZERS, "gradient filter": FILTERS}


def paths_in(tree: Tree, kind: str) -> Iterator[str]:
    """Yield the texts in an expression that may be paths: values of settings, and users' own files."""
    if isinstance(tree, Sum):
        for _, call in tree.terms:
            yield from paths_in(call, kind)
    elif isinstance(tree, Call):
        if is_in_file(tree.name):
            yield tree.name.rpartition(":")[0]
        for key, value in (defaults(tree, kind) | tree.settings).items():
            # Of a user's own code it is not known which settings name files.
            named = key in PATHS or (is_in_file(tree.name) and isinstance(value, str) and bool(Path(value).suffix))
            if isinstance(value, str) and named:
                yield value
        yield from paths_in(tree.inner, kind)
