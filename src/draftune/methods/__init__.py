"""Fine-tuning methods: DRaFT and others, which differ in the denoiser calls that carry gradient."""

from __future__ import annotations

from draftune.errors import DraftuneError
from draftune.methods.adjoint_matching import AdjointMatching
from draftune.methods.base import METHODS, Batch, Method, RewardGradient, register
from draftune.methods.ddpo import DDPO, DPOK
from draftune.methods.draft import AlignProp, Draft, DraftK, DraftLV, ReFL
from draftune.methods.drtune import DRTune
from draftune.methods.kl import KL
from draftune.methods.leapalign import LeapAlign
from draftune.registry.expression import Call, parse
from draftune.registry.factories import found, inner_call, made

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
    "all_methods",
    "load_method",
    "register",
]


def all_methods() -> dict[str, type[Method]]:
    """Return all methods by name. This imports the experimental ones, which register themselves."""
    from draftune.experimental import sft_pg  # noqa: F401

    return METHODS


def load_method(text: str) -> Method:
    """Create a method from an expression.

    Args:
        text: A name with settings, such as "draft", "draft-lv(n=4)" or "kl(draft-k(k=5), beta=0.1)", or a class of
            your own file, such as "my.py:Mine(k=2)".

    Raises:
        DraftuneError: The method or one of its settings is unknown, or a value is not allowed.
    """
    tree = parse(text)
    if not isinstance(tree, Call):
        raise DraftuneError(f"the method must be one name with its settings, such as draft-k(k=10), got {text!r}")
    return build(tree)


def build(call: Call) -> Method:
    """Create the method that a parsed call names, with the method inside it if it wraps one."""
    factory = found(call.name, "method", all_methods())
    inner = inner_call(call, factory, Method, "method", "draft-lv")
    return made(call, factory, Method, "method", "Method", *([build(inner)] if inner else []))
