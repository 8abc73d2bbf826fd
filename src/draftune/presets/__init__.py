"""Settings files in YAML, and the presets: files for published models on GPUs of a given size. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftune.errors import DraftuneError, unknown
from draftune.utils.paths import user_path

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def config_path(name: str) -> Path:
    """Return the path of a settings file, or of the preset of that name if there is no such file.

    Raises:
        DraftuneError: the text looks like a preset's name, and no preset has it.
    """
    path = user_path(name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    if name not in PRESETS:
        raise unknown("preset or file", name, PRESETS)
    return PRESETS[name]


def first_comment(preset: Path) -> str:
    """Return the first line of a preset's comment."""
    return preset.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the settings of a YAML file. Raises DraftuneError if it is not a mapping, or repeats a name."""
    import yaml

    path = user_path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise DraftuneError(f"cannot read the settings file {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DraftuneError(f"the settings file {str(path)!r} is not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DraftuneError(f"{str(path)!r} is not YAML{line}: {getattr(error, 'problem', error)}") from error
    except (ValueError, RecursionError) as error:
        raise DraftuneError(f"{str(path)!r} contains a value that cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DraftuneError(f"{str(path)!r} must contain 'setting: value' lines")
    # PyYAML silently uses the last of several values.
    names = [key.value for key, _ in getattr(node, "value", ())]
    for key in names:
        if names.count(key) > 1:
            raise DraftuneError(f"{str(path)!r} contains {key!r} twice")
    return values
