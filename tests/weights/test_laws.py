"""Laws that hold for every expression of the language."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from expressions import Maker, expressions
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.weights import ColumnNormalized, Dropped, Leaf, Normalized, Tucker, Weight, trained

TOLERANCE = 1e-8


@pytest.fixture(autouse=True, scope="module")
def _selections_in_float64() -> Iterator[None]:
    """A selection has no numbers of its own; its matrix is of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    scale = max(1e-3, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert (actual.double() - expected.double()).abs().le(tolerance * scale).all()


def sources(weight: Weight) -> list[Tensor]:
    """The tensors that gradients are asked for: parameters, and pools that stand outside the expression."""
    found = [p for p in weight.parameters() if p.requires_grad]
    for leaf in weight.sources():
        if hasattr(leaf, "pool") and leaf.pool().requires_grad:
            found.append(leaf.pool())
        found += [p for p in leaf.parameters() if p.requires_grad]
    return list({id(t): t for t in found}.values())


def is_well_conditioned(weight: Weight) -> bool:
    """Whether no row or column is normalised that cancellation left with little but rounding."""
    with torch.no_grad():
        for module in weight.modules():
            if isinstance(module, Normalized):
                axis = 0 if isinstance(module, ColumnNormalized) else 1
                norms = torch.linalg.vector_norm(module.direction.dense(), dim=axis)
                if norms.numel() and bool((norms < 1e-3 * (1 + norms.max())).any()):
                    return False
    return True


LEADING = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (60,)])


@given(expressions(), LEADING)
@settings(max_examples=250)
def test_applying_an_expression_is_multiplying_by_its_matrix_forward_and_backward(
    weight: Weight, leading: tuple[int, ...]
) -> None:
    assume(is_well_conditioned(weight))
    x = normal(*leading, weight.shape[1]).requires_grad_()
    output, expected = weight(x), x @ weight.dense().T
    assert_close(output, expected)
    tensors, probe = [x, *sources(weight)], normal(*output.shape)
    wanted = torch.autograd.grad((expected * probe).sum(), tensors, allow_unused=True)
    actual = torch.autograd.grad((output * probe).sum(), tensors, allow_unused=True)
    for a, e, tensor in zip(actual, wanted, tensors, strict=True):
        zero = torch.zeros_like(tensor)
        assert_close(zero if a is None else a, zero if e is None else e)


@given(expressions(), LEADING)
def test_without_gradients_the_second_call_says_the_same_as_the_first(
    weight: Weight, leading: tuple[int, ...]
) -> None:
    assume(is_well_conditioned(weight))
    x = normal(*leading, weight.shape[1])
    with torch.no_grad():
        first, second, expected = weight(x), weight(x), x @ weight.dense().T
    assert_close(first, expected)
    assert torch.equal(first, second)


@given(expressions())
def test_the_bias_is_added_to_the_output(weight: Weight) -> None:
    assume(is_well_conditioned(weight))
    x, bias = normal(4, weight.shape[1]), normal(weight.shape[0])
    assert_close(weight(x, bias), weight(x) + bias)


@given(expressions())
def test_the_transpose_is_the_transposed_matrix(weight: Weight) -> None:
    assume(is_well_conditioned(weight))
    matrix, x = weight.dense(), normal(3, weight.shape[0])
    assert weight.T.shape == (weight.shape[1], weight.shape[0])
    assert_close(weight.T.dense(), matrix.T)
    assert_close(weight.T(x), x @ matrix)
    assert_close(weight.T.T.dense(), matrix)


@given(expressions(), st.lists(st.integers(0, 10**6), max_size=4))
def test_rows_are_those_of_the_matrix(weight: Weight, numbers: list[int]) -> None:
    assume(is_well_conditioned(weight))
    ids = torch.tensor([n % weight.shape[0] for n in numbers], dtype=torch.long)
    assert_close(weight.rows(ids), weight.dense()[ids])
    assert_close(weight.rows(ids[None]), weight.dense()[ids[None]])


@given(expressions())
@settings(max_examples=200)
def test_the_small_form_multiplies_to_the_matrix_and_has_the_rank_that_is_announced(weight: Weight) -> None:
    assume(is_well_conditioned(weight))
    pair, rank = weight.factored(), weight.small_rank()
    # A kernel in Tucker form is a product of two, too, but is not evaluated by it: no rank is announced.
    kernel = any(isinstance(part, Tucker) and len(part.factors) > 2 for part in weight.modules())
    assert (pair is None) == (rank is None) or kernel
    if pair is not None:
        up, down = pair
        assert up.shape[1] == down.shape[0] == (up.shape[1] if kernel and rank is None else rank)
        assert (up.shape[0], down.shape[1]) == weight.shape
        assert_close(up @ down, weight.dense())


def test_a_kernel_in_tucker_form_announces_no_rank_and_still_is_a_product_of_two() -> None:
    leaves = [
        trained(normal(*size), name) for size, name in (((2, 3, 2), "core"), ((5, 2), "up"), ((4, 3), "in"))
    ]
    weight = Tucker(leaves[0], [*leaves[1:], trained(normal(3, 2), "window")])
    assert weight.small_rank() is None
    up, down = weight.factored()
    assert_close(up @ down, weight.dense())


@given(expressions(dtype=torch.float32), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_output_has_the_dtype_of_the_input(weight: Weight, dtype: torch.dtype) -> None:
    assume(is_well_conditioned(weight))
    x = normal(3, weight.shape[1], dtype=dtype)
    for target in (weight, weight.T):
        x = normal(3, target.shape[1], dtype=dtype)
        assert target(x).dtype == dtype
        with torch.no_grad():
            assert target(x).dtype == dtype


@given(expressions())
def test_the_count_is_that_of_the_distinct_stored_tensors(weight: Weight) -> None:
    count = weight.count()
    trained = [p for p in weight.parameters() if p.requires_grad]
    assert count.trainable == sum(p.numel() for p in trained)
    stored = {id(m.value): m.value for m in weight.modules() if type(m).__name__ == "Dense"}
    assert count.stored == sum(v.numel() for v in stored.values())
    assert count.bytes == sum(v.nbytes for v in stored.values())


@given(expressions())
def test_the_formula_names_every_leaf_and_marks_the_trained_ones(weight: Weight) -> None:
    formula, nested = weight.formula(), set()
    for leaf in weight.sources():
        nested |= {id(m) for m in leaf.modules() if isinstance(m, Leaf) and m is not leaf}
    for leaf in weight.sources():
        if id(leaf) not in nested:
            size = "x".join(map(str, leaf.shape))
            assert f"{leaf.name}{'*' if leaf.trainable else ''}[{size}]" in formula


@given(st.data())
def test_dropout_thins_the_input_of_its_own_term_only(data: st.DataObject) -> None:
    make = Maker(data.draw)
    base, change = make.dense(4, 50), make.dense(4, 50)
    weight = (base + Dropped(change, 0.5)).train()
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = normal(50)
    dropped = weight(x) - x @ base.dense().T
    rest = torch.linalg.lstsq(change.dense() * x, dropped[:, None]).solution
    assert_close(change.dense() * x @ rest, dropped[:, None], 1e-6)
    assert not torch.allclose(weight(x), weight(x))
    assert_close(weight.eval()(x), x @ (base.dense() + change.dense()).T)
