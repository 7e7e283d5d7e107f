"""Decompositions, low-rank approximations and budgets; nothing of neural networks."""

from .budget import allocate
from .factored import Squeezed, factored_svd, squeeze_factors
from .lowrank import LowRank, tail_errors
from .metrics import Diagonal, Gram, Metric, RootGram, psd_root
from .monarch import MonarchFactors, monarch_dense, monarch_projection
from .pivoted import Pivoted, pivoted_lu, pivoted_qr
from .shares import proportional, top_counts
from .skeleton import Skeleton, nystrom, skeleton
from .svd import polar_factor, range_finder, truncated_svd
from .weighted import weighted_low_rank

__all__ = [
    "Diagonal",
    "Gram",
    "LowRank",
    "Metric",
    "MonarchFactors",
    "Pivoted",
    "RootGram",
    "Skeleton",
    "Squeezed",
    "allocate",
    "factored_svd",
    "monarch_dense",
    "monarch_projection",
    "nystrom",
    "pivoted_lu",
    "pivoted_qr",
    "polar_factor",
    "proportional",
    "psd_root",
    "range_finder",
    "skeleton",
    "squeeze_factors",
    "tail_errors",
    "top_counts",
    "truncated_svd",
    "weighted_low_rank",
]
