"""Where the gradient flows: DRaFT and its relatives."""

from __future__ import annotations

from draftune.custom import defined, is_custom, where
from draftune.errors import DraftuneError, unknown
from draftune.expression import Call, parse, wraps_another
from draftune.methods.adjoint import AdjointMatching
from draftune.methods.base import METHODS, Batch, Method, RewardGradient, register
from draftune.methods.draft import AlignProp, Draft, DraftK, DraftLV, ReFL
from draftune.methods.drtune import DRTune
from draftune.methods.kl import KL
from draftune.methods.leapalign import LeapAlign
from draftune.methods.policy import DDPO, DPOK

__all__ = [
    "DDPO",
    "DPOK",
    "KL",
    "METHODS",
    "AdjointMatching",
    "AlignProp",
    "Batch",
    "DRTune",
    "Draft",
    "DraftK",
    "DraftLV",
    "LeapAlign",
    "Method",
    "ReFL",
    "RewardGradient",
    "load_method",
    "register",
]


def load_method(text: str) -> Method:
    """A method from its name and settings: "draft", "draft-lv(n=4)", "kl(draft-k(k=5), beta=0.1)", "my.py:Mine(k=2)".

    Raises DraftuneError for a name or a setting that is not there.
    """
    tree = parse(text)
    if not isinstance(tree, Call):
        raise DraftuneError(f"a method is one name with its settings, such as draft-k(k=10), not {text!r}")
    return build(tree)


def build(call: Call) -> Method:
    if is_custom(call.name):
        factory = defined(call.name, "method")
    elif call.name in METHODS:
        factory = METHODS[call.name]
    else:
        raise unknown("method", call.name, METHODS)
    inner = []
    if wraps_another(factory, Method):
        if not isinstance(call.inner, Call):
            raise DraftuneError(f"{call.name} wants one method inside it: {call.name}(draft-lv)")
        inner = [build(call.inner)]
    elif call.inner is not None:
        raise DraftuneError(f"{call.name} takes settings such as key=value, not {str(call.inner)!r}")
    try:
        method = call.apply(factory, "method", *inner)
    except DraftuneError:
        raise
    except Exception as error:
        raise DraftuneError(f"the method {call.name!r} can't be made: {where(error)}") from error
    if not isinstance(method, Method):
        raise DraftuneError(f"{call.name!r} makes a {type(method).__name__}, not a Method")
    return method
