"""TeRA: a random tensor network that layers of one shape share, with a trained vector on every mode.

    W = W0 + c (F_1 D_1 (x) ... (x) F_P D_P) C (F'_1 D'_1 (x) ... (x) F'_Q D'_Q)^T,
    D_n = diag(d_n), d_n in R^{R_n}

Gu et al. 2025. out = o_1 ... o_P and in = i_1 ... i_Q are cut into modes as equal as their divisors allow;
R_n = min(mode, rank). The factors F_n (mode, R_n) and the core C (prod R, prod R') are frozen, normal,
drawn from the seed once per shape; c = 1 / sqrt(in prod_n R_n) lets the change keep the input's size where
all d are 1. Only d_n, sum_n R_n numbers per layer, is trained, and the rank reaches min(prod R, prod R').
Start: d of the first output mode is zero, the others are d_initial: the base, exactly.

The map is applied mode by mode: the Kronecker products are never formed.

Deviations: the abstract gives the frozen shared factors and the trained diagonals; that the core is random
and frozen, the scale and the start are this package's reading. Two modes per side and rank 32 are its
choice.
"""

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Diagonal, Kronecker, Weight
from ..modes import modes_of
from ..registry import structure
from ..site import Planned, Site, derived_seed


def shared_network(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, modes: int, **options: float
) -> Planned:
    """Draw the core and the factors for every shape, at the largest rank that it is given."""
    if modes < 1:
        raise InvalidOption(f"tera needs modes >= 1, not {modes}")
    shared: dict[str, Tensor] = {}
    for site in sites.values():
        name = "x".join(map(str, site.shape))
        rank = max(ranks[p] for p, other in sites.items() if other.shape == site.shape)
        widths = []
        for end, size in zip(("up", "down"), site.shape, strict=True):
            sizes = modes_of(size, modes)
            widths.append(math.prod(min(n, rank) for n in sizes))
            for i, n in enumerate(sizes):
                shared.setdefault(f"{end}{i}_{name}", _drawn(site, seed, f"{end}{i}_{name}", n, min(n, rank)))
        shared.setdefault(f"core_{name}", _drawn(site, seed, f"core_{name}", *widths))
    return Planned(shared)


def _drawn(site: Site, seed: int, key: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, key))
    return torch.randn(shape, generator=generator).to(site.device, site.dtype)


@structure(
    "tera",
    title="TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of Large Language Models",
    year=2025,
    arxiv="2509.03234",
    code="guyuxuan9/TeRA",
    formula="W = W0 + c (F_1 D_1 (x) F_2 D_2) C (F'_1 D'_1 (x) F'_2 D'_2)^T",
    rank=32,
    limit=None,
    plan=shared_network,
    sides=True,
)
def tera(site: Site, rank: int, *, modes: int = 2, d_initial: float = 1.0) -> Weight:
    """Return W0 plus the network; rank bounds every mode's rank, d_initial is not zero.

    Args:
        site: the weight.
        rank: R, the largest rank of a mode.
        modes: into how many each side is cut.
        d_initial: start of every vector but the first, which starts at zero.
    """
    if d_initial == 0:
        raise InvalidOption("tera: d_initial must not be 0, where no vector would ever get a gradient")
    name = "x".join(map(str, site.shape))

    def scaled(end: str, i: int, size: int) -> Weight:
        width = min(size, rank)
        start = 0.0 if (end, i) == ("up", 0) else d_initial
        vector = site.trained(site.zeros(width) + start, f"{end}.d{i}")
        return site.pooled(f"{end}{i}_{name}", f"{end}{i}", (size, width)) @ Diagonal(vector)

    def side(end: str, size: int) -> Weight:
        return functools.reduce(Kronecker, (scaled(end, i, n) for i, n in enumerate(modes_of(size, modes))))

    up, down = side("up", site.shape[0]), side("down", site.shape[1])
    core = site.pooled(f"core_{name}", "core", (up.shape[1], down.shape[1]))
    return site.base + _size(site, rank, modes) * (up @ core @ down.T)


def _size(site: Site, rank: int, modes: int) -> float:
    widths = [min(n, rank) for size in site.shape for n in modes_of(size, modes)]
    return 1 / math.sqrt(site.shape[1] * math.prod(widths))
