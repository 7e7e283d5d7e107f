"""DoRA with dynamic rank distribution: terms pruned by their share of the norm."""

import math
from pathlib import Path
from typing import Any

import torch
from methods._dynamic import Training, ends_the_same, only_the_gates_move, planted
from methods._layers import normal

import rankfold as rf
from rankfold.methods.ranks.dora_dynamic import norm_shares


def point(structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, ("dora-dynamic", {"interval": 3, **options}))


def test_the_start_is_the_base_between_two_random_factors_and_only_the_gates_have_a_gradient() -> None:
    training = Training(point())
    only_the_gates_move(training)
    for pair in training.pairs:
        assert 0 < pair.up.abs().max() <= 1 / math.sqrt(pair.rank)
        assert 0 < pair.down.abs().max() <= 1 / math.sqrt(pair.down.shape[1])


def test_the_scores_are_those_of_dense_matrices() -> None:
    up, gate, down = normal(9, 4), normal(4, seed=2), normal(4, 7, seed=3)
    terms = [float((gate[i] * torch.outer(up[:, i], down[i])).norm()) for i in range(4)]
    dense = (up * gate @ down).norm()
    torch.testing.assert_close(
        norm_shares(up, gate, down), torch.tensor(terms).double() / dense, rtol=1e-7, atol=0
    )


def test_the_scores_do_not_depend_on_the_scale_of_a_layer() -> None:
    up, gate, down = normal(9, 4), normal(4, seed=2), normal(4, 7, seed=3)
    torch.testing.assert_close(
        norm_shares(up, 10 * gate, down), norm_shares(up, gate, down), rtol=1e-7, atol=0
    )


def test_a_score_exceeds_one_only_where_terms_cancel() -> None:
    basis = torch.linalg.qr(normal(9, 4)).Q
    assert norm_shares(basis, normal(4, seed=2), basis.T).max() < 1
    opposite = torch.stack([basis[:, 0], -basis[:, 0] + 0.1 * basis[:, 1]], 1)
    assert norm_shares(opposite, torch.ones(2).double(), torch.ones(2, 5).double()).min() > 1
    assert not norm_shares(basis, torch.zeros(4).double(), basis.T).any()


def test_scores_are_averaged_over_steps() -> None:
    training = Training(point(equilibrium=0.0))
    average = [torch.zeros(3).double() for _ in training.pairs]
    for _ in range(2):
        training.step()
        for i, pair in enumerate(training.pairs):
            assert pair.gate is not None
            average[i] = 0.9 * average[i] + 0.1 * norm_shares(pair.up, pair.gate, pair.down).detach()
    for pair, expected in zip(training.pairs, average, strict=True):
        torch.testing.assert_close(training.run.memory(pair.key)["score"], expected)


def test_pruning_follows_the_cubic_and_leaves_exactly_the_asked_ranks() -> None:
    training = Training(point(), rank=4)
    for step in range(1, 41):
        training.step()
        if step % 3 == 0 and 6 < step < 20:
            left = 16 - int((16 - 12) * ((step - 6) / 14) ** 3)
            assert training.open() == left
        if step >= 20:
            assert training.open() == 12
    assert sum(training.ranks()) == 16  # 6, 6 and all that 4 x 8 holds


def test_nothing_is_closed_while_the_schedule_asks_for_nothing() -> None:
    training = Training(point())
    training.step(9)
    assert training.open() == 9


def test_closed_gates_revive_between_events_and_never_after_pruning() -> None:
    training = Training(point())
    training.step(18)
    assert training.open() < 9
    training.step()
    assert training.open() == 9
    training.step()
    last = [gate != 0 for gate in training.gates()]
    for _ in range(20):
        training.step()
        assert all(map(torch.equal, last, [gate != 0 for gate in training.gates()]))


def test_the_penaltys_gradient_is_that_of_autograd_and_only_there_while_pruning() -> None:
    plain, penalised = Training(point(equilibrium=0.0)), Training(point(equilibrium=0.7))
    rule: Any = penalised.handle.methods["ranks=dora-dynamic"]
    for clock, counts in ((5, False), (6, True), (19, True), (20, False)):
        penalised.run.state["clock"] = clock
        plain.backward()
        penalised.backward()
        factors = [v for pair in penalised.pairs for v in (*pair.up.T, *pair.down)]
        loss = 0.7 * torch.stack([vector.var() for vector in factors]).mean()
        parameters = [p for pair in penalised.pairs for p in (pair.up, pair.down)]
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            rule.gradients_ready(penalised.run)
        others = [p for pair in plain.pairs for p in (pair.up, pair.down)]
        for own, base, slope in zip(parameters, others, slopes, strict=True):
            torch.testing.assert_close(own.grad, base.grad + counts * slope)


def test_files_and_folding_have_the_ranks_that_are_left(tmp_path: Path) -> None:
    training = ends_the_same(point(), tmp_path)
    assert 6 <= sum(training.ranks()) <= 7


def test_the_layer_that_needs_it_keeps_its_rank() -> None:
    training = planted(point(), steps=150)
    training.handle.remove()
    assert training.ranks()[1] == 3
