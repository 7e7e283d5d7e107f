"""CapaBoost: one pair of factors under several masks."""

import pytest
import torch
from methods._layers import (
    adapted,
    change,
    count,
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
from rankfold.weights import Masked


def capaboost(rank: int = 3, seed: int = 0, **options: float) -> nn.Module:
    host = linear(20, 24)
    return disturbed(adapted(rf.Recipe(("capaboost", options)), host, rank=rank, seed=seed))


def masks(model: nn.Module, branches: int = 2) -> list[tuple[Tensor, Tensor]]:
    up, down = (m.mask for m in expression_of(model).modules() if isinstance(m, Masked))
    return list(zip(up.chunk(branches, 1), down.chunk(branches, 0), strict=True))


def test_the_change_is_the_sum_of_the_masked_products() -> None:
    model = capaboost()
    up, down = (leaves_of(model)[name].detach() for name in ("up", "down"))
    expected = sum(2 * (up * m) @ (down * n) for m, n in masks(model))
    torch.testing.assert_close(change(model), expected)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_every_mask_keeps_exactly_its_share_and_no_two_are_alike(share: float) -> None:
    (m1, n1), (m2, n2) = masks(capaboost(share=share))
    for mask in (m1, n1, m2, n2):
        assert mask.sum() == int(share * mask.numel())
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(m1, m2)
    assert not torch.equal(n1, n2)


def test_the_rank_doubles_at_the_same_count_and_does_not_without_masks() -> None:
    model, plain = capaboost(), capaboost(share=1.0)
    assert (rank_of(change(model)), rank_of(change(plain))) == (6, 3)
    assert count(model) == 3 * (20 + 24)
    up, down = (leaves_of(plain)[name].detach() for name in ("up", "down"))
    torch.testing.assert_close(change(plain), 2 * 2 * up @ down)


def test_the_gradient_is_the_sum_of_the_branches_under_their_masks() -> None:
    model, x, weights = capaboost(), normal(5, 24), normal(5, 20, seed=3)
    (model(x) * weights).sum().backward()
    gradient, (up, down) = weights.T @ x, (leaves_of(model)[name] for name in ("up", "down"))
    expected = sum(2 * n * ((up * m).T @ gradient) for m, n in masks(model))
    torch.testing.assert_close(down.grad, expected)


def test_the_seed_alone_draws_the_masks() -> None:
    first, again, other = (masks(capaboost(seed=seed))[0][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"branches": 0}, {"share": 0.0}, {"share": 1.5}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match="capaboost needs"):
        capaboost(**options)
