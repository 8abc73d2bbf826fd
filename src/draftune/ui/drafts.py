"""Drafts of runs: what was typed into the form, checked and written to the files that a run is started from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from draftune.errors import DraftuneError
from draftune.presets import PRESETS, read_yaml
from draftune.settings import Settings
from draftune.ui.folder import RECORDS, RunsFolder
from draftune.ui.form import defaults_with, given, typed
from draftune.ui.processes import RESULT, Jobs
from draftune.ui.state import settings_of
from draftune.ui.validation import validated

SET, PASTED, UPLOADED = SOURCES = ("set", "pasted", "file")
"""Where prompts come from: a named set or path, a text field, an uploaded file."""
LONGEST = 100_000
"""Bytes of prompts that are shown in the text field again; longer ones are kept as a file."""


@dataclass
class Draft:
    """What was typed into the form.

    Attributes:
        name: The name of the run.
        values: The texts of the settings, by name.
        source: One of SOURCES.
        prompts: A named set of prompts, or a path.
        pasted: Prompts, one a line.
        file: The name and the content of an uploaded file.
        preset: The preset that was chosen last.
        errors: What is wrong, by setting or "name"; under "" what belongs to none.
    """

    name: str
    values: dict[str, str] = field(default_factory=dict)
    source: str = SET
    prompts: str = ""
    pasted: str = ""
    file: tuple[str, bytes] = ("", b"")
    preset: str = ""
    errors: dict[str, str] = field(default_factory=dict)


def prefilled(folder: RunsFolder, preset: str = "", earlier: str = "", edit: bool = False, name: str = "") -> Draft:
    """Return a draft with the settings of a preset, or those of an earlier run, else one with the defaults.

    Args:
        folder: The folder of runs.
        preset: The name of a preset.
        earlier: The name of a run or draft.
        edit: Whether the draft replaces the earlier one, which has no folder yet.
        name: The name that was typed; else a free one.
    """
    draft = Draft(name or folder.free_name(), preset=preset)
    if preset in PRESETS:
        values = read_yaml(PRESETS[preset])
    elif earlier and folder.exists(earlier) and (settings := settings_of(folder, earlier)) is not None:
        values = asdict(settings)
        draft.name = earlier if edit else draft.name
    else:
        return draft
    draft.values = typed(values)
    prompts = Path(values.get("prompts") or "")
    if folder.path / RECORDS in prompts.parents and prompts.is_file():
        content = prompts.read_bytes()
        if prompts.suffix == ".txt" and len(content) < LONGEST:
            draft.source, draft.pasted = PASTED, content.decode("utf-8-sig", "replace")
        else:
            draft.source, draft.file = UPLOADED, (prompts.name, content)
    elif prompts.name and values["prompts"] != defaults_with(values)["prompts"]:
        draft.prompts = str(values["prompts"])
    return draft


def save(draft: Draft, folder: RunsFolder, jobs: Jobs) -> Settings | None:
    """Check a draft and write its files.

    Returns:
        The settings; None if something is wrong: `draft.errors` says what.
    """
    draft.errors = {}
    try:
        folder.check_new(draft.name)
        if any(job.name == draft.name for job in jobs.open()):
            raise DraftuneError(f"{draft.name!r} waits or is running: give another name")
    except DraftuneError as error:
        draft.errors["name"] = str(error)
    values = given(draft.values)
    record = folder.record(draft.name)
    with TemporaryDirectory(dir=folder.path / RECORDS, prefix="new-") as temporary:
        new = Path(temporary) / "record"
        new.mkdir()
        path = prompt_file(draft, new)
        if path is not None or draft.prompts:
            values["prompts"] = str(path or draft.prompts)
        settings, errors = validated(values)
        shown = {str(path): draft.file[0] if draft.source == UPLOADED else "the pasted prompts", f"{new}/": ""}
        for name, text in errors.items():
            for private, public in shown.items():
                text = text.replace(private, public)
            draft.errors[name] = text
        if draft.source == UPLOADED and path is None:
            draft.errors["prompts"] = "choose a file"
        if draft.errors or settings is None:
            return None
        if path is not None:
            settings = replace(settings, prompts=str(record / path.name))
        settings = replace(settings, output=str(folder.run(draft.name)))
        (new / folder.settings(draft.name).name).write_text(settings.to_yaml(), encoding="utf-8")
        # An earlier draft is removed when the new one is whole, as it would not be on a full disk.
        shutil.rmtree(record, ignore_errors=True)
        new.rename(record)
    return settings


def prompt_file(draft: Draft, folder: Path) -> Path | None:
    """Write the prompts that were pasted or uploaded. Return the file; None for a named set, or without a file."""
    if draft.source == PASTED:
        path = folder / "prompts.txt"
        path.write_text(draft.pasted.replace("\r\n", "\n"), encoding="utf-8", errors="replace", newline="\n")
        return path
    name, content = draft.file
    if draft.source != UPLOADED or not name:
        return None
    ending = Path(name).suffix.lower()
    path = folder / f"prompts{ending if re.fullmatch(r'[.][a-z0-9]{1,8}', ending) else ''}"
    path.write_bytes(content)
    return path


def commands(folder: RunsFolder, name: str, scales: str = "", images: str = "") -> Mapping[str, list[str]]:
    """Return the arguments of `draftune` by what the page does with a run."""
    run, settings = str(folder.run(name)), str(folder.settings(name))
    answer = str(folder.record(name) / RESULT)
    config = ["--config", settings, "--output", run]
    return {
        "train": ["train", *config],
        "check": ["preflight", "--json", answer, *config],
        "count": ["preflight", "--count", "--json", answer, *config],
        "sweep": ["sweep", run, f"--scales={scales}", f"--num-images={images}"],
    }
