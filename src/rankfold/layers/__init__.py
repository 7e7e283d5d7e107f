"""Layers that hold expressions: finding targets in a model, replacing them, switching and folding."""

from .adaptation import (
    STAGES,
    Adaptation,
    Adapter,
    Branch,
    FoldError,
    adaptation_of,
    attach,
    disabled,
    fold,
    remove,
    require,
    use,
)
from .carrier import CacheMemory, Carrier, GateRule, ModelInputs, checkpoint
from .layer import (
    StructuredAttention,
    StructuredConv,
    StructuredEmbedding,
    StructuredForeign,
    StructuredLayer,
    StructuredLinear,
    StructuredTransposedLinear,
    kind_of,
)
from .summary import Summary, summary
from .targets import PRESETS, Target, Targets, blocks, find_modules, find_targets, output_heads, task_heads
from .watch import watch_first_forward

__all__ = [
    "PRESETS",
    "STAGES",
    "Adaptation",
    "Adapter",
    "Branch",
    "CacheMemory",
    "Carrier",
    "FoldError",
    "GateRule",
    "ModelInputs",
    "StructuredAttention",
    "StructuredConv",
    "StructuredEmbedding",
    "StructuredForeign",
    "StructuredLayer",
    "StructuredLinear",
    "StructuredTransposedLinear",
    "Summary",
    "Target",
    "Targets",
    "adaptation_of",
    "attach",
    "blocks",
    "checkpoint",
    "disabled",
    "find_modules",
    "find_targets",
    "fold",
    "kind_of",
    "output_heads",
    "remove",
    "require",
    "summary",
    "task_heads",
    "use",
    "watch_first_forward",
]
