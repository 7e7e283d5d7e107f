"""Permutations of hidden units: what they leave alone, where they are found, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.errors import Incompatible, InvalidOption, UnsupportedLayer
from rankfold.merging.permutations import Axis, Specification, check, named_tensors, permuted, specified
from rankfold.merging.symmetries import specification

ROUNDING = 1e-12


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 11)[None]}


def filled(model: nn.Module) -> nn.Module:
    """Give norms, biases and running statistics values that differ from unit to unit."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1 and "inv_freq" not in name:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(noise + 0.5)
    return model.double().eval()


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return filled(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return filled(Qwen3ForCausalLM(config))


BERT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, "initializer_range": 0.2,
}  # fmt: skip


def bert(head: str = "BertForMaskedLM") -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return filled(getattr(transformers, head)(transformers.BertConfig(**BERT)))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    sizes = {"vocab_size": 40, "dim": 24, "hidden_dim": 20, "n_layers": 1, "n_heads": 4}
    return filled(DistilBertForMaskedLM(DistilBertConfig(**sizes)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return filled(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=16, initializer_range=0.2)
        )
    )


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 1}
    return filled(OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=24)))


def torch_encoder() -> nn.Module:
    return filled(nn.TransformerEncoderLayer(24, 4, 20, batch_first=True))


def convolutions() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.PReLU(6), nn.Conv2d(6, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.MaxPool2d(2), nn.Dropout(),
    )  # fmt: skip
    head = (
        nn.Flatten(),
        nn.BatchNorm1d(5 * 9),
        nn.Linear(5 * 9, 7),
        nn.LayerNorm(7),
        nn.GELU(),
        nn.Linear(7, 3),
    )
    torch.manual_seed(0)
    return filled(nn.Sequential(features, *head))


def image() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sequence() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Each with the permutations that must be found.
KNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    "llama": (llama, tokens, 4),
    "qwen3": (qwen3, tokens, 2),
    "bert": (bert, tokens, 4),
    "bert classifier": (lambda: bert("BertForSequenceClassification"), tokens, 4),
    "distilbert": (distilbert, tokens, 2),
    "gpt2": (gpt2, tokens, 4),
    "opt": (opt, tokens, 2),
    "torch's encoder": (torch_encoder, sequence, 2),
    "convolutions": (convolutions, image, 3),
}


@pytest.mark.parametrize("name", KNOWN)
def test_permuting_a_known_architecture_changes_its_output_only_by_rounding(name: str) -> None:
    make, inputs, count = KNOWN[name]
    model = make()
    spec = specification(model)
    assert len(spec.units) == count
    assert check(model, spec, inputs()) < ROUNDING


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "convolutions"])
def test_a_specification_that_lacks_a_tensor_is_found_out(name: str) -> None:
    make, inputs, _ = KNOWN[name]
    model = make()
    spec = specification(model)
    # A key's bias adds the same to all scores of a query, so that where it stands is not seen.
    silent = ("k_proj.bias", "key.bias")
    for missing in [name for name in spec.tensors if not name.endswith(silent)]:
        rest = Specification({name: axes for name, axes in spec.tensors.items() if name != missing})
        with pytest.raises(Incompatible, match="changes the output"):
            check(model, rest, inputs())


@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), bert, gpt2])
def test_the_residual_stream_moves_too_where_all_of_it_is_covered(make: Callable[[], nn.Module]) -> None:
    model = make()
    spec = specification(model, residual=True)
    assert spec.units["residual"] == 24
    # Norms of transformers compute in float32.
    assert check(model, spec, tokens(), seed=3) < 1e-6


def test_the_residual_stream_of_a_model_without_a_head_is_refused_because_it_is_the_output() -> None:
    with pytest.raises(Incompatible, match="changes the output"):
        specification(bert("BertModel"), residual=True)


def test_the_residual_stream_of_a_chain_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="hidden_size"):
        specification(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), residual=True)


def test_grouped_queries_move_with_the_keys_and_values_they_share() -> None:
    spec = specification(llama())
    prefix = "model.layers.0.self_attn"
    heads = Axis(f"{prefix}.heads", units=3)
    assert spec.tensors[f"{prefix}.q_proj.weight"] == (heads, None)
    assert spec.tensors[f"{prefix}.k_proj.weight"] == (heads, None)
    assert spec.tensors[f"{prefix}.o_proj.weight"] == (None, heads)


def test_gate_and_up_share_one_permutation() -> None:
    spec = specification(llama())
    gate, up = (spec.tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert gate == up
    assert gate[0] is not None
    assert gate[0].units == 20


def test_what_leaves_or_enters_a_chain_stays_in_its_place() -> None:
    spec = specification(convolutions())
    assert spec.tensors["0.0.weight"][1] is None
    assert "6.bias" not in spec.tensors
    assert spec.tensors["6.weight"][0] is None


def test_a_chain_is_cut_at_a_layer_of_an_unknown_kind() -> None:
    parts = (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 3), nn.ReLU())
    model = nn.Sequential(*parts, nn.Linear(3, 2)).double()
    spec = specification(model)
    assert dict(spec.units) == {"0": 6, "4": 3}
    assert check(model, spec, torch.randn(7, 4, dtype=torch.float64)) < ROUNDING


