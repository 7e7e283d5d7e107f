"""MAESTRO orders the terms of its products by importance, drops the last ones, and lets prefixes be taken."""

from __future__ import annotations

import copy
import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.methods.ordered import importance, keep_prefix, lasso_gradient, maestro_loss, tail_norms
from rankfold.weights import Ordered


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def adapted(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = rf.adapt(fresh() if model is None else model, "maestro", **{"penalty": 0.0, **options})
    return model.train()


def ordered(model: nn.Module) -> list[Ordered]:
    return [m for m in model.modules() if isinstance(m, Ordered)]


def widths(model: nn.Module) -> list[int]:
    return [weight.width for weight in ordered(model)]


def cut_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(i, int(w.mask.sum())) for i, w in enumerate(ordered(model)) if w.mask is not None]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    x, wanted = normal(32, 6, seed=1), normal(32, 2, seed=2)
    for _ in range(times):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimizer.step()


def test_the_start_is_the_models_own_split_evenly_over_its_singular_values() -> None:
    model, plain, x = adapted(), fresh(), normal(5, 6)
    torch.testing.assert_close(model(x), plain(x))
    up, down = (factor.dense() for factor in ordered(model)[0].factors)
    sizes = torch.linalg.svdvals(plain[0].weight)  # type: ignore[index]
    torch.testing.assert_close(up.T @ up, torch.diag(sizes))
    torch.testing.assert_close(down @ down.T, torch.diag(sizes))


def test_minimising_over_all_prefixes_gives_every_best_one_and_the_singular_values() -> None:
    wanted = normal(8, 6, seed=3)
    model = adapted(nn.Sequential(nn.Linear(6, 8, bias=False)).double())
    (weight,) = ordered(model)
    optimizer = torch.optim.LBFGS(
        weight.parameters(), lr=1, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for width in range(1, 7):
            weight.cut(width)
            total = total + (model(torch.eye(6).double()).T - wanted).square().sum()
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]
    sizes = torch.linalg.svdvals(wanted)
    for width in range(1, 7):
        weight.cut(width)
        error = (torch.mm(*weight.factored()) - wanted).square().sum()
        torch.testing.assert_close(error, sizes[width:].square().sum(), rtol=1e-4, atol=1e-6)
    up, down = (factor.dense() for factor in weight.factors)
    torch.testing.assert_close(up.norm(dim=0) * down.norm(dim=1), sizes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_penalty_is_the_sum_of_the_norms_of_all_tails(axis: int) -> None:
    factor = normal(5, 4).requires_grad_()
    columns = factor if axis == 1 else factor.T
    total = sum(columns[:, b:].norm() for b in range(columns.shape[1]))
    torch.testing.assert_close(tail_norms(factor, axis).sum(), total.detach())  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(total, factor)  # type: ignore[arg-type]
    torch.testing.assert_close(lasso_gradient(factor, axis), gradient)


def test_a_tail_of_zeros_has_no_gradient() -> None:
    factor = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(lasso_gradient(factor, 1), factor)


def test_the_penalty_reaches_the_optimizer() -> None:
    grads = []
    for penalty in (0.0, 0.1):
        model = adapted(penalty=penalty)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with rf.attach(model, optimizer):
            step(model, optimizer)
        grads.append([factor.dense() for w in ordered(model) for factor in w.factors])
    for plain, more, axis in zip(*grads, (1, 0, 1, 0), strict=True):
        assert plain.grad is not None
        torch.testing.assert_close(more.grad, plain.grad + 0.1 * lasso_gradient(plain, axis))


def test_one_weight_is_cut_in_every_step_and_all_pairs_are_drawn_alike() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found: Counter[tuple[int, int]] = Counter()
    with rf.attach(model, optimizer):
        for _ in range(300):
            (pair,) = cut_of(model)
            found[pair] += 1
            step(model, optimizer)
    assert sorted(found) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    assert max(found.values()) < 80  # 50 of each are expected
    assert min(found.values()) > 25
    assert cut_of(model) == []


def test_a_cut_weight_is_its_first_terms_in_training_and_whole_in_evaluation() -> None:
    model, x = adapted(), normal(5, 6)
    weight, whole = ordered(model)[0], adapted()(x)
    weight.cut(2)
    up, down = (factor.dense() for factor in weight.factors)
    for few in (True, False):  # few tokens and many take other orders
        given = x if few else x.repeat(50, 1)
        torch.testing.assert_close(weight(given), given @ (up[:, :2] @ down[:2]).T)
        with torch.no_grad():
            torch.testing.assert_close(weight(given), given @ (up[:, :2] @ down[:2]).T)
    model(x).square().sum().backward()
    assert up.grad is not None
    assert not up.grad[:, 2:].any()
    assert up.grad[:, :2].all()
    torch.testing.assert_close(weight.dense(), up @ down)  # what is folded is whole
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), whole)
    with torch.no_grad():
        assert not torch.allclose(model(x), whole)
        torch.testing.assert_close(model.eval()(x), whole)


