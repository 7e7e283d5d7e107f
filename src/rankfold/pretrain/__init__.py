"""Pretraining: a language model from scratch, under any structure and optimizer of the catalogue."""

from .config import PretrainConfig
from .finish import load_pretrained
from .memory import StepMemory
from .report import PretrainPlan, PretrainResult
from .run import plan_pretraining, pretrain

__all__ = [
    "PretrainConfig",
    "PretrainPlan",
    "PretrainResult",
    "StepMemory",
    "load_pretrained",
    "plan_pretraining",
    "pretrain",
]
