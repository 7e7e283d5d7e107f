"""Methods: one paper, one file, found by the paper's name; and what puts them into a model."""

from .absorb import absorb
from .adapt import Plan, PlannedSite, adapt, plan
from .attach import Attached, attach
from .capacity import LeftOut, RankCapped
from .groups import param_groups
from .persist import load, save
from .prepare import TieFollowed
from .recipe import Recipe, parse_point
from .registry import Method, find_method, methods
from .routing import remix_loss
from .squeeze import squeeze

__all__ = [
    "Attached",
    "LeftOut",
    "Method",
    "Plan",
    "PlannedSite",
    "RankCapped",
    "Recipe",
    "TieFollowed",
    "absorb",
    "adapt",
    "attach",
    "find_method",
    "load",
    "methods",
    "param_groups",
    "parse_point",
    "plan",
    "remix_loss",
    "save",
    "squeeze",
]
