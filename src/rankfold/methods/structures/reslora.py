"""ResLoRA with block shortcuts: a layer also applies the changes of the layers before it.

    W_n = W0_n + s sum_{i=0..min(K, n)} B_{n-i} A_{n-i},   s = alpha / r

Shi et al. 2024. Layers follow one another where their projection's name and their shape agree, in the
model's order; every layer owns one pair, and the K layers after it share it, so that its gradient is the
sum of what reaches it through all of them. This form folds exactly. r = 16 and alpha = 2 r are the paper's;
K = 1 is this package's choice, -1 means all. Start: A Kaiming uniform (a = sqrt 5), B = 0: the base,
exactly.

Deviations: no dropout by default, where the paper's runs use 0.05; the input and middle shortcuts, A_n (x_n +
x_{n-1}) and A_n x_n + A_{n-1} x_{n-1}, are left out: they read another layer's input, have no matrix, and
fold only approximately.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Dropped, Sum, Weight
from ..limits import in_range
from ..registry import structure
from ..site import Planned, Site, derived_seed
from .mos import kinds


def shared_pairs(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, previous: int, **options: float
) -> Planned:
    """Start one pair per layer, and tell every layer which ones it reads, its own first."""
    if previous < -1:
        raise InvalidOption(f"reslora: previous must be -1 (all) or at least 0, not {previous}")
    shared: dict[str, Tensor] = {}
    read: dict[str, dict[str, Tensor]] = {}
    numbers = {path: number for number, path in enumerate(sites)}
    for path, site in sites.items():
        (out, columns), rank = site.shape, ranks[path]
        generator = torch.Generator().manual_seed(derived_seed(seed, path))
        down = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
        shared[f"up{numbers[path]}"] = site.zeros(out, rank).requires_grad_()
        shared[f"down{numbers[path]}"] = down.to(site.device, site.dtype).requires_grad_()
    for chain in kinds(sites):
        for n, path in enumerate(chain):
            first = 0 if previous == -1 else max(0, n - previous)
            before = [numbers[other] for other in chain[first : n + 1]]
            widths = [ranks[other] for other in chain[first : n + 1]]
            read[path] = {"blocks": torch.tensor(before[::-1]), "ranks": torch.tensor(widths[::-1])}
    return Planned(shared, read)


@structure(
    "reslora",
    title="ResLoRA: Identity Residual Mapping in Low-Rank Adaption",
    year=2024,
    arxiv="2402.18039",
    code="microsoft/LMOps",
    formula="W_n = W0_n + s sum_{i=0..K} B_{n-i} A_{n-i}",
    rank=16,
    plan=shared_pairs,
)
def reslora(
    site: Site, rank: int, *, alpha: float | None = None, previous: int = 1, dropout: float = 0.0
) -> Weight:
    """Return W0 plus the layer's own change and those of the layers before it.

    Args:
        site: the weight.
        rank: inner dimension of the layer's own B A.
        alpha: numerator of the scaling; twice the rank by default.
        previous: K, of how many layers before it; -1 for all.
        dropout: probability, in [0, 1), of dropping an input entry of all changes while training.
    """
    in_range("reslora", "[0, 1)", dropout=dropout)
    scaling = site.scaling(2 * (site.reference or rank) if alpha is None else alpha, rank)
    out, columns = site.shape

    def product(number: int, width: int) -> Weight:
        up = site.pooled(f"up{number}", f"up{number}", (out, width))
        return up @ site.pooled(f"down{number}", f"down{number}", (width, columns))

    places = zip(site.planned["blocks"].tolist(), site.planned["ranks"].tolist(), strict=True)
    change = Sum(*(scaling * product(number, width) for number, width in places))
    return site.base + (Dropped(change, dropout) if dropout else change)
