"""What initialisers and rank rules need from data is asked for, collected once, and read from the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods._layers import normal
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.calibrate import needed
from rankfold.methods.recipe import resolve

BATCHES = [normal(4, 6, seed=seed) for seed in (1, 2)]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def adapted(point: str, base: nn.Module | None = None, **arguments: Any) -> Any:
    given = {"rank": 2, "loss": loss, "progress": False, **arguments}
    return rf.adapt(model() if base is None else base, point, **given)


def start(found: Any, name: str = "default") -> torch.Tensor:
    return found[0].adapters[name].leaf("down").value  # type: ignore[no-any-return]


def test_statistics_that_two_methods_read_alike_are_collected_once() -> None:
    sets = needed(resolve("lora/init=gora/ranks=gora", {}), 2, 2)
    assert sets == {"": [("gradient", {})]}
    assert set(needed(resolve("lora/fila", {}), 2, 2)) == {"forget", "retain"}


def test_statistics_collected_before_give_the_start_that_their_batches_give() -> None:
    statistics = rf.collect(model(), BATCHES, "gradient", loss=loss, progress=False)
    assert torch.equal(
        start(adapted("lora/lora-ga", data=BATCHES)), start(adapted("lora/lora-ga", data=statistics))
    )


def test_statistics_that_leave_a_weight_out_are_refused() -> None:
    statistics = rf.collect(model(), BATCHES, "gradient", loss=loss, targets=["0"], progress=False)
    with pytest.raises(InvalidOption, match=r"do not cover 2 \(1 missing\)"):
        adapted("lora/lora-ga", data=statistics, targets=["0", "2"])


def test_a_second_adapter_starts_from_the_base_and_not_from_the_first() -> None:
    base = adapted("lora", name="first")
    base[0].adapters["first"].leaf("up").value.data.fill_(1.0)
    second = adapted("lora/lora-ga", base, data=BATCHES, name="second")
    assert torch.equal(start(second, "second"), start(adapted("lora/lora-ga", data=BATCHES)))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(InvalidOption, match="lr must be a positive finite number"):
        adapted("lora-xs/lora-sb", data=BATCHES, lr=rate)


def test_a_learning_rate_that_nothing_reads_is_refused() -> None:
    with pytest.raises(Incompatible, match="lora-ga does not depend on the learning rate; leave lr= away"):
        adapted("lora/lora-ga", data=BATCHES, lr=1e-3)
