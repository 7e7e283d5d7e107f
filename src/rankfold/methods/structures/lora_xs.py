"""LoRA-XS: a small trained core between frozen singular bases of the weight.

    W = W0 + s (U_r S_r) R V_r^T,   R in R^{r x r} trained, ~ N(0, 1e-5)

Balazy et al. 2024. The trained count is r^2, whatever the layer's size. Start: the base, up to 1e-5.
"""

from ...weights import Weight
from ..registry import near_base, structure
from ..site import Site, scaling_of


@structure(
    "lora-xs",
    title="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    year=2024,
    arxiv="2405.17604",
    code="MohammadrezaBanaei/LoRA-XS",
    formula="W = W0 + s (U_r S_r) R V_r^T",
    start=near_base(1e-3),
    init="svd",
    starts=("frame",),
    rank=16,
)
def lora_xs(site: Site, rank: int, *, alpha: float | None = None, std: float = 1e-5) -> Weight:
    """Return W0 + s left R right; R starts at N(0, std^2)."""
    basis = site.basis(rank)
    core = site.trained(site.normal("core", rank, rank, std=std), "core")
    change = site.frozen(basis.left * basis.values, "left") @ core @ site.frozen(basis.right, "right")
    return site.base + scaling_of(alpha, rank) * change
