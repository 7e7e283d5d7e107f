"""WeLore: ranks from the shape of every spectrum, and only the weights that turned out low-rank train on.

    z_i = (s_i - s_min) / (s_max - s_min),   r = #{i : z_i >= k},   one threshold k for all weights
    low-rank (LRC) where 1 - r / min(out, in) > min_ratio:   W ~ [W]_r, two trained factors
    otherwise (N-LRC):                                       W as it is, frozen

Jaiswal et al. 2024. No data are read. Min-max normalisation makes the ranks independent of the scale of a
weight, and one outlying singular value push its rank down. With min_ratio = 0.5, the default, every square
weight that is factorised takes fewer numbers than before; for compression alone the paper uses 0. Everything
but the factors is frozen.

The share of the paper counts ranks (`of="ranks"`, the fraction of all ranks that remains); by default k is
the smallest threshold at which the numbers of the weights fit, as `keep` says. With min_ratio = 0 a weight
whose factors would take more numbers than it has stays as it is.
"""

from collections.abc import Sequence

import torch

from ...errors import InvalidOption
from ..objective import Objective, Site
from ..registry import compressor
from ..shares import Ranks, Unit, share


@share("welore", spectra=True)
def threshold(units: Sequence[Unit], budget: int, *, min_ratio: float = 0.5, of: str = "numbers") -> Ranks:
    """Return how many normalised singular values of every weight reach one threshold.

    Args:
        units: the weights.
        budget: numbers in all.
        min_ratio: share of its ranks that a weight must lose to be factorised, in [0, 1).
        of: what `keep` is a share of, "numbers" or "ranks".
    """
    if not 0 <= min_ratio < 1 or of not in ("numbers", "ranks"):
        raise InvalidOption(
            f"share welore: min_ratio must be in [0, 1) and of numbers or ranks, not {min_ratio} and {of!r}"
        )
    normal = {unit.path: _normalised(unit.singular()) for unit in units}
    levels = torch.cat(list(normal.values())).unique().tolist()
    left, right = 0, len(levels) - 1  # the largest level leaves the leading value of every weight
    while left < right:
        middle = (left + right) // 2
        taken = _ranks(units, normal, levels[middle], min_ratio)
        fits = (
            _numbers(units, taken) <= budget
            if of == "numbers"
            else _share(units, normal, levels[middle]) <= (budget / sum(unit.dense for unit in units))
        )
        left, right = (left, middle) if fits else (middle + 1, right)
    return _ranks(units, normal, levels[left], min_ratio)


def _normalised(spectrum: torch.Tensor) -> torch.Tensor:
    low, high = spectrum[-1].double(), spectrum[0].double()
    return (spectrum.double() - low) / (high - low) if high > low else torch.ones_like(spectrum.double())


def _ranks(units: Sequence[Unit], normal: dict[str, torch.Tensor], level: float, min_ratio: float) -> Ranks:
    found: Ranks = {}
    for unit in units:
        rank = max(1, int((normal[unit.path] >= level).sum()))
        low = 1 - rank / min(unit.shape) > min_ratio and rank <= unit.largest
        found[unit.path] = rank if low else None
    return found


def _numbers(units: Sequence[Unit], ranks: Ranks) -> int:
    return sum(u.dense if (r := ranks[u.path]) is None else r * u.per_rank for u in units)


def _share(units: Sequence[Unit], normal: dict[str, torch.Tensor], level: float) -> float:
    kept = sum(max(1, int((values >= level).sum())) for values in normal.values())
    return kept / sum(min(unit.shape) for unit in units)


@compressor(
    "welore",
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    year=2024,
    arxiv="2407.11239",
    code="VITA-Group/WeLore",
    formula="W ~ [W]_r where a threshold on its normalised spectrum leaves few ranks, else W frozen",
    share="welore",
    rest_frozen=True,
    layers=("linear", "attention", "convolution"),
)
def welore(site: Site) -> Objective:
    """Return the plain error; the ranks are the method.

    Args:
        site: the weight.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
        >>> torch.nn.init.ones_(model[0].weight).shape
        torch.Size([32, 32])
        >>> rf.compress(model, "welore", keep=0.6, progress=False)[0].expression
        (up*[32x1] @ down*[1x32])
    """
    return Objective()
