"""MkDocs hook: generate reference pages from the code, and show the project's root documents on the site.

A page of `docs/` contains `<!-- generated: NAME -->` where the site shows generated Markdown. The file itself stays
readable without the site.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOT_DOCUMENTS = {
    "RESULTS.md": "project/results.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
NEEDS = {
    "gpu": "a GPU",
    "hub": "weights from the Hugging Face Hub",
    "data": "files of your own",
    "experiments": "the repository's `experiments/`",
}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
MARKER = re.compile(r"<!-- generated: (\w+) -->")
NEED = re.compile(r"^<!-- needs: ([\w ]+) -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the root documents and the images they show."""
    from mkdocs.structure.files import File

    for name, page in ROOT_DOCUMENTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, ROOT, page)))
        for _, target, _, _ in LINK.findall(text):
            if (ROOT / target).is_file() and target.startswith("results/"):
                files.append(File.generated(config, f"project/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in generated parts, make comments on needs visible, and point links to pages of the site."""
    source = page.file.src_uri
    if source not in ROOT_DOCUMENTS.values():
        markdown = relinked(markdown, (DOCS / source).parent, source)
    markdown = NEED.sub(lambda match: f"*Needs {needs(match[1].split())}.*\n", markdown)
    return MARKER.sub(lambda match: GENERATED[match[1]](), markdown)


def needs(names: Iterable[str]) -> str:
    return " and ".join(NEEDS[name] for name in names)


def relinked(markdown: str, folder: Path, page: str) -> str:
    """Rewrite links that leave `docs/`.

    Args:
        markdown: text of the page.
        folder: folder that its relative links start from.
        page: path of the page on the site.

    Returns:
        The text. A link to a root document leads to its page. A link to any other file outside `docs/` becomes plain
        text, since the site does not contain that file.
    """

    def replace(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / match[2]))
        if path.is_relative_to(DOCS):
            target = path.relative_to(DOCS).as_posix()
        elif path.is_relative_to(ROOT):
            name = path.relative_to(ROOT).as_posix()
            inside = f"project/{name}" if name.startswith("results/") and path.is_file() else ""
            target = ROOT_DOCUMENTS.get(name, inside)
        else:
            return match[0]
        if not target:
            return "](<>)"
        return f"]({os.path.relpath(target, os.path.dirname(page) or '.')}{match[3] or ''})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(<>\)", r"\1", LINK.sub(replace, markdown))


