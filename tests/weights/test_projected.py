"""Pieces of one projection: the fast transform, its adjoint, and what is formed once and shared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankfold.weights import Fastfood, Fixed, Projected, Projection, Weight
from rankfold.weights.projected import walsh_hadamard

SHORT, SIZES = 5, (12, 20, 3)
TOTAL = sum(SIZES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fastfood(out: int = TOTAL, columns: int = SHORT, seed: int = 1) -> Fastfood:
    size = 1 << (out - 1).bit_length()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return Fastfood(
        Fixed(draw(size, seed=seed), "g"), signs, torch.randperm(size, generator=generator), (out, columns)
    )


def sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class Held(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(value)


def readers(matrix: Weight | None = None) -> tuple[Held, list[Projected]]:
    holder, projection = Held(draw(SHORT, seed=2)), Projection(matrix or fastfood(), SIZES)
    shapes = [(3, 4), (4, 5), (3, 1)]
    leaves = [Projected(holder, "theta", f"p{i}", s, projection, i) for i, s in enumerate(shapes)]
    return holder, leaves


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_fast_transform_is_the_orthogonal_walsh_hadamard_matrix(size: int) -> None:
    x = draw(3, size)
    torch.testing.assert_close(walsh_hadamard(x), x @ sylvester(size) / math.sqrt(size))
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x)


def test_the_fast_transform_of_large_half_precision_numbers_does_not_overflow() -> None:
    assert walsh_hadamard(torch.full((4096,), 500.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("out", [TOTAL, 64])
def test_fastfood_is_the_product_of_its_five_factors(out: int) -> None:
    matrix, size = fastfood(out), 64
    hadamard, order = sylvester(size), torch.eye(size, dtype=torch.float64)[matrix.order.long()]
    normal = torch.diag(matrix.normal.tensor())
    whole = hadamard @ normal @ order @ hadamard @ torch.diag(matrix.signs.double())
    norm = math.sqrt(size * float(matrix.normal.tensor().square().sum())) * math.sqrt(out / size)
    torch.testing.assert_close(matrix.dense(), whole[:out, :SHORT] / norm)


def test_the_transpose_of_fastfood_is_its_adjoint() -> None:
    matrix = fastfood()
    torch.testing.assert_close(matrix.T(torch.eye(TOTAL, dtype=torch.float64)).T, matrix.dense().T)
    torch.testing.assert_close(matrix.T.dense(), matrix.dense().T)
    assert matrix.T.T is matrix


@pytest.mark.parametrize("matrix", [fastfood, lambda: Fixed(draw(TOTAL, SHORT), "P")], ids=["fast", "dense"])
def test_pieces_and_their_gradients_are_those_of_the_matrix(matrix: Callable[[], Weight]) -> None:
    holder, leaves = readers(matrix())
    whole = torch.cat([leaf.dense().flatten() for leaf in leaves])
    projection = leaves[0].projection.matrix.dense()
    torch.testing.assert_close(whole, projection @ holder.theta)
    grad = draw(TOTAL, seed=4)
    (actual,) = torch.autograd.grad(whole, holder.theta, grad)
    torch.testing.assert_close(actual, projection.T @ grad)


def test_a_piece_that_is_not_used_takes_no_part_in_the_gradient() -> None:
    holder, leaves = readers()
    (actual,) = torch.autograd.grad(leaves[1].dense().sum(), holder.theta)
    rows = leaves[0].projection.matrix.dense()[12:32]
    torch.testing.assert_close(actual, rows.sum(0))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    plain = Projection.form

    def form(self: Projection, short: Tensor) -> object:
        calls.append(1)
        return plain(self, short)

    monkeypatch.setattr(Projection, "form", form)
    return calls


def test_all_pieces_are_formed_once_until_the_vector_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, leaves = readers()
    calls = counted(monkeypatch)
    for _ in range(2):
        sum(leaf.dense().square().sum() for leaf in leaves).backward()  # type: ignore[union-attr]
    assert len(calls) == 1  # one graph serves both backwards
    with torch.no_grad():
        assert not any(leaf.dense().requires_grad for leaf in leaves)
    assert len(calls) == 1
    holder.theta.data.add_(1)  # which raises no version
    changed = leaves[0].dense().flatten()
    assert len(calls) == 2
    torch.testing.assert_close(changed, (leaves[0].projection.matrix.dense() @ holder.theta)[:12])


def test_what_was_formed_without_gradients_is_not_used_where_they_are_wanted() -> None:
    holder, leaves = readers()
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            leaves[0].dense()
        leaves[0].dense().sum().backward()
        assert holder.theta.grad is not None
        holder.theta.grad = None
        holder.theta.data.add_(1)


def test_what_was_formed_in_inference_mode_is_not_used_outside() -> None:
    holder, leaves = readers()
    holder.requires_grad_(False)
    with torch.inference_mode():
        leaves[0].dense()
    x = draw(2, 4).requires_grad_()
    (x @ leaves[0].dense().T).sum().backward()
    assert x.grad is not None


def test_a_replaced_vector_is_read_anew() -> None:
    holder, leaves = readers()
    before = leaves[0].dense()
    holder.theta = nn.Parameter(2 * holder.theta.detach())
    torch.testing.assert_close(leaves[0].dense(), 2 * before)
    twin = copy.deepcopy(nn.ModuleList([holder, *leaves]))
    assert isinstance(twin[1], Projected)
    torch.testing.assert_close(twin[1].dense(), leaves[0].dense())


def test_under_autocast_the_projection_keeps_its_precision() -> None:
    holder, leaves = readers(Fixed(draw(TOTAL, SHORT).float(), "P"))
    holder.float()
    with torch.autocast("cpu", torch.bfloat16):
        piece = leaves[0].dense()
        piece.sum().backward()
    assert piece.dtype == torch.float32
    wanted = leaves[0].projection.matrix.dense()[:12]
    assert holder.theta.grad is not None
    torch.testing.assert_close(holder.theta.grad, wanted.sum(0))
