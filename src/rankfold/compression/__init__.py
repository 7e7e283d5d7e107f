"""Compressing: a model becomes a smaller one."""

from .forms import unfold
from .job import compress
from .objective import Objective, Site, Solved, floored
from .registry import compressor
from .report import CompressionReport, Row
from .shares import Unit, share
from .task import Task

__all__ = [
    "CompressionReport",
    "Objective",
    "Row",
    "Site",
    "Solved",
    "Task",
    "Unit",
    "compress",
    "compressor",
    "floored",
    "share",
    "unfold",
]
