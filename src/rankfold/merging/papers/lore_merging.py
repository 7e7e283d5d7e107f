"""LoRE-Merging: the base that the models share is estimated with what each adds in low rank.

    min over th0, d_t of  sum_t ||th0 + d_t - th_t||_F^2 + mu ||d_t||_*
    d_t  <- U max(S - mu/2, 0) V^T,   U S V^T = th_t - th0
    th0  <- mean_t (th_t - d_t)
    th*  =  th0 + lambda sum_t w_t d_t

Liu et al. 2025. Every matrix alone, by coordinate descent from th0 = mean_t th_t. No base is asked for. The
threshold is mu/2 because the square has no 1/2 before it. Where the penalty is printed as a squared nuclear
norm, its minimiser is not the thresholding that goes with it; this one minimises what is written above. Other
tensors, and those named by `plain`, are averaged. The problem is convex, but a plain sweep moves the base by
mu/2 at most, and a hundred can end far from the minimum: here sweeps are extrapolated, not so in the paper.

After every step of th0, th0 + mean_t d_t = mean_t th_t: with w_t = 1/T and lambda = 1 the result is the plain
average whatever mu. What the method gains comes of a larger sum, therefore w_t = 1 and lambda = 1 here. mu is
of the order of the singular values that fine-tuning leaves as noise; 0.01 is for weights of language models.
With mu = 0 every split is a minimum, and the descent stays at its start; with mu large all d_t are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InvalidOption
from ..parts import Parts
from ..registry import merger
from ..spectra import has_spectrum


@merger(
    "lore-merging",
    title="LoRE-Merging: Exploring Low-Rank Estimation For Large Language Model Merging",
    year=2025,
    arxiv="2502.10749",
    formula="th0 + lambda sum_t d_t, of min sum_t ||th0 + d_t - th_t||^2 + mu ||d_t||_*",
    base="unused",
)
def lore_merging(
    parts: Parts,
    *,
    mu: float = 0.01,
    scale: float = 1.0,
    iterations: int = 100,
    tolerance: float = 1e-6,
    plain: Sequence[str] = (),
) -> Tensor:
    """Return the estimated base and the weighted low-rank changes.

    Args:
        parts: one tensor of all models.
        mu: price of the nuclear norm, 0 or more.
        scale: lambda, of all changes together.
        iterations: the largest number of sweeps, 1 or more; each takes one decomposition per model.
        tolerance: the descent ends where a sweep lowers the objective by less than this part of it.
        plain: patterns of names of matrices that are averaged.

    Raises:
        InvalidOption: mu or the tolerance is negative, or there is no sweep.

    Example:
        >>> models = (torch.eye(2), 3 * torch.eye(2))
        >>> lore_merging(Parts("w", models, (1.0, 1.0)), mu=100.0)
        tensor([[2., 0.],
                [0., 2.]])
    """
    if mu < 0 or tolerance < 0 or iterations < 1:
        raise InvalidOption(
            f"lore-merging: mu={mu:g} and tolerance={tolerance:g} must be 0 or more, "
            f"iterations={iterations} 1 or more"
        )
    models = torch.stack(parts.models)
    if not has_spectrum(parts.name, models.shape[1:], plain):
        return models.mean(0)
    base, changes = estimate(models, mu, iterations=iterations, tolerance=tolerance)
    return base + scale * (parts.spread() * changes).sum(0)


def estimate(models: Tensor, mu: float, *, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the base (m, n) and the changes (models, m, n) that minimise the objective.

    A sweep is a step of gradient descent on the base, with the changes at their best: so the extrapolation of
    Nesterov 1983 applies, and is forgotten where a sweep would raise the objective.

    Args:
        models: (models, m, n).
        mu: price of the nuclear norm.
        iterations: the largest number of sweeps.
        tolerance: of the relative decrease of the objective.
    """
    base = point = models.mean(0)
    changes, reached, momentum = torch.zeros_like(models), torch.inf, 1.0
    for _ in range(iterations):
        low, values = shrunk(models - point, mu / 2)
        found = (models - low).mean(0)
        cost = float((found + low - models).square().sum() + mu * values.sum())
        if cost > reached and momentum > 1:  # extrapolated too far
            point, momentum = base, 1.0
            continue
        if cost > reached:  # by rounding
            break
        before, after = momentum, (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        point, momentum = found + (before - 1) / after * (found - base), after
        gain, base, changes, reached = reached - cost, found, low, cost
        if gain <= tolerance * reached:
            break
    return base, changes


def shrunk(matrices: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return matrices (..., m, n) with all singular values lowered by a threshold, none below 0, and these.

    U max(S - k, 0) V^T = U max(1 - k / S, 0) U^T M, where U and S^2 are the eigenvectors and eigenvalues of
    M M^T: one symmetric decomposition of the smaller side. Where S > k, the square costs no accuracy that
    matters in double precision.

    Example:
        >>> shrunk(torch.diag(torch.tensor([3.0, 1.0])), 2.0)
        (tensor([[1., 0.],
                [0., 0.]]), tensor([0., 1.], dtype=torch.float64))
    """
    if threshold == 0:
        return matrices, torch.linalg.svdvals(matrices)
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    squares, left = torch.linalg.eigh((precise := wide.double()) @ precise.mT)
    values = squares.clamp(min=threshold**2).sqrt()
    kept = (left * (1 - threshold / values).unsqueeze(-2) @ left.mT).to(wide.dtype) @ wide
    return kept if wide is matrices else kept.mT, values - threshold
