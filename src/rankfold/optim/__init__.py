"""What optimizers keep: how it follows a parameter's changes, and how it is kept at low rank."""

from .inner import INNERS, Adafactor, Adam, Inner, Lion, Momentum
from .papers import dct_projection, fira, frugal, galore, galore2, online_subspace_descent, sara_sampling
from .projected import ProjectedOptimizer, stochastically_rounded
from .projectors import (
    PROJECTORS,
    Coordinates,
    Cosines,
    CrossHead,
    Gaussian,
    OnlinePCA,
    Orthonormal,
    Projector,
    Randomized,
    Sampled,
    cosines,
)
from .residuals import RESIDUALS, Plain, Residual, Scaled, Sign, Sparse
from .state import adam_options, first_moments, moments, reset, resize, second_moments, transform, unwrapped

__all__ = [
    "INNERS",
    "PROJECTORS",
    "RESIDUALS",
    "Adafactor",
    "Adam",
    "Coordinates",
    "Cosines",
    "CrossHead",
    "Gaussian",
    "Inner",
    "Lion",
    "Momentum",
    "OnlinePCA",
    "Orthonormal",
    "Plain",
    "ProjectedOptimizer",
    "Projector",
    "Randomized",
    "Residual",
    "Sampled",
    "Scaled",
    "Sign",
    "Sparse",
    "adam_options",
    "cosines",
    "dct_projection",
    "fira",
    "first_moments",
    "frugal",
    "galore",
    "galore2",
    "moments",
    "online_subspace_descent",
    "reset",
    "resize",
    "sara_sampling",
    "second_moments",
    "stochastically_rounded",
    "transform",
    "unwrapped",
]
