"""Methods: one paper, one file, found by the paper's name; and what puts them into a model."""

from .adapt import Plan, PlannedSite, RankCapped, adapt, plan
from .persist import load, save
from .recipe import Recipe, parse_point
from .registry import Method, find_method, methods

__all__ = [
    "Method",
    "Plan",
    "PlannedSite",
    "RankCapped",
    "Recipe",
    "adapt",
    "find_method",
    "load",
    "methods",
    "parse_point",
    "plan",
    "save",
]
