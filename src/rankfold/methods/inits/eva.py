"""EVA: the down factor holds the principal directions of the inputs, the up factor is zero.

    X - mean(X) = U S V^T,   A0 = V_r^T,   B0 = 0,   W = W0 + s B A

Paischer et al. 2024. X (tokens, in) are the inputs of the weight, decomposed batch by batch (`input_pca`), by
default at random with 4 power iterations as in the official code. A0 (r, in) has orthonormal rows, the
leading directions of the centred inputs, which explain the most variance. `whiten` divides row j by
S_j^(1/2), as the paper advises for images. Weights that share an input share the decomposition. The paper
also shares out ranks by explained variance (ranks=eva). Start: the base, exactly.

A block of a weight (gralora) sees a part of the inputs, whose directions are those of S V^T cut to its
columns. Directions that no input has reached are filled up at random, orthogonal to the others and of length
1.

Deviations: the batches are seen once, whether or not directions have converged (`converged` of the statistic
says so), where the official code repeats them until all have. The order of equal singular values is that of
the decomposition, the largest entry of every row is positive. Padding is left out; to leave out tokens
without a label as well, as the official code does, pass statistics that were collected with mask="labels".

Use it where batches of the task are at hand and the model has to start as the base: its first steps act on
the directions in which the inputs vary most.
"""

from torch import Tensor

from ...errors import InvalidRank
from ...linalg import truncated_svd
from ...linalg.checks import null_level
from ...linalg.svd import column_signs, completed_basis
from ..registry import init
from ..site import Factors, Site


@init(
    "eva",
    gives="zero",
    needs=lambda options, rank: [("input_pca", {"components": rank, "iterations": options["iterations"]})],
    title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    year=2024,
    arxiv="2410.07170",
    code="ml-jku/EVA",
    formula="X - mean(X) = U S V^T, A0 = V_r^T, B0 = 0, W = W0 + s B A",
)
def eva(
    site: Site, rank: int, scaling: float, *, whiten: bool = False, iterations: int | None = 4
) -> Factors:
    """Return a zero product whose down factor holds the leading directions of the inputs.

    Args:
        site: the weight.
        rank: number of directions, at most `in`.
        scaling: not used.
        whiten: divide every direction by the root of its singular value.
        iterations: power iterations of a randomised decomposition of every batch; None takes the exact one.
            With ranks=eva, give both the same.
    """
    out, columns = site.shape
    if rank > columns:
        raise InvalidRank(f"{site.path}: eva has at most {columns} directions of the inputs, not {rank}")
    values, directions = _leading(site, rank)
    count = len(values)
    if count < rank:
        extra = site.normal("down", columns, rank - count)
        directions = completed_basis(directions.T, extra).T
    if whiten:
        directions = directions.clone()
        directions[:count] /= values.sqrt()[:, None]
    return Factors(site.zeros(out, rank), directions.contiguous())


def _leading(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """Return singular values and directions of the inputs, up to that many and those that are not zero."""
    found = site.statistic("input_pca")
    values = found.values.to(site.device, site.dtype)
    directions = found.components.to(site.device, site.dtype)
    if not site.is_whole:
        spread = (values[:, None] * directions)[:, site.columns]
        _, values, directions = truncated_svd(spread, min(spread.shape))
        directions = directions * column_signs(directions.T).T
    count = min(rank, int((values > null_level(values, directions.shape[1])).sum()))
    return values[:count], directions[:count]
