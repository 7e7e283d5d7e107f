"""Rankfold: low-rank learning in PyTorch. Every weight is an expression."""

from . import errors, weights
from .errors import RankfoldError
from .formats import Report, export
from .layers import Summary, checkpoint, disabled, fold, remove, summary, use
from .methods import (
    Method,
    Plan,
    Recipe,
    adapt,
    attach,
    find_method,
    load,
    methods,
    param_groups,
    parse_point,
    plan,
    save,
    squeeze,
)
from .statistics import Statistics, collect
from .training.callback import TrainerCallback
from .version import __version__

__all__ = [
    "Method",
    "Plan",
    "RankfoldError",
    "Recipe",
    "Report",
    "Statistics",
    "Summary",
    "TrainerCallback",
    "__version__",
    "adapt",
    "attach",
    "checkpoint",
    "collect",
    "disabled",
    "errors",
    "export",
    "find_method",
    "fold",
    "load",
    "methods",
    "param_groups",
    "parse_point",
    "plan",
    "remove",
    "save",
    "squeeze",
    "summary",
    "use",
    "weights",
]
