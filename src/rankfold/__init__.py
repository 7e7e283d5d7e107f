"""Rankfold: low-rank learning in PyTorch. Every weight is an expression."""

from . import errors, weights
from .errors import RankfoldError
from .layers import Summary, checkpoint, disabled, fold, remove, summary, use
from .methods import Method, Plan, Recipe, adapt, find_method, methods, parse_point, plan

__version__ = "0.1.0"

__all__ = [
    "Method",
    "Plan",
    "RankfoldError",
    "Recipe",
    "Summary",
    "__version__",
    "adapt",
    "checkpoint",
    "disabled",
    "errors",
    "find_method",
    "fold",
    "methods",
    "parse_point",
    "plan",
    "remove",
    "summary",
    "use",
    "weights",
]
