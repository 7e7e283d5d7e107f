"""DLRT moves a weight along its manifold of low rank by one step of K, L and S, and finds its rank."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.layers import require
from rankfold.methods.galerkin import kept_rank
from rankfold.weights import Spectral

RATE = 0.05


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(kind: str = "linear") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(12, 16) if kind == "linear" else nn.Conv2d(3, 16, 2, groups=1, padding=1)
        return nn.Sequential(layer).double()


def adapted(kind: str = "linear", **options: Any) -> nn.Module:
    return rf.adapt(fresh(kind), "dlrt", **{"rank": 3, "tau": 0.0, "targets": "0", **options})


def weight(model: nn.Module) -> Spectral:
    expression = model[0].expression  # type: ignore[index]
    assert isinstance(expression, Spectral)
    return expression


def factors(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    own = weight(model)
    return tuple(leaf.tensor().detach().clone() for leaf in (own.left, own.core, own.right))  # type: ignore[return-value]


def matrix(model: nn.Module) -> Tensor:
    return weight(model).dense().detach()


def rank(model: nn.Module) -> int:
    return weight(model).left.shape[1]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return (output - normal(*output.shape, seed=2)).square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def wide_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Return dL/dW (out, in), through a plain layer."""
    layer = model[0]  # type: ignore[index]
    probe = matrix(model).requires_grad_()
    output = layer.op.apply(x, probe, layer.bias.detach())
    loss = (output - normal(*output.shape, seed=2)).square().mean()
    return torch.autograd.grad(loss, probe)[0]


def projector(columns: Tensor) -> Tensor:
    basis = torch.linalg.qr(columns).Q
    return basis @ basis.T


def projected_step(model: nn.Module, gradient: Tensor, rate: float) -> Tensor:
    """Return Uh Uh^T (W - lr G) Vh Vh^T, from whole matrices."""
    left, core, right = factors(model)
    outputs = projector(torch.cat([left @ core - rate * gradient @ right.T, left], 1))
    inputs = projector(torch.cat([core @ right - rate * left.T @ gradient, right]).T)
    return outputs @ (matrix(model) - rate * gradient) @ inputs


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_step_is_the_whole_step_projected_onto_the_wider_bases(kind: str) -> None:
    model, x = adapted(kind), normal(40, 12) if kind == "linear" else normal(5, 3, 4, 4)
    gradient, before = wide_gradient(model, x), matrix(model)
    wanted, bias = projected_step(model, gradient, RATE), model[0].bias.detach().clone()  # type: ignore[index]
    with rf.attach(model, torch.optim.SGD(model.parameters(), lr=RATE)) as handle:
        step(model, handle.run.optimizer, x)  # type: ignore[union-attr]
    torch.testing.assert_close(matrix(model), wanted, rtol=1e-10, atol=1e-12)
    assert rank(model) == 6
    assert (model[0].bias.detach() != bias).all()  # type: ignore[index]
    left, _, right = (projector(t) for t in (factors(adapted(kind))[0], before, factors(adapted(kind))[2].T))
    tangent = left @ gradient + gradient @ right - left @ gradient @ right
    both = left @ (wanted - before) + (wanted - before) @ right - left @ (wanted - before) @ right
    torch.testing.assert_close(both, -RATE * tangent, rtol=1e-9, atol=1e-12)  # it holds the tangent step


def test_widening_the_bases_changes_nothing() -> None:
    model, x = adapted(), normal(40, 12)
    before, optimizer = matrix(model), torch.optim.SGD(model.parameters(), lr=RATE)
    with rf.attach(model, optimizer):
        loss_of(model, x).backward()
        core = weight(model).core.tensor()
        assert core.grad is not None
        core.grad.zero_()  # as a clip to zero would, so that the core has no step
        optimizer.step()
    torch.testing.assert_close(matrix(model), before, rtol=1e-12, atol=1e-13)


