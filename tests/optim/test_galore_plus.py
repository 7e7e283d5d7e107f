"""GaLore+ takes one head's basis for all heads, and moves a few entries of what the basis leaves out."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, InvalidRank
from rankfold.optim import Adam, Momentum, Projector, Sparse

SGD = Momentum(0.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(shape: tuple[int, ...] = (12, 10), name: str = "q_proj", **options: Any) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(drawn(*shape))
    given = {"lr": 0.1, "rank": 2, "density": 0.0, **options}
    return parameter, rf.optim.galore_plus([(name, parameter)], **given)


def moved(parameter: nn.Parameter, optimizer: Any, gradient: Tensor) -> Tensor:
    """Return what a step with this gradient has added."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() - before


def basis(parameter: nn.Parameter, optimizer: Any) -> Tensor:
    return optimizer.state[parameter]["basis.basis"]  # type: ignore[no-any-return]


# Heads ------------------------------------------------------------------------------------------------


def test_heads_that_share_a_row_space_have_the_basis_of_the_whole() -> None:
    gradient = torch.cat([drawn(4, 2, seed=head) for head in range(3)]) @ drawn(2, 10, seed=9)
    parameter, optimizer = one(heads={"q_proj": 3})
    moved(parameter, optimizer, gradient)
    found, whole = basis(parameter, optimizer), torch.linalg.svd(gradient).Vh[:2].T
    torch.testing.assert_close(found @ found.T, whole @ whole.T)


def test_a_basis_is_that_of_one_head_on_the_side_of_the_inputs_and_heads_change() -> None:
    parameter, optimizer = one(heads={"q_proj": 3}, refresh=1, projector=Projector())
    drawn_heads = set()
    for step in range(12):
        gradient = drawn(12, 10, seed=step)
        moved(parameter, optimizer, gradient)
        found = basis(parameter, optimizer)
        assert found.shape == (10, 2)
        spaces = [torch.linalg.svd(part, full_matrices=False).Vh[:2].T for part in gradient.chunk(3)]
        near = [torch.allclose(found @ found.T, space @ space.T) for space in spaces]
        assert sum(near) == 1
        drawn_heads.add(near.index(True))
    assert drawn_heads == {0, 1, 2}
    assert optimizer.state[parameter]["exp_avg"].shape == (2, 12)


def test_iteration_finds_a_low_rank_exactly_and_nearly_the_leading_directions() -> None:
    left, _, right = torch.linalg.svd(drawn(40, 60), full_matrices=False)
    gradient = (left * torch.arange(1, 41).double() ** -1) @ right
    parameter, optimizer = one((40, 60), name="mlp", rank=6, inner=SGD)
    moved(parameter, optimizer, gradient)
    energy = (basis(parameter, optimizer).T @ gradient).square().sum()
    exact = (torch.arange(1, 7).double() ** -2).sum()
    assert energy > 0.99 * exact


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
        names = ("q_proj", "k_proj", "v_proj", "mlp")
        self.layers = nn.ModuleDict({name: nn.Linear(16, 8 if name == "k_proj" else 16) for name in names})


def heads_of(optimizer: Any) -> dict[str, tuple[int, int]]:
    return {
        name: (group.get("heads", 1), group["rank"])
        for group in optimizer.param_groups
        for name in group["param_names"]
        if name.endswith("weight")
    }


def test_a_models_config_tells_the_heads_of_its_queries_and_keys() -> None:
    found = heads_of(rf.optim.galore_plus(Model(), rank=3))
    assert found == {
        "layers.q_proj.weight": (4, 3),
        "layers.k_proj.weight": (2, 3),
        "layers.v_proj.weight": (1, 3),
        "layers.mlp.weight": (1, 3),
    }
    named = heads_of(rf.optim.galore_plus(Model(), rank=3, heads={"v_proj": 2}))
    assert {name for name, (heads, _) in named.items() if heads > 1} == {"layers.v_proj.weight"}


def test_a_head_that_is_smaller_than_the_rank_lowers_it() -> None:
    assert heads_of(rf.optim.galore_plus(Model(), rank=6))["layers.q_proj.weight"] == (4, 4)
    group = {"params": [nn.Parameter(drawn(12, 10))], "rank": 5, "heads": 3, "side": "right"}
    with pytest.raises(InvalidRank, match="rank 5 is more than the 4 rows of a head"):
        rf.optim.galore_plus([group])
    with pytest.raises(InvalidOption, match="12 rows are not 5 heads of one size"):
        one(heads={"q_proj": 5})


# The sparse rest --------------------------------------------------------------------------------------


