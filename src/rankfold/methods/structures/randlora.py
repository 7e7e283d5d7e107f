"""RandLoRA: frozen random products of rank r, enough of them for full rank, with trained diagonals between.

    W = W0 + s sum_{n=1..N} B_n diag(l_n) A diag(g_n),   N = ceil(m / r), m = min(out, in), M = max(out, in)

Albert et al. 2025. A in R^{r x m} and B_n in R^{M x r} are drawn from the seed for the largest layer, sliced
to the others and shared; the sum is transposed where in > out. l in R^{N x r} and g in R^{N x m} are trained:
N (r + m) numbers, fewer when r grows. r belongs to the bases; the change has rank m. Bases are Kaiming
uniform, divided by their standard deviation; `sparse` takes -1, 0, 1 with one entry in `sparse` not zero
instead (3 in the paper, or sqrt(m)). l = 0, g = 1 / max(N, m), r = 32 and s = 20 (alpha = 640) are peft's.
Start: the base, exactly.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import ScaledBases, Weight
from ..registry import structure
from ..site import Planned, Site


def shared_bases(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, sparse: int, **options: float
) -> Planned:
    """Draw the bases for the largest layer, the largest rank and the most terms."""
    if sparse < 0:
        raise InvalidOption(f"randlora: sparse must be 0 or a positive number, not {sparse}")
    rank, generator = max(ranks.values()), torch.Generator().manual_seed(seed)
    small, large = (max(side(site.shape) for site in sites.values()) for side in (min, max))
    terms = max(-(-min(site.shape) // ranks[path]) for path, site in sites.items())
    some = next(iter(sites.values()))

    def drawn(*shape: int) -> Tensor:
        value = 2 * torch.rand(shape, generator=generator) - 1  # a constant bound drops out
        if sparse:
            value = value.sign() * (value.abs() > 1 - 1 / sparse)
        return (value / value.std().clamp_min(1e-3)).to(some.device, some.dtype)

    planned = Planned({"down": drawn(rank, small), "up": drawn(large, terms, rank)})
    for path, site in sites.items() if sparse else ():
        _refuse_zeros(planned, path, site.shape, ranks[path], sparse)
    return planned


def _refuse_zeros(planned: Planned, path: str, shape: tuple[int, int], rank: int, sparse: int) -> None:
    """Refuse bases of which a layer would read only zeros, for their diagonals would never learn."""
    terms = -(-min(shape) // rank)
    up = planned.shared["up"][: max(shape), :terms, :rank]
    down = planned.shared["down"][:rank, : min(shape)]
    for basis in (down, *up.unbind(1)):
        if not basis.any():
            sides = " x ".join(map(str, basis.shape))
            raise InvalidOption(
                f"randlora: at {path}, sparse={sparse} leaves a basis of {sides} with zeros only, which "
                "could learn nothing; pass a smaller number"
            )


@structure(
    "randlora",
    title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    year=2025,
    arxiv="2502.00987",
    code="PaulAlbert31/RandLoRA",
    formula="W = W0 + s sum_n B_n diag(l_n) A diag(g_n)",
    rank=32,
    plan=shared_bases,
    sides=True,
)
def randlora(site: Site, rank: int, *, alpha: float | None = None, sparse: int = 0) -> Weight:
    """Return W0 + s sum_n B_n diag(l_n) A diag(g_n).

    Args:
        site: the weight.
        rank: r, of every basis.
        alpha: numerator of the scaling; twenty times the rank by default.
        sparse: one entry in so many of a basis is not zero; 0 for dense bases.
    """
    small, large = min(site.shape), max(site.shape)
    terms = -(-small // rank)
    bases = ScaledBases(
        site.pooled("up", "up", (large, terms, rank)),
        site.pooled("down", "down", (rank, small)),
        site.trained(site.zeros(terms, rank), "inner"),
        site.trained(site.zeros(terms, small) + 1 / max(terms, small), "outer"),
        wide=site.shape[1] > site.shape[0],
    )
    return site.base + site.scaling(20 * (site.reference or rank) if alpha is None else alpha, rank) * bases
