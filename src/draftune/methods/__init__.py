"""Where the gradient flows: DRaFT and its relatives."""

from draftune.methods.base import METHODS, Method, load_method
from draftune.methods.draft import AlignProp, Draft, DraftK, DraftLV, ReFL
from draftune.methods.drtune import DRTune

__all__ = ["METHODS", "AlignProp", "DRTune", "Draft", "DraftK", "DraftLV", "Method", "ReFL", "load_method"]
