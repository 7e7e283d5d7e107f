"""KIND: a weight of components, some shared by all classes and some that only one class opens.

    W(c) = U_G diag(s_G) V_G + U_c diag(s_c) V_c,   c the class of the row;  W(-1) = U_G diag(s_G) V_G

Xie et al. 2024. Learngenes U_G (out, r), s_G (r,), V_G (r, in) and tailors U_c (out, t), s_c (t,), V_c (t,
in), one for each of C classes, are all trained from scratch: the form is that of an SVD, no weight is
decomposed. Rows of a batch may be of different classes (`rankfold.gate_inputs(model, classes=...)` or the
model's argument `class_labels`); tailors of absent classes are not computed and get no gradient. With
`learngenes` naming another kind adapter of the model, its learngenes are copied and frozen, and only fresh
tailors are trained. It cannot be folded. Start: not the base; U and V have orthonormal columns and rows,
and every s is sqrt(out / (3 (r + t))), so that entries of W(c) have the variance of a linear layer's start.

Deviations: the sizes r = 8 and t = 4 and the start are this package's reading; U and V are not kept
orthogonal.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ...errors import InvalidOption, InvalidRank
from ...weights import Dense, Diagonal, Gated, Pair, Product, Weight
from ..gating import class_gate
from ..registry import not_base, structure
from ..site import Site


@structure(
    "kind",
    stage="replace",
    title="KIND: Knowledge Integration and Diversion in Diffusion Models",
    year=2024,
    arxiv="2408.07337",
    code="Te4P0t/KIND",
    formula="W(c) = U_G diag(s_G) V_G + U_c diag(s_c) V_c",
    status="experimental",
    start=not_base("components drawn anew, of a linear layer's variance: it trains from scratch"),
    layers=("linear",),
    gate=class_gate,
    inputs=("classes",),
    sides=True,
    entries=True,
    one_graph=False,
    example={"classes": 3},
)
def kind(
    site: Site, rank: int, *, classes: int = 1, tailor: int = 4, learngenes: str | None = None
) -> Weight:
    """Return the learngenes plus the gated tailors.

    Args:
        site: the weight.
        rank: r, how many learngenes a weight has.
        classes: C, how many there are, at least 1.
        tailor: t, how many components every class has of its own.
        learngenes: another kind adapter of the model, whose learngenes are copied and frozen; else trained.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = rf.adapt(model, "kind", rank=2, classes=3, targets=["0"])
        >>> with rf.gate_inputs(model, classes=torch.tensor([0, 2])):  # the class of every row
        ...     output = model(torch.ones(2, 16))
        >>> torch.equal(output[0], output[1])
        False
    """
    if not 1 <= tailor <= min(site.shape):
        raise InvalidRank(f"{site.path}: tailor must be from 1 to {min(site.shape)}, not {tailor}")
    size = math.sqrt(site.shape[0] / (3 * (rank + tailor)))
    leaf = site.trained if learngenes is None else site.frozen
    shared = _components(site, "learngene", rank, size, leaf)
    if learngenes is not None and not site.blank:
        _copy(site, shared, learngenes)
    gated = [
        Gated(_components(site, f"tailor{c}", tailor, size), site.gates, site.gate_key, c)
        for c in range(classes)
    ]
    return sum(gated, start=shared)


class _Components(Product):
    """A product that no rule about changes acts on: there is no base that it could be moved into."""

    def pairs(self, scale: float = 1.0) -> Iterator[Pair]:
        """Yield none."""
        yield from ()


def _components(
    site: Site, name: str, count: int, size: float, leaf: Callable[[Tensor, str], Dense] | None = None
) -> Weight:
    made = leaf or site.trained
    out, columns = (site.orthonormal(f"{name}{n}", n, count) for n in site.shape)
    up, down = made(out, f"{name}.up"), made(columns.T, f"{name}.down")
    return _Components(up, Diagonal(made(site.zeros(count) + size, f"{name}.values")), down)


def _copy(site: Site, learngenes: Weight, adapter: str) -> None:
    """Give learngenes the values of another adapter's."""
    if adapter not in site.layer.adapters:
        raise InvalidOption(f"kind: {site.path} has no adapter {adapter!r} to take learngenes from")
    other: Any = site.layer.adapters[adapter]
    for leaf in learngenes.leaves():
        assert isinstance(leaf, Dense)
        value: Tensor = other.leaf(leaf.name).tensor()
        if value.shape != leaf.shape:
            count = other.leaf("learngene.values").shape[0]
            raise InvalidRank(f"{site.path}: {adapter!r} has {count} learngenes; pass rank={count}")
        leaf.value.data.copy_(value.detach())
