"""Sparse spectral training: a weight kept as its whole SVD, of which a few pairs of vectors train at a time.

    W = U diag(s) V^T,   U (out, m),   V (in, m),   m = min(out, in)
    ds_i = u_i^T G v_i for all i;   du_i = G v_i and dv_i = G^T u_i for the r pairs in I, s_i left out

Zhao et al. 2024. For one iteration of T3 steps I is drawn without replacement from
p_i = (1/m + s_i / sum_j s_j) / 2. After every step of the optimizer s is clamped at 0 and the vectors in I
are scaled back to length 1. After a round of m / r iterations U, s, V become the SVD of what they make.
Gradients and moments are those of r pairs and m values: the trained pairs stand in tensors of their own and
the others are frozen. With a new I the moments of the vectors start again, and their rate climbs over a few
steps; the moments of s stay with their values, at a new SVD with the rank of the value among the others.
r = 64 is the paper's, and T3 = 200 as far as it is known. Start: W0, to rounding, as its SVD.

Deviations: the rate climbs by shortening the vectors' steps, so for them alone, over 20 steps; the paper's
number is not known. The paper's hyperbolic layers keep their own map around W, which stands in for theirs.
"""

from ...linalg import truncated_svd
from ...weights import Sliced, Spectral, Sum, Weight
from ..registry import near_base, structure
from ..site import Site
from ..spectra import SpectralSampling, drawn_first


@structure(
    "sst",
    title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
    year=2024,
    arxiv="2405.15481",
    formula="W = U diag(s) V^T, all of s and r sampled pairs trained, dU = G V, SVD again every round",
    start=near_base(1e-4),
    rank=64,
    scratch=True,
    training=SpectralSampling,
)
def sst(site: Site, rank: int, *, interval: int = 200, warmup: int = 20) -> Weight:
    """Return U diag(s) V^T, r pairs of it trained.

    Args:
        site: the weight.
        rank: r, how many pairs of singular vectors are trained at a time.
        interval: T3, steps between two drawings, at least 1.
        warmup: steps over which the rate of the vectors climbs after a drawing.
    """
    (out, columns), count = site.shape, min(site.shape)
    left, values, right = site.zeros(out, count), site.zeros(count), site.zeros(count, columns)
    if not site.blank:
        left, values, right = truncated_svd(site.matrix(), count)
        order = drawn_first(values, rank, site.generator("pairs"))
        left, values, right = left[:, order], values[order], right[order]
    core = site.trained(values, "values")

    def part(name: str, start: int, stop: int) -> Spectral:
        make = site.trained if name == "active" else site.frozen
        middle = Sliced(core, start, stop, f"values.{name}", holds=name == "active")
        return Spectral(
            make(left[:, start:stop], f"{name}.left"), middle, make(right[start:stop], f"{name}.right")
        )

    return Sum(part("active", 0, rank), part("rest", rank, count))
