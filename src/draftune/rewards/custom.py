"""A user's own reward, named on the command line by its file: `my/rewards.py:sharp(k=3)`."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from draftune.errors import DraftuneError, out_of_memory, unknown
from draftune.registry.custom import defined, where
from draftune.registry.expression import Call
from draftune.rewards.base import REWARDS, FunctionReward, Reward


def load_custom(call: Call) -> Reward:
    """The function, class or Reward that a call names, with the call's settings.

    A function gets (images, prompts) and the settings. A class, or what `register` was put on, gets the settings when
    the reward is made.

    Raises:
        DraftuneError: the file is not there or fails, it defines no such name, or a setting does not fit.
    """
    found = defined(call.name, "reward")
    name = call.name.rpartition(":")[2]
    if isinstance(found, type) or found in REWARDS.values():
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
