"""SST trains all singular values and a few sampled pairs of vectors, and keeps an SVD an SVD."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.methods.spectra import drawn_first, spectra
from rankfold.weights import Sliced, Spectral


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(out: int = 8, columns: int = 6) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(columns, out)).double()


def adapted(out: int = 8, columns: int = 6, **options: Any) -> nn.Module:
    return rf.adapt(fresh(out, columns), "sst", **{"rank": 2, "interval": 5, "warmup": 0, **options})


def parts(model: nn.Module) -> tuple[Spectral, Spectral]:
    return spectra(model[0].expression)  # type: ignore[index]


def whole(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    active, rest = parts(model)
    left, right = (
        torch.cat([getattr(each, side).tensor().detach() for each in (active, rest)], axis)
        for side, axis in (("left", 1), ("right", 0))
    )
    return left, values(model), right


def core(model: nn.Module) -> Tensor:
    sliced = parts(model)[0].core
    assert isinstance(sliced, Sliced)
    return sliced.inner.tensor()


def values(model: nn.Module) -> Tensor:
    return core(model).detach().clone()


def matrix(model: nn.Module) -> Tensor:
    return model[0].expression.dense().detach()  # type: ignore[index,no-any-return]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    x = normal(32, model[0].in_features, seed=1)  # type: ignore[index]
    wanted = normal(32, model[0].out_features, seed=2)  # type: ignore[index]
    for _ in range(times):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimizer.step()


def test_the_start_is_the_models_own_as_its_svd() -> None:
    model, plain = adapted(), fresh()
    torch.testing.assert_close(matrix(model), plain[0].weight.detach(), atol=1e-12, rtol=0)  # type: ignore[index]
    left, _, right = whole(model)
    torch.testing.assert_close(left.T @ left, torch.eye(6).double())
    torch.testing.assert_close(right @ right.T, torch.eye(6).double())


@pytest.mark.parametrize("tokens", [3, 500])  # few are applied factor by factor, many through the matrix
def test_vectors_get_the_gradient_without_their_singular_value(tokens: int) -> None:
    x, cotangent = normal(tokens, 6), normal(tokens, 8, seed=3)
    found = []
    for detach in (True, False):
        model = adapted()
        for part in parts(model):
            part.detach = detach
        (model(x) * cotangent).sum().backward()
        active = parts(model)[0]
        found.append((active.left.tensor().grad, active.right.tensor().grad, core(model).grad))
    enhanced, own = found
    sizes, gradient = values(adapted())[:2], cotangent.T @ x
    left, _, right = whole(adapted())
    torch.testing.assert_close(enhanced[0], gradient @ right[:2].T)
    torch.testing.assert_close(enhanced[1], left[:, :2].T @ gradient)
    torch.testing.assert_close(own[0] / enhanced[0], sizes.expand(8, 2))
    torch.testing.assert_close(own[1] / enhanced[1], sizes[:, None].expand(2, 6))
    torch.testing.assert_close(enhanced[2], torch.einsum("oi,oc,ic->i", left, gradient, right))
    torch.testing.assert_close(enhanced[2], own[2])


def test_a_singular_value_of_zero_still_lets_its_vectors_learn() -> None:
    model = adapted()
    core(model).data.zero_()
    model(normal(4, 6)).square().sum().backward()
    assert parts(model)[0].left.tensor().grad.abs().min() > 0  # type: ignore[union-attr]


def test_within_an_iteration_other_vectors_stay_and_all_values_move() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    frozen = [leaf.tensor().clone() for leaf in (parts(model)[1].left, parts(model)[1].right)]
    before = whole(model)
    with rf.attach(model, optimizer):
        step(model, optimizer, 4)
    left, now, right = whole(model)
    assert torch.equal(parts(model)[1].left.tensor(), frozen[0])
    assert torch.equal(parts(model)[1].right.tensor(), frozen[1])
    assert (left[:, :2] != before[0][:, :2]).all()
    assert (now != before[1]).all()
    torch.testing.assert_close(left.norm(dim=0), torch.ones(6).double())
    torch.testing.assert_close(right.norm(dim=1), torch.ones(6).double())


def test_singular_values_are_clamped_at_zero() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    with rf.attach(model, optimizer):
        step(model, optimizer)
    assert values(model).min() == 0


def test_an_iteration_draws_other_pairs_and_a_round_decomposes_again() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with rf.attach(model, optimizer):
        step(model, optimizer, 4)
        matrices = [matrix(model)]
        handle_state = optimizer.state[parts(model)[0].left.tensor()]
        assert handle_state["exp_avg"].any()
        drawn, size_of = parts(model)[0].left.tensor().detach().clone(), values(model)
        moment_of = optimizer.state[core(model)]["exp_avg"].clone()
        assert len(moment_of) == len(size_of)
        optimizer.zero_grad(set_to_none=True)  # a step in which the loss asks for nothing
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert not torch.equal(parts(model)[0].left.tensor(), drawn)
        torch.testing.assert_close(matrix(model), matrices[0])
        state = optimizer.state[parts(model)[0].left.tensor()]
        assert not state["exp_avg"].any()
        assert not state["step"].any()
        moved = optimizer.state[core(model)]["exp_avg"]
        order = (values(model)[:, None] == size_of).int().argmax(1)
        torch.testing.assert_close(moved, 0.9 * moment_of[order])
        assert optimizer.state[core(model)]["step"] == 5
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        step(model, optimizer, 9)  # iterations 2 and most of 3; a round has 6 / 2 = 3
        left = whole(model)[0]
        assert (left.T @ left - torch.eye(6).double()).abs().max() > 1e-3
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before, sizes = matrix(model), values(model)
        step(model, optimizer)
        moments = optimizer.state[core(model)]["exp_avg"]
    left, now, right = whole(model)
    assert moments.shape == sizes.shape
    torch.testing.assert_close(left.T @ left, torch.eye(6).double())
    torch.testing.assert_close(right @ right.T, torch.eye(6).double())
    torch.testing.assert_close(matrix(model), before)
    torch.testing.assert_close(now.sort(descending=True).values, torch.linalg.svdvals(before))


def test_pairs_are_drawn_half_uniformly_and_half_by_their_size() -> None:
    sizes = torch.tensor([6.0, 3.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        order = drawn_first(sizes, 1, generator)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        counts[order[0]] += 1
    torch.testing.assert_close(counts / 4000, (0.25 + sizes / 10) / 2, atol=0.03, rtol=0)
    assert drawn_first(torch.zeros(3), 2, generator).shape == (3,)


def test_the_rate_of_the_vectors_climbs_after_a_drawing() -> None:
    moved = []
    for warmup in (0, 4):
        model = adapted(warmup=warmup)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        before = whole(model)
        with rf.attach(model, optimizer):
            step(model, optimizer)
        moved.append([(b - a)[:, :2] for a, b in zip(before[:1], whole(model)[:1], strict=True)])
        moved[-1].append(values(model) - before[1])
    torch.testing.assert_close(moved[1][0], moved[0][0] / 4, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(moved[1][1], moved[0][1])


def test_only_the_sampled_pairs_have_moments() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with rf.attach(model, optimizer):
        step(model, optimizer, 12)
    counts = rf.count(model)
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert held == counts.active == 2 * (8 + 6) + 6 + 8  # pairs, values, bias
    assert counts.stored == 6 * (8 + 6 + 1) + 8
    assert counts.deployed == 6 * 8 + 8


def test_the_change_of_the_weight_outgrows_the_rank() -> None:
    wanted = normal(16, 16, seed=5)
    model = adapted(16, 16, interval=10)
    start, optimizer = matrix(model), torch.optim.Adam(model.parameters(), lr=0.02)
    x = normal(64, 16, seed=6)
    with rf.attach(model, optimizer):
        for _ in range(400):
            optimizer.zero_grad()
            (model(x) - x @ wanted.T).square().mean().backward()
            optimizer.step()
    change = torch.linalg.svdvals(matrix(model) - start)
    assert (change > 1e-2 * change[0]).sum() > 8
    error = (matrix(model) - wanted).norm() / wanted.norm()
    best = torch.linalg.svdvals(wanted)[2:].norm() / wanted.norm()  # of any matrix of rank 2
    assert error < 0.5 * best, f"{error:.3f} against {best:.3f}"


def test_a_training_that_stops_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    def trained(model: nn.Module, steps: int, state: Any = None) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if state is not None:
            optimizer.load_state_dict(state)
        with rf.attach(model, optimizer):
            step(model, optimizer, steps)
        return optimizer

    whole_way, half = adapted(warmup=3), adapted(warmup=3)
    trained(whole_way, 40)
    optimizer = trained(half, 17)
    rf.save(half, tmp_path / "half")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = rf.load(fresh(), tmp_path / "half")
    trained(again, 23, torch.load(file, weights_only=True))
    assert torch.equal(matrix(again), matrix(whole_way))
    assert all(map(torch.equal, whole(again), whole(whole_way)))


def test_evaluation_sees_every_change_of_the_values() -> None:
    model, x = adapted(), normal(1, 6)
    with torch.no_grad():
        rest = parts(model)[1]
        first = rest(x)
        torch.testing.assert_close(rest(x), first)
        core(model).mul_(2)
        torch.testing.assert_close(rest(x), 2 * first)


def test_options_are_refused_with_a_sentence() -> None:
    with pytest.raises(rf.errors.InvalidOption, match="interval must be at least 1"):
        adapted(interval=0)
    with pytest.raises(rf.errors.InvalidOption, match="warmup"):
        adapted(warmup=-1)


def test_moments_of_the_values_go_by_rank_at_a_new_decomposition() -> None:
    model = adapted(rank=6, interval=1)  # every step ends a round
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    with rf.attach(model, optimizer):
        step(model, optimizer)
        order = torch.tensor([3, 5, 0, 1, 4, 2])
        for leaf, axis in ((parts(model)[0].left, 1), (parts(model)[0].right, 0)):
            leaf.tensor().data.copy_(leaf.tensor().data.index_select(axis, order))
        core(model).data.copy_(core(model).data[order])
        optimizer.state[core(model)]["momentum_buffer"].copy_(values(model))  # which tells them apart
        core(model).grad, before = None, matrix(model)
        optimizer.step()
    torch.testing.assert_close(matrix(model), before)
    assert (values(model).diff() < 0).all()
    torch.testing.assert_close(optimizer.state[core(model)]["momentum_buffer"], values(model))


def test_an_optimizer_that_keeps_other_shapes_starts_anew_with_drawn_vectors() -> None:
    model = adapted()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    with rf.attach(model, optimizer):
        step(model, optimizer, 4)
        assert optimizer.state[parts(model)[0].left.tensor()]["row_var"].any()
        step(model, optimizer)
        assert not optimizer.state[parts(model)[0].left.tensor()]
        assert optimizer.state[core(model)]["step"] == 5
        step(model, optimizer)


def test_a_model_in_half_precision_is_decomposed_in_single_precision() -> None:
    model = adapted(interval=1).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = normal(32, 6, seed=1).bfloat16()
    with rf.attach(model, optimizer):
        for _ in range(3):  # a round
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    left, now, _ = whole(model)
    assert left.dtype == now.dtype == torch.bfloat16
    torch.testing.assert_close((left.T @ left).double(), torch.eye(6).double(), atol=0.02, rtol=0)


def test_a_frozen_weight_stays_bit_for_bit() -> None:
    model = rf.adapt(nn.Sequential(fresh()[0], fresh(6, 8)[0]), "sst", rank=2, interval=1)  # type: ignore[index]
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    before, moved = whole(model), core(model[1:]).detach().clone()  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rf.attach(model, optimizer):
        for _ in range(3):
            model(normal(4, 6)).square().mean().backward()
            optimizer.step()
    assert all(map(torch.equal, whole(model), before))
    assert not torch.equal(core(model[1:]), moved)  # type: ignore[index]


def test_singular_values_that_are_no_numbers_are_refused_with_a_sentence() -> None:
    model = adapted(interval=1)
    core(model).data[0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        rf.attach(model, optimizer),
        pytest.raises(rf.errors.InvalidOption, match="0: the vector of singular"),
    ):
        step(model, optimizer)
