"""X-LoRA: LoRAs mixed as a classifier of the model's own last hidden states says."""

import copy
from typing import Any

import pytest
import torch
from layers.models import llama, seeded, t5
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, UnsupportedLayer
from rankfold.layers import require

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(2))


def with_experts(**options: Any) -> Any:
    """Return a model that mixes two trained LoRAs of different ranks, one of them on fewer layers."""
    model: Any = seeded(llama)
    for name, rank, targets in (("first", 2, "all-linear"), ("second", 3, "*.q_proj")):
        rf.adapt(model, "lora", rank=rank, targets=targets, name=name)
        for expression in require(model).expressions(name).values():
            expression.leaf("up").tensor().data.normal_(std=0.2)
    return rf.adapt(model, "x-lora", rank=3, experts=("first", "second"), name="mixed", **options)


def router(model: Any) -> tuple[Tensor, Tensor]:
    shared = require(model).adapter("mixed").shared
    return getattr(model, shared["router"]), getattr(model, shared["bias"])


def gates(model: Any) -> Tensor:
    return require(model).carrier.gates.current["mixed:x-lora"].values


def test_a_one_sided_classifier_gives_that_expert_alone() -> None:
    model = with_experts()
    matrix, bias = router(model)
    matrix.data.zero_()
    bias.data = torch.tensor([200.0, 0.0])
    with torch.no_grad():
        found = model(IDS).logits
        rf.use(model, "first")
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-4)
        rf.use(model, "mixed")
        bias.data = torch.tensor([0.0, 200.0])
        found = model(IDS).logits
        rf.use(model, "second")
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_the_gates_are_a_softmax_of_the_bases_last_hidden_states() -> None:
    model = with_experts(temperature=2.0)
    matrix, bias = router(model)
    model(IDS)
    found = gates(model)
    with rf.disabled(model), torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
    torch.testing.assert_close(found, ((hidden @ matrix.T + bias) / 2).softmax(-1))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 7))


def test_layers_may_have_gates_of_their_own() -> None:
    model = with_experts(layerwise=True)
    model(IDS)
    layers = len(require(model).expressions("mixed"))
    assert gates(model).shape == (2, 7, 2 * layers)
    torch.testing.assert_close(gates(model).unflatten(-1, (layers, 2)).sum(-1), torch.ones(2, 7, layers))


def test_of_the_k_largest_none_is_made_larger() -> None:
    every, one = with_experts(), with_experts(top_k=1)
    every(IDS), one(IDS)
    largest = gates(every).max(-1).values
    torch.testing.assert_close(gates(one).max(-1).values, largest)
    assert ((gates(one) > 0).sum(-1) == 1).all()


def test_of_experts_that_are_level_no_more_than_k_are_kept() -> None:
    model = with_experts(top_k=1)
    for tensor in router(model):
        tensor.data.zero_()
    model(IDS)
    assert ((gates(model) > 0).sum(-1) == 1).all()


