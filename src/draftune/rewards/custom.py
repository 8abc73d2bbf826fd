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
from draftune.paths import user_path
from draftune.rewards.base import FunctionReward, Reward, where


def is_custom(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def load_custom(call: Call) -> Reward:
    """The function, class or Reward that a call names, with the call's settings.

    A function gets (images, prompts) and the settings; a class gets the settings when it is made. Raises DraftuneError
    for a file that is not there or fails, a name that it does not define, and settings that do not fit.
    """
    file, _, name = call.name.rpartition(":")
    module = run_file(user_path(file))
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
    elif call.settings:
        parameters = [] if isinstance(found, nn.Module) else list(inspect.signature(found).parameters.values())[2:]
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        for key in call.settings:
            if not anything and key not in (known := [parameter.name for parameter in parameters]):
                raise unknown(f"setting of reward {name}:", key, known)
        found = functools.partial(found, **call.settings)
    reward = found if isinstance(found, Reward) else FunctionReward(found)
    reward.label = name
    return reward


def run_file(path: Path) -> ModuleType:
    """The user's file as a module, run once; as for a script, its folder is where it finds its neighbours."""
    if not path.is_file():
        raise DraftuneError(f"no file {str(path)!r} with a reward in it")
    path = path.resolve()
    name = f"draftune.custom:{path}"
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
        raise DraftuneError(f"the file {str(path)!r} can't be run: {where(error)}") from error
    return module
