"""RoseLoRA: LoRA whose every row of A and column of B becomes sparse, so that the product is sparse too.

    W = W0 + s B A,   I <- beta I + (1 - beta) |w dL/dw| before the optimizer's step (first |w dL/dw|); after
    it the ceil(tau n) entries of every row of A and ceil(tau m) of every column of B with the largest I stay
    tau(t) = 1 up to t_i,  T + (1 - T) (1 - (t - t_i) / (t_f - t_i))^3 up to t_f,  T from there

Wang et al. 2024. B (m, r), A (r, n), W0 (m, n). At most r ceil(T m) ceil(T n) entries of the weight differ
from the base's in the end. r = 8 and T = 0.05 are those of the paper's editing of a language model, where
also alpha = 32, the dropout is 0.1 and values are clamped to 3e-3 after every pruning; here only on request.
t_i and t_f are the shares `warmup` and 1 - `final` of the training, which with beta are public code's; t_i
is at least one step. What is pruned never returns. Start: the base, exactly.
"""

from ...weights import Weight
from ..registry import structure
from ..site import Site
from ..sparse_rows import SparseRows


@structure(
    "roselora",
    title="RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for "
    "Knowledge Editing and Fine-tuning",
    year=2024,
    arxiv="2406.10777",
    formula="W = W0 + s B A, the share tau(t) of every row of A and column of B kept by importance",
    init="kaiming",
    starts=("zero",),
    pairs="terms",
    sides=True,
    entries=True,
    training=SparseRows,
)
def roselora(
    site: Site,
    rank: int,
    *,
    alpha: float | None = None,
    keep: float = 0.05,
    warmup: float = 0.1,
    final: float = 0.2,
    beta: float = 0.8,
    clamp: float | None = None,
    dropout: float = 0.0,
) -> Weight:
    """Return W0 + s B A.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling s = alpha / rank; the rank by default.
        keep: T, share of every row of A and column of B that is kept in the end, in (0, 1].
        warmup: share of the training before the first pruning, in [0, 1).
        final: share of the training after the last one, in [0, 1).
        beta: of the average of importances, in [0, 1).
        clamp: largest magnitude of a value after pruning, or None.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    return site.base + site.low_rank(rank, site.scaling(alpha, rank), dropout)
