"""A layer whose weight is read without a call is found in the first forward."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers.models import Memory, adapted, logits, made, seeded
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import UnsupportedLayer


class Reads(nn.Module):
    """Calls one layer and reads the weight of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight)


X = torch.ones(2, 6)


def test_a_layer_that_is_not_called_is_named_in_an_error() -> None:
    model = rf.adapt(seeded(Reads), "lora", rank=2)
    with pytest.raises(UnsupportedLayer, match=r"^read was adapted but not called in the first forward"):
        model(X)


@pytest.mark.parametrize("options", [{"uncalled": "allow"}, {"targets": "called"}])
def test_uncalled_layers_can_be_allowed_or_left_out(options: dict[str, Any]) -> None:
    model = rf.adapt(seeded(Reads), "lora", rank=2, **options)
    model(X)
    assert not model._forward_hooks
    assert options != {"targets": "called"} or not model.called._forward_pre_hooks


def test_nothing_is_watched_after_the_first_forward() -> None:
    model = made("llama")
    memory = Memory(model)
    adapted(model)
    assert model._forward_hooks
    logits(model, "llama")
    hooks = [
        *model._forward_hooks.values(),
        *(h for m in model.modules() for h in m._forward_pre_hooks.values()),
    ]
    assert hooks == []
    rf.remove(model)
    memory.check(model)


@pytest.mark.parametrize("leave", [rf.remove, rf.fold])
def test_nothing_is_watched_after_the_adapter_is_gone(leave: Any) -> None:
    model = seeded(Reads)
    before, memory = model(X), Memory(model)
    leave(rf.adapt(model, "lora", rank=2))
    assert torch.equal(model(X), before)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == [0, 0, 0]
    if leave is rf.remove:
        memory.check(model)


def test_the_first_forward_of_a_copy_is_its_own() -> None:
    model = rf.adapt(seeded(Reads), "lora", rank=2)
    for twin in (copy.deepcopy(model), _pickled(model)):
        with pytest.raises(UnsupportedLayer, match="read was adapted"):
            twin(X)
        assert model._forward_hooks
        assert not twin._forward_hooks


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def test_attention_is_not_expected_to_call_its_projections() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, x, x)[0]
            return result

    rf.adapt(seeded(Attends), "lora", rank=2)(X)
