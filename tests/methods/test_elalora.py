"""ElaLoRA: terms move from weight to weight at a constant total."""

from pathlib import Path
from typing import Any

import torch
from methods._dynamic import Training, ends_the_same, moments, perceptron, planted
from methods._layers import normal

import rankfold as rf
from rankfold.methods.ranks.elalora import exchange, fresh_directions, growing, pooled_terms


def point(structure: str = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return rf.Recipe(structure, init, ("elalora", {"interval": 3, "exchange": 2, **options}))


def set_scores(training: Training, scores: list[list[float]]) -> None:
    for pair, values in zip(training.pairs, scores, strict=True):
        training.run.memory(pair.key)["score"] = torch.tensor(values).double()


def test_the_start_is_the_base_and_only_the_gates_have_a_gradient() -> None:
    training = Training(point())
    assert torch.equal(training.output(), perceptron()(training.x))
    training.backward()
    for pair in training.pairs:
        assert pair.gate is not None
        assert pair.gate.grad.abs().min() > 0
        assert not pair.up.grad.any()


def test_the_total_rank_is_constant_and_every_weight_keeps_one() -> None:
    training, seen = Training(point(pool=3), 60, rank=3), set()
    for _ in range(60):
        training.step()
        ranks = training.ranks()
        assert sum(ranks) == 9
        assert min(ranks) >= 1
        seen.add(tuple(ranks))
    assert len(seen) > 2


def test_the_exchange_falls_to_nothing_along_the_papers_cubic() -> None:
    training = Training(point(exchange=8, warmup=0.1, final=0.3), 100)
    rule: Any = training.handle.methods["ranks=elalora"]
    counts = []
    for step in range(1, 101):
        training.run.state["clock"] = step
        counts.append(rule.exchanged(training.run))
        if 10 < step <= 70:
            assert counts[-1] == round(8 * (1 - ((step - 10) / 60) ** 3))
    assert counts[:10] == [0] * 10
    assert counts[69:] == [0] * 31


def test_an_event_changes_the_function_by_the_pruned_terms_only() -> None:
    training = Training(point(init="pissa"), 60, rank=3)
    training.step(2)
    set_scores(training, [[9.0, 8.0, 7.0], [1.0, 5.0, 6.0], [2.0, 4.0, 3.0]])
    changes = [pair.change() for pair in training.pairs]
    pruned = training.pairs[1]
    assert pruned.gate is not None
    lost = pruned.scale * pruned.gate[0] * torch.outer(pruned.up[:, 0], pruned.down[0])
    with torch.no_grad():
        exchange(training.run, training.pairs, pool=1, count=1)
    assert training.ranks() == [4, 2, 3]  # the weight with the best of the worst terms grows
    after = [pair.change() for pair in training.pairs]
    torch.testing.assert_close(after[0], changes[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], changes[1] - lost, rtol=0, atol=1e-12)
    assert torch.equal(after[2], changes[2])


def test_the_weight_with_the_best_worst_terms_grows_and_not_the_one_with_the_highest_mean() -> None:
    scores = [torch.tensor([5.0, 6.0]), torch.tensor([0.1, 100.0]), torch.tensor([1.0, 2.0])]
    pool = pooled_terms(scores, 2)
    assert pool == [(1, 0), (2, 0), (0, 0)]  # never all terms of a weight
    assert growing(pool, 1, dict.fromkeys(range(3), 9)) == {0: 1}
    assert growing(pool, 1, {0: 0, 1: 9, 2: 9}) == {2: 1}  # a full weight cannot


def test_new_directions_are_orthonormal_and_orthogonal_to_columns_that_are_not() -> None:
    known = normal(9, 4) * 0.02
    fresh = fresh_directions(known, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(fresh.T @ fresh, torch.eye(3).double())
    assert (known.T @ fresh).abs().max() < 1e-15
    dependent = known[:, [0, 0, 1]]
    assert (
        dependent.T @ fresh_directions(dependent, 2, torch.Generator().manual_seed(0))
    ).abs().max() < 1e-15


def test_a_new_term_stands_behind_next_to_nothing_with_fresh_scores_and_moments() -> None:
    training = Training(point(), 60, rank=3)
    training.step(5)
    set_scores(training, [[9.0, 8.0, 7.0], [1.0, 5.0, 6.0], [2.0, 4.0, 3.0]])
    pair = training.pairs[0]
    assert pair.gate is not None
    smallest = pair.gate.detach().abs().min()
    kept, mean = moments(training, pair.up), training.run.memory(pair.key)["up.mean"].clone()
    with torch.no_grad():
        exchange(training.run, training.pairs, pool=1, count=1)
    assert pair.rank == 4
    assert 0 < pair.gate[3] <= min(float(smallest), 1e-13)
    assert torch.equal(moments(training, pair.up)[:, :3], kept)
    assert not moments(training, pair.up)[:, 3].any()
    assert torch.equal(training.run.memory(pair.key)["up.mean"][:, :3], mean)
    assert not training.run.memory(pair.key)["up.mean"][:, 3].any()
    lost = training.pairs[1]
    assert training.optimizer.state[lost.down]["exp_avg"].shape == lost.down.shape
    training.step(3)


def test_a_grown_term_is_trained() -> None:
    training = Training(point(init="pissa", warmup=0.0, final=0.2, exchange=1), 80, rank=3)
    training.step(80)
    assert any((gate.abs() > 1e-13).all() and len(gate) > 3 for gate in training.gates())


def test_no_weight_grows_beyond_its_smaller_side() -> None:
    training = Training(point(), 60, rank=4)
    set_scores(training, [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 9.0, 9.0, 9.0]])
    with torch.no_grad():
        exchange(training.run, training.pairs, pool=2, count=2)
    assert training.ranks() == [2, 6, 4]  # the last, 4 x 8, is full


def test_files_and_folding_have_the_ranks_that_are_left(tmp_path: Path) -> None:
    assert sum(ends_the_same(point(init="pissa"), tmp_path).ranks()) == 6


def test_the_layer_that_needs_it_does_not_lose_rank() -> None:
    assert planted(point(interval=5), steps=150).ranks()[1] >= 2
