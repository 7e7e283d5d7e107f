"""Merging: several models of one base, or several adapters, become one."""

from .job import merge
from .matching import matched
from .papers.lmc import lmc
from .report import MergeReport
from .symmetries import specification

__all__ = ["MergeReport", "lmc", "matched", "merge", "specification"]
