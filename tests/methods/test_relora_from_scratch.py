"""ReLoRA and SwitchLoRA pretrain a model from a random start, with everything beside the factors trained."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import rank_of
from torch import Tensor, nn

import rankfold as rf
from rankfold.weights import Moved

TARGETS = ("*self_attn*", "*mlp*")
POINTS = {
    "relora": rf.Recipe("lora", dynamics=(("relora", {"interval": 4, "warmup": 1, "prune": 0.9}),)),
    "switchlora": rf.Recipe(
        "lora", "switchlora", dynamics=(("switchlora", {"interval": 4.0, "ratio": 10.0, "freeze": 2}),)
    ),
}


def llama(seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


TOKENS = torch.randint(24, (6, 12), generator=torch.Generator().manual_seed(3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Take steps on one batch; return the loss before the last."""
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
    return loss.item()


def adapted(name: str, **options: Any) -> Any:
    return rf.adapt(llama(), POINTS[name], rank=3, targets=list(TARGETS), train="all", **options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rf.param_groups(model, lr=5e-3), weight_decay=0.0)


def base_of(layer: nn.Module) -> Tensor:
    return next(leaf.value for leaf in layer.expression.leaves() if isinstance(leaf, Moved))  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("name", POINTS)
def test_it_trains_everything_beside_the_weights_and_moves_those_by_more_than_its_rank(name: str) -> None:
    model, fresh = adapted(name), llama()
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer, total_steps=24):
        first, last = train(model, optimizer, 1), train(model, optimizer, 23)
        assert last < first - 0.3
        for path in ("model.embed_tokens", "model.norm", "lm_head", "model.layers.1.input_layernorm"):
            assert not torch.equal(model.get_submodule(path).weight, fresh.get_submodule(path).weight), path
        layer = model.model.layers[0].self_attn.q_proj
        assert not layer.original.weight.requires_grad
        change = layer.expression.dense().detach() - fresh.model.layers[0].self_attn.q_proj.weight
        assert rank_of(change.double()) > 2 * 3
    wanted = model(TOKENS).logits
    torch.testing.assert_close(rf.fold(model)(TOKENS).logits, wanted)
    assert list(model.state_dict()) == list(fresh.state_dict())


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("removable", [True, False])
def test_it_resumes_bit_for_bit(name: str, removable: bool, tmp_path: Path) -> None:
    whole, file = adapted(name, removable=removable), io.BytesIO()
    optimizer = optimizer_of(whole)
    with rf.attach(whole, optimizer, total_steps=14):
        train(whole, optimizer, 6)
        rf.save(whole, tmp_path / "half")
        torch.save(optimizer.state_dict(), file)
        train(whole, optimizer, 8)
    file.seek(0)
    # Where there is no start to go back to, the model may be drawn anew.
    again = rf.load(llama(seed=0 if removable else 1), tmp_path / "half")
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with rf.attach(again, resumed, total_steps=14):
        train(again, resumed, 8)
    state = again.state_dict()
    assert [key for key, value in whole.state_dict().items() if not torch.equal(state[key], value)] == []
    assert torch.equal(again(TOKENS).logits, whole(TOKENS).logits)


def test_a_warm_start_of_full_rank_is_plain_training_before_the_weights_are_adapted() -> None:
    model = llama()
    loss = train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), 8)
    warm, logits = model.model.layers[1].mlp.up_proj.weight.detach().clone(), model(TOKENS).logits
    rf.adapt(model, POINTS["relora"], rank=3, targets=list(TARGETS), train="all")

    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(model(TOKENS).logits, logits)  # nothing is lost at the change
    assert torch.equal(base_of(layer), warm)
    assert not torch.equal(warm, llama().model.layers[1].mlp.up_proj.weight)
    optimizer = optimizer_of(model)
    with rf.attach(model, optimizer, total_steps=12):
        assert train(model, optimizer, 12) < loss
        assert rank_of((base_of(layer) - warm).double()) == 3 * 3  # three restarts so far
