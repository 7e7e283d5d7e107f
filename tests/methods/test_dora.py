"""DoRA: direction and length of every row."""

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
)  # fmt: skip
from methods._peft import DTYPES, HOSTS, assert_parity, lora_layout, twins
from peft import LoraConfig
from torch import Tensor

import rankfold as rf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["perceptron", "transposed", "convolution", "oblong", "llama", "embedding"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, fan_in_fan_out=host == "transposed")
    assert_parity(twins(HOSTS[host], dtype, "dora", config, lora_layout, rank=3, alpha=5))


def test_the_start_is_the_bases_output_and_the_lengths_its_rows() -> None:
    model, x = adapted("dora", rank=2, alpha=3), normal(5, 8)
    torch.testing.assert_close(leaves_of(model)["magnitude"].detach(), base(model).norm(dim=1))
    torch.testing.assert_close(model(x), linear()(x))


def test_an_embedding_has_one_length_per_column() -> None:
    model = rf.adapt(torch.nn.Sequential(torch.nn.Embedding(9, 4)), "dora", rank=2, targets="embeddings")
    leaves = leaves_of(model)
    assert leaves["magnitude"].shape == (4,)
    leaves["up"].data.normal_()
    lengths = expression_of(model).dense().detach().norm(dim=0)
    torch.testing.assert_close(lengths, leaves["magnitude"].detach())


def test_every_row_has_the_length_of_its_magnitude_at_all_times() -> None:
    model = disturbed(adapted("dora", rank=2, alpha=3), 2.0)
    lengths = expression_of(model).dense().detach().norm(dim=1)
    torch.testing.assert_close(lengths, leaves_of(model)["magnitude"].detach().abs())


def test_the_direction_is_that_of_the_scaled_sum() -> None:
    model = disturbed(adapted("dora", rank=2, alpha=3))
    leaves = {name: leaf.detach() for name, leaf in leaves_of(model).items()}
    direction = base(model) + 1.5 * leaves["up"] @ leaves["down"]
    expected = leaves["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(expression_of(model).dense().detach(), expected)


def test_the_change_is_of_full_rank() -> None:
    assert rank_of(change(disturbed(adapted("dora", rank=1)))) == 6


def test_the_bias_is_not_scaled() -> None:
    model = adapted("dora", rank=2)
    leaves_of(model)["magnitude"].data *= 3
    torch.testing.assert_close(model(torch.zeros(1, 8, dtype=torch.float64))[0], model[0].bias)


def _gradient_of_direction(detach: bool) -> tuple[Tensor, Tensor]:
    """Return V and its gradient, read off the up factor while the down factor is the identity."""
    model = adapted("dora", linear(8, 8), rank=8, detach=detach)
    leaves = leaves_of(model)
    leaves["down"].data = torch.eye(8, dtype=torch.float64)
    leaves["up"].data = 0.3 * normal(8, 8, seed=5)
    backward(model, normal(5, 8))
    return base(model) + leaves["up"].detach(), leaves["up"].grad  # type: ignore[return-value]


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_leaves_the_length_alone_only_if_the_norm_takes_part(detach: bool) -> None:
    direction, gradient = _gradient_of_direction(detach)
    along = (direction * gradient).sum(1).abs() / (direction.norm(dim=1) * gradient.norm(dim=1))
    assert (along.max() > 0.1) if detach else (along.max() < 1e-10)


def test_dropout_leaves_the_base_whole() -> None:
    model, x = adapted("dora", rank=2, dropout=0.5).train(), normal(5, 8)
    torch.testing.assert_close(model(x), linear()(x))
