"""Single adapted layers, and what the property tests ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.weights import Weight
from rankfold.weights.leaves import owned


def linear(out: int = 6, columns: int = 8, *, seed: int = 0, rank: int | None = None) -> nn.Module:
    """Return a model of one linear layer in float64, of lower rank on request."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(columns, out)).double()
        if rank is not None:
            model[0].weight.data = torch.randn(out, rank).double() @ torch.randn(rank, columns).double()
    return model


def convolution(out: int = 6, channels: int = 4, window: tuple[int, int] = (3, 2)) -> nn.Module:
    """Return a model of one convolution in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(channels, out, window)).double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Return a normal tensor in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disturbed(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Add noise to everything that trains: at a zero start many mistakes cannot be seen."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trained(model).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def count(model: nn.Module) -> int:
    """Return how many numbers train."""
    return sum(p.numel() for p in trained(model).values())


def expression_of(model: nn.Module, path: str = "0") -> Weight:
    """Return the expression of an adapted layer."""
    expression: Weight = model.get_submodule(path).expression  # type: ignore[assignment]
    return expression


def leaves_of(model: nn.Module, path: str = "0") -> Mapping[str, Tensor]:
    """Return the tensors that an adapted layer owns, by the method's own names."""
    return {name: getattr(module, key) for name, (module, key) in owned(expression_of(model, path)).items()}


def base(model: nn.Module, path: str = "0") -> Tensor:
    """Return the stored weight as a matrix."""
    matrix: Tensor = model.get_submodule(path).matrix().detach()  # type: ignore[operator]
    return matrix


def change(model: nn.Module, path: str = "0") -> Tensor:
    """Return W - W0."""
    return expression_of(model, path).dense().detach() - base(model, path)


def rank_of(matrix: Tensor) -> int:
    """Return the rank, counting singular values above a millionth of the largest."""
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-6 * values[0]).sum())


def backward(model: nn.Module, x: Tensor) -> Tensor:
    """Run backward from a fixed function of the output; return the gradient at the weight, (out, in)."""
    model.zero_grad()
    y = model(x)
    weights = normal(*y.shape, seed=3)
    (y * weights).sum().backward()
    return weights.flatten(0, -2).T @ x.detach().flatten(0, -2)


def sgd_step(model: nn.Module, rate: float) -> None:
    """Take one plain step along the gradients that are there."""
    for parameter in trained(model).values():
        assert parameter.grad is not None
        parameter.data -= rate * parameter.grad


def adapted(method: str | rf.Recipe, model: nn.Module | None = None, **arguments: Any) -> nn.Module:
    """Adapt a model of one layer."""
    return rf.adapt(linear() if model is None else model, method, targets=["0"], **arguments)
