"""TRP's hand-over: weights whose small singular values were trained away become products of what remains.

    W = U diag(s) V^T,   r = min{ q : sum_{i<=q} s_i^2 >= e sum_i s_i^2 },   W ~ [W]_r

Xu et al. 2018, 2020. A training with the structure `trp` cuts the weights every few steps and penalises their
nuclear norm; the structure hands its own factors over at the end by an absolute threshold. This is the cut by
energy, for weights that were trained so anywhere. Where the factors would take more numbers than the weight,
it stays as it is. e = 0.98: the papers' final cut is nearly lossless; 0.85 is the official code's for its
decoupled kernels.
"""

from collections.abc import Sequence

from ...errors import InvalidOption
from ..objective import Objective, Site
from ..registry import compressor
from ..shares import Ranks, Unit, share


@share("energy", spectra=True, free=True)
def energy(units: Sequence[Unit], budget: int, *, energy: float = 0.98) -> Ranks:
    """Give every weight the smallest rank that holds a share of its squared singular values.

    Args:
        units: the weights.
        budget: is not asked; the energy decides.
        energy: e, in (0, 1].
    """
    if not 0 < energy <= 1:
        raise InvalidOption(f"share energy: energy must be in (0, 1], not {energy}")
    ranks: Ranks = {}
    for unit in units:
        squares = unit.singular().double().square()
        held = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
        rank = int(held.int().argmax()) + 1
        ranks[unit.path] = rank if rank <= unit.largest else None
    return ranks


@compressor(
    "trp",
    title="TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
    year=2020,
    arxiv="2004.14566",
    code="yuhuixu1993/Trained-Rank-Pruning",
    formula="W ~ [W]_r with the smallest r that holds a share of the energy",
    share="energy",
    layers=("linear", "attention", "convolution"),
)
def trp(site: Site) -> Objective:
    """Return the plain error.

    Args:
        site: the weight.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> rf.compress(model, "trp", progress=False)[0].expression
        (up*[16x1] @ down*[1x16])
    """
    return Objective()
