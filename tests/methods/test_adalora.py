"""AdaLoRA: a falling budget of gated terms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._dynamic import Training, ends_the_same, only_the_gates_move, perceptron, planted
from methods._layers import normal

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.methods.sensitivity import add_orthogonality, cubic_budget, kept_terms, smoothed


def point(structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, ("adalora", {"interval": 3, **options}))


def test_the_start_is_the_base_and_only_the_gates_have_a_gradient() -> None:
    training = Training(point(orthogonality=0.0))
    only_the_gates_move(training)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_taken_out_of_the_base_start_behind_gates_of_one(init: str) -> None:
    training = Training(point(init=init))
    assert all((gate == 1).all() for gate in training.gates())
    torch.testing.assert_close(training.output(), perceptron()(training.x))


def test_the_initial_rank_is_one_and_a_half_times_the_asked_one_and_alpha_is_divided_by_it() -> None:
    training = Training(point(), alpha=6.0)
    assert training.ranks() == [3, 3, 3]
    assert all(pair.scale == 2 for pair in training.pairs)
    training.step(40)
    training.handle.remove()
    assert all(pair.scale == 2 for pair in training.pairs)


def test_after_an_event_exactly_the_budget_of_gates_is_open() -> None:
    training, rule = Training(point()), next(iter(Training(point()).handle.methods.values()))
    budgets = []
    for step in range(1, 41):
        training.step()
        budget = rule.budget(training.run)  # type: ignore[attr-defined]
        budgets.append(budget)
        if (step % 3 == 0 and step < 28) or step >= 28:
            assert training.open() == budget
    assert all(isinstance(b, int) for b in budgets)
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (9, 6)


def test_the_budget_falls_along_the_cubic_of_the_paper() -> None:
    for step in range(5, 26):
        expected = 10 + (30 - 10) * (1 - (step - 5) / 20) ** 3
        assert cubic_budget(step, 5, 25, 30, 10) == int(expected)


def test_a_masked_term_keeps_its_factors_and_returns_while_the_budget_falls_and_never_after() -> None:
    training = Training(point())
    training.step(12)
    closed = [gate == 0 for gate in training.gates()]
    assert any(mask.any() for mask in closed)
    training.step()  # no event: the gates have gradients and open again
    for pair, mask in zip(training.pairs, closed, strict=True):
        assert pair.gate is not None
        assert (pair.gate[mask] != 0).all()
        assert (pair.up[:, mask].norm(dim=0) > 0).all()
    training.step(15)
    assert training.run.step == 28
    last = [gate != 0 for gate in training.gates()]
    for _ in range(12):
        training.step()
        assert all(map(torch.equal, last, [gate != 0 for gate in training.gates()]))


def test_a_large_gate_without_a_gradient_is_pruned() -> None:
    training = Training(point(orthogonality=0.0, warmup=0.0, final=0.2))
    with torch.no_grad():
        pair = training.pairs[1]
        assert pair.gate is not None
        pair.gate[0] = 5.0
        pair.up[:, 0] = pair.down[0] = 0  # the term does nothing, and nothing can change that
    training.step(32)
    assert pair.gate[0] == 0


def test_the_score_is_the_product_of_the_averages_of_sensitivity_and_of_its_deviation() -> None:
    memory: dict[str, Any] = {}
    mean, spread = torch.zeros(4).double(), torch.zeros(4).double()
    for seed in range(3):
        new = normal(4, seed=seed).abs()
        mean = 0.8 * mean + 0.2 * new
        spread = 0.6 * spread + 0.4 * (new - mean).abs()
        score = smoothed(memory, "x", new, 0.8, 0.6)
    torch.testing.assert_close(score, mean * spread)


def test_scores_pair_each_weight_with_its_own_gradient() -> None:
    training = Training(point(beta1=0.0, beta2=0.0))
    training.step(2)
    training.backward()
    pair = training.pairs[0]
    assert pair.gate is not None
    expected = (pair.gate * pair.gate.grad).abs().detach().clone()
    training.optimizer.step()
    torch.testing.assert_close(training.run.memory(pair.key)["gate.mean"], expected)


def test_the_penaltys_gradient_is_that_of_autograd() -> None:
    training = Training(point())
    pairs = training.pairs
    training.optimizer.zero_grad()
    with torch.no_grad():
        add_orthogonality(pairs, 0.3)
    mine = [p.grad.clone() for pair in pairs for p in (pair.up, pair.down)]
    training.optimizer.zero_grad()
    factors = [f for pair in pairs for f in (pair.up, pair.down.T)]
    norms = [torch.linalg.matrix_norm(f.T @ f - torch.eye(f.shape[1]).double()) for f in factors]
    (0.3 * torch.stack(norms).mean()).backward()
    theirs = [p.grad for pair in pairs for p in (pair.up, pair.down)]
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, other)


def test_the_penalty_draws_the_factors_towards_orthonormal_ones() -> None:
    def error(training: Training) -> float:
        return sum(float((p.up.T @ p.up - torch.eye(p.rank)).detach().norm()) for p in training.pairs)

    with_it, without = Training(point()), Training(point(orthogonality=0.0))
    with_it.step(40)
    without.step(40)
    assert error(with_it) < 0.8 * error(without)


def test_ties_are_cut_so_that_exactly_the_count_stays() -> None:
    masks = kept_terms([torch.zeros(3), torch.zeros(4)], 5)
    assert [int(mask.sum()) for mask in masks] == [3, 2]
    assert not any(mask.any() for mask in kept_terms([torch.zeros(3)], 0))


def test_the_closed_terms_go_when_the_handle_is_removed_and_training_can_go_on(tmp_path: Path) -> None:
    training = ends_the_same(point(), tmp_path)
    assert all((gate != 0).any() and ((gate != 0).all() or len(gate) == 1) for gate in training.gates())
    assert sum(training.ranks()) < 9
    training.handle = rf.attach(training.model, training.optimizer, total_steps=40)
    ranks = training.ranks()
    training.step(3)
    assert training.ranks() == ranks


def test_nothing_goes_when_the_handle_is_removed_while_terms_may_return() -> None:
    training = Training(point())
    training.step(15)
    training.handle.remove()
    assert training.ranks() == [3, 3, 3]


def test_kept_terms_keep_their_moments_when_the_others_go() -> None:
    training = Training(point())
    training.step(40)
    pairs = training.pairs
    kept = [(pair.gate != 0).nonzero().flatten() for pair in pairs]
    before = [
        training.optimizer.state[pair.up]["exp_avg_sq"][:, keep].clone()
        for pair, keep in zip(pairs, kept, strict=True)
    ]
    training.handle.remove()
    for pair, keep, moment in zip(pairs, kept, before, strict=True):
        if len(keep):
            assert torch.equal(training.optimizer.state[pair.up]["exp_avg_sq"], moment)


def test_the_ranks_go_where_the_change_is_needed() -> None:
    training = planted(point(orthogonality=0.1, interval=10))
    training.handle.remove()
    assert training.ranks()[1] == 3
    assert sum(training.ranks()) == 6


def test_a_layer_that_gets_no_gradient_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(point(orthogonality=0.0))
    training.step(2)
    training.backward()
    pair = training.pairs[0]
    old = training.run.memory(pair.key)["up.mean"].clone()
    for parameter in (pair.up, pair.down, pair.gate):
        parameter.grad = None  # type: ignore[union-attr]
    training.optimizer.step()
    torch.testing.assert_close(training.run.memory(pair.key)["up.mean"], 0.85 * old)


def test_attach_names_the_steps_that_are_missing() -> None:
    with pytest.raises(InvalidOption, match="adalora needs total_steps"):
        Training(point(), None)
