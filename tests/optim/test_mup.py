"""Under muP a step changes every layer as much at every width; at the base's width nothing differs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from layers.models import llama, seeded
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.optim.widths import widths

BASE = 16


class Network(nn.Module):
    """An embedding, two hidden layers and a head that may share the embedding's table."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.lm_head = nn.Linear(width, 12)
        if tied:
            self.lm_head.weight = self.embed.weight

    def layers(self, ids: Tensor) -> list[Tensor]:
        embedded = self.embed(ids)
        first = torch.relu(self.first(embedded))
        second = torch.relu(self.second(first))
        return [embedded, first, second, self.lm_head(second)]


def network(width: int, seed: int = 0, tied: bool = False) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(width, tied)


def changes(model: Network, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """Return how much the output of every layer has changed after some steps, entry by entry."""
    ids = torch.arange(12)
    before = [value.detach() for value in model.layers(ids)]
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model.layers(ids)[-1], (ids * 5 + 1) % 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pairs = zip(model.layers(ids), before, strict=True)
    return [(after - old).abs().mean().item() for after, old in pairs]


def slopes(found: Sequence[Sequence[float]], grown: float) -> list[float]:
    """Return the exponents with which changes grow with width, layer by layer."""
    return [math.log(last / first) / math.log(grown) for first, last in zip(found[0], found[-1], strict=True)]


def scaled(width: int, seed: int, tied: bool = False) -> tuple[Any, Network]:
    base = network(BASE, seed, tied)
    return rf.optim.mup_model(network(width, seed, tied), base), base


@pytest.mark.parametrize(
    ("rule", "kind", "lr"), [("adam", torch.optim.AdamW, 0.02), ("sgd", torch.optim.SGD, 0.5)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_changes_of_every_layer_do_not_grow_with_width(rule: str, kind: Any, lr: float, tied: bool) -> None:
    found = []
    for width in (128, 512):
        runs = []
        for seed in range(2):
            model, base = scaled(width, seed, tied)
            runs.append(changes(model, kind(rf.optim.mup(model, lr, base=base, rule=rule))))
        found.append([sum(each) / len(runs) for each in zip(*runs, strict=True)])
    *layers, logits = slopes(found, 4)
    assert max(map(abs, layers)) < 0.1
    assert abs(logits) < 0.2  # the last to converge


def test_under_the_standard_parametrisation_they_grow() -> None:
    found = []
    for width in (128, 512):
        model = network(width)
        found.append(changes(model, torch.optim.AdamW(model.parameters(), 0.02)))
    assert min(slopes(found, 4)[1:]) > 0.5


def test_at_the_bases_width_model_and_steps_are_the_bases_bit_for_bit() -> None:
    plain, (model, base) = network(BASE, 1), scaled(BASE, 1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    groups = rf.optim.mup(model, 0.02, base=rf.optim.shapes(base), weight_decay=0.1)
    changes(model, torch.optim.AdamW(groups))
    changes(plain, torch.optim.AdamW(plain.parameters(), 0.02, weight_decay=0.1))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def rates(model: nn.Module, base: nn.Module, **options: Any) -> dict[str, tuple[str, float, float]]:
    groups = rf.optim.mup(model, 1.0, base=base, weight_decay=1.0, **options)
    return {
        name: (group["name"], group["lr"], group["weight_decay"])
        for group in groups
        for name, _ in group["params"]
    }


def test_rates_and_decays_are_those_of_the_papers_table() -> None:
    model, base = scaled(4 * BASE, 0)
    model.second, base.second = nn.Linear(8 * BASE, 8 * BASE), nn.Linear(2 * BASE, BASE)
    adam, sgd = rates(model, base), rates(model, base, rule="sgd")
    assert adam == {
        "embed.weight": ("input", 1, 1),
        "first.weight": ("hidden", 0.25, 4),
        "first.bias": ("input", 1, 1),
        "second.weight": ("hidden", 0.25, 4),
        "second.bias": ("input", 1, 1),
        "lm_head.weight": ("output", 1, 1),
        "lm_head.bias": ("input", 1, 1),
    }
    assert sgd["embed.weight"] == ("input", 4, 0.25)
    assert sgd["first.weight"] == ("hidden", 1, 1)
    assert sgd["second.weight"] == ("hidden", 2, 0.5)  # writes 8 times, and reads 4 times as much
    assert sgd["lm_head.weight"] == ("output", 4, 0.25)
    assert sgd["lm_head.bias"] == ("input", 1, 1)


def test_factors_of_fixed_rank_are_readers_and_inputs_and_hidden_where_the_rank_grows() -> None:
    def product(width: int, rank: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False))

    adam = rates(product(64, 4), product(16, 4))
    assert adam == {"0.weight": ("reader", 0.25, 4), "1.weight": ("input", 1, 1)}
    grown = rates(product(64, 8), product(16, 4))
    assert grown == {"0.weight": ("hidden", 0.25, 4), "1.weight": ("hidden", 0.5, 2)}


def test_convolutions_read_channels_and_windows() -> None:
    wide, base = nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Sequential(nn.Conv2d(4, 4, 3))
    found = {each.name: (each.kind, each.fan_in, each.fan_out) for each in widths(wide, base)}
    assert found["0.weight"] == ("hidden", 2, 2)


def test_the_start_keeps_inputs_and_heads_as_large_as_the_bases_and_shrinks_what_reads_a_wide_side() -> None:
    model, base = network(8 * BASE), network(BASE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    rf.optim.mup_model(model, base)

    def size(value: Tensor) -> float:
        return float(value.detach().square().mean().sqrt())

    for (name, parameter), small in zip(model.named_parameters(), base.parameters(), strict=True):
        shrunk = 8**-0.5 if name in ("first.weight", "second.weight") else 1
        assert size(parameter) == pytest.approx(shrunk * size(small), rel=1e-5), name
    before = model.layers(torch.arange(12))
    weight, bias = model.lm_head.weight, model.lm_head.bias
    torch.testing.assert_close(before[-1], before[-2] @ weight.T / 8 + bias)


def test_a_head_may_start_at_zero() -> None:
    model = rf.optim.mup_model(network(2 * BASE), network(BASE), zero_output=True)
    assert not model.get_parameter("lm_head.weight").any()
    tied = rf.optim.mup_model(network(2 * BASE, tied=True), network(BASE, tied=True), zero_output=True)
    assert tied.get_parameter("embed.weight").any()


def test_logits_of_attention_fall_with_the_size_of_a_head() -> None:
    base: Any = seeded(llama)
    model = copy.deepcopy(base)
    wide: Any = seeded(lambda: llama(head_dim=32))
    rf.optim.mup_model(model, base)
    rf.optim.mup_model(wide, base)
    small, large = (m.model.layers[0].self_attn for m in (base, wide))
    assert model.model.layers[0].self_attn.scaling == small.scaling == small.head_dim**-0.5
    assert large.scaling == pytest.approx(small.head_dim**0.5 / 32)


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    with pytest.raises(Incompatible, match=r"first\.weight, of shape"):
        rf.optim.mup(network(32), base={"embed.weight": (12, 16)})
    with pytest.raises(Incompatible, match=r"embed\.weight is the table of an embedding"):
        rf.optim.mup(network(32, tied=True), base=network(16, tied=True))
    with pytest.raises(InvalidOption, match="rule must be 'adam' or 'sgd', not 'lion'"):
        rf.optim.mup(network(32), base=network(16), rule="lion")
    with pytest.raises(InvalidOption, match="no parameter is trained"):
        rf.optim.mup(network(32).requires_grad_(False), base=network(16))


def test_schedules_multiply_all_groups_alike() -> None:
    model, base = scaled(4 * BASE, 0)
    optimizer = torch.optim.AdamW(rf.optim.mup(model, 1.0, base=base))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    first = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in first]
    assert len(set(first)) > 1
