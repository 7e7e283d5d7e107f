import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import rankfold as rf
from rankfold.compression import unfold
from rankfold.compression.forms import save_dense, save_layers
from rankfold.errors import NotAdapted, UnsupportedLayer
from rankfold.layers import StructuredLayer, adaptation_of
from rankfold.methods.replace import replace


def _low_rank(model: nn.Module, *paths: str, rank: int = 3) -> nn.Module:
    """Put products of that rank, with random factors, into the places of weights."""
    torch.manual_seed(0)
    found = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        out, columns = weight.flatten(1).shape
        if isinstance(model.get_submodule(path), Conv1D):
            out, columns = columns, out
        found[path] = {"up": torch.randn(out, rank), "down": torch.randn(rank, columns)}
    replace(model, ("low-rank", {}), dict.fromkeys(paths, rank), found.__getitem__)
    return model


@pytest.mark.parametrize(
    ("layer", "x", "kinds"),
    [
        (nn.Linear(12, 8), torch.randn(5, 12), (nn.Linear, nn.Linear)),
        (nn.Linear(12, 8, bias=False), torch.randn(2, 5, 12), (nn.Linear, nn.Linear)),
        (Conv1D(8, 12), torch.randn(5, 12), (nn.Linear, nn.Linear)),
        (nn.Embedding(9, 8, padding_idx=1), torch.arange(9), (nn.Embedding, nn.Linear)),
        (nn.Conv1d(6, 8, 3, padding=1), torch.randn(2, 6, 7), (nn.Conv1d, nn.Conv1d)),
        (
            nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, groups=2, padding_mode="reflect"),
            torch.randn(2, 6, 7, 7),
            (nn.Conv2d, nn.Conv2d),
        ),
        (nn.Conv3d(4, 6, 2, dilation=2, bias=False), torch.randn(1, 4, 5, 5, 5), (nn.Conv3d, nn.Conv3d)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_product_becomes_two_plain_layers_that_compute_the_same(
    layer: nn.Module, x: torch.Tensor, kinds: tuple[type, ...]
) -> None:
    model = _low_rank(nn.Sequential(layer), "0").eval()
    before = model(x)
    assert unfold(model) is model
    assert isinstance(model[0], nn.Sequential)  # type: ignore[index]
    assert tuple(type(part) for part in model[0]) == kinds  # type: ignore[index]
    torch.testing.assert_close(model(x), before)
    assert not any(isinstance(module, StructuredLayer) for module in model.modules())
    assert adaptation_of(model) is None


def test_each_of_the_two_layers_trains_and_takes_an_adapter() -> None:
    model = unfold(rf.compress(nn.Sequential(nn.Linear(16, 16)), "svd", keep=0.5, progress=False))
    assert set(dict(model.named_parameters())) == {"0.0.weight", "0.1.weight", "0.1.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    model = rf.adapt(model, "lora", targets=["0.1"], rank=2)
    assert model(torch.randn(3, 16)).shape == (3, 16)
    with pytest.raises(NotAdapted):
        unfold(nn.Sequential(nn.Linear(2, 2)))


def test_an_encoder_of_torch_with_two_layers_for_one_still_runs_in_inference() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    model = _low_rank(nn.Sequential(encoder), "0.linear1", "0.linear2")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(unfold(model)(x), before)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.embedding(ids))


def test_what_two_layers_cannot_stand_for_is_refused_and_nothing_changes() -> None:
    cases: list[tuple[nn.Module, str, torch.Tensor, str]] = [
        (_low_rank(_Tied(), "embedding"), "head", torch.arange(4), "shares its weight"),
        (rf.adapt(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2), "0", torch.randn(2, 8), "not a product"),
    ]
    for model, path, x, sentence in cases:
        before = model(x)
        with pytest.raises(UnsupportedLayer, match=f"{path} .*{sentence}"):
            unfold(model)
        assert torch.equal(model(x), before)
        assert adaptation_of(model) is not None


def test_a_projection_that_is_read_and_not_called_is_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    rf.adapt(model, "lora", rank=2, targets=["*in_proj"])
    with pytest.raises(UnsupportedLayer, match="without being called"):
        unfold(model)


LOADING = """
import sys, torch
sys.modules["rankfold"] = None  # importing it fails
from transformers import AutoModel, AutoModelForCausalLM
decoder, encoder, results = sys.argv[1:]
ids = torch.arange(6)[None]
trusted = {"trust_remote_code": True}
first, loading = AutoModelForCausalLM.from_pretrained(decoder, output_loading_info=True, **trusted)
second = AutoModel.from_pretrained(encoder, **trusted)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
again = results + ".again"
first.save_pretrained(again)
third = AutoModelForCausalLM.from_pretrained(again, **trusted)
values = [first(ids).logits, second(ids).last_hidden_state, third(ids).logits]
torch.save(values, results)
"""


def test_layers_load_in_stock_transformers_without_rankfold_and_compute_the_same(
    llama: str, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, expected = torch.arange(6)[None], []
    for name, automatic, source in (
        ("decoder", AutoModelForCausalLM, llama),
        ("encoder", AutoModel, bert),
    ):
        model = automatic.from_pretrained(source)
        rf.compress(model, "svd", keep=0.5, progress=False)
        expected.append(next(iter(model(ids).values())))
        save_layers(model, tmp_path / name)
    results = tmp_path / "results.pt"
    program = [
        sys.executable,
        "-c",
        LOADING,
        str(tmp_path / "decoder"),
        str(tmp_path / "encoder"),
        str(results),
    ]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for value, wanted in zip(torch.load(results), [*expected, expected[0]], strict=True):
        torch.testing.assert_close(value, wanted)


def test_layers_are_never_taken_for_the_stock_model_whose_weights_they_are_not(
    llama: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    save_layers(rf.compress(model, "svd", keep=0.5, progress=False), tmp_path / "layers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(tmp_path / "layers", trust_remote_code=False)
    code = (tmp_path / "layers" / "modeling_factored.py").read_text()
    assert "import" in code
    assert "rankfold" not in code


def test_the_dense_form_is_a_stock_model_of_the_same_function(llama: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    rf.compress(model, "svd", keep=0.5, progress=False)
    ids = torch.arange(6)[None]
    before = model(ids).logits
    save_dense(model, tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(loaded(ids).logits, before, rtol=1e-4, atol=1e-4)
