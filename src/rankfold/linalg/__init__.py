"""Decompositions, low-rank approximations and budgets; nothing of neural networks."""

from .budget import allocate
from .factored import Squeezed, factored_svd, squeeze_factors
from .lowrank import LowRank, tail_errors
from .metrics import Diagonal, Gram, Metric, RootGram, psd_root
from .monarch import MonarchFactors, monarch_dense, monarch_projection
from .normal_float import NormalFloat, codebook, dequantise, quantise
from .pivoted import Pivoted, pivoted_lu, pivoted_qr
from .quantised_low_rank import QuantisedLowRank, low_rank_part, quantised_low_rank
from .shares import proportional, top_counts
from .skeleton import Skeleton, nystrom, skeleton
from .svd import polar_factor, range_finder, truncated_svd
from .weighted import gram_low_rank, weighted_low_rank

__all__ = [
    "Diagonal",
    "Gram",
    "LowRank",
    "Metric",
    "MonarchFactors",
    "NormalFloat",
    "Pivoted",
    "QuantisedLowRank",
    "RootGram",
    "Skeleton",
    "Squeezed",
    "allocate",
    "codebook",
    "dequantise",
    "factored_svd",
    "gram_low_rank",
    "low_rank_part",
    "monarch_dense",
    "monarch_projection",
    "nystrom",
    "pivoted_lu",
    "pivoted_qr",
    "polar_factor",
    "proportional",
    "psd_root",
    "quantise",
    "quantised_low_rank",
    "range_finder",
    "skeleton",
    "squeeze_factors",
    "tail_errors",
    "top_counts",
    "truncated_svd",
    "weighted_low_rank",
]
