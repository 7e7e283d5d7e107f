"""A quantised matrix that stays, plus a low-rank product that trains: the form of LQ-LoRA and LoftQ.

    W = Q + (alpha / r) B A,   Q in a NormalFloat format, frozen;   B (out, r),   A (r, in)

Guo et al. 2023, after QLoRA. The factors start as the best rank-r part of the usual start, split evenly, and
Q is what remains, quantised: the first turn of LQ-LoRA. The compression lq-lora fills it with what all turns
find, in a format for every weight. A format is written nf<b>-<B0>-<b0>-<B1>-<b1>: numbers of b bits in blocks
of B0 whose scales take b0 bits in groups of B1 with one floating-point number each; nf<b>-<B0>-<b1> keeps
plain scales. alpha = 16 and r = 64 are the paper's, nf4-64-8-256-fp32 is that of QLoRA.
Start: that sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import InvalidOption
from ...linalg import NormalFloat, quantised_low_rank
from ...weights import Dense, Quantised, Weight
from ..registry import not_base, structure
from ..site import Factors, Site


@structure(
    "quantised-low-rank",
    title="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
    year=2023,
    arxiv="2311.12023",
    code="HanGuo97/lq-lora",
    formula="W = Q + (alpha / r) B A, Q in blocks of NormalFloat numbers and frozen",
    start=not_base("that of a quantised matrix plus the best rank-r part of every weight"),
    rank=64,
    pairs="terms",
    sides=True,
    entries=True,
    scratch=True,
)
def quantised_plus_low_rank(
    site: Site,
    rank: int,
    *,
    alpha: float | None = 16.0,
    formats: str | Mapping[str, str] = "nf4-64-8-256-fp32",
) -> Weight:
    """Return Q + (alpha / r) B A.

    Args:
        site: the weight.
        rank: r, of the product beside the quantised matrix.
        alpha: numerator of the scaling of B A; None takes r.
        formats: of Q, one for all weights or one for each by its path.
    """
    form, scaling = NormalFloat.of(format_of(site.path, formats)), site.scaling(alpha, rank)
    if site.blank:
        layout = form.layout(site.shape[0] * site.shape[1]).items()
        tensors = {name: torch.zeros(size, dtype=dtype, device=site.device) for name, (size, dtype) in layout}
        factors = Factors(site.zeros(site.shape[0], rank), site.zeros(rank, site.shape[1]), "displaced")
    else:
        found = quantised_low_rank(site.matrix(), rank, form, scaling=scaling, iterations=1)
        tensors, factors = dict(found.tensors), Factors(found.up, found.down, "displaced")
    leaves = {name: Dense(value, name, trainable=False) for name, value in tensors.items()}
    wide = torch.promote_types(site.dtype, torch.float32)
    return Quantised(form, leaves, site.shape, wide) + site.change(factors, scaling)


def format_of(path: str, formats: str | Mapping[str, str]) -> str:
    """Return the format of a weight.

    Raises:
        InvalidOption: none is given.

    Example:
        >>> format_of("0", {"0": "nf3-32-bf16"})
        'nf3-32-bf16'
    """
    found = formats if isinstance(formats, str) else formats.get(path)
    if found is None:
        raise InvalidOption(f"{path}: formats says nothing of this weight")
    return found
