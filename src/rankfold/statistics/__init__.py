"""Statistics: one calibration pass collects what initialisers, rank rules and compression ask for."""

from .collect import collect, sequentially
from .finite import NotFinite
from .pca import PrincipalComponents
from .reducers import REDUCERS, Reducer
from .statistics import NotCollected, Statistics, WeightStatistics

__all__ = [
    "REDUCERS",
    "NotCollected",
    "NotFinite",
    "PrincipalComponents",
    "Reducer",
    "Statistics",
    "WeightStatistics",
    "collect",
    "sequentially",
]