def test_only_the_classifier_is_trained_and_it_gets_a_gradient() -> None:
    model = with_experts().train()
    assert rf.summary(model).trainable == 2 * (16 + 1)
    model(IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in router(model))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generating_with_a_cache_gives_what_full_forwards_give(options: dict[str, int]) -> None:
    model = with_experts(scale=3.0).eval()
    model.generation_config.eos_token_id = None
    router(model)[0].data.normal_()
    runs = [
        model.generate(
            IDS, max_new_tokens=6, do_sample=False, use_cache=use_cache, return_dict_in_generate=True,
            output_logits=True, **options,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(runs[0].logits[-1], runs[1].logits[-1], atol=1e-4, rtol=1e-3)


def test_a_cache_that_the_model_makes_itself_is_followed() -> None:
    model = with_experts(scale=3.0).eval()
    router(model)[0].data.normal_()
    with torch.no_grad():
        full = model(IDS).logits
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        assert cache.get_seq_length() == 6
        last = model(IDS[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, 0], full[:, 6], atol=1e-5, rtol=1e-4)


def test_a_cache_that_it_has_not_filled_is_refused() -> None:
    model = with_experts().eval()
    with torch.no_grad():
        cache = seeded(llama)(IDS[:, :6], use_cache=True).past_key_values
        with pytest.raises(
            Incompatible, match="x-lora 'mixed' does not know what this key-value cache holds"
        ):
            model(IDS[:, 6:], past_key_values=cache)


def test_a_copied_cache_brings_that_of_the_first_pass_with_it() -> None:
    model = with_experts(scale=3.0).eval()
    router(model)[0].data.normal_()
    with torch.no_grad():
        full = model(IDS).logits
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        for each in (copy.deepcopy(cache), cache):
            last = model(IDS[:, 6:], past_key_values=each).logits
            torch.testing.assert_close(last[:, 0], full[:, 6], atol=1e-5, rtol=1e-4)


def test_models_of_two_stacks_are_refused() -> None:
    model = rf.adapt(t5(), "x-lora", experts=2)
    with pytest.raises(Incompatible, match="one stack, and an encoder-decoder has two"):
        model(input_ids=IDS, labels=IDS)


def test_the_file_stands_alone(tmp_path: Any) -> None:
    model = with_experts().eval()
    rf.save(model, tmp_path / "mixed", name="mixed")
    fresh: Any = rf.load(seeded(llama).eval(), tmp_path / "mixed")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_what_has_no_meaning_is_refused() -> None:
    model = with_experts()
    with pytest.raises(InvalidRank, match="'second' has rank 3; pass rank=3"):
        rf.adapt(model, "x-lora", rank=2, experts=("first", "second"), name="more")
    with pytest.raises(InvalidOption, match="no adapter 'third'"):
        rf.adapt(model, "x-lora", rank=3, experts=("first", "third"), name="more")
    with pytest.raises(InvalidOption, match="top_k"):
        rf.adapt(model, "x-lora", rank=3, experts=("first",), top_k=2, name="more")
    rf.adapt(model, "dora", rank=2, name="lengths")
    with pytest.raises(InvalidOption, match="low-rank change, and 'lengths' does not"):
        rf.adapt(model, "x-lora", rank=3, experts=("lengths",), name="more")
    with pytest.raises(UnsupportedLayer, match="no hidden_size"):
        rf.adapt(nn.Sequential(nn.Linear(4, 4)), "x-lora", experts=2, targets="0")


def test_the_same_expert_twice_is_refused() -> None:
    with pytest.raises(InvalidOption, match="x-lora: experts names 'first' twice"):
        rf.adapt(with_experts(), "x-lora", rank=3, experts=("first", "second", "first"), name="more")


def test_experts_that_change_none_of_the_targets_are_refused() -> None:
    model = with_experts()
    sentence = r"x-lora: 'second' changes none of .*gate_proj.* \(2 targets\)"
    with pytest.raises(InvalidOption, match=sentence):
        rf.adapt(model, "x-lora", rank=3, experts=("second",), targets="*.gate_proj", name="more")
    rf.adapt(model, "lora", rank=2, name="fresh")
    with pytest.raises(InvalidOption, match="x-lora: 'fresh', 'second' change none of"):
        rf.adapt(model, "x-lora", rank=3, experts=("fresh", "second"), targets="*.gate_proj", name="more")
    assert "more" not in require(model).adapters
    rf.adapt(model, "x-lora", rank=3, experts=("first", "second"), targets="*.gate_proj", name="more")


def test_without_experts_it_says_what_they_may_be() -> None:
    with pytest.raises(InvalidOption, match=r"experts=.*names of adapters.*or experts=4.*fresh"):
        rf.adapt(seeded(llama), "x-lora")
    with pytest.raises(InvalidOption, match="x-lora: experts must be a whole number or a list, not 'a'"):
        rf.adapt(seeded(llama), "x-lora", experts="a")
