"""What a user's own file defines, named on the command line: `my/file.py:name`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.utils.paths import user_path


def is_custom(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def defined(name: str, kind: str) -> Any:
    """The function or class that FILE.py:NAME names, the file run once.

    Raises DraftuneError for a file that is not there or fails, and a name that it does not define.
    """
    file, _, key = name.rpartition(":")
    module = run_file(user_path(file), kind)
    found = getattr(module, key, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise unknown(f"{kind} in {file!r}:", key, own)
    return found


def run_file(path: Path, kind: str) -> ModuleType:
    """The user's file as a module, run once; as for a script, its folder is where it finds its neighbours."""
    if not path.is_file():
        raise DraftuneError(f"no file {str(path)!r} with a {kind} in it")
    path = path.resolve()
    name = f"draftune.registry.custom:{path}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if out_of_memory(error):
            raise
        raise DraftuneError(f"the file {str(path)!r} can't be run: {where(error)}") from error
    return module


def where(error: BaseException) -> str:
    """An error in one line, with the last place outside of libraries that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
