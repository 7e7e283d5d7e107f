"""TeRA: a frozen tensor network with a trained vector on every mode."""

from typing import Any

import pytest
import torch
from methods._layers import adapted, change, count, disturbed, leaves_of, linear, normal, rank_of
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption


def tera(out: int = 16, columns: int = 16, rank: int = 4, **options: Any) -> nn.Module:
    return adapted(rf.Recipe(("tera", options)), linear(out, columns), rank=rank)


def frozen(model: Any, name: str) -> Tensor:
    found: Tensor = getattr(model, f"rankfold_default_{name.replace('_', '_u')}", None)
    return getattr(model, f"rankfold_default_{name}") if found is None else found


def test_the_change_is_the_contraction_of_the_network() -> None:
    model = disturbed(tera(12, 16))
    own = {name: value.detach() for name, value in leaves_of(model).items()}
    factors = [
        frozen(model, f"{end}{i}_12x16") * own[f"{end}.d{i}"] for end in ("up", "down") for i in (0, 1)
    ]
    core = frozen(model, "core_12x16").view(*(f.shape[1] for f in factors))
    full = torch.einsum("abcd,oa,pb,ic,jd->opij", core, *factors).reshape(12, 16)
    torch.testing.assert_close(change(model), full / (16 * core.numel()) ** 0.5)


@pytest.mark.parametrize(("rank", "reached"), [(4, 16), (3, 9), (2, 4)])
def test_a_change_of_full_rank_from_one_number_per_mode_rank(rank: int, reached: int) -> None:
    model = disturbed(tera(rank=rank))
    assert count(model) == 4 * rank
    assert rank_of(change(model)) == reached


def test_only_the_zero_vector_gets_a_gradient_at_the_start() -> None:
    model, x = tera(), normal(5, 16)
    assert torch.equal(model(x), linear(16, 16)(x))
    model(x).square().sum().backward()
    assert {name for name, leaf in leaves_of(model).items() if leaf.grad.any()} == {"up.d0"}


def test_the_lengths_of_two_vectors_can_be_exchanged() -> None:
    model = disturbed(tera())
    before = change(model)
    leaves_of(model)["up.d1"].data *= 3
    leaves_of(model)["down.d0"].data /= 3
    torch.testing.assert_close(change(model), before)


def test_layers_of_one_shape_share_the_network_and_no_vector() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    rf.adapt(model, "tera", rank=2)
    assert len([name for name, _ in model.named_buffers() if "core" in name]) == 2
    assert count(model) == 3 * 4 * 2


@pytest.mark.parametrize("options", [{"modes": 0}, {"d_initial": 0.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match="tera"):
        tera(**options)
