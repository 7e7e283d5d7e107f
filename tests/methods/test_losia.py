"""LoSiA: a sub-matrix of every weight trains, found again by sensitivity; losia-pro takes the same steps."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import KINDS, Host
from methods._layers import adapted, base, change, expression_of, linear, normal, rank_of
from methods._moving import Training, assert_ends, assert_resumes, perceptron
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods import localise as module
from rankfold.methods.localise import best_rectangle
from rankfold.weights import Selection

NAMES = pytest.mark.parametrize("name", ["losia", "losia-pro"])


def recipe(name: str = "losia", **options: Any) -> rf.Recipe:
    return rf.Recipe((name, {"factor": 0.5, "interval": 3, **options}))


def training(name: str = "losia", lr: float = 1e-2, make: Any = torch.optim.Adam, **options: Any) -> Training:
    return Training(recipe(name, **options), rank=None, lr=lr, make=make)


def selection_of(model: Any, path: str = "0") -> Selection:
    return next(part for part in expression_of(model, path).modules() if isinstance(part, Selection))


def support_of(model: Any, path: str = "0") -> list[list[int]]:
    return [leaf.tensor().tolist() for leaf in selection_of(model, path).support]


def remembered(trained: Training, path: str) -> dict[str, Any]:
    trained.started.enter(next(iter(trained.handle.methods)))
    return trained.started.memory(path)


# Choosing a rectangle ---------------------------------------------------------------------------------


def test_a_planted_block_is_recovered() -> None:
    score = normal(20, 30).abs() * 0.1
    rows, columns = torch.tensor([1, 4, 9, 17]), torch.tensor([0, 3, 8, 21, 29])
    score[rows[:, None], columns] += 1
    found = best_rectangle(score, 4, 5)
    assert torch.equal(found[0], rows)
    assert torch.equal(found[1], columns)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_as_good_as_each_of_the_three_greedy_ones(seed: int) -> None:
    score = normal(7, 9, seed=seed).exp()

    def top(sums: Tensor, count: int) -> list[int]:
        return sums.argsort(descending=True)[:count].tolist()

    rows, columns = top(score.sum(1), 3), top(score.sum(0), 4)
    choices = [
        (rows, columns),
        (rows, top(score[rows].sum(0), 4)),
        (top(score[:, columns].sum(1), 3), columns),
    ]
    found = best_rectangle(score, 3, 4)
    best = score[found[0]][:, found[1]].sum()
    torch.testing.assert_close(best, max(score[r][:, c].sum() for r, c in choices))


# What trains ------------------------------------------------------------------------------------------


@NAMES
def test_the_change_is_a_rectangle_of_full_rank_until_another_one_is_found(name: str) -> None:
    trained = training(name, interval=100)
    trained.run(5)
    rows, columns = support_of(trained.model)
    assert (len(rows), len(columns)) == (5, 6)  # half of 10 x 12
    moved = change(trained.model)
    outside = torch.ones_like(moved, dtype=torch.bool)
    outside[torch.tensor(rows)[:, None], torch.tensor(columns)] = False
    assert not moved[outside].any()
    assert moved[~outside].all()
    assert rank_of(moved) == 5


def test_the_fast_form_takes_the_same_steps() -> None:
    plain, fast = training("losia", lr=3e-2), training("losia-pro", lr=3e-2)
    start = support_of(plain.model)
    for trained in (plain, fast):
        trained.run(20)
    assert support_of(plain.model) == support_of(fast.model) != start
    for path in ("0", "2"):
        torch.testing.assert_close(
            expression_of(plain.model, path).dense(),
            expression_of(fast.model, path).dense(),
            rtol=1e-9,
            atol=1e-11,
        )


class Reference:
    """LoSiA on one dense weight, as the paper says it, stepped where X meets Y."""

    def __init__(self, weight: Tensor, support: list[list[int]], interval: int, lr: float) -> None:
        self.weight, self.interval, self.lr = weight.clone(), interval, lr
        self.rows, self.columns = (torch.tensor(part) for part in support)
        self.first, self.square = (torch.zeros(len(self.rows), len(self.columns)).double() for _ in range(2))
        self.mean, self.spread = torch.zeros_like(weight), torch.zeros_like(weight)
        self.localised: int | None = None

    def step(self, t: int, gradient: Tensor) -> None:
        product = self.weight * gradient
        term = (product - product**2 / 2).abs()
        self.mean = 0.85 * self.mean + 0.15 * term
        self.spread = 0.85 * self.spread + 0.15 * (term - self.mean).abs()
        part = gradient[self.rows][:, self.columns]
        self.first, self.square = 0.9 * self.first + 0.1 * part, 0.999 * self.square + 0.001 * part**2
        update = self.first / (1 - 0.9 ** (t + 1)) / ((self.square / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        self.weight[self.rows[:, None], self.columns] -= self.lr * self.rate(t) * update
        if (t + 1) % self.interval == 0:
            self.rows, self.columns = best_rectangle(
                self.mean * self.spread, len(self.rows), len(self.columns)
            )
            for value in (self.first, self.square, self.mean, self.spread):
                value.zero_()
            self.localised = t + 1

    def rate(self, t: int) -> float:
        if self.localised is None:
            return 1.0
        since = t - self.localised
        return 0.0 if since < 2 else min(1.0, since / self.interval)


@NAMES
def test_training_is_the_papers_on_a_dense_weight(name: str) -> None:
    model = nn.Sequential(nn.Linear(12, 6, bias=False)).double()
    model[0].weight.data = normal(6, 12, seed=8)
    trained = Training(recipe(name, interval=5), model=model, rank=None, lr=3e-2)
    reference = Reference(base(trained.model), support_of(trained.model), 5, 3e-2)
    x, y = trained.inputs, trained.wanted
    for t in range(23):
        reference.step(t, 2 * (x @ reference.weight.T - y).T @ x / y.numel())
        trained.run(1)
        assert support_of(trained.model) == [reference.rows.tolist(), reference.columns.tolist()]
        torch.testing.assert_close(
            expression_of(trained.model).dense(), reference.weight, rtol=1e-9, atol=1e-11
        )
    assert selection_of(trained.model).kept.shape[0] > 0


@NAMES
def test_a_task_in_a_sub_matrix_is_found_within_one_cycle(name: str) -> None:
    model = linear(16, 24)
    wanted = copy.deepcopy(model)
    rows, columns = torch.tensor([2, 7, 8, 13]), torch.tensor([0, 5, 6, 11, 19, 20])
    model[0].weight.data[rows[:, None], columns] = 0.5
    wanted[0].weight.data[rows[:, None], columns] = -0.5
    x = torch.zeros(200, 24).double()
    x[:, columns] = normal(200, 6)
    trained = Training(
        rf.Recipe((name, {"factor": 0.25, "interval": 10})),
        model=model, rank=None, inputs=x, wanted=wanted(x).detach(),
    )  # fmt: skip
    trained.run(10)
    assert support_of(trained.model) == [rows.tolist(), columns.tolist()]


# Time ------------------------------------------------------------------------------------------------


def test_blocks_record_one_after_the_other_and_only_there_is_a_whole_gradient_formed(
    monkeypatch: Any,
) -> None:
    seen: list[tuple[int, int]] = []
    formed = module.weight_gradient

    def counted(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
        seen.append(layer.shape)
        return formed(layer, x, gradient)

    monkeypatch.setattr(module, "weight_gradient", counted)
    trained = training(interval=2)
    for step in range(8):
        turn, other = ("0", "2") if step // 2 % 2 == 0 else ("2", "0")
        before = support_of(trained.model, other)
        trained.run(1)
        assert [tuple(shape) for shape in seen] == [{"0": (10, 12), "2": (6, 10)}[turn]]
        assert "importance.mean" not in remembered(trained, other)
        assert ("importance.mean" in remembered(trained, turn)) == (
            step % 2 == 0
        )  # dropped at the slot's end
        assert support_of(trained.model, other) == before
        seen.clear()


def test_all_blocks_record_together_on_request() -> None:
    trained = training(interval=2, asynchronous=False)
    trained.run(1)
    assert all("importance.mean" in remembered(trained, path) for path in ("0", "2"))
    trained.run(2)  # the second slot of the cycle: none does
    assert not any("importance.mean" in remembered(trained, path) for path in ("0", "2"))


def test_localising_resets_moments_and_not_the_step_count_and_keeps_the_function() -> None:
    trained = training(interval=4, lr=3e-2)
    trained.run(3)
    selection = selection_of(trained.model)
    state = trained.optimizer.state[selection.values.value]
    assert state["exp_avg"].any()
    before = support_of(trained.model)
    trained.gradients()
    method = next(iter(trained.handle.methods.values()))
    stepped, seen = method.stepped, []

    def noted(run: Any) -> None:
        seen.append(expression_of(trained.model).dense().detach())
        stepped(run)
        seen.append(expression_of(trained.model).dense().detach())

    method.stepped = noted  # type: ignore[method-assign]
    trained.optimizer.step()
    assert support_of(trained.model) != before
    assert torch.equal(*seen)
    assert state["step"] == 4
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()


def test_the_rate_of_a_localised_weight_climbs_again() -> None:
    trained = training(interval=6, make=torch.optim.SGD, lr=0.1)
    trained.run(6)  # the first block is localised
    shares = []
    for _ in range(8):
        values = selection_of(trained.model).values.value
        before = values.detach().clone()
        trained.run(1)
        assert values.grad is not None
        shares.append(float((before - values.detach()).norm() / (0.1 * values.grad).norm()))
    wanted = [0.0, 0.0, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0]
    torch.testing.assert_close(shares, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 64.0])
def test_the_importance_is_that_of_the_gradient_that_the_optimizer_gets(scale: float) -> None:
    plain, scaled = training(), training()
    for trained, factor in ((plain, 1.0), (scaled, scale)):
        trained.optimizer.zero_grad()
        loss = (trained.model(trained.inputs) - trained.wanted).square().mean()
        (factor * loss).backward()
        for parameter in trained.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= factor  # as a gradient scaler does, after the hooks
        trained.optimizer.step()
    wanted, found = (remembered(trained, "0")["importance.mean"] for trained in (plain, scaled))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("importance", ["mixed", "first", "second"])
def test_the_sensitivity_is_that_of_the_weight_and_its_whole_gradient(importance: str) -> None:
    model = nn.Sequential(nn.Linear(12, 6, bias=False)).double()
    trained = Training(recipe(importance=importance), model=model, rank=None)
    x, y, weight = trained.inputs, trained.wanted, base(trained.model)
    product = weight * (2 * (x @ weight.T - y).T @ x / y.numel())
    wanted = {"mixed": product - product**2 / 2, "first": product, "second": product**2 / 2}[importance].abs()
    trained.run(1)
    torch.testing.assert_close(remembered(trained, "0")["importance.mean"], 0.15 * wanted)
    torch.testing.assert_close(remembered(trained, "0")["importance.spread"], 0.15 * 0.85 * wanted)


def test_gradients_of_several_backwards_are_added_up() -> None:
    whole, halves = training(), training()
    whole.run(1)
    halves.optimizer.zero_grad()
    for part in (slice(0, 12), slice(12, 24)):
        ((halves.model(halves.inputs[part]) - halves.wanted[part]).square().mean() / 2).backward()
    halves.optimizer.step()
    wanted, found = (remembered(trained, "0")["importance.mean"] for trained in (whole, halves))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ],
)
@NAMES
def test_entries_outside_never_move_under_momentum_and_decay(name: str, make: Any) -> None:
    trained = training(name, make=lambda groups: make([{"params": g["params"]} for g in groups]))
    weights, outside = [expression_of(trained.model).dense().detach()], []
    for _ in range(14):
        mask = torch.ones(120, dtype=torch.bool)
        mask[selection_of(trained.model).positions().long()] = False
        outside.append(mask)
        trained.run(1)
        weights.append(expression_of(trained.model).dense().detach())
    for mask, (before, after) in zip(outside, itertools.pairwise(weights), strict=True):
        assert torch.equal(before.flatten()[mask], after.flatten()[mask])
    assert selection_of(trained.model).kept.shape[0] > 0
    assert torch.equal(base(trained.model), perceptron()[0].weight)


def test_gradient_and_moments_are_packed_to_the_sub_matrix() -> None:
    trained = training()
    trained.run(2)
    parameter = selection_of(trained.model).values.value
    held = [value.numel() for value in trained.optimizer.state[parameter].values() if value.dim()]
    assert held == [5 * 6, 5 * 6]  # a dense Adam keeps 10 x 12 twice
    assert parameter.grad is not None
    assert parameter.grad.shape == (5, 6)


@NAMES
def test_it_goes_on_as_if_it_had_not_been_stopped(name: str, tmp_path: Path) -> None:
    for stop in (16, 17, 18):  # in a slot, at its end, while the rate climbs
        assert_resumes(recipe(name, interval=6), tmp_path / str(stop), rank=None, stop=stop, total=30)


def test_folding_and_removal_hold_after_a_localisation() -> None:
    trained = training()
    trained.run(10)
    assert_ends(trained)


def test_a_sub_matrix_larger_than_the_weight_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"losia-pro: factor must be in \(0, 1\], not 1.5"):
        adapted(rf.Recipe(("losia-pro", {"factor": 1.5})))
    with pytest.raises(InvalidOption, match="losia: importance must be one of mixed, first, second"):
        adapted(rf.Recipe(("losia", {"importance": "third"})))
    for name in ("losia", "losia-pro"):
        for option, value in (("interval", 0), ("beta1", 1.0), ("importance", "third")):
            with pytest.raises(InvalidOption, match=f"^{name}: {option} must be"):
                adapted(rf.Recipe((name, {option: value})))
    assert selection_of(adapted(rf.Recipe(("losia", {"factor": 1})))).values.shape == (6, 8)


@pytest.mark.parametrize("host", [h for h in KINDS if h.kind != "attention"], ids=lambda host: host.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_every_kind_are_localised(host: Host, dtype: torch.dtype) -> None:
    model = rf.adapt(host.model(dtype), recipe("losia-pro", interval=2), targets=[host.path])
    x = host.input(dtype).detach()
    wanted = model(x).detach() + 1
    optimizer = torch.optim.Adam(rf.param_groups(model, lr=1e-2))
    with rf.attach(model, optimizer) as handle:
        for _ in range(9):
            optimizer.zero_grad()
            loss = (model(x) - wanted).float().square().mean()
            loss.backward()
            optimizer.step()
        assert handle.run is not None
        handle.run.enter("structure=losia-pro")
        assert handle.run.memory("layer")["localised"] == 8
    assert selection_of(model, "layer").values.value.isfinite().all()
    assert loss.detach() < (host.model(dtype)(x) - wanted).float().square().mean()
