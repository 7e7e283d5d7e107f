"""Methods: one paper, one file, found by the paper's name; and what puts them into a model."""

from .absorb import absorb
from .adapt import Plan, PlannedSite, adapt, plan
from .attach import Attached, attach
from .capacity import LeftOut, RankCapped
from .export import export
from .groups import param_groups
from .laziness import Laziness, laziness
from .nested import matryoshka_loss, nested_loss
from .ordered import keep_prefix, maestro_loss
from .persist import load, save
from .prepare import TieFollowed
from .rebuilt import read_native
from .recipe import Recipe, parse_point
from .registry import Method, find_method, methods
from .routing import remix_loss
from .scratch.low_rank_rnn import low_rank_recurrent_
from .scratch.matryoshka import MatryoshkaHead
from .squeeze import squeeze
from .squeezing import SqueezeReport
from .subspaces import intrinsic_dimension_of

__all__ = [
    "Attached",
    "Laziness",
    "LeftOut",
    "MatryoshkaHead",
    "Method",
    "Plan",
    "PlannedSite",
    "RankCapped",
    "Recipe",
    "SqueezeReport",
    "TieFollowed",
    "absorb",
    "adapt",
    "attach",
    "export",
    "find_method",
    "intrinsic_dimension_of",
    "keep_prefix",
    "laziness",
    "load",
    "low_rank_recurrent_",
    "maestro_loss",
    "matryoshka_loss",
    "methods",
    "nested_loss",
    "param_groups",
    "parse_point",
    "plan",
    "read_native",
    "remix_loss",
    "save",
    "squeeze",
]
