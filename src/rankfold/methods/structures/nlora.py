"""NLoRA: a trained matrix between the two factors of LoRA, started from blocks of the weight or not.

    W = W0 + s B N A,   B in R^{out x r}, N in R^{r x r}, A in R^{r x in},   s = alpha / r

Guo et al. 2025; r = alpha = 128 are the paper's. Three methods:

    slora     all three train; B = 0, A and N Kaiming uniform (a = sqrt 5). Start: the base, exactly.
    nlora     all three train, B from columns C and A from rows R of W0, N as `core` says.
    inttune   C and R are frozen, N trains: r^2 numbers. It is pmss with another choice of lines.

W0 ~ C W0[:r, :r]^+ R (Nyström) equals W0 on its first r rows and columns. `core` is where N starts:

    residual  W0[:r, :r]^+ / s, and the approximation is subtracted; the base up to rounding (inttune: exact)
    inverse   the same, not subtracted; the base moved by its own approximation
    block     W0[:r, :r], as in the official code; the base moved by s C W0[:r, :r] R

Deviations: residual is the default, so that training starts at the base; the official code leaves the
pseudo-inverse of the paper out and subtracts nothing. In inttune it is N - N0 that trains there. With another
initialiser, C and R are its factors, W0[:r, :r] the first r rows of C, and the pseudo-inverse what stands
between them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Weight
from ..framed import framed
from ..registry import exact_base, near_base, structure
from ..site import Basis, Site

ABOUT: dict[str, Any] = {
    "title": "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models",
    "year": 2025,
    "arxiv": "2502.14482",
    "code": "TracyGuo2001/NLoRA",
}


def _core(basis: Basis, scaling: float, core: str) -> Tensor:
    """Return where N starts."""
    if core not in ("block", "inverse", "residual"):
        raise InvalidOption(f"nlora: core must be block, inverse or residual, not {core!r}")
    if core == "block":
        return basis.left[: basis.left.shape[1]].clone()  # the factors train apart
    return (torch.diag(basis.values) if basis.middle is None else basis.middle) / scaling


@structure(
    "slora", formula="W = W0 + s B N A, B = 0", init="kaiming", starts=("zero",), rank=128, sides=True,
    entries=True, **ABOUT,
)  # fmt: skip
def slora(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s B N A.

    Args:
        site: the weight.
        rank: inner dimension, the side of N.
        alpha: numerator of the scaling alpha / rank; the rank by default.
    """
    scaling = site.scaling(alpha, rank)
    factors = site.factors(rank, scaling)
    core = site.uniform("core", rank, rank, bound=1 / math.sqrt(rank))
    up, down = site.trained(factors.up, "up"), site.trained(factors.down, "down")
    return site.base + scaling * (up @ site.trained(core, "core") @ down)


@structure(
    "nlora", formula="W = W0 + s B N A, B = W0[:, :r], A = W0[:r]", init="nystrom", starts=("frame",),
    start=near_base(1e-3, "with the default core"), rank=128, sides=True, entries=True, **ABOUT,
)  # fmt: skip
def nlora(site: Site, rank: int, *, alpha: float | None = None, core: str = "residual") -> Weight:
    """Return W0 + s B N A, minus its start where that is residual.

    Args:
        site: the weight.
        rank: inner dimension, the side of N.
        alpha: numerator of the scaling alpha / rank; the rank by default.
        core: where N starts: "residual", "inverse" or "block"; only the first starts at the base.
    """
    scaling = site.scaling(alpha, rank)
    basis = site.basis(rank, scaling)
    start = {"up": basis.left, "core": _core(basis, scaling, core), "down": basis.right}
    up, middle, down = (site.trained(value.clone(), name) for name, value in start.items())
    weight = site.base + scaling * (up @ middle @ down)
    if core != "residual":
        return weight
    up, middle, down = (site.frozen(value.clone(), f"{name}.start") for name, value in start.items())
    return weight - scaling * (up @ middle @ down)


@structure(
    "inttune", formula="W = W0 + s W0[:, :r] N W0[:r]", init="nystrom", starts=("frame",), rank=128,
    start=exact_base("with the default core"), **ABOUT,
)  # fmt: skip
def inttune(site: Site, rank: int, *, alpha: float | None = None, core: str = "residual") -> Weight:
    """Return W0 + s C N R, as `nlora` with only N trained."""
    scaling = site.scaling(alpha, rank)
    basis = site.basis(rank, scaling)
    start = _core(basis, scaling, core)
    middle = site.trained(torch.zeros_like(start) if core == "residual" else start, "core")
    return site.base + scaling * framed(site, basis, middle)
