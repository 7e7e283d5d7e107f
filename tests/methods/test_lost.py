"""LOST starts a low-rank path and a few dense channels from one decomposition, so that they complement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.weights import Activated, Channels, Weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(matrix: Tensor) -> nn.Module:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0]).double()
    layer.weight.data = matrix.clone()
    return nn.Sequential(layer)


def adapted(matrix: Tensor, **options: Any) -> nn.Module:
    return rf.adapt(model_of(matrix), "lost", **{"rank": 3, "density": 0.3, **options})


def expression(model: nn.Module) -> Weight:
    found = model[0].expression  # type: ignore[index]
    assert isinstance(found, Weight)
    return found


def part(model: nn.Module, kind: type[Any]) -> Any:
    return next(m for m in expression(model).modules() if isinstance(m, kind))


def channels(model: nn.Module) -> list[int]:
    return part(model, Channels).index.tensor().tolist()  # type: ignore[no-any-return]


def complementary() -> tuple[Tensor, list[int], list[int]]:
    """A weight whose huge rank-3 part stands in the first columns, and whose rest stands in the last ones."""
    matrix = torch.zeros(12, 10, dtype=torch.float64)
    matrix[:, :3] = 100 * normal(12, 3)
    matrix[:, 7:] = 0.1 * normal(12, 3, seed=1)
    return matrix, [0, 1, 2], [7, 8, 9]


def test_the_channels_are_those_that_the_low_rank_part_leaves_out() -> None:
    matrix, large, left_out = complementary()
    assert matrix.norm(dim=0).topk(3).indices.sort().values.tolist() == large
    assert channels(adapted(matrix)) == left_out
    assert channels(adapted(matrix, factors="normal")) == left_out


def test_the_band_after_the_path_or_the_smallest_values_choose() -> None:
    columns = torch.diag(torch.tensor([9.0, 8.0, 7.0, 3.0, 2.0, 1.0, 0.5, 0.4]).double())
    assert channels(adapted(columns, density=0.25)) == [3, 4]
    assert channels(adapted(columns, density=0.25, band=1)) == [0, 3]  # the others are of zero: the first one
    assert channels(adapted(columns, density=0.25, band=2, smallest=True)) == [6, 7]
    assert channels(adapted(columns, density=0.125, rank=8)) == [0]  # nothing is left out
    assert channels(adapted(columns, density=1e-9)) == [3]  # one at least


def test_a_linear_path_is_its_matrix_and_not_the_usual_start() -> None:
    matrix = normal(12, 10)
    model, gamma = adapted(matrix, activation="identity", gamma=0.6), 0.6
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    low = left[:, :3] * sizes[:3] @ right[:3]
    wanted, chosen = gamma * low, channels(model)
    wanted[:, chosen] += (1 - gamma) * matrix[:, chosen]
    torch.testing.assert_close(expression(model).dense().detach(), wanted)
    assert not torch.allclose(wanted, matrix)
    x = normal(5, 10, seed=3)
    output = model(x)
    torch.testing.assert_close(rf.fold(model)(x), output)


def test_the_path_is_nonlinear_and_its_factors_split_the_singular_values() -> None:
    matrix, x = normal(12, 10), normal(2, 5, 10, seed=3)
    model = adapted(matrix)
    inner, few = part(model, Activated), part(model, Channels)
    up, down = inner.up.tensor(), inner.down.tensor()
    sizes = torch.linalg.svdvals(matrix)[:3]
    torch.testing.assert_close(up.T @ up, torch.diag(sizes))
    torch.testing.assert_close(down @ down.T, torch.diag(sizes))
    torch.testing.assert_close(few.values.tensor(), matrix[:, channels(model)], check_stride=False)
    wanted = 0.7 * F.silu(x @ down.T) @ up.T + 0.3 * x[..., channels(model)] @ few.values.tensor().T
    torch.testing.assert_close(model(x), wanted + model[0].bias)  # type: ignore[index]
    odd = model(x) + model(-x) - 2 * model(0 * x)
    assert odd.abs().max() > 1e-2
    with pytest.raises(rf.errors.NotDense, match="silu between its factors"):
        rf.fold(model)


def test_the_columns_get_their_share_of_the_weights_gradient() -> None:
    model, x, cotangent = adapted(normal(12, 10)), normal(7, 10, seed=3), normal(7, 12, seed=4)
    (model(x) * cotangent).sum().backward()
    gradient = part(model, Channels).values.tensor().grad
    torch.testing.assert_close(gradient, 0.3 * (cotangent.T @ x)[:, channels(model)])


def test_only_the_factors_and_the_columns_train_and_have_moments() -> None:
    model, x = adapted(normal(12, 10)), normal(7, 10, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = channels(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert channels(model) == before
    own = 3 * (12 + 10) + 3 * 12 + 12  # factors, columns, bias
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == own
    counts = rf.count(model)
    assert (counts.active, counts.stored, counts.deployed) == (own, own + 3, own + 3)  # and the positions


def test_a_linear_path_is_deployed_as_the_smaller_form() -> None:
    model = adapted(normal(6, 5), activation="identity", density=0.9)
    counts = rf.count(model)
    assert counts.deployed == 6 * 5 + 6 < counts.stored


def test_a_file_holds_the_channels(tmp_path: Path) -> None:
    model, x = adapted(complementary()[0]), normal(4, 10)
    rf.save(model, tmp_path / "lost")
    loaded = rf.load(model_of(normal(12, 10)), tmp_path / "lost")
    assert channels(loaded) == [7, 8, 9]
    assert torch.equal(loaded(x), model(x))


def test_normal_factors_have_the_spread_of_the_paper() -> None:
    model = adapted(normal(120, 100), rank=50, factors="normal")
    inner = part(model, Activated)
    for factor in (inner.up.tensor(), inner.down.tensor()):
        torch.testing.assert_close(factor.std().item(), (50 * 220) ** -0.25, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("density", 0.0), ("density", 1.1), ("gamma", 0.0), ("gamma", 1.0), ("band", 0), ("activation", "sine"),
     ("factors", "zero")],
)  # fmt: skip
def test_impossible_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(rf.errors.InvalidOption, match=option):
        adapted(normal(12, 10), **{option: value})
