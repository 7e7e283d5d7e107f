"""Sensitivity-LoRA: ranks in proportion to second-order sensitivities."""

from typing import Any

import pytest
import torch
from methods._calibrated import squares
from methods._layers import linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.ranks.sensitivity_lora import effective_rank, sensitivity_lora, top_mean
from rankfold.methods.rules import Unit


class Seen:
    """A weight of which these statistics are known."""

    device = torch.device("cpu")

    def __init__(self, matrix: Tensor, **known: Tensor) -> None:
        self.known, self.stored = known, matrix

    def statistic(self, name: str) -> Tensor:
        return self.known[name]

    def matrix(self) -> Tensor:
        return self.stored


def shared(
    *fishers: Tensor, rank: int = 8, limit: int | None = None, multiple: int = 1, **options: Any
) -> list[int]:
    """Return the ranks of weights with these squared gradients."""
    units = [
        Unit(
            str(i),
            tuple(f.shape),
            limit=limit,
            multiple=multiple,
            site=Seen(normal(*f.shape), squared_gradient=f),
        )
        for i, f in enumerate(fishers)
    ]
    found = sensitivity_lora(units, rank, **options)
    return [found[unit.path] for unit in units]


def fishers(*scales: float, shape: tuple[int, int] = (10, 12)) -> list[Tensor]:
    return [scale * normal(*shape, seed=i).square() for i, scale in enumerate(scales)]


@pytest.mark.parametrize("local", ["top-k", "effective-rank"])
@pytest.mark.parametrize("multiple", [1, 2])
def test_the_ranks_sum_to_what_was_asked_for(local: str, multiple: int) -> None:
    for seed in range(20):
        scales = normal(5, seed=seed).exp().square().tolist()
        found = shared(*fishers(*scales), local=local, multiple=multiple, limit=10)
        assert sum(found) == 40
        assert all(rank % multiple == 0 and 4 <= rank <= 10 for rank in found)


@pytest.mark.parametrize("local", ["top-k", "effective-rank"])
def test_equal_sensitivities_give_the_uniform_rank(local: str) -> None:
    assert shared(*[fishers(1.0)[0]] * 4, local=local) == [8] * 4
    assert shared(*[torch.zeros(4, 5)] * 3, local=local) == [8] * 3


@pytest.mark.parametrize("local", ["top-k", "effective-rank"])
def test_scaling_all_sensitivities_changes_nothing(local: str) -> None:
    given = fishers(1.0, 3.0, 0.5, 2.0)
    assert shared(*given, local=local) == shared(*(1e-9 * f for f in given), local=local) != [8] * 4


def test_a_more_sensitive_weight_never_gets_less() -> None:
    for seed in range(10):
        least = fishers(1.0)[0]
        given = [least, least + normal(10, 12, seed=seed).abs(), least + 1 + normal(10, 12, seed=seed).abs()]
        found = shared(*given, maximum=3.0)
        assert found == sorted(found)
        assert found[0] < found[2]


def test_the_shares_are_in_proportion_between_the_bounds() -> None:
    assert shared(*(scale * torch.ones(6, 6) for scale in (1.0, 2.0, 3.0, 2.0))) == [4, 8, 12, 8]
    assert shared(torch.ones(6, 6), 1e9 * torch.ones(6, 6), maximum=1.5) == [4, 12]


def test_the_metrics_are_mixed_by_beta() -> None:
    flat, peaked = torch.ones(10, 10), torch.zeros(10, 10)
    peaked[0, 0] = 50.0  # half the mean, fifty times the largest
    assert shared(flat, peaked, beta=1.0, maximum=4.0, minimum=0.0) == [11, 5]
    assert shared(flat, peaked, beta=0.0, maximum=4.0, minimum=0.0)[1] == 16
    spread = shared(normal(10, 10).square(), flat, beta=0.0, local="effective-rank", minimum=0.0)
    assert spread[0] > spread[1]


def test_the_local_metrics() -> None:
    assert top_mean(torch.arange(200.0), 0.01) == 198.5
    assert top_mean(torch.arange(5.0), 0.01) == 4.0
    assert effective_rank(torch.ones(4, 6)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([1.0, 3.0]))) == pytest.approx(4 / 27**0.25)


