"""The weight language: every weight is an expression over a few structured linear maps."""

from .composites import Composite, Dropped, Scaled
from .gates import Gated, Gates
from .kernelwise import Polyadic, Viewed
from .leaves import (
    Base,
    Dense,
    Foreign,
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
    "Foreign",
    "Gated",
    "Gates",
    "Grid",
    "Hadamard",
    "Identity",
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
    "Rectified",
    "Reflections",
    "Scaled",
    "Seeded",
    "Select",
    "Shifted",
    "Sparse",
    "Split",
    "Sum",
    "TensorTrain",
    "Transposed",
    "Tucker",
    "Viewed",
    "Weight",
    "adopt_ranks",
    "frozen",
    "owned",
    "row_norms",
    "term_is_dense",
    "trained",
]
