"""Named projected optimizers, one paper a file."""

from .dct_projection import dct_projection
from .diloco import diloco
from .eager_diloco import eager_diloco
from .eggroll import eggroll
from .fira import fira
from .flora import flora
from .frugal import frugal
from .galore import galore
from .galore2 import galore2
from .galore_plus import galore_plus
from .gradnormlorp import gradnormlorp
from .muon import muon
from .mup import mup, mup_model
from .online_subspace_descent import online_subspace_descent
from .outlier_safe import excess_kurtosis, fold_outlier_safe, outlier_safe, project_embeddings
from .sara_sampling import sara_sampling
from .u_mup import residual_weights, u_mup, u_mup_model
from .weight_decay_scaling import weight_decay_scaling

__all__ = [
    "dct_projection",
    "diloco",
    "eager_diloco",
    "eggroll",
    "excess_kurtosis",
    "fira",
    "flora",
    "fold_outlier_safe",
    "frugal",
    "galore",
    "galore2",
    "galore_plus",
    "gradnormlorp",
    "muon",
    "mup",
    "mup_model",
    "online_subspace_descent",
    "outlier_safe",
    "project_embeddings",
    "residual_weights",
    "sara_sampling",
    "u_mup",
    "u_mup_model",
    "weight_decay_scaling",
]
