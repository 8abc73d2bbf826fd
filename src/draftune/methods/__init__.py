"""Where the gradient flows: DRaFT and its relatives."""

from __future__ import annotations

from draftune.errors import DraftuneError
from draftune.methods.adjoint_matching import AdjointMatching
from draftune.methods.base import METHODS, Batch, Method, RewardGradient, register
from draftune.methods.ddpo import DDPO, DPOK
from draftune.methods.draft import AlignProp, Draft, DraftK, DraftLV, ReFL
from draftune.methods.drtune import DRTune
from draftune.methods.kl import KL
from draftune.methods.leapalign import LeapAlign
from draftune.methods.sft_pg import SFTPG
from draftune.registry.expression import Call, parse
from draftune.registry.factories import found, inner_call, made

__all__ = [
    "DDPO",
    "DPOK",
    "KL",
    "METHODS",
    "SFTPG",
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
    factory = found(call.name, "method", METHODS)
    inner = inner_call(call, factory, Method, "method", "draft-lv")
    return made(call, factory, Method, "method", "Method", *([build(inner)] if inner else []))
