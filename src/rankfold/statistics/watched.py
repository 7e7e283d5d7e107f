"""The weights that a calibration pass watches, in plain and in adapted models alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..errors import UnsupportedLayer
from ..layers import (
    StructuredAttention,
    StructuredEmbedding,
    StructuredForeign,
    StructuredLayer,
    StructuredTransposedLinear,
    Target,
    Targets,
    find_targets,
    kind_of,
)
from ..layers.targets import candidates
from .reducers import Asked


@dataclass
class Use:
    """One module that reads a watched weight.

    Attributes:
        path: of the weight in the module.
        module: that is called; for the projections of `nn.MultiheadAttention`, the attention module.
        layer: a view of it with its weight as a matrix; the layer itself where it is adapted.
        part: "in_proj" or "out_proj" for those projections, else "".
    """

    path: str
    module: nn.Module
    layer: StructuredLayer
    part: str


@dataclass
class Watched:
    """One stored weight and the modules that read it; several where it is tied.

    Attributes:
        uses: at least one; the first gives the weight its path.
        paths: all of the weight's paths; a module may stand in the model twice.
        leader: the first weight that always has the same input.
    """

    uses: list[Use]
    paths: list[str]
    leader: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.leader = self

    @property
    def path(self) -> str:
        """Path of the weight."""
        return self.uses[0].path

    @property
    def layer(self) -> StructuredLayer:
        """The view of its first module."""
        return self.uses[0].layer

    @property
    def foreign(self) -> bool:
        """Whether the weight has a form of its own, such as a quantised one, and no gradient."""
        return isinstance(self.layer, StructuredForeign)

    def matrix_of(self, gradient: Tensor) -> Tensor:
        """Return a gradient, in the stored weight's shape, as a matrix (out, in)."""
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if isinstance(self.layer, StructuredTransposedLinear):
            return gradient.T
        return gradient.flatten(1) if gradient.dim() > 2 else gradient


def _view(target: Target) -> StructuredLayer | None:
    """Return the layer at a target, or one that stands beside it not in its place; None for a block."""
    module = target.module
    if target.part:
        attention = module if isinstance(module, StructuredAttention) else _attention(module)
        layer: StructuredLayer = getattr(attention, target.part)
        return layer
    if isinstance(module, StructuredLayer):
        return module
    kind = kind_of(module)
    return None if kind is None else kind(module)


def _attention(module: nn.Module) -> StructuredAttention:
    assert isinstance(module, nn.MultiheadAttention)
    return StructuredAttention(module)


def _uses(targets: Iterable[Target]) -> Iterator[Use]:
    for target in targets:
        layer = _view(target)
        if layer is None:
            raise UnsupportedLayer(f"{target.path}: {type(target.module).__name__} holds no single weight")
        yield Use(target.path, target.module, layer, target.part)


def watch(model: nn.Module, targets: Targets) -> list[Watched]:
    """Return the targeted weights in the order of the model; tied ones are one.

    Raises:
        UnknownTarget: a pattern matches nothing.
        UnsupportedLayer: a pattern matches only modules that hold no single weight.
    """
    found: dict[int, Watched] = {}
    for use in _uses(find_targets(model, targets)):
        known = found.setdefault(_identity(use.layer), Watched([], []))
        known.paths.append(use.path)
        if not any(other.module is use.module for other in known.uses):
            known.uses.append(use)
    return list(found.values())


def _identity(layer: StructuredLayer) -> int:
    """Return what tied layers have in common: the stored tensor, or what took its place."""
    return id(layer.lender or layer) if layer.is_released else id(layer.stored())


def layers_at(model: nn.Module, paths: Iterable[str]) -> dict[str, StructuredLayer]:
    """Return the layers of a model at these paths; paths that it does not have are left out."""
    wanted = set(paths)
    return {use.path: use.layer for use in _uses(t for t in candidates(model) if t.path in wanted)}


def refuse(watched: Iterable[Watched], what: Iterable[Asked]) -> None:
    """Refuse statistics that a layer does not have.

    Raises:
        UnsupportedLayer: naming the layer and what would work.
    """
    for weight in watched:
        for asked in what:
            for use in weight.uses:
                why = _why_not(use, asked, any(other.layer.looked_up for other in weight.uses))
                if why:
                    raise UnsupportedLayer(f"{use.path}: {asked.name} {why}")


def _why_not(use: Use, asked: Asked, looked_up: bool) -> str | None:
    if asked.side == "curvature" and isinstance(use.layer, StructuredForeign):
        return "needs a second derivative, which a quantised weight does not have; use squared_gradient"
    if asked.side == "ids":  # of a tied weight, by one of its modules
        return None if looked_up else "counts the rows that are looked up, and this is no embedding"
    if asked.side not in ("input", "output"):
        return None
    if isinstance(use.layer, StructuredEmbedding):
        return "has no meaning for an embedding, which looks rows up; gradient statistics work there"
    if asked.side == "input" and use.layer.op.groups > 1:
        return (
            f"is one per group in a convolution of {use.layer.op.groups} groups, where every group has an "
            "input of its own; gradient and output statistics work there"
        )
    if use.part and (use.part, asked.side) != ("in_proj", "input"):
        return (
            "cannot be seen from outside nn.MultiheadAttention, which reads this projection without calling "
            "it; gradient statistics work there"
        )
    return None