def test_importance_never_increases_so_that_a_suffix_is_dropped() -> None:
    model = adapted(interval=3, threshold=0.2)
    weight = ordered(model)[0]
    up, down = (factor.dense() for factor in weight.factors)
    up.data.copy_(normal(4, 4))
    down.data.copy_(normal(4, 6))
    up.data[:, 2:] *= 0.01  # a large column of the other factor does not save the last ones
    assert (importance(weight).diff() <= 0).all()
    kept = [factor.dense().detach().clone() for factor in weight.factors]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0)
    with rf.attach(model, optimizer):
        step(model, optimizer, 2)
        assert widths(model)[0] == 4
        moment = optimizer.state[up]["exp_avg"].clone()
        step(model, optimizer)
        assert widths(model)[0] == 2
        assert optimizer.state[up]["exp_avg"].shape == (4, 2)
        assert moment.shape == (4, 4)
        assert {
            width for i, width in [pair for _ in range(20) for pair in _next(model, optimizer)] if i == 0
        } <= {
            1,
            2,
        }
    torch.testing.assert_close(weight.factors[0].dense(), kept[0][:, :2], atol=1e-8, rtol=0)
    torch.testing.assert_close(weight.factors[1].dense(), kept[1][:2], atol=1e-8, rtol=0)
    assert rf.count(model).stored == 2 * (4 + 6) + widths(model)[1] * (2 + 4) + 6


def test_a_small_term_before_a_large_one_stays() -> None:
    model = adapted(interval=1, threshold=0.2)
    up, down = (factor.dense() for factor in ordered(model)[0].factors)
    up.data.copy_(normal(4, 4))
    down.data.copy_(normal(4, 6))
    up.data[:, 1] = down.data[1] = 1e-9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with rf.attach(model, optimizer):
        step(model, optimizer)
    assert widths(model)[0] == 4


def _next(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    step(model, optimizer)
    return cut_of(model)


def test_training_with_the_penalty_finds_a_low_rank_teacher_and_drops_the_rest() -> None:
    teacher = normal(8, 2, seed=3) @ normal(2, 6, seed=4) / 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False)).double()
    model = adapted(model, penalty=0.03, threshold=1e-3, interval=50)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.05), normal(64, 6, seed=5)
    with rf.attach(model, optimizer):
        for _ in range(400):
            optimizer.zero_grad()
            (model(x) - x @ teacher.T).square().sum(1).mean().backward()
            optimizer.step()
    assert widths(model) == [2]
    assert (ordered(model)[0].dense() - teacher).norm() < 0.05 * teacher.norm()


class Classifier(nn.Module):
    """Gives logits for labels, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = fresh()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Return the logits."""
        return SimpleNamespace(logits=self.body(x))


@pytest.mark.parametrize("count", [5, 400])
def test_the_loss_of_both_passes_is_that_of_its_formula(count: int) -> None:
    model = adapted(Classifier())
    x, labels = normal(count, 6), torch.arange(count) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rf.attach(model, optimizer):
        cut = model(x).logits
        whole = copy.deepcopy(model)(x).logits  # a copy is not cut
        loss = maestro_loss(model, {"x": x, "labels": labels})
        wanted = F.cross_entropy(whole, labels) + F.cross_entropy(cut, whole.detach().softmax(-1))
        torch.testing.assert_close(loss, wanted)
        ((i, width),) = cut_of(model)
        found = torch.autograd.grad(loss, ordered(model)[i].factors[0].dense())[0]
        own, soft = _both(model, i, width, x, labels)
        torch.testing.assert_close(found, own + soft)
        assert not any(weight.whole for weight in ordered(model))
        model.is_gradient_checkpointing = True  # type: ignore[assignment]
        with pytest.raises(rf.errors.Incompatible, match="checkpointing"):
            maestro_loss(model, {"x": x, "labels": labels})
    with pytest.raises(rf.errors.NotAdapted, match="nothing is cut"):
        maestro_loss(model, {"x": x, "labels": labels})


