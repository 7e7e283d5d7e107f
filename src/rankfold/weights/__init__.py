"""The weight language: every weight is an expression over a few structured linear maps."""

from .activated import Activated
from .bases import RandomMixture, ScaledBases
from .channels import Channels
from .composites import Composite, Dropped, Scaled
from .experts import Experts, Given, Router, Same
from .gates import Gate, Gated, Gates
from .gram import Gram
from .hashed import CyclicChunks, Hashed
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
from .monarch import Monarch
from .normalized import ColumnNormalized, Normalized, row_norms
from .offset import Offset
from .op import LINEAR, Convolution, Op
from .ordered import Ordered
from .orthogonal import Cayley, Identity, Shifted
from .products import Hadamard, Modulated, Product
from .projected import Fastfood, Fixed, Projected, Projection
from .quantised import Quantised
from .rectified import Affine, Rectified
from .rescaled import Rescaled
from .selection import Rectangle, Scattered, Selection, ThinRectangle, adopt_selections
from .separable import Separable
from .shards import Repeated, Sharded
from .spectral import Sliced, Spectral
from .staged import Densifying, Factoring, Guided, Staged
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
    "Activated",
    "Affine",
    "Base",
    "BlockDiagonal",
    "Cayley",
    "Channels",
    "ColumnNormalized",
    "Composite",
    "Convolution",
    "Count",
    "CyclicChunks",
    "Dense",
    "Densifying",
    "Diagonal",
    "Dropped",
    "Experts",
    "Factoring",
    "Fastfood",
    "Fixed",
    "Foreign",
    "Gate",
    "Gated",
    "Gates",
    "Given",
    "Gram",
    "Grid",
    "Guided",
    "Hadamard",
    "Hashed",
    "Identity",
    "Joined",
    "Kronecker",
    "Leaf",
    "Masked",
    "Mixture",
    "Modulated",
    "Monarch",
    "Moved",
    "Normalized",
    "Offset",
    "Op",
    "Ordered",
    "Pair",
    "Permutation",
    "Polyadic",
    "Pooled",
    "Product",
    "Projected",
    "Projection",
    "Quantised",
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
    "Separable",
    "Sharded",
    "Shifted",
    "Sliced",
    "Sparse",
    "Spectral",
    "Split",
    "Staged",
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
