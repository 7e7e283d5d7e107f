import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.papers.pela import DistillationLoss
from rankfold.errors import Incompatible, InvalidOption


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


INPUTS = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def _student(model: nn.Module, steps: int = 0, **options: Any) -> nn.Module:
    options = {"keep": 0.5, "progress": False, **options}
    return rf.compress(copy.deepcopy(model), "pela", data=[INPUTS], steps=steps, **options)


def test_without_steps_it_is_the_plain_decomposition() -> None:
    model = _model()
    plain = rf.compress(copy.deepcopy(model), "svd", keep=0.5, progress=False)
    assert torch.equal(_student(model)(INPUTS), plain(INPUTS))


def test_numbers_are_at_most_the_share_that_was_asked_for() -> None:
    student = _student(_model(), keep=1 / 3)
    for layer, dense in ((student[0], 12 * 16), (student[2], 16 * 8)):
        assert layer.expression.count().stored <= dense / 3


def test_distilled_features_are_nearer_to_the_teachers() -> None:
    model = _model()
    with torch.no_grad():
        before = (_student(model)(INPUTS) - model(INPUTS)).norm()
        after = (_student(model, 60, lr=1e-2, perturbation=0.0)(INPUTS) - model(INPUTS)).norm()
    assert after < 0.9 * before


def test_the_perturbation_is_zero_at_the_tolerance_and_positive_at_the_teacher() -> None:
    model = _model()
    student = _student(model)
    teacher = copy.deepcopy(model)
    for i in (0, 2):
        teacher[i].weight.data = student[i].expression.dense().detach()
    tolerance = 0.25
    loss = DistillationLoss(student, teacher, tolerance=tolerance)
    assert float(loss.perturbation().detach()) == pytest.approx(tolerance**2, rel=1e-4)
    assert float(DistillationLoss(student, teacher, tolerance=tolerance, hinge=True).perturbation()) == 0.0
    for i in (0, 2):
        teacher[i].weight.data[1, 2] += tolerance
    assert float(DistillationLoss(student, teacher, tolerance=tolerance).perturbation()) < 1e-10


def test_the_perturbation_moves_by_one_entry_of_each_weight() -> None:
    model = _model()
    student = _student(model)
    loss = DistillationLoss(student, model)
    pair = next(iter(student[0].expression.pairs()))
    up, down = pair.up.value, pair.down.value
    loss.perturbation().backward()
    row, column = divmod(int((student[0].expression.dense() - model[0].weight).abs().argmax()), 12)
    assert [int(i) for i in up.grad.abs().sum(1).nonzero()] == [row]
    assert [int(i) for i in down.grad.abs().sum(0).nonzero()] == [column]


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _model()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        return (
            {"logits": logits} if labels is None else {"logits": logits, "loss": logits[:, 0].square().mean()}
        )


def test_a_loss_of_the_model_is_added_to_that_of_the_features() -> None:
    model = _Classifier()
    student = rf.compress(copy.deepcopy(model), "svd", keep=0.5, progress=False)
    loss, labels = DistillationLoss(student, model, perturbation=0.0), torch.zeros(64)
    with torch.no_grad():
        features = loss({"x": INPUTS})
        together = loss({"x": INPUTS, "labels": labels})
        own = student(INPUTS, labels)["loss"]
    assert float(together - features) == pytest.approx(float(own), rel=1e-5)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("lost power")
        return module(batch).square().mean()

    with pytest.raises(RuntimeError, match="lost power"):
        rf.compress(model, "pela", keep=0.5, data=[INPUTS], steps=5, loss=loss, progress=False)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InvalidOption, match="steps, features, perturbation and tolerance"):
        rf.compress(model, "pela", keep=0.5, data=[INPUTS], steps=-1, progress=False)


def test_float16_which_training_would_turn_into_nan_is_refused() -> None:
    model = _model().half()
    with pytest.raises(Incompatible, match=r"pela trains, and 0\.weight is float16"):
        rf.compress(model, "pela", keep=0.5, data=[INPUTS.half()], steps=2, progress=False)
    assert isinstance(model[0], nn.Linear)
