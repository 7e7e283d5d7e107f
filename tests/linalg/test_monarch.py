"""The nearest Monarch matrix: optimal, exact where it can be, of rectangular sizes and blocks of any rank."""

import math

import pytest
import torch
from torch import Tensor

from rankfold.errors import InvalidOption
from rankfold.linalg import monarch_dense, monarch_projection
from rankfold.weights import Monarch, trained

# rows, columns, l, k, q
SIZES = [(16, 16, 4, 4, 4), (12, 20, 2, 4, 6), (18, 8, 3, 2, 6), (12, 20, 4, 2, 6), (9, 9, 3, 3, 4)]
each = pytest.mark.parametrize(("rows", "columns", "left", "right", "inner"), SIZES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_ranks(left: int, right: int, inner: int) -> Tensor:
    """How many inner channels every pair of blocks shares, counted one by one."""
    ranks = torch.zeros(left, right, dtype=torch.long)
    for channel in range(right * inner):
        ranks[channel % left, channel // inner] += 1
    return ranks


def blocks_of(matrix: Tensor, left: int, right: int) -> list[list[Tensor]]:
    return [list(matrix[i::left].chunk(right, 1)) for i in range(left)]


@each
def test_the_error_is_the_tail_of_every_block(
    rows: int, columns: int, left: int, right: int, inner: int
) -> None:
    matrix, ranks = normal(rows, columns), block_ranks(left, right, inner)
    found = monarch_projection(matrix, row_blocks=left, column_blocks=right, inner=inner)
    tail = sum(
        torch.linalg.svdvals(piece)[ranks[i, j] :].square().sum()
        for i, line in enumerate(blocks_of(matrix, left, right))
        for j, piece in enumerate(line)
    )
    assert found.error == pytest.approx(math.sqrt(tail))
    assert torch.linalg.vector_norm(matrix - found.dense()).item() == pytest.approx(found.error)
    if inner % left == 0:
        assert bool((ranks == inner // left).all())


@each
def test_a_monarch_matrix_is_its_own_projection(
    rows: int, columns: int, left: int, right: int, inner: int
) -> None:
    factors = normal(left, rows // left, right * inner // left), normal(right, inner, columns // right)
    matrix = monarch_dense(*factors)
    found = monarch_projection(matrix, row_blocks=left, column_blocks=right, inner=inner)
    torch.testing.assert_close(found.dense(), matrix)
    assert found.error < 1e-12 * torch.linalg.vector_norm(matrix)
    assert found.left.shape == factors[0].shape
    assert found.right.shape == factors[1].shape


@each
def test_nothing_near_the_projection_is_nearer_to_the_matrix(
    rows: int, columns: int, left: int, right: int, inner: int
) -> None:
    matrix = normal(rows, columns)
    found = monarch_projection(matrix, row_blocks=left, column_blocks=right, inner=inner)
    for seed in range(5):
        moved = monarch_dense(
            found.left + 0.05 * normal(*found.left.shape, seed=seed),
            found.right + 0.05 * normal(*found.right.shape, seed=seed + 9),
        )
        assert torch.linalg.vector_norm(matrix - moved) > found.error


@each
def test_the_factors_multiply_as_the_map_that_applies_them(
    rows: int, columns: int, left: int, right: int, inner: int
) -> None:
    """Two block-diagonal matrices and the permutation, written out."""
    factors = normal(left, rows // left, right * inner // left), normal(right, inner, columns // right)
    width, channels = rows // left, right * inner
    shuffled = torch.arange(channels).reshape(-1, left).T.flatten()
    outputs = torch.arange(rows).reshape(left, width).T.flatten()
    whole = (torch.block_diag(*factors[0]) @ torch.eye(channels).double()[shuffled])[outputs]
    matrix = whole @ torch.block_diag(*factors[1])
    torch.testing.assert_close(monarch_dense(*factors), matrix)
    weight = Monarch(trained(factors[0], "left"), trained(factors[1], "right"), (rows, columns))
    x = normal(7, columns, seed=5)
    torch.testing.assert_close(weight(x), x @ matrix.T)


def test_rank_one_is_monarch_and_rank_two_is_not() -> None:
    one = torch.outer(normal(16), normal(16, seed=1))
    two = one + torch.outer(normal(16, seed=2), normal(16, seed=3))
    assert monarch_projection(one, row_blocks=4, column_blocks=4).error < 1e-12
    assert monarch_projection(two, row_blocks=4, column_blocks=4).error > 0.1


def test_a_fourier_matrix_is_monarch_once_its_input_is_transposed() -> None:
    size = 5
    fourier = torch.fft.fft(torch.eye(size * size, dtype=torch.complex128), norm="ortho")
    order = torch.arange(size * size).reshape(size, size).T.flatten()
    found = monarch_projection(fourier[:, order], row_blocks=size, column_blocks=size)
    assert found.error < 1e-12
    torch.testing.assert_close(found.dense(), fourier[:, order])
    assert monarch_projection(fourier, row_blocks=size, column_blocks=size).error > 1


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidOption, match="16 rows cannot be cut into 3 blocks"):
        monarch_projection(normal(16, 16), row_blocks=3, column_blocks=4)
    with pytest.raises(InvalidOption, match="a multiple of row_blocks = 4"):
        monarch_projection(normal(16, 16), row_blocks=4, column_blocks=2, inner=3)
