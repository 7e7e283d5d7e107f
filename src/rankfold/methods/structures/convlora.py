"""ConvLoRA: LoRA-C's layout of a kernel with an inner dimension of r k.

    dW = s view(B A, Co, Ci, k, k),   B in R^{Co/groups k x r k}, A in R^{r k x Ci k},   W = W0 + dW,
    s = alpha / r

Aleem et al. 2024, with the shapes of loralib's convolution: r counts kernel columns, so that the trained
count is r k^2 (Co + Ci). It is LoRA-C at rank r k but for s, and shares its code. B = 0, A as in LoRA.
BatchNorm statistics are left as the model's mode has them. Start: the base, exactly.

Deviations: k is the first window axis, as in lora-c, where loralib takes square windows only; a linear layer
has no window, and the change is LoRA's.
"""

from ...weights import Weight
from ..registry import structure
from ..site import Site
from .lora_c import viewed_change


def inner_rank(site: Site, rank: int) -> int:
    """Return r k, the inner dimension of the product."""
    return rank * (site.window[0] if site.window else 1)


@structure(
    "convlora",
    title="ConvLoRA and AdaBN based Domain Adaptation via Self-Training",
    year=2024,
    arxiv="2402.04964",
    code="aleemsidra/ConvLoRA",
    formula="W = W0 + s view(B A), inner dimension r k",
    limit=None,
    pairs="parts",
    sides=True,
)
def convlora(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 + s view(B A) of inner dimension r k.

    Args:
        site: the weight.
        rank: r; the inner dimension is r times the height of the window.
        alpha: numerator of the scaling alpha / r; r by default.
    """
    return site.base + viewed_change(site, inner_rank(site, rank), site.scaling(alpha, rank))
