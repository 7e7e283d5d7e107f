"""Products that keep less than the input, or form less than the matrix's gradient, equal plain autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from rankfold import weights as w
from rankfold.weights import frozen, thin, trained
from rankfold.weights.bases import RandomMixture, ScaledBases
from rankfold.weights.gram import Gram
from rankfold.weights.rescaled import Rescaled
from rankfold.weights.shards import Repeated

OUT, IN, RANK = 6, 8, 2
Function = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


WEIGHT, DOWN = draw(OUT, IN), draw(RANK, IN, seed=1)
FUSED: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "frozen down": (
        lambda x, bias, up: thin.inner_linear(x, WEIGHT, bias, up, DOWN),
        lambda x, bias, up: linear(x, WEIGHT + up @ DOWN, bias),
        [(OUT,), (OUT, RANK)],
    ),
    "tiled": (
        lambda x, bias, up: thin.inner_linear(x, WEIGHT, bias, up),
        lambda x, bias, up: linear(x, WEIGHT + thin.tiled(up, IN), bias),
        [(OUT,), (OUT, 4)],
    ),
    "tiled and cut": (
        lambda x, bias, up: thin.inner_linear(x, WEIGHT, bias, up),
        lambda x, bias, up: linear(x, WEIGHT + thin.tiled(up, IN), bias),
        [(OUT,), (OUT, 3)],
    ),
    "kronecker": (
        lambda x, bias, left, right, weight: thin.kronecker_linear(x, weight, bias, left, right),
        lambda x, bias, left, right, weight: linear(x, weight + torch.kron(left, right), bias),
        [(OUT,), (2, 4), (3, 2), (OUT, IN)],
    ),
    "rescaled": (
        lambda x, bias, left, right, weight: thin.rescaled_linear(x, weight, bias, left, right),
        lambda x, bias, left, right, weight: linear(x, left[:, None] * weight * right, bias),
        [(OUT,), (OUT,), (IN,), (OUT, IN)],
    ),
}
each = pytest.mark.parametrize("name", FUSED)
orders = pytest.mark.parametrize("tokens", [2, 300])  # applied in one piece, and formed in several


def arguments(name: str, tokens: int) -> list[Tensor]:
    shapes = [(2, tokens // 2, IN), *FUSED[name][2]]
    return [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]


def gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, draw(*y.shape))]


@each
@orders
def test_output_and_every_gradient_equal_plain_autograd(name: str, tokens: int) -> None:
    fused, plain, _ = FUSED[name]
    inputs = arguments(name, tokens)
    for a, b in zip(gradients(fused, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@each
@orders
def test_gradients_and_second_derivatives_pass_the_numerical_check(name: str, tokens: int) -> None:
    inputs = arguments(name, tokens)
    assert gradcheck(FUSED[name][0], inputs, fast_mode=True)
    assert gradgradcheck(FUSED[name][0], inputs, fast_mode=True)


@each
def test_an_input_that_needs_no_gradient_gets_none(name: str) -> None:
    inputs = arguments(name, 40)
    inputs[0].requires_grad_(False)
    FUSED[name][0](*inputs).sum().backward()
    assert inputs[0].grad is None
    assert all(leaf.grad is not None for leaf in inputs[1:])


@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-4])
def test_a_factor_too_small_to_divide_by_has_the_true_gradient(value: float) -> None:
    inputs = arguments("rescaled", 40)
    with torch.no_grad():
        inputs[2][3] = inputs[3][5] = value
    fused, plain, _ = FUSED["rescaled"]
    for a, b in zip(gradients(fused, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["frozen down", "tiled"])
def test_the_input_is_not_kept(name: str) -> None:
    inputs = arguments(name, 300)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        FUSED[name][0](*inputs)
    assert inputs[0].data_ptr() not in kept


def test_the_sum_of_shards_is_the_transpose_of_repeating() -> None:
    x, shard = draw(5, IN), draw(OUT, 3)
    torch.testing.assert_close(thin.shard_sum(x, 3) @ shard.T, x @ thin.tiled(shard, IN).T)


EXPRESSIONS = {
    "repeated": lambda: Repeated(trained(draw(OUT, 3), "a"), IN),
    "gram tall": lambda: Gram(trained(draw(IN, RANK), "a"), (IN, OUT)),
    "gram wide": lambda: Gram(trained(draw(IN, RANK), "a"), (OUT, IN)),
    "bases tall": lambda: _bases(wide=False),
    "bases wide": lambda: _bases(wide=True),
    "mixture": lambda: RandomMixture(trained(draw(5), "a"), "m", (OUT, IN), 3, draw(OUT, IN)),
}


def _bases(*, wide: bool) -> ScaledBases:
    up, down = frozen(draw(IN, 3, RANK), "u"), frozen(draw(RANK, OUT), "d")
    return ScaledBases(up, down, trained(draw(3, RANK), "l"), trained(draw(3, OUT), "g"), wide=wide)


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("with_base", [False, True])
def test_a_map_is_its_matrix_with_and_without_a_weight_beside_it(name: str, with_base: bool) -> None:
    term = EXPRESSIONS[name]()
    expression = frozen(draw(*term.shape), "w") + 0.5 * term if with_base else term
    leaves = [leaf.tensor() for leaf in expression.sources() if leaf.trainable and leaf.stored]
    for tokens in (1, 50):
        x = draw(tokens, term.shape[1]).requires_grad_()
        actual, wanted = expression(x), x @ expression.dense().T
        torch.testing.assert_close(actual, wanted)
        grad = draw(*wanted.shape, seed=9)
        pairs = [torch.autograd.grad(y, [x, *leaves], grad) for y in (actual, wanted)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
    ids = torch.tensor([3, 0, 3])
    torch.testing.assert_close(expression.rows(ids), expression.dense()[ids])
    torch.testing.assert_close(expression.T.dense(), expression.dense().T)


def test_scaled_bases_are_the_sum_of_their_terms() -> None:
    bases = _bases(wide=False)
    up, down, inner, outer = (bases.leaf(name).tensor() for name in "udlg")
    terms = [up[:, n] @ torch.diag(inner[n]) @ down @ torch.diag(outer[n]) for n in range(3)]
    torch.testing.assert_close(bases.dense(), sum(terms))


def test_a_mixture_is_linear_in_its_coefficients_and_gives_the_same_bases_every_time() -> None:
    first, second, both = draw(5), draw(5, seed=1), draw(5) + draw(5, seed=1)
    mixed = [RandomMixture(trained(c, "a"), "m", (OUT, IN), 3).dense() for c in (first, second, both)]
    torch.testing.assert_close(mixed[0] + mixed[1], mixed[2])
    other = RandomMixture(trained(first, "a"), "m", (OUT, IN), 4).dense()
    assert not torch.allclose(other, mixed[0])


def test_a_weight_between_two_diagonals_is_the_product_of_the_three() -> None:
    class Holder:
        def matrix(self) -> Tensor:
            return WEIGHT

    left, right = trained(draw(OUT), "left"), trained(draw(IN), "right")
    expression = Rescaled(left, w.Base(Holder(), (OUT, IN)), right)
    matrix = torch.diag(left.tensor()) @ WEIGHT @ torch.diag(right.tensor())
    torch.testing.assert_close(expression.dense(), matrix)
    torch.testing.assert_close(expression.T.dense(), matrix.T)
    for tokens in (1, 50):
        x, bias = draw(tokens, IN), draw(OUT, seed=2)
        torch.testing.assert_close(expression(x, bias), x @ matrix.T + bias)
        with torch.no_grad():
            torch.testing.assert_close(expression(x, bias), x @ matrix.T + bias)