@pytest.mark.parametrize(
    "between",
    [nn.Conv1d(6, 6, 1, groups=2), nn.GroupNorm(2, 6), nn.LayerNorm(5), nn.Flatten(1, 1), nn.Softmax(1)],
)
def test_layers_that_mix_some_channels_cut_a_chain_and_its_output_stays(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv1d(2, 6, 1), between, nn.Conv1d(6, 4, 1), nn.ReLU(), nn.Conv1d(4, 3, 1))
    filled(model)
    assert check(model, specification(model), torch.randn(2, 2, 5, dtype=torch.float64)) < ROUNDING


def test_an_architecture_of_unknown_parts_is_refused_with_a_sentence() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    with pytest.raises(UnsupportedLayer, match="Custom are known that could change places; pass spec="):
        specification(Custom())


def test_attention_with_parameters_of_its_own_is_refused_with_their_name() -> None:
    model = llama()
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    attention.sinks = nn.Parameter(torch.zeros(6))
    with pytest.raises(UnsupportedLayer, match=r"layers\.1\.self_attn\.sinks \(6,\)"):
        specification(model)


def test_a_layer_that_is_used_twice_is_refused_where_two_permutations_would_act_on_it() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(Incompatible, match=r"0\.weight and 2\.weight are one tensor"):
        specification(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2)))


def test_permuting_by_an_order_and_back_is_exact() -> None:
    model = convolutions()
    spec = specification(model)
    orders = spec.drawn(5)
    back = {name: order.argsort() for name, order in orders.items()}
    again = permuted(permuted(model, spec, orders), spec, back).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_permuting_leaves_the_model_itself_alone() -> None:
    model = convolutions()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = specification(model)
    twin = permuted(model, spec, spec.drawn())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not torch.equal(twin.state_dict()["0.0.weight"], before["0.0.weight"])


@settings(max_examples=30, deadline=None)
@given(units=st.integers(1, 5), groups=st.integers(1, 3), block=st.integers(1, 4), dim=st.integers(0, 1))
def test_an_axis_moves_blocks_of_neighbours_group_by_group(
    units: int, groups: int, block: int, dim: int
) -> None:
    axis, size = Axis("p", units, groups), units * groups * block
    tensor = torch.arange(3 * size).reshape((3, size) if dim else (size, 3))
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    moved = axis.moved(tensor, dim, order)
    places = [
        (g * units + int(order[u])) * block + b
        for g in range(groups)
        for u in range(units)
        for b in range(block)
    ]
    assert torch.equal(moved, tensor.index_select(dim, torch.tensor(places)))
    assert torch.equal(axis.unfolded(moved, dim), axis.unfolded(tensor, dim)[order])


def test_a_specification_by_hand_says_what_that_of_the_architecture_says() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    by_hand = {"0.weight": ["0", None, None], "0.bias": ["0"], "3.weight": [None, ("0", 4)]}
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    assert specified(by_hand, shapes) == specification(model)


@pytest.mark.parametrize(
    ("given_axes", "sentence"),
    [
        ({"0.weigth": ["h", None]}, r"no tensor '0\.weigth'; did you mean 0\.weight"),
        ({"0.weight": ["h"]}, "for each of its 2 axes"),
        ({"0.weight": "h"}, "for each of its 2 axes"),
        ({"0.weight": [("h", 4), None]}, "6 entries, which are not 4 units in 1 groups"),
        ({"0.weight": [("h", 0), None]}, "6 entries, which are not 0 units"),
        ({"0.weight": ["h", None], "2.weight": ["h", None]}, "has 5 units here and 6 elsewhere"),
    ],
)
def test_a_specification_by_hand_that_does_not_fit_is_refused(given_axes: Any, sentence: str) -> None:
    shapes = {"0.weight": (6, 3), "2.weight": (5, 6)}
    with pytest.raises(InvalidOption, match=sentence):
        specified(given_axes, shapes)


def test_as_many_positions_as_the_hidden_size_are_not_taken_for_the_residual_stream() -> None:
    import transformers

    model = filled(
        transformers.BertForMaskedLM(transformers.BertConfig(**{**BERT, "max_position_embeddings": 24}))
    )
    spec = specification(model, residual=True)
    assert spec.tensors["bert.embeddings.position_embeddings.weight"] == (None, Axis("residual", 24))


def test_channels_that_a_layer_does_not_take_in_stay_although_their_number_fits() -> None:
    model = nn.Sequential(nn.Conv1d(2, 6, 1), nn.Flatten(2), nn.Linear(6, 4))
    with pytest.raises(UnsupportedLayer, match="no hidden units of Sequential"):
        specification(model)


def test_a_specification_of_a_number_is_one_sentence() -> None:
    with pytest.raises(InvalidOption, match="up"):
        specified({"up": 5}, {"up": (6, 4)})  # type: ignore[dict-item]
