"""An expression takes the cheapest order of evaluation, and what it keeps between calls is never stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import weights as w
from rankfold.weights import Weight, frozen, trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def multiplications(expression: Weight, x: Tensor) -> int:
    """Return the multiply-adds in matrix products of one call."""
    with FlopCounterMode(display=False) as counter:
        expression(x)
    return int(counter.get_total_flops()) // 2


# Orders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An expression, and the multiply-adds of every way to apply it to so many tokens, by hand."""

    name: str
    expression: Callable[[], Weight]
    orders: tuple[Callable[[int], int], ...]

    def __str__(self) -> str:
        return self.name


def product(rank: int, out: int = 64, columns: int = 64) -> Weight:
    return trained(normal(out, rank), "up") @ trained(normal(rank, columns, seed=1), "down")


def chain() -> Weight:
    left, right = frozen(normal(64, 8), "left"), frozen(normal(8, 64, seed=1), "right")
    return left @ trained(normal(8, 8, seed=2), "core") @ right


def grid() -> Weight:
    return w.Grid(trained(normal(2, 16, 16), "up"), trained(normal(2, 16, 16, seed=1), "down"))


CASES = (
    Case(
        "base + thin product", lambda: frozen(normal(64, 64)) + product(4), (lambda t: t * (4096 + 4 * 128),)
    ),
    Case("thin product", lambda: product(4), (lambda t: t * 4 * 128,)),
    Case("thin chain", chain, (lambda t: t * 8 * 128,)),
    Case(
        "entrywise product of products",
        lambda: product(8) * product(8),
        (lambda t: t * 64 * 128, lambda t: 2 * 8 * 4096 + t * 4096),
    ),
    Case(
        "product of wide factors",
        lambda: frozen(normal(16, 16), "a") @ trained(normal(16, 16), "b"),
        (lambda t: 2 * t * 256, lambda t: 16**3 + t * 256),
    ),
    Case(
        "base + grid",
        lambda: frozen(normal(32, 32), "base") + grid(),
        (lambda t: t * (1024 + 1024), lambda t: 1024 * 8 + 1024 + t * 1024),
    ),
    Case(
        "base + entrywise product",
        lambda: frozen(normal(64, 64), "base") + product(8) * product(8),
        (lambda t: t * (4096 + 64 * 128), lambda t: 2 * 8 * 4096 + 2 * 4096 + t * 4096),
    ),
    Case(
        "kronecker",
        lambda: w.Kronecker(frozen(normal(8, 8), "a"), frozen(normal(8, 8), "b")),
        (lambda t: t * 2 * 8 * 64,),
    ),
    Case(
        "reflections", lambda: w.Reflections(trained(normal(64, 4), "u")), (lambda t: t * (512 + 16) + 1024,)
    ),
    Case(
        "tensor train",
        lambda: w.TensorTrain([trained(normal(1, 64, 4), "a"), trained(normal(4, 64, 1), "b")], 1),
        (lambda t: t * 4 * 128,),
    ),
    Case("blocks", lambda: w.BlockDiagonal(trained(normal(4, 8, 8), "d")), (lambda t: t * 4 * 64,)),
)


