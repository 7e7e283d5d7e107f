"""LOST: a low-rank path with a nonlinearity inside, and a few dense input channels that complement it.

    y = gamma B f(A x) + (1 - gamma) W_s x[I],   B (out, r),   A (r, in),  W_s (out, k),  k = int(density in)

Li et al. 2025. Of the model's usual start W0 = U diag(s) V^T the path takes B = U_r diag(s_r)^(1/2) and
A = diag(s_r)^(1/2) V_r^T. I are the k columns of largest norm of the band sum_{i=r+1}^{r+q} s_i u_i v_i^T: of
what the path leaves out, not of W0. W_s = W0[:, I]. I and gamma are never trained. f = SiLU and gamma = 0.7
are those of the authors' scripts, density = 0.05 and q = r those of their class (the scripts take q = 256).
Start: as above, which is not W0. With f the map is not linear, has no matrix and cannot be folded;
`activation="identity"` makes it the matrix gamma B A with (1 - gamma) W_s added at I, which can.

Deviations: inputs of any dimensions, where the official code indexes three. Without that code's variant for
finetuning, which keeps a frozen W0 beside both parts and does not start at it.
"""

import torch
from torch import Tensor

from ...linalg import truncated_svd
from ...weights import Activated, Channels, Dense, Weight
from ..limits import in_range, one_of
from ..registry import not_base, structure
from ..site import Basis, Factors, Site


@structure(
    "lost",
    title="LOST: Low-rank and Sparse Pre-training for Large Language Models",
    year=2025,
    arxiv="2508.02668",
    code="JiaxiLi1/LOST-Low-rank-and-Sparse-Training-for-Large-Language-Models",
    formula="y = gamma B silu(A x) + (1 - gamma) W_s x[I], I where W0 without its rank-r part is largest",
    start=not_base("that of a low-rank path with SiLU inside and a few columns of every weight"),
    rank=128,
    sides=True,
    entries=True,
    scratch=True,
    nonlinear=True,
)
def lost(
    site: Site,
    rank: int,
    *,
    density: float = 0.05,
    gamma: float = 0.7,
    activation: str = "silu",
    band: int | None = None,
    smallest: bool = False,
    factors: str = "svd",
) -> Weight:
    """Return gamma B f(A x) + (1 - gamma) W_s x[I].

    Args:
        site: the weight.
        rank: r, of the path with the nonlinearity.
        density: share of the input channels that W_s meets, in (0, 1].
        gamma: share of the low-rank path, in (0, 1).
        activation: f, "silu", or "identity" for a linear path.
        band: q, how many singular values after the first r choose the channels, at least 1; None takes r.
        smallest: let the q smallest ones choose instead.
        factors: "svd" as above, or "normal" for B and A drawn with std (r (in + out))^(-1/4).
    """
    in_range("lost", "(0, 1]", density=density)
    in_range("lost", "[1, inf)", band=band)
    in_range("lost", "(0, 1)", gamma=gamma)
    one_of("lost", ("silu", "identity"), activation=activation)
    one_of("lost", ("svd", "normal"), factors=factors)
    count = max(1, int(density * site.shape[1]))
    spectral, index, columns = _start(site, rank, count, band or rank, smallest)
    start = spectral if factors == "svd" else _drawn(site, rank)
    up, down = site.trained(start.up, "up"), site.trained(start.down, "down")
    path = gamma * (up @ down) if activation == "identity" else Activated(up, down, activation, gamma)
    channels = Dense(index.to(site.device, torch.int32), "channels", trainable=False)
    return path + Channels(site.trained(columns, "columns"), channels, site.shape[1], 1 - gamma)


def _start(site: Site, rank: int, count: int, band: int, smallest: bool) -> tuple[Factors, Tensor, Tensor]:
    """Return B and A, the channels I, and the columns of W0 there."""
    out, width = site.shape
    if site.blank:
        blank = Factors(site.zeros(out, rank), site.zeros(rank, width))
        return blank, torch.zeros(count), site.zeros(out, count)
    matrix = site.matrix()
    left, values, right = truncated_svd(matrix, min(site.shape))
    taken = slice(max(rank, len(values) - band), None) if smallest else slice(rank, rank + band)
    scores = (values[taken, None] * right[taken]).norm(dim=0)  # a column's norm: left is orthonormal
    index = scores.argsort(descending=True, stable=True)[:count].sort().values
    return Basis(left[:, :rank], values[:rank], right[:rank]).split(1.0), index, matrix[:, index]


def _drawn(site: Site, rank: int) -> Factors:
    std = (rank * sum(site.shape)) ** -0.25
    return Factors(
        site.normal("up", site.shape[0], rank, std=std), site.normal("down", rank, site.shape[1], std=std)
    )
