"""What happens to gated terms: the function stays, and all that is remembered of them follows."""

from __future__ import annotations

import torch
from methods._dynamic import Training

import rankfold as rf
from rankfold.methods.events import change_terms, close, close_again, drop_closed, gate_of, initial_rank

GATED = rf.Recipe("lora", ranks=("sora", {"threshold": 0.0, "penalty": 0.0}))


def started() -> Training:
    training = Training(GATED)
    training.step(2)
    return training


def test_the_initial_rank_is_rounded_up() -> None:
    assert [initial_rank({"initial": 1.5}, rank) for rank in (1, 2, 3)] == [2, 3, 5]


def test_a_closed_gate_that_moved_is_closed_again() -> None:
    training = started()
    with torch.no_grad():
        close(training.run, training.pairs, [torch.tensor([1.0, 0.0])] * 3)
        for pair in training.pairs:
            gate_of(pair).add_(1.0)
        close_again(training.run, training.pairs)
    assert all((gate_of(pair) != 0).tolist() == [True, False] for pair in training.pairs)


def test_dropping_closed_terms_keeps_the_function_and_one_term_of_every_product() -> None:
    training = started()
    masks = [torch.tensor(mask) for mask in ([1.0, 0.0], [0.0, 0.0], [1.0, 1.0])]
    with torch.no_grad():
        close(training.run, training.pairs, masks)
        before = training.output()
        drop_closed(training.run)
    assert training.ranks() == [1, 1, 2]
    torch.testing.assert_close(training.output(), before, rtol=1e-12, atol=1e-12)


def test_gradients_that_wait_and_what_is_remembered_follow_the_terms() -> None:
    training = started()
    training.backward()
    pair = training.pairs[0]
    slopes = [p.grad.clone() for p in (pair.up, pair.down, gate_of(pair)) if p.grad is not None]
    memory = training.run.memory(pair.key)
    memory.update({"up.seen": pair.up.detach().clone(), "score": torch.tensor([3.0, 4.0]), "count": 7})
    up, down = pair.up.detach().clone(), torch.ones(1, pair.down.shape[1]).double()
    change_terms(training.run, pair, torch.tensor([1]), up[:, :1], down, torch.zeros(1).double())
    assert pair.up.grad is not None
    assert torch.equal(pair.up.grad, torch.stack([slopes[0][:, 1], torch.zeros(len(up)).double()], 1))
    assert torch.equal(pair.down.grad, torch.stack([slopes[1][1], torch.zeros_like(slopes[1][1])]))  # type: ignore[arg-type]
    assert torch.equal(gate_of(pair).grad, torch.stack([slopes[2][1], slopes[2][1] * 0]))  # type: ignore[arg-type]
    assert torch.equal(memory["up.seen"][:, 0], up[:, 1])
    assert memory["score"].tolist() == [4.0, 0.0]
    assert memory["count"] == 7
