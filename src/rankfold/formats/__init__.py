"""Reading and writing adapters: the native form, peft, portable LoRA and dense checkpoints."""

from . import native, peft, portable
from .export import FORMATS, export
from .report import Report

__all__ = ["FORMATS", "Report", "export", "native", "peft", "portable"]
