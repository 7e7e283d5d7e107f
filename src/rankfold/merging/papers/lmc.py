"""Linear mode connectivity: what lies on the line between two models, before and after matching.

    th(c) = (1 - c) th_A + c th_B',   barrier = max_c L(th(c)) - (1 - c) L(th_A) - c L(th_B)
    <W_A, P W_B Q^T> = sum_ij s_i s'_j (u_i^T P u'_j) (v_i^T Q v'_j)
    R(gamma) = sum_l sum_ij (u_i^T P u'_j) (v_i^T Q v'_j) / sum_l |Gamma_l|,  s_i >= gamma s_max in Gamma_l

Ito, Yamada and Kumagai 2024. Permutations turn singular vectors and leave singular values: matching does not
bring two models much closer, but aligns the vectors of their large singular values, and so R rises sharply
for large gamma while the distance falls by some tens of percent at most. The report holds the loss along the
line, its barrier, the distance and R, each before and after; `save_picture` draws them. Eleven points and the
gammas are this library's.

Deviations: the exact normalisation of R is not stated in what is public; here it is 1 for equal models, and
where they have other numbers of strong components the mean of both is taken. Batch norms' running statistics
are measured anew on the line.

Use it to see whether two models can be averaged, and what matching does for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...catalogue import register
from ...statistics.batches import Loss
from ..connectivity import Connectivity, alignment, distance, interpolated, loss_curve
from ..matching import matched


@register(
    "analysis",
    "lmc",
    title="Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching: With Insights into "
    "Other Permutation Search Methods",
    year=2024,
    arxiv="2402.04051",
    formula="max_c L((1-c) th_A + c P th_B) - (1-c) L(th_A) - c L(th_B)",
    status="experimental",
    traits={"function": "rankfold.merging.papers.lmc.lmc"},
)
def lmc(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    spec: Mapping[str, Any] | None = None,
    residual: bool = False,
    points: int = 11,
    gammas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    sweeps: int = 100,
    seed: int = 0,
) -> Connectivity:
    """Measure the line between two models, before and after the second is matched to the first.

    Args:
        first: A.
        second: B, of the same architecture.
        batches: what the loss is the mean over.
        loss: of a model and a batch; None reads it off the model's output.
        spec: which permutation acts where; None finds it by the architecture.
        residual: move the residual stream of a transformer too.
        points: on each line, both ends included.
        gammas: thresholds of strong components, each in [0, 1].
        sweeps: the most passes of the matching.
        seed: of the matching.

    Raises:
        Incompatible: the models have other tensors, or there is no loss.
        UnsupportedLayer: the architecture is not known and no `spec` is given.
        InvalidOption: an option is impossible.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> one, other = (nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1)) for _ in range(2))
        >>> def loss(model, batch):
        ...     return (model(batch) - batch.prod(1, keepdim=True)).square().mean()
        >>> lmc(one, other, [torch.eye(2)], loss=loss).distance_ratio < 1
        True
    """
    batches = list(batches)
    twin = matched(second, to=first, spec=spec, residual=residual, sweeps=sweeps, seed=seed)
    middle = interpolated(first, twin, 0.5)
    found = [alignment(first, other, gammas) for other in (second, twin, middle)]
    return Connectivity(
        before=loss_curve(first, second, batches, loss=loss, points=points),
        after=loss_curve(first, twin, batches, loss=loss, points=points),
        distances=(distance(first, second), distance(first, twin)),
        alignments={gamma: (found[0][gamma], found[1][gamma], found[2][gamma]) for gamma in gammas},
    )
