"""The weight language: every weight is an expression over a few structured linear maps."""

from .bases import RandomMixture, ScaledBases
from .composites import Composite, Dropped, Scaled
from .experts import Experts, Given, Router, Same
from .gates import Gate, Gated, Gates
from .gram import Gram
from .kernelwise import Polyadic, Viewed
from .leaves import (
    Base,
    Dense,
    Foreign,
    Joined,
    Masked,
    Mixture,
    Moved,
    Pooled,
    Seeded,
    adopt_ranks,
    frozen,
    owned,
    trained,
)
from .normalized import ColumnNormalized, Normalized, row_norms
from .op import LINEAR, Convolution, Op
from .orthogonal import Cayley, Identity, Shifted
from .products import Hadamard, Modulated, Product
from .rectified import Affine, Rectified
from .rescaled import Rescaled
from .selection import Rectangle, Scattered, Selection, ThinRectangle, adopt_selections
from .shards import Repeated, Sharded
from .structured import (
    BlockDiagonal,
    Diagonal,
    Grid,
    Kronecker,
    Permutation,
    Reflections,
    Select,
    Sparse,
    TensorTrain,
    Tucker,
)
from .sums import Split, Sum, term_is_dense
from .weight import Count, Leaf, Pair, Transposed, Weight

__all__ = [
    "LINEAR",
    "Affine",
    "Base",
    "BlockDiagonal",
    "Cayley",
    "ColumnNormalized",
    "Composite",
    "Convolution",
    "Count",
    "Dense",
    "Diagonal",
    "Dropped",
    "Experts",
    "Foreign",
    "Gate",
    "Gated",
    "Gates",
    "Given",
    "Gram",
    "Grid",
    "Hadamard",
    "Identity",
    "Joined",
    "Kronecker",
    "Leaf",
    "Masked",
    "Mixture",
    "Modulated",
    "Moved",
    "Normalized",
    "Op",
    "Pair",
    "Permutation",
    "Polyadic",
    "Pooled",
    "Product",
    "RandomMixture",
    "Rectangle",
    "Rectified",
    "Reflections",
    "Repeated",
    "Rescaled",
    "Router",
    "Same",
    "Scaled",
    "ScaledBases",
    "Scattered",
    "Seeded",
    "Select",
    "Selection",
    "Sharded",
    "Shifted",
    "Sparse",
    "Split",
    "Sum",
    "TensorTrain",
    "ThinRectangle",
    "Transposed",
    "Tucker",
    "Viewed",
    "Weight",
    "adopt_ranks",
    "adopt_selections",
    "frozen",
    "owned",
    "row_norms",
    "term_is_dense",
    "trained",
]
