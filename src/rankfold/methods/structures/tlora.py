"""TLoRA: a trained transform of full rank on the weight's inputs, and a small residual, both tensor networks.

    W = W0 T + s Delta
    T = sum_{c=1..C} U_c (x) V_c,   U_c in R^{n_1 x n_1}, V_c in R^{n_2 x n_2},   in = n_1 n_2
    Delta[o_1 o_2, i_1 i_2] = trace(D_1[o_1] D_2[o_2] D_3[i_1] D_4[i_2]),   D_m[.] in R^{q x q}

Tao et al. 2025. T is a tensor-train matrix of two cores with bond C, Delta a tensor ring with bond q =
rank, held as a train of bond q^2 whose inner cores let the ring's first bond pass; rank(Delta) <= q^2.
Sides are cut in two, as equal as their divisors allow; T of a side that is prime is dense for C > 1. Start:
T = I, because U_1 and V_1 are the identity and every other V_c is zero, and Delta = 0, because the last
core is zero: the base up to rounding.

Deviations: the abstract gives transform and residual as tensor networks; which networks, the start and the
sizes C = 2 and q = 2 are this package's reading. Two cores per side only.
"""

import math

import torch

from ...errors import InvalidOption
from ...weights import Kronecker, Leaf, Sum, TensorTrain, Weight
from ..modes import modes_of
from ..registry import near_base, structure
from ..site import Site


@structure(
    "tlora",
    stage="transform",
    title="Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to "
    "Text-to-image Models",
    year=2025,
    arxiv="2501.08727",
    formula="W = W0 sum_c (U_c (x) V_c) + s ring(D_1, D_2, D_3, D_4)",
    start=near_base(1e-5),
    rank=2,
    limit=None,
)
def tlora(site: Site, rank: int, *, alpha: float | None = None, bond: int = 2) -> Weight:
    """Return W0 T + s Delta.

    Args:
        site: the weight.
        rank: q, bond of the ring.
        alpha: numerator of the scaling; the rank by default.
        bond: C, of the transform's train.
    """
    if bond < 1:
        raise InvalidOption(f"tlora: bond must be at least 1, not {bond}")
    return site.base @ _transform(site, bond) + site.scaling(alpha, rank) * _ring(site, rank)


def _transform(site: Site, bond: int) -> Weight:
    first, second = modes_of(site.shape[1], 2)
    terms: list[Weight] = []
    for c in range(bond):
        left, right = torch.eye(first), torch.eye(second)
        if c:
            left, right = site.normal(f"U{c}", first, first, std=1 / math.sqrt(first)), 0 * right
        terms.append(Kronecker(site.trained(left, f"U{c}"), site.trained(right, f"V{c}")))
    return Sum(*terms)


def _ring(site: Site, rank: int) -> Weight:
    sizes = [n for size in site.shape for n in modes_of(size, 2)]
    std = site.shape[1] ** (-1 / 6) / math.sqrt(rank)  # three cores together: a variance of about 1 / in

    def core(name: str, *shape: int, std: float = std) -> torch.Tensor:
        return site.normal(name, *shape, std=std)

    first = site.trained(core("D1", 1, sizes[0], rank * rank), "D1")
    inner = [site.trained(core(f"D{m}", rank, n, rank), f"D{m}") for m, n in enumerate(sizes[1:3], 2)]
    last = site.trained(site.zeros(rank * rank, sizes[3], 1), "D4")
    return TensorTrain([first, *(_Passed(leaf) for leaf in inner), last], outputs=2)


class _Passed(Leaf):
    """A core that the ring's first bond passes by: value[(a, c), n, (b, d)] = [a = b] core[c, n, d]."""

    stored = False

    def __init__(self, core: Leaf) -> None:
        bond, size, _ = core.shape
        super().__init__(f"{core.name}.passed", (bond * bond, size, bond * bond))
        self.core = core

    @property
    def trainable(self) -> bool:
        """Whether the core is trained."""
        return self.core.trainable

    def source(self) -> torch.Tensor:
        """Return the core beside the identity."""
        core = self.core.tensor()
        identity = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
        return torch.einsum("ab,cnd->acnbd", identity, core).reshape(self.shape)
