"""Fine-tuning methods: DRaFT and others, which differ in the denoiser calls that carry gradient."""

from __future__ import annotations

from draftune.methods.adjoint_matching import AdjointMatching
from draftune.methods.base import METHODS, BackpropMethod, Batch, Method, register
from draftune.methods.ddpo import DDPO, DPOK
from draftune.methods.diffusion_nft import DiffusionNFT
from draftune.methods.direct_align import DirectAlign
from draftune.methods.draft import AlignProp, Draft, DraftK, DraftLV, ReFL
from draftune.methods.drtune import DRTune
from draftune.methods.flow_grpo import FlowGRPO, MixGRPO
from draftune.methods.flowbp import FlowBPBridge, FlowBPSparse
from draftune.methods.flowbp_lagrange import FlowBPLagrange
from draftune.methods.kl import KL
from draftune.methods.leapalign import LeapAlign
from draftune.methods.online_dpo import OnlineDPO
from draftune.registry.factories import build, parse_call

__all__ = [
    "DDPO",
    "DPOK",
    "KL",
    "METHODS",
    "AdjointMatching",
    "AlignProp",
    "Batch",
    "DRTune",
    "DiffusionNFT",
    "DirectAlign",
    "Draft",
    "DraftK",
    "DraftLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "FlowGRPO",
    "LeapAlign",
    "Method",
    "MixGRPO",
    "OnlineDPO",
    "ReFL",
    "BackpropMethod",
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
        text: A name with settings, such as "draft", "draft_lv(n=4)" or "kl(draft_k(k=5), beta=0.1)", or a class of
            your own file, such as '"my.py:Mine"(k=2)'.

    Raises:
        DraftuneError: The method or one of its settings is unknown, or a value is not allowed.
    """
    return build(parse_call(text, "method", "draft_k(k=10)"), "method", all_methods(), Method)
