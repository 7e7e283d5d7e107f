"""Merging: several models of one base, or several adapters, become one."""

from .job import merge
from .report import MergeReport

__all__ = ["MergeReport", "merge"]