def test_bases_stay_orthonormal_and_the_core_is_diagonal() -> None:
    model, x = adapted(tau=0.05), normal(40, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with rf.attach(model, optimizer):
        for _ in range(5):
            step(model, optimizer, x)
            left, core, right = factors(model)
            torch.testing.assert_close(left.T @ left, torch.eye(rank(model)).double())
            torch.testing.assert_close(right @ right.T, torch.eye(rank(model)).double())
            assert torch.equal(core, torch.diag(core.diagonal()))
            assert (core.diagonal().diff() <= 0).all()
            assert (core.diagonal() >= 0).all()


@pytest.mark.parametrize("absolute", [False, True])
def test_what_is_cut_is_the_largest_tail_within_the_tolerance(absolute: bool) -> None:
    models, x = [adapted(), adapted(tau=0.3, absolute=absolute)], normal(40, 12)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with rf.attach(model, optimizer):
            step(model, optimizer, x)
    sizes = torch.linalg.svdvals(matrix(models[0]))
    tolerance = 0.3 * (1 if absolute else float(sizes.norm()))
    kept, error = rank(models[1]), (matrix(models[0]) - matrix(models[1])).norm()
    assert 2 <= kept < 6
    torch.testing.assert_close(error, sizes[kept:].norm(), rtol=1e-9, atol=1e-12)
    assert error <= tolerance < sizes[kept - 1 :].norm()


def test_the_kept_rank_is_the_smallest_that_the_tolerance_allows() -> None:
    sizes = torch.tensor([3.0, 2.0, 1.0])
    assert [kept_rank(sizes, t) for t in (0.0, 0.99, 1.0, 2.2, 2.3, 10.0)] == [3, 3, 2, 2, 1, 0]


def test_small_singular_values_are_never_divided_by() -> None:
    model, x = adapted(), normal(40, 12)
    weight(model).core.tensor().data.copy_(torch.diag(torch.tensor([1.0, 1e-9, 1e-12]).double()))
    gradient = wide_gradient(model, x)
    wanted = projected_step(model, gradient, RATE)
    with rf.attach(model, torch.optim.SGD(model.parameters(), lr=RATE)) as handle:
        before = matrix(model)
        step(model, handle.run.optimizer, x)  # type: ignore[union-attr]
    torch.testing.assert_close(matrix(model), wanted, rtol=1e-8, atol=1e-12)
    assert (matrix(model) - before).norm() <= RATE * gradient.norm()


def test_the_rank_of_a_linear_teacher_is_found() -> None:
    teacher = normal(16, 4, seed=3) @ normal(4, 12, seed=4) / 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = rf.adapt(nn.Sequential(nn.Linear(12, 16, bias=False)).double(), "dlrt", rank=6, tau=0.02)
    x, ranks = normal(64, 12, seed=5), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    with rf.attach(model, optimizer):
        for _ in range(200):
            optimizer.zero_grad()
            ((model(x) - x @ teacher.T).square().sum(1).mean() / 2).backward()
            optimizer.step()
            ranks.append(rank(model))
    assert set(ranks[60:]) == {4}, ranks
    assert (matrix(model) - teacher).norm() < 1e-3 * teacher.norm()


def test_accumulated_and_clipped_gradients_make_the_same_step() -> None:
    x, ends = normal(40, 12), []
    for cut in (False, True):
        model = adapted()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        with rf.attach(model, optimizer):
            loss_of(model, x).backward()  # never stepped
            optimizer.zero_grad()
            if cut:  # two half batches, and a scale undone by hand as a clip would
                output = normal(40, 16, seed=2)
                for part in (slice(0, 20), slice(20, 40)):
                    (4 * (model(x[part]) - output[part]).square().sum() / output.numel()).backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= 4
            else:
                loss_of(model, x).backward()
            optimizer.step()
        ends.append(matrix(model))
    torch.testing.assert_close(ends[0], ends[1])


def test_a_scaler_and_a_scheduler_make_the_same_steps_and_skipped_ones_leave_nothing() -> None:
    x, ends = normal(40, 12), []
    for scaled in (False, True):
        model = adapted()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        with rf.attach(model, optimizer) as handle:
            if scaled:
                optimizer.zero_grad()
                scaler.scale(float("inf") * loss_of(model, x)).backward()
                scaler.step(optimizer)
                scaler.update()
            for _ in range(2):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, x)).backward()
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
            assert handle.run is not None
            assert handle.run.step == 2
        ends.append(matrix(model))
    torch.testing.assert_close(ends[0], ends[1])


def test_the_loss_falls_with_any_of_the_usual_optimizers() -> None:
    x = normal(40, 12)
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.02),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
    ):
        model = adapted(tau=0.02)
        optimizer = make(model.parameters())
        with rf.attach(model, optimizer):
            losses = [step(model, optimizer, x) for _ in range(30)]
        assert losses[-1] < 0.8 * losses[0], (
            f"{type(optimizer).__name__}: {losses[0]:.2f} to {losses[-1]:.2f}"
        )


