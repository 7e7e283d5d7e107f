"""Quantised linears on a CPU: torchao int8 weight-only and bitsandbytes NF4."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers.models import Memory, adapted, perturb, seeded
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import UnsupportedLayer
from rankfold.layers import FoldError, Requantised

WIDTH, OUT = 64, 128


def int8() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Tanh(), nn.Linear(OUT, WIDTH, bias=False))
    quantize_(model, Int8WeightOnlyConfig())
    return model


def nf4() -> nn.Module:
    import bitsandbytes as bnb

    layers = [nn.Linear(WIDTH, OUT), nn.Tanh(), nn.Linear(OUT, WIDTH, bias=False)]
    for place in (0, 2):
        plain = layers[place]
        layer = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, plain.bias is not None, torch.float32, quant_type="nf4"
        )
        layer.load_state_dict(plain.state_dict())
        layers[place] = layer.to("cpu")
    return nn.Sequential(*layers)


FORMS: dict[str, Callable[[], nn.Module]] = {"int8": int8, "nf4": nf4}
# int8 keeps about eight bits of every row; NF4 four bits of every block of 64.
WORST = {"int8": 0.01, "nf4": 0.15}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(form: str) -> nn.Module:
    return seeded(FORMS[form]).train()  # bitsandbytes packs weights anew in evaluation on some processors


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def read_off(layer: nn.Module) -> Tensor:
    """Return the matrix that a linear layer applies."""
    with torch.no_grad():
        columns = layer(torch.eye(layer.in_features))
    return (columns if layer.bias is None else columns - layer.bias).T


def train(model: nn.Module, x: Tensor, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ["lora", "lora/pissa", "dora", "lora-xs", "hira", "hra", "vera"])
def test_a_quantised_linear_is_adapted_trained_and_given_back(
    model: nn.Module, x: Tensor, method: str
) -> None:
    before, matrix = model(x), read_off(model[0])
    modules = list(model)
    rf.adapt(model, method, rank=2)
    torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    losses = train(model, x)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model[0].matrix(), matrix)
    rf.remove(model)
    assert all(now is then for now, then in zip(model, modules, strict=True))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "hra"])
def test_an_adapted_quantised_linear_equals_its_matrix(model: nn.Module, x: Tensor, method: str) -> None:
    adapted(model, method, targets="0")
    wanted = x @ model[0].expression.dense().T + model[0].bias
    torch.testing.assert_close(model[0](x), wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model[0](x), wanted, atol=1e-4, rtol=1e-4)


def test_its_matrix_is_read_without_calling_it(model: nn.Module) -> None:
    adapted(model, targets="0")
    layer = model[0]
    torch.testing.assert_close(layer.matrix(), read_off(layer.original))
    layer.original.forward = None  # type: ignore[method-assign]
    layer.matrix()


def test_inference_does_not_form_the_matrix(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(model)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the matrix was formed")

    monkeypatch.setattr("rankfold.layers.layer.dequantised", refuse)
    with torch.no_grad():
        model(x)
    repr(model)
    rf.summary(model)


def test_pissa_starts_from_the_dequantised_weight(model: nn.Module) -> None:
    matrix = read_off(model[0])
    rf.adapt(model, "lora/pissa", rank=2)
    expression = model[0].expression
    product = expression.leaf("up").tensor() @ expression.leaf("down").tensor()
    u, s, v = torch.linalg.svd(matrix)
    torch.testing.assert_close(product, (u[:, :2] * s[:2]) @ v[:2], atol=1e-4, rtol=1e-3)


def test_folding_a_quantised_weight_refuses_and_leaves_the_model_alone(model: nn.Module, x: Tensor) -> None:
    adapted(model)
    after, memory = model(x), Memory(model)
    with pytest.raises(UnsupportedLayer, match=r"0 holds its weight in a quantised form; .*requantise=True"):
        rf.fold(model)
    memory.check(model)
    assert torch.equal(model(x), after)


def test_folding_with_requantise_reports_the_error_of_every_weight(
    model: nn.Module, x: Tensor, form: str
) -> None:
    adapted(model)
    expressions = {path: model[int(path)].expression.dense().detach() for path in ("0", "2")}
    kinds, after = [type(layer.weight) for layer in (model[0], model[2])], model(x)
    errors: list[FoldError] = []
    rf.fold(model, requantise=True, report=errors.append)
    assert [error.weight for error in errors] == ["0", "2"]
    for error in errors:
        matrix, now = expressions[error.weight], read_off(model[int(error.weight)])
        assert error.relative == pytest.approx(((now - matrix).norm() / matrix.norm()).item(), rel=1e-3)
        assert 0 < error.relative < WORST[form]
        assert str(error) == f"{error.weight}: relative error {error.relative:.3g}"
    assert [type(layer.weight) for layer in (model[0], model[2])] == kinds
    assert (model(x) - after).norm() / after.norm() < 2 * WORST[form]


def test_folding_with_requantise_warns_of_the_errors_unless_they_are_asked_for(model: nn.Module) -> None:
    adapted(model)
    with pytest.warns(Requantised, match=r"0: relative error .*\n2: relative error") as caught:
        rf.fold(copy.deepcopy(model), requantise=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", Requantised)
        rf.fold(model, requantise=True, report=lambda error: None)


def test_the_state_dict_keeps_the_names_and_loads_again(model: nn.Module, x: Tensor) -> None:
    names = set(model.state_dict())
    adapted(model)
    state = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    added = set(state) - names
    assert names <= set(state)
    assert all(".adapters.default." in name for name in added)
    after = model(x)
    perturb(model)
    model.load_state_dict({name: value for name, value in state.items() if name in added}, strict=False)
    torch.testing.assert_close(model(x), after)


def test_a_quantised_model_is_saved_and_loaded(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    adapted(model, "dora/pissa")
    rf.save(model, tmp_path / "adapter")
    rf.load(twin, tmp_path / "adapter")
    torch.testing.assert_close(twin(x), model(x))


def test_a_deep_copy_of_a_quantised_model_is_its_own(model: nn.Module, x: Tensor) -> None:
    adapted(model)
    after, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), after)
    perturb(twin)
    assert torch.equal(model(x), after)
    rf.remove(twin)
    assert torch.equal(model(x), after)


def test_evaluation_gives_what_the_quantised_layer_gives(form: str, x: Tensor) -> None:
    model, plain = seeded(FORMS[form]), seeded(FORMS[form])
    rf.adapt(model, "lora", rank=2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model[0].matrix(), read_off(plain[0]), atol=2e-2, rtol=2e-2)


def test_int8_with_quantised_activations_is_not_written_as_something_else(x: Tensor) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, OUT)))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    adapted(model)
    after = model(x)
    with pytest.raises(UnsupportedLayer, match="no way is known to write a matrix as Int8Tensor"):
        rf.fold(model, requantise=True)
    assert torch.equal(model(x), after)
