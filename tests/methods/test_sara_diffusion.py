"""SaRA for diffusion models: the smallest entries train, and those that have grown stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import adapted, backward, base, change, expression_of, linear, normal, trained
from methods._moving import Training, assert_ends, assert_resumes
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.weights import Selection


def recipe(**options: Any) -> rf.Recipe:
    return rf.Recipe(("sara-diffusion", {"threshold": 0.05, **options}))


def training(**options: Any) -> Training:
    arguments = {key: options.pop(key) for key in ("make", "lr", "total") if key in options}
    return Training(recipe(**options), rank=None, **{"lr": 1e-2, **arguments})


def selection_of(model: Any, path: str = "0") -> Selection:
    return next(part for part in expression_of(model, path).modules() if isinstance(part, Selection))


def test_the_entries_below_the_threshold_train_and_get_their_own_gradient_only() -> None:
    model = adapted(recipe(threshold=0.1), linear(20, 30))
    small = base(model).abs() < 0.1
    selection = selection_of(model)
    assert torch.equal(selection.positions(), small.flatten().nonzero().flatten().int())
    gradient = backward(model, normal(5, 30))
    assert list(trained(model)) == [name for name, p in model.named_parameters() if p.grad is not None]
    assert selection.values.value.grad is not None
    torch.testing.assert_close(selection.values.value.grad, gradient[small])


def test_a_share_takes_the_smallest_entries_of_every_weight() -> None:
    for share, count in ((0.1, 60), (1.0, 600), (1e-9, 1)):
        model = adapted(recipe(share=share), linear(20, 30))
        positions = selection_of(model).positions().long()
        assert len(positions) == count
        magnitudes = base(model).abs().flatten()
        assert magnitudes[positions].max() <= magnitudes.sort().values[count - 1]
    zeros = linear(4, 4)
    zeros[0].weight.data.zero_()
    assert selection_of(adapted(recipe(share=0.2), zeros)).values.shape == (16,)  # no one is larger


def large(rows: int = 70, columns: int = 66) -> nn.Module:
    model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(rows, rows), nn.Linear(rows, 6)).double()
    for layer, seed in zip(model, (1, 2, 3), strict=True):
        layer.weight.data = normal(*layer.weight.shape, seed=seed)  # type: ignore[arg-type,misc]
    return model


def test_the_nuclear_norm_of_one_large_weight_a_step_is_penalised() -> None:
    model = rf.adapt(large(), recipe(threshold=0.3, nuclear=2.0), targets=["0", "1", "2"])
    optimizer = torch.optim.SGD(rf.param_groups(model, lr=0.0))
    drawn = []
    with rf.attach(model, optimizer, total_steps=100):
        for _ in range(12):
            for path in ("0", "1", "2"):
                selection_of(model, path).values.value.grad = None
            optimizer.step()
            met = [p for p in "012" if selection_of(model, p).values.value.grad is not None]
            assert len(met) == 1
            drawn += met
    assert set(drawn) == {"0", "1"}  # a side of 6 is too small
    path = drawn[-1]
    selection = selection_of(model, path)
    values = selection.values.value.detach().clone().requires_grad_()
    masked = torch.zeros(*selection.shape).double()
    index = selection.positions().long()
    chosen = base(model, path).flatten()[index] + values
    norm = torch.linalg.matrix_norm(masked.flatten().index_put((index,), chosen).view(selection.shape), "nuc")
    (2.0 * norm).backward()
    torch.testing.assert_close(selection.values.value.grad, values.grad)


def test_what_has_grown_past_the_threshold_stays_and_the_rest_goes_on_from_a_new_state() -> None:
    run = training(total=20, lr=1e-2)
    theta, before = 0.05, base(run.model)
    first = set(selection_of(run.model).positions().tolist())
    run.run(9)
    assert set(selection_of(run.model).positions().tolist()) == first
    run.run(1)
    selection = selection_of(run.model)
    half = expression_of(run.model).dense().detach()
    second = set(selection.positions().tolist())
    small = set((half.flatten().abs() < theta).nonzero().flatten().tolist())
    assert second == first & small
    assert 0 < len(second) < len(first)
    assert selection.values.value not in run.optimizer.state
    run.run(1)
    assert run.optimizer.state[selection.values.value]["step"] == 1
    run.run(9)
    end = expression_of(run.model).dense().detach()
    frozen = torch.ones(end.numel(), dtype=torch.bool)
    frozen[sorted(second)] = False
    assert torch.equal(end.flatten()[frozen], half.flatten()[frozen])
    assert (end.flatten()[~frozen] != half.flatten()[~frozen]).all()
    assert torch.equal(end[before.abs() >= theta], before[before.abs() >= theta])
    assert set(selection.positions().tolist()) == second  # once only


def test_the_function_is_the_same_after_the_adjustment() -> None:
    run, seen = training(total=6, lr=1e-2), []
    method: Any = next(iter(run.handle.methods.values()))
    stepped = method.stepped

    def noted(inner: Any) -> None:
        seen.append(expression_of(run.model).dense().detach())
        stepped(inner)
        seen.append(expression_of(run.model).dense().detach())

    method.stepped = noted
    run.run(4)
    assert all(torch.equal(*pair) for pair in zip(seen[::2], seen[1::2], strict=True))


def test_a_weight_of_which_everything_has_grown_is_left_alone() -> None:
    run = training(total=4, lr=1.0)
    run.run(2)
    assert selection_of(run.model).values.shape == (0,)
    before = expression_of(run.model).dense().detach()
    run.run(2)
    assert torch.equal(expression_of(run.model).dense(), before)
    assert_ends(run)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ],
)
def test_other_entries_never_move_under_momentum_and_decay_and_nothing_is_kept_for_them(make: Any) -> None:
    run = training(total=100, make=lambda groups: make([{"params": g["params"]} for g in groups]))
    run.run(10)
    small = base(run.model).abs() < 0.05
    moved = change(run.model)
    assert not moved[~small].any()
    assert moved[small].all()
    parameter = selection_of(run.model).values.value
    held: list[Tensor] = [v for v in run.optimizer.state[parameter].values() if v.dim()]
    assert {v.numel() for v in held} == {int(small.sum())}


def test_it_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    for stop in (17, 25):  # before and after the adjustment
        assert_resumes(recipe(), tmp_path / str(stop), stop=stop, rank=None, lr=1e-3)


def test_a_threshold_below_every_entry_is_refused() -> None:
    with pytest.raises(
        InvalidOption, match="0: sara-diffusion finds no entry below 1e-09; choose a higher thr"
    ):
        adapted(recipe(threshold=1e-9))
    with pytest.raises(InvalidOption, match=r"sara-diffusion: share must be in \(0, 1\], not 1.5"):
        adapted(recipe(share=1.5))


def test_the_length_of_the_training_is_asked_for() -> None:
    model = adapted(recipe())
    with pytest.raises(InvalidOption, match="sara-diffusion needs total_steps"):
        rf.attach(model, torch.optim.Adam(rf.param_groups(model, lr=1e-2)))
