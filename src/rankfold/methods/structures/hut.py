"""HUT: every entry of the weight is multiplied by that of a low-rank matrix, which starts at ones.

    W = W0 . (U V),   U in R^{out x r}, V in R^{r x in},   U V = 1 at the start

Zhang et al. 2024. The same expression as HiRA's, W0 . (1 + change), with another start: the change is U V
minus its start, the ones. So both factors have a gradient at the first step, (G . W0) V^T and U^T (G . W0).
Weight decay of U and V pulls the weight to zero and not to the base: above rank 1, where `param_groups` lets
them decay as matrices, leave it off or take the residual form. Zeros of W0 stay zero. At rank 1 the map is
diag(u) W0 diag(v), in + out multiply-adds a token beside the base's; for many tokens the matrix is formed,
and both gradients are read off the output and the input's gradient. Start: the base, up to rounding.

Deviations: the abstract gives the product and the direct form; the start and the default rank 8 are this
package's choice. `init=kaiming` gives the residual form, which is HiRA's.
"""

from ...weights import Rescaled, Weight
from ..registry import near_base, structure
from ..site import Site
from .hira import modulated


@structure(
    "hut",
    stage="modulate",
    title="HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation",
    year=2024,
    arxiv="2409.13501",
    formula="W = W0 . (U V)",
    start=near_base(1e-6),
    init="ones",
    starts=("zero", "residual"),
    pairs="parts",
    sides=True,
    entries=True,
)
def hut(site: Site, rank: int) -> Weight:
    """Return W0 . (U V).

    Args:
        site: the weight.
        rank: inner dimension of U V.
    """
    if rank == 1 and site.rule is None and site.init is not None and site.init[0].name == "ones":
        factors = site.factors(rank)
        up, down = site.trained(factors.up[:, 0], "up"), site.trained(factors.down[0], "down")
        return Rescaled(up, site.base, down)
    return modulated(site, rank)
