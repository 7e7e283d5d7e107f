"""Reading and writing adapters: the native form, peft, portable LoRA and dense checkpoints."""

from . import native, peft, portable
from .changes import Changes, read_changes
from .export import FORMATS, export
from .report import Report

__all__ = ["FORMATS", "Changes", "Report", "export", "native", "peft", "portable", "read_changes"]
