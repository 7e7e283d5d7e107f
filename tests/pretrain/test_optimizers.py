from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, UnknownMethod
from rankfold.pretrain import PretrainConfig
from rankfold.pretrain.ladder import LADDER
from rankfold.pretrain.optimizers import OptimizerPlan, check_optimizer, describe_optimizer


@pytest.fixture
def model() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(LADDER["0.1M"].config())


@pytest.fixture
def config() -> PretrainConfig:
    return PretrainConfig("0.1M", optimizer="galore")


def test_the_usual_rate_is_the_methods_own() -> None:
    assert check_optimizer("adamw", {}) == 1e-3
    assert check_optimizer("galore", {"rank": 4, "inner": "lion"}) == 0.01


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_an_option_that_there_is_not_is_named_with_near_ones(name: str) -> None:
    with pytest.raises(InvalidOption, match="has no option 'weigth_decay'; did you mean weight_decay"):
        check_optimizer(name, {"weigth_decay": 0.1})


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [
        ("galore", "rank", "abc", "a whole number"),
        ("galore", "rank", None, "a whole number"),
        ("galore", "scale", "half", "a number"),
        ("galore", "scale", float("nan"), "a finite number"),
        ("galore", "refresh", [1], "a whole number"),
        ("galore", "seed", "abc", "a whole number"),
        ("galore", "plain", 5, "a list"),
        ("fira", "staggered", 3, "true or false"),
        ("adamw", "weight_decay", "abc", "a number"),
        ("adamw", "amsgrad", "abc", "true or false"),
        ("adamw", "betas", 3, "a list"),
    ],
)
def test_an_option_of_another_kind_is_refused_with_the_kind_that_it_is(
    name: str, option: str, value: Any, kind: str
) -> None:
    with pytest.raises(InvalidOption, match=f"{name}: {option} must be {kind}, not"):
        check_optimizer(name, {option: value})


@pytest.mark.parametrize("options", [{"betas": [0.9]}, {"betas": [0.9, 2.0]}, {"weight_decay": -1.0}])
def test_what_adamw_does_not_take_is_refused(model: Any, options: dict[str, Any]) -> None:
    config = PretrainConfig("0.1M", set={f"optimizer.{key}": value for key, value in options.items()})
    plan = OptimizerPlan.of(model, config)
    with pytest.raises(InvalidOption, match="AdamW does not take these options"):
        plan.build(model)
    if "betas" in options:
        with pytest.raises(InvalidOption, match="AdamW does not take these options"):
            plan.small([("weight", torch.nn.Parameter(torch.ones(2)))], 1)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(UnknownMethod, match="did you mean galore"):
        check_optimizer("galor", {})
    with pytest.raises(UnknownMethod, match="did you mean adamw"):
        check_optimizer("adam", {})
    with pytest.raises(InvalidOption, match="mup is no optimizer"):
        check_optimizer("mup", {})


def test_every_optimizer_of_the_catalogue_is_made_or_refused_with_a_sentence(model: Any) -> None:
    made = set()
    for method in rf.methods("optim"):
        try:
            check_optimizer(method.name, {})
        except InvalidOption:
            continue
        plan = OptimizerPlan.of(model, PretrainConfig("0.1M", optimizer=method.name))
        assert isinstance(plan.build(model), torch.optim.Optimizer)
        made.add(method.name)
    assert {"galore", "fira", "frugal", "dct-projection", "flora"} <= made


def test_embeddings_and_the_head_are_not_projected_and_the_rank_is_a_quarter_of_the_width(
    model: Any, config: PretrainConfig
) -> None:
    optimizer = OptimizerPlan.of(model, config).build(model)
    assert describe_optimizer(optimizer, "galore") == "galore: 14 of 21 tensors projected, rank 12"
    given = OptimizerPlan.of(model, replace(config, set={"optimizer.rank": 5})).build(model)
    assert given.param_groups[0]["rank"] == 5


def test_a_rank_above_every_weight_is_refused_with_what_they_hold(model: Any, config: PretrainConfig) -> None:
    with pytest.raises(InvalidRank, match=r"at rank 49; the smaller side of the largest is 48"):
        OptimizerPlan.of(model, replace(config, set={"optimizer.rank": 49})).build(model)


def test_vectors_do_not_decay(model: Any) -> None:
    config = PretrainConfig("0.1M", set={"optimizer.weight_decay": 0.1, "optimizer.betas": [0.9, 0.95]})
    matrices, vectors = OptimizerPlan.of(model, config).build(model).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["betas"] == (0.9, 0.95)
    assert all(parameter.dim() == 1 for parameter in vectors["params"])
    with pytest.raises(InvalidOption, match="AdamW does not take"):
        OptimizerPlan.of(model, replace(config, set={"optimizer.betas": [0.9, 2.0]})).build(model)


def test_rates_by_side_are_adamws_alone(config: PretrainConfig) -> None:
    model: Any = LlamaForCausalLM(LADDER["0.1M"].config())
    rf.adapt(model, "lora/lora+", rank=2, targets="all-linear", train="all")
    with pytest.raises(Incompatible, match="set learning rates by side, which galore does not know"):
        OptimizerPlan.of(model, config)
    groups = OptimizerPlan.of(model, replace(config, optimizer="adamw")).build(model).param_groups
    assert len({group["lr"] for group in groups}) == 2