@pytest.mark.parametrize("tokens", [1, 3, 6, 12, 20, 100, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_dearer_than_the_cheapest_is_taken_for_the_tokens_at_hand(case: Case, tokens: int) -> None:
    expression = case.expression().eval()
    x = normal(tokens, expression.shape[1])
    with torch.no_grad():
        expression(x)
        real = multiplications(expression, x)
    assert real <= min(order(tokens) for order in case.orders)


@pytest.mark.parametrize("case", [c for c in CASES if len(c.orders) > 1], ids=str)
def test_few_tokens_are_taken_through_the_factors_and_many_through_the_matrix(case: Case) -> None:
    expression = case.expression().eval()
    with torch.no_grad():
        real = [multiplications(expression, normal(t, expression.shape[1])) for t in (1, 1000)]
    factors, matrix = case.orders
    assert real[0] <= factors(1) < matrix(1)
    assert factors(1000) > matrix(1000) >= real[1]


@pytest.mark.parametrize("tokens", [1, 12, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_count_is_at_least_what_a_call_multiplies(case: Case, tokens: int) -> None:
    expression = case.expression().eval()
    x = normal(tokens, expression.shape[1])
    with torch.no_grad():
        expression(x)
        assert multiplications(expression, x) <= expression.macs(tokens)


def test_a_matrix_is_worth_forming_in_training_only_for_three_times_the_tokens() -> None:
    expression = CASES[4].expression()
    with torch.no_grad():
        assert multiplications(expression, normal(30, 16)) == 16**3 + 30 * 256
    assert multiplications(expression, normal(30, 16)) == 2 * 30 * 256
    assert multiplications(expression, normal(60, 16)) == 16**3 + 60 * 256


def test_a_normalised_sum_never_forms_its_low_rank_product() -> None:
    direction = frozen(normal(64, 64), "base") + product(4)
    expression = w.Normalized(direction, trained(normal(64), "m")).eval()
    with torch.no_grad():
        expression(normal(1, 64))
        real = multiplications(expression, normal(1, 64))
    assert real <= 4096 + 4 * 128
    assert multiplications(expression, normal(1, 64)) <= 4096 + 4 * 128 + 4 * 4096 + 2 * 4 * 4 * 64


# What is kept -----------------------------------------------------------------------------------------


class Model(nn.Module):
    """Owns a base, a pool and an expression over both."""

    def __init__(self, make: Callable[[Model], Weight]) -> None:
        super().__init__()
        self.base = nn.Parameter(normal(12, 12), requires_grad=False)
        self.pool = nn.Parameter(normal(5, seed=1))
        self.expression = make(self)

    def matrix(self) -> Tensor:
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        return self.expression(x)  # type: ignore[no-any-return]


def thin(model: Model) -> Weight:
    index = torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(3))
    return trained(normal(12, 2, seed=4), "up") @ w.Pooled(model, "pool", "down", (2, 12), index)


def mixed(model: Model) -> Weight:
    mixture = w.Mixture(trained(normal(3, seed=5), "c"), trained(normal(3, 2, 12, seed=6), "bank"), "mix")
    mask = torch.rand(12, 2, generator=torch.Generator().manual_seed(7)) < 0.7
    return w.Masked(trained(normal(12, 2, seed=8), "v"), mask, "masked") @ mixture


def stacked(model: Model) -> Weight:
    upper = w.Base(model, (12, 12))
    lower = w.Base(model, (12, 12)) + mixed(model)
    model.add_module("lower", lower)
    upper.stand_on(lower)
    return upper + thin(model)


EXPRESSIONS: dict[str, Callable[[Model], Weight]] = {
    "sum": lambda m: w.Base(m, (12, 12)) + 2.0 * thin(m) + mixed(m),
    "product": lambda m: thin(m) @ frozen(normal(12, 12, seed=9), "right"),
    "scaled by a leaf": lambda m: w.Base(m, (12, 12)) + w.Scaled(trained(normal(seed=2), "scale"), thin(m)),
    "hadamard": lambda m: w.Base(m, (12, 12)) + thin(m) * mixed(m),
    "normalized": lambda m: w.Normalized(w.Base(m, (12, 12)) + thin(m), trained(normal(12, seed=3), "m")),
    "modulated": lambda m: w.Modulated(w.Base(m, (12, 12)), mixed(m)),
    "transposed": lambda m: (w.Base(m, (12, 12)) + thin(m)).T,
    "reflections": lambda m: w.Base(m, (12, 12)) @ w.Reflections(trained(normal(12, 2, seed=2), "u")),
    "standing on another": stacked,
}


def in_place(model: Model) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)


def by_an_optimizer(model: Model) -> None:
    model(normal(3, 12)).sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def by_a_fused_optimizer(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained_ones, lr=0.1, fused=True).step()


def by_loading(model: Model) -> None:
    model.load_state_dict({key: 0.5 * value for key, value in model.state_dict().items()})


def by_assigning(model: Model) -> None:
    state = {key: 0.5 * value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_new_data(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.5


def by_data_in_place_and_a_switch_of_mode(model: Model) -> None:
    model.train()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.eval()


def by_a_swap_of_the_pool(model: Model) -> None:
    model.pool = nn.Parameter(normal(5, seed=20))
    model.base = nn.Parameter(normal(12, 12, seed=21), requires_grad=False)


def in_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.5)


CHANGES = (
    in_place, by_an_optimizer, by_a_fused_optimizer, by_loading, by_assigning, by_new_data,
    by_data_in_place_and_a_switch_of_mode, by_a_swap_of_the_pool, in_inference_mode,
)  # fmt: skip


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_is_kept_is_dropped_when_a_tensor_changes(name: str, change: Any, no_gradients: Any) -> None:
    model, x = Model(EXPRESSIONS[name]).eval(), normal(2, 12, seed=30)
    with no_gradients():
        before = model(x)
        assert torch.equal(model(x), before)
    change(model)
    with no_gradients():
        after = model(x)
        expected = x @ model.expression.dense().T
    assert torch.allclose(after, expected, rtol=1e-9, atol=1e-9)
    moved = (name != "product" and name != "modulated") or change is not by_a_swap_of_the_pool
    assert not moved or not torch.allclose(after, before)
    assert torch.allclose(model(x).detach(), expected, rtol=1e-9, atol=1e-9)


def test_a_change_below_is_seen_by_the_expression_that_stands_on_it() -> None:
    model, x = Model(stacked).eval(), normal(2, 12)
    with torch.no_grad():
        before = model(x)
        model.lower.leaf("c").tensor().mul_(2.0)  # type: ignore[operator,union-attr]
        assert not torch.allclose(model(x), before)
        assert torch.allclose(model(x), x @ model.expression.dense().T)


def test_small_pairs_are_not_formed_again_while_nothing_changes() -> None:
    expression = frozen(normal(64, 64), "base") + chain()
    x = normal(1, 64)
    with torch.no_grad():
        first, second = multiplications(expression, x), multiplications(expression, x)
    assert first - second == 8 * 8 * 64
    assert second <= 4096 + 8 * 128


def test_a_gate_that_is_inserted_acts_at_once() -> None:
    up, down, x = normal(12, 2), normal(2, 12, seed=1), normal(3, 12, seed=2)
    inner = trained(up, "up") @ trained(down, "down")
    weight = (frozen(normal(12, 12, seed=3), "base") + inner).eval()
    with torch.no_grad():
        weight(x)
        inner.insert_gate(trained(torch.tensor([1.0, 0.0], dtype=torch.float64), "gate"))  # type: ignore[attr-defined]
        expected = x @ (normal(12, 12, seed=3) + up[:, :1] @ down[:1]).T
        assert torch.allclose(weight(x), expected)


def test_pairs_name_the_trained_products_with_the_constant_before_them() -> None:
    base, inner = frozen(normal(4, 4), "base"), product(2, 4, 4)
    (pair,) = w.Normalized(base + 3.0 * (0.5 * inner), trained(normal(4), "m")).pairs()
    assert (pair.up.name, pair.down.name, pair.scale, pair.gate) == ("up", "down", 1.5, None)  # type: ignore[attr-defined]
    pair.owner.insert_gate(trained(torch.ones(2, dtype=torch.float64), "gate"))  # type: ignore[operator]
    assert next(iter(inner.pairs())).gate is not None
    assert not list(chain().pairs())


def test_a_copy_does_not_inherit_what_was_kept() -> None:
    model, x = Model(EXPRESSIONS["sum"]).eval(), normal(2, 12)
    with torch.no_grad():
        before = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.expression))):  # noqa: S301 - our own
            for parameter in twin.parameters():
                parameter.data.mul_(2.0)
            assert not torch.allclose(twin(x), before)
        assert torch.equal(model(x), before)


def test_compiling_keeps_nothing_and_breaks_no_graph() -> None:
    expression, x = EXPRESSIONS["normalized"], normal(2, 12)
    model = Model(expression).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x))
        in_place(model)
        assert torch.allclose(compiled(x), model(x))
    torch._dynamo.reset()
