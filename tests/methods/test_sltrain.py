"""SLTrain: low-rank plus sparse on a fixed support, without a dense trained matrix."""

import pytest
import torch
import torch.utils.flop_counter
from torch import nn

import rankfold as rf


def model_of(out=24, columns=32, **options):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(columns, out, bias=False)).double()
    return rf.adapt(plain, rf.Recipe(("sltrain", {"density": 0.1, **options})), rank=4)


def leaf(model, name):
    return model[0].adapters["default"].leaf(name).tensor()


def test_it_starts_as_its_sparse_part_alone():
    weight = model_of()[0].expression.dense()
    assert int((weight != 0).sum()) == int(0.1 * 24 * 32)
    assert float(weight.detach().abs().max()) <= 32**-0.5
    assert not leaf(model_of(), "up").any()


def test_gradients_are_those_of_the_dense_weight():
    model, x = model_of(), torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).double()
    weight = model[0].expression.dense().detach().requires_grad_()
    wanted = torch.randn(40, 24, generator=torch.Generator().manual_seed(2)).double()
    ((x @ weight.T - wanted) ** 2).sum().backward()
    ((model(x) - wanted) ** 2).sum().backward()
    index, scale = leaf(model, "index").long(), 32.0 / 4
    torch.testing.assert_close(leaf(model, "values").grad, weight.grad.flatten()[index])
    torch.testing.assert_close(leaf(model, "up").grad, scale * weight.grad @ leaf(model, "down").detach().T)
    assert not leaf(model, "down").grad.any()


def trained():
    model, x = model_of(), torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - x[:, :24]).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_nothing_is_learnt_off_the_support_but_by_the_product():
    model, _ = trained()
    assert torch.equal(leaf(model, "index"), leaf(model_of(), "index"))
    rest = model[0].expression.dense() - 8.0 * leaf(model, "up") @ leaf(model, "down")
    off = torch.ones(24 * 32, dtype=torch.bool)
    off[leaf(model, "index").long()] = False
    assert rest.flatten()[off].abs().max() < 1e-12


def test_the_weight_reaches_a_rank_far_above_the_products():
    model, _ = trained()
    assert torch.linalg.matrix_rank(model[0].expression.dense().detach()) == 24


def test_the_optimizer_holds_what_is_trained_and_no_dense_matrix():
    _, optimizer = trained()
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert held == 4 * (24 + 32) + int(0.1 * 24 * 32)


def test_a_thirtieth_of_the_entries_by_default():
    model = rf.adapt(nn.Sequential(nn.Linear(32, 24)), "sltrain", rank=4)
    assert len(leaf(model, "values")) == int(0.03 * 24 * 32)


@pytest.mark.parametrize("half", [False, True])
def test_many_tokens_meet_the_whole_matrix_which_is_not_kept(half):
    torch.manual_seed(0)
    model, kept = rf.adapt(nn.Sequential(nn.Linear(64, 48)), "sltrain", rank=16), []
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        counter,
    ):
        output = model(torch.ones(1000, 64))
    assert counter.get_total_flops() == 2 * 64 * 48 * (1000 + 16)
    assert (48, 64) not in kept
    assert (1000, 16) not in kept
    output.sum().backward()
    assert len(leaf(model, "values").grad) == int(0.03 * 48 * 64)
