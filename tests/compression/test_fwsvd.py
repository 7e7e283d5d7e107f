"""FWSVD weighs rows by the squared gradients of single examples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compression._calibrated import compressed, inputs, keep_of, layer, normal, weight
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption

SIZES = torch.logspace(0, -1, 10, dtype=torch.float64)


def loss(model: nn.Module, batch: Any) -> Tensor:
    """A regression of which the first outputs count most."""
    x = batch["x"] if isinstance(batch, dict) else batch
    return ((model(x) - 1) * SIZES).square().sum(-1).mean()


def fisher(model: nn.Module, x: Tensor) -> Tensor:
    """Return the mean over examples of the squared gradient."""
    each = [torch.autograd.grad(loss(model, row[None]), model[0].weight)[0] for row in x]
    return torch.stack(each).square().mean(0)


def best(matrix: Tensor, left: Tensor, right: Tensor, rank: int = 3) -> Tensor:
    """Return the product of least error ||diag(left) (W - X) diag(right)||."""
    u, s, v = torch.linalg.svd(left[:, None] * matrix * right, full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]) / left[:, None] / right


@pytest.mark.parametrize("axis", ["out", "in", "both"])
def test_each_axis_is_the_decomposition_under_the_fisher_information_of_single_examples(axis: str) -> None:
    x, plain = inputs(24), layer()
    squares = fisher(plain, x)
    left = squares.sum(1).sqrt() if axis != "in" else torch.ones(10).double()
    right = squares.sum(0).sqrt() if axis != "out" else torch.ones(12).double()
    model = compressed(copy.deepcopy(plain), "fwsvd", data=[x[:7], x[7:]], loss=loss, axis=axis)
    torch.testing.assert_close(weight(model), best(weight(plain), left, right))


def test_batches_of_any_size_and_kind_give_the_same_and_squared_mean_gradients_another() -> None:
    x, plain = inputs(24), layer()
    ones = compressed(copy.deepcopy(plain), "fwsvd", data=[row[None] for row in x], loss=loss)
    named = compressed(copy.deepcopy(plain), "fwsvd", data=[{"x": x, "scale": 1.0}], loss=loss)
    torch.testing.assert_close(weight(named), weight(ones))
    mean = compressed(copy.deepcopy(plain), "fwsvd", data=[x[:12], x[12:]], loss=loss, per_sample=False)
    assert (weight(mean) - weight(ones)).norm() > 1e-3
    with pytest.raises(
        InvalidOption, match="need batches of tensors whose first axis is that of the examples"
    ):
        compressed(copy.deepcopy(plain), "fwsvd", data=[{"x": 1.0}], loss=loss)


def test_its_weighted_error_is_at_most_that_of_svd_and_its_plain_error_at_least() -> None:
    x, plain = inputs(24), layer()
    rows = fisher(plain, x).sum(1).sqrt()[:, None]
    mine = weight(compressed(copy.deepcopy(plain), "fwsvd", data=[x], loss=loss))
    svd = weight(compressed(copy.deepcopy(plain), "svd"))
    whole = weight(plain)
    assert (rows * (whole - mine)).norm() < 0.99 * (rows * (whole - svd)).norm()
    assert (whole - mine).norm() > 1.001 * (whole - svd).norm()


def test_equal_weights_give_svd_and_a_dominant_row_is_kept_at_rank_one() -> None:
    x, plain = inputs(24), layer()

    def dominant(model: nn.Module, batch: Any) -> Tensor:
        return 1e4 * model(batch)[:, 4].sum() + model(batch).sum()

    mine = weight(compressed(copy.deepcopy(plain), "fwsvd", 1, data=[x], loss=dominant))
    relative = (mine - weight(plain)).norm(dim=1) / weight(plain).norm(dim=1)
    assert relative[4] < 1e-4
    assert relative[[0, 1, 2, 3, 5]].min() > 0.1

    def even(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).sum()

    same = weight(compressed(copy.deepcopy(plain), "fwsvd", data=[x], loss=even))
    torch.testing.assert_close(same, weight(compressed(copy.deepcopy(plain), "svd")))


def test_a_row_that_no_loss_depends_on_is_no_division_by_zero_nor_a_weight_without_gradient() -> None:
    x, plain = inputs(24), layer()

    def some(model: nn.Module, batch: Any) -> Tensor:
        return model(batch)[:, 1:].square().sum()

    found = weight(compressed(copy.deepcopy(plain), "fwsvd", data=[x], loss=some))
    assert found.isfinite().all()
    assert found.norm() < 10 * weight(plain).norm()

    def none(model: nn.Module, batch: Any) -> Tensor:
        return 0 * model(batch).sum()

    unused = weight(compressed(copy.deepcopy(plain), "fwsvd", data=[x], loss=none, axis="both"))
    torch.testing.assert_close(unused, weight(compressed(copy.deepcopy(plain), "svd")))


def test_a_word_that_is_no_axis_is_refused() -> None:
    with pytest.raises(InvalidOption, match="axis must be one of out, in, both, not 'rows'"):
        compressed(layer(), "fwsvd", data=[inputs(24)], loss=loss, axis="rows")


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((model(x).argmax(-1) == labels).double().mean())


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a classifier in whose first layer half of the hidden units hardly matter, but are large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    x = normal(600, 16, seed=9)
    labels = (x[:, :4] + 0.5 * x[:, 4:8]).argmax(-1)
    with torch.no_grad():
        model[0].weight[16:] *= 4
        model[2].weight[:, 16:] *= 0.01
    optimizer = torch.optim.Adam([*model[0].parameters(), *model[2].parameters()], lr=0.01)
    hooks = [
        model[0].weight.register_hook(lambda g: torch.cat([g[:16], 0 * g[16:]])),
        model[2].weight.register_hook(lambda g: torch.cat([g[:, :16], 0 * g[:, 16:]], 1)),
    ]
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return model, x, labels


def test_where_half_of_the_units_matter_accuracy_is_above_that_of_svd_at_a_larger_plain_error() -> None:
    model, x, labels = trained()

    def task(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch["x"]), batch["labels"])

    options: dict[str, Any] = {"keep": keep_of(4, 32, 16), "targets": "0", "progress": False}
    data = [{"x": x[:100], "labels": labels[:100]}]
    mine = rf.compress(copy.deepcopy(model), "fwsvd", data=data, loss=task, **options)
    svd = rf.compress(copy.deepcopy(model), "svd", **options)
    errors = [(weight(net) - weight(model)).norm() for net in (mine, svd)]
    assert errors[0] > errors[1]
    assert accuracy(model, x, labels) > 0.95
    assert accuracy(mine, x, labels) > accuracy(svd, x, labels) + 0.1
