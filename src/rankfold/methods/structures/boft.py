"""BOFT: the weight's inputs are rotated by a butterfly of sparse block rotations.

    W = diag(z) W0 Q_0 Q_1 ... Q_{m-1},   Q_l = P_l^T blockdiag(C(S_l1), ..., C(S_lN)) P_l,   N b = in

Liu et al. 2023. C is the Cayley transform of OFT, whose code is shared. P_l brings together the halves of
blocks that are 2^l half blocks apart, so that m = log2(N) + 1 factors reach from every input to every
other. b = 4 and one factor are the usual library defaults; one factor is OFT with smaller blocks. z in
R^out is trained and there only with scaled=True: peft has it, and it gives up that singular
values stay. Start: the base up to rounding.

Deviation: from the third factor on, peft's order of the inputs pairs the same half blocks as the second does;
here the distance doubles with every factor. Up to two factors the orders agree.

Use it as OFT, where rotations should reach across blocks: every factor trains another set of small blocks.
"""

from ...errors import InvalidOption
from ...weights import Diagonal, Permutation, Weight
from ..registry import near_base, structure
from ..rotations import block_size_of, butterfly, rotation
from ..site import Site


@structure(
    "boft",
    stage="transform",
    title="Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
    year=2023,
    arxiv="2311.06243",
    code="wy1iu/butterfly-oft",
    formula="W = W0 prod_l P_l^T blockdiag((I + S_lj) (I - S_lj)^-1) P_l",
    start=near_base(1e-5),
    rank=None,
    refuses=("odd",),
)
def boft(site: Site, *, block_size: int = 4, factors: int = 1, scaled: bool = False) -> Weight:
    """Return W0 times a butterfly.

    Args:
        site: the weight.
        block_size: largest number of inputs per block, even where there are several factors.
        factors: m; block size times 2^(m - 1) must divide the inputs.
        scaled: train a factor per output, too.
    """
    if factors < 1:
        raise InvalidOption(f"boft needs factors >= 1, not {factors}")
    columns, size = site.shape[1], block_size_of(site, block_size, "boft", min(factors, 2))
    if columns % (size * 2 ** (factors - 1)):
        raise InvalidOption(
            f"{site.path}: boft with {factors} factors of blocks of {size} needs inputs that are a multiple "
            f"of {size * 2 ** (factors - 1)}, not {columns}; use fewer factors"
        )
    weight = site.base @ rotation(site, size, "skew0")
    for level in range(1, factors):
        order = Permutation(butterfly(columns, size // 2, level).to(site.device))
        weight = weight @ order.T @ rotation(site, size, f"skew{level}") @ order
    if not scaled:
        return weight
    return Diagonal(site.trained(site.zeros(site.shape[0]) + 1, "scale")) @ weight