def escaped(text: str) -> str:
    """Escape Markdown outside code spans, so that formulas in docstrings appear as written."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<|])", r"\\\1", p) for p in parts)


def cell(text: str) -> str:
    return escaped(" ".join(text.split())).replace("\n", " ")


def settings() -> str:
    """Return a table of all settings, with type, range and default."""
    from draftune.settings import GROUPS, Settings
    from draftune.settings.field_checks import kind

    groups: dict[str, list[Field[Any]]] = {}
    title = ""
    for field in fields(Settings):
        title = GROUPS.get(field.name, title)
        groups.setdefault(title, []).append(field)
    return "\n\n".join(settings_table(title, members, kind) for title, members in groups.items())


def settings_table(title: str, members: Iterable[Field[Any]], kind: Callable[[Field[Any]], type]) -> str:
    heading = f"## {title[:1].upper()}{title[1:]}\n\n" if title else ""
    rows = ["| setting | value | meaning |", "|---|---|---|"]
    for f in members:
        data = f.metadata
        allowed = [" or ".join(f"`{choice}`" for choice in data.get("choices", ())) or f"`{kind(f).__name__}`"]
        allowed += [f"≥ {data['low']:g}"] if data.get("low") is not None else []
        allowed += [f"≤ {data['high']:g}"] if data.get("high") is not None else []
        default = "" if f.default is None else f"<br>default `{f.default!r}`"
        rows.append(f"| `{f.name}` | {', '.join(allowed)}{default} | {cell(data['help'])} |")
    return heading + "\n".join(rows)


def cli() -> str:
    """Return a section for each command: description, arguments and an example."""
    from draftune.cli import COMMANDS
    from draftune.cli.main import build_parser
    from draftune.settings import Settings

    from_settings = {f.name for f in fields(Settings)}
    sections = []
    for command in COMMANDS:
        parser = build_parser()
        for word in command.name.split():
            subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = subparsers.choices[word]
        actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
        own = [a for a in actions if a.dest not in from_settings or command.name not in ("train", "preflight")]
        text = [f"## `{command.name}`", escaped(command.description)]
        if len(own) < len(actions):
            text.append("Every [setting](settings.md) is a flag of this command. Other flags:")
        if own:
            text.append("\n".join(["| argument | |", "|---|---|", *map(argument, own)]))
        text.append("```bash\n" + command.example.replace("; ", "\n") + "\n```")
        sections.append("\n\n".join(text))
    return "\n\n".join(sections)


def argument(action: argparse.Action) -> str:
    """Return one table row for an argument of a command."""
    metavar = action.metavar or (("{" + ",".join(map(str, action.choices)) + "}") if action.choices else action.dest)
    value = "" if action.nargs == 0 else " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)
    value = value if action.option_strings else f"{value} …" if action.nargs in ("+", "*") else value
    name = ", ".join(action.option_strings)
    if action.option_strings and value and not isinstance(action, argparse.BooleanOptionalAction):
        name += f" {value if value != action.dest else value.upper()}"
    return f"| `{(name or value).replace('|', '/')}` | {cell(action.help or '')} |"


def entry(name: str, described: Callable[..., Any]) -> str:
    """Return a section for one registered name: its settings and its docstring."""
    parameters = inspect.signature(described, eval_str=True).parameters
    shown = [str(p) for key, p in parameters.items() if key not in ("params", "lr", "gradient")]
    signature = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", ", ".join(shown))
    return f"### `{name}`\n\n```python\n{name}({signature})\n```\n\n{escaped(inspect.getdoc(described) or '')}"


def registry(table: Mapping[str, Callable[..., Any]]) -> str:
    return "\n\n".join(entry(name, described) for name, described in table.items())


def methods() -> str:
    from draftune.methods import all_methods

    return registry(all_methods())


def rewards() -> str:
    """Return a section for each group of rewards, with the facts of each reward below its docstring."""
    from draftune.registry.catalog import facts_of, in_groups
    from draftune.rewards import REWARDS

    sections = []
    for group, names in in_groups(REWARDS).items():
        entries = (
            f"{entry(name, REWARDS[name])}\n\n*{escaped(facts_of(name))}*".removesuffix("\n\n**") for name in names
        )
        sections.append("\n\n".join([f"## {group[0].upper()}{group[1:]}", *entries]))
    return "\n\n".join(sections)


def names() -> str:
    """Return the lists of optimizers, gradient filters, prefix caches, guidance methods, prompt sets and presets."""
    from draftune.guidance.methods import GUIDES
    from draftune.presets import PRESETS
    from draftune.prompts import PROMPT_SETS
    from draftune.sampling.call_cache import CALL_CACHES
    from draftune.training.optim import gradient_filters, optimizers

    prompts = "\n".join(f"- `{name}`: {escaped(text)}" for name, (text, _) in PROMPT_SETS.items())
    presets = "\n\n".join(
        f"### `{name}`\n\n```yaml\n{path.read_text(encoding='utf-8')}```" for name, path in PRESETS.items()
    )
    parts = {
        "Guidance methods": registry(GUIDES),
        "Optimizers": registry(optimizers()),
        "Gradient filters": registry(gradient_filters()),
        "Prefix caches": registry(CALL_CACHES),
        "Prompt sets": prompts,
        "Presets": presets,
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def api() -> str:
    """Return mkdocstrings directives for every public name of the package."""
    import draftune

    objects = [getattr(draftune, name) for name in draftune.__all__]
    return "\n\n".join(f"::: {o.__module__}.{o.__qualname__}" for o in objects)


GENERATED: dict[str, Callable[[], str]] = {
    "api": api,
    "cli": cli,
    "methods": methods,
    "names": names,
    "rewards": rewards,
    "settings": settings,
}
