"""PiSSA: train the leading singular triplets of the weight, freeze the rest.

    W0 = U S V^T,   B0 = U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T,   W = W0 + s (B A - B0 A0)

Meng et al. 2024. W0 is never edited: its residual is a frozen term. With `iterations`, the decomposition is
randomised and oversampled (the paper's fast variant uses 16, without oversampling).
"""

from ...errors import InvalidOption
from ...linalg import truncated_svd
from ..registry import init, near_base
from ..site import Factors, Site


@init(
    "pissa",
    gives="residual",
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    year=2024,
    arxiv="2404.02948",
    code="GraphPKU/PiSSA",
    formula="B0 = U_r (S_r/s)^1/2, A0 = (S_r/s)^1/2 V_r^T, W = W0 + s (B A - B0 A0)",
    start=near_base(1e-5),
)
def pissa(site: Site, rank: int, scaling: float, *, iterations: int | None = None) -> Factors:
    """Return the leading singular triplets, split evenly."""
    if iterations is not None and iterations < 0:
        raise InvalidOption(f"pissa: iterations must be at least 0, not {iterations}")
    left, values, right = truncated_svd(
        site.matrix(), rank, iterations=iterations, generator=site.generator("range")
    )
    root = (values / scaling).sqrt()
    return Factors(left * root, root[:, None] * right, "residual")
