"""Named projected optimizers, one paper a file."""

from .dct_projection import dct_projection
from .fira import fira
from .frugal import frugal
from .galore import galore
from .galore2 import galore2
from .online_subspace_descent import online_subspace_descent
from .sara_sampling import sara_sampling

__all__ = [
    "dct_projection",
    "fira",
    "frugal",
    "galore",
    "galore2",
    "online_subspace_descent",
    "sara_sampling",
]
