"""BOFT: butterflies of block rotations on the input side."""

import copy

import pytest
import torch
from methods._layers import adapted, base, count, disturbed, expression_of, leaves_of, linear, normal
from peft import BOFTConfig, get_peft_model
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.rotations import butterfly


def boft(factors: int, columns: int = 16, *, scaled: bool = False, size: int = 4) -> torch.nn.Module:
    options = {"block_size": size, "factors": factors, "scaled": scaled}
    return disturbed(adapted(rf.Recipe(("boft", options)), linear(6, columns)), size=1.0)


def skew(numbers: Tensor) -> Tensor:
    full = numbers.new_zeros(len(numbers), 4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    full[:, rows, columns] = numbers
    return full - full.mT


def test_outputs_and_gradients_of_one_factor_are_pefts() -> None:
    # More factors peft computes with a compiled extension only.
    factors = 1
    ours, x, weights = boft(factors, scaled=True), normal(5, 16), normal(5, 6, seed=3)
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["0"])
    theirs = get_peft_model(copy.deepcopy(linear(6, 16)), config).double()
    layer, own = theirs.base_model.model[0], leaves_of(ours)
    rotations, scale = layer.boft_R["default"], layer.boft_s["default"]
    assert len(rotations) == factors
    rotations.data = torch.stack([skew(own[f"skew{i}"].detach()) for i in range(factors)])
    scale.data = own["scale"].detach()[:, None].clone()
    outputs = [ours(x), theirs(x)]
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(own["scale"].grad, scale.grad[:, 0])
    # They keep whole matrices of which the skew half counts, so that either half gets half of the gradient.
    for i in range(factors):
        torch.testing.assert_close(skew(own[f"skew{i}"].grad), 2 * rotations.grad[i])


def test_the_order_of_the_second_factor_is_pefts() -> None:
    theirs = BOFTLayer.block_butterfly_perm(None, 32, 4, 2, 2)  # type: ignore[arg-type]
    assert torch.equal(butterfly(32, 2, 1), theirs)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_the_gram_matrix_of_the_rows_is_kept(factors: int) -> None:
    model = boft(factors)
    matrix = expression_of(model).dense().detach()
    torch.testing.assert_close(matrix @ matrix.T, base(model) @ base(model).T)
    assert count(model) == factors * 16 * 3 // 2


def test_a_trained_scale_is_all_that_changes_the_lengths_of_the_rows() -> None:
    model = boft(2, scaled=True)
    lengths = [m.norm(dim=1) for m in (expression_of(model).dense().detach(), base(model))]
    torch.testing.assert_close(lengths[0], lengths[1] * leaves_of(model)["scale"].detach().abs())


@pytest.mark.parametrize(("factors", "reached"), [(1, 4), (2, 8), (3, 16), (4, 32)])
def test_every_factor_doubles_how_many_inputs_an_input_reaches(factors: int, reached: int) -> None:
    rotation = torch.eye(32, dtype=torch.float64)
    for factor in list(expression_of(boft(factors, 32)).factors)[1:]:  # type: ignore[arg-type,union-attr]
        rotation = rotation @ factor.dense().detach().double()  # type: ignore[union-attr,operator]
    assert ((rotation.abs() > 1e-12).sum(1) == reached).all()


def test_inputs_that_the_butterfly_cannot_divide_are_refused() -> None:
    with pytest.raises(InvalidOption, match="inputs that are a multiple of 8, not 12; use fewer factors"):
        boft(2, 12)
    with pytest.raises(InvalidOption, match="boft cannot cut 9 inputs into blocks of 2 to 4 of even size"):
        boft(2, 9)
    with pytest.raises(InvalidOption, match="factors >= 1"):
        boft(0)
