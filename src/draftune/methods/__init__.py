"""Where the gradient flows: DRaFT and its relatives."""

from __future__ import annotations

from draftune.methods.adjoint_matching import AdjointMatching
from draftune.methods.base import METHODS, Batch, Method, RewardGradient, register
from draftune.methods.ddpo import DDPO, DPOK
from draftune.methods.draft import AlignProp, Draft, DraftK, DraftLV, ReFL
from draftune.methods.drtune import DRTune
from draftune.methods.kl import KL
from draftune.methods.leapalign import LeapAlign
from draftune.methods.sft_pg import SFTPG
from draftune.registry.factories import build, parse_call

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
    """Return a method from an expression: "draft", "draft_lv(n=4)", "kl(draft_k(k=5), beta=0.1)", '"my.py:Mine"(k=2)'.

    Raises:
        DraftuneError: for an unknown name or setting.
    """
    return build(parse_call(text, "method", "draft_k(k=10)"), "method", METHODS, Method)
