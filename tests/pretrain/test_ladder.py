from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rankfold.errors import InvalidOption
from rankfold.pretrain.ladder import LADDER, rung

# Width, feed-forward width, blocks, heads: the configurations that GaLore published, and their parameters.
PUBLISHED = {
    "60M": (512, 1376, 8, 8, 58_073_600),
    "130M": (768, 2048, 12, 12, 134_105_856),
    "350M": (1024, 2736, 24, 16, 367_969_280),
    "1B": (2048, 5461, 24, 32, 1_339_082_752),
    "3B": (2560, 6848, 32, 32, 2_685_831_680),
    "7B": (4096, 11008, 32, 32, 6_738_415_616),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_large_sizes_are_those_of_the_literature(name: str) -> None:
    hidden, wide, layers, heads, parameters = PUBLISHED[name]
    config = LADDER[name].config()
    assert (config.hidden_size, config.intermediate_size) == (hidden, wide)
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
    assert (config.vocab_size, config.rms_norm_eps, config.initializer_range) == (32_000, 1e-6, 0.02)
    assert not config.tie_word_embeddings
    assert LADDER[name].parameters() == parameters


@pytest.mark.parametrize("name", LADDER)
def test_the_count_is_that_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LADDER[name].config())
    assert sum(parameter.numel() for parameter in model.parameters()) == LADDER[name].parameters()


@pytest.mark.parametrize("name", ["0.1M", "0.3M", "1M", "3M", "10M", "30M", "60M"])
def test_a_small_size_is_what_its_name_says(name: str) -> None:
    assert LADDER[name].parameters() == pytest.approx(float(name[:-1]) * 1e6, rel=0.12)


@pytest.mark.parametrize("name", LADDER)
def test_heads_are_of_even_width_and_fill_the_model(name: str) -> None:
    size = LADDER[name]
    assert size.hidden % (2 * size.heads) == 0


def test_the_guide_lists_the_sizes_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "pretrain.md").read_text(encoding="utf-8")
    for name, size in LADDER.items():
        numbers = (size.parameters(), size.hidden, size.layers, size.heads, size.vocabulary)
        assert f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |" in page


def test_a_size_that_is_not_there_is_refused_and_a_model_elsewhere_is_none() -> None:
    with pytest.raises(InvalidOption, match=r"no size 2M.*0\.1M"):
        rung("2M")
    assert rung("gpt2") is None
    assert rung("models/7B-of-mine") is None
