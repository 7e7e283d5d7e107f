"""Block-diagonal and Kronecker products are those of their matrices, small blocks put together or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rankfold.weights import BlockDiagonal, Kronecker, Weight, trained
from rankfold.weights.blockwise import rotated_linear
from rankfold.weights.orthogonal import Cayley


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(function: Callable[[], Tensor], tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((function() * weights).sum(), tensors, create_graph=True))


def assert_is_its_matrix(weight: Weight, tokens: int, *, twice: bool = True) -> None:
    x = normal(tokens, weight.shape[1], seed=1).requires_grad_()
    toward = normal(tokens, weight.shape[0], seed=2)
    tensors = [x, *weight.parameters()]
    ours, theirs = (gradients(f, tensors, toward) for f in (lambda: weight(x), lambda: x @ weight.dense().T))
    torch.testing.assert_close(weight(x), x @ weight.dense().T)
    torch.testing.assert_close(ours, theirs)
    if not twice:
        return
    second = [sum(g.square().sum() for g in found) for found in (ours, theirs)]
    for actual, wanted in zip(*(torch.autograd.grad(s, tensors) for s in second), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("tokens", [1, 31, 32, 50])
@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        ((12, 4, 4), (48, 48)),
        ((11, 3, 5), (33, 55)),  # eleven blocks do not fill the last one of those that are put together
        ((11, 3, 5), (31, 51)),  # cropped within the last block
        ((11, 3, 5), (33, 38)),  # the last blocks meet no input at all
        ((3, 40, 2), (120, 6)),
    ],
)
def test_blocks_are_their_matrix(blocks: tuple[int, int, int], shape: tuple[int, int], tokens: int) -> None:
    assert_is_its_matrix(BlockDiagonal(trained(normal(*blocks)), shape), tokens)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_kronecker_product_is_its_matrix(tokens: int) -> None:
    product = Kronecker(trained(normal(3, 4), "a"), trained(normal(5, 2), "b"))
    assert_is_its_matrix(product, tokens)
    assert_is_its_matrix(product @ trained(normal(8, 7), "c"), tokens, twice=False)
    assert_is_its_matrix(trained(normal(7, 15), "c") @ (product + product), tokens, twice=False)


@pytest.mark.parametrize("tokens", [2, 64])
def test_a_rotated_weight_is_applied_as_its_matrix(tokens: int) -> None:
    weight, blocks = normal(10, 24), normal(6, 4, 4, seed=3).requires_grad_()
    x, bias, toward = normal(tokens, 24, seed=4).requires_grad_(), normal(10), normal(tokens, 10, seed=5)
    weight.requires_grad_()

    def plain() -> Tensor:
        matrix: Tensor = weight @ torch.block_diag(*blocks)
        return x @ matrix.T + bias

    def ours() -> Tensor:
        return rotated_linear(x, weight, bias, blocks)

    torch.testing.assert_close(ours(), plain())
    tensors = [x, weight, blocks]
    torch.testing.assert_close(gradients(ours, tensors, toward), gradients(plain, tensors, toward))


def test_the_gradient_of_a_rotation_is_that_of_finite_differences() -> None:
    leaf = trained(normal(2, 6))
    rotations = Cayley(leaf, 4, "rotations")
    identity = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    torch.testing.assert_close(rotations.tensor() @ rotations.tensor().mT, identity)
    assert torch.autograd.gradcheck(lambda _: rotations.tensor(), leaf.value)
    assert torch.autograd.gradgradcheck(lambda _: rotations.tensor(), leaf.value)


@pytest.mark.parametrize("kind", ["blocks", "kronecker"])
def test_what_leaves_make_gets_the_gradient_that_it_has_in_the_output(kind: str) -> None:
    weight: Weight = BlockDiagonal(trained(normal(12, 4, 4)))
    if kind == "kronecker":
        weight = -2.0 * Kronecker(trained(normal(6, 4), "a"), trained(normal(8, 12), "b"))
    x, toward = normal(50, 48, seed=1), normal(50, 48, seed=2)
    pulled = list(weight.pull(x, toward))
    assert math.prod(pulled[0][0].shape) < 50 * 48, "the output itself was computed"
    parameters = list(weight.parameters())
    ours = torch.autograd.grad([t for t, _ in pulled], parameters, [g for _, g in pulled])
    torch.testing.assert_close(list(ours), gradients(lambda: weight(x), parameters, toward))
