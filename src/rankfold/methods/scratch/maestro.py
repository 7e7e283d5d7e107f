"""MAESTRO: products whose terms training orders by importance, so that a suffix of them can be dropped.

    W = U V^T,   U (out, R), V (in, R),   R = min(out, in);   cut: W_b = U[:, :b] V[:, :b]^T

Horvath et al. 2023. In every step one weight is cut to its first b terms, (weight, b) drawn uniformly from
all pairs; the others take part with all they have. To the loss is added penalty * sum_b (||U[:, b:]||_F +
||V[:, b:]||_F), b = 1 .. R, so that the last term stands in every tail. Every `interval` steps all terms from
the first b on with ||U[:, b:]||_F ||V[:, b:]||_F < threshold are dropped, with their state in the optimizer.
penalty = 5e-3 and threshold = 1e-5 are the official code's defaults (its scripts take penalty = 1e-6). A
convolution goes to R channels by its window and on by a 1x1 one. Start: W0, to rounding, by its SVD split
evenly. `maestro_loss` is the loss of a whole and a cut pass; `keep_prefix` takes any prefix afterwards.

Deviations: terms are dropped after a number of steps (1000 is ours), not after an epoch, and at once, where
the official code masks them until the end. The penalty is added after a clip of gradients; a tail of zeros
has no gradient. A compiled model is compiled again where another weight is cut.
"""

from ...linalg import truncated_svd
from ...weights import Ordered, Weight
from ..ordered import OrderedDropout
from ..registry import near_base, structure
from ..site import Basis, Site


@structure(
    "maestro",
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    year=2023,
    arxiv="2308.14929",
    code="SamuelHorvath/Maestro-LoD",
    formula="W = U V^T at full rank, one weight cut to its first b terms a step, tails penalised and dropped",
    start=near_base(1e-4),
    rank=None,
    layers=("linear", "convolution"),
    sides=True,
    entries=True,
    scratch=True,
    training=OrderedDropout,
)
def maestro(site: Site, *, penalty: float = 5e-3, threshold: float = 1e-5, interval: int = 1000) -> Weight:
    """Return U V^T.

    Args:
        site: the weight.
        penalty: lambda, of the tails' norms, at least 0.
        threshold: least importance of a tail that is kept, at least 0.
        interval: steps between two droppings, at least 1.
    """
    rank = min(site.shape)
    up, down = site.zeros(site.shape[0], rank), site.zeros(rank, site.shape[1])
    if not site.blank:
        factors = Basis(*truncated_svd(site.matrix(), rank)).split(1.0)
        up, down = factors.up, factors.down
    return Ordered(site.trained(up, "up"), site.trained(down, "down"))
