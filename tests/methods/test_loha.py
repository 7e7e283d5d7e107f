"""LoHa and LoKr: entrywise and Kronecker products of small factors."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from methods._layers import adapted, base, change, count, disturbed, leaves_of, linear, normal, rank_of
from methods._peft import DTYPES, HOSTS, assert_parity, twins
from peft import LoHaConfig, LoKrConfig
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption


def hadamard(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    for name, theirs in (("up1", "w1_a"), ("down1", "w1_b"), ("up", "w2_a"), ("down", "w2_b")):
        yield name, getattr(layer, f"hada_{theirs}")["default"], torch.Tensor.clone


KRONECKER = {
    "first": "w1", "up1": "w1_a", "down1": "w1_b", "second": "w2", "up": "w2_a", "down": "w2_b",
}  # fmt: skip


def kronecker(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    for name in leaves:
        theirs = getattr(layer, f"lokr_{KRONECKER[name]}")["default"]
        yield name, theirs, lambda value, shape=theirs.shape: value.reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_entrywise_product_is_pefts(dtype: torch.dtype) -> None:
    config = LoHaConfig(r=2, alpha=6)
    assert_parity(twins(HOSTS["perceptron"], dtype, "loha", config, hadamard, rank=2, alpha=6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["perceptron", "convolution"])
@pytest.mark.parametrize(("rank", "both"), [(1, False), (1, True), (8, False)])
def test_the_kronecker_product_is_pefts(host: str, dtype: torch.dtype, rank: int, both: bool) -> None:
    config = LoKrConfig(r=rank, alpha=3, decompose_both=both)
    recipe = rf.Recipe(("lokr", {"decompose_both": both}))
    assert_parity(twins(HOSTS[host], dtype, recipe, config, kronecker, rank=rank, alpha=3))


def test_the_rank_of_an_entrywise_product_is_the_square() -> None:
    model = disturbed(adapted("loha", linear(20, 24), rank=3))
    assert rank_of(change(model)) == 9
    assert count(model) == 2 * 3 * 44


def test_the_rank_of_a_kronecker_product_is_the_product() -> None:
    model = disturbed(adapted("lokr", linear(20, 42), rank=2))  # 4 x 5 and 6 x 7
    first, up, down = (leaves_of(model)[name].detach() for name in ("first", "up", "down"))
    assert (first.shape, up.shape, down.shape) == ((4, 6), (5, 2), (2, 7))
    torch.testing.assert_close(change(model), torch.kron(first, up @ down))
    assert rank_of(change(model)) == 4 * 2


@pytest.mark.parametrize(("method", "moving"), [("loha", "up"), ("lokr", "first")])
def test_at_the_start_one_factor_has_a_gradient(method: str, moving: str) -> None:
    model, x = adapted(method, rank=1), normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    model(x).square().sum().backward()
    assert {name for name, leaf in leaves_of(model).items() if leaf.grad.any()} == {moving}


def _is_kaiming(leaf: Tensor) -> bool:
    bound = leaf.shape[1] ** -0.5
    return bool(0.97 * bound < leaf.abs().max() <= bound)


def test_all_factors_but_one_start_uniform_by_their_columns() -> None:
    loha = leaves_of(adapted("loha", linear(60, 80), rank=20))
    assert {name for name, leaf in loha.items() if _is_kaiming(leaf)} == {"up1", "down1", "down"}
    assert {name for name, leaf in loha.items() if not leaf.any()} == {"up"}
    lokr = leaves_of(adapted("lokr", linear(400, 900), rank=4, decompose_both=True))
    assert {name for name, leaf in lokr.items() if _is_kaiming(leaf)} == {"down1", "up", "down"}
    assert {name for name, leaf in lokr.items() if not leaf.any()} == {"up1"}


@pytest.mark.parametrize(("rank", "names"), [(4, {"first", "up", "down"}), (5, {"first", "second"})])
def test_a_rank_of_half_the_longer_side_takes_a_full_matrix(rank: int, names: set[str]) -> None:
    assert set(leaves_of(adapted("lokr", linear(100, 90), rank=rank))) == names  # 10 x 9 and 10 x 10


def test_the_entrywise_change_is_that_of_lycoris() -> None:
    functional = pytest.importorskip("lycoris.functional.loha")
    model = disturbed(adapted("loha", linear(20, 24), rank=3, alpha=6.0))
    leaves = [leaves_of(model)[name].detach() for name in ("down1", "up1", "down", "up")]
    torch.testing.assert_close(change(model), functional.diff_weight(*leaves, None, None, gamma=2.0))


@pytest.mark.parametrize(("rank", "both"), [(1, False), (1, True), (8, False)])
def test_the_kronecker_change_is_that_of_lycoris(rank: int, both: bool) -> None:
    functional = pytest.importorskip("lycoris.functional.lokr")
    model = disturbed(adapted("lokr", linear(20, 42), rank=rank, alpha=2.0 * rank, decompose_both=both))
    leaves = leaves_of(model)
    names = ("first", "up1", "down1", "second", "up", "down")
    given = [leaves[name].detach() if name in leaves else None for name in names]
    theirs = functional.weight_gen(base(model), rank, tucker=False, decompose_both=both)
    assert [getattr(w, "shape", None) for w in given] == [getattr(w, "shape", None) for w in theirs[:6]]
    wanted = functional.diff_weight(*given, None, gamma=2.0 * rank)
    unscaled = "first" in leaves and "second" in leaves  # there, two full factors are not scaled
    torch.testing.assert_close(change(model), (2.0 if unscaled else 1.0) * wanted)


def test_a_factor_of_minus_one_is_the_balanced_one_and_others_below_one_are_refused() -> None:
    models = [
        adapted("lokr", linear(20, 42), rank=2, **given) for given in ({}, {"factor": -1}, {"factor": 1})
    ]
    shapes = [{name: leaf.shape for name, leaf in leaves_of(model).items()} for model in models]
    assert shapes[0] == shapes[1] != shapes[2]
    for factor in (0, -2):
        with pytest.raises(InvalidOption, match=f"lokr: factor must be at least 1, .* not {factor}"):
            adapted("lokr", rank=2, factor=factor)