def test_without_a_rest_it_is_galore() -> None:
    parameter, optimizer = one((6, 10), name="mlp", projector="svd", refresh=2)
    other = nn.Parameter(parameter.detach().clone())
    galore = rf.optim.galore([("mlp", other)], 0.1, rank=2, refresh=2)
    for step in range(4):
        moved(parameter, optimizer, drawn(6, 10, seed=step))
        moved(other, galore, drawn(6, 10, seed=step))
    torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_correction_touches_the_largest_entries_of_the_rest_alone(shape: tuple[int, int]) -> None:
    gradient, moves = drawn(*shape, seed=1), []
    for density in (0.1, 0.0):
        parameter, optimizer = one(shape, name="mlp", density=density)
        moves.append(moved(parameter, optimizer, gradient))
        if density:
            found, support = basis(parameter, optimizer), optimizer.state[parameter]["support"]
    rest = gradient if shape[0] == 6 else gradient.T
    rest = rest - found @ (found.T @ rest)
    touched = (moves[0] - moves[1]).abs() > 1e-9
    touched = touched if shape[0] == 6 else touched.T
    assert support.dtype == torch.int32
    assert touched.flatten().nonzero()[:, 0].tolist() == support.tolist()
    assert set(support.tolist()) == set(rest.abs().flatten().topk(6).indices.tolist())
    assert bool(touched.sum() == 6)


def test_with_all_entries_the_change_is_that_of_adam_on_the_rest_and_has_full_rank() -> None:
    gradient, moves = drawn(6, 10, seed=1), []
    for density in (1.0, 0.0):
        parameter, optimizer = one((6, 10), name="mlp", density=density)
        moves.append(moved(parameter, optimizer, gradient))
    found = basis(parameter, optimizer)
    rest = gradient - found @ (found.T @ gradient)
    torch.testing.assert_close(moves[0] - moves[1], -0.1 * rest.sign(), atol=1e-3, rtol=0)
    ranks = [int(torch.linalg.matrix_rank(move, rtol=1e-8)) for move in moves]
    assert ranks == [6, 2]


def test_the_support_is_fixed_between_refreshes_and_its_moments_start_again_with_the_next() -> None:
    residual, seen = Sparse(0.1, Adam(eps=1e-14)), []
    parameter, optimizer = one((6, 10), name="mlp", residual=residual, refresh=3)
    for step in range(4):
        gradient = drawn(6, 10, seed=step)
        moved(parameter, optimizer, gradient)
        state = optimizer.state[parameter]
        seen.append((state["support"].clone(), int(state["rest.step"])))
    assert torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[2][0], seen[3][0])
    assert [step for _, step in seen] == [1, 2, 3, 1]
    rest = gradient - basis(parameter, optimizer) @ (basis(parameter, optimizer).T @ gradient)
    torch.testing.assert_close(state["rest.exp_avg"], 0.1 * rest.flatten()[state["support"].long()])
    assert state["rest.exp_avg"].shape == (6,)


def test_what_the_warm_up_adds_up_chooses_and_nothing_else_moves_before() -> None:
    gradients = [drawn(6, 10, seed=step) for step in range(4)]
    parameter, optimizer = one((6, 10), name="mlp", density=0.1, warmup=3)
    plain, other = one((6, 10), name="mlp")
    total = torch.zeros(6, 10).double()
    for step, gradient in enumerate(gradients[:3]):
        changes = moved(parameter, optimizer, gradient), moved(plain, other, gradient)
        found = basis(parameter, optimizer)
        total += (gradient - found @ (found.T @ gradient)).abs()
        assert torch.equal(*changes) == (step < 2)
    state = optimizer.state[parameter]
    assert set(state["support"].tolist()) == set(total.flatten().topk(6).indices.tolist())
    assert "rest.total" not in state, "what is as large as the weight is kept"


def test_densities_and_warm_ups_that_are_impossible_are_refused() -> None:
    for options in ({"density": 1.5}, {"warmup": 0}):
        with pytest.raises(InvalidOption, match=r"density must be in \[0, 1\] and warmup at least 1"):
            one(**options)


@pytest.mark.parametrize("stop", [2, 5])  # in a warm-up, and after it
def test_a_resumed_run_goes_on_bit_for_bit(stop: int) -> None:
    def made() -> tuple[nn.Parameter, Any]:
        return one(heads={"q_proj": 3}, density=0.1, warmup=3, refresh=5)

    whole, first = made()
    for step in range(12):
        moved(whole, first, drawn(12, 10, seed=step))
    parameter, optimizer = made()
    for step in range(stop):
        moved(parameter, optimizer, drawn(12, 10, seed=step))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = made()
    again.data.copy_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(stop, 12):
        moved(again, other, drawn(12, 10, seed=step))
    assert torch.equal(again, whole)


def test_a_state_of_other_heads_is_refused() -> None:
    _, saved = one(heads={"q_proj": 3})
    with pytest.raises(InvalidOption, match="saved with heads 3, and this optimizer has 2"):
        one(heads={"q_proj": 2})[1].load_state_dict(saved.state_dict())
