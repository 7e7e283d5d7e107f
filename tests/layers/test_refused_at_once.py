"""What used to be accepted and failed, or was lost, later."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layers.models import llama
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, UnknownTarget


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))


def test_a_model_of_which_a_part_is_adapted_is_refused_and_the_part_keeps_its_adapter() -> None:
    model = nested()
    rf.adapt(model[0], "lora", rank=2)
    with pytest.raises(Incompatible, match="the part '0' of the model holds an adapter"):
        rf.adapt(model, "lora", rank=2)
    assert rf.summary(model[0]).trainable == 32


def test_a_part_of_an_adapted_model_is_refused() -> None:
    model = rf.adapt(nested(), "lora", rank=2)
    with pytest.raises(Incompatible, match="part of a larger model"):
        rf.adapt(model[0], "lora", rank=2, name="other")


@pytest.mark.parametrize("name", ["train", "keys", "forward"])
def test_a_name_that_modules_use_themselves_is_refused_and_nothing_is_left(name: str) -> None:
    model = nested()
    with pytest.raises(InvalidOption, match="modules have an attribute"):
        rf.adapt(model, "vera", rank=2, name=name)
    assert list(model.state_dict()) == list(nested().state_dict())


@pytest.mark.parametrize("seed", [None, "x", 1.5, True, torch.tensor(0.5)])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(InvalidOption, match="seed must be a whole number"):
        rf.adapt(nested(), "lora", rank=2, seed=seed)


def test_names_that_differ_by_a_hyphen_share_nothing() -> None:
    model, x = nested(), torch.ones(1, 8)
    rf.adapt(model, "vera", rank=2, name="a-b", seed=0)
    nn.init.ones_(model[1].adapters["a-b"].leaf("b").tensor())
    before = model(x)
    rf.adapt(model, "vera", rank=2, name="a_b", seed=1)
    rf.use(model, "a-b")
    assert torch.equal(model(x), before)
    rf.remove(model, "a_b")
    assert torch.equal(model(x), before)


def test_blocks_are_no_target_of_a_method_that_changes_weights() -> None:
    with pytest.raises(UnknownTarget, match="lora changes weights"):
        rf.adapt(llama(), "lora", targets="blocks")


def test_reft_is_checked_against_the_width_of_the_output() -> None:
    with pytest.raises(InvalidRank, match="channels"):
        rf.adapt(llama(), "reft", rank=10_000)


def test_a_normalised_weight_takes_no_change_that_differs_from_token_to_token() -> None:
    model = rf.adapt(llama(), "dora", rank=2, name="d")
    rf.adapt(model, "alora", rank=2, name="a", invocation=[1])
    with pytest.raises(Incompatible, match="differ from token to token"):
        rf.use(model, ["d", "a"])


def test_a_model_in_double_precision_is_saved_and_loaded(tmp_path: Path) -> None:
    model = rf.adapt(nested().double(), "lora", rank=2)
    rf.save(model, tmp_path / "adapter")
    rf.load(rf.remove(model), tmp_path / "adapter")


def test_a_plan_marks_only_what_would_train() -> None:
    assert "W0[" in str(rf.plan(nested(), "lora", rank=2))
    assert "W0*" not in str(rf.plan(nested(), "lora", rank=2))
