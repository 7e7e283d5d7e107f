import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.distortion import Distortion
from rankfold.compression.papers.layer_adaptive_pruning import chosen_levels, kept_mask
from rankfold.errors import InvalidOption
from rankfold.statistics.finite import NotFinite


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))


INPUTS = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))


def _pruned(model: nn.Module, keep: float, **options: Any) -> nn.Module:
    options = {"levels": 10, "progress": False, **options}
    return rf.compress(copy.deepcopy(model), "layer-adaptive-pruning", keep=keep, data=[INPUTS], **options)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_levels_are_those_of_exhaustive_search(data: st.DataObject) -> None:
    levels = 5
    sizes = data.draw(st.lists(st.integers(10, 40), min_size=1, max_size=4))
    steps = st.lists(st.floats(0, 10), min_size=levels - 1, max_size=levels - 1)
    curves = [[0.0, *itertools.accumulate(data.draw(steps))] for _ in sizes]
    keep = data.draw(st.floats(0.35, 1.0))
    held = [[n - n * level // levels for level in range(levels)] for n in sizes]
    fits = [
        c
        for c in itertools.product(range(levels), repeat=len(sizes))
        if _total(held, c) <= int(keep * sum(sizes))
    ]
    if not fits:
        with pytest.raises(InvalidOption, match="take more levels"):
            chosen_levels(sizes, curves, [0] * len(sizes), levels, keep)
        return
    found = chosen_levels(sizes, curves, [0] * len(sizes), levels, keep)
    assert _total(held, found) <= keep * sum(sizes)
    best = min(sum(curve[level] for curve, level in zip(curves, c, strict=True)) for c in fits)
    assert sum(curve[level] for curve, level in zip(curves, found, strict=True)) == pytest.approx(
        best, abs=1e-9
    )


def _total(held: list[list[int]], chosen: Any) -> int:
    return sum(row[level] for row, level in zip(held, chosen, strict=True))


def test_the_smallest_numbers_of_every_weight_go_and_the_budget_holds() -> None:
    model = _model()
    done = _pruned(model, 0.4)
    kept = total = 0
    for before, after in zip((model[0], model[2], model[4]), (done[0], done[2], done[4]), strict=True):
        stays = after.weight != 0
        assert torch.equal(after.weight[stays], before.weight[stays])
        if not stays.all():
            assert before.weight[~stays].abs().max() <= before.weight[stays].abs().min()
        kept, total = kept + int(stays.sum()), total + stays.numel()
    assert kept <= 0.4 * total


def test_the_model_minds_it_less_than_one_level_for_all() -> None:
    model = _model()
    model[2].weight.data *= 0.05
    uniform = copy.deepcopy(model)
    for i in (0, 2, 4):
        uniform[i].weight.data *= kept_mask(uniform[i].weight.data, 6, 10)
    change = [Distortion(model, [INPUTS]) for _ in range(2)]
    change[0].model, change[1].model = _pruned(model, 0.4), uniform
    assert change[0]() < change[1]()


def test_later_rounds_give_nothing_back() -> None:
    model = _model()
    first, last = _pruned(model, 0.4**0.5), _pruned(model, 0.4, rounds=2)
    for i in (0, 2, 4):
        assert not ((last[i].weight != 0) & (first[i].weight == 0)).any()


def test_the_distortion_is_that_of_the_outputs_and_padding_does_not_count() -> None:
    model = _model()
    change, outputs = Distortion(model, [INPUTS]), model(INPUTS).detach()
    worst = Distortion(model, [INPUTS], worst=True)
    model[4].weight.data += 0.1
    squared = (model(INPUTS).detach() - outputs).square()
    assert change() == pytest.approx(float(squared.mean()), rel=1e-5)
    assert worst() == pytest.approx(float(squared.mean(1).max()), rel=1e-5)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table(input_ids)


def test_padded_tokens_do_not_distort() -> None:
    model, ids = _Tokens(), torch.tensor([[1, 2, 0], [3, 0, 0]])
    change = Distortion(model, [{"input_ids": ids, "attention_mask": (ids > 0).long()}])
    model.table.weight.data[0] += 1.0
    assert change() == 0.0
    model.table.weight.data[3] += 1.0
    assert change() == pytest.approx(0.5)


def test_what_it_cannot_do_is_said_and_the_model_stays() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidOption, match="take more levels"):
        rf.compress(model, "layer-adaptive-pruning", keep=0.05, data=[INPUTS], levels=10, progress=False)
    with pytest.raises(InvalidOption, match="runs the model on data"):
        rf.compress(model, "layer-adaptive-pruning", keep=0.5, progress=False)
    with pytest.raises(InvalidOption, match="leave share= away"):
        rf.compress(model, "layer-adaptive-pruning", keep=0.5, share="uniform", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_convolution_whose_channels_are_last_is_pruned() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how: dict[str, Any] = {"targets": "convolutions", "levels": 4, "progress": False}
    rf.compress(conv, "layer-adaptive-pruning", keep=0.5, data=[torch.randn(4, 4, 6, 6)], **how)
    assert int((conv[0].weight != 0).sum()) == 144


def test_a_weight_with_nan_is_named() -> None:
    model = _model()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"^2: the weight holds NaN"):
        _pruned(model, 0.5)


def test_where_everything_may_remain_rounding_takes_nothing() -> None:
    curves = [[0.0, 1.0, 2.0]] * 3
    assert chosen_levels([10_001, 5_003, 7_001], curves, [0, 0, 0], 4, 1.0) == [0, 0, 0]
