"""ECG LoRA and recipes as such: which layers are meant, and what a recipe may carry."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import trained
from torch import Tensor, nn

import rankfold as rf
from rankfold.cli.main import main
from rankfold.errors import Incompatible, InvalidRank, UnknownMethod, UnknownTarget
from rankfold.layers import find_targets
from rankfold.methods import registry
from rankfold.methods.recipe import named, resolve
from rankfold.methods.registry import recipe

ABOUT: dict[str, Any] = {"title": "A recipe", "year": 2025, "formula": "W"}


def mllama() -> Any:
    """Return a small vision-language model with cross-attention."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "cross_attention_layers": [1], "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 24, "vision_output_dim": 32, "image_size": 8, "patch_size": 4,
        "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0],
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    return model.eval()


def llama() -> Any:
    """Return a small language model whose head is tied to its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def adapted_paths(model: nn.Module) -> set[str]:
    return set(model.__dict__["_rankfold"].layers)


def loss_of(model: Any) -> Tensor:
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    if not hasattr(model.config, "vision_config"):
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]
    image = torch.randn(2, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    loss: Tensor = model(
        input_ids=ids, labels=ids, pixel_values=image, aspect_ratio_ids=torch.ones(2, 1, dtype=torch.long),
        aspect_ratio_mask=torch.ones(2, 1, 1, dtype=torch.long),
        cross_attention_mask=torch.ones(2, 7, 1, 1, dtype=torch.long),
    ).loss  # fmt: skip
    return loss


# The layers that are meant ----------------------------------------------------------------------------


def test_exactly_the_linear_layers_that_are_not_excluded_are_adapted() -> None:
    every = linears(mllama())
    assert "lm_head" in every
    groups = ("vision_model.transformer", "vision_model.global_transformer", "cross_attn", "self_attn", "mlp")
    assert all(any(group in path for path in every) for group in groups)
    assert adapted_paths(rf.adapt(mllama(), "ecg-lora", rank=2)) == every - {"lm_head"}


@pytest.mark.parametrize("tied", [False, True])
def test_training_leaves_embedding_and_head_alone_bit_for_bit(tied: bool) -> None:
    model = rf.adapt(llama() if tied else mllama(), "ecg-lora", rank=2)
    ends: Any = [model.get_output_embeddings(), model.get_input_embeddings()]  # type: ignore[operator]
    assert (ends[0].weight is ends[1].weight) is tied
    before, first = [end.weight.clone() for end in ends], loss_of(model).item()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < first
    assert all(torch.equal(end.weight, value) for end, value in zip(ends, before, strict=True))
    assert (ends[0].weight is ends[1].weight) is tied


def test_the_groups_are_apart_and_together_all_of_it() -> None:
    model = mllama()
    groups = [
        {t.path for t in find_targets(model, name)} for name in ("vision", "cross-attention", "language")
    ]
    assert set.union(*groups) == linears(model) - {"lm_head"}
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all("vision_model" in path or "projector" in path for path in groups[0])
    assert groups[1] == {f"model.language_model.layers.1.cross_attn.{p}_proj" for p in ("q", "k", "v", "o")}
    only = rf.adapt(mllama(), "ecg-lora", rank=2, targets=["vision", "cross-attention"])
    assert adapted_paths(only) == groups[0] | groups[1]


def test_a_saved_adapter_needs_no_recipe_to_be_loaded(tmp_path: Path) -> None:
    model = rf.adapt(mllama(), "ecg-lora", rank=2, alpha=4)
    loaded = rf.load(mllama(), rf.save(model, tmp_path / "adapter"))
    assert adapted_paths(loaded) == adapted_paths(model)
    record = json.loads((tmp_path / "adapter" / "rankfold.json").read_text())
    assert record["recipe"]["structure"][0] == "lora"


def test_an_excluded_name_leaves_out_what_lies_inside_it() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "c": nn.Linear(4, 4)})
    rf.adapt(model, rf.Recipe("lora", exclude=("a",)), rank=2)
    assert adapted_paths(model) == {"c"}
    with pytest.raises(UnknownTarget, match=r"excludes a\.b and every other target"):
        rf.plan(nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)})}), rf.Recipe("lora", exclude=["a"]))


# Recipes ----------------------------------------------------------------------------------------------


def test_every_recipe_of_the_catalogue_means_a_point_that_makes_sense() -> None:
    found = rf.methods("recipe")
    assert "ecg-lora" in {method.name for method in found}
    for method in found:
        assert method.title
        assert 2000 < method.year < 2100
        assert method.formula
        assert method.doc
        resolve(named(method.name), {})


def test_further_parts_fill_what_a_recipe_leaves_open() -> None:
    point = rf.parse_point("lora+/ecg-lora/pissa")
    assert (point.structure, point.init, point.dynamics) == ("lora", "pissa", ("lora+",))
    assert point.exclude == ("lm_head", "embed_tokens")
    with pytest.raises(Incompatible, match="ecg-lora is a recipe with lora for structure, not dora"):
        rf.parse_point("ecg-lora/dora")


@pytest.mark.usefixtures("clean")
def test_a_recipe_carries_parts_targets_and_rank_and_what_is_given_wins() -> None:
    whole = rf.Recipe(
        ("lora", {"alpha": 3}), "pissa", "uniform", ("lora+",), targets=["a"], exclude=("b",), rank=3
    )
    recipe("whole", **ABOUT)(lambda: whole)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    plan = rf.plan(model, "whole")
    assert [(site.path, site.rank) for site in plan.sites] == [("a", 3)]
    plan = rf.plan(model, "whole", rank=2, targets=["b", "c"])
    assert [(site.path, site.rank) for site in plan.sites] == [("b", 2), ("c", 2)]
    assert resolve(rf.parse_point("whole"), {}).options["alpha"] == 3
    assert rf.Recipe.from_dict(whole.to_dict()).to_dict() == whole.to_dict()


@pytest.mark.usefixtures("clean")
def test_a_rank_that_the_structure_cannot_have_is_refused() -> None:
    recipe("rankless", **ABOUT)(lambda: rf.Recipe("diablo", rank=4))
    with pytest.raises(InvalidRank, match="diablo has no rank"):
        rf.plan(nn.Sequential(nn.Linear(8, 8)), "rankless")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("point", "sentence"),
    [(rf.Recipe("lroa"), "no structure is called 'lroa'; did you mean lora"),
     (rf.Recipe("lora", "pisa"), "no init is called 'pisa'"),
     (rf.Recipe("lora", dynamics=("galore",)), "no dynamics is called 'galore'")],
)  # fmt: skip
def test_a_part_that_is_no_method_is_refused(point: rf.Recipe, sentence: str) -> None:
    recipe("wrong", **ABOUT)(lambda: point)
    with pytest.raises(UnknownMethod, match=sentence):
        rf.parse_point("wrong")


@pytest.mark.usefixtures("clean")
def test_a_name_is_that_of_one_recipe() -> None:
    with pytest.raises(ValueError, match="the name is taken"):
        recipe("ecg-lora", **ABOUT)(lambda: rf.Recipe("lora"))
    assert registry.get("recipe", "ecg-lora").year == 2025


def test_the_command_line_lists_shows_and_does_not_combine_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--axis", "recipe"]) == 0
    assert "ecg-lora" in capsys.readouterr().out
    assert main(["methods", "ecg-lora"]) == 0
    shown = capsys.readouterr().out
    assert "point    lora; targets all-linear; exclude ('lm_head', 'embed_tokens')" in shown
    assert "https://arxiv.org/abs/2501.18670" in shown
    assert main(["methods", "ecg-lora", "--compose"]) == 2
    assert "ecg-lora is a recipe and no part" in capsys.readouterr().err
