"""PiSSA: the leading singular triplets train."""

from typing import Any

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    disturbed,
    leaves_of,
    linear,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, layer_paths, lora_layout, twins
from peft import LoraConfig, get_peft_model
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["perceptron", "transposed", "llama"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    # peft decomposes in float32 only, so in float64 its base is given the residual that our start leaves.
    config = LoraConfig(
        r=3, lora_alpha=6, fan_in_fan_out=host == "transposed",
        init_lora_weights="pissa" if dtype == torch.float32 else True,
    )  # fmt: skip

    def leave_residual(ours: Any, theirs: Any) -> None:
        own = {leaf.name: leaf.tensor().detach() for leaf in ours.expression.leaves()}
        residual = own["W0"] - 2 * own["up.start"] @ own["down.start"]
        theirs.get_base_layer().weight.data = residual.T if host == "transposed" else residual

    prepare = {} if dtype == torch.float32 else {"prepare": leave_residual}
    assert_parity(twins(HOSTS[host], dtype, "lora/pissa", config, lora_layout, rank=3, alpha=6, **prepare))


def test_the_start_is_pefts_up_to_signs() -> None:
    host = HOSTS["perceptron"]
    ours = host.model(torch.float32)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=list(host.paths))
    theirs = get_peft_model(host.model(torch.float32), config)
    paths = layer_paths(host, ours)
    rf.adapt(ours, "lora/pissa", rank=3, alpha=6, targets=paths)
    for path in paths:
        own, other = leaves_of(ours, path), theirs.base_model.model.get_submodule(path)
        for mine, name in ((own["up"], "lora_B"), (own["down"].T, "lora_A")):
            value = getattr(other, name)["default"].weight
            value = value if name == "lora_B" else value.T
            torch.testing.assert_close(mine.abs(), value.abs(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("alpha", [3, 12])
def test_the_start_is_the_bases_output(structure: str, alpha: float) -> None:
    x = normal(5, 8)
    torch.testing.assert_close(adapted(f"{structure}/pissa", rank=3, alpha=alpha)(x), linear()(x))


@pytest.mark.parametrize("alpha", [3, 12])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_scaled_product_is_the_best_approximation_for_any_alpha(
    shape: tuple[int, int], alpha: float
) -> None:
    model = adapted("lora/pissa", linear(*shape), rank=3, alpha=alpha)
    leaves, matrix = leaves_of(model), base(model)
    rest = matrix - alpha / 3 * leaves["up"] @ leaves["down"]
    tail = torch.linalg.svdvals(matrix)[3:]
    torch.testing.assert_close(rest.square().sum(), tail.square().sum())


def test_the_factors_are_balanced() -> None:
    leaves = leaves_of(adapted("lora/pissa", rank=3, alpha=12))
    up, down = leaves["up"], leaves["down"]
    torch.testing.assert_close(up.T @ up, down @ down.T)


def test_the_change_has_at_most_twice_the_rank() -> None:
    model = disturbed(adapted("lora/pissa", linear(12, 12), rank=3))
    assert rank_of(change(model)) == 6


def test_both_factors_train_from_the_first_step_on() -> None:
    model = adapted("lora/pissa", rank=3)
    backward(model, normal(5, 8))
    assert all(leaves_of(model)[name].grad.norm() > 1e-3 for name in ("up", "down"))


def test_a_change_within_the_leading_subspace_is_learned_faster_than_by_lora() -> None:
    model = linear(20, 20)
    left, values, right = torch.linalg.svd(model[0].weight.data)
    values[:3] *= torch.tensor([1.5, 0.5, 1.3], dtype=torch.float64)
    target, x = left * values @ right, normal(200, 20)

    def loss_after(method: str) -> float:
        trained = adapted(method, linear(20, 20), rank=3)
        for _ in range(20):
            trained.zero_grad()
            loss = (trained(x) - x @ target.T - trained[0].bias).square().mean()
            loss.backward()
            sgd_step(trained, 1.0)
        return float(loss.detach())

    assert loss_after("lora/pissa") < 0.5 * loss_after("lora")


def test_the_randomised_decomposition_is_close_on_a_flat_spectrum() -> None:
    # Without oversampling it is off by a large part of the norm.
    matrix = normal(48, 64)
    model = nn.Sequential(nn.Linear(64, 48)).double()
    model[0].weight.data = matrix.clone()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :8] * values[:8] @ right[:8]
    leaves = leaves_of(adapted(rf.Recipe("lora", ("pissa", {"iterations": 16})), model, rank=8))
    assert (leaves["up"] @ leaves["down"] - best).norm() < 0.05 * best.norm()
    torch.testing.assert_close(model(normal(3, 64)), normal(3, 64) @ matrix.T + model[0].bias)


def test_a_negative_count_of_iterations_is_refused() -> None:
    with pytest.raises(InvalidOption, match="iterations must be at least 0"):
        adapted(rf.Recipe("lora", ("pissa", {"iterations": -1})), rank=2)
