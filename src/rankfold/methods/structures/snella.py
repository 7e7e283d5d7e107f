"""SNELLA: snell with a richer kernel, the entries that are kept shared out over all weights by importance.

    W = W0 + top_N(K),   K = D + a softmax_i(D / g) + b,   D_ij = 0.1 (||O_0i - P_0j|| - ||O_1i - P_1j||)
    I = |w dL/dw|,   E = b1 E + (1 - b1) I,   U = b2 U + (1 - b2) |I - E|,   G = mean_O(E U) + mean_P(E U)

Shen et al. 2025. O (2, out, q), P (2, in, q) and a, g, b (1,) of every weight are trained. Every `interval`
steps, after the optimizer's, the budget V(t) is shared out in proportion to G, no weight taking more than it
has entries: N entries each are kept from then on. V falls cubically from the share 1 - initial of all entries
to 1 - zeroed, between the shares `warmup` and 1 - `final` of the training. N is saved with the adapter.
a = 1, g = 1, b = 0, b1 = b2 = 0.85, no warm-up and no final phase, initial = 0.01 and r = 32 are the official
code's, where `zeroed` is 0.3 to 0.8 by data set: 0.8 here; interval = 10 is this package's. Options that it
shares with `snell` are explained there.
Start: not the base, the softmax puts about 1 / out into every entry of K.

Deviations: the schedule counts steps and not epochs; the budget is met exactly and in one pass, where the
official loop over what is left can run forever; a weight that keeps all entries shrinks them like any other.
"""

import torch

from ...weights import Dense, Weight
from ...weights.competing import HEADS
from ..entries import SharedEntries
from ..registry import not_base, structure
from ..site import Site
from .snell import competing, kept_entries


@structure(
    "snella",
    title="Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
    year=2025,
    arxiv="2510.24037",
    code="ssfgunner/SNELL",
    formula="W = W0 + K |K| on the N largest |K|, K = D + a softmax(D / g) + b, N by importance",
    start=not_base("moved in every entry that is kept, by about 1 / out^2"),
    rank=32,
    limit=None,
    multiple=lambda options: HEADS,
    training=SharedEntries,
)
def snella(
    site: Site,
    rank: int,
    *,
    initial: float = 0.01,
    zeroed: float = 0.8,
    warmup: float = 0.0,
    final: float = 0.0,
    interval: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    shrink: str = "magnitude",
    drop_path: float = 0.0,
) -> Weight:
    """Return W0 plus the largest entries of the kernel matrix.

    Args:
        site: the weight.
        rank: r = 2 q, the numbers per row and column.
        initial: share of all entries that are zero in the beginning, in [0, 1).
        zeroed: share of all entries that are zero in the end, in [0, 1).
        warmup: share of the training before the budget falls, in [0, 1).
        final: share of the training after it has fallen, in [0, 1).
        interval: steps between two allocations, at least 1.
        beta1: of the average of sensitivities, in [0, 1).
        beta2: of the average of their deviations, in [0, 1).
        shrink: what a kept entry is worth: "magnitude", "soft" or "hard".
        drop_path: probability, in [0, 1), of leaving the change out for a sample while training.
    """
    kept = Dense(torch.tensor([kept_entries(site, initial)], device=site.device), "kept", trainable=False)
    names = {"scale": 1.0, "width": 1.0, "shift": 0.0}
    mixing = [site.trained(site.zeros(1) + value, name) for name, value in names.items()]
    return site.base + competing(site, rank, kept, shrink, drop_path, mixing)
