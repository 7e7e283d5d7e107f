"""Monarch: a weight is two block-diagonal factors with a stride permutation between them.

    W = P^T blockdiag(L_1..L_b) P blockdiag(R_1..R_b)

Dao et al. 2022. R_i (q, in / b), L_i (out / b, q), q = min(in, out) / b. Sides that b does not divide are
padded and cropped. Trained numbers: min(in, out) (in + out) / b. Blocks of W, rows taken at stride b, have
rank q / b, yet W has full rank. Three uses: trained from the start (factors uniform in +-1 / sqrt(fan-in) of
their own blocks, b = 4 as in the official code); `start="projection"`, the nearest Monarch matrix to the
weight that is there, for pretrained ones (`linalg.monarch_projection`); and reverse sparsification: with
`sparse` below 1 the factors are multiplied out after that share of the steps, and a dense weight is trained
from there on, with fresh optimizer state, in one process. Start: that of the factors.

Deviations: the official projection is for square weights and blocks of rank one; this one is optimal for
rectangular ones and any rank. The paper does not state how long to train sparsely: `sparse` is to be given.
With it, sides are not told apart, so that parameter groups stay what they are. Biases are the model's own.

From b = 2 on two products of blocks have no more multiply-adds than the dense one, so a matrix formed for few
tokens never pays by that measure: for a served model `rankfold.fold` merges the factors for good.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ...errors import Incompatible, InvalidOption
from ...linalg import monarch_projection
from ...weights import Densifying, Monarch, Weight
from ..limits import in_range, one_of
from ..processes import processes
from ..registry import not_base, structure
from ..rules import Dynamics
from ..run import Run
from ..site import Site
from ..stages import parameters_of, staged, take_place


@dataclass(kw_only=True)
class ReverseSparsification(Dynamics):
    """Multiplying the factors out while training runs; its option is that of `monarch`.

    Args:
        sparse: share of the steps before it, in (0, 1]; 1 is never.
    """

    sparse: float
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    @property
    def idle(self) -> bool:
        """Whether the factors are kept."""
        return self.sparse == 1

    def check(self, run: Run) -> None:
        """Refuse several processes: data-parallel wrappers do not average gradients of fresh matrices."""
        if processes()[1] > 1:
            raise Incompatible("monarch trains in one process where sparse is below 1")

    def stepped(self, run: Run) -> None:
        """Multiply out after that share of the steps."""
        assert run.total_steps is not None
        late = run.step >= int(self.sparse * run.total_steps)
        for part in staged(run, Densifying).values():
            if late and isinstance(part.now, Monarch):
                factors = parameters_of(part)
                part.densify()
                take_place(run, factors, parameters_of(part))


@structure(
    "monarch",
    title="Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    year=2022,
    arxiv="2204.00595",
    code="HazyResearch/fly",
    formula="W = P^T blockdiag(L) P blockdiag(R)",
    start=not_base("that of two random factors, or of the nearest Monarch matrix"),
    rank=None,
    sides=True,
    training=ReverseSparsification,
    scratch=True,
)
def monarch(site: Site, *, blocks: int = 4, start: str = "random", sparse: float = 1.0) -> Weight:
    """Return the two factors.

    Args:
        site: the weight.
        blocks: b, at least 1 and at most min(out, in).
        start: "random", or "projection" of the weight that is there.
        sparse: share of the steps after which the factors are multiplied out, in (0, 1]; 1 is never.
    """
    one_of("monarch", ("random", "projection"), start=start)
    in_range("monarch", "(0, 1]", sparse=sparse)
    rows, inner, columns = block_sizes("monarch", site, blocks)
    left = site.uniform("left", blocks, rows, inner, bound=inner**-0.5)
    right = site.uniform("right", blocks, inner, columns, bound=columns**-0.5)
    if start == "projection" and not site.blank:
        left, right = projected(site.matrix(), blocks, inner)
    weight = Monarch(site.trained(left, "left"), site.trained(right, "right"), site.shape)
    return weight if sparse == 1 else Densifying(weight)


def block_sizes(owner: str, site: Site, blocks: int) -> tuple[int, int, int]:
    """Return out / b, q and in / b, rounded up; q is the smaller of the other two."""
    if not 1 <= blocks <= min(site.shape):
        raise InvalidOption(
            f"{site.path}: {owner} needs between 1 and {min(site.shape)} blocks in a layer of "
            f"{site.shape[0]}x{site.shape[1]}, not {blocks}"
        )
    rows, columns = (-(-side // blocks) for side in site.shape)
    return rows, min(rows, columns), columns


def projected(matrix: Tensor, blocks: int, inner: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the nearest Monarch matrix to a matrix (out, in), padded with zeros."""
    out, columns = (-side % blocks for side in matrix.shape)
    padded = F.pad(matrix, (0, columns, 0, out))
    found = monarch_projection(padded, row_blocks=blocks, column_blocks=blocks, inner=inner)
    return found.left, found.right
