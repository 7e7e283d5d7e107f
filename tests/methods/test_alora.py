"""aLoRA: a LoRA that acts from its invocation onwards."""

import itertools
from typing import Any

import pytest
import torch
from methods._layers import disturbed, leaves_of, trained
from methods._peft import DTYPES, HOSTS, INVOCATION, assert_parity, lora_layout, twins
from peft import LoraConfig
from torch import Tensor

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, NotDense
from rankfold.layers import require

STARTS = (2, 6)  # of the last invocation in the first two rows of the prompt; the third has none


def llama(dtype: torch.dtype = torch.float64) -> Any:
    return HOSTS["llama"].model(dtype)


def adapted(method: str = "alora", **options: Any) -> Any:
    arguments = {"rank": 2, "targets": "all-linear", "invocation": INVOCATION, **options}
    return disturbed(rf.adapt(llama(), method, **arguments))


def prompt() -> Tensor:
    return HOSTS["llama"].input(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Whole sequences only: peft counts from the end, so padding on the right shifts its positions.
def test_outputs_and_gradients_are_pefts(dtype: torch.dtype) -> None:
    config = LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", alora_invocation_tokens=list(INVOCATION))
    assert_parity(
        twins(HOSTS["llama"], dtype, "alora", config, lora_layout, rank=3, alpha=5, invocation=INVOCATION)
    )


def states(model: Any, ids: Tensor) -> list[Tensor]:
    """Return hidden states, keys and values, (batch, token, ...)."""
    out = model(ids, output_hidden_states=True, use_cache=True)
    cached = [t.transpose(1, 2) for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    return [*out.hidden_states, *cached, out.logits]


def test_before_the_invocation_every_state_is_the_bases_bit_for_bit() -> None:
    ids = prompt()
    for plain, changed in zip(states(llama(), ids), states(adapted(), ids), strict=True):
        for row, start in enumerate((*STARTS, ids.shape[1])):
            assert torch.equal(changed[row, :start], plain[row, :start])
    assert not torch.allclose(changed[0, 2:], plain[0, 2:])
    assert not torch.allclose(changed[1, 6:], plain[1, 6:])


def test_plain_lora_changes_what_comes_before() -> None:
    model = disturbed(rf.adapt(llama(), "lora", rank=2))
    assert not torch.equal(states(model, prompt())[-1][0, 0], states(llama(), prompt())[-1][0, 0])


def test_the_invocation_itself_is_adapted() -> None:
    model = adapted(targets=["model.layers.0.self_attn.q_proj"])
    found: list[Tensor] = []
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, args, y: found.append((args[0], y)))
    model(prompt())
    x, y = found[0]
    leaves = leaves_of(model, "model.layers.0.self_attn.q_proj")
    moved = y - x @ projection.weight.T
    gate = torch.arange(9)[None] >= torch.tensor([*STARTS, 99])[:, None]
    expected = gate[..., None] * (x @ leaves["down"].T @ leaves["up"].T)
    torch.testing.assert_close(moved, expected)


def test_tokens_before_the_invocation_give_no_gradient() -> None:
    model = adapted()
    logits = model(prompt()).logits
    (logits[0, :2].sum() + logits[1, :6].sum() + logits[2].sum()).backward()
    assert all(not p.grad.any() for p in trained(model).values())


def test_an_invocation_that_does_not_fit_is_absent() -> None:
    ids = prompt()[:, :1]
    assert torch.equal(adapted()(ids).logits, llama()(ids).logits)


def test_padding_that_looks_like_the_invocation_is_none() -> None:
    ids = prompt()
    padding = torch.zeros(len(ids), 3, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), padding], 1)
    model, base = adapted(invocation=(0,)), llama()
    padded = torch.cat([ids, padding], 1)
    assert torch.equal(model(padded, attention_mask=mask).logits, base(padded, attention_mask=mask).logits)


def test_a_prompt_that_was_cached_elsewhere_is_refused_unless_the_invocation_follows() -> None:
    model, ids = adapted(), torch.tensor([[9, 10, 11, *INVOCATION, 13, 14]])
    full = model(ids).logits
    filled = llama()(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(Incompatible, match=r"does not know whether .* is in the prompt"):
        model(ids[:, 6:], past_key_values=filled)
    filled = llama()(ids[:, :3], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 3:], past_key_values=filled).logits, full[:, 3:])


def test_while_it_is_not_in_use_it_asks_for_nothing() -> None:
    model, ids = adapted(), prompt()
    with rf.disabled(model):
        filled = llama()(ids[:, :3], use_cache=True).past_key_values
        model(ids[:, 3:4], past_key_values=filled)
        states = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=states).logits, llama()(ids).logits)
    with pytest.raises(Incompatible, match="does not know whether"):
        model(ids[:, 4:5], past_key_values=filled)


@pytest.mark.parametrize("calls", [[5], [3, 4, 5, 6]])
def test_an_invocation_that_is_split_over_calls_opens_once_it_is_complete(calls: list[int]) -> None:
    (first, second), cache, open_at = INVOCATION, None, []
    ids = torch.tensor([[9, 10, 11, 12, first, second, 13, 14]])
    model = adapted()
    for start, stop in itertools.pairwise([0, *calls, 8]):
        cache = model(ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
        (gate,) = require(model).carrier.gates.current.values()
        open_at += gate.values[0, :, 0].tolist()
    assert open_at == [False] * 5 + [True] * 3


def test_it_starts_at_the_base_and_a_residual_start_is_gated_whole() -> None:
    for method in ("alora", "alora/pissa"):
        model = rf.adapt(llama(), method, rank=2, invocation=INVOCATION)
        torch.testing.assert_close(model(prompt()).logits, llama()(prompt()).logits)


def test_it_cannot_be_folded() -> None:
    with pytest.raises(NotDense, match="differs from token to token"):
        rf.fold(adapted())


def test_embeddings_as_inputs_are_refused() -> None:
    with pytest.raises(InvalidOption, match="input_ids"):
        adapted()(inputs_embeds=torch.zeros(1, 3, 16, dtype=torch.float64))


@pytest.mark.parametrize("invocation", [(), "ab", 3, (1.5,)])
def test_an_invocation_is_token_ids(invocation: Any) -> None:
    with pytest.raises(InvalidOption, match="invocation"):
        rf.adapt(llama(), "alora", invocation=invocation)
