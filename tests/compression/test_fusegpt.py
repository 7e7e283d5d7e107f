import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import rankfold as rf
from rankfold.compression.blocks import Calls, block_list, without
from rankfold.compression.distortion import Distortion
from rankfold.compression.papers.fusegpt import Fusion, divergence, macro_influence
from rankfold.errors import Incompatible, InvalidOption, UnsupportedLayer
from rankfold.statistics.batches import prepared
from rankfold.statistics.finite import NotFinite


class _Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = scale

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        return (hidden_states + self.scale * self.down(torch.relu(self.up(self.norm(hidden_states)))),)


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(scale) for scale in (2.0, 1.0, 0.5, 2.0, 1.5))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=None)[0]
        return self.head(x)


def _model() -> _Stack:
    torch.manual_seed(0)
    return _Stack()


BATCHES = [torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def _fused(model: nn.Module, **options: Any) -> nn.Module:
    options = {"keep": 0.8, "rank": 4, "group": 2, "epochs": 0, "progress": False, **options}
    return rf.compress(copy.deepcopy(model), "fusegpt", data=BATCHES, **options)


def test_the_block_goes_that_changes_the_last_hidden_states_least() -> None:
    model = _model()
    batches = [prepared(i, content, torch.device("cpu"), None) for i, content in enumerate(BATCHES)]
    found = macro_influence(model, model.blocks, batches)
    after = [Calls(model, model.blocks[-1], BATCHES).outputs]
    with without(model.blocks, 2):
        after.append(Calls(model, model.blocks[-1], BATCHES).outputs)
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(*after, strict=True)]
    assert found[2] == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-6)
    scales = [block.scale for block in _fused(model).blocks]
    assert scales == [s for i, s in enumerate((2.0, 1.0, 0.5, 2.0, 1.5)) if i != found.index(min(found))]


def test_at_the_start_the_group_is_plain_removal() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    assert torch.equal(Fusion(weight.shape, other, 3, generator)(weight), weight)
    assert torch.equal(Fusion(weight[:, 0].shape, other[:, 0], 3, generator)(weight[:, 0]), weight[:, 0])


def test_coefficients_of_ones_add_the_removed_weight_and_can_raise_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(20, 24, dtype=torch.float64)
    other = (
        torch.randn(20, 4, generator=generator).double() @ torch.randn(4, 24, generator=generator).double()
    )
    fusion = Fusion(weight.shape, other, 3, generator).double()
    fusion.left.data, fusion.right.data = torch.eye(20, 3).double() * 0, fusion.right.data * 0
    fusion.left.data[:, 0], fusion.right.data[0] = 1.0, 1.0
    torch.testing.assert_close(fusion(weight), other)
    nn.init.normal_(fusion.left, generator=generator)
    nn.init.normal_(fusion.right, generator=generator)
    assert int(torch.linalg.matrix_rank(fusion(weight))) == 12


def test_training_brings_the_group_nearer_and_fusing_nearer_than_changes_alone() -> None:
    model = _model()
    errors = []
    for options in ({}, {"epochs": 30, "fuse": False}, {"epochs": 30}):
        change = Distortion(model, BATCHES)
        change.model = _fused(model, lr=1e-2, lr_coefficients=1e-2, **options)
        errors.append(change())
    assert errors[2] < errors[1] < 0.8 * errors[0]


def test_what_remains_is_stock_and_gives_what_the_trained_group_gave() -> None:
    model = _fused(_model(), epochs=3)
    assert len(model.blocks) == 4
    assert {type(m) for m in model.modules()} == {_Stack, nn.ModuleList, _Block, nn.LayerNorm, nn.Linear}
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_models_configuration_says_how_many_blocks_are_left(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=30
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 30, (2, 7))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    rf.compress(model, "fusegpt", keep=0.5, rank=2, epochs=2, data=data, progress=False)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    step = model(ids[:, -1:], past_key_values=model(ids[:, :-1], use_cache=True).past_key_values).logits
    torch.testing.assert_close(step[:, 0], model(ids).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_padding_does_not_count_in_the_loss() -> None:
    aim, found = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    mask = torch.tensor([[True, True, False]])
    other = found.clone()
    other[0, 2] = 100.0
    assert torch.equal(divergence(found, aim, mask), divergence(other, aim, mask))
    assert float(divergence(aim, aim, mask)) == pytest.approx(0.0, abs=1e-6)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())

    def lost(*_: Any) -> None:
        raise RuntimeError("lost power")

    monkeypatch.setattr("rankfold.compression.papers.fusegpt.divergence", lost)
    with pytest.raises(RuntimeError, match="lost power"):
        rf.compress(model, "fusegpt", keep=0.5, rank=2, epochs=2, group=2, data=BATCHES, progress=False)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_blocks_and_impossible_options_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="no list of blocks of one class"):
        block_list(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InvalidOption, match="rank and group must be at least 1"):
        _fused(_model(), rank=0)
    with pytest.raises(InvalidOption, match="leave targets= away"):
        _fused(_model(), targets="all-linear")


def test_what_training_would_spoil_is_refused() -> None:
    model = _Stack().half()
    how: dict[str, Any] = {"keep": 0.5, "data": [torch.randn(2, 3, 8)], "progress": False}
    with pytest.raises(Incompatible, match=r"fusegpt trains, and blocks.0.norm.weight is float16"):
        rf.compress(model, "fusegpt", **how)
    model = _Stack()
    model.blocks[1].up.weight.data[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"^blocks.1.up.weight: the weight holds NaN"):
        rf.compress(model, "fusegpt", **how)
    model = rf.compress(_Stack(), "svd", keep=0.5, progress=False)
    with pytest.raises(Incompatible, match="was compressed already"):
        rf.compress(model, "fusegpt", **how)


def test_the_transposed_layers_of_gpt2_are_fused() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 3, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    before = [block.mlp.c_fc.weight.detach().clone() for block in model.transformer.h]
    batches = [{"input_ids": torch.randint(16, (2, 8))}]
    options: dict[str, Any] = {"rank": 2, "epochs": 2, "lr_coefficients": 0.1, "progress": False}
    rf.compress(model, "fusegpt", keep=0.7, data=batches, **options)
    found = model.transformer.h[0].mlp.c_fc.weight
    assert len(model.transformer.h) == model.config.n_layer == 2
    assert min(float((found.detach() - weight).norm()) for weight in before) > 0.001
    assert bool(model(**batches[0]).logits.isfinite().all())
