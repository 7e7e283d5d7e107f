"""OLoRA: the leading columns of a QR factorisation."""

from typing import Any

import pytest
import torch
from methods._layers import adapted, base, leaves_of, linear, normal
from methods._peft import DTYPES, HOSTS, assert_parity, lora_layout, twins
from peft import LoraConfig


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Not on a transposed layer: peft factorises the matrix as it is stored, (in, out).
@pytest.mark.parametrize("host", ["perceptron", "llama"])
def test_outputs_and_gradients_are_pefts(host: str, dtype: torch.dtype) -> None:
    # peft factorises in float32 only, so in float64 its base is given the residual that our start leaves.
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="olora" if dtype == torch.float32 else True)

    def leave_residual(ours: Any, theirs: Any) -> None:
        own = {leaf.name: leaf.tensor().detach() for leaf in ours.expression.leaves()}
        theirs.get_base_layer().weight.data = own["W0"] - 2 * own["up.start"] @ own["down.start"]

    prepare = {} if dtype == torch.float32 else {"prepare": leave_residual}
    assert_parity(twins(HOSTS[host], dtype, "lora/olora", config, lora_layout, rank=3, alpha=6, **prepare))


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (7, 7)])
def test_the_up_factor_is_orthonormal_and_spans_the_first_columns(shape: tuple[int, int]) -> None:
    model = adapted("lora/olora", linear(*shape), rank=3, alpha=6)
    up, down, matrix = leaves_of(model)["up"], leaves_of(model)["down"], base(model)
    torch.testing.assert_close(up.T @ up, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(up @ down, up @ up.T @ matrix)
    torch.testing.assert_close((up @ down)[:, :3], matrix[:, :3])


@pytest.mark.parametrize("alpha", [3, 6])
def test_the_start_is_the_bases_output(alpha: float) -> None:
    x = normal(5, 8)
    torch.testing.assert_close(adapted("lora/olora", rank=3, alpha=alpha)(x), linear()(x))


def test_the_factors_are_not_divided_by_the_scaling() -> None:
    # With s = 2 the residual is a reflection of W0, so it keeps its norm.
    model = adapted("lora/olora", rank=3, alpha=6)
    leaves, matrix = leaves_of(model), base(model)
    residual = matrix - 2 * leaves["up"] @ leaves["down"]
    torch.testing.assert_close(residual.norm(), matrix.norm())