def test_momentum_turns_with_the_bases() -> None:
    model, x = adapted(), normal(40, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    first, right = wide_gradient(model, x) @ factors(model)[2].T, factors(model)[2]
    with rf.attach(model, optimizer):
        step(model, optimizer, x)
    kept = optimizer.state[weight(model).left.tensor()]["momentum_buffer"]
    torch.testing.assert_close(kept, first @ right @ factors(model)[2].T)
    assert kept.shape == (16, 6)


def test_nothing_is_held_between_steps() -> None:
    model, x = adapted(), normal(40, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    with rf.attach(model, optimizer) as handle:
        assert handle.run is not None
        step(model, optimizer, x)
        handle.run.enter("structure=dlrt")
        assert not handle.run.memory("0")
        for _ in range(2):  # a gradient that is thrown away does not pile up
            optimizer.zero_grad()
            loss_of(model, x).backward()
        assert len(handle.run.memory("0")["seen"]) == 2
    counts = rf.count(model)
    assert counts.stored == counts.active == 6 * (16 + 12 + 6) + 16


def test_a_gradient_from_before_it_was_attached_is_refused() -> None:
    model, x = adapted(), normal(40, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss_of(model, x).backward()
    with rf.attach(model, optimizer), pytest.raises(rf.errors.Incompatible, match="attached before"):
        optimizer.step()


def test_a_training_that_stops_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    x = normal(40, 12)

    def trained(model: nn.Module, steps: int, state: Any = None) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if state is not None:
            optimizer.load_state_dict(state)
        with rf.attach(model, optimizer):
            for _ in range(steps):
                step(model, optimizer, x)
        return optimizer

    whole, half = adapted(tau=0.2), adapted(tau=0.2)
    trained(whole, 30)
    optimizer = trained(half, 11)
    assert rank(half) != 3
    rf.save(half, tmp_path / "half")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = rf.load(fresh(), tmp_path / "half")
    assert rank(again) == rank(half)
    trained(again, 19, torch.load(file, weights_only=True))
    assert all(map(torch.equal, factors(again), factors(whole)))
    folded = rf.fold(again)
    torch.testing.assert_close(folded[0].weight.detach(), matrix(whole))


def test_it_starts_random_or_from_the_best_part_of_the_usual_start() -> None:
    left, core, right = factors(adapted())
    torch.testing.assert_close(left.T @ left, torch.eye(3).double())
    torch.testing.assert_close(right @ right.T, torch.eye(3).double())
    assert torch.equal(core, torch.diag(core.diagonal().sort(descending=True).values))
    usual = fresh()[0].weight.detach()  # type: ignore[index]
    rest = torch.linalg.svdvals(usual)[3:].norm()
    torch.testing.assert_close((matrix(adapted(start="svd")) - usual).norm(), rest)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(rf.errors.InvalidOption, match="tau"):
        adapted(tau=1.0)
    with pytest.raises(rf.errors.InvalidRank, match="rank"):
        adapted(rank=7)
    assert require(adapted(tau=5.0, absolute=True)) is not None


class Either(nn.Module):
    """Sends its input through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(12, 16), nn.Linear(12, 16)]).double()

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        """Return the output of one."""
        output: Tensor = self.layers[which](x)
        return output


def test_a_weight_that_no_gradient_reaches_is_left_out_of_a_step() -> None:
    model, x = rf.adapt(Either(), "dlrt", rank=3, uncalled="allow"), normal(40, 12)
    idle = model.layers[1].expression  # type: ignore[index,union-attr]
    before = [leaf.tensor().detach().clone() for leaf in (idle.left, idle.core, idle.right)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=0.1)
    with rf.attach(model, optimizer) as handle:
        (float("inf") * model(x, 1)).sum().backward()  # thrown away, as a gradient scaler does
        optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            loss_of(model, x).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert handle.run is not None
        handle.run.enter("structure=dlrt")
        assert "seen" not in handle.run.memory("layers.1")
    now = [leaf.tensor() for leaf in (idle.left, idle.core, idle.right)]
    assert all(map(torch.equal, now, before))


def test_gradients_that_are_taken_without_backward_make_the_same_step() -> None:
    x, ends = normal(40, 12), []
    for by_hand in (False, True):
        model = adapted()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        with rf.attach(model, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                if by_hand:
                    taken = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
                    for parameter, gradient in zip(model.parameters(), taken, strict=True):
                        parameter.grad = gradient
                else:
                    loss_of(model, x).backward()
                optimizer.step()
        ends.append(matrix(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_model_in_half_precision_is_decomposed_in_single_precision(make: Any) -> None:
    model, x = adapted(tau=0.05).bfloat16(), normal(40, 12).bfloat16()
    optimizer = make(model.parameters(), lr=0.02)
    with rf.attach(model, optimizer):
        losses = [step(model, optimizer, x) for _ in range(8)]
    left, core, _ = factors(model)
    assert left.dtype == core.dtype == torch.bfloat16
    torch.testing.assert_close((left.T @ left).double(), torch.eye(rank(model)).double(), atol=0.02, rtol=0)
    assert losses[-1] < losses[0]


def test_a_frozen_weight_stays_bit_for_bit_and_holds_nothing() -> None:
    model, x = adapted(), normal(40, 12)
    for leaf in (weight(model).left, weight(model).core, weight(model).right):
        leaf.tensor().requires_grad_(False)
    before = factors(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with rf.attach(model, optimizer) as handle:
        loss_of(model, x).backward()
        assert handle.run is not None
        handle.run.enter("structure=dlrt")
        assert not handle.run.memory("0")
        optimizer.step()
    assert all(map(torch.equal, factors(model), before))


def test_a_core_that_holds_no_numbers_is_refused_with_a_sentence() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    with rf.attach(model, optimizer), pytest.raises(rf.errors.InvalidOption, match="0: the core of shape"):
        step(model, optimizer, normal(40, 12))
