"""The error of a layer's outputs where its bias takes up the mean."""

from __future__ import annotations

from ...linalg import RootGram
from ..objective import Objective, Site


def mimicked(site: Site, *, add_bias: bool, damping: float) -> Objective:
    """Return the error of the outputs: centred where there is, or will be, a bias that takes up its mean."""
    covariance, mean = site.statistic("input_covariance"), site.statistic("input_mean").to
    centre = mean(covariance.dtype)
    if site.bias is None and not add_bias:
        gram = covariance + centre[:, None] * centre
        return Objective(right=RootGram(gram), split="orthogonal", damping=damping)
    return Objective(
        right=RootGram(covariance), mean=centre, split="orthogonal", damping=damping, add_bias=add_bias
    )
