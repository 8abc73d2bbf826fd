"""Where the gradient flows: DRaFT and its relatives."""

from draftune.methods.base import METHODS, Method, load_method
from draftune.methods.draft import Draft, DraftK, DraftLV, ReFL

__all__ = ["METHODS", "Draft", "DraftK", "DraftLV", "Method", "ReFL", "load_method"]