def _both(model: nn.Module, i: int, width: int, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of both terms of the loss for the cut weight's first factor."""
    weight = ordered(model)[i]
    weight.cut(None)
    whole = model(x).logits
    own = torch.autograd.grad(F.cross_entropy(whole, labels), weight.factors[0].dense())[0]
    weight.cut(width)
    loss = F.cross_entropy(model(x).logits, whole.detach().softmax(-1))
    return own, torch.autograd.grad(loss, weight.factors[0].dense())[0]


def test_the_loss_of_tokens_is_that_of_the_next_ones() -> None:
    model = adapted(Classifier())
    x, labels = normal(3, 4, 6), torch.tensor([[0, 1, 1, 0], [1, 1, -100, -100], [0, 0, 1, 1]])
    with rf.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        loss = maestro_loss(model, {"x": x, "labels": labels})
        keep = labels[:, 1:] != -100
        chosen = {"x": x[:, :-1][keep], "labels": labels[:, 1:][keep]}
        torch.testing.assert_close(loss, maestro_loss(model, chosen))


@pytest.mark.filterwarnings("ignore::rankfold.layers.adaptation.NeverAttached")
def test_a_prefix_is_taken_by_number_by_share_or_by_path() -> None:
    model, x = adapted(), normal(5, 6)
    up, down = (factor.dense().detach().clone() for factor in ordered(model)[0].factors)
    keep_prefix(model, {"0": 3})
    assert widths(model) == [3, 2]
    torch.testing.assert_close(ordered(model)[0].dense(), up[:, :3] @ down[:3])
    assert widths(keep_prefix(model, 0.5)) == [2, 1]
    assert widths(keep_prefix(model, 1)) == [1, 1]
    wanted = model.eval()(x)
    torch.testing.assert_close(rf.fold(model)(x), wanted)
    with pytest.raises(rf.errors.InvalidOption, match="no weight of maestro"):
        keep_prefix(adapted(), {"7": 1})
    with pytest.raises(rf.errors.InvalidOption, match="positive"):
        keep_prefix(adapted(), 0)
    with pytest.raises(rf.errors.NotAdapted, match="maestro"):
        keep_prefix(rf.adapt(fresh(), "lora", rank=1), 1)


def test_a_prefix_is_refused_while_an_optimizer_trains_the_whole() -> None:
    model = adapted()
    with (
        rf.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        pytest.raises(rf.errors.Incompatible, match="remove"),
    ):
        keep_prefix(model, 1)


def test_batch_normalisation_is_estimated_again_for_a_prefix() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    model, batches = adapted(body), [(normal(10, 6, seed=s),) for s in range(3)]
    keep_prefix(model, 2, batches)
    means = [model[0](x).mean(0) for (x,) in batches]  # type: ignore[index]
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0).detach())  # type: ignore[index]
    assert model[1].momentum == 0.1  # type: ignore[index]
    assert model.training
    assert model[2].training  # type: ignore[index]


def test_a_training_that_stops_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    options = {"penalty": 0.05, "threshold": 0.3, "interval": 4}

    def trained(model: nn.Module, steps: int, state: Any = None) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if state is not None:
            optimizer.load_state_dict(state)
        with rf.attach(model.train(), optimizer):
            step(model, optimizer, steps)
        return optimizer

    whole, half = adapted(**options), adapted(**options)
    trained(whole, 30)
    optimizer = trained(half, 13)
    assert widths(half) != widths(adapted())
    rf.save(half, tmp_path / "half")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = rf.load(fresh(), tmp_path / "half")
    assert widths(again) == widths(half)
    trained(again, 17, torch.load(file, weights_only=True))
    assert widths(again) == widths(whole)
    assert all(map(torch.equal, again.parameters(), whole.parameters()))


def test_impossible_options_are_refused() -> None:
    for options in ({"penalty": -1.0}, {"threshold": -1.0}, {"interval": 0}):
        with pytest.raises(rf.errors.InvalidOption, match=next(iter(options))):
            adapted(**options)


def test_an_optimizer_that_loads_another_step_cuts_as_that_step_does() -> None:
    model, known = adapted(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with rf.attach(model, optimizer):
        for _ in range(12):
            known.append((cut_of(model), copy.deepcopy(optimizer.state_dict())))
            step(model, optimizer)
    again = torch.optim.SGD(model.parameters(), lr=0.0)
    with rf.attach(model, again):
        for cut, state in reversed(known):
            again.load_state_dict(state)
            assert cut_of(model) == cut
    assert len({tuple(cut) for cut, _ in known}) > 2


def test_a_frozen_weight_is_neither_cut_nor_shortened() -> None:
    model = adapted(interval=1, threshold=1e9)
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rf.attach(model, optimizer):
        for _ in range(6):
            assert [place for place, _ in cut_of(model)] == [1]
            step(model, optimizer)
        assert widths(model) == [4, 1]
