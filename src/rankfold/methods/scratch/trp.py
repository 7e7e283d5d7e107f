"""TRP: dense training whose weights are cut to their leading singular values every few steps.

    T(W) = sum_i s_i u_i v_i^T
    t mod m = 0:  W <- T^-1(U_q diag(s_q) V_q^T),   g <- g + lambda T^-1(U_q V_q^T)

with the smallest q that keeps a share e of sum s_i^2. Xu et al. 2018, 2020. The cut comes before the forward
pass of step t, step 0 included, and the subgradient of the nuclear norm, of norm 1, is added on those steps
only; between them the weight is dense and of full rank. So a final cut loses little: at the end singular
values of at most `threshold` go, and U_q diag(s_q)^(1/2), diag(s_q)^(1/2) V_q^T are handed over as trained
factors. T is (out, in) for linear layers; for a kernel (out, in, h, w) `layout="channel"` is (out, in h w),
an h x w convolution to q channels and a pointwise one, and "spatial" is (in h, out w), a vertical and a
horizontal convolution. e = 0.9, lambda = 3e-4 (ResNet-20) and threshold = 0.05 are the official code's.
Start: the weights, cut.

Deviations: m = 20, because the papers take tens of steps; the official code's 1 always stays in the cut.
Kernels without two window axes are seen channel-wise. The network decoupling of the first paper is left out.
The official code leaves the first convolution and pointwise ones dense: so should the targets.

The factors are handed over when the handle of `rankfold.attach` is removed, at the end of the training.
Momentum keeps the directions that a cut has removed.
"""

from ...weights import Factoring, Weight
from ..limits import in_range, one_of
from ..rank_pruning import TrainedRankPruning, cut
from ..registry import not_base, structure
from ..site import Site


@structure(
    "trp",
    title="TRP: Trained Rank Pruning for Efficient Deep Neural Networks",
    year=2020,
    arxiv="2004.14566",
    code="yuhuixu1993/Trained-Rank-Pruning",
    formula="W <- U_q diag(s_q) V_q^T every m steps, g <- g + lambda U_q V_q^T there; factors at the end",
    start=not_base("that of every weight cut to its leading singular values"),
    rank=None,
    layers=("linear", "convolution"),
    entries=True,
    training=TrainedRankPruning,
    scratch=True,
)
def trp(
    site: Site,
    *,
    interval: int = 20,
    energy: float = 0.9,
    nuclear: float = 3e-4,
    threshold: float | None = 0.05,
    layout: str = "channel",
) -> Weight:
    """Return the trained weight.

    Args:
        site: the weight.
        interval: m, steps from one cut to the next, at least 1.
        energy: e, share of the squared singular values that a cut keeps, in (0, 1]; 1 cuts nothing.
        nuclear: lambda, of the nuclear norm's subgradient, at least 0.
        threshold: at the end singular values above it stay, at least 0; None keeps the weight dense.
        layout: how a kernel is seen as a matrix: "channel" or "spatial".
    """
    in_range("trp", "[1, inf)", interval=interval)
    in_range("trp", "(0, 1]", energy=energy)
    in_range("trp", "[0, inf)", nuclear=nuclear, threshold=threshold)
    one_of("trp", ("channel", "spatial"), layout=layout)
    window = site.window if layout == "spatial" and len(site.window) == 2 else ()
    weight = Factoring(site.trained(site.matrix().clone(), "weight"), window)
    if energy < 1 and not site.blank:
        left, values, right = cut(weight.seen(site.matrix()), energy)
        weight = Factoring(site.trained(weight.unseen(left * values @ right), "weight"), window)
    return weight
