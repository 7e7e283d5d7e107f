"""LoRA and its rank-stabilised scaling."""

import math
from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    convolution,
    disturbed,
    leaves_of,
    linear,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, lora_layout, twins
from peft import LoraConfig

from rankfold.errors import InvalidOption


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["by rank", "by root"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype, rank_stabilised: bool) -> None:
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=rank_stabilised, lora_dropout=0.1, fan_in_fan_out=host == "transposed"
    )
    # Both in evaluation: dropout is switched off.
    dropout = 0.0 if host == "embedding" else 0.1
    assert_parity(
        twins(
            HOSTS[host],
            dtype,
            "lora",
            config,
            lora_layout,
            rank=3,
            alpha=5,
            rank_stabilised=rank_stabilised,
            dropout=dropout,
        )
    )


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_at_the_start_only_the_up_factor_has_a_gradient(rank_stabilised: bool) -> None:
    model = adapted("lora", rank=2, alpha=3, rank_stabilised=rank_stabilised)
    x = normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    dense, leaves = backward(model, x), leaves_of(model)
    scaling = 3 / math.sqrt(2) if rank_stabilised else 3 / 2
    torch.testing.assert_close(leaves["up"].grad, scaling * dense @ leaves["down"].T)
    assert torch.equal(leaves["down"].grad, torch.zeros(2, 8, dtype=torch.float64))


def test_the_first_step_moves_the_weight_along_the_projected_gradient() -> None:
    model = adapted("lora", rank=2, alpha=3)
    dense, down = backward(model, normal(5, 8)), leaves_of(model)["down"].detach().clone()
    sgd_step(model, 0.1)
    torch.testing.assert_close(change(model), -0.1 * 1.5**2 * dense @ down.T @ down)


def test_alpha_is_the_rank_unless_it_is_given() -> None:
    torch.testing.assert_close(
        change(disturbed(adapted("lora", rank=4))), change(disturbed(adapted("lora", rank=4, alpha=4)))
    )


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (6, 6)])
def test_the_rank_of_the_change_is_reached_and_never_passed(shape: tuple[int, int]) -> None:
    model = disturbed(adapted("lora", linear(*shape), rank=3))
    assert rank_of(change(model)) == 3


def test_rank_stabilised_scaling_makes_the_first_step_independent_of_the_rank() -> None:
    def moved(rank: int, stabilised: bool) -> float:
        """The component of the output's change along -G x, in units of the learning rate."""
        total, x = 0.0, normal(300, 256)
        for seed in range(3):
            model = adapted(
                "lora", linear(32, 256), rank=rank, alpha=1, rank_stabilised=stabilised, seed=seed
            )
            along = -x @ backward(model, x).T
            sgd_step(model, 1.0)
            total += float((x @ change(model).T * along).sum() / along.square().sum())
        return total

    assert moved(32, True) / moved(8, True) == pytest.approx(1, abs=0.15)
    assert moved(32, False) / moved(8, False) == pytest.approx(1 / 4, abs=0.04)


def test_dropout_acts_on_the_change_only() -> None:
    model = adapted("lora", rank=2, dropout=0.5).train()
    x = normal(50, 8)
    assert torch.equal(model(x), linear()(x))
    disturbed(model)
    plain = x @ base(model).T + model[0].bias
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = torch.stack([model(x) - plain for _ in range(400)])
    expected = x @ change(model).T
    assert not torch.allclose(noisy[0], expected)
    assert (noisy.mean(0) - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(model.eval()(x) - plain, expected)


def test_a_convolution_starts_with_a_kernel_of_its_own_fan_in() -> None:
    down = leaves_of(adapted("lora", convolution(), rank=6))["down"]
    assert down.shape == (6, 24)
    assert 0.8 / math.sqrt(24) < down.abs().max() <= 1 / math.sqrt(24)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0}, {"alpha": -1.0}, {"alpha": math.nan}, {"alpha": math.inf}, {"alpha": "big"},
     {"dropout": 1.0}, {"dropout": -0.1}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        adapted("lora", rank=2, **options)
