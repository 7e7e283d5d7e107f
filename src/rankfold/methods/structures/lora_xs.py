"""LoRA-XS: a small trained core between frozen singular bases of the weight.

    W = W0 + s U_r R (S_r V_r^T),   R in R^{r x r} trained, ~ N(0, std^2)

Balazy et al. 2024. The trained count is r^2, whatever the layer's size. U_r (out, r), S_r (r, r) and V_r^T
(r, in) are the leading singular triplets of W0 and stay frozen; the singular values scale the input side, as
in the official code (A = S_r V_r^T, B = U_r). std = 1e-5 is the paper's. Start: the base up to a share of
about 2 std sqrt(r).

An initialiser that gives a core of its own (lora-sb) starts R there, between its own outer factors.

Deviation: alpha is the rank by default, so s = 1; the paper's runs set it.

Use it where adapters have to be very small: r^2 numbers a weight, whatever its size.
"""

from ...errors import InvalidOption
from ...weights import Weight
from ..framed import framed
from ..registry import near_base, structure
from ..site import Site


@structure(
    "lora-xs",
    title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    year=2024,
    arxiv="2405.17604",
    code="MohammadrezaBanaei/LoRA-XS",
    formula="W = W0 + s U_r R (S_r V_r^T)",
    start=near_base(1e-3),
    init="svd",
    starts=("frame", "displaced frame"),
    rank=16,
)
def lora_xs(site: Site, rank: int, *, alpha: float | None = None, std: float = 1e-5) -> Weight:
    """Return W0 + s left R right.

    Args:
        site: the weight.
        rank: number of singular directions on either side.
        alpha: numerator of the scaling alpha / rank; the rank by default.
        std: standard deviation of R at the start.
    """
    if std < 0:
        raise InvalidOption(f"lora-xs: std must be at least 0, not {std}")
    scaling = site.scaling(alpha, rank)
    basis = site.basis(rank, scaling)
    start, values = basis.core, "none"
    if start is None:
        start, values = site.normal("core", rank, rank, std=std), "right"
    return site.base + scaling * framed(site, basis, site.trained(start, "core"), values=values)
