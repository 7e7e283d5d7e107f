"""LoRMA: a square matrix of low-rank origin multiplies the weight."""

from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    base,
    change,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
)
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption


def lorma(host: nn.Module | None = None, rank: int = 2, **options: Any) -> nn.Module:
    return adapted(rf.Recipe(("lorma", options)), host, rank=rank)


def test_pre_keeps_the_null_space_and_post_the_column_space() -> None:
    poor = linear(6, 8, rank=3)
    null = torch.linalg.svd(poor[0].weight.detach()).Vh[3:]
    pre = disturbed(lorma(poor))
    assert (expression_of(pre).dense() @ null.T).abs().max() < 1e-12
    assert rank_of(change(pre)) == 2
    post = disturbed(lorma(linear(6, 8, rank=3), side="post"))
    outside = torch.linalg.svd(base(post)).U[:, 3:]
    assert (outside.T @ expression_of(post).dense()).abs().max() < 1e-12
    assert (expression_of(post).dense() @ null.T).abs().max() > 1e-2


def test_the_matrix_is_one_plus_the_scaled_product() -> None:
    model = disturbed(lorma(alpha=6.0))
    up, down = (leaves_of(model)[name].detach() for name in ("up", "down"))
    torch.testing.assert_close(expression_of(model).dense(), base(model) + 3 * up @ down @ base(model))


def test_the_shift_rolls_row_i_by_i_and_its_rank_is_full() -> None:
    model = disturbed(lorma(linear(12, 12), mode="pi", alpha=6.0))
    up, down = (leaves_of(model)[name].detach() for name in ("up", "down"))
    rolled = torch.stack([row.roll(i) for i, row in enumerate(up @ down)])
    torch.testing.assert_close(expression_of(model).dense().detach(), 3 * rolled @ base(model))
    assert (rank_of(up @ down), rank_of(rolled)) == (2, 12)


@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("mode", ["plus", "pi"])
def test_the_start_is_the_base_whatever_alpha(mode: str, side: str) -> None:
    model, x = lorma(mode=mode, side=side, alpha=7.0), normal(5, 8)
    torch.testing.assert_close(model(x), linear()(x), rtol=1e-12, atol=1e-12)


def test_on_an_embedding_the_outputs_are_multiplied_not_the_vocabulary() -> None:
    model = lorma(nn.Sequential(nn.Embedding(50, 8)).double())
    assert leaves_of(model)["up"].shape == (8, 2)


@pytest.mark.parametrize("options", [{"mode": "none"}, {"side": "both"}])
def test_unknown_forms_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(InvalidOption, match="lorma knows"):
        lorma(**options)


def test_the_gradient_is_that_of_the_matrix() -> None:
    model, x = disturbed(lorma(mode="pi")), normal(5, 8).requires_grad_()
    tensors: list[Tensor] = [x, *leaves_of(model).values()]
    wanted = x @ expression_of(model).dense().T + model[0].bias
    for ours, theirs in zip(
        torch.autograd.grad(model(x).sin().sum(), tensors), torch.autograd.grad(wanted.sin().sum(), tensors),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
