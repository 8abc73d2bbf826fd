"""A user's own reward, named on the command line by its file: `my/rewards.py:sharp(k=3)`."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from draftune.errors import DraftuneError, unknown
from draftune.expression import Call
from draftune.rewards.base import FunctionReward, Reward, where


def is_custom(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def load_custom(call: Call) -> Reward:
    """The function, class or Reward that a call names, with the call's settings.

    A function gets (images, prompts) and the settings; a class gets the settings when it is made. Raises DraftuneError
    for a file that is not there or fails, a name that it does not define, and settings that do not fit.
    """
    file, _, name = call.name.rpartition(":")
    module = run_file(Path(file).expanduser())
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise unknown(f"reward in {file!r}:", name, own)
    if isinstance(found, type):
        try:
            found = call.apply(found, "reward")
        except DraftuneError:
            raise
        except Exception as error:
            raise DraftuneError(f"the reward {call.name!r} can't be made: {where(error)}") from error
    elif call.settings and not isinstance(found, nn.Module):
        known = list(inspect.signature(found).parameters)[2:]
        for key in call.settings:
            if key not in known:
                raise unknown(f"setting of reward {name}:", key, known)
        found = functools.partial(found, **call.settings)
    reward = found if isinstance(found, Reward) else FunctionReward(found)
    reward.label = name
    return reward


def run_file(path: Path) -> ModuleType:
    """The user's file as a module; it may import its neighbours."""
    if not path.is_file():
        raise DraftuneError(f"no file {str(path)!r} with a reward in it")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise DraftuneError(f"the file {str(path)!r} can't be run: {where(error)}") from error
    finally:
        sys.path.pop(0)
    return module
