"""The GGUF adapter: read back by gguf's own reader, it is the change under llama.cpp's names and order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from layers import models
from layers.models import perturb
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, MissingDependency, NotDense, OutputExists
from rankfold.formats.gguf import ARCHITECTURES, rotary_order
from rankfold.layers import require


def small(kind: type[Any], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = kind.config_class(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return kind(config).eval()  # type: ignore[no-any-return]


def adapted(model: nn.Module, method: str = "lora", **options: Any) -> nn.Module:
    rf.adapt(model, method, **{"rank": 3, **options})
    perturb(model, 0.2)
    return model


def changes(model: nn.Module) -> dict[str, Tensor]:
    adaptation = require(model)
    expressions = adaptation.expressions(adaptation.adapter(None).name)
    return {p: (e.dense() - adaptation.layers[p].matrix()).detach() for p, e in expressions.items()}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields and, by llama.cpp's rule, the change of every tensor of the base."""
    reader = gguf.GGUFReader(file)
    fields = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    tensors = {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    assert set(tensors) == {f"{name}.lora_{side}" for name in names for side in "ab"}
    alpha, found = fields["adapter.lora.alpha"], {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape[0] == b.shape[1]
        found[name] = alpha / b.shape[1] * b @ a
    return fields, found


def in_llama_order(weight: Tensor, heads: int) -> Tensor:
    """Turn rows as llama.cpp's converter turns those of Llama's queries and keys."""
    numbers = weight.numpy()
    split = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
    return torch.from_numpy(np.ascontiguousarray(split.swapaxes(1, 2).reshape(numbers.shape)))


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "turned"),
    [
        (hf.LlamaForCausalLM, "llama", True),
        (hf.MistralForCausalLM, "llama", True),
        (hf.Qwen3ForCausalLM, "qwen3", False),
        (hf.Gemma2ForCausalLM, "gemma2", False),
    ],
)
@pytest.mark.parametrize("method", ["lora", "lora/pissa", "vera"])
def test_a_reader_finds_the_change_under_the_names_and_in_the_order_of_llama_cpp(
    kind: type[Any], name: str, turned: bool, method: str, tmp_path: Path
) -> None:
    model = adapted(small(kind), method)
    report = rf.export(model, tmp_path / "adapter.gguf", "gguf")
    fields, found = read(tmp_path / "adapter.gguf")
    assert fields["general.architecture"] == name
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert report.exact
    wanted = changes(model)
    assert len(found) == len(wanted)
    for path, change in wanted.items():
        layer, part = path.removeprefix("model.layers.").split(".", 1)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
        expected = in_llama_order(change, heads) if turned and heads else change
        torch.testing.assert_close(found[f"blk.{layer}.{NAMES[part]}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_weights_of_gpt2_are_turned_to_rows_of_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(models.gpt2())
    rf.export(model, tmp_path / "out", "gguf")
    _, found = read(tmp_path / "out" / "adapter.gguf")
    for path, change in changes(model).items():
        name = {
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }
        layer, part = path.removeprefix("transformer.h.").split(".", 1)
        torch.testing.assert_close(found[f"blk.{layer}.{name[part]}.weight"], change, rtol=1e-5, atol=1e-6)


def test_every_linear_weight_of_a_known_architecture_has_a_name(tmp_path: Path) -> None:
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    for architecture in ARCHITECTURES.values():
        table = gguf.get_tensor_name_map(known[architecture.name], 1)
        path = (
            "transformer.h.0.mlp.c_proj" if architecture.name == "gpt2" else "model.layers.0.self_attn.o_proj"
        )
        assert table.get_name(f"{path}.weight", try_suffixes=(".weight",)) is not None
    model = adapted(small(hf.LlamaForCausalLM), targets=["lm_head", "q_proj"])
    rf.export(model, tmp_path / "a.gguf", "gguf")
    assert "output.weight" in read(tmp_path / "a.gguf")[1]


@pytest.mark.parametrize(("rows", "heads"), [(8, 2), (16, 4), (24, 3)])
def test_the_order_of_rows_pairs_the_halves_of_a_head(rows: int, heads: int) -> None:
    column = torch.arange(rows).float()[:, None]
    assert torch.equal(column[rotary_order(rows, heads)], in_llama_order(column, heads))


def test_ranks_that_differ_are_filled_up_to_one(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rank capped"):
        model = adapted(small(hf.LlamaForCausalLM), rank=12, alpha=5)
    rf.export(model, tmp_path / "a.gguf", "gguf")
    fields, _ = read(tmp_path / "a.gguf")
    ranks = {int(t.shape[1]) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors if t.name.endswith("_a")}
    assert ranks == {int(fields["adapter.lora.alpha"])} == {12}


def test_half_precision_is_written_when_asked(tmp_path: Path) -> None:
    model = adapted(small(hf.LlamaForCausalLM))
    rf.export(model, tmp_path / "a.gguf", "gguf", dtype="f16")
    kinds = {t.tensor_type for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {gguf.GGMLQuantizationType.F16}
    found = read(tmp_path / "a.gguf")[1]
    change = changes(model)["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(found["blk.0.ffn_up.weight"], change, rtol=2e-2, atol=2e-3)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(1e8)
    with pytest.raises(Incompatible, match="too large for half precision"):
        rf.export(model, tmp_path / "b.gguf", "gguf", dtype="f16")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def refusals() -> dict[str, tuple[Callable[[], nn.Module], type[Exception], str]]:
    def tied() -> nn.Module:
        return adapted(small(hf.LlamaForCausalLM, tie_word_embeddings=True), targets=["lm_head"])

    def llama(method: str = "lora", **options: Any) -> nn.Module:
        return adapted(small(hf.LlamaForCausalLM), method, **options)

    def plain() -> nn.Module:
        return adapted(nn.Sequential(nn.Linear(4, 4)), rank=2)

    unknown = "no GGUF names are known for"
    return {
        "architecture": (lambda: adapted(models.bert()), Incompatible, f"{unknown} model type 'bert'"),
        "module": (plain, Incompatible, f"{unknown} Sequential"),
        "embedding": (lambda: llama(targets=["embed_tokens"]), Incompatible, "linear layers only"),
        "tied head": (tied, Incompatible, "shares its tensor with"),
        "trained whole": (lambda: llama(train=["lm_head"]), Incompatible, "trained whole"),
        "tokens": (lambda: llama("mixture"), NotDense, "from token to token"),
        "full rank": (lambda: llama("dora"), InvalidOption, "not of low rank"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_llama_cpp_has_no_place_for_is_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    build, error, sentence = refusals()[name]
    with pytest.raises(error, match=sentence):
        rf.export(build(), tmp_path / "a.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model, file = adapted(small(hf.LlamaForCausalLM)), tmp_path / "a.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(OutputExists):
        rf.export(model, file, "gguf")
    assert file.read_bytes() == b"mine"
    rf.export(model, file, "gguf", overwrite=True)
    assert read(file)[1]
    with pytest.raises(OutputExists, match="a part of its path is a file"):
        rf.export(model, file / "below.gguf", "gguf")
    (tmp_path / "b.gguf").mkdir()
    with pytest.raises(OutputExists, match="is a folder, not a file"):
        rf.export(model, tmp_path / "b.gguf", "gguf", overwrite=True)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r"rankfold\[gguf\]"):
        rf.export(adapted(small(hf.LlamaForCausalLM)), tmp_path / "a.gguf", "gguf")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "gguf", "dtype": "q8_0"}, "dtype must be"),
        ({"format": "peft", "dtype": "f16"}, "GGUF file"),
    ],
)
def test_a_precision_that_cannot_be_written_is_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        rf.export(adapted(small(hf.LlamaForCausalLM)), tmp_path / "a.gguf", **options)
