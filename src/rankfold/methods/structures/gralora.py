"""GraLoRA: the weight is cut into k x k blocks, each with its own adapter of rank r / k.

    block (j, n) of W = block (j, n) of W0 + s B_j[:, n q:(n+1) q] A_n[j q:(j+1) q, :],   q = r / k

Jung et al. 2025. B_j in R^{out/k x r}, A_n in R^{r x in/k}. Parameters and multiply-adds are LoRA's, the rank
reaches k r. An initialiser sees every block as a weight of its own. s = alpha / (r + r_h); r_h is the rank of
an optional plain LoRA beside it. r = 32, k = 2 and alpha = 2 r are the paper's; it advises k = 4 from r = 64.
Start: the base, exactly.

Use it where the change needs a higher rank than LoRA's and may not cost more: the rank reaches k r with the
same numbers and multiply-adds.
"""

from torch import Tensor, stack

from ...errors import InvalidOption
from ...weights import Grid, Weight
from ..registry import structure
from ..site import Factors, Site, scaling_of


def grid_factors(site: Site, rank: int, scaling: float, k: int) -> Factors:
    """Return up (k, out / k, r) and down (k, r, in / k) from an initialiser's factors of every block."""
    blocks = [[site.block(j, n, k).factors(rank // k, scaling) for n in range(k)] for j in range(k)]
    up = stack([_joined([blocks[j][n].up for n in range(k)], 1) for j in range(k)])
    down = stack([_joined([blocks[j][n].down for j in range(k)], 0) for n in range(k)])
    return Factors(up, down, blocks[0][0].start)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return stack(tensors, dim).flatten(dim, dim + 1)


@structure(
    "gralora",
    title="GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
    year=2025,
    arxiv="2505.20355",
    code="SqueezeBits/GraLoRA",
    formula="W_jn = W0_jn + s B_jn A_nj, k x k blocks of rank r/k",
    init="kaiming",
    starts=("zero", "residual", "displaced"),
    sides=True,
    rank=32,
    multiple=lambda options: max(1, int(options["k"])),
    refuses=("odd",),
)
def gralora(site: Site, rank: int, *, k: int = 2, hybrid_rank: int = 0, alpha: float | None = None) -> Weight:
    """Return W0 plus the grid of k x k blocks, plus a plain product.

    Args:
        site: the weight, both sides multiples of k.
        rank: of all blocks of a row together, a multiple of k.
        k: number of blocks per side.
        hybrid_rank: of the plain product; 0 leaves it out.
        alpha: numerator of the scaling; twice the rank by default.
    """
    if k < 1 or not 0 <= hybrid_rank <= min(site.shape):
        raise InvalidOption(
            f"{site.path}: gralora needs k >= 1 and hybrid_rank in 0..{min(site.shape)}, "
            f"not {k} and {hybrid_rank}"
        )
    if any(size % k for size in site.shape):
        raise InvalidOption(
            f"{site.path}: gralora needs k={k} to divide both sides of the weight {site.shape}"
        )
    meant = site.reference or rank
    scaling = scaling_of(2 * meant if alpha is None else alpha, meant + hybrid_rank)
    weight = site.base + site.change(grid_factors(site, rank, scaling, k), scaling, form=Grid)
    if not hybrid_rank:
        return weight
    return weight + site.change(site.factors(hybrid_rank, scaling), scaling, prefix="plain.")
