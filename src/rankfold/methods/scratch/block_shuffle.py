"""BlockShuffle: a structured feed-forward weight of two block-diagonal factors and a shuffle.

    y = f^-1(blockdiag(U_1..U_b) f(blockdiag(V_1..V_b) x)),   f re-reads (b, n) as (n, b) and transposes

Wei et al. 2024. It is the linear layer of `monarch`, whose map and sizes it shares, started otherwise: every
block of a random draw is replaced by its polar factor, so that blocks have orthonormal rows or columns. b = 2
leaves 63 % and b = 4 leaves 32 % of GPT-2's feed-forward numbers: min(in, out) (in + out) / b trained
numbers. It has full rank. Start: those factors.

The paper structures the linear layers of feed-forward blocks (`targets="mlp"`) and keeps those of the first
block dense: leave them out of the targets. The dynamics `self-guided` trains it beside a dense guide. Its
pre-merging, a dense matrix that is kept for 16 tokens and fewer, is a matter of inference: as with `monarch`,
the two products have no more multiply-adds at any number of tokens and are what is evaluated, and
`rankfold.fold` merges a model that is served.

Deviation: biases are the model's own; the official code starts them at zero.
"""

import torch
from torch import Tensor

from ...weights import Monarch, Weight
from ..registry import not_base, structure
from ..site import Site
from .monarch import block_sizes


@structure(
    "block-shuffle",
    title="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    year=2024,
    arxiv="2406.16450",
    code="CLAIRE-Labo/StructuredFFN",
    formula="W = P^T blockdiag(U) P blockdiag(V), blocks orthonormal at the start",
    start=not_base("that of random orthonormal blocks"),
    rank=None,
    sides=True,
    scratch=True,
)
def block_shuffle(site: Site, *, blocks: int = 2) -> Weight:
    """Return the two factors.

    Args:
        site: the weight.
        blocks: b, at least 1 and at most min(out, in).
    """
    rows, inner, columns = block_sizes("block-shuffle", site, blocks)
    left = orthonormal(site, "left", blocks, rows, inner)
    right = orthonormal(site, "right", blocks, inner, columns)
    return Monarch(site.trained(left, "left"), site.trained(right, "right"), site.shape)


def orthonormal(site: Site, name: str, *shape: int) -> Tensor:
    """Draw matrices (..., m, n) and return their polar factors; zeros where values will be loaded."""
    if site.blank:
        return site.zeros(*shape)
    left, _, right = torch.linalg.svd(site.normal(name, *shape), full_matrices=False)
    polar: Tensor = left @ right
    return polar
