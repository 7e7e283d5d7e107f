"""The fused products equal plain autograd, forward and backward, whatever the order they are evaluated in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

import rankfold as rf
from rankfold.weights import kernels

OUT, IN, RANK, BLOCKS = 8, 6, 2, 2
APPLIED, FORMED = 2, 40  # tokens: too few, and enough, for forming the matrix to pay

Function = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


FROZEN = (draw(OUT, RANK, seed=1), draw(RANK, IN, seed=1))


def plain_low_rank(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(x, weight + up @ down, bias)


def plain_residual(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(x, weight + up @ down + (FROZEN[0] @ FROZEN[1]).to(x.dtype), bias)


def residual(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return kernels.low_rank_linear(x, weight, bias, up, down, *FROZEN)


def plain_normalized(
    x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor, magnitude: Tensor, norm: Tensor
) -> Tensor:
    return linear(x, (magnitude / norm)[:, None] * (weight + up @ down), bias)


def normalized(
    x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor, magnitude: Tensor, norm: Tensor
) -> Tensor:
    return kernels.normalized_linear(x, weight, bias, (up, down), None, magnitude, norm)


def plain_modulated(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(x, weight * (1 + up @ down), bias)


def plain_grid(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
    ups, downs = up.chunk(BLOCKS, 2), down.chunk(BLOCKS, 1)
    rows = [torch.cat([ups[n][j] @ downs[j][n] for n in range(BLOCKS)], 1) for j in range(BLOCKS)]
    return linear(x, weight + torch.cat(rows), bias)


def plain_reflect(x: Tensor, vectors: Tensor, core: Tensor) -> Tensor:
    return x - x @ vectors @ core.T @ vectors.T


FACTORS = [(OUT, IN), (OUT,), (OUT, RANK), (RANK, IN)]
GRID = [(OUT, IN), (OUT,), (BLOCKS, OUT // BLOCKS, RANK * BLOCKS), (BLOCKS, RANK * BLOCKS, IN // BLOCKS)]
FUSED: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "low rank": (kernels.low_rank_linear, plain_low_rank, FACTORS),
    "low rank with a frozen pair": (residual, plain_residual, FACTORS),
    "normalized": (normalized, plain_normalized, [*FACTORS, (OUT,), (OUT,)]),
    "modulated": (kernels.modulated_linear, plain_modulated, FACTORS),
    "grid": (kernels.grid_linear, plain_grid, GRID),
    "reflect": (kernels.reflect, plain_reflect, [(IN, RANK), (RANK, RANK)]),
}
ONCE_DIFFERENTIABLE = {"normalized"}
each = pytest.mark.parametrize("name", FUSED)
orders = pytest.mark.parametrize("tokens", [APPLIED, FORMED], ids=["applied", "formed"])


def arguments(name: str, tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, tokens // 2, IN), *FUSED[name][2]]
    return [draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def gradients(function: Function, inputs: list[Tensor], wanted: list[Tensor] | None = None) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs if wanted is None else wanted, draw(*y.shape, dtype=y.dtype))]


def assert_alike(first: list[Tensor], second: list[Tensor], tolerance: float) -> None:
    for a, b in zip(first, second, strict=True):
        scale = float(b.detach().abs().max()) + 1e-12
        assert a.shape == b.shape
        assert float((a.detach() - b.detach()).abs().max()) <= tolerance * scale


def test_both_orders_of_evaluation_are_met() -> None:
    assert not kernels.forms(draw(2, APPLIED // 2, IN), (OUT, IN), torch.float64)
    assert kernels.forms(draw(2, FORMED // 2, IN), (OUT, IN), torch.float64)


def test_a_matrix_is_never_formed_in_half_precision() -> None:
    assert not kernels.forms(draw(4096, IN), (OUT, IN), torch.bfloat16)


def test_forming_pays_earlier_without_gradients() -> None:
    x = draw(5, IN)  # 5 (in + out) = 70 lies between in out = 48 and 2 in out = 96
    assert not kernels.forms(x, (OUT, IN), torch.float64)
    with torch.no_grad():
        assert kernels.forms(x, (OUT, IN), torch.float64)


@each
@orders
def test_output_and_every_gradient_equal_plain_autograd(name: str, tokens: int) -> None:
    fused, plain, _ = FUSED[name]
    inputs = arguments(name, tokens)
    assert_alike(gradients(fused, inputs), gradients(plain, inputs), 1e-12)


@each
@orders
def test_gradients_pass_the_numerical_check(name: str, tokens: int) -> None:
    assert gradcheck(FUSED[name][0], arguments(name, tokens), fast_mode=True)


@pytest.mark.parametrize("name", sorted(FUSED.keys() - ONCE_DIFFERENTIABLE))
@orders
def test_second_derivatives_pass_the_numerical_check(name: str, tokens: int) -> None:
    assert gradgradcheck(FUSED[name][0], arguments(name, tokens), fast_mode=True)


@pytest.mark.parametrize("name", sorted(ONCE_DIFFERENTIABLE))
def test_a_second_derivative_that_would_be_wrong_is_refused(name: str) -> None:
    inputs = arguments(name, APPLIED)
    y = FUSED[name][0](*inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each
@orders
def test_only_the_gradients_that_are_asked_for_come_back(name: str, tokens: int) -> None:
    fused, plain, _ = FUSED[name]
    for index in range(len(arguments(name, tokens))):
        inputs = [t.detach().requires_grad_(i == index) for i, t in enumerate(arguments(name, tokens))]
        wanted = [inputs[index]]
        assert_alike(gradients(fused, inputs, wanted), gradients(plain, inputs, wanted), 1e-12)


@each
@orders
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_each_tensors_own(
    name: str, tokens: int
) -> None:
    inputs = arguments(name, tokens, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = gradients(FUSED[name][0], inputs)
    assert results[0].dtype == torch.bfloat16
    assert [g.dtype for g in results[1:]] == [torch.float32] * len(inputs)
    exact = gradients(FUSED[name][1], inputs)
    assert_alike([r.float() for r in results], exact, 0.06)


@each
@orders
def test_half_precision_equals_plain_autograd_in_float32_to_its_rounding(name: str, tokens: int) -> None:
    inputs = arguments(name, tokens, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    results = [r.float() for r in gradients(FUSED[name][0], inputs)]
    assert_alike(results, gradients(FUSED[name][1], wide), 0.06)


@each
@orders
def test_each_compiles_as_one_graph(name: str, tokens: int) -> None:
    fused = FUSED[name][0]
    inputs = arguments(name, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: fused(*tensors), backend="aot_eager", fullgraph=True)
    assert_alike(gradients(compiled, inputs), gradients(fused, inputs), 1e-12)


@orders
def test_without_a_graph_the_scaled_product_is_the_same(tokens: int) -> None:
    x, weight, bias, up, down, ratio, _ = (t.detach() for t in arguments("normalized", tokens))
    with torch.no_grad():
        scaled = kernels.scaled_low_rank(x, weight, bias, up, down, ratio)
        assert_alike([scaled], [linear(x, ratio[:, None] * (weight + up @ down), bias)], 1e-12)
        plain = kernels.scaled_low_rank(x, weight, bias, up, down)
        assert_alike([plain], [plain_low_rank(x, weight, bias, up, down)], 1e-12)


def test_a_norm_that_is_not_given_is_the_row_norm_as_a_constant() -> None:
    x, weight, bias, up, down, magnitude, _ = arguments("normalized", FORMED)
    inputs = [x, bias, up, down, magnitude]

    def own(x: Tensor, bias: Tensor, up: Tensor, down: Tensor, magnitude: Tensor) -> Tensor:
        return kernels.normalized_linear(x, weight.detach(), bias, (up, down), None, magnitude)

    norm = torch.linalg.vector_norm(weight + up @ down, dim=1).detach()

    def given(x: Tensor, bias: Tensor, up: Tensor, down: Tensor, magnitude: Tensor) -> Tensor:
        return plain_normalized(x, weight.detach(), bias, up, down, magnitude, norm)

    assert_alike(gradients(own, inputs), gradients(given, inputs), 1e-12)


@pytest.mark.parametrize("tokens", [APPLIED, FORMED, 200])
def test_the_gradient_of_the_magnitude_counts_every_token_once(tokens: int) -> None:
    inputs = [t.detach() for t in arguments("normalized", tokens)]
    inputs[5].requires_grad_()
    fused, plain, _ = FUSED["normalized"]
    assert_alike(gradients(fused, inputs, inputs[5:6]), gradients(plain, inputs, inputs[5:6]), 1e-12)


@orders
def test_a_magnitude_of_zero_gets_a_zero_gradient_and_spoils_no_other(tokens: int) -> None:
    fused, plain, _ = FUSED["normalized"]
    inputs = [t.detach() for t in arguments("normalized", tokens)]
    inputs[5][3] = 0
    inputs = [t.requires_grad_() for t in inputs]
    results, expected = gradients(fused, inputs), gradients(plain, inputs)
    assert results[6][3] == 0
    expected[6] = expected[6].index_fill(0, torch.tensor([3]), 0)
    assert_alike(results, expected, 1e-12)


@orders
def test_a_row_that_is_zero_stays_zero_with_finite_gradients(tokens: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False)).double()
    with torch.no_grad():
        model[0].weight[3] = 0
    rf.adapt(model, "dora", rank=RANK)
    x = draw(tokens, IN).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert (y[:, 3] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("left", "right"), [(OUT, RANK), (RANK, OUT)])
def test_a_scaled_frozen_matrix_equals_plain_autograd_and_keeps_only_itself(left: int, right: int) -> None:
    matrix = draw(left, right)
    sides = [draw(left, seed=3).requires_grad_(), draw(right, seed=4).requires_grad_()]
    fused = partial(kernels.scaled_matrix, matrix)
    assert_alike(gradients(fused, sides), gradients(lambda b, d: b[:, None] * matrix * d, sides), 1e-12)
    assert gradcheck(fused, sides)
    assert gradgradcheck(fused, sides)
    assert saved_numbers(lambda: fused(*sides), [matrix, *sides]) == 0


def saved_numbers(forward: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Numbers kept for backward in memory of their own, beside the tensors that exist anyway."""
    seen = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(found.values())


# How many numbers a layer may keep beside its input and its parameters, for so many tokens.
KEPT: dict[str, Callable[[int, int], int]] = {
    "lora": lambda tokens, width: 2 * tokens,  # x A^T of rank 2, where the factors are applied
    "lora/pissa": lambda tokens, width: 4 * tokens + 2 * width,  # and the start with its minus sign
    "hira": lambda tokens, width: 0,
    "dora": lambda tokens, width: tokens * width + 2 * tokens + 4 * width,  # the output, by necessity
    "gralora": lambda tokens, width: 2 * 2 * width,  # the scaled up factors
    "vera": lambda tokens, width: 2 * tokens + 4 * width,  # up with its diagonals
    "hra": lambda tokens, width: 2 * tokens + 8 * width + 16,  # up, the unit vectors, the core
}


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("tokens", [8, 512])
def test_a_layer_keeps_nothing_of_its_outputs_size_for_backward(method: str, tokens: int) -> None:
    width = 64
    model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(width, width)), method, rank=2)
    x = draw(tokens, width, dtype=torch.float32).requires_grad_()
    known = [x, *model.parameters(), *model.buffers()]
    assert saved_numbers(lambda: model(x), known) <= KEPT[method](tokens, width)
