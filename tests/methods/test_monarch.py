"""Monarch from scratch, from a weight that is there, and multiplied out while training runs."""

from pathlib import Path

import pytest
import torch
from methods._layers import backward, expression_of, leaves_of, linear, normal, rank_of
from methods._moving import Training, assert_resumes, perceptron
from torch import Tensor

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.attach import TotalStepsChanged

REVERSED = rf.Recipe(("monarch", {"blocks": 2, "sparse": 0.5}))


def layer(out: int, columns: int, **options: object) -> torch.nn.Module:
    return rf.adapt(linear(out, columns), rf.Recipe(("monarch", options)))


def written_out(left: Tensor, right: Tensor, x: Tensor, out: int) -> Tensor:
    """The forward pass of a layer of b blocks, in the order of the paper's text."""
    blocks, inner, width = right.shape
    padded = torch.nn.functional.pad(x, (0, blocks * width - x.shape[-1])).reshape(-1, blocks, width)
    z = torch.einsum("kqp,nkp->nkq", right, padded).reshape(len(x), inner, blocks).transpose(1, 2)
    o = torch.einsum("lst,nlt->nls", left, z)
    return o.transpose(1, 2).reshape(len(x), -1)[:, :out]


@pytest.mark.parametrize(("out", "columns", "blocks"), [(16, 16, 4), (8, 12, 2), (12, 8, 4), (7, 10, 3)])
def test_a_layer_is_two_batches_of_blocks_with_a_transposition_after_each(
    out: int, columns: int, blocks: int
) -> None:
    model, x = layer(out, columns, blocks=blocks), normal(5, columns)
    leaves = leaves_of(model)
    wanted = written_out(leaves["left"], leaves["right"], x, out) + model[0].bias
    torch.testing.assert_close(model(x), wanted)
    inner = min(-(-out // blocks), -(-columns // blocks))
    assert leaves["right"].shape == (blocks, inner, -(-columns // blocks))
    assert leaves["left"].shape == (blocks, -(-out // blocks), inner)
    torch.testing.assert_close(expression_of(model)(x), x @ expression_of(model).dense().T)


def test_it_has_full_rank_with_blocks_of_a_low_one_and_few_numbers() -> None:
    model = layer(32, 32, blocks=4)
    weight = expression_of(model).dense().detach()
    assert rank_of(weight) == 32
    for i in range(4):
        for piece in weight[i::4].chunk(4, 1):
            assert rank_of(piece) == 2
    assert sum(leaf.numel() for leaf in leaves_of(model).values()) == 32 * (32 + 32) // 4


def test_factors_start_uniform_with_the_fan_in_of_their_own_blocks() -> None:
    leaves = leaves_of(layer(64, 256, blocks=4))
    for name, fan_in in (("right", 64), ("left", 16)):
        assert leaves[name].shape[2] == fan_in
        assert leaves[name].abs().max() <= fan_in**-0.5
        assert leaves[name].std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_gradients_are_those_of_the_matrix() -> None:
    model, x = layer(12, 8, blocks=2), normal(6, 8)
    grad = backward(model, x)
    leaves = leaves_of(model)
    wanted = torch.autograd.grad((expression_of(model).dense() * grad).sum(), list(leaves.values()))
    for leaf, expected in zip(leaves.values(), wanted, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


def test_a_weight_that_is_monarch_is_projected_to_itself() -> None:
    source = layer(7, 10, blocks=3)
    weight = expression_of(source).dense().detach()
    model = linear(7, 10)
    model[0].weight.data = weight.clone()
    rf.adapt(model, rf.Recipe(("monarch", {"blocks": 3, "start": "projection"})))
    torch.testing.assert_close(expression_of(model).dense(), weight)


def test_a_projected_start_is_nearer_to_the_weight_than_any_step_from_it() -> None:
    plain = linear(7, 10)[0].weight.detach()
    model = layer(7, 10, blocks=3, start="projection")
    (expression_of(model).dense() - plain).square().sum().backward()
    for leaf in leaves_of(model).values():
        assert leaf.grad.abs().max() < 1e-12


def test_reverse_sparsification_goes_on_with_the_same_function_and_a_fresh_dense_weight() -> None:
    training = Training(REVERSED, rank=None)
    training.run(19)
    assert sorted(leaves_of(training.model)) == ["left", "right"]
    factors = [p for part in (0, 2) for p in leaves_of(training.model, str(part)).values()]
    before = training.model[0].expression.dense().detach()
    training.gradients()
    rates = [group["lr"] for group in training.optimizer.param_groups]
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    training.optimizer.step()
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    torch.testing.assert_close(training.model[0].expression.dense().detach(), before)
    weights = [leaves_of(training.model, path)["weight"] for path in ("0", "2")]
    held = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert all(any(p is w for p in held) for w in weights)
    assert not any(p is f for p in held for f in factors)
    assert not any(w in training.optimizer.state for w in weights)
    assert not any(f in training.optimizer.state for f in factors)
    training.run(5)
    assert training.optimizer.state[weights[0]]["step"] == 5
    assert training.optimizer.state[training.model[0].bias]["step"] == 25
    assert rank_of(training.model[0].expression.dense().detach() - before) > 5


def test_names_of_parameters_follow() -> None:
    model = rf.adapt(perceptron(), REVERSED)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    with rf.attach(model, optimizer, total_steps=2):
        model(normal(4, 12)).sum().backward()
        optimizer.step()
    group = optimizer.param_groups[0]
    known = dict(model.named_parameters())
    assert group["param_names"] == list(known)
    assert all(known[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


@pytest.mark.parametrize("stop", [17, 20, 25])
def test_a_training_that_was_interrupted_is_the_one_that_was_not(tmp_path: Path, stop: int) -> None:
    assert_resumes(REVERSED, tmp_path, stop=stop, rank=None)


def test_a_training_that_goes_on_with_fewer_steps_is_late_and_multiplies_out_at_once() -> None:
    training = Training(REVERSED, rank=None)
    training.run(15)
    training.handle.remove()
    with pytest.warns(TotalStepsChanged):
        handle = rf.attach(training.model, training.optimizer, total_steps=20)
    training.run(1)
    weights = [leaves_of(training.model, path)["weight"] for path in ("0", "2")]
    training.run(1)
    assert all(training.optimizer.state[weight]["step"] == 1 for weight in weights)
    handle.remove()


def test_fresh_matrices_whose_gradients_no_wrapper_would_average_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(Incompatible, match="monarch trains in one process where sparse is below 1"):
        Training(REVERSED, rank=None)
    Training(rf.Recipe("monarch"), rank=None).run(1)


def test_more_blocks_than_a_side_and_impossible_shares_are_refused() -> None:
    with pytest.raises(InvalidOption, match="monarch needs between 1 and 6 blocks in a layer of 6x8, not 7"):
        layer(6, 8, blocks=7)
    for options in ({"sparse": 0.0}, {"sparse": 1.5}, {"start": "butterfly"}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            layer(6, 8, **options)
