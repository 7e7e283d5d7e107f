"""Every structured map has the matrix that its documentation states, formed here without the library."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankfold import weights as w
from rankfold.weights import LINEAR, Convolution, Leaf, Weight, trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(*shape: int, seed: int = 0) -> Leaf:
    return trained(normal(*shape, seed=seed), f"leaf{seed}")


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_reflections_are_the_householder_matrices_multiplied_in_the_order_of_their_vectors(
    count: int,
) -> None:
    vectors = normal(5, count)
    product = torch.eye(5, dtype=torch.float64)
    for u in vectors.T:
        product = product @ (torch.eye(5, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
    reflections = w.Reflections(trained(vectors, "u"))
    assert close(reflections.dense(), product)
    assert close(reflections.T.dense(), torch.linalg.inv(product))
    x = normal(4, 5, seed=1)
    assert close(reflections(x), x @ product.T)
    assert close(reflections.T(x), x @ product)


def test_more_reflections_than_dimensions_are_still_their_product() -> None:
    reflections = w.Reflections(leaf(3, 7))
    matrix = reflections.dense()
    assert close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64))
    assert math.isclose(torch.linalg.det(matrix).item(), -1.0, rel_tol=1e-9)


def test_equal_neighbouring_reflections_cancel() -> None:
    vectors = normal(6, 2).repeat_interleave(2, dim=1)
    assert close(w.Reflections(trained(vectors, "u")).dense(), torch.eye(6, dtype=torch.float64))


def test_the_length_of_a_reflection_vector_does_not_matter() -> None:
    vectors = normal(6, 3)
    scaled = trained(vectors * torch.tensor([1e-3, 1.0, 1e3]), "u")
    assert close(w.Reflections(scaled).dense(), w.Reflections(trained(vectors, "u")).dense())


@pytest.mark.parametrize(
    ("left", "right"), [((2, 3), (4, 5)), ((1, 2), (2, 1)), ((3, 1), (1, 3)), ((1, 1), (2, 2))]
)
def test_a_kronecker_product_is_that_of_torch(left: tuple[int, int], right: tuple[int, int]) -> None:
    a, b = normal(*left), normal(*right, seed=1)
    expression = w.Kronecker(trained(a, "a"), trained(b, "b"))
    assert close(expression.dense(), torch.kron(a, b))
    x = normal(3, left[1] * right[1], seed=2)
    assert close(expression(x), x @ torch.kron(a, b).T)


def test_a_kronecker_product_of_transposes_is_the_transpose() -> None:
    a, b = normal(1, 2), normal(2, 3, seed=1)
    expression = w.Kronecker(trained(a, "a").T, trained(b, "b").T)
    assert close(expression.dense(), torch.kron(a, b).T)


def test_a_tucker_map_of_a_linear_layer_is_core_times_two_factors() -> None:
    core, up, down = normal(2, 3), normal(5, 2, seed=1), normal(7, 3, seed=2)
    expression = w.Tucker(trained(core, "core"), [trained(up, "out"), trained(down, "in")])
    assert close(expression.dense(), up @ core @ down.T)


def _tucker_of_a_kernel() -> tuple[w.Tucker, Tensor]:
    core, factors = normal(2, 3, 2, 1), [normal(5, 2, seed=1), normal(4, 3, seed=2), normal(3, 2, seed=3)]
    factors.append(normal(2, 1, seed=4))
    kernel = torch.einsum("abcd,oa,ib,hc,wd->oihw", core, *factors)
    leaves = [trained(factor, f"u{i}") for i, factor in enumerate(factors)]
    return w.Tucker(trained(core, "core"), leaves), kernel


def test_a_tucker_map_of_a_kernel_is_the_einsum_over_every_mode() -> None:
    expression, kernel = _tucker_of_a_kernel()
    assert close(expression.dense(), kernel.flatten(1))


def test_a_tucker_map_on_a_convolution_is_the_convolution_with_its_kernel() -> None:
    expression, kernel = _tucker_of_a_kernel()
    op = Convolution((3, 2), (2, 1), (1, 0), (1, 1))
    x, bias = normal(2, 4, 6, 5, seed=5), normal(5, seed=6)
    wanted = torch.nn.functional.conv2d(x, kernel, bias, (2, 1), (1, 0))
    assert close(expression(x, bias, op), wanted)


def test_a_tucker_map_is_one_small_pair_unless_it_is_a_kernel() -> None:
    kernel, _ = _tucker_of_a_kernel()
    assert kernel.small_rank() is None  # that pair would mix all channels at every place of the window
    up, down = kernel.factored()
    assert close(up @ down, kernel.dense())
    core, up, down = normal(2, 3), normal(5, 2, seed=1), normal(7, 3, seed=2)
    matrix = w.Tucker(trained(core, "core"), [trained(up, "out"), trained(down, "in")])
    pair = matrix.factored()
    assert pair is not None
    assert matrix.small_rank() == pair[0].shape[1] == 2
    assert close(pair[0] @ pair[1], matrix.dense())


def test_a_tensor_train_is_the_contraction_of_its_cores() -> None:
    shapes = [(1, 2, 3), (3, 3, 2), (2, 4, 3), (3, 2, 1)]
    tensors = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    full = torch.einsum("aob,bpc,cid,dje->opij", *tensors)
    expression = w.TensorTrain([trained(t, f"c{i}") for i, t in enumerate(tensors)], outputs=2)
    assert expression.shape == (6, 8)
    assert close(expression.dense(), full.reshape(6, 8))
    up, down = expression.factored()
    assert up.shape == (6, 2)
    assert close(up @ down, full.reshape(6, 8))


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_tensor_train_may_be_cut_after_its_first_or_before_its_last_core(outputs: int) -> None:
    tensors = [normal(1, 2, 2), normal(2, 3, 2, seed=1), normal(2, 2, 3, seed=2), normal(3, 4, 1, seed=3)]
    full = torch.einsum("aob,bpc,cqd,die->opqi", *tensors)
    expression = w.TensorTrain([trained(t, f"c{i}") for i, t in enumerate(tensors)], outputs)
    assert close(expression.dense(), full.reshape(expression.shape))


@pytest.mark.parametrize(("k", "rank"), [(1, 2), (2, 2), (3, 1)])
def test_a_block_of_a_grid_is_its_slice_of_up_times_its_slice_of_down(k: int, rank: int) -> None:
    rows, columns = 2, 4
    up, down = normal(k, rows, k * rank), normal(k, k * rank, columns, seed=1)
    matrix = w.Grid(trained(up, "up"), trained(down, "down")).dense()
    assert matrix.shape == (k * rows, k * columns)
    for j in range(k):
        for n in range(k):
            block = up[j, :, n * rank : (n + 1) * rank] @ down[n, j * rank : (j + 1) * rank, :]
            at = matrix[j * rows : (j + 1) * rows, n * columns : (n + 1) * columns]
            assert close(at, block)


def test_block_diagonals_are_cropped_to_the_weight() -> None:
    blocks = normal(2, 3, 4)
    full = torch.block_diag(*blocks)
    assert close(w.BlockDiagonal(trained(blocks, "d")).dense(), full)
    cropped = w.BlockDiagonal(trained(blocks, "d"), (5, 7))
    assert close(cropped.dense(), full[:5, :7])
    x = normal(3, 7, seed=1)
    assert close(cropped(x), x @ full[:5, :7].T)


@pytest.mark.parametrize("entries", [1, 3, 30])
def test_a_sparse_map_has_its_values_at_their_places_and_zeros_elsewhere(entries: int) -> None:
    place = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:entries]
    values, matrix = normal(entries), torch.zeros(64, dtype=torch.float64)
    matrix[place] = values
    matrix = matrix.reshape(8, 8)
    expression = w.Sparse(trained(values, "v"), place // 8, place % 8, (8, 8))
    x = normal(5, 8, seed=1)
    assert close(expression.dense(), matrix)
    assert close(expression(x), x @ matrix.T)
    assert close(expression.T(x), x @ matrix)


def test_a_selection_takes_channels_and_its_transpose_adds_them_back() -> None:
    index, x = torch.tensor([2, 0, 2]), normal(4, 5)
    select = w.Select(index, 5)
    assert torch.equal(select(x), x[:, index])
    scattered = torch.zeros(4, 5, dtype=torch.float64)
    scattered[:, 0], scattered[:, 2] = x[:, 1], x[:, 0] + x[:, 2]
    assert close(select.T(x[:, :3]), scattered)


def test_the_transpose_of_a_permutation_undoes_it() -> None:
    permutation, x = w.Permutation(torch.tensor([3, 1, 0, 2])), normal(2, 4)
    assert torch.equal(permutation.T(permutation(x)), x)
    assert torch.equal((permutation.dense() @ permutation.T.dense()), torch.eye(4))


def _row_normalised(direction: Tensor, magnitude: Tensor) -> Tensor:
    rows = [
        m * row / row.norm() if bool(row.any()) else row for row, m in zip(direction, magnitude, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_normalised_map_has_rows_of_the_length_of_its_magnitude_and_leaves_zero_rows_zero(
    rank: int,
) -> None:
    base, magnitude = normal(4, 6), normal(4, seed=1)
    base[1] = 0
    up, down = normal(4, rank, seed=2), normal(rank, 6, seed=3)
    up[1] = 0
    direction: Weight = w.frozen(base, "base")
    if rank:
        direction = direction + trained(up, "up") @ trained(down, "down")
    expression = w.Normalized(direction, trained(magnitude, "m"))
    expected = _row_normalised(base + up @ down, magnitude)
    x = normal(3, 6, seed=4)
    assert close(expression.dense(), expected)
    assert close(expression(x), x @ expected.T)
    assert not expected[1].any()
    gradients = torch.autograd.grad(expression(x).sum(), list(expression.parameters()))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("detach", [True, False])
def test_the_norm_is_a_constant_for_the_gradient_only_where_it_is_detached(detach: bool) -> None:
    base, up, down = normal(4, 6), normal(4, 2, seed=2), normal(2, 6, seed=3)
    up_leaf, magnitude = trained(up, "up"), normal(4, seed=1)
    direction = w.frozen(base, "base") + up_leaf @ trained(down, "down")
    expression = w.Normalized(direction, trained(magnitude, "m"), detach=detach)
    free = up.clone().requires_grad_()
    rows = base + free @ down
    norm = rows.norm(dim=1, keepdim=True)
    wanted = magnitude[:, None] * rows / (norm.detach() if detach else norm)
    x, probe = normal(3, 6, seed=4), normal(3, 4, seed=5)
    (expected,) = torch.autograd.grad((x @ wanted.T * probe).sum(), free)
    (actual,) = torch.autograd.grad((expression(x) * probe).sum(), up_leaf.tensor())
    assert close(actual, expected)


def test_columns_are_brought_to_their_lengths() -> None:
    base, magnitude = normal(4, 6), normal(6, seed=1)
    up, down = trained(normal(4, 2, seed=2), "up"), trained(normal(2, 6, seed=3), "down")
    expression = w.ColumnNormalized(w.frozen(base, "base") + up @ down, trained(magnitude, "m"))
    matrix = base + up.tensor() @ down.tensor()
    expected = magnitude * matrix / matrix.norm(dim=0)
    x, ids = normal(3, 4, 6, seed=4), torch.tensor([2, 0])
    assert close(expression.dense(), expected)
    assert close(expression(x), x @ expected.T)
    assert close(expression.rows(ids), expected[ids])
    with torch.no_grad():
        assert close(expression.rows(ids), expected[ids])
        assert close(expression(x), x @ expected.T)


def test_row_norms_are_those_of_the_product_that_is_never_formed() -> None:
    base, up, down = normal(5, 7), normal(5, 2, seed=1), normal(2, 7, seed=2)
    assert close(w.row_norms(base, (up, down)), (base + up @ down).norm(dim=1))
    assert close(w.row_norms(base, None), base.norm(dim=1))


def test_row_norms_of_half_precision_weights_are_in_float32() -> None:
    base, up, down = normal(5, 70).bfloat16(), normal(5, 2, seed=1).float(), normal(2, 70, seed=2).float()
    norms = w.row_norms(base, (up, down))
    assert norms.dtype == torch.float32
    assert torch.allclose(norms, (base.float() + up @ down).norm(dim=1), rtol=1e-2)


def test_a_modulated_map_scales_every_entry_by_one_plus_the_change() -> None:
    base, change = normal(4, 5), normal(4, 5, seed=1)
    expression = w.Modulated(trained(base, "base"), trained(change, "change"))
    assert close(expression.dense(), base * (1 + change))


def test_a_hadamard_product_of_two_products_is_the_khatri_rao_product_of_their_factors() -> None:
    left, right = leaf(4, 2) @ leaf(2, 5, seed=1), leaf(4, 3, seed=2) @ leaf(3, 5, seed=3)
    up, down = (left * right).factored()
    assert (up.shape, down.shape) == ((4, 6), (6, 5))
    assert close(up @ down, left.dense() * right.dense())


def test_leaves_read_what_their_source_says() -> None:
    pool, bank, coefficients = normal(6), normal(3, 2, 4, seed=1), normal(3, seed=2)
    holder = torch.nn.Module()
    holder.register_buffer("pool", pool)
    index, weight = torch.tensor([[0, 5], [5, 1]]), normal(2, 2, seed=3)
    assert torch.equal(w.Pooled(holder, "pool", "p", (2, 2), index).tensor(), pool[index])
    assert torch.equal(w.Pooled(holder, "pool", "p", (2, 2), index, weight).tensor(), pool[index] * weight)
    assert torch.equal(w.Pooled(holder, "pool", "p", (4,)).tensor(), pool[:4])
    mixture = w.Mixture(trained(coefficients, "c"), w.frozen(bank, "bank"), "mix")
    assert close(mixture.tensor(), sum(c * b for c, b in zip(coefficients, bank, strict=True)))
    mask = torch.tensor([[True, False], [False, True]])
    assert torch.equal(w.Masked(trained(weight, "v"), mask, "masked").tensor(), weight * mask)
    halves = trained(weight, "first"), w.frozen(weight[:1], "second")
    assert torch.equal(w.Joined(*halves, 0, "joined").tensor(), torch.cat([weight, weight[:1]]))
    assert w.Joined(*halves, 0, "joined").trainable
    assert torch.equal(w.Seeded("s", (3, 2), 7).tensor(), w.Seeded("s", (3, 2), 7).tensor())
    assert not torch.equal(w.Seeded("s", (3, 2), 7).tensor(), w.Seeded("s", (3, 2), 8).tensor())


def test_shapes_that_do_not_meet_are_refused_when_the_expression_is_built() -> None:
    with pytest.raises(ValueError, match="the shapes differ"):
        leaf(2, 3) + leaf(3, 2)
    with pytest.raises(ValueError, match="do not meet"):
        leaf(2, 3) @ leaf(2, 3)
    with pytest.raises(ValueError, match="entrywise"):
        leaf(2, 3) * leaf(3, 2)


def test_two_leaves_of_one_name_cannot_be_saved() -> None:
    with pytest.raises(ValueError, match="two leaves are called 'up'"):
        w.owned(trained(normal(2, 2), "up") @ trained(normal(2, 2), "up"))
    with pytest.raises(KeyError, match="no leaf 'core'"):
        (leaf(2, 2) @ leaf(2, 2, seed=1)).leaf("core")


def test_a_formula_reads_like_the_equation() -> None:
    base, up, down = w.frozen(normal(4, 3), "W0"), trained(normal(4, 2), "up"), trained(normal(2, 3), "down")
    assert repr(base + 0.5 * (up @ down)) == "W0[4x3] + 0.5 (up*[4x2] @ down*[2x3])"
    assert repr(base - up @ down) == "W0[4x3] - (up*[4x2] @ down*[2x3])"
    assert repr((base + up @ down).T @ base) == "(W0[4x3]^T + down*[2x3]^T @ up*[4x2]^T) @ W0[4x3]"
    assert repr(w.Modulated(base, up @ down)) == "W0[4x3] . (1 + up*[4x2] @ down*[2x3])"


def test_the_default_op_is_a_linear_map_over_the_last_axis() -> None:
    x, matrix = normal(2, 3, 4), normal(5, 4, seed=1)
    assert close(LINEAR.apply(x, matrix), x @ matrix.T)
    assert LINEAR.tokens(x) == 6