def test_saliency_weighs_the_curvature_by_the_weights() -> None:
    given = [torch.ones(6, 6)] * 2
    units = [
        Unit(str(i), (6, 6), site=Seen((i + 1.0) * torch.ones(6, 6), squared_gradient=given[i]))
        for i in (0, 1)
    ]
    assert list(sensitivity_lora(units, 10, weighted=True).values()) == [5, 15]  # 4 and 16, within the bounds
    assert list(sensitivity_lora(units, 10).values()) == [10, 10]


class Twins(nn.Module):
    """Two layers of one shape, the second of which matters more to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud = linear(6, 8, seed=1)[0], linear(6, 8, seed=2)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.quiet(x) + 3 * self.loud(x)


@pytest.mark.parametrize("hessian", ["fisher", "hutchinson"])
def test_the_layer_that_matters_more_gets_more(hessian: str) -> None:
    recipe = rf.Recipe("lora", ranks=("sensitivity-lora", {"hessian": hessian}))
    data = [(normal(20, 8, seed=i), normal(20, 6, seed=i + 9)) for i in range(3)]
    model = rf.adapt(
        Twins(), recipe, rank=4, alpha=8, targets=["quiet", "loud"], data=data, loss=squares, progress=False
    )
    pairs = {path: next(e.pairs()) for path, e in model.__dict__["_rankfold"].expressions("default").items()}
    assert {path: pair.up.shape[1] for path, pair in pairs.items()} == {"quiet": 2, "loud": 6}
    assert {pair.scale for pair in pairs.values()} == {2.0}


def test_the_gram_needs_no_loss_and_ties_weights_that_share_an_input() -> None:
    recipe = rf.Recipe("lora", ranks=("sensitivity-lora", {"hessian": "gram"}))
    model = rf.adapt(
        Twins(), recipe, rank=4, targets=["quiet", "loud"], data=[(normal(20, 8),)], progress=False
    )
    assert {leaf.shape for leaf in model.loud.expression.leaves() if leaf.name == "up"} == {(6, 4)}


def test_it_has_a_data_set_of_its_own_beside_a_start_that_reads_two() -> None:
    recipe = rf.Recipe("lora", "fila", ("sensitivity-lora", {}))
    own, forget, retain = ([(normal(20, 8, seed=i), normal(20, 6, seed=i + 9))] for i in range(3))
    data = {"calibration": own, "forget": forget, "retain": retain}
    given = {"targets": ["quiet", "loud"], "loss": squares, "progress": False}
    model = rf.adapt(Twins(), recipe, rank=2, data=data, **given)
    alone = rf.adapt(Twins(), rf.Recipe("lora", ranks="sensitivity-lora"), rank=2, data=own, **given)
    ranks = [m.__dict__["_rankfold"].adapter().record["ranks"] for m in (model, alone)]
    assert ranks[0] == ranks[1] == {"quiet": 1, "loud": 3}


def test_hutchinsons_negative_entries_count_as_zero() -> None:
    given = [torch.ones(6, 6), torch.ones(6, 6) - 3 * torch.eye(6)]
    units = [Unit(str(i), (6, 6), site=Seen(normal(6, 6), hessian_diagonal=h)) for i, h in enumerate(given)]
    found = sensitivity_lora(units, 12, hessian="hutchinson", beta=1.0)
    assert list(found.values()) == [13, 11]


@pytest.mark.parametrize(
    "options", [{"beta": 1.5}, {"top": 0.0}, {"minimum": 1.5}, {"maximum": 0.9}, {"local": "trace"}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"sensitivity-lora: {next(iter(options))} must be"):
        shared(*fishers(1.0, 2.0), **options)


def test_an_unknown_hessian_is_refused() -> None:
    with pytest.raises(InvalidOption, match="hessian must be one of fisher, hutchinson, gram, not 'exact'"):
        rf.adapt(linear(), rf.Recipe("lora", ranks=("sensitivity-lora", {"hessian": "exact"})), targets=["0"])
