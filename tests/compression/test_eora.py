import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BaseMismatch, InvalidOption
from rankfold.statistics.finite import NotFinite


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).double()


def _pruned(model: nn.Sequential) -> nn.Sequential:
    """Return a copy of which the two smallest of every four numbers are zero."""
    twin = copy.deepcopy(model)
    for layer in (twin[0], twin[2]):
        groups = layer.weight.data.view(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
    return twin


def _inputs(tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = torch.diag(torch.logspace(0, -2, 12)).double()
    mixed = torch.linalg.qr(torch.randn(12, 12, generator=generator).double()).Q
    return torch.randn(tokens, 12, generator=generator).double() @ spread @ mixed


def _compensated(small: nn.Module, model: nn.Module, inputs: Tensor, **options: Any) -> nn.Module:
    return rf.compress(copy.deepcopy(small), "eora", original=model, data=[inputs], progress=False, **options)


def _ranks(model: nn.Module) -> list[int]:
    layers = [layer for layer in model if hasattr(layer, "expression")]
    return [next(iter(layer.expression.pairs())).up.shape[1] for layer in layers]


def _error(small: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((small(inputs) - model(inputs)).norm())


def test_the_error_of_the_outputs_is_the_tail_of_the_spectrum() -> None:
    model, inputs = _model()[:1], _inputs()
    small = _pruned(nn.Sequential(model[0], nn.Identity(), nn.Linear(16, 8)))[:1]
    lost = (model[0].weight - small[0].weight).detach()
    values = torch.linalg.svdvals(inputs @ lost.T)
    for rank in (1, 3, 6):
        done = _compensated(small, model, inputs, rank=rank, targets="0")
        assert _error(done, model, inputs) == pytest.approx(float(values[rank:].norm()), rel=1e-6)


def test_it_is_better_than_the_plain_decomposition_of_what_was_lost() -> None:
    model, inputs = _model(), _inputs()
    small = _pruned(model)
    plain = copy.deepcopy(small)
    for i in (0, 2):
        left, values, right = torch.linalg.svd(model[i].weight - small[i].weight, full_matrices=False)
        plain[i].weight.data += (left[:, :3] * values[:3]) @ right[:3]
    done = _compensated(small, model, inputs, rank=3)
    assert _error(done, model, inputs) < _error(plain, model, inputs) < _error(small, model, inputs)


def test_all_ranks_restore_the_original() -> None:
    model, inputs = _model(), _inputs()
    done = _compensated(_pruned(model), model, inputs, rank=16)
    assert _error(done, model, inputs) < 1e-9
    torch.testing.assert_close(rf.fold(done)[0].weight, model[0].weight)


def test_nothing_left_of_the_weight_makes_it_svd_llm() -> None:
    model, inputs = _model()[:1], _inputs()
    empty = copy.deepcopy(model)
    empty[0].weight.data.zero_()
    done = _compensated(empty, model, inputs, rank=3, targets="0")
    svd_llm = rf.compress(copy.deepcopy(model), "svd-llm", keep=0.44, data=[inputs], progress=False)
    assert _ranks(svd_llm[:1]) == [3]
    torch.testing.assert_close(done[0].expression.dense(), svd_llm[0].expression.dense())


def test_the_scale_of_the_inputs_changes_nothing() -> None:
    model, inputs = _model()[:1], _inputs()
    small = _pruned(_model())[:1]
    one = _compensated(small, model, inputs, rank=2, targets="0")
    other = _compensated(small, model, 7 * inputs, rank=2, targets="0")
    torch.testing.assert_close(one[0].expression.dense(), other[0].expression.dense())


def test_a_weight_is_compensated_on_inputs_from_behind_the_compensated_ones() -> None:
    model, inputs = _model(), _inputs()
    done = _compensated(_pruned(model), model, inputs, rank=2)
    with torch.no_grad():
        hidden = done[1](done[0](inputs))
    lost = (model[2].weight - _pruned(model)[2].weight).detach()
    change = done[2].expression.dense() - _pruned(model)[2].weight
    tail = float(torch.linalg.svdvals(hidden @ lost.T)[2:].norm())
    assert float((hidden @ (lost - change).T).norm()) == pytest.approx(tail, rel=1e-6)


def test_a_product_takes_the_compensation_up_as_further_ranks(tmp_path) -> None:
    model, inputs = _model(), _inputs()
    small = rf.compress(copy.deepcopy(model), "svd", keep=0.4, progress=False)
    ranks = _ranks(small)
    before = _error(small, model, inputs)
    rf.compress(small, "eora", original=model, data=[inputs], rank=2, progress=False)
    assert _ranks(small) == [rank + 2 for rank in ranks]
    assert _error(small, model, inputs) < before
    rf.save(small, tmp_path / "saved")
    loaded = rf.load(copy.deepcopy(model), tmp_path / "saved")
    assert torch.equal(loaded(inputs), small(inputs))


def test_a_quantised_base_is_compensated() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    inputs, small = torch.randn(256, 64), copy.deepcopy(model)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    before = _error(small, model, inputs)
    done = rf.compress(small, "eora", original=model, data=[inputs], rank=32, progress=False)
    assert _error(done, model, inputs) < 0.75 * before


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = _model()
    small = _pruned(model)
    with pytest.raises(InvalidOption, match="have 3 tokens, and its 12 inputs want at least as many"):
        rf.compress(small, "eora", original=model, data=[_inputs(3)], progress=False)
    assert type(small[0]) is nn.Linear
    with pytest.raises(InvalidOption, match="pass the model as it was before as original="):
        rf.compress(small, "eora", data=[_inputs()], progress=False)
    other = nn.Sequential(nn.Linear(12, 15), nn.ReLU(), nn.Linear(15, 8)).double()
    with pytest.raises(BaseMismatch, match="0 is 16x12 in the compressed model and 15x12 in the original"):
        rf.compress(small, "eora", original=other, data=[_inputs()], progress=False)
    with pytest.raises(InvalidOption, match="leave keep= away"):
        rf.compress(small, "eora", original=model, data=[_inputs()], keep=0.5, progress=False)


def test_a_second_compensation_takes_up_what_the_first_left() -> None:
    model, inputs = _model(), _inputs()
    once = _compensated(_pruned(model), model, inputs, rank=2)
    twice = _compensated(once, model, inputs, rank=8)
    assert _ranks(twice) == [10, 10]
    assert _error(twice, model, inputs) < 0.5 * _error(once, model, inputs)
    rest = _compensated(once, model, inputs, rank=12)
    assert _error(rest, model, inputs) < 1e-9


def test_weights_that_are_no_products_in_a_factorised_model_are_left_and_named() -> None:
    model, inputs, notes = _model(), _inputs(), list[str]()
    small = rf.compress(copy.deepcopy(model), "svd", keep=0.5, targets="0", progress=False)
    again = _compensated(small, model, inputs, rank=12, report=lambda report: notes.extend(report.notes))
    assert notes == ["not compensated, since they are no products: 2"]
    assert _error(again, model, inputs) < 1e-9


def test_an_original_without_the_layer_is_refused() -> None:
    model = _model()
    with pytest.raises(BaseMismatch, match="2 is 8x16 in the compressed model and nothing in the original"):
        _compensated(_pruned(model), model[:2], _inputs(), rank=2)


def test_nan_in_the_original_is_named() -> None:
    model = _model()
    small = _pruned(model)
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"^2: the weight of the original holds NaN"):
        _compensated(small, model, _inputs(), rank=2)
