"""ASVD scales columns by what they meet, and searches ranks by what cutting one weight does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compression._calibrated import compressed, inputs, layer, weight
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.shares import Unit, sensitivity
from rankfold.errors import InvalidOption


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("statistic", "power"), [("absolute mean", 1), ("norm", 2)])
def test_it_is_the_decomposition_of_the_scaled_weight(alpha: float, statistic: str, power: int) -> None:
    x, plain = inputs(), layer()
    model = compressed(copy.deepcopy(plain), "asvd", data=[x[:50], x[50:]], alpha=alpha, statistic=statistic)
    scale = x.abs().pow(power).mean(0).pow(alpha / power)
    left, values, right = torch.linalg.svd(weight(plain) * scale, full_matrices=False)
    torch.testing.assert_close(weight(model), left[:, :3] * values[:3] @ right[:3] / scale)


def test_without_scaling_it_is_svd_and_a_channel_that_is_never_used_is_no_division_by_zero() -> None:
    x, plain = inputs(), layer()
    none = weight(compressed(copy.deepcopy(plain), "asvd", data=[x], alpha=0.0))
    torch.testing.assert_close(none, weight(compressed(copy.deepcopy(plain), "svd")))
    x[:, 0] = 0
    assert weight(compressed(copy.deepcopy(plain), "asvd", data=[x])).isfinite().all()
    assert weight(compressed(copy.deepcopy(plain), "asvd", data=[0 * x])).isfinite().all()


def test_options_outside_their_limits_are_refused() -> None:
    with pytest.raises(InvalidOption, match="alpha must be at least 0, not -1"):
        compressed(layer(), "asvd", data=[inputs()], alpha=-1.0)
    with pytest.raises(InvalidOption, match="statistic must be one of absolute mean, norm"):
        compressed(layer(), "asvd", data=[inputs()], statistic="median")


# Ranks by sensitivity ---------------------------------------------------------------------------------


def unit(path: str, losses: dict[int, float], shape: tuple[int, int] = (20, 20)) -> Unit:
    return Unit(path, shape, measure=losses.__getitem__)


LADDER = (0.2, 0.5, 0.8)  # of a weight 20 x 20: ranks 2, 5, 8


def test_the_lowest_bound_that_meets_the_budget_holds_for_all_weights() -> None:
    units = [
        unit("tough", {2: 1.1, 5: 1.0, 8: 0.9}),
        unit("tender", {2: 9.0, 5: 5.0, 8: 3.0}),
        unit("middle", {2: 4.0, 5: 2.0, 8: 1.5}),
    ]
    assert sensitivity(units, 1200, ladder=LADDER) == {"tough": None, "tender": None, "middle": None}
    assert sensitivity(units, 1100, ladder=LADDER) == {"tough": 5, "tender": None, "middle": None}
    assert sensitivity(units, 700, ladder=LADDER) == {"tough": 2, "tender": None, "middle": 5}
    assert sensitivity(units, 500, ladder=LADDER) == {"tough": 2, "tender": 8, "middle": 2}
    assert sensitivity(units, 240, ladder=LADDER) == {"tough": 2, "tender": 2, "middle": 2}
    with pytest.raises(InvalidOption, match=r"least share of the ladder, 0\.2, 240 numbers remain"):
        sensitivity(units, 239, ladder=LADDER)
    with pytest.raises(InvalidOption, match="ladder must hold shares in"):
        sensitivity(units, 700, ladder=(0.5, 1.0))


class Uneven(nn.Module):
    """Two layers side by side, of which the second hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Return outputs, and the loss where there are labels."""
        y = self.first(x) + 0.01 * self.second(x)
        return y if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def uneven() -> Uneven:
    torch.manual_seed(0)
    return Uneven().double()


@pytest.mark.parametrize("with_loss", [True, False])
def test_weights_that_the_output_hardly_depends_on_are_cut_first(with_loss: bool) -> None:
    x, model = inputs(), uneven()
    batch = {"x": x, "labels": model(x).detach()} if with_loss else {"x": x}
    before = copy.deepcopy(model.state_dict())
    reports: list[Any] = []
    share = ("sensitivity", {"ladder": [0.3, 0.6]})
    rf.compress(model, "asvd", keep=0.7, data=[batch], share=share, progress=False, report=reports.append)
    ranks = {row.weight: row.rank for row in reports[0].rows}
    assert ranks == {"first": None, "second": 1}
    assert torch.equal(model.first.weight, before["first.weight"])
    even = rf.compress(uneven(), "asvd", keep=0.7, data=[batch], progress=False)
    x_, whole = inputs(300), uneven()
    assert (model(x_) - whole(x_)).norm() < 0.1 * (even(x_) - whole(x_)).norm()


def test_measuring_leaves_the_model_as_it_was_and_needs_batches() -> None:
    model = uneven().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidOption, match="least share of the ladder"):
        rf.compress(
            model, "asvd", keep=0.3, data=[inputs()], share=("sensitivity", {"ladder": [0.9]}), progress=False
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    with pytest.raises(InvalidOption, match="runs the model on data; pass data= with batches"):
        rf.compress(model, "svd", keep=0.5, share="sensitivity", progress=False)
