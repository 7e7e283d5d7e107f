"""How much a network changed while it learned: rich learning moves what it represents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InvalidOption

Read = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Laziness:
    """Measures of learning, after training against the start; all alignments are 1 where nothing changed.

    Attributes:
        weight_change: Frobenius norm of the change of the weights.
        representation_alignment: of the similarity of samples in the hidden states.
        kernel_alignment: of the tangent kernels.
        sign_similarity: share of hidden states that kept their sign.
    """

    weight_change: float
    representation_alignment: float
    kernel_alignment: float
    sign_similarity: float


def laziness(
    trained: nn.Module, start: nn.Module, *, hidden: Read, output: Read, weights: Sequence[str]
) -> Laziness:
    """Compare a trained model with a copy of its start, on inputs that both functions put in.

    Liu et al. 2023.

    Args:
        trained: the model.
        start: the same as it was before training, such as a deep copy.
        hidden: `hidden(model)` returns hidden states (samples, units) of probing inputs.
        output: `output(model)` returns outputs (samples, ...) of probing inputs, with a graph.
        weights: names of the parameters that are compared and that the tangent kernel is taken in, such as
            the recurrent weights.

    Raises:
        InvalidOption: a model has no parameter of a name.
    """
    after, before = (_named(model, weights) for model in (trained, start))
    with torch.no_grad():
        states = hidden(trained), hidden(start)
    kernels = (
        tangent_kernel(output(trained), list(after.values())),
        tangent_kernel(output(start), list(before.values())),
    )
    return Laziness(
        weight_change(after, before),
        representation_alignment(*states),
        kernel_alignment(*kernels),
        sign_similarity(*states),
    )


def weight_change(trained: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return `|W - W0|_F` over all tensors together."""
    squares = [(trained[name].detach() - start[name].detach()).double().square().sum() for name in start]
    return float(torch.stack(squares).sum().sqrt())


def representation_alignment(trained: Tensor, start: Tensor) -> float:
    """Return `Tr(R R0) / (|R|_F |R0|_F)`, `R = H H^T`, of hidden states H (samples, units)."""
    now, then = trained.detach().double(), start.detach().double()
    return kernel_alignment(now @ now.T, then @ then.T)


def kernel_alignment(trained: Tensor, start: Tensor) -> float:
    """Return `<K, K0> / (|K| |K0|)` of two kernels of one shape."""
    now, then = trained.detach().double().flatten(), start.detach().double().flatten()
    return float(now @ then / (now.norm() * then.norm()))


def tangent_kernel(outputs: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return `K_ab = <d y_a / d W, d y_b / d W>` over all entries y of the outputs.

    Args:
        outputs: of any shape, n entries, with a graph; each takes one backward.
        weights: the tensors W.

    Returns:
        (n, n).

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.zeros(2, requires_grad=True)
        >>> tangent_kernel(x @ w, [w])  # of a linear map that is the inputs' own
        tensor([[5., 6.],
                [6., 9.]])
    """
    rows = []
    for entry in outputs.flatten():
        found = torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def sign_similarity(trained: Tensor, start: Tensor) -> float:
    """Return the share of entries that have the sign that they had, zero being a sign of its own."""
    return float((trained.sign() == start.sign()).double().mean())


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    known: dict[str, Tensor] = dict(model.named_parameters())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InvalidOption(f"weights must name parameters of the model, and {unknown or 'nothing'} does not")
    return {name: known[name] for name in names}
