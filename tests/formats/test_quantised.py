"""Adapters of quantised bases: saved, loaded, exported, and moved between a base and its quantised copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from battery import disturbed, trainable
from formats.small import Untouched
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BaseMismatch

METHODS = ("lora", "lora/pissa", "dora", "vera", "hira", "uni-lora")


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)).eval()


def int8(seed: int = 0) -> nn.Sequential:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain(seed)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def nf4(seed: int = 0) -> nn.Sequential:
    import bitsandbytes as bnb

    model = plain(seed)
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            made = bnb.nn.Linear4bit(
                64, 64, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
            )
            made.load_state_dict(layer.state_dict())
            setattr(model, name, made.to("cpu"))
    return model.eval()


BASES = {"int8": int8, "nf4": nf4}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Callable[..., nn.Sequential]:
    return BASES[request.param]


def inputs() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_a_quantised_base_is_saved_and_loaded(
    method: str, base: Callable[..., nn.Sequential], tmp_path: Path
) -> None:
    model = disturbed(rf.adapt(base(), method, rank=4), size=0.1)
    folder = rf.save(model, tmp_path / "adapter")
    loaded = rf.load(base(), folder)
    assert torch.equal(loaded(inputs()), model(inputs()))
    assert not torch.equal(loaded(inputs()), base()(inputs()))
    wanted, found = trainable(model), trainable(loaded)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (folder / "rankfold.safetensors").stat().st_size < 100_000


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_moves_between_a_base_and_its_quantised_copy(
    method: str, base: Callable[..., nn.Sequential], tmp_path: Path
) -> None:
    model = disturbed(rf.adapt(base(), method, rank=4), size=0.1)
    loaded = rf.load(plain(), rf.save(model, tmp_path / "adapter"))
    torch.testing.assert_close(loaded(inputs()), model(inputs()), rtol=0.2, atol=0.2)
    rf.load(base(), rf.save(loaded, tmp_path / "back"))


def test_another_quantised_base_is_refused(base: Callable[..., nn.Sequential], tmp_path: Path) -> None:
    folder = rf.save(rf.adapt(base(), "lora", rank=4), tmp_path / "adapter")
    other = base(1)
    modules = list(other.modules())
    with pytest.raises(BaseMismatch, match="made for another base"):
        rf.load(other, folder)
    assert list(other.modules()) == modules


def test_an_adapter_of_a_quantised_base_is_exported(
    base: Callable[..., nn.Sequential], tmp_path: Path
) -> None:
    model = disturbed(rf.adapt(base(), "lora/pissa", rank=4), size=0.1)
    for format in ("peft", "portable"):
        assert rf.export(model, tmp_path / format, format).exact
        loaded = rf.load(base(), tmp_path / format)
        torch.testing.assert_close(loaded(inputs()), model(inputs()), rtol=1e-4, atol=1e-4)


def test_loading_into_a_plain_copy_leaves_nothing_behind_when_refused(tmp_path: Path) -> None:
    folder = rf.save(rf.adapt(int8(), "lora", rank=4), tmp_path / "adapter")
    untouched = Untouched(plain(1))
    with pytest.raises(BaseMismatch):
        rf.load(untouched.model, folder)
    untouched.check()
