"""Rankfold: low-rank learning in PyTorch. Every weight is an expression."""

from . import errors, optim, weights
from .errors import RankfoldError
from .formats import Report, export
from .layers import (
    Summary,
    auxiliary_loss,
    checkpoint,
    count,
    disabled,
    fold,
    gate_inputs,
    remove,
    summary,
    use,
)
from .methods import (
    Method,
    Plan,
    Recipe,
    absorb,
    adapt,
    attach,
    find_method,
    load,
    methods,
    param_groups,
    parse_point,
    plan,
    remix_loss,
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
    "absorb",
    "adapt",
    "attach",
    "auxiliary_loss",
    "checkpoint",
    "collect",
    "count",
    "disabled",
    "errors",
    "export",
    "find_method",
    "fold",
    "gate_inputs",
    "load",
    "methods",
    "optim",
    "param_groups",
    "parse_point",
    "plan",
    "remix_loss",
    "remove",
    "save",
    "squeeze",
    "summary",
    "use",
    "weights",
]
