"""The graph of a network's computation: what a hypernetwork that predicts its parameters looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InvalidOption

KINDS = ("input", "output", "weight", "bias", "gain", "rectifier", "operation")
FAR = 9  # longer ways, and nodes without a way, are alike
_RECTIFIERS = ("relu", "gelu", "silu", "leaky", "elu", "mish", "swish")


@dataclass(frozen=True)
class Node:
    """A parameter or an operation of a network.

    Attributes:
        kind: one of `KINDS`.
        name: of the parameter, or "" for an operation.
        shape: of the parameter.
        rectified: what it makes goes straight into a rectifier.
    """

    kind: str
    name: str = ""
    shape: tuple[int, ...] = ()
    rectified: bool = False


@dataclass(frozen=True)
class Graph:
    """The nodes of a network in their order, and how far it is from one to another.

    Attributes:
        nodes: in the order of the computation.
        distances: (n, n) steps from the row's node to the column's, at most `FAR`.
    """

    nodes: tuple[Node, ...]
    distances: Tensor


def graph_of(network: nn.Module) -> Graph:
    """Return the graph of a network, in which the parameters of a layer follow each other.

    Parameters that the network reads by themselves, such as positional encodings, are no nodes.

    Raises:
        InvalidOption: the network's forward cannot be traced symbolically, or calls no layer with parameters.

    Example:
        >>> graph = graph_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)))
        >>> [node.name or node.kind for node in graph.nodes]
        ['input', '0.weight', '0.bias', 'rectifier', '2.weight', 'output']
    """
    try:
        traced = torch.fx.symbolic_trace(network)
    except Exception as error:  # whatever the forward does that has no symbol
        raise InvalidOption(f"the graph of {type(network).__name__} cannot be traced: {error}") from None
    names = {id(p): name for name, p in network.named_parameters()}
    nodes: list[Node] = []
    edges: list[tuple[int, int]] = []
    last: dict[torch.fx.Node, int] = {}
    for step in traced.graph.nodes:
        made = list(_nodes_of(traced, step, names))
        first = len(nodes)
        nodes += made
        edges += [(i, i + 1) for i in range(first, first + len(made) - 1)]
        edges += [(last[source], first) for source in step.all_input_nodes]
        last[step] = len(nodes) - 1
    if not any(node.name for node in nodes):
        raise InvalidOption(
            f"the graph of {type(network).__name__} holds no parameter: its forward calls no layer with one"
        )
    return Graph(tuple(nodes), _distances(len(nodes), edges))


def _nodes_of(traced: torch.fx.GraphModule, step: torch.fx.Node, names: dict[int, str]) -> Iterator[Node]:
    """Yield the parameters of a layer, each once in a network, or the operation that a step is."""
    ends = {"placeholder": "input", "output": "output"}
    rectified = any(_is_rectifier(traced, user) for user in step.users)
    found = False
    if step.op == "call_module":
        for parameter in traced.get_submodule(str(step.target)).parameters():
            name = names.pop(id(parameter), "")
            if name:
                found = True
                yield Node(_kind(name, parameter), name, tuple(parameter.shape), rectified)
    if not found:
        operation = "rectifier" if _is_rectifier(traced, step) else "operation"
        yield Node(ends.get(step.op, operation))


def _kind(name: str, parameter: Tensor) -> str:
    if parameter.dim() > 1:
        return "weight"
    return "gain" if name.rpartition(".")[2].startswith("weight") else "bias"


def _is_rectifier(traced: torch.fx.GraphModule, step: torch.fx.Node) -> bool:
    if step.op == "call_module":
        word = type(traced.get_submodule(str(step.target))).__name__
    else:
        word = getattr(step.target, "__name__", str(step.target))
    return step.op.startswith("call") and any(known in word.lower() for known in _RECTIFIERS)


def _distances(count: int, edges: list[tuple[int, int]]) -> Tensor:
    """Return the shortest ways; an edge always leads to a later node."""
    distances = torch.full((count, count), FAR)
    distances.fill_diagonal_(0)
    for start, end in sorted(edges, key=lambda edge: edge[1]):
        distances[:, end] = torch.minimum(distances[:, end], (distances[:, start] + 1).clamp(max=FAR))
    return distances
