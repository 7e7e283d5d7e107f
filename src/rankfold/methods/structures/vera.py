"""VeRA: trained diagonals around a random pair that all layers share.

    W = W0 + diag(b) B diag(d) A,   A in R^{r x in_max}, B in R^{out_max x r} frozen, sliced to each layer

Kopiczko et al. 2023. b in R^out and d in R^r are trained. A and B are Kaiming uniform as in the paper, with
bound sqrt(3) sqrt(2) / sqrt(fan_in), fan_in = in_max for A and r for B; r = 256, d = 0.1, b = 0 are the
paper's, there is no alpha. The pair depends on the seed and on the largest weight that is adapted. Start: the
base, exactly.

Use it where many adapters have to be kept: a weight trains out + r numbers, and all layers share the pair.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Diagonal, Weight
from ..registry import structure
from ..site import Planned, Site


def shared_pair(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, **options: float
) -> Planned:
    """Draw the pair for the largest layer and the largest rank."""
    rank, generator = max(ranks.values()), torch.Generator().manual_seed(seed)
    out, columns = (max(site.shape[i] for site in sites.values()) for i in (0, 1))
    some = next(iter(sites.values()))

    def drawn(rows: int, fan_in: int) -> Tensor:
        bound = math.sqrt(6 / fan_in)
        return ((2 * torch.rand(rows, fan_in, generator=generator) - 1) * bound).to(some.device, some.dtype)

    return Planned({"down": drawn(rank, columns), "up": drawn(out, rank)})


@structure(
    "vera",
    title="VeRA: Vector-based Random Matrix Adaptation",
    year=2023,
    arxiv="2310.11454",
    formula="W = W0 + diag(b) B diag(d) A",
    rank=256,
    limit=None,
    plan=shared_pair,
    sides=True,
)
def vera(site: Site, rank: int, *, d_initial: float = 0.1) -> Weight:
    """Return W0 + diag(b) B diag(d) A.

    Args:
        site: the weight.
        rank: rows of A and columns of B, which all layers share.
        d_initial: where d starts, not zero; b starts at zero.
    """
    if d_initial == 0:
        raise InvalidOption("vera: d_initial must not be 0, where b and d would never get a gradient")
    out, columns = site.shape
    up, down = site.pooled("up", "up", (out, rank)), site.pooled("down", "down", (rank, columns))
    d = site.trained(site.zeros(rank) + d_initial, "d")
    b = site.trained(site.zeros(out), "b")
    return site.base + Diagonal(b) @ up @ Diagonal(d) @ down
