"""HD-PiSSA: every process takes a band of its own of the weight's singular triplets.

    W0 = U S V^T,   B_n = U_I (S_I / s)^(1/2),   A_n = (S_I / s)^(1/2) V_I^T,   I = n r .. (n + 1) r - 1

Wang et al. 2025. B_n (out, r) and A_n (r, in) of process n; bands are orthogonal, B_n^T B_m = 0 and A_n
A_m^T = 0. n is the process's rank in torch.distributed, 0 where there is only one process; `band` and
`bands` set it by hand. All processes decompose the same W0, so that their bands fit together; N r must not
exceed min(out, in). How the bands train together is the dynamics hd-pissa, without which they would only be
a part of PiSSA each. Start: the base up to rounding.

Deviation: the paper scales nothing out, because its s is 1; here the product s B_n A_n is the band for every
s.
"""

from ...errors import InvalidOption, InvalidRank
from ...linalg import truncated_svd
from ..processes import processes
from ..registry import init, near_base
from ..site import Basis, Site


@init(
    "hd-pissa",
    gives="residual",
    dynamics="hd-pissa",
    title="HD-PiSSA: High-Rank Distributed Orthogonal Adaptation",
    year=2025,
    arxiv="2505.18777",
    code="MuLabPKU/HD-PiSSA",
    formula="B_n = U_I (S_I/s)^1/2, A_n = (S_I/s)^1/2 V_I^T, I = n r .. (n+1) r - 1 on process n",
    start=near_base(1e-5),
)
def hd_pissa(
    site: Site, rank: int, scaling: float, *, band: int | None = None, bands: int | None = None
) -> Basis:
    """Return one band of singular triplets, which are split evenly.

    Args:
        site: the weight.
        rank: number of triplets in a band.
        scaling: not used; the split of the triplets divides by it.
        band: n; the rank of the process by default.
        bands: N; the number of processes by default, and more than n.
    """
    number, count = processes()
    band = number if band is None else band
    count = max(count, band + 1) if bands is None else bands
    if not 0 <= band < count:
        raise InvalidOption(f"hd-pissa: band must be in 0..{count - 1}, not {band}")
    if count * rank > min(site.shape):
        raise InvalidRank(
            f"{site.path}: hd-pissa needs {count} bands of rank {rank}, more than min(out, in) = "
            f"{min(site.shape)}; choose rank <= {min(site.shape) // count}"
        )
    left, values, right = truncated_svd(site.matrix(), count * rank)
    own = slice(band * rank, (band + 1) * rank)
    return Basis(left[:, own], values[own], right[own])
