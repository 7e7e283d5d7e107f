"""KIND: components that all classes share and components that one class opens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank, NotDense

CLASSES = torch.tensor([0, 2, 0, 1])


def adapted(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    return rf.adapt(model, "kind", targets="0", **{"rank": 2, "classes": 3, "tailor": 1, **options})


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def matrix(model: nn.Module, c: int) -> Tensor:
    """Return W(c), through the layer."""
    with rf.gate_inputs(model, classes=torch.tensor([c])), torch.no_grad():
        return model(torch.eye(6, dtype=torch.float64)).T


def leaf(model: nn.Module, name: str) -> Tensor:
    return model[0].adapters["default"].leaf(name).tensor()


def test_every_row_is_mapped_by_its_own_class() -> None:
    model, x = adapted(), rows()
    with rf.gate_inputs(model, classes=CLASSES):
        found = model(x)
    wanted = torch.stack([matrix(model, int(c)) @ row for c, row in zip(CLASSES, x, strict=True)])
    torch.testing.assert_close(found, wanted)


def test_two_classes_differ_by_at_most_two_tailors_of_ranks() -> None:
    model = adapted(tailor=2)
    assert torch.linalg.matrix_rank(matrix(model, 0) - matrix(model, 2)) == 4
    assert torch.linalg.matrix_rank(matrix(model, 0) - matrix(model, -1)) == 2


def test_without_a_class_only_the_learngenes_act() -> None:
    model = adapted()
    up, values, down = (leaf(model, f"learngene.{part}") for part in ("up", "values", "down"))
    torch.testing.assert_close(matrix(model, -1), up @ torch.diag(values) @ down)


def test_tailors_of_absent_classes_get_no_gradient_and_do_not_move() -> None:
    model, x = adapted(), rows()
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=0.1, weight_decay=0.1))
    for classes in (torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 2, 2])):
        before = leaf(model, "tailor1.up").detach().clone()
        optimizer.zero_grad()
        with rf.gate_inputs(model, classes=classes):
            model(x).square().sum().backward()
        optimizer.step()
    assert leaf(model, "tailor1.up").grad is None
    assert torch.equal(leaf(model, "tailor1.up"), before)  # momentum and decay have not moved it either


def test_what_other_classes_learn_leaves_a_class_bit_for_bit() -> None:
    model = adapted()
    before = matrix(model, 0)
    leaf(model, "tailor1.up").data.normal_()
    assert torch.equal(matrix(model, 0), before)


def test_entries_start_with_the_variance_of_a_linear_layer() -> None:
    model = rf.adapt(nn.Sequential(nn.Linear(200, 300)), "kind", rank=30, classes=2, tailor=20, targets="0")
    with rf.gate_inputs(model, classes=torch.tensor([1])), torch.no_grad():
        change = model(torch.eye(200)) - model[0].original.bias
    assert change.var() * 3 * 200 == pytest.approx(1.0, rel=0.1)


def test_learngenes_are_passed_on_frozen_to_new_classes(tmp_path: Any) -> None:
    model = adapted()
    old = matrix(model, -1)
    rf.adapt(model, "kind", rank=2, classes=5, tailor=1, learngenes="default", name="new", targets="0")
    torch.testing.assert_close(matrix(model, -1), old)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 15
    assert not any("learngene" in key for key in trained)
    with rf.gate_inputs(model, classes=torch.tensor([4])):
        wanted = model(rows())
    rf.save(model, tmp_path / "new", name="new")
    torch.manual_seed(0)
    fresh = rf.load(nn.Sequential(nn.Linear(6, 5, bias=False)).double(), tmp_path / "new")
    with rf.gate_inputs(fresh, classes=torch.tensor([4])):
        assert torch.equal(fresh(rows()), wanted)


def test_what_has_no_meaning_is_refused() -> None:
    model = adapted()
    with pytest.raises(InvalidOption, match="kind needs the class of every row"):
        model(rows())
    for classes in (torch.tensor([0, 3, 0, 0]), torch.tensor([0, 1]), torch.tensor([0.5])):
        with pytest.raises(InvalidOption, match="classes must be"), rf.gate_inputs(model, classes=classes):
            model(rows())
    with pytest.raises(InvalidOption, match="classes must be at least 1"):
        adapted(classes=0)
    with pytest.raises(InvalidRank, match="tailor must be from 1 to 5, not 6"):
        adapted(tailor=6)
    with pytest.raises(InvalidOption, match="no adapter 'other'"):
        adapted(learngenes="other")
    rf.adapt(model, "lora", rank=1, name="more", targets="0")
    rf.use(model, "default")
    with pytest.raises(NotDense, match="token to token"):
        rf.fold(model)


def test_other_adapters_stand_on_it() -> None:
    model, x = adapted(), rows()
    rf.adapt(model, "lora", rank=1, name="more", targets="0")
    more = model[0].adapters["more"]
    more.leaf("up").tensor().data.normal_()
    rf.use(model, ["more", "default"])
    with rf.gate_inputs(model, classes=CLASSES):
        both = model(x)
        rf.use(model, "default")
        alone = model(x)
    torch.testing.assert_close(both - alone, x @ (more.leaf("up").tensor() @ more.leaf("down").tensor()).T)
