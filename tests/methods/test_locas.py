"""Locas: memories beside gated feed-forward blocks, cloned from their most active units, and absorbed."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import count, disturbed, trained
from methods._peft import HOSTS
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, UnknownTarget, UnsupportedLayer

HIDDEN, INNER = 16, 24


def llama() -> Any:
    return HOSTS["llama"].model(torch.float64)


def batch(seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(7, 19, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def adapted(model: Any = None, rank: int = 3, **arguments: Any) -> Any:
    arguments = {"data": [batch()], "progress": False, **arguments}
    return rf.adapt(llama() if model is None else model, "locas", rank=rank, **arguments)


def memories(model: Any) -> Iterator[tuple[nn.Module, Any]]:
    for layer in model.model.layers:
        yield layer.mlp, layer.mlp.rankfold_default_branch


def activities(model: Any) -> list[Tensor]:
    """Return the squared activity of every hidden unit on the batch, block by block."""
    found: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: found.append(args[0].detach().flatten(0, -2).square().sum(0))
        )
        for layer in model.model.layers
    ]
    model(**batch())
    for hook in hooks:
        hook.remove()
    return found


def test_it_clones_the_most_active_units_and_starts_at_the_base() -> None:
    plain, model = llama(), adapted()
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    for (mlp, memory), activity in zip(memories(model), activities(plain), strict=True):
        chosen = activity.topk(3).indices
        assert torch.equal(memory.gate, mlp.gate_proj.weight[chosen])  # type: ignore[union-attr,index]
        assert torch.equal(memory.up, mlp.up_proj.weight[chosen])  # type: ignore[union-attr,index]
        assert not memory.down.any()


def test_at_the_first_step_only_the_values_learn_and_as_the_blocks_own_would() -> None:
    model, plain = adapted(scale=2.0), llama()
    model(**batch()).loss.backward()
    plain(**batch()).loss.backward()
    for (_, memory), layer, activity in zip(
        memories(model), plain.model.layers, activities(plain), strict=True
    ):
        chosen = activity.topk(3).indices
        torch.testing.assert_close(memory.down.grad, 2 * layer.mlp.down_proj.weight.grad[:, chosen])
        assert memory.down.grad.any()
        assert not memory.gate.grad.any()
        assert not memory.up.grad.any()


def test_the_memory_is_added_to_the_block_by_its_formula() -> None:
    model = disturbed(adapted(scale=0.5))
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mlp, memory = next(memories(model))
    with rf.disabled(model):
        plain = mlp(x)
    inner = nn.functional.silu(x @ memory.gate.T) * (x @ memory.up.T)
    torch.testing.assert_close(mlp(x), plain + 0.5 * inner @ memory.down.T)
    assert (mlp(x) - plain).norm() > 0.01 * plain.norm()


def test_the_count_is_three_widths_per_block() -> None:
    assert count(adapted(rank=3)) == 2 * 3 * 3 * HIDDEN


def test_it_learns_the_text_it_is_to_remember() -> None:
    plain = llama()
    plain.lm_head.weight.data *= 20  # so that logits can grow
    model = adapted(plain, rank=8)
    first = model(**batch()).loss.item()
    optimizer = torch.optim.Adam(trained(model).values(), lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert model(**batch()).loss.item() < 0.5 * first


# Absorbing --------------------------------------------------------------------------------------------


def test_the_wider_block_is_the_same_function_and_can_be_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = disturbed(adapted(scale=0.7), size=1.0)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits, blocks = model(**batch()).logits, [mlp(x) for mlp, _ in memories(model)]
    assert not torch.allclose(logits, llama()(**batch()).logits, rtol=1e-3)
    assert rf.absorb(model) is model
    for layer, wanted in zip(model.model.layers, blocks, strict=True):  # type: ignore[union-attr,arg-type]
        torch.testing.assert_close(layer.mlp(x), wanted, rtol=1e-12, atol=1e-12)
        assert layer.mlp.gate_proj.weight.shape == (INNER + 3, HIDDEN)
        assert layer.mlp.down_proj.in_features == INNER + 3
    torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-12, atol=1e-12)
    assert not [key for key in model.state_dict() if "rankfold" in key]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(**batch()).logits, logits, rtol=1e-12, atol=1e-12)


def test_after_absorbing_another_memory_can_be_started_and_absorbed() -> None:
    model = rf.absorb(disturbed(adapted()))
    wanted = disturbed(adapted(model, rank=2))(**batch()).logits
    torch.testing.assert_close(rf.absorb(model)(**batch()).logits, wanted)
    assert model.config.intermediate_size == INNER + 5  # type: ignore[union-attr]


def test_biases_of_the_units_are_cloned_and_absorbed() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, mlp_bias=True,
    )  # fmt: skip
    plain: Any = LlamaForCausalLM(config).double().eval()
    for layer in plain.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).bias.data.normal_()
    model = adapted(copy.deepcopy(plain))
    model(**batch()).loss.backward()
    plain(**batch()).loss.backward()
    for (_, memory), layer, activity in zip(
        memories(model), plain.model.layers, activities(plain), strict=True
    ):
        wanted = layer.mlp.down_proj.weight.grad[:, activity.topk(3).indices]
        torch.testing.assert_close(memory.down.grad, wanted)
    logits = disturbed(model)(**batch()).logits
    torch.testing.assert_close(rf.absorb(model)(**batch()).logits, logits)


def test_a_width_that_the_configuration_cannot_say_is_refused_and_nothing_changes() -> None:
    model = disturbed(adapted(targets=["layers.0.mlp"]))
    before = model(**batch()).logits
    with pytest.raises(Incompatible, match="intermediate_size is one number for all"):
        rf.absorb(model)
    assert torch.equal(model(**batch()).logits, before)
    assert model.config.intermediate_size == INNER  # type: ignore[union-attr]


def test_what_is_no_memory_or_is_held_by_another_adapter_is_refused() -> None:
    with pytest.raises(Incompatible, match="no memories of locas"):
        rf.absorb(rf.adapt(llama(), "lora", rank=2))
    model = rf.adapt(llama(), "lora", rank=2, targets="mlp", name="other")
    adapted(model, name="memory")
    with pytest.raises(Incompatible, match="holds another adapter; fold or remove it first"):
        rf.absorb(model, "memory")
    rf.adapt(model, "lora", rank=2, targets="attention", name="elsewhere")
    rf.remove(model, "other")
    wanted = disturbed(rf.use(model, "memory"))(**batch()).logits
    torch.testing.assert_close(rf.absorb(model, "memory")(**batch()).logits, wanted)


def test_a_memory_that_is_not_in_use_is_not_absorbed() -> None:
    model, plain = disturbed(adapted()), llama()
    wanted = model(**batch()).logits
    with rf.disabled(model):
        with pytest.raises(Incompatible, match=r"'default' is not in use, .*rankfold.use"):
            rf.absorb(model)
        assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    assert torch.equal(model(**batch()).logits, wanted)
    torch.testing.assert_close(rf.absorb(model)(**batch()).logits, wanted)


# What it reads and where it goes ----------------------------------------------------------------------


def test_without_data_it_says_what_it_reads() -> None:
    with pytest.raises(InvalidOption, match="locas reads column_norm: pass data=batches"):
        rf.adapt(llama(), "locas", rank=2)


def test_statistics_that_were_collected_before_serve_as_well() -> None:
    model = llama()
    found = rf.collect(model, [batch()], "column_norm", targets="all-linear", progress=False)
    first = dict(adapted(model, data=found).named_parameters())
    second = dict(adapted().named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_saved_memory_is_loaded_without_data(tmp_path: Path) -> None:
    model = disturbed(adapted())
    loaded: Any = rf.load(llama(), rf.save(model, tmp_path / "adapter"))
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [({"targets": ["self_attn"]}, UnsupportedLayer, "locas needs a layer down.*LlamaAttention is none"),
     ({"rank": INNER + 1}, InvalidRank, f"more than its {INNER} hidden units"),
     ({"scale": 0.0}, InvalidOption, "scale must be positive"),
     ({"targets": "all-linear"}, UnknownTarget, "attached to modules' outputs")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        adapted(**arguments)


def test_a_model_without_gated_blocks_is_refused() -> None:
    with pytest.raises(UnknownTarget, match="'gated-mlp' matches nothing in Sequential"):
        adapted(nn.Sequential(nn.Linear(4, 4)), data=[torch.ones(1, 4)])


class Normed(nn.Module):
    """A gated block with a normalisation between its hidden units and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act, self.norm = nn.GELU(), nn.LayerNorm(8)


def test_a_block_with_a_normalisation_inside_is_none() -> None:
    block = Normed()
    assert rf.layers.gated_block(block) is None
    block.norm = nn.Dropout(0.1)  # type: ignore[assignment]
    assert rf.layers.gated_block(block) is not None
