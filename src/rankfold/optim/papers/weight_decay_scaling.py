"""Weight-decay scaling: AdamW's decay grows with the root of the width, so that layers keep their gain.

    matrices:       lr = lr_0 / w,   decay = decay_0 sqrt(w),   w = width / width of the base
    everything else: lr = lr_0,      decay = 0

Fan et al. 2025. Under AdamW, W <- W - lr (psi + decay W), the singular values of a matrix settle at a scale
of sqrt(lr / decay), and the largest at about sqrt(lr / decay) d^0.75. With muP's lr ~ 1/d it stays where it
is under the rule above; it falls where lr decay is kept, and grows where decay is. Embeddings, heads, gains
and biases have no decay. w is that of what a matrix reads. lr and decay are those that were chosen for the
base. The start and the output multiplier are muP's, see `mup_model`. Start: the weights as they are.

Deviations: the paper has matrices with two growing sides and vectors. A matrix that reads something of a
fixed size has w = 1 here, and the factors of a product are treated as matrices, one by one: that the
largest singular value of the product keeps its place is not promised.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..recipes import optimizer
from ..widths import HIDDEN, READER, Base, Width, tables, widths
from .mup import USE, grouped


@optimizer(
    "weight-decay-scaling",
    title="Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
    year=2025,
    arxiv="2510.15262",
    formula="matrices: lr = lr_0 / w, decay = decay_0 sqrt(w); vectors: lr_0 and no decay",
    traits=USE,
)
def weight_decay_scaling(
    model: nn.Module, lr: float = 1e-3, *, base: Base, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW.

    Args:
        model: of any width.
        lr: learning rate at the base's width.
        base: the same model at the width that rates were chosen for, or the shapes of its parameters.
        weight_decay: of matrices at the base's width, as it is multiplied by lr.

    Raises:
        Incompatible: the base has other parameters.

    Example:
        >>> import torch, rankfold as rf
        >>> build = lambda d: torch.nn.Sequential(torch.nn.Embedding(8, d), torch.nn.Linear(d, d, bias=False))
        >>> groups = rf.optim.weight_decay_scaling(build(64), 1e-3, base=build(16), weight_decay=0.1)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('input', 0.001, 0.0), ('hidden', 0.00025, 0.2)]
    """
    plain = tables(model)
    return grouped(
        (
            each.kind,
            each.name,
            each.parameter,
            lr / each.fan_in if each.kind in (HIDDEN, READER) else lr,
            weight_decay * math.sqrt(each.fan_in) if _is_matrix(each, plain) else 0.0,
        )
        for each in widths(model, base)
    )


def _is_matrix(each: Width, plain: set[str]) -> bool:
    return each.parameter.dim() > 1 and each.name not in plain
