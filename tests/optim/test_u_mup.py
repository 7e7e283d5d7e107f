"""Under u-muP everything starts at a root mean square of 1, at any width and depth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from layers.models import llama, seeded
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, UnsupportedLayer


def size(value: Tensor) -> float:
    return value.detach().square().mean().sqrt().item()


def chain(width: int, depth: int) -> nn.ModuleDict:
    hidden = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
    embed, head = nn.Embedding(64, width), nn.Linear(width, 48, bias=False)
    return nn.ModuleDict({"embed": embed, "hidden": hidden, "norm": nn.RMSNorm(width), "lm_head": head})


def passed(model: Any, ids: Tensor) -> list[Tensor]:
    values = [model["embed"](ids)]
    for layer in model["hidden"]:
        values.append(layer(values[-1]))
    values.append(model["norm"](values[-1]))
    values.append(model["lm_head"](values[-1]))
    for value in values:
        value.retain_grad()
    return values


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("depth", [2, 8])
def test_activations_weights_and_gradients_start_at_1(width: int, depth: int) -> None:
    model = rf.optim.u_mup_model(chain(width, depth))
    ids = torch.arange(256) % 64
    values = passed(model, ids)
    for value in values[:-1]:
        assert size(value) == pytest.approx(1, abs=0.2)
    assert size(values[-1]) == pytest.approx(width**-0.5, rel=0.3)
    generator = torch.Generator().manual_seed(1)
    values[-1].backward(torch.randn(values[-1].shape, generator=generator))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert size(parameter) == pytest.approx(1, abs=0.05)
            assert parameter.grad is not None
            tables = ("embed", "hidden")
            at_input = math.sqrt(48 / width) if name.startswith(tables) else 1.0  # the head's is 1 / sqrt(in)
            assert size(parameter.grad) / at_input == pytest.approx(1, rel=0.35), name


def test_a_hidden_layer_has_the_true_gradient_of_its_input_and_the_head_has_not() -> None:
    model: Any = rf.optim.u_mup_model(nn.ModuleDict({"mid": nn.Linear(16, 8), "lm_head": nn.Linear(16, 8)}))
    for name, scale, back in (("mid", 1 / 4, 1 / 4), ("lm_head", 1 / 16, 1 / 4)):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight = model[name].weight
        given = torch.ones(5, 8)
        output = model[name](x)
        torch.testing.assert_close(output, scale * x @ weight.T)
        output.backward(given)
        torch.testing.assert_close(x.grad, back * given @ weight)
        torch.testing.assert_close(weight.grad, given.T @ x.detach() / math.sqrt(5))


def rates(model: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    groups = rf.optim.u_mup(model, **options)
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name, _ in g["params"]}


def test_rates_follow_what_a_weight_reads_the_kind_of_it_and_the_depth() -> None:
    model = seeded(llama)  # two blocks, width 16, 24 inside
    found = rates(model, lr=2.0)
    blocks = 2**-0.5
    assert found["model.embed_tokens.weight"][0] == 2 / 4
    assert found["lm_head.weight"][0] == 2
    assert found["model.norm.weight"][0] == 2
    assert found["model.layers.0.self_attn.q_proj.weight"][0] == pytest.approx(2 / 4 * blocks)
    assert found["model.layers.1.mlp.down_proj.weight"][0] == pytest.approx(2 / 24**0.5 * blocks)
    assert found["model.layers.1.input_layernorm.weight"][0] == pytest.approx(2 * blocks)


def test_decay_does_not_depend_on_the_rate() -> None:
    for lr in (0.5, 2.0):
        found = rates(seeded(llama), lr=lr, weight_decay=0.01)
        assert all(rate * decay == pytest.approx(0.01) for rate, decay in found.values())
    with pytest.raises(InvalidOption, match="lr must be above 0"):
        rf.optim.u_mup(seeded(llama), lr=0.0)


def test_the_scale_of_the_loss_does_not_change_adams_steps() -> None:
    def trained(scale: float) -> list[Tensor]:
        model = rf.optim.u_mup_model(chain(16, 2))
        optimizer = torch.optim.Adam(rf.optim.u_mup(model, 0.25), eps=0)
        for step in range(4):
            ids = torch.arange(64) + step
            loss = nn.functional.cross_entropy(passed(model, ids % 64)[-1], ids % 48)
            optimizer.zero_grad()
            (scale * loss).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for one, other in zip(trained(1.0), trained(2.0**10), strict=True):
        torch.testing.assert_close(one, other)


def test_the_same_rate_learns_at_widths_that_differ_much() -> None:
    losses = {}
    for width in (32, 256):
        model = rf.optim.u_mup_model(chain(width, 2))
        optimizer = torch.optim.Adam(rf.optim.u_mup(model, 0.5))
        ids = torch.arange(64)
        for _ in range(30):
            loss = nn.functional.cross_entropy(passed(model, ids)[-1], (7 * ids + 3) % 48)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[width] = loss.item()
    assert max(losses.values()) < 1.0, losses


def test_weights_are_seeded_by_name() -> None:
    first, second, other = (rf.optim.u_mup_model(chain(8, 2), seed) for seed in (0, 0, 1))
    for (name, one), same, different in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, same)
        assert name == "norm.weight" or not torch.equal(one, different)
    assert not torch.equal(first.get_parameter("hidden.0.weight"), first.get_parameter("hidden.1.weight"))


def test_a_tied_table_is_drawn_once_and_its_head_reads_as_a_head() -> None:
    model: Any = chain(16, 1)
    model["lm_head"] = nn.Linear(16, 64, bias=False)
    model["lm_head"].weight = model["embed"].weight
    rf.optim.u_mup_model(model)
    x = torch.eye(16)
    torch.testing.assert_close(model["lm_head"](x), model["embed"].weight.T / 16)
    assert rates(model, lr=1.0)["embed.weight"][0] == 1 / 4


def test_layers_without_a_scale_are_refused_before_anything_is_drawn() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    before = model[0].weight.detach().clone()
    with pytest.raises(UnsupportedLayer, match=r"1\.weight is of a Conv1d"):
        rf.optim.u_mup_model(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("residual", "attention"), [(1.0, 1.0), (2.0, 0.5)])
def test_branches_and_skips_keep_the_sum_at_1_and_share_it_as_asked(
    residual: float, attention: float
) -> None:
    found = rf.optim.residual_weights(6, residual, attention)
    assert all(branch**2 + skip**2 == pytest.approx(1) for branch, skip in found)
    parts = [1.0]
    for branch, skip in found:
        parts = [part * skip**2 for part in parts] + [branch**2]
    embedding, of_attention, of_feedforward = parts[0], sum(parts[1::2]), sum(parts[2::2])
    assert (of_attention + of_feedforward) / 2 == pytest.approx(residual**2 * embedding)
    assert of_attention == pytest.approx(attention**2 * of_feedforward)
