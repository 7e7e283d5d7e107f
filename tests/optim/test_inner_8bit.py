"""Moments in 8 bits are torchao's, take the bytes that are promised, and resume exactly."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.errors import MissingDependency
from rankfold.optim import Adam8bit, ProjectedOptimizer, inner, moments, reset

pytest.importorskip("torchao")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(shape: tuple[int, ...] = (32, 256), **options: Any) -> tuple[nn.Parameter, ProjectedOptimizer]:
    parameter = nn.Parameter(drawn(*shape))
    given = {"rank": 16, "inner": "adamw8bit", "lr": 0.01, **options}
    return parameter, ProjectedOptimizer([("w", parameter)], **given)


def run(parameter: nn.Parameter, optimizer: ProjectedOptimizer, steps: range) -> Tensor:
    for step in steps:
        parameter.grad = drawn(*parameter.shape, seed=step + 1)
        optimizer.step()
    return parameter.detach().clone()


def bytes_of_moments(state: dict[str, Tensor]) -> int:
    return sum(value.nbytes for key, value in state.items() if key.startswith("exp_avg"))


def test_steps_codes_and_scales_are_torchaos() -> None:
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    parameter, optimizer = one(rank=None, inner=Adam8bit(eps=1e-12))
    other = parameter.detach().clone()
    mean, square = (OptimState8bit.zeros(other.shape, signed) for signed in (True, False))
    for step in range(3):
        gradient = drawn(32, 256, seed=step + 1)
        clock, rate = torch.tensor(step + 1.0), torch.tensor(0.01)
        single_param_adam(
            other, gradient, clock, mean, square, None, rate, 0.9, 0.999, 0.0, 1e-12, True, False
        )
        run(parameter, optimizer, range(step, step + 1))
        torch.testing.assert_close(parameter.detach(), other, rtol=1e-4, atol=1e-6)
    state = optimizer.state[parameter]
    for theirs, name in ((mean, "exp_avg"), (square, "exp_avg_sq")):
        assert (state[f"{name}.codes"] != theirs.codes).float().mean() < 1e-3  # roundings in the last bit
        torch.testing.assert_close(state[f"{name}.scale"], theirs.scale)


def test_bytes_are_those_of_the_formula() -> None:
    parameter, optimizer = one()
    run(parameter, optimizer, range(1))
    entries = 16 * 256
    assert bytes_of_moments(optimizer.state[parameter]) == 2 * (entries + 4 * entries // 256)
    assert Adam8bit().bytes_of(entries) == 2 * (entries + 4 * entries // 256)
    plain, other = one(inner="adamw")
    run(plain, other, range(1))
    assert bytes_of_moments(other.state[plain]) == 8 * entries


@pytest.mark.parametrize("shape", [(15, 256), (65, 64)])
def test_few_entries_and_odd_numbers_of_them_stay_float(shape: tuple[int, int]) -> None:
    parameter, optimizer = one(shape, rank=None)
    run(parameter, optimizer, range(2))
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.float32
    assert bytes_of_moments(state) == Adam8bit().bytes_of(parameter.numel()) == 8 * parameter.numel()
    plain, other = one(shape, rank=None, inner="adamw")
    assert torch.equal(run(plain, other, range(2)), parameter.detach())


def test_projected_steps_are_nearly_those_of_full_precision() -> None:
    found, wanted = (run(*one(inner=name), range(20)) for name in ("adamw8bit", "adamw"))
    start = drawn(32, 256)
    assert (found - wanted).norm() < 0.03 * (wanted - start).norm()
    assert not torch.equal(found, wanted)


def test_the_state_is_plain_tensors_that_load_safely_and_a_run_goes_on_bit_for_bit() -> None:
    options = {"refresh": 3, "transport": "rotate"}
    whole = run(*one(**options), range(8))
    parameter, optimizer = one(**options)
    run(parameter, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = one(**options)
    again.data.copy_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(type(value) is Tensor for value in other.state[again].values())
    assert other.state[again]["exp_avg.codes"].dtype == torch.uint8
    assert torch.equal(run(again, other, range(5, 8)), whole)


def test_moments_are_forgotten_or_turned_with_the_basis() -> None:
    kept: dict[str, Tensor] = {}
    eight, like = Adam8bit(), drawn(16, 256)
    eight.direction(like, kept, 1)
    before = eight._read(kept, "exp_avg", like)
    torch.testing.assert_close(before, 0.1 * like, atol=2e-3, rtol=0.1)
    turn = torch.linalg.qr(drawn(16, 16, seed=9)).Q
    eight.turn(kept, turn)
    turned = eight._read(kept, "exp_avg", like)
    assert (turned - turn @ before).norm() < 0.02 * before.norm()
    eight.forget(kept)
    assert not eight._read(kept, "exp_avg", like).any()
    assert not eight._read(kept, "exp_avg_sq", like).any()


def test_codes_are_no_moments_and_a_reset_begins_anew() -> None:
    parameter, optimizer = one(rank=None)
    run(parameter, optimizer, range(3))
    assert moments(optimizer, parameter) == {}
    reset(optimizer, parameter)
    again, fresh = one(rank=None)
    again.data.copy_(parameter)
    assert torch.equal(run(parameter, optimizer, range(3, 5)), run(again, fresh, range(3, 5)))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    inner._eight_bit_state.cache_clear()
    with pytest.raises(MissingDependency, match=r"need torchao.*rankfold\[quant\]"):
        one()
    one(inner="adamw")
    inner._eight_bit_state.cache_clear()
