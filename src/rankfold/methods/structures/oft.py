"""OFT: the weight's inputs are rotated block by block.

    W = W0 blockdiag(C_1, ..., C_N),   C_j = (I + S_j) (I - S_j)^-1,   S_j = -S_j^T in R^{b x b},   N b = in

Qiu et al. 2023. The b (b - 1) / 2 numbers above the diagonal of every S_j are trained. W W^T and the
singular values stay those of W0, the change has full rank. b = 32 is the usual library default; where it
does not divide `in`, the largest smaller divisor is taken. Start: S = 0, the base up to rounding.

Deviations: the Cayley transform is exact, where public code may take five terms of its Neumann series,
which is orthogonal only near the start; COFT's bound on ||S||, blocks that share one rotation, and dropped
blocks are left out.

Use it where the singular values of the weight and the angles between its rows have to stay, and the change
may have full rank.
"""

from ...weights import Weight
from ..registry import near_base, structure
from ..rotations import block_size_of, rotation
from ..site import Site


@structure(
    "oft",
    stage="transform",
    title="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    year=2023,
    arxiv="2306.07280",
    code="Zeju1997/oft",
    formula="W = W0 blockdiag((I + S_j) (I - S_j)^-1), S_j skew",
    start=near_base(1e-5),
    rank=None,
)
def oft(site: Site, *, block_size: int = 32) -> Weight:
    """Return W0 times a block-diagonal rotation.

    Args:
        site: the weight.
        block_size: how many inputs a block rotates at most.
    """
    return site.base @ rotation(site, block_size_of(site, block_size, "oft"), "skew")
