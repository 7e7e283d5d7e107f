"""BlockDense: a structured feed-forward weight of a block-diagonal factor and a dense one.

    y = U (blockdiag(V_1..V_b) x),   V_i (r / b, in / b),   U (out, r)

Wei et al. 2024. Trained numbers: r in / b + out r, for a weight of rank r. b divides in and r. The start is
that of `block-shuffle`: every V_i and U are the polar factors of random draws. b = 2 is the paper's; r = 256
leaves 32 % and r = 512 leaves 63 % of the feed-forward numbers of GPT-2, 768 wide. Start: those factors.

The paper structures the linear layers of feed-forward blocks (`targets="mlp"`) and keeps those of the first
block dense: leave them out of the targets. The dynamics `self-guided` trains it beside a dense guide. Its
pre-merging, a dense matrix that is kept for 16 tokens and fewer, is a matter of inference: here factors are
evaluated in the order of the fewest multiply-adds, which is one after the other unless r is close to the
sides, and no matrix is kept; `rankfold.fold` merges a model that is served.

Deviation: biases are the model's own; the official code starts them at zero.
"""

from ...errors import InvalidOption
from ...weights import BlockDiagonal, Weight
from ..limits import in_range
from ..registry import not_base, structure
from ..site import Site
from .block_shuffle import orthonormal


@structure(
    "block-dense",
    title="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    year=2024,
    arxiv="2406.16450",
    code="CLAIRE-Labo/StructuredFFN",
    formula="W = U blockdiag(V_1..V_b), blocks orthonormal at the start",
    start=not_base("that of random orthonormal factors"),
    rank=256,
    multiple=lambda options: max(1, int(options["blocks"])),
    refuses=("odd",),
    sides=True,
    scratch=True,
)
def block_dense(site: Site, rank: int, *, blocks: int = 2) -> Weight:
    """Return U blockdiag(V).

    Args:
        site: the weight.
        rank: r, a multiple of `blocks`.
        blocks: b, at least 1; divides the number of inputs.
    """
    in_range("block-dense", "[1, inf)", blocks=blocks)
    out, columns = site.shape
    if columns % blocks:
        raise InvalidOption(
            f"{site.path}: block-dense needs a layer whose {columns} inputs {blocks} blocks divide"
        )
    inner = site.trained(orthonormal(site, "down", blocks, rank // blocks, columns // blocks), "down")
    return site.trained(orthonormal(site, "up", out, rank), "up") @ BlockDiagonal(inner)
