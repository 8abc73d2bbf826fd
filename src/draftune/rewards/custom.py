"""A user's own reward, named on the command line by its file: `my/rewards.py:sharp(k=3)`."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from draftune.custom import defined, where
from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.expression import Call
from draftune.rewards.base import FunctionReward, Reward


def load_custom(call: Call) -> Reward:
    """The function, class or Reward that a call names, with the call's settings.

    A function gets (images, prompts) and the settings; a class gets the settings when it is made. Raises DraftuneError
    for a file that is not there or fails, a name that it does not define, and settings that do not fit.
    """
    found = defined(call.name, "reward")
    name = call.name.rpartition(":")[2]
    if isinstance(found, type):
        try:
            found = call.apply(found, "reward")
        except DraftuneError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
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
