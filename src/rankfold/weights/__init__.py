"""The weight language: every weight is an expression over a few structured linear maps."""

from .composites import Composite, Dropped, Scaled
from .gates import Gated, Gates
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
from .products import Hadamard, Modulated, Product
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
    "Base",
    "BlockDiagonal",
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
    "Pooled",
    "Product",
    "Reflections",
    "Scaled",
    "Seeded",
    "Select",
    "Sparse",
    "Split",
    "Sum",
    "TensorTrain",
    "Transposed",
    "Tucker",
    "Weight",
    "adopt_ranks",
    "frozen",
    "owned",
    "row_norms",
    "term_is_dense",
    "trained",
]
