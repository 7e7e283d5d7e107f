"""DiaBlo: train only the diagonal blocks of the weight, directly.

    W = W0 + blockdiag(D_1, ..., D_N),   D_i of ceil(out / N) x ceil(in / N), cropped to the weight

Gurses et al. 2025. One SGD step moves the weight by exactly the diagonal blocks of the gradient. No scale. N
= 64 is the paper's for LLaMA-2-7B; fewer where the weight is smaller. Start: D = 0, the base, exactly.

Deviation: no dropout by default, where the paper's runs use 0.05.

Use it where a change of full rank is wanted without two factors, and so without the question of how to start
them.
"""

from ...errors import InvalidOption
from ...weights import BlockDiagonal, Dropped, Weight
from ..registry import structure
from ..site import Site


@structure(
    "diablo",
    title="DiaBlo: Diagonal Blocks Are Sufficient For Finetuning",
    year=2025,
    arxiv="2506.03230",
    code="ziyangjoy/DiaBlo",
    formula="W = W0 + blockdiag(D_1, ..., D_N)",
    rank=None,
)
def diablo(site: Site, *, blocks: int = 64, dropout: float = 0.0) -> Weight:
    """Return W0 plus trained diagonal blocks.

    Args:
        site: the weight.
        blocks: N, how many there are at most, at least 1.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    if blocks < 1 or not 0 <= dropout < 1:
        raise InvalidOption(f"diablo needs blocks >= 1 and dropout in [0, 1), not {blocks} and {dropout}")
    out, columns = site.shape
    height, width = -(-out // blocks), -(-columns // blocks)
    count = max(-(-out // height), -(-columns // width))
    change: Weight = BlockDiagonal(site.trained(site.zeros(count, height, width), "blocks"), site.shape)
    return site.base + (Dropped(change, dropout) if dropout else change)
