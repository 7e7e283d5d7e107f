"""Rankfold: low-rank learning in PyTorch. Every weight is an expression."""

from . import errors, weights
from .errors import RankfoldError
from .formats import Report, export
from .layers import Summary, checkpoint, disabled, fold, remove, summary, use
from .methods import Method, Plan, Recipe, adapt, find_method, load, methods, parse_point, plan, save

__version__ = "0.1.0"

__all__ = [
    "Method",
    "Plan",
    "RankfoldError",
    "Recipe",
    "Report",
    "Summary",
    "__version__",
    "adapt",
    "checkpoint",
    "disabled",
    "errors",
    "export",
    "find_method",
    "fold",
    "load",
    "methods",
    "parse_point",
    "plan",
    "remove",
    "save",
    "summary",
    "use",
    "weights",
]
