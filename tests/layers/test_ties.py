"""Weights that share one stored tensor: adapted once, they stay tied."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from layers.models import VOCABULARY, Memory, adapted, gpt2, inputs, llama, made, perturb, seeded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankfold as rf
from rankfold.errors import Incompatible, UnsupportedLayer
from rankfold.layers import StructuredEmbedding, StructuredLinear

MODELS = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}
EMBEDDINGS = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
pytestmark = pytest.mark.filterwarnings("ignore:.*shares its tensor")


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> Any:
    return seeded(MODELS[name])


def ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def outputs(model: Any) -> Tensor:
    result: Tensor = model(**inputs("llama")).logits
    return result


def with_matrix(name: str, matrix: Tensor) -> Any:
    """Return the plain model with another embedding."""
    plain = seeded(MODELS[name])
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(matrix)
    return plain


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "hra"])
@pytest.mark.parametrize("end", ["embedding", "head", "both"])
def test_adapting_one_end_adapts_both_and_counts_once(model: Any, name: str, end: str, method: str) -> None:
    memory, before = Memory(model), outputs(model)
    targets = {"embedding": [EMBEDDINGS[name]], "head": ["lm_head"], "both": [EMBEDDINGS[name], "lm_head"]}[
        end
    ]
    adapted(model, method, targets=targets)
    embedding, head = ends(model)
    assert isinstance(embedding, StructuredEmbedding)
    assert isinstance(head, StructuredLinear)
    assert embedding.expression is head.expression
    assert embedding.weight is head.weight
    matrix = embedding.expression.dense().detach()
    assert not torch.allclose(outputs(model), before, atol=1e-3)
    torch.testing.assert_close(outputs(model), outputs(with_matrix(name, matrix)))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert rf.summary(model).trainable == sum(p.numel() for p in trained.values())
    outputs(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    rf.remove(model)
    assert torch.equal(outputs(model), before)
    memory.check(model)


def test_folding_keeps_the_tie_and_the_checkpoint_is_a_stock_one(
    model: Any, name: str, tmp_path: Path
) -> None:
    adapted(model, "dora", targets="lm_head")
    after = outputs(model)
    rf.fold(model).save_pretrained(tmp_path)
    embedding, head = ends(model)
    assert (type(embedding), type(head)) == (nn.Embedding, nn.Linear)
    assert embedding.weight is head.weight
    torch.testing.assert_close(outputs(model), after, atol=1e-5, rtol=1e-4)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_tie_weights_changes_nothing_on_an_adapted_model(model: Any) -> None:
    adapted(model, targets="lm_head")
    after = outputs(model)
    model.tie_weights()
    embedding, head = ends(model)
    assert embedding.weight is head.weight
    assert torch.equal(outputs(model), after)
    rf.fold(model)
    model.tie_weights()
    torch.testing.assert_close(outputs(model), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_second_adapter_on_the_other_end_joins_the_first(model: Any, name: str, first: str) -> None:
    memory, before = Memory(model), outputs(model)
    one, other = (EMBEDDINGS[name], "lm_head") if first == "embedding" else ("lm_head", EMBEDDINGS[name])
    adapted(model, name="a", targets=one)
    with_a = outputs(model)
    adapted(model, name="b", targets=other)
    with_b = outputs(model)
    rf.use(model, "a")
    torch.testing.assert_close(outputs(model), with_a)
    rf.use(model, ["a", "b"])
    owner = ends(model)[0].lender or ends(model)[0]
    change = {n: e.leaf("up").tensor() @ e.leaf("down").tensor() for n, e in owner.adapters.items()}
    matrix = ends(model)[0].weight + change["a"] + change["b"]
    torch.testing.assert_close(outputs(model), outputs(with_matrix(name, matrix.detach())))
    rf.remove(model, "a")
    rf.use(model, "b")
    torch.testing.assert_close(outputs(model), with_b)
    rf.remove(model)
    assert torch.equal(outputs(model), before)
    memory.check(model)


# Resizing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["embedding", "head", "whole"])
def test_resizing_refuses_while_an_adapter_holds_the_rows(model: Any, name: str, case: str) -> None:
    if case == "whole":
        adapted(model, targets="attention", train=("lm_head",))
    else:
        adapted(model, targets=EMBEDDINGS[name] if case == "embedding" else "lm_head")
    after, memory = outputs(model), Memory(model)
    with pytest.raises(
        Incompatible, match=r"is adapted or trained whole.*resize before adapting, or fold first"
    ):
        model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(Incompatible, match="is adapted or trained whole"):
        model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.resize_token_embeddings() is ends(model)[0]
    memory.check(model)
    assert torch.equal(outputs(model), after)
    rf.fold(model).resize_token_embeddings(VOCABULARY + 3)
    torch.testing.assert_close(outputs(model)[..., :VOCABULARY], after, atol=1e-5, rtol=1e-4)


def test_resizing_works_where_no_adapter_holds_the_rows(model: Any) -> None:
    adapted(model, targets="attention")
    after = outputs(model)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert outputs(model).shape[-1] == VOCABULARY + 3
    torch.testing.assert_close(outputs(model)[..., :VOCABULARY], after)
    embedding, head = ends(model)
    assert embedding.weight is head.weight
    with rf.disabled(model):
        assert not torch.allclose(outputs(model)[..., :VOCABULARY], after, atol=1e-4)
    rf.remove(model)
    assert "resize_token_embeddings" not in model.__dict__
    assert outputs(model).shape[-1] == VOCABULARY + 3


def test_resizing_an_untied_head_refuses_before_anything_is_resized() -> None:
    model: Any = seeded(lambda: llama(tie_word_embeddings=False))
    adapted(model, targets="lm_head")
    with pytest.raises(Incompatible, match="lm_head is adapted"):
        model.resize_token_embeddings(VOCABULARY + 3)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY


# Other ties -------------------------------------------------------------------------------------------


def test_a_tie_to_a_layer_that_cannot_follow_is_refused() -> None:
    model = made("bart")
    hidden = hf.BartForConditionalGeneration(model.config).eval()
    memory = Memory(hidden)
    with pytest.raises(
        UnsupportedLayer, match=r"lm_head shares its tensor with model\.\S*, which cannot follow it"
    ):
        rf.adapt(hidden, "lora", rank=2, targets="lm_head")
    memory.check(hidden)


def test_a_tie_to_a_layer_that_the_structure_does_not_apply_to_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedLayer, match=r"lm_head shares its tensor .*alora does not apply to it"):
        rf.adapt(model, "alora", rank=2, targets="lm_head", invocation=(5, 6))


def test_all_readers_of_a_shared_embedding_follow() -> None:
    model: Any = made("t5")
    torch.manual_seed(0)
    before = model(**inputs("t5")).logits
    adapted(model, targets="shared")
    assert not torch.allclose(model(**inputs("t5")).logits, before, atol=1e-3)
    after = model(**inputs("t5")).logits
    torch.testing.assert_close(rf.fold(model)(**inputs("t5")).logits, after, atol=1e-5, rtol=1e-4)
    assert model.shared.weight is model.encoder.embed_tokens.weight


def test_a_layer_that_reads_the_tensor_transposed_is_refused() -> None:
    linear, transposed = nn.Linear(6, 6, bias=False), Conv1D(6, 6)
    transposed.weight = linear.weight
    with pytest.raises(UnsupportedLayer, match=r"0 shares its tensor with 1.*it reads it transposed"):
        rf.adapt(nn.Sequential(linear, transposed), "lora", rank=2, targets="0")


def test_a_tensor_that_is_tied_to_a_module_trained_whole_is_refused(model: Any, name: str) -> None:
    with pytest.raises(Incompatible, match="is both adapted and trained whole"):
        rf.adapt(model, "lora", rank=2, targets=EMBEDDINGS[name], train=("lm_head",))


def test_a_layer_that_stands_in_a_model_twice_is_adapted_once() -> None:
    torch.manual_seed(0)
    twice = nn.Linear(6, 6)
    model = nn.Sequential(twice, nn.Tanh(), twice)
    x, memory = torch.randn(3, 6), Memory(model)
    before = model(x)
    adapted(model)
    assert model[0].expression is model[2].expression
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    matrix = model[0].expression.dense()
    wanted = torch.tanh(x @ matrix.T + twice.bias) @ matrix.T + twice.bias
    torch.testing.assert_close(model(x), wanted)
    rf.remove(model)
    assert torch.equal(model(x), before)
    memory.check(model)


def test_a_block_that_stands_in_a_model_twice_is_adapted_once() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model = nn.Sequential(block, block)
    x, memory = torch.randn(3, 6), Memory(model)
    adapted(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = model(x)
    rf.fold(model)
    torch.testing.assert_close(model(x), after, atol=1e-6, rtol=1e-5)
    assert model[0] is model[1]
    assert model[0][0] is memory.modules["0.0"]


def test_tied_factors_of_shared_pools_survive_saving(model: Any, tmp_path: Path) -> None:
    rf.adapt(model, "vera", rank=2, targets="lm_head")
    perturb(model)
    rf.save(model, tmp_path / "adapter")
    twin = seeded(MODELS["llama" if model.config.model_type == "llama" else "gpt2"])
    rf.load(twin, tmp_path / "adapter")
    torch.testing.assert_close(outputs(twin), outputs(model))
