"""Methods: one paper, one file, found by the paper's name; and what puts them into a model."""

from .adapt import Plan, PlannedSite, adapt, plan
from .capacity import RankCapped
from .persist import load, save
from .prepare import TieFollowed
from .recipe import Recipe, parse_point
from .registry import Method, find_method, methods

__all__ = [
    "Method",
    "Plan",
    "PlannedSite",
    "RankCapped",
    "Recipe",
    "TieFollowed",
    "adapt",
    "find_method",
    "load",
    "methods",
    "parse_point",
    "plan",
    "save",
]
