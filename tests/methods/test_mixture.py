"""Mixtures of LoRAs: every token mixes experts as the layer's router says."""

import warnings
from typing import Any

import pytest
import torch
from layers.models import llama
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, NotDense
from rankfold.layers import NeverRead, require
from rankfold.weights import Experts, Router

WIDTH = 6


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 5)).to(dtype)
    rf.adapt(model, "mixture", rank=2, targets="0", **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    return model


def experts_of(model: nn.Module) -> Experts:
    return next(m for m in model.modules() if isinstance(m, Experts))


def router_of(model: nn.Module) -> Router:
    return next(m for m in model.modules() if isinstance(m, Router))


def tokens(rows: int = 2, count: int = 7) -> Tensor:
    return torch.randn(rows, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shared", [False, True])
def test_equal_experts_make_the_router_irrelevant(shared: bool) -> None:
    model, x = adapted(experts=3, shared_down=shared), tokens()
    experts = experts_of(model)
    experts.up.tensor().data = experts.up.tensor().data[:, :2].repeat(1, 3)
    if not shared:
        experts.down.tensor().data = experts.down.tensor().data[:2].repeat(3, 1)
    wanted = model(x)
    router_of(model).matrix.tensor().data.normal_()
    torch.testing.assert_close(model(x), wanted)


def test_a_token_sees_a_change_of_at_most_k_times_r_ranks() -> None:
    model, x = adapted(experts=5, top_k=2), tokens(1, 1)
    model(x)
    experts = experts_of(model)
    with router_of(model).gates.held():
        gates, found = router_of(model).gates_for(x), experts(x)
    assert int((gates > 0).sum()) == 2
    torch.testing.assert_close(gates.sum(-1), torch.ones(1, 1, dtype=torch.float64))
    used = gates[0, 0].nonzero().flatten().tolist()
    ups, downs = experts.up.tensor().chunk(5, 1), experts.down.tensor().chunk(5)
    matrix = sum(gates[0, 0, e] * ups[e] @ downs[e] for e in used)
    torch.testing.assert_close(found[0, 0], matrix @ x[0, 0])
    assert torch.linalg.matrix_rank(matrix) <= 4


def test_the_balance_loss_is_one_at_uniform_routing_and_larger_when_one_expert_wins() -> None:
    model, x = adapted(experts=4, balance=1.0).train(), tokens(4, 64)
    router_of(model).matrix.tensor().data.zero_()
    model(x)
    torch.testing.assert_close(rf.auxiliary_loss(model), torch.ones((), dtype=torch.float64))
    router_of(model).matrix.tensor().data[0] = 100 * torch.ones(WIDTH)
    model(x.abs())
    torch.testing.assert_close(rf.auxiliary_loss(model), 4 * torch.ones((), dtype=torch.float64))


def test_the_balance_loss_pulls_the_router_and_padding_does_not_count() -> None:
    model = llama().train()
    rf.adapt(model, "mixture", rank=2, experts=3, targets="*.q_proj", balance=1.0)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids)
    alone = rf.auxiliary_loss(model)
    model(padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(rf.auxiliary_loss(model), alone)
    alone.backward()
    moved = {
        name.rpartition("adapters.default.")[2] for name, p in model.named_parameters() if p.grad is not None
    }
    assert any("matrix" in name for name in moved)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_balance_loss_survives_checkpointing_or_is_refused(reentrant: bool) -> None:
    model = llama().train()
    rf.adapt(model, "mixture", rank=2, experts=3, targets="*.q_proj", balance=1.0)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))

    def gradient() -> Tensor:
        model.zero_grad()
        (model(ids, labels=ids, use_cache=False).loss + rf.auxiliary_loss(model)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wanted = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        with pytest.raises(Incompatible, match="use_reentrant=False"):
            gradient()
    else:
        torch.testing.assert_close(gradient(), wanted)
        assert len(require(model).carrier.gates.collected) == 2


def test_a_balance_loss_that_nothing_reads_is_named() -> None:
    model, x = adapted(experts=2).train(), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(x)
            rf.auxiliary_loss(model)
    model(x)
    with pytest.warns(NeverRead, match="auxiliary_loss"):
        model(x), model(x)


def test_nothing_is_left_outside_training() -> None:
    model = adapted(experts=2).eval()
    model(tokens())
    assert rf.auxiliary_loss(model) == 0


def test_it_cannot_be_folded_or_exported(tmp_path: Any) -> None:
    model = adapted(experts=2)
    with pytest.raises(NotDense, match="token to token"):
        rf.fold(model)
    with pytest.raises(NotDense, match="mixture differs from token to token"):
        rf.export(model, tmp_path / "out", format="peft")


def test_generating_with_a_cache_gives_what_full_forwards_give() -> None:
    model = rf.adapt(llama(), "mixture", rank=2, experts=3, top_k=1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "matrix" not in name:
            parameter.data.normal_(std=0.3)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts must be at least 1"),
        ({"experts": 2, "top_k": 3}, "top_k from 1 to experts, not 2 and 3"),
        ({"balance": -1.0}, "balance must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        adapted(**options)
