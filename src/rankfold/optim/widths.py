"""What a parameter is as widths grow: which of its sides scale, seen by comparison with a smaller model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..layers.targets import output_heads

Base = nn.Module | Mapping[str, Sequence[int]]
HIDDEN, INPUT, OUTPUT, READER = "hidden", "input", "output", "reader"


@dataclass(frozen=True)
class Width:
    """A parameter and how it scales.

    Attributes:
        name: of the parameter.
        parameter: itself.
        kind: "hidden" (a matrix with both sides wide); "input" (reads something of a fixed size: embeddings,
            first layers, biases, gains, the left factors of products of fixed rank); "output" (the matrix of
            a head whose input is divided by its width, see `divided`); "reader" (reads something wide into
            a fixed size and divides nothing: right factors of products of fixed rank, heads left alone).
        fan_in: what it reads, over that of the base.
        fan_out: what it writes, over that of the base.
        is_wide: whether a side of it scales at all.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    fan_in: float
    fan_out: float
    is_wide: bool

    @property
    def width(self) -> float:
        """The width of its one wide side, or of the side that it reads, over that of the base."""
        return self.fan_out if self.kind == INPUT else self.fan_in


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by name, to be kept in the place of a base model.

    Example:
        >>> shapes(nn.Linear(4, 2))
        {'weight': (2, 4), 'bias': (2,)}
    """
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def widths(model: nn.Module, base: Base) -> Iterator[Width]:
    """Yield every trained parameter with its kind.

    Args:
        model: of any width.
        base: the same model at its base width, or the shapes of its parameters.

    Raises:
        Incompatible: the base has other parameters.
        InvalidOption: there is nothing to train.
    """
    of_base = shapes(base) if isinstance(base, nn.Module) else base
    embeddings, divides = embedding_tables(model), _divided_heads(model)
    shared = embeddings & _owned(model, _head_layers(model)) - divides
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise InvalidOption("there is nothing to optimize: no parameter is trained")
    for name, parameter in trained:
        small = _of_base(of_base, name, parameter)
        found = _width(name, parameter, small, name in embeddings, name in divides)
        if found.is_wide and name in shared:
            raise Incompatible(
                f"{name} is the table of an embedding and the weight of a head, which needs its multiplier: "
                "call mup_model(model, base) on the new model"
            )
        yield found


def _of_base(base: Mapping[str, Sequence[int]], name: str, parameter: Tensor) -> tuple[int, ...]:
    small = base.get(name)
    if small is None or len(small) != parameter.dim():
        raise Incompatible(f"{name}, of shape {tuple(parameter.shape)}, has no like in the base model")
    return tuple(small)


def head_ratios(model: nn.Module, base: nn.Module) -> list[tuple[nn.Linear, float]]:
    """Return the layers of heads that write something of a fixed size, and how much wider they read.

    Raises:
        Incompatible: the base has no such layer.
    """
    found = []
    smaller = dict(base.named_modules())
    for path, head in model.named_modules():
        small = smaller.get(path)
        if any(head is layer for layer in _head_layers(model)) and isinstance(head, nn.Linear):
            if not isinstance(small, nn.Linear):
                raise Incompatible(f"the base model has no layer {path}")
            if head.out_features == small.out_features:
                found.append((head, head.in_features / small.in_features))
    return found


def _width(name: str, parameter: nn.Parameter, base: tuple[int, ...], is_table: bool, is_head: bool) -> Width:
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        ratio = math.prod(shape) / math.prod(base)
        return Width(name, parameter, INPUT, 1.0, ratio, shape != base)
    written, read = shape[0] / base[0], math.prod(shape[1:]) / math.prod(base[1:])
    if is_table:  # a row is looked up, so the rows are what is read
        written, read = read, written
    is_reading = read != 1
    one_sided = (OUTPUT if is_head else READER) if is_reading else INPUT
    kind = HIDDEN if is_reading and written != 1 else one_sided
    return Width(name, parameter, kind, read, written, shape != base)


def embedding_tables(model: nn.Module) -> set[str]:
    """Return the names of the tables of all embeddings."""
    return _owned(model, [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)])


def tables(model: nn.Module) -> set[str]:
    """Return the names of the tables of embeddings and of the parameters of heads.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "mid": nn.Linear(4, 4)})
        >>> tables(model)
        {'embed.weight'}
    """
    return embedding_tables(model) | _owned(model, _head_layers(model))


def _head_layers(model: nn.Module) -> list[nn.Linear]:
    paths = output_heads(model)
    heads = [module for path, module in model.named_modules() if path in paths]
    inside = [[head] if isinstance(head, nn.Linear) else head.modules() for head in heads]
    return [layer for layers in inside for layer in layers if isinstance(layer, nn.Linear)]


def _owned(model: nn.Module, modules: Sequence[nn.Module]) -> set[str]:
    """Return the names of parameters that stand directly in modules, whatever stands below them."""
    owned = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


# The output multiplier --------------------------------------------------------------------------------


def divided(head: nn.Module, width: float) -> None:
    """Divide the input of a head by a width ratio, from now on.

    Args:
        head: a layer.
        width: what it reads, over that of the base.
    """
    if not hasattr(head, "width_ratio"):
        head.register_forward_pre_hook(_divide)
    head.width_ratio = width  # type: ignore[assignment]


def _divide(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] / head.width_ratio, *inputs[1:])  # type: ignore[operator]


def _divided_heads(model: nn.Module) -> set[str]:
    return _owned(model, [module for module in model.modules() if hasattr(module, "width_ratio")])
